"""Plans for NVIDIA GPUs, built by TensorRT (on the GPU they are for) or TensorRT for RTX (on any machine).

TensorRT runs in a process of its own (process.py): a build has no end that can be foreseen, a crash or a lack of
memory in it would take ours along, and only a process can be stopped at any moment.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fcn_deploy.calibration.report.engine_report import PlanLayer
from fcn_deploy.export.build.config import TensorRTOptions
from fcn_deploy.export.build.gpus import THIS_GPU
from fcn_deploy.export.build.targets.tensorrt import process
from fcn_deploy.export.build.targets.tensorrt.errors import too_long
from fcn_deploy.export.build.targets.tensorrt.kernels import check_compiler
from fcn_deploy.export.build.targets.tensorrt.process import BuiltPlan
from fcn_deploy.export.build.targets.tensorrt.profile_search import Cost
from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile
from fcn_deploy.export.quantization.options import Say
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.extras import need
from fcn_deploy.runtime.pixels.prepare import padded_size
from onnx import ModelProto

GRACE = 3.0  # seconds after a timeout in which TensorRT may end by itself, so that its timings are kept


def build_plan(
    core: ModelProto, options: TensorRTOptions, profiles: Sequence[PlannedProfile], say: Say = lambda line: None
) -> BuiltPlan:
    """A strongly typed plan with free N, H and W, built in a process of its own.

    Args:
        core: one input [N, C, H, W]; precision is in its graph: casts and Q/DQ.
        options: of the build.
        profiles: one optimisation profile each, in this order.
        say: called with a line of phase and seconds, about once a second.

    Raises:
        MisuseError: an option that this TensorRT does not have.
        DeployError: TensorRT is missing, there is no GPU, the network is refused (naming the node), the build
            fails, or it takes longer than the timeout. Nothing is left behind.
    """
    if not profiles:
        raise MisuseError("no optimisation profile; plan at least one (plan_profiles of profiles.py, beside this)")
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as name:
        folder = Path(name)
        try:
            (folder / "core.onnx").write_bytes(core.SerializeToString())
        except (ValueError, OSError) as error:  # protobuf's limit of 2 GB; a full disk
            raise DeployError(f"the network cannot be handed to TensorRT: {error}") from error
        job = {
            "options": asdict(options)
            | {"timing_cache": options.timing_cache and str(options.timing_cache.absolute())},
            "rounded": any(node.op_type == "DequantizeLinear" for node in core.graph.node),
            "profiles": [asdict(profile) | {"sizes": ()} for profile in profiles],
        }
        (folder / "job.json").write_text(json.dumps(job))
        result = _supervise(folder, options.timeout, say)
        return BuiltPlan(
            (folder / "plan").read_bytes(),
            tuple(result["activation_bytes"]),
            result["module"],
            result["version"],
            tuple(result["targets"]),
            result["seconds"],
            tuple(result["notes"]),
            tuple(PlanLayer(**each | {k: tuple(each[k]) for k in ("takes", "gives")}) for each in result["layers"]),
        )


def check_builder(options: TensorRTOptions, types: Sequence[str] = ()) -> None:
    """Refuse what cannot be built here, before minutes are spent on calibration.

    Args:
        options: of the build.
        types: those of LEAST_GPU that are asked for, which the GPU of this machine must have.

    Raises:
        DeployError: TensorRT or a compiler of the kernels is missing, or there is no GPU for `cuda`, or not of these.
    """
    check_compiler()
    if tuple(options.targets) != (THIS_GPU,):
        if find_spec("tensorrt_rtx") is None:
            need("tensorrt_rtx", "rtx")  # the line that installs it
        return
    # In a process of its own, as the build is: it asks the driver.
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder:
        (Path(folder) / "types.json").write_text(json.dumps(list(types)))
        done = subprocess.run(_command("run_check", Path(folder)), stdin=subprocess.DEVNULL, capture_output=True)
        said = Path(folder) / "said.json"
        problem = (
            json.loads(said.read_text()) if said.is_file() else f"TensorRT broke off (exit code {done.returncode})"
        )
    if problem:
        raise DeployError(problem)


def parser_refusals(core: ModelProto, timeout: float = 120.0) -> tuple[str, list[tuple[str, str, str]]]:
    """What the ONNX parser of TensorRT for RTX, or of TensorRT, says of a network, in a process of its own.

    Returns:
        (module and version, [(node, operator, reason), …] that it refuses; none where it takes all).

    Raises:
        DeployError: neither is installed, or it breaks off.
    """
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as name:
        folder = Path(name)
        (folder / "core.onnx").write_bytes(core.SerializeToString())
        command = _command("run_parser", folder)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise DeployError(f"TensorRT's parser took longer than {timeout:g} s") from error
        if not (folder / "said.json").is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
            raise DeployError(f"TensorRT's parser broke off (exit code {done.returncode}): {lines[-1][:200]}")
        said = json.loads((folder / "said.json").read_text())
    if "error" in said:
        raise DeployError(said["error"])
    return said["module"], [tuple(each) for each in said["refused"]]


PROBED_SIDES = (512, 2048)  # sides of the squares at which activation memory is asked for


def activation_cost(
    core: ModelProto, options: TensorRTOptions, card: ModelCard, say: Say = lambda line: None
) -> Cost | None:
    """Bytes of activations for so many pixels (batch · H · W of a MAX), as TensorRT itself plans them.

    For plan_profiles. A straight line through two sizes, from a build of its own: a second with TensorRT for RTX,
    minutes with TensorRT, which times kernels. None where the builder does not tell. Raises as `build_plan`.
    """
    sides = [padded_size(side, side, card) for side in PROBED_SIDES]
    probes = [PlannedProfile(side, side, side) for side in sides]
    small, large = build_plan(core, replace(options, workspace=None), probes, say).activation_bytes
    if small is None or large is None:
        return None
    slope = max(0.0, (large - small) / (probes[1].pixels - probes[0].pixels))
    base = max(0.0, small - slope * probes[0].pixels)
    return lambda pixels: base + slope * pixels


def _command(function: str, folder: Path) -> list[str]:
    """A command line that calls a function of process.py on a folder."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {process.__name__} import {function}"
    return [sys.executable, "-W", "ignore", "-c", f"{code}; {function}(sys.argv[1])", str(folder)]


def _supervise(folder: Path, timeout: float | None, say: Say) -> dict[str, Any]:
    """Run the builder on the job in `folder` and return its result; whatever happens, the process is gone after."""
    start = time.monotonic()
    with (folder / "stderr").open("wb") as errors:
        child = subprocess.Popen(
            _command("run_build", folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert child.stdin is not None and child.stdout is not None
    keep_open, out = child.stdin, child.stdout
    events: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def read() -> None:
        try:
            for line in out:
                events.put(json.loads(line))
        finally:
            events.put(None)

    # A pipe cannot be waited on with a timeout on every system; a queue can.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    phase, said = "starting", -1.0
    try:
        while True:
            elapsed = time.monotonic() - start
            if timeout is not None and elapsed > timeout + GRACE:
                raise too_long(timeout, phase)
            try:
                event = events.get(timeout=0.2)
            except queue.Empty:
                event = {}
            if event is None:
                raise _died(child, folder)
            if "result" in event:
                return event["result"]
            if "error" in event:
                raise (MisuseError if event["misuse"] else DeployError)(event["error"])
            phase = event.get("phase", phase)
            if elapsed - said >= 0.5:
                said = elapsed
                say(f"{phase} ({elapsed:.0f} s)")
    finally:
        child.kill()
        child.wait()
        reader.join()
        keep_open.close()
        out.close()


def _died(child: subprocess.Popen, folder: Path) -> DeployError:
    code = child.wait()
    lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
    why = f"; it last said: {lines[-1][:200]}" if lines else ""
    if code == -9:
        return DeployError(
            f"the system ended TensorRT, as it does when memory runs out; free some, or build smaller{why}"
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return DeployError(f"TensorRT broke off while it built ({how}){why}; try another version of it")

"""What runs TensorRT, in a process of its own: parses a network, builds a plan, and says in one line what failed."""

import ctypes
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fcn_deploy.calibration.report.engine_report import PlanLayer
from fcn_deploy.export.build.config import HARDWARE_LEVELS, TensorRTOptions
from fcn_deploy.export.build.gpus import ON_THE_MACHINE, THIS_GPU, TOO_OLD, check_type
from fcn_deploy.export.build.targets.tensorrt.errors import LIBRARY_NAMES, failed, reason_of, refused, tidied, too_long
from fcn_deploy.export.build.targets.tensorrt.layers import layers_of
from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile
from fcn_deploy.export.build.targets.tensorrt.timing_cache import TimingCache
from fcn_deploy.runtime.backends import OLDEST_GPU
from fcn_deploy.runtime.backends.tensorrt.device import platform_name
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from fcn_deploy.runtime.extras import need

OLDEST_TENSORRT = (10, 12)
# For which TensorRT for RTX has no kernels of convolutions of few channels a group; of INT8 it has them for no GPU.
WIDENED = "sm75"
RUNTIME_PLATFORMS = {"windows-x86_64": "WINDOWS_AMD64"}  # as manifests have it → TensorRT's name


@dataclass(frozen=True)
class BuiltPlan:
    """A plan and what is known of it.

    Attributes:
        plan: serialised; it is code, to be loaded from trusted sources only.
        activation_bytes: per profile, of a context at its MAX, as the builder reports; None where it does not.
        module: Python module that runs it: `tensorrt` or `tensorrt_rtx`.
        version: of that module.
        targets: compute capabilities it is for, such as sm89.
        seconds: that the build took.
        notes: what the user should know, a line each.
        layers: as the builder lists them.
    """

    plan: bytes
    activation_bytes: tuple[int | None, ...]
    module: str
    version: str
    targets: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    layers: tuple[PlanLayer, ...] = ()


def run_build(name: str) -> None:
    """Build the job in a folder. Its messages go to the parent as JSON lines; what libraries print does not."""
    # fd 1 is TensorRT's own, too.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")

    def follow() -> None:
        sys.stdin.buffer.read()
        os._exit(1)  # the parent is gone

    threading.Thread(target=follow, daemon=True).start()
    folder = Path(name)
    job = json.loads((folder / "job.json").read_text())
    options = job["options"]
    if options["timing_cache"]:
        options["timing_cache"] = Path(options["timing_cache"])
    options["targets"] = tuple(options["targets"])
    profiles = [
        PlannedProfile(tuple(profile["min"]), tuple(profile["opt"]), tuple(profile["max"]), profile["batch"])
        for profile in job["profiles"]
    ]
    try:
        options = TensorRTOptions(**options)
        trt, targets = choose_module(options.targets)
        if trt.__name__ == "tensorrt_rtx" and (WIDENED in targets or job["rounded"]):
            _widen(folder / "core.onnx", WIDENED not in targets)
        built = build_here(trt, folder / "core.onnx", options, profiles, targets, lambda phase: send(phase=phase))
        (folder / "plan").write_bytes(built.plan)
        send(result=asdict(built) | {"plan": None})
    except DeployError as error:
        send(error=str(error), misuse=isinstance(error, MisuseError))
    except MemoryError:
        send(error="out of memory while building; free some, or give smaller --sizes or --max-batch", misuse=False)
    except OSError as error:
        send(error=f"the plan cannot be stored: {error}", misuse=False)
    out.flush()
    os._exit(0)  # destructors of a cancelled build may hang


def _widen(core: Path, rounded_alone: bool) -> None:
    import onnx  # here, since other builds need none of it
    from fcn_deploy.export.passes.widen_groups import widen_groups

    onnx.save(widen_groups(onnx.load(core), rounded_alone).model, core)


def run_check(name: str) -> None:
    """Write into a folder why the GPU of this machine cannot be built for; "" where it can.

    Its types.json names the types of LEAST_GPU that are asked for.
    """
    try:
        types = json.loads((Path(name) / "types.json").read_text())
        _, (target,) = choose_module((THIS_GPU,))
        for each in types:
            check_type(each, target)
        problem = ""
    except DeployError as error:
        problem = str(error)
    (Path(name) / "said.json").write_text(json.dumps(problem))
    os._exit(0)  # destructors have no part in it


def run_parser(name: str) -> None:
    """Write what the parser says of the network in a folder beside it."""
    folder = Path(name)
    try:
        trt = _any_module()
        log = _logger(trt)
        flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = trt.Builder(log).create_network(0 if flags is None else 1 << int(flags))
        parser = trt.OnnxParser(network, log)
        turned_down = []
        if not parser.supports_model_v2((folder / "core.onnx").read_bytes()):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            turned_down = [(each.node_name(), each.node_operator(), tidied(each.desc())) for each in errors]
            turned_down = turned_down or [("", "", reason_of(log.errors) or "no reason given")]
        said = {"module": f"{trt.__name__} {trt.__version__}", "refused": list(dict.fromkeys(turned_down))}
    except DeployError as error:
        said = {"error": str(error)}
    (folder / "said.json").write_text(json.dumps(said))
    os._exit(0)  # destructors have no part in it


def _any_module() -> ModuleType:
    """tensorrt_rtx, or else tensorrt. Raises DeployError where neither can be imported."""
    try:
        return need("tensorrt_rtx", "rtx")
    except DeployError:
        try:
            return import_module("tensorrt")
        except Exception as error:  # not installed, or its libraries are not
            raise DeployError("tensorrt_rtx is not installed; run: pip install 'fcn-deploy[rtx]'") from error


def choose_module(targets: Sequence[str]) -> tuple[ModuleType, tuple[str, ...]]:
    """The module that builds for `targets`, and the compute capabilities these are.

    Raises:
        DeployError: it is missing, or `cuda` is asked for without a GPU.
    """
    if tuple(targets) != (THIS_GPU,):
        return need("tensorrt_rtx", "rtx"), tuple(targets)
    device = local_device()
    if device is None:
        raise DeployError(
            f"--target {THIS_GPU} is the GPU of this machine, and none can be used (no NVIDIA driver or device); name "
            "the GPUs to build for, such as --target sm86,sm89,sm120"
        )
    found = f"sm{device[0]}{device[1]}"
    if int(found[2:]) < int(OLDEST_GPU[2:]):
        raise DeployError(f"the GPU of this machine is {found}: {TOO_OLD}")
    why_not = "tensorrt is not installed"
    try:
        trt = import_module("tensorrt")
        if tuple(int(part) for part in trt.__version__.split(".")[:2]) >= OLDEST_TENSORRT:
            return trt, (found,)
        why_not = f"tensorrt {trt.__version__} is too old ({'.'.join(map(str, OLDEST_TENSORRT))} or later is wanted)"
    except Exception as error:  # not installed; or its libraries are not, or are of another CUDA
        if getattr(error, "name", None) != "tensorrt":
            why_not = f"tensorrt cannot be imported ({one_line(error, 100)})"
    if found in ON_THE_MACHINE:
        raise DeployError(
            f"{why_not}, and TensorRT for RTX has no plans for {found} ({ON_THE_MACHINE[found]}); run: pip install "
            "'fcn-deploy[tensorrt]'"
        )
    try:
        return import_module("tensorrt_rtx"), (found,)
    except Exception as error:
        raise DeployError(
            f"{why_not}, and tensorrt_rtx cannot be imported; run: pip install 'fcn-deploy[tensorrt]' (or [rtx])"
        ) from error


def local_device() -> tuple[int, int] | None:
    """Compute capability, (major, minor), of the first GPU that CUDA shows; None where there is none.

    Asked of the driver itself: no Python package for CUDA is needed to build.
    """
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            cuda = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        return None
    device, values = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    for value, attribute in zip(values, (75, 76), strict=True):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return values[0].value, values[1].value


def build_here(
    trt: ModuleType,
    model: Path,
    options: TensorRTOptions,
    profiles: Sequence[PlannedProfile],
    targets: tuple[str, ...],
    progress: Callable[[str], None] = lambda phase: None,
) -> BuiltPlan:
    """As `build_plan`, in this process, by `trt`, which is tensorrt or tensorrt_rtx; `model` is an ONNX file."""
    start = time.monotonic()
    deadline = start + options.timeout if options.timeout is not None else float("inf")
    log, name = _logger(trt), trt.__name__
    notes: list[str] = []
    try:
        builder = trt.Builder(log)
    except Exception as error:
        raise DeployError(
            f"{LIBRARY_NAMES[name]} cannot start: {reason_of(log.errors) or error}; is there a usable GPU?"
        ) from error
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, log)
    progress("reading the network")
    if not parser.parse_from_file(str(model)):
        raise refused(parser, log)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    _set_targets(trt, config, options, targets)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    notes += _set_compatibility(trt, config, options)
    notes += _set_platform(trt, config, options, log)
    if options.level is not None:
        config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the log then lists the layers
    _add_profiles(builder, network, config, profiles, log)
    cache = None
    if options.timing_cache is not None:
        cache = TimingCache(options.timing_cache, f"{name} {trt.__version__} {','.join(targets)}")
        notes += cache.attach(trt, config)
    log.errors.clear()  # what was said so far was no failure
    config.progress_monitor = monitor = _monitor(trt, deadline, progress)
    progress("building")
    plan = builder.build_serialized_network(network, config)
    if cache is not None:
        # Also after a timeout: the next attempt goes on from there.
        notes += cache.save(config)
    if monitor.cancelled and options.timeout is not None:
        raise too_long(options.timeout, monitor.phase)
    if plan is None or log.inconsistent:
        raise failed(name, log, options)
    sizes: list[int | None] = list(log.activations)
    if len(sizes) != len(profiles):
        sizes = [None] * len(profiles)
    seconds = round(time.monotonic() - start, 3)
    layers = layers_of(log.layers or _inspected(trt, log, plan))
    return BuiltPlan(bytes(plan), tuple(sizes), name, trt.__version__, targets, seconds, tuple(notes), layers)


def _inspected(trt: ModuleType, log, plan) -> list[str]:
    """The list of layers by TensorRT's inspector, for a library whose log has none; [] where the plan does not load."""
    if not hasattr(trt, "LayerInformationFormat"):
        return []
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:  # it is for another platform or GPU
        return []
    found = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE)
    return found.splitlines()


def _logger(trt: Any):
    class Log(trt.ILogger):
        """Keeps the last errors, and the activation memory of each profile, which only the log tells."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)
            self.activations: list[int] = []
            self.layers: list[str] = []
            self.inconsistent = False

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
            elif match := re.match(r"Total Activation Memory: (\d+)", message):
                self.activations.append(int(match[1]))
            elif message.startswith("Layers:"):
                self.layers = message.splitlines()
            elif "kMAX values are not self-consistent" in message:
                # A warning only, and yet the profile cannot run.
                self.errors.append(" ".join(message.split()))
                self.inconsistent = True

    return Log()


def _monitor(trt: Any, deadline: float, progress: Callable[[str], None]):
    class Monitor(trt.IProgressMonitor):
        """Tells phases and cancels after the deadline. It is called in bursts, with long silences between them."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phase, self.cancelled, self.told = "building", False, 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phase = " ".join(phase_name.split())
            self.phase = self.phase[:1].lower() + self.phase[1:]
            if time.monotonic() - self.told > 0.1:
                self.told = time.monotonic()
                progress(self.phase)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.cancelled |= time.monotonic() > deadline
            return not self.cancelled

    return Monitor()


def _set_targets(trt: ModuleType, config, options: TensorRTOptions, targets: tuple[str, ...]) -> None:
    """Name the GPUs to build for, where `trt` wants them named. Raises DeployError for one it does not know."""
    if not hasattr(trt, "ComputeCapability"):
        return
    # Of a GPU at hand the driver knows more than the list of names, which is older than some GPUs.
    wanted = ["CURRENT"] if options.targets == (THIS_GPU,) else [target.upper() for target in targets]
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        if not hasattr(trt.ComputeCapability, capability):
            raise DeployError(
                f"{trt.__name__} {trt.__version__} does not know {capability.lower()}; install a newer one"
            )
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), index)


def _set_compatibility(trt: ModuleType, config, options: TensorRTOptions) -> list[str]:
    """Ask for plans that run elsewhere too; returns notes. Raises MisuseError where `trt` cannot."""
    rtx = trt.__name__ == "tensorrt_rtx"
    if options.hardware != "none":
        level = getattr(getattr(trt, "HardwareCompatibilityLevel", None), HARDWARE_LEVELS[options.hardware], None)
        if level is None or rtx:
            raise MisuseError(
                f"--hardware-compatible {options.hardware}: {trt.__name__} {trt.__version__} does not have it"
                + ("; name several targets instead, such as sm86,sm89,sm120" if rtx else "; try another version")
            )
        config.hardware_compatibility_level = level
    if options.version_compatible:
        if rtx:
            raise MisuseError(
                "--version-compatible: TensorRT for RTX has no lean runtime to put into the plan; omit it"
            )
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        return ["a version-compatible plan brings host code along: who loads it must trust it"]
    return []


def _set_platform(trt: ModuleType, config, options: TensorRTOptions, log) -> list[str]:
    """Ask for a plan that another platform runs; returns notes. Raises DeployError where `trt` cannot make one."""
    if options.builds_for == platform_name():
        return []
    if trt.__name__ == "tensorrt_rtx":  # its builder refuses to be told, and its plans are not of one system
        return [
            f"a plan of TensorRT for RTX runs on Linux and Windows alike: --platform {options.platform} changes none"
        ]
    wanted = getattr(getattr(trt, "RuntimePlatform", None), RUNTIME_PLATFORMS[options.builds_for], None)
    if wanted is not None:
        config.runtime_platform = wanted
    # Refused, it logs an error, and stays as it was.
    if wanted is None or config.runtime_platform != wanted:
        raise DeployError(
            f"{trt.__name__} {trt.__version__} does not build for --platform {options.platform} here"
            f"{f' ({reason_of(log.errors)})' if log.errors else ''}; build there, or install a newer one"
        )
    return [f"the plan is for {options.builds_for}, and does not run on this machine"]


def _add_profiles(builder, network, config, profiles: Sequence[PlannedProfile], log) -> None:
    image = network.get_input(0)
    channels = image.shape[1]
    if network.num_inputs != 1 or channels < 1:
        raise DeployError(
            f"the network has {network.num_inputs} inputs, the first of shape {list(image.shape)}; one is wanted, "
            "[N, C, H, W] with a fixed number of channels"
        )
    for index, profile in enumerate(profiles):
        made = builder.create_optimization_profile()
        shapes = ((1, *profile.min), (1, *profile.opt), (profile.batch, *profile.max))
        made.set_shape(image.name, *((number, channels, *size) for number, *size in shapes))
        if config.add_optimization_profile(made) < 0:
            text = ":".join(f"{size[0]}x{size[1]}" for size in (profile.min, profile.opt, profile.max))
            raise DeployError(f"TensorRT refuses profile {index} ({text}): {reason_of(log.errors)}")

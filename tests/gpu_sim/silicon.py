"""`make silicon` on the simulated GPU, with engines of both libraries in every precision: `make silicon-simulated`.

    PYTHONPATH=tests python -m gpu_sim.silicon [FOLDER]     some minutes; writes FOLDER/silicon.json and silicon.html

Plans are built for real by TensorRT for RTX, for TensorRT too, and are run by ONNX Runtime. Everything is small, as a
simulated GPU is slow; and times mean nothing. Exit code 1: a part is wrong, or was skipped that is here.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import onnx

import gpu_sim
from gpu_sim import tensorrt_sim

LIBRARIES = ("tensorrt", "tensorrt_rtx")
HERE = "sm89"  # the simulated GPU
ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "TRAINING": ("--epochs", "1", "--count", "8", "--width", "0.1"), "CALIBRATED_ON": 3, "MOST": (90, 120),
    "PROFILES": "1x1:64x64:128x160",
}  # fmt: skip


@contextmanager
def stand_ins(folder: Path, libraries: tuple[str, ...] = LIBRARIES) -> Iterator[None]:
    """What `make silicon` builds runs on the simulated GPU, in other processes too; a sanitizer that runs it there.

    Args:
        folder: an empty one, for plans and caches.
        libraries: those that are here.
    """
    from fcn_deploy.export.build import engine
    from fcn_deploy.export.build.targets.tensorrt import builder as tensorrt

    from benchmarks.silicon import build as silicon_build
    from benchmarks.silicon import engine as silicon_engine

    plans, programs = folder / "plans", folder / "programs"
    plans.mkdir()
    programs.mkdir()
    (programs / "compute-sanitizer").write_text('#!/bin/sh\nexec "$3" -m gpu_sim "$5" "$6"\n')
    (programs / "compute-sanitizer").chmod(0o755)
    environment = {
        "XDG_CACHE_HOME": folder / "cache", "PYTHONPATH": ROOT / "tests", tensorrt_sim.PLANS: plans,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    real = tensorrt.build_plan

    def registered(core, options, profiles, say):
        """TensorRT, which builds on its GPU alone, is stood in for by TensorRT for RTX."""
        own = options.targets == ("cuda",)
        built = real(core, replace(options, targets=(HERE,)) if own else options, profiles, say)
        if own:
            built = replace(built, module="tensorrt", version=tensorrt_sim.module("tensorrt").__version__)
        shapes = [{"image": ((1, 3, *p.min), (1, 3, *p.opt), (p.batch, 3, *p.max))} for p in profiles]
        tensorrt_sim.save(plans, built.plan, _run_by_onnxruntime(core), shapes)
        return built

    with ExitStack() as stack:
        for change in (
            mock.patch.dict(os.environ, {name: str(value) for name, value in environment.items()}),
            mock.patch.object(silicon_engine, "PYTHON", (sys.executable, "-m", "gpu_sim")),
            mock.patch.object(silicon_build, "find_spec", lambda name: name in libraries),
            # It would look for what is stood in for.
            mock.patch.object(engine, "check_builder", lambda options, types=(): None),
            mock.patch.object(tensorrt, "build_plan", registered),
            *map(gpu_sim.tensorrt, libraries),
        ):
            stack.enter_context(change)
        yield


def _run_by_onnxruntime(core: onnx.ModelProto) -> bytes:
    """What the simulated library runs of a core: one that takes other neighbours of two that are as near; BF16, which
    ONNX Runtime has no kernels for on CPUs, in float32."""
    from fcn_deploy.export.passes.as_float32 import as_float32

    runs = onnx.ModelProto.FromString(core.SerializeToString())
    for node in runs.graph.node:
        for attribute in node.attribute:
            if attribute.s == b"round_prefer_ceil":
                attribute.s = b"floor"
    if any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in runs.graph.initializer):
        runs = as_float32(runs).model
    return runs.SerializeToString()


def main() -> int:
    gpu_sim.install()
    gpu_sim.load_kernels(*(ROOT / "runtime" / "backends" / "tensorrt").glob("*.cu"))
    from benchmarks.silicon import __main__ as silicon
    from benchmarks.silicon import build as silicon_build

    with tempfile.TemporaryDirectory() as folder, stand_ins(Path(folder)), ExitStack() as stack:
        for name, value in SMALL.items():
            stack.enter_context(mock.patch.object(silicon_build, name, value))
        out = Path(sys.argv[1] if len(sys.argv) > 1 else folder) / "silicon.json"
        code = silicon.main(out, 10.0, 20, 300)
        record = json.loads(out.read_text())
    expected = {
        f"{part}, {precision} by {library}"
        for part in ("golden sample", "labels", "latency", "8 threads")
        for precision in silicon_build.PRECISIONS
        for library in LIBRARIES
    } | {"machine", "kernels", *(f"nearest neighbours, {library}" for library in LIBRARIES)}
    wrong = [name for name in expected if name not in record or "skipped" in record[name]]
    gpu_sim.drain()
    for line in (*(f"not run: {name}" for name in sorted(wrong)), *(f"gpu_sim: {said}" for said in gpu_sim.misuse())):
        print(line)
    return int(bool(code or wrong or gpu_sim.misuse()))


if __name__ == "__main__":
    sys.exit(main())

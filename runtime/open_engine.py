"""An engine opened: each stage of its core in the library that it was built for."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from .backends import ORT_TARGETS, Backend, Session
from .backends.host import HostBackend
from .engine_format.engine_file import EngineFile
from .engine_format.manifest import Manifest
from .errors import DeployError, MisuseError
from .head.heads import Heads
from .process_memory import give_back_freed


def gpu_index_of(device: str) -> int:
    """Of the GPU that `device` names, 0 unless it does. Raises MisuseError."""
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise MisuseError(f"device {device!r}; choose auto, cpu, cuda, or cuda:1 for the second GPU")
    return int(match[1] or 0)


def open_fine(manifest: Manifest, heads: Heads, read: Callable[[str], bytes], threads: int | None) -> HostBackend:
    """The stages for tiles alone of an engine for CPUs; `read` gives a member of its file. Raises DeployError."""
    from .backends.onnxruntime import OnnxRuntimeSession

    weights = {stage.file: read(stage.file) for stage in manifest.stages}
    sessions = [
        OnnxRuntimeSession(read(stage.file), stage.input, stage.output, threads, weights=weights)
        for stage in manifest.fine
    ]
    del weights
    first = manifest.fine[0]
    backend = HostBackend(sessions, heads.card, heads.upsampling, first.border, first.block, heads, one_arena=True)
    # Gives back what was read, and parsed of it. And ONNX Runtime's arena never gives back the first memory that it
    # took, so that of the first tile would stay.
    backend.release()
    return backend


def _opener(
    manifest: Manifest, target: str, gpu_index: int, threads: int | None, source: str, memory: int | None
) -> Callable[[bytes, str, str], Session]:
    """What opens a stage by its network, input and output, in the library that the engine was built for."""
    if (target, manifest.backend) == ("cpu", "openvino"):
        from .backends.openvino import OpenVinoSession, bfloat16_or_fallback, openvino_or_fallback

        kind = openvino_or_fallback(source)
        bfloat16 = manifest.precision == "bf16" and bfloat16_or_fallback(source)
        if kind is OpenVinoSession:
            return partial(OpenVinoSession, threads=threads, source=source, bfloat16=bfloat16, memory=memory)
    from .backends.onnxruntime import OnnxRuntimeSession

    return partial(OnnxRuntimeSession, threads=threads, target=target, device=gpu_index, source=source)


def open_engine(
    path: Path,
    device: str,
    gpu_index: int,
    threads: int | None,
    output: str | None,
    memory: int | None = None,
) -> tuple[Backend, Manifest, Heads]:
    """An engine's core in the library that it is for, its manifest, and its heads, of which `output` is chosen.

    `memory`: bytes that calls may take together on the CPU, where that was given.

    Raises DeployError; MisuseError where that is not `device`'s, or there is no such output.
    """
    with EngineFile(path) as engine:
        manifest = engine.manifest
        networks = engine.verify(*(stage.file for stage in manifest.stages))
        target, gpu = manifest.target, manifest.gpu
        heads = Heads(manifest.card, manifest.upsampling, manifest.heads, output, str(path))
        on_host = target in ("cpu", *ORT_TARGETS)
        if on_host != (gpu is None) or (not on_host and len(manifest.stages) != 1):
            raise DeployError(f"{path} is an engine of another release; build it again with build-engine")
        if device != "auto" and (target == "cpu") != (device == "cpu"):
            raise MisuseError(
                f"device {device!r}, and {path} is an engine for {target}; omit the device, or build another engine"
            )
        if not on_host:
            from .backends.tensorrt.backend import TensorRTBackend

            kernels = {name: engine.read(name) for name in manifest.members if name.startswith("kernels")}
            plan = networks.pop(manifest.stages[0].file)
            return TensorRTBackend(manifest, plan, kernels, gpu_index, str(path), heads=heads), manifest, heads
        sessions: list[Session] = []
        opened = _opener(manifest, target, gpu_index, threads, str(path), memory)
        for stage in manifest.stages:
            sessions.append(opened(networks.pop(stage.file), stage.input, stage.output))
        give_back_freed()  # what was read, and parsed of it
        first = manifest.stages[0]
        backend = HostBackend(sessions, heads.card, heads.upsampling, first.border, first.block, heads)
        return backend, manifest, heads

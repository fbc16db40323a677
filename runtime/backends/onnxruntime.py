"""Networks on ONNX Runtime: its CPU provider, and those for GPUs, which onnxruntime_gpu opens."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import AnyArray
from ..errors import DeployError, MisuseError, one_line
from . import ORT_TARGETS, Layer
from .onnxruntime_gpu import gpu_providers, not_loaded, plugin_devices, quietly, unusable

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, RunOptions

CPU_ALONE = ("CPUExecutionProvider",)
SPINNING = {
    "session.intra_op.allow_spinning": "1",
    "session.force_spinning_stop": "1",  # at the end of a run
    "session.intra_op.spin_duration_us": "20",  # ONNX Runtime before 1.26 knows no bound within a run
}
SMALL_CHUNK = 1 << 16  # bytes
ERRORS_ONLY = 3  # ONNX Runtime's severity: its warnings are for those who build graphs


def session(
    model: bytes | str | os.PathLike[str],
    threads: int | None = None,
    optimise: bool = True,
    arena: bool = True,
    providers: Sequence[str | tuple[str, dict[str, Any]]] = CPU_ALONE,
    profile_to: Path | None = None,
    devices: Sequence[Any] = (),
    weights: Mapping[str, bytes] | None = None,
) -> "InferenceSession":
    """An ONNX Runtime session.

    Args:
        model: the serialised model, or its path (needed where weights are external files).
        threads: of one run; None: one per physical core.
        optimise: False runs the graph as written, as the reference in comparisons.
        arena: False gives memory back after each run, so that it does not grow over changing sizes.
        providers: of ONNX Runtime, the first that can run a node does.
        devices: of a provider that is a plugin, instead of `providers`.
        weights: name → content of the files that its weights are in. Such sessions have one arena together, as they run
            one after the other.
        profile_to: begin of the name of a file, to which end_profiling() writes what each node took.

    Raises:
        DeployError: onnxruntime is not installed, or it refuses the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DeployError("onnxruntime is not installed; run: pip install 'fcn-deploy[cpu]' (or [ort-cuda])") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    # Memory patterns are planned per input shape and kept: with sizes that change they only grow.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = arena
    # Between two layers of a run threads spin, as waking them takes as long as a layer of a small image. Not for longer
    # nor between runs: they slow whatever else uses the cores: decoding, upsampling, another engine.
    for name, value in SPINNING.items():
        options.add_session_config_entry(name, value)
    if weights is not None:
        options.add_external_initializers_from_files_in_memory(
            list(weights), list(weights.values()), [len(content) for content in weights.values()]
        )
        _share_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Weights stay as long as a session does: among what runs take they would keep regions from being given back.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        source = model if isinstance(model, bytes) else os.fspath(model)
        if devices:
            options.add_provider_for_devices(list(devices), {})
            return onnxruntime.InferenceSession(source, options)
        opened = onnxruntime.InferenceSession(source, options, providers=list(providers))
        # Else it keeps the model's bytes, as much as the weights once more, and starts anew on the CPU if a run fails
        # on a GPU: calls would take many times as long, and only a line on standard output would say so.
        opened.disable_fallback()
        opened._model_bytes = None
        return opened
    except Exception as error:  # ONNX Runtime's errors share no base class but Exception
        raise DeployError(f"ONNX Runtime cannot load the model: {one_line(error)}") from error


@cache
def _share_arena() -> None:
    """Have ONNX Runtime make one arena for all sessions of the process that ask for it."""
    import onnxruntime

    info = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # What it begins with, and begins with again once it has shrunk, stays: by default two megabytes.
    small = {"initial_chunk_size_bytes": SMALL_CHUNK, "initial_growth_chunk_size_bytes": SMALL_CHUNK}
    with suppress(Exception):  # of ONNX Runtime: somebody else in this process has made one
        onnxruntime.create_and_register_allocator(info, onnxruntime.OrtArenaCfg(small))


def physical_cores(processors: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores of this machine, however many threads each runs at once: as many as ONNX Runtime takes threads by default.

    Args:
        processors: where Linux tells of them; elsewhere logical processors are counted.
    """
    topologies = processors.glob("cpu[0-9]*/topology/thread_siblings_list")
    try:
        siblings = {topology.read_text() for topology in topologies}
    except OSError:  # a processor was taken off
        siblings = set()
    return len(siblings) or os.cpu_count() or 1


class OnnxRuntimeSession:
    """One network, ready to run. Safe to use from many threads at once.

    Args:
        model: serialised model or path, as for `session`.
        input, output: names; None: the first.
        threads: of one run; None: one per physical core.
        target: `cpu`, or a key of ORT_TARGETS.
        device: index of the GPU.
        source: names the engine in errors.
        weights: as for `session`, on the CPU.
    """

    streams = 1  # runs of all threads are in one arena

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        input: str | None = None,
        output: str | None = None,
        threads: int | None = None,
        target: str = "cpu",
        device: int = 0,
        source: str = "the engine",
        weights: Mapping[str, bytes] | None = None,
    ) -> None:
        self.session: InferenceSession | None
        self._on_cpu = target == "cpu"
        if target == "cpu":
            self.name, opened = "onnxruntime", session(model, threads, weights=weights)
        elif target == "ort-rtx":
            self.name = f"onnxruntime, {ORT_TARGETS[target]}"
            with quietly():
                opened = session(model, threads, devices=plugin_devices(device, source))
        else:
            self.name = f"onnxruntime, {ORT_TARGETS[target]}"
            providers = gpu_providers(target, device, source)
            with quietly():
                try:
                    opened = session(model, threads, providers=providers)
                except DeployError as error:  # a provider that loads does not start without a GPU, or by an old driver
                    if unusable():
                        raise not_loaded(target, source) from error
                    raise
            # ONNX Runtime falls back to the CPU with a line in its log, where the GPU's libraries cannot be loaded.
            if ORT_TARGETS[target] not in opened.get_providers():
                raise not_loaded(target, source)
        self.session = opened
        self.input = input or opened.get_inputs()[0].name
        self.output = output or opened.get_outputs()[0].name

    def run(self, image: AnyArray) -> AnyArray:
        """[N, C, H, W] of the network's input type → [N, K, h, w]. Raises DeployError where the network fails."""
        return self._run(image, None)

    def release(self, image: AnyArray) -> AnyArray:
        """As `Session` says. An arena never shrinks by itself."""
        from onnxruntime import RunOptions

        options = RunOptions()
        if self._on_cpu:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        return self._run(image, options)

    def _run(self, image: AnyArray, options: "RunOptions | None") -> AnyArray:
        if (session := self.session) is None:
            raise MisuseError("the Segmenter was closed; open another one")
        try:
            result: AnyArray = session.run([self.output], {self.input: image}, options)[0]
        except Exception as error:
            raise DeployError(f"the network failed on an input of {list(image.shape)}: {one_line(error)}") from error
        return result

    def close(self) -> None:
        """Release the network. Running it afterwards raises MisuseError."""
        self.session = None


def profile(
    model: bytes | str | os.PathLike[str],
    image: AnyArray,
    input: str | None = None,
    output: str | None = None,
    threads: int | None = None,
    runs: int = 5,
) -> tuple[list[Layer], AnyArray]:
    """Median time of each layer over some runs on one input, in the order they run, and the output."""
    with tempfile.TemporaryDirectory() as folder:
        run = session(model, threads, profile_to=Path(folder) / "profile")
        input, output = input or run.get_inputs()[0].name, output or run.get_outputs()[0].name
        try:
            for _ in range(runs + 1):
                (result,) = run.run([output], {input: image})
        except Exception as error:
            raise DeployError(f"the network failed on an input of {list(image.shape)}: {one_line(error)}") from error
        events = json.loads(Path(run.end_profiling()).read_text())
    times: defaultdict[str, list[float]] = defaultdict(list)
    operators: dict[str, str] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"]:
            times[name].append(event["dur"] / 1e3)
            operators[name] = event["args"]["op_name"]
    # The first run is not counted.
    return [Layer(name, operators[name], float(np.median(values[1:]))) for name, values in times.items()], result

"""A TensorRT plan on a GPU: its execution contexts, CUDA graphs, and the memory that all of them share."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import DeployError
from ..files import replacing
from ..manifest import GpuPlan
from .buffers import NON_BLOCKING, Buffer
from .device import new_logger
from .graphs import Graph, end_capture

log = logging.getLogger(__name__)

GRAPHS = 16  # CUDA graphs kept, of (profile, padded size); each has a context of its own
CAPTURES = 3  # failures in a row, after which no more graphs are captured
SHAPES = 1024  # (profile, padded size) whose memory and scores' shape are remembered

Key = tuple[int, tuple[int, int]]  # profile, and the padded size in pixels


@dataclass(frozen=True)
class NetworkShape:
    """What is known of the network at one input size: bytes of working memory, and (K, h, w) of its scores."""

    memory: int
    scores: tuple[int, int, int]


class DeviceNetwork:
    """A core network on a GPU. One thread at a time may call it; all that it queues is on one stream.

    Args:
        cuda: the driver, by cuda.bindings or pycuda, with the GPU's context current.
        trt: tensorrt or tensorrt_rtx.
        gpu: the manifest's word on the plan.
        channels: of the core's input.
        plan: serialised.
        cache: where TensorRT for RTX keeps what it compiles; None: nowhere.
        source: names the engine in errors.
        graphs: CUDA graphs kept at most; 0: none. TensorRT for RTX makes its own.

    Attributes:
        stream: that all is queued on.
        input, scores: buffers that the core reads and writes.
        input_type, score_type: `float32` or `float16`.
        unsaved: TensorRT for RTX may have compiled what is not in its cache's file yet.

    Raises:
        DeployError: a plan that cannot be loaded, or is not what its manifest says.
    """

    def __init__(
        self,
        cuda: ModuleType,
        trt: ModuleType,
        gpu: GpuPlan,
        channels: int,
        plan: bytes,
        cache: Path | None,
        source: str,
        graphs: int = GRAPHS,
    ) -> None:
        self._cuda, self._trt, self._gpu, self._channels, self._source = cuda, trt, gpu, channels, source
        self._graph_limit = 0 if gpu.library == "tensorrt_rtx" else graphs
        self._failures = 0  # of captures, in a row
        # None: seen once; a context: ready to be captured; a graph.
        self.graphs: OrderedDict[Key, Any] = OrderedDict()
        self.contexts: dict[int, Any] = {}  # by profile
        self._shapes: OrderedDict[Key, NetworkShape] = OrderedDict()
        self._set: dict[int, tuple[tuple[int, int], int]] = {}  # profile → the size its context is set to, its memory
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._cache: Any = None
        self._cache_path = cache
        self.unsaved = False
        self.stream: Any = None
        self._memory, self.input, self.scores = Buffer(cuda), Buffer(cuda), Buffer(cuda)
        try:
            self._load(plan)
        except BaseException:
            self.release()
            raise

    def _load(self, plan: bytes) -> None:
        trt, gpu, source = self._trt, self._gpu, self._source
        self._log = new_logger(trt)
        self._runtime = trt.Runtime(self._log)
        if gpu.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True
        self._engine = engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise DeployError(
                f"{source}: {gpu.library} {trt.__version__} cannot load the plan ({self._log.said()}); build it again "
                "for this GPU and version with build-engine"
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise DeployError(f"{source}: its plan has {len(inputs)} inputs and {len(outputs)} outputs, not one each")
        self._input, self._output = inputs[0], outputs[0]
        if engine.num_optimization_profiles != len(gpu.profiles):
            raise DeployError(f"{source}: its plan and its manifest disagree on the profiles; build it again")
        types = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16"}
        found = [types.get(engine.get_tensor_dtype(name)) for name in (self._input, self._output)]
        if found[0] is None or found[1] is None:
            raise DeployError(f"{source}: its plan takes or gives neither float32 nor float16; build it again")
        self.input_type, self.score_type = found[0], found[1]
        self._config = self._runtime_config()
        self.stream = self._cuda.Stream(NON_BLOCKING)

    def _runtime_config(self) -> Any:
        """TensorRT for RTX keeps what it compiles at run time, and captures CUDA graphs by itself."""
        trt = self._trt
        if self._gpu.library != "tensorrt_rtx":
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Kernels for every new shape would be compiled in the background for ever, and sums change between two calls.
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        many = any(profile.min != profile.max for profile in self._gpu.profiles)
        config.dynamic_shapes_kernel_specialization_strategy = strategies.NONE if many else strategies.EAGER
        self._cache = config.create_runtime_cache()
        if self._cache_path is not None:
            with suppress(OSError):
                if not self._cache.deserialize(self._cache_path.read_bytes()):
                    log.info("%s is of another driver or version, and is made anew", self._cache_path)
        config.set_runtime_cache(self._cache)
        return config

    def save_cache(self) -> None:
        """Keep what TensorRT for RTX compiled, for the next time."""
        self.unsaved = False
        if self._cache is None or self._cache_path is None:
            return
        try:
            with replacing(self._cache_path) as temporary:
                temporary.write_bytes(bytes(self._cache.serialize()))
        except DeployError as error:
            log.info("what was compiled is not kept: %s", error)

    def release(self) -> None:
        """Give everything back. Nothing may be in flight."""
        self._drop_graphs()
        for buffer in (self._memory, self.input, self.scores):
            buffer.release()
        # Contexts go before their engine, and that before its runtime.
        self.contexts.clear()
        self._cache = self._config = None
        self._engine = self._runtime = self.stream = None

    def settle(self) -> None:
        """Wait for all that is queued, after an error or an interruption; a capture that was cut off is ended first."""
        end_capture(self.stream)
        self.stream.synchronize()

    def trim(self, idle: Sequence[Buffer]) -> None:
        """Give back all that grows: the network's memory and buffers, the graphs on them, and buffers not in use."""
        self.stream.synchronize()
        self._drop_graphs()
        for buffer in (self._memory, self.input, self.scores, *idle):
            buffer.release()

    def memory_at(self, profile: int, padded: tuple[int, int]) -> int:
        """Bytes of working memory at a size; 0 where it is not known yet."""
        shape = self._shapes.get((profile, padded))
        return 0 if shape is None else shape.memory

    def reserve(self, profile: int, padded: tuple[int, int]) -> NetworkShape:
        """Make sure that the core's buffers are large enough for a size. Raises the driver's MemoryError."""
        key = (profile, padded)
        shape = self._shapes.get(key)
        if shape is None:
            context, memory = self._ready(profile, padded)
            found = tuple(context.get_tensor_shape(self._output))
            if len(found) != 4 or min(found) < 1:
                raise DeployError(f"{self._source}: its plan gives scores of {list(found)}; build it again")
            shape = self._shapes[key] = NetworkShape(memory, (found[1], found[2], found[3]))
            if len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        input_bytes = self._channels * padded[0] * padded[1] * np.dtype(self.input_type).itemsize
        score_bytes = int(np.prod(shape.scores)) * np.dtype(self.score_type).itemsize
        needs = ((self._memory, shape.memory), (self.input, input_bytes), (self.scores, score_bytes))
        if any(size > buffer.size for buffer, size in needs):
            # What runs still uses the old ones, and graphs have their addresses in them.
            self.stream.synchronize()
            self._drop_graphs()
            for buffer, size in needs:
                buffer.reserve(size)
        return shape

    def enqueue(self, profile: int, padded: tuple[int, int]) -> None:
        """Queue the network on what `input` holds, by its graph where there is one.

        A size that comes a second time is worth a graph. It gets a context of its own, since a graph is valid only as
        long as the context that it was captured from keeps its state (TensorRT's guide, "CUDA Graphs"); all of them
        share one block of memory. That context first runs as usual, and what comes next is captured: the first run
        after a change of shape may do work that must not be.
        """
        key = (profile, padded)
        known = self.graphs.get(key)
        if isinstance(known, Graph):
            self.graphs.move_to_end(key)
            known.launch(self.stream)
            return
        if known is not None:
            if self._captured(key, known):
                return
            known = None
        if known is None and self._graph_limit:
            if key in self.graphs:
                known = self.graphs[key] = self._new_context(profile)
                self._set_size(known, padded)
                self.graphs.move_to_end(key)
            else:
                self.graphs[key] = None
                self._evict()
        context = (known if self._graph_limit else None) or self._ready(profile, padded)[0]
        context.set_device_memory(int(self._memory.pointer), self._memory.size)
        context.set_tensor_address(self._input, int(self.input.pointer))
        context.set_tensor_address(self._output, int(self.scores.pointer))
        self._execute(context)

    def _captured(self, key: Key, context: Any) -> bool:
        """Capture a context that has run once, and launch its graph; False where this network cannot be captured."""
        self.graphs.move_to_end(key)
        graph = Graph.capture(self.stream, context, lambda: self._execute(context))
        if graph is not None:
            self.graphs[key], self._failures = graph, 0
            graph.launch(self.stream)
            return True
        self.stream.synchronize()
        self._failures += 1
        self.graphs[key] = None  # as if it came for the first time: its context may be in any state
        if self._failures >= CAPTURES:
            self._graph_limit = 0
            self._drop_graphs()
        log.info(
            "%s: no CUDA graph could be captured at %d×%d (%d of %d times): something else in this process used the "
            "GPU meanwhile, or the network cannot be captured", self._source, *key[1], self._failures, CAPTURES,
        )  # fmt: skip
        return False

    def _ready(self, profile: int, padded: tuple[int, int]) -> tuple[Any, int]:
        """The profile's context, set to a size, and the bytes of memory it needs at that."""
        if profile not in self.contexts:
            self.contexts[profile] = self._new_context(profile)
        if profile not in self._set or self._set[profile][0] != padded:
            self._set.pop(profile, None)
            self._set[profile] = padded, self._set_size(self.contexts[profile], padded)
        return self.contexts[profile], self._set[profile][1]

    def _new_context(self, profile: int) -> Any:
        self.unsaved = self._cache_path is not None and self._cache is not None
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None or not context.set_optimization_profile_async(profile, self.stream.handle):
            raise DeployError(f"{self._source}: no execution context can be made ({self._log.said()})")
        self.stream.synchronize()
        return context

    def _set_size(self, context: Any, padded: tuple[int, int]) -> int:
        """Set a context to a size; bytes of memory that it needs then."""
        if not context.set_input_shape(self._input, (1, self._channels, *padded)):
            raise DeployError(f"{self._source} refuses an input of {padded[0]}×{padded[1]} ({self._log.said()})")
        # Without this a context wants what the profile's MAX needs.
        return int(context.update_device_memory_size_for_shapes())

    def _execute(self, context: Any) -> None:
        if not context.execute_async_v3(self.stream.handle):
            raise DeployError(f"{self._source}: TensorRT did not run the network ({self._log.said()})")

    def _evict(self) -> None:
        while len(self.graphs) > self._graph_limit:
            _, oldest = self.graphs.popitem(last=False)
            if oldest is not None:
                self.stream.synchronize()
            if isinstance(oldest, Graph):
                oldest.destroy()

    def _drop_graphs(self) -> None:
        """Forget all graphs and their contexts. Nothing queued may use them."""
        while self.graphs:  # one by one, lest an interruption leave one that is destroyed
            _, graph = self.graphs.popitem()
            if isinstance(graph, Graph):
                graph.destroy()

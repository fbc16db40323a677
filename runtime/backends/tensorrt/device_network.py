"""A TensorRT plan on a GPU: loaded once, run by execution contexts that the lanes of the backend have made."""

import logging
import re
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ...engine_format.manifest import GpuPlan
from ...errors import DeployError
from ...files import replacing
from .buffers import Buffer
from .device import cuda_version, logger_of

log = logging.getLogger(__name__)

Scores = tuple[int, int, int]  # (K, h, w) of an image


class DeviceNetwork:
    """A core network on a GPU.

    Args:
        cuda: the driver, by cuda.bindings or pycuda, with the GPU's context current.
        trt: tensorrt or tensorrt_rtx.
        gpu: the manifest's word on the plan.
        channels: of the core's input.
        plan: serialised.
        cache: where TensorRT for RTX keeps what it compiles; None: nowhere.
        source: names the engine in errors.

    Attributes:
        channels: of the input.
        input_type, score_type: `float32` or `float16`.
        captures: whether lanes capture calls; not once it has failed several times.
        unsaved: TensorRT for RTX may have compiled what is not in its cache's file yet.
        lock: held while a context is made, or does something for the first time: one thread at a time, as nothing says
            that two may compile into one cache. Launching graphs needs no lock.

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
    ) -> None:
        self._cuda, self._trt, self._gpu, self.channels, self.source = cuda, trt, gpu, channels, source
        self._runtime: Any = None
        self._engine: Any = None
        self._config: Any = None
        self._cache: Any = None
        self._cache_path = cache
        self._compiled: set[int] = set()  # profiles
        self.unsaved, self.captures = False, True
        self.lock = threading.RLock()
        try:
            self._load(plan)
        except BaseException:
            self.release()
            raise

    def _load(self, plan: bytes) -> None:
        trt, gpu, source = self._trt, self._gpu, self.source
        self._log = logger_of(trt)
        self._log.said()  # whatever failed before has been told, or is of no interest
        try:
            self._runtime = trt.Runtime(self._log)
        except Exception as error:  # TensorRT's bindings raise TypeError where its library does not start
            raise DeployError(
                f"{source}: {gpu.library} {trt.__version__} cannot start ({self._log.said()}); the driver here is of "
                f"CUDA {cuda_version(self._cuda)}: update it, or install a wheel of that CUDA"
            ) from error
        if gpu.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True
        self._engine = engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            said = self._log.said()
            remedy = "build it again for this GPU and version with build-engine"
            if re.search("out ?of ?memory", said, re.IGNORECASE):
                remedy = "close what else uses the GPU's memory"
            raise DeployError(f"{source}: {gpu.library} {trt.__version__} cannot load the plan ({said}); {remedy}")
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

    def _runtime_config(self) -> Any:
        """TensorRT for RTX keeps what it compiles at run time."""
        trt = self._trt
        if self._gpu.library != "tensorrt_rtx":
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # The lanes capture whole calls, of which the network is a part.
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
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
        """Give everything back. Its contexts are gone."""
        self._cache = self._config = None
        self._engine = self._runtime = None

    def new_context(self, profile: int, stream: Any) -> Any:
        """An execution context that is on a profile. `lock` is held."""
        if self._cache_path is not None and self._cache is not None and profile not in self._compiled:
            self._compiled.add(profile)
            self.unsaved = True
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None or not context.set_optimization_profile_async(profile, stream.handle):
            raise DeployError(f"{self.source}: no execution context can be made ({self._log.said()})")
        stream.synchronize()
        return context

    def set_size(self, context: Any, count: int, padded: tuple[int, int]) -> int:
        """Set a context to so many images of a padded size; bytes of memory that it needs then."""
        if not context.set_input_shape(self._input, (count, self.channels, *padded)):
            raise DeployError(
                f"{self.source} refuses an input of {count} × {padded[0]}×{padded[1]} ({self._log.said()})"
            )
        # Without this a context wants what the profile's MAX needs.
        return int(context.update_device_memory_size_for_shapes())

    def scores_of(self, context: Any) -> Scores:
        """Shape of the scores of an image, at the size that a context is set to."""
        found = tuple(context.get_tensor_shape(self._output))
        if len(found) != 4 or min(found) < 1:
            raise DeployError(f"{self.source}: its plan gives scores of {list(found)}; build it again")
        return found[1], found[2], found[3]

    def bind(self, context: Any, memory: Buffer, input: Buffer, scores: Buffer) -> None:
        """Say where a context works, reads and writes."""
        context.set_device_memory(int(memory.pointer), memory.size)
        context.set_tensor_address(self._input, int(input.pointer))
        context.set_tensor_address(self._output, int(scores.pointer))

    def execute(self, context: Any, stream: Any) -> None:
        """Queue the network on a stream."""
        if not context.execute_async_v3(stream.handle):
            raise DeployError(f"{self.source}: TensorRT did not run the network ({self._log.said()})")

    def can_capture(self, context: Any, stream: Any) -> bool:
        """Whether the library says that what a context queues can be captured; TensorRT says nothing of it."""
        return self._config is None or bool(context.is_stream_capturable(stream.handle))

    def give_up_captures(self) -> None:
        """No call is captured any more; contexts made from now on capture the network where the library does that."""
        self.captures = False
        if self._config is not None:
            self._config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE

"""A stand-in for tensorrt_rtx (or tensorrt) that runs engines on the simulated GPU: running only, no building.

A real plan cannot be run without a GPU, so a plan is looked up by its SHA-256 among those that `register` or
FCN_GPU_SIM_PLANS made known, and the ONNX core it was built from is run by ONNX Runtime. The work is queued in the
simulated driver: deferred until something synchronises, ordered by streams and events, captured in CUDA graphs.

Names and signatures are TensorRT for RTX 1.7's, and its rules are kept: where TensorRT refuses, so does this, with a
logged error; where it has undefined behaviour, this goes on, and both are remembered in gpu_sim.misuse().

Known differences: results are ONNX Runtime's; memory sizes are invented (ACTIVATION times the input); an execution
context must have run once at a shape before it can be captured, whatever the specialisation strategy; switching the
profile with work pending counts as misuse even on the same stream; contexts may share a profile, as since TensorRT 10.
"""

import ctypes
import enum
import hashlib
import itertools
import json
import math
import os
import sys
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import gpu_sim
from gpu_sim import signatures

PLANS = "FCN_GPU_SIM_PLANS"  # a folder of plans for other processes: <sha256>.onnx and <sha256>.json
ACTIVATION = 8  # bytes of activations per byte of float32 input
ALIGNMENT = 256  # of addresses, as IExecutionContext::setTensorAddress asks

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]  # input: (min, opt, max)

_plans: dict[str, tuple[bytes, list[Profile]]] = {}


def register(plan: bytes, core: bytes, profiles: list[Profile]) -> None:
    """Say what a plan was built from.

    Args:
        plan: as build_serialized_network gave it.
        core: the serialised ONNX model.
        profiles: a dict for each, from the name of every input to its (min, opt, max) shapes.
    """
    _plans[hashlib.sha256(plan).hexdigest()] = core, profiles


def save(folder: Path, plan: bytes, core: bytes, profiles: list[Profile]) -> None:
    """`register`, for a process that is started with FCN_GPU_SIM_PLANS=folder."""
    name = hashlib.sha256(plan).hexdigest()
    (folder / f"{name}.onnx").write_bytes(core)
    (folder / f"{name}.json").write_text(json.dumps({"profiles": profiles}))


def _find_plan(plan: bytes) -> tuple[bytes, list[Profile]] | None:
    name = hashlib.sha256(plan).hexdigest()
    if name not in _plans and PLANS in os.environ:
        folder = Path(os.environ[PLANS])
        if (folder / f"{name}.json").exists():
            profiles = json.loads((folder / f"{name}.json").read_text())["profiles"]
            register(plan, (folder / f"{name}.onnx").read_bytes(), profiles)
    return _plans.get(name)


# -------------------------------------------------------------------------------------------------- enums and values


class _Enum(enum.Enum):
    """Like pybind11's: ordered and convertible to int, but no int."""

    def __int__(self) -> int:
        return self.value

    def __index__(self) -> int:
        return self.value

    def __lt__(self, other) -> bool:
        return self.value < other.value

    def __le__(self, other) -> bool:
        return self.value <= other.value

    def __gt__(self, other) -> bool:
        return self.value > other.value

    def __ge__(self, other) -> bool:
        return self.value >= other.value


class TensorIOMode(_Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(_Enum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(_Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(_Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(_Enum):
    LAZY, EAGER, NONE = range(3)


class DataType(_Enum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)

    @property
    def itemsize(self) -> int:
        return np.dtype(nptype(self)).itemsize


class ErrorCodeTRT(_Enum):
    SUCCESS, UNSPECIFIED_ERROR, INTERNAL_ERROR, INVALID_ARGUMENT, INVALID_CONFIG, FAILED_ALLOCATION = range(6)
    FAILED_INITIALIZATION, FAILED_EXECUTION, FAILED_COMPUTATION, INVALID_STATE, UNSUPPORTED_STATE = range(6, 11)


_NUMPY = {
    DataType.FLOAT: np.float32, DataType.HALF: np.float16, DataType.INT8: np.int8, DataType.INT32: np.int32,
    DataType.BOOL: np.bool_, DataType.UINT8: np.uint8, DataType.INT64: np.int64,
}  # fmt: skip
_FROM_ORT = {
    "tensor(float)": DataType.FLOAT, "tensor(float16)": DataType.HALF, "tensor(int8)": DataType.INT8,
    "tensor(int32)": DataType.INT32, "tensor(bool)": DataType.BOOL, "tensor(uint8)": DataType.UINT8,
    "tensor(int64)": DataType.INT64,
}  # fmt: skip


def nptype(trt_type: DataType) -> type:
    """The numpy type of a DataType. Raises TypeError where there is none."""
    if trt_type not in _NUMPY:
        raise TypeError(f"Could not resolve TensorRT datatype to an equivalent numpy datatype: {trt_type}")
    return _NUMPY[trt_type]


class Dims(tuple):
    """As tensorrt's: compares with tuples and lists, and raises TypeError when compared with another Dims."""

    MAX_DIMS = 8
    __hash__ = tuple.__hash__

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Dims) or not isinstance(other, (tuple, list)):
            raise TypeError("__eq__(): incompatible function arguments: Dims compare with list and tuple")
        return tuple(self) == tuple(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


class IHostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class ILogger:
    class Severity(_Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: "ILogger.Severity", msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    def __init__(self, min_severity: ILogger.Severity = ILogger.Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        if severity <= self.min_severity:
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr)


class IErrorRecorder:
    """A base for recorders written in Python: TensorRT calls report_error."""

    MAX_DESC_LENGTH = 127


# ----------------------------------------------------------------------------------------------------- running work


@dataclass
class _Work:
    """What one enqueue does: shapes and addresses as they were then."""

    context: "weakref.ref[IExecutionContext]"  # weak: queued work and graphs do not keep it alive
    cuda: int  # the CUDA context
    inputs: list[tuple[str, int, tuple[int, ...], np.dtype]]
    outputs: list[tuple[str, int, tuple[int, ...], np.dtype]]


_work: dict[int, _Work | None] = {}
_numbers = itertools.count(1)


def _misuse(where: str, why: str) -> None:
    gpu_sim.library().gpusim_misuse(f"{where}: {why}".encode())


def _memory(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


@ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)
def _run(number: int) -> int:
    """Called by the driver when the work's turn has come, on whichever thread synchronises. Not 0: it failed."""
    work = _work[number]
    if work is None:  # a profile change: something to wait for, and nothing to do
        return 0
    library = gpu_sim.library()
    context = work.context()
    if context is None:
        _misuse("execute_async_v3, when it ran", "its execution context is freed")
        return 1
    if not context._running.acquire(blocking=False):
        _misuse("execute_async_v3", "one execution context ran twice at once")
        return 1
    try:
        for name, address, shape, dtype in work.inputs + work.outputs:
            if library.gpusim_check(address, math.prod(shape) * dtype.itemsize, work.cuda):
                _misuse("execute_async_v3, when it ran", f"the memory of {name!r} is freed or too small")
                return 1
        feeds = {name: _memory(address, shape, dtype) for name, address, shape, dtype in work.inputs}
        results = context._engine._session.run([name for name, *_ in work.outputs], feeds)
        for (name, address, shape, dtype), result in zip(work.outputs, results, strict=True):
            if result.shape != shape:
                raise ValueError(f"{name!r} came out as {result.shape}, not {shape}")
            _memory(address, shape, dtype)[...] = result
        return 0
    except Exception as error:  # nothing may propagate through the driver
        _misuse("execute_async_v3, when it ran", " ".join(str(error).split()))
        return 1
    finally:
        context._running.release()


def _queue(stream: int, work: _Work | None) -> tuple[int, int]:
    """Queue work on a stream: (CUresult, its number in the stream, 0 where that captures)."""
    library = gpu_sim.library()
    done = (ctypes.c_uint64 * 256)()
    while count := library.gpusim_released(done, len(done)):
        for number in done[:count]:
            _work.pop(number, None)
    number, position = next(_numbers), ctypes.c_uint64()
    _work[number] = work
    result = library.gpusim_launch_task(ctypes.c_void_p(stream), _run, ctypes.c_uint64(number), ctypes.byref(position))
    return result, position.value


@contextmanager
def _current(cuda: int) -> Iterator[bool]:
    """A CUDA context made current for a while; gives whether it is alive."""
    library = gpu_sim.library()
    switched = library.gpusim_current() != cuda
    if switched and library.cuCtxPushCurrent_v2(ctypes.c_void_p(cuda)):
        yield False
        return
    try:
        yield True
    finally:
        if switched:
            library.cuCtxPopCurrent_v2(None)


class _DeviceMemory:
    """Memory that TensorRT allocates for itself. Raises MemoryError."""

    def __init__(self, size: int, cuda: int) -> None:
        self.address, self.cuda = ctypes.c_uint64(), cuda
        if size and gpu_sim.library().cuMemAlloc_v2(ctypes.byref(self.address), size):
            self.address.value = 0
            raise MemoryError

    def free(self, what: str) -> None:
        if self.address.value:
            with _current(self.cuda) as alive:
                if alive:
                    gpu_sim.library().cuMemFree_v2(self.address)
                else:
                    _misuse(what, "freed after the CUDA context it was made in")
            self.address.value = 0


class _Reporting:
    """Errors go to the logger, and to the error recorder where one is set."""

    _logger: ILogger
    error_recorder: IErrorRecorder | None = None

    def _error(self, where: str, why: str, code: ErrorCodeTRT = ErrorCodeTRT.INVALID_ARGUMENT) -> None:
        if self.error_recorder is not None:
            self.error_recorder.report_error(code, f"{where}: {why}")
        self._logger.log(ILogger.Severity.ERROR, f"{where}: Error Code {code.value}: {why}")

    def _violation(self, where: str, why: str, code: ErrorCodeTRT = ErrorCodeTRT.INVALID_ARGUMENT) -> None:
        _misuse(where, why)
        self._error(where, why, code)


# -------------------------------------------------------------------------------------------------------- interfaces


class Runtime(_Reporting):
    _library = "tensorrt_rtx"

    def __init__(self, logger: ILogger) -> None:
        if not isinstance(logger, ILogger):
            raise TypeError("__init__(): incompatible constructor arguments: an ILogger is needed")
        self._logger = logger

    @property
    def logger(self) -> ILogger:
        return self._logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "ICudaEngine | None":
        where = "IRuntime::deserializeCudaEngine"
        cuda = gpu_sim.library().gpusim_current()
        if not cuda:
            self._violation(where, "no CUDA context is current", ErrorCodeTRT.UNSPECIFIED_ERROR)
            return None
        found = _find_plan(bytes(memoryview(serialized_engine)))
        if found is None:
            self._error(where, "Serialization (unknown or damaged plan)", ErrorCodeTRT.UNSPECIFIED_ERROR)
            return None
        try:
            return ICudaEngine(self, *found, cuda)
        except MemoryError:
            self._error(where, "Cuda Runtime (out of memory)", ErrorCodeTRT.UNSPECIFIED_ERROR)
            return None


class ICudaEngine(_Reporting):
    def __init__(self, runtime: Runtime, core: bytes, profiles: list[Profile], cuda: int) -> None:
        import onnx
        import onnxruntime

        self._runtime, self._logger, self._cuda = runtime, runtime.logger, cuda
        self._library = runtime._library
        self._weights = _DeviceMemory(len(core), cuda)
        self._model = onnx.load_from_string(core)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        if any(node.op_type == "DequantizeLinear" for node in self._model.graph.node):
            # Fused, the CPU's integer kernels saturate where a GPU's do not.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = onnxruntime.InferenceSession(core, options, providers=["CPUExecutionProvider"])
        self._inputs = {one.name: one for one in self._session.get_inputs()}
        self._outputs = {one.name: one for one in self._session.get_outputs()}
        self._tensors = {**self._inputs, **self._outputs}
        self._profiles = [
            {name: tuple(tuple(map(int, shape)) for shape in shapes) for name, shapes in profile.items()}
            for profile in profiles
        ]
        self._shapes: dict[tuple, dict[str, tuple[int, ...]]] = {}
        self._name = self._model.graph.name

    def __del__(self) -> None:
        if hasattr(self, "_weights"):
            with suppress(Exception):  # the interpreter may be ending
                self._weights.free("ICudaEngine")

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return max(map(self.get_device_memory_size_for_profile_v2, range(len(self._profiles))))

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return _activations([shapes[2] for shapes in self._profiles[profile_index].values()])

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def _known(self, name: str, where: str) -> bool:
        if name not in self._tensors:
            self._violation(f"ICudaEngine::{where}", f"there is no tensor {name!r}")
        return name in self._tensors

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        if not self._known(name, "getTensorIOMode"):
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if name in self._inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _FROM_ORT[self._tensors[name].type] if self._known(name, "getTensorDataType") else DataType.FLOAT

    def get_tensor_location(self, name: str) -> TensorLocation:
        self._known(name, "getTensorLocation")
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> Dims:
        if not self._known(name, "getTensorShape"):
            return Dims()
        return Dims(size if isinstance(size, int) else -1 for size in self._tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        if not 0 <= profile_index < len(self._profiles) or name not in self._inputs:
            self._violation("ICudaEngine::getProfileShape", f"no profile {profile_index} of an input {name!r}")
            return []
        return [Dims(shape) for shape in self._profiles[profile_index][name]]

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig(self._logger, self._library)

    def create_execution_context(
        self,
        strategy: "ExecutionContextAllocationStrategy | IRuntimeConfig | None" = None,
        *,
        runtime_config: "IRuntimeConfig | None" = None,
    ) -> "IExecutionContext | None":
        where = "ICudaEngine::createExecutionContext"
        config = runtime_config or strategy
        if not isinstance(config, IRuntimeConfig):
            config = IRuntimeConfig(self._logger, self._library)
            config.set_execution_context_allocation_strategy(strategy or ExecutionContextAllocationStrategy.STATIC)
        if gpu_sim.library().gpusim_current() != self._cuda:
            self._violation(where, "the engine's CUDA context is not current", ErrorCodeTRT.UNSPECIFIED_ERROR)
            return None
        try:
            return IExecutionContext(self, config)
        except MemoryError:
            self._error(where, "Cuda Runtime (out of memory)", ErrorCodeTRT.FAILED_ALLOCATION)
            return None

    def _output_shapes(self, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        key = tuple(sorted(inputs.items()))
        if key not in self._shapes:
            self._shapes[key] = self._inferred(inputs) or self._tried(inputs)
        return self._shapes[key]

    def _inferred(self, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for value in model.graph.input:
            for dim, size in zip(value.type.tensor_type.shape.dim, inputs.get(value.name, ()), strict=False):
                dim.dim_value = size
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        shapes = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in model.graph.output
        }
        return shapes if all(shape and min(shape) > 0 for shape in shapes.values()) else {}

    def _tried(self, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        feeds = {name: np.zeros(shape, nptype(self.get_tensor_dtype(name))) for name, shape in inputs.items()}
        return {name: result.shape for name, result in zip(self._outputs, self._session.run(None, feeds), strict=True)}


def _activations(shapes: list[tuple[int, ...]]) -> int:
    size = sum(math.prod(shape) for shape in shapes) * 4 * ACTIVATION
    return -(-size // ALIGNMENT) * ALIGNMENT


class _RtxAlone:
    """A method that TensorRT for RTX has and TensorRT has not: absent while the stand-in is that of TensorRT."""

    library = "tensorrt_rtx"  # whose stand-in was made last: of classes; objects know theirs

    def __init__(self, method: Callable) -> None:
        self.method = method

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> Callable:
        if (_RtxAlone.library if instance is None else instance._library) != "tensorrt_rtx":
            raise AttributeError(f"{owner.__name__!r} object has no attribute {self.name!r}")
        return self.method if instance is None else self.method.__get__(instance, owner)


class IRuntimeConfig:
    def __init__(self, logger: ILogger, library: str = "tensorrt_rtx") -> None:
        self._logger, self._library = logger, library
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None
        if library == "tensorrt_rtx":
            self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
            self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._strategy = strategy

    def get_execution_context_allocation_strategy(self) -> ExecutionContextAllocationStrategy:
        return self._strategy

    @_RtxAlone
    def create_runtime_cache(self) -> "IRuntimeCache":
        return IRuntimeCache(self._logger)

    @_RtxAlone
    def set_runtime_cache(self, cache: "IRuntimeCache | None" = None) -> bool:
        self._cache = cache
        return True

    @_RtxAlone
    def get_runtime_cache(self) -> "IRuntimeCache | None":
        return self._cache


class IRuntimeCache:
    """Holds a line for each kernel that was compiled, here: for each shape an engine ran at."""

    _MAGIC = b"gpu_sim runtime cache\n"

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger
        self._lines: set[bytes] = set()

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._MAGIC + b"\n".join(sorted(self._lines)))

    def deserialize(self, blob: bytes) -> bool:
        data = bytes(memoryview(blob))
        if not data.startswith(self._MAGIC):
            self._logger.log(ILogger.Severity.ERROR, "IRuntimeCache::deserialize: Error Code 1: Serialization")
            return False
        self._lines = set(data[len(self._MAGIC) :].split(b"\n")) - {b""}
        return True

    def reset(self) -> bool:
        self._lines.clear()
        return True


@dataclass
class _Use:  # of memory that the user gave to a context
    context: int
    address: int
    size: int
    stream: int
    number: int


_uses: list[_Use] = []
_uses_lock = threading.Lock()


@dataclass
class _Last:  # where in which stream a context's last work was queued
    stream: int = 0
    number: int = 0


@dataclass
class _Given:  # what the user set
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    memory: int = 0
    size: int = 0


class IExecutionContext(_Reporting):
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine, self._config, self._logger = engine, config, engine._logger
        self._library = engine._library
        self._profile, self._given, self._last = 0, _Given(), _Last()
        self._busy, self._running = threading.Lock(), threading.Lock()
        self._warm: set[tuple] = set()  # (profile, shapes) that ran: the kernels are compiled
        self._own: _DeviceMemory | None = None
        self.name = ""
        self._allocate()

    def _allocate(self) -> None:
        strategy = self._config.get_execution_context_allocation_strategy()
        if strategy is ExecutionContextAllocationStrategy.USER_MANAGED:
            return
        if self._own is not None:
            self._own.free("IExecutionContext")
        static = strategy is ExecutionContextAllocationStrategy.STATIC
        size = self._engine.device_memory_size_v2 if static else self._profile_memory()
        self._own = _DeviceMemory(size, self._engine._cuda)

    def _profile_memory(self) -> int:
        return self._engine.get_device_memory_size_for_profile_v2(self._profile)

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be ending
            if self._pending():
                _misuse("IExecutionContext", "freed with work pending")
            with _uses_lock:
                _uses[:] = [use for use in _uses if use.context != id(self)]
            if self._own is not None:
                self._own.free("IExecutionContext")

    @property
    def engine(self) -> ICudaEngine:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self._unspecified()

    def get_runtime_config(self) -> IRuntimeConfig:
        return self._config

    def _unspecified(self) -> list[str]:
        engine = self._engine
        return [name for name in engine._inputs if -1 in tuple(self.get_tensor_shape(name))]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self.get_tensor_shape(name)) for name in self._engine._inputs}

    @contextmanager
    def _alone(self, where: str) -> Iterator[None]:
        """A context is not thread-safe: notices two threads in it at once."""
        alone = self._busy.acquire(blocking=False)
        if not alone:
            self._violation(f"IExecutionContext::{where}", "called by two threads at once", ErrorCodeTRT.INVALID_STATE)
        try:
            time.sleep(0)  # lets the other thread in, if there is one
            yield
        finally:
            if alone:
                self._busy.release()

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        where = "IExecutionContext::setOptimizationProfileAsync"
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            self._violation(where, f"there is no profile {profile_index}")
            return False
        if not self._usable(where, stream_handle):
            return False
        if self._pending():
            self._violation(where, "the profile was switched with work pending", ErrorCodeTRT.INVALID_STATE)
        changed, self._profile = profile_index != self._profile, profile_index
        if changed:
            self._given.shapes.clear()
            if self._config.get_execution_context_allocation_strategy() is (
                ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
            ):
                try:
                    self._allocate()
                except MemoryError:
                    self._error(where, "Cuda Runtime (out of memory)", ErrorCodeTRT.FAILED_ALLOCATION)
                    return False
            result, number = _queue(stream_handle, None)
            if result:
                self._error(where, f"Cuda Runtime (CUresult {result})", ErrorCodeTRT.UNSPECIFIED_ERROR)
                return False
            self._last = _Last(stream_handle, number)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...] | list[int] | Dims) -> bool:
        where = "IExecutionContext::setInputShape"
        engine, shape = self._engine, tuple(map(int, shape))
        with self._alone("setInputShape"):
            if name not in engine._inputs:
                self._violation(where, f"there is no input {name!r}")
                return False
            low, _, high = engine._profiles[self._profile][name]
            inside = len(shape) == len(low) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))
            if not inside:
                self._violation(where, f"{name!r} of {shape} is outside profile {self._profile}, {low} to {high}")
                return False
            self._given.shapes[name] = shape
            return True

    def get_tensor_shape(self, name: str) -> Dims:
        engine, where = self._engine, "IExecutionContext::getTensorShape"
        if name in engine._inputs:
            return Dims(self._given.shapes.get(name, engine.get_tensor_shape(name)))
        if name not in engine._outputs:
            self._violation(where, f"there is no tensor {name!r}")
            return Dims()
        if missing := self._unspecified():
            _misuse(where, f"{name!r} was asked for before the shape of {missing[0]!r} was set")
            return engine.get_tensor_shape(name)
        return Dims(engine._output_shapes(self._shapes())[name])

    def infer_shapes(self) -> list[str]:
        return self._unspecified()

    def set_tensor_address(self, name: str, memory: int) -> bool:
        where = "IExecutionContext::setTensorAddress"
        with self._alone("setTensorAddress"):
            if name not in self._engine._tensors:
                self._violation(where, f"there is no tensor {name!r}")
                return False
            if int(memory) % ALIGNMENT:
                _misuse(where, f"the address of {name!r} is not aligned to {ALIGNMENT} bytes")
            self._given.addresses[name] = int(memory)
            return True

    def get_tensor_address(self, name: str) -> int:
        return self._given.addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        where = "IExecutionContext::setDeviceMemoryV2"
        if self._config.get_execution_context_allocation_strategy() is not (
            ExecutionContextAllocationStrategy.USER_MANAGED
        ):
            self._violation(where, "the context was not created with USER_MANAGED", ErrorCodeTRT.INVALID_STATE)
        elif int(memory) % ALIGNMENT:
            self._violation(where, f"the address is not aligned to {ALIGNMENT} bytes")
        elif gpu_sim.library().gpusim_check(int(memory), int(size), self._engine._cuda):
            self._violation(where, f"{size} bytes at {int(memory):#x} are not device memory")
        else:
            self._given.memory, self._given.size = int(memory), int(size)

    def update_device_memory_size_for_shapes(self) -> int:
        if missing := self._unspecified():
            where = "IExecutionContext::updateDeviceMemorySizeForShapes"
            self._violation(where, f"the shape of {missing[0]!r} is not set", ErrorCodeTRT.INVALID_STATE)
            return 0
        return _activations(list(self._shapes().values()))

    @_RtxAlone
    def is_stream_capturable(self, stream: int) -> bool:
        return not self._unspecified() and self._usable("isStreamCapturable", stream) and self._key() in self._warm

    def _key(self) -> tuple:
        return self._profile, tuple(sorted(self._shapes().items()))

    def _pending(self) -> bool:
        last = self._last
        return bool(last.number) and not gpu_sim.library().gpusim_ended(last.stream, last.number)

    def _usable(self, where: str, stream: int) -> bool:
        library = gpu_sim.library()
        if library.gpusim_current() != self._engine._cuda:
            self._violation(where, "the engine's CUDA context is not current", ErrorCodeTRT.UNSPECIFIED_ERROR)
            return False
        if library.gpusim_stream(int(stream)) < 0:
            self._violation(where, f"{int(stream):#x} is no stream of this context", ErrorCodeTRT.UNSPECIFIED_ERROR)
            return False
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        with self._alone("enqueueV3"):
            return self._enqueue(int(stream_handle))

    def _enqueue(self, stream: int) -> bool:
        where, engine, library = "IExecutionContext::enqueueV3", self._engine, gpu_sim.library()
        if not self._usable(where, stream):
            return False
        if missing := self._unspecified():
            self._violation(where, f"the shape of {missing[0]!r} is not set", ErrorCodeTRT.INVALID_STATE)
            return False
        inputs = self._shapes()
        sides = []
        for shapes in (inputs, engine._output_shapes(inputs)):
            side = []
            for name, shape in shapes.items():
                dtype = np.dtype(nptype(engine.get_tensor_dtype(name)))
                address = self._given.addresses.get(name, 0)
                if not address:
                    self._violation(where, f"the address of {name!r} is not set", ErrorCodeTRT.INVALID_STATE)
                    return False
                if problem := library.gpusim_check(address, math.prod(shape) * dtype.itemsize, engine._cuda):
                    why = "too small for " + str(shape) if problem == 1 else "no live device memory"
                    self._violation(where, f"the memory of {name!r} is {why}")
                    return False
                side.append((name, address, shape, dtype))
            sides.append(side)
        capturing, key = library.gpusim_stream(stream) > 0, self._key()
        if capturing and key not in self._warm:
            # Its first run at a shape allocates and synchronises, which a capture does not survive.
            library.cuCtxSynchronize()
            self._violation(where, "captured before it had run once at this shape", ErrorCodeTRT.INVALID_STATE)
            return False
        if not capturing and not self._ordered(where, stream):
            return False
        result, number = _queue(stream, _Work(weakref.ref(self), engine._cuda, *sides))
        if result:
            self._error(where, f"Cuda Runtime (CUresult {result})", ErrorCodeTRT.UNSPECIFIED_ERROR)
            return False
        if not capturing:
            self._last = _Last(stream, number)
            if self._given.memory:
                with _uses_lock:
                    _uses[:] = [use for use in _uses if use.context != id(self)]
                    _uses.append(_Use(id(self), self._given.memory, self._given.size, stream, number))
        self._warm.add(key)
        if self._config._cache is not None:
            self._config._cache._lines.add(repr((engine.name, key)).encode())
        return True

    def _ordered(self, where: str, stream: int) -> bool:
        """Rules about work still pending. False: TensorRT refuses."""
        library, last, given = gpu_sim.library(), self._last, self._given
        if last.number and not library.gpusim_ordered(last.stream, last.number, stream):
            _misuse(where, "enqueued on another stream while the context's previous work is pending")
        user_managed = ExecutionContextAllocationStrategy.USER_MANAGED
        if self._config.get_execution_context_allocation_strategy() is user_managed:
            needed = min(self.update_device_memory_size_for_shapes(), self._profile_memory())
            if given.size < needed:
                why = f"{given.size} bytes of device memory, and {needed} are needed" if given.memory else "none is set"
                self._violation(where, f"device memory: {why}", ErrorCodeTRT.INVALID_STATE)
                return False
            if library.gpusim_check(given.memory, given.size, self._engine._cuda):
                self._violation(where, "the device memory is freed", ErrorCodeTRT.INVALID_STATE)
                return False
            with _uses_lock:
                shared = [
                    use for use in _uses
                    if use.context != id(self)
                    and use.address < given.memory + given.size and given.memory < use.address + use.size
                ]  # fmt: skip
            for use in shared:
                if not library.gpusim_ordered(use.stream, use.number, stream):
                    _misuse(where, "its device memory is in use by another context's pending work")
        return True


# ------------------------------------------------------------------------------------------------------- the module

_NAMES = (
    "DataType", "Dims", "ErrorCodeTRT", "ExecutionContextAllocationStrategy", "ICudaEngine", "IErrorRecorder",
    "IExecutionContext", "IHostMemory", "ILogger", "IRuntimeConfig", "Logger", "Runtime", "TensorIOMode",
    "TensorLocation", "nptype",
)  # fmt: skip
_RTX_NAMES = ("CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeCache")


def module(name: str = "tensorrt_rtx") -> types.ModuleType:
    """The stand-in; named tensorrt it lacks what only TensorRT for RTX has at module level."""
    made, _RtxAlone.library = types.ModuleType(name, "TensorRT on the simulated GPU"), name
    for one in _NAMES + (_RTX_NAMES if name == "tensorrt_rtx" else ()):
        setattr(made, one, globals()[one])
    made.Runtime = type("Runtime", (Runtime,), {"_library": name})
    made.__version__ = "1.7.1.116" if name == "tensorrt_rtx" else signatures.read("11")["version"]
    return made


@contextmanager
def installed(name: str = "tensorrt_rtx") -> Iterator[types.ModuleType]:
    """`import NAME` gives the stand-in while it lasts."""
    before = sys.modules.get(name)
    sys.modules[name] = module(name)
    try:
        yield sys.modules[name]
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before

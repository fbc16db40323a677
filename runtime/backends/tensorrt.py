"""Networks on NVIDIA GPUs: TensorRT or TensorRT for RTX through pycuda, with our kernels before and after the core.

An image goes up as it is (one copy), a kernel prepares it, the network runs, a kernel makes labels of its scores, and
these come down (one copy). Copies have a stream of their own per slot, and there are two slots, so that one image is
copied while another is computed. All that computes is on one stream: contexts never run at once, and share one block
of memory, one input and one buffer of scores.
"""

import ctypes
import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import DeployError, MisuseError, OverBudgetError
from ..extras import need
from ..files import replacing
from ..manifest import COORDINATES, MODES, ROUNDINGS, Head, Manifest, Profile
from . import KERNELS_PTX, kernels_for

log = logging.getLogger(__name__)

SLOTS = 2
GRAPHS = 16  # CUDA graphs kept, of (profile, shape); each has a context of its own
SHAPES = 1024  # (profile, shape) whose memory and scores' shape are remembered
BLOCK = (32, 8, 1)  # threads of our kernels
ALIGNMENT = 256  # bytes, of what is allocated
THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads go on as if nothing were captured


@dataclass(frozen=True)
class _Shape:
    """What is known of the network at one input size: bytes of working memory, and (K, h, w) of its scores."""

    memory: int
    scores: tuple[int, int, int]


class TensorRTBackend:
    """A plan and its kernels on one GPU.

    Args:
        manifest: of the engine; says which library, version and GPUs the plan is for. Checked before anything loads.
        plan: serialised.
        kernels: name → code of the members that runtime.backends names.
        device: index of the GPU.
        source: names the engine in errors.
        graphs: CUDA graphs kept at most; 0: none. TensorRT for RTX makes its own.

    Thread-safe: calls from many threads share the GPU, two at a time.

    Raises:
        DeployError: no driver or GPU, a package that is missing, or a plan for another GPU or version.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: bytes,
        kernels: Mapping[str, bytes],
        device: int = 0,
        source: str = "the engine",
        graphs: int = GRAPHS,
    ) -> None:
        gpu = manifest.gpu
        if gpu is None:
            raise DeployError(f"{source} has no GPU plan of this release; build it again with build-engine")
        self.card, self.head, self.source, self.gpu = manifest.card, manifest.head, source, gpu
        self._closed = False
        self._broken: str | None = None
        self._cuda = cuda = _driver(source, gpu.targets)
        self._device = _device(cuda, device, gpu.targets, gpu.portable, source)
        self._trt = trt = _library(gpu.library, gpu.version, gpu.version_compatible, source)
        self.name = f"{gpu.library} {trt.__version__}"
        self._graph_limit = 0 if gpu.library == "tensorrt_rtx" else graphs
        self._submit = threading.Lock()
        self._context = self._device.retain_primary_context()
        self._contexts: dict[int, Any] = {}
        # None: seen once; a context: ready to be captured; a graph.
        self._graphs: OrderedDict[tuple[int, tuple[int, int]], Any] = OrderedDict()
        self._shapes: OrderedDict[tuple[int, tuple[int, int]], _Shape] = OrderedDict()
        self._set: dict[int, tuple[tuple[int, int], int]] = {}  # profile → the size its context is set to, its memory
        self._runtime = self._engine = self._cache = None
        self._cache_path = _cache_path(plan, self._device)
        self._slots: list[_Slot] = []
        self._buffers: list[_Buffer] = []
        with self._current():
            try:
                self._open(plan, kernels)
            except BaseException as error:
                self._release()
                if isinstance(error, cuda.MemoryError):
                    raise self._out_of_memory("any size") from error
                raise

    # Opening and closing

    def _open(self, plan: bytes, kernels: Mapping[str, bytes]) -> None:
        trt, cuda = self._trt, self._cuda
        self._log = _logger(trt)
        self._runtime = trt.Runtime(self._log)
        if self.gpu.version_compatible and hasattr(self._runtime, "engine_host_code_allowed"):
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise DeployError(
                f"{self.source}: {self.gpu.library} {trt.__version__} cannot load the plan ({self._log.said()}); build "
                "it again for this GPU and version with build-engine"
            )
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise DeployError(
                f"{self.source}: its plan has {len(inputs)} inputs and {len(outputs)} outputs, not one each"
            )
        self._input, self._output = inputs[0], outputs[0]
        if self._engine.num_optimization_profiles != len(self.gpu.profiles):
            raise DeployError(f"{self.source}: its plan and its manifest disagree on the profiles; build it again")
        self._input_type, self._score_type = (
            {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16"}.get(self._engine.get_tensor_dtype(name))
            for name in (self._input, self._output)
        )
        if self._input_type is None or self._score_type is None:
            raise DeployError(f"{self.source}: its plan takes or gives neither float32 nor float16; build it again")
        self._config = self._runtime_config()
        self._compute = cuda.Stream()
        self._memory, self._core, self._scores = (self._buffer() for _ in range(3))
        std, mean = (np.asarray(values, np.float64) for values in (self.card.std, self.card.mean))
        # As prepare.py has it: image · (1 / std) - mean / std.
        factors = np.concatenate([1.0 / std, mean / std]).astype(np.float32)
        self._factors = self._buffer()
        self._factors.reserve(factors.nbytes)
        cuda.memcpy_htod(self._factors.pointer, factors)
        module = _module(cuda, kernels, self._device, self.source)
        self._prepare_kernel = module.get_function(f"prepare_{self.card.dtype}_{self._input_type}")
        self._prepare_kernel.prepare("PPPPiiiii")
        self._label_kernel = module.get_function(f"label_{self._score_type}_{self.card.label_dtype}")
        self._label_kernel.prepare("PPiiiiiddiiiiiif")
        self._module = module
        self._slots = [_Slot(self) for _ in range(SLOTS)]
        self._free = list(self._slots)
        self._slot_freed = threading.Condition()

    def _runtime_config(self):
        """TensorRT for RTX keeps what it compiles at run time, and captures CUDA graphs by itself."""
        trt = self._trt
        if self.gpu.library != "tensorrt_rtx":
            return None
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        with suppress(OSError):
            if not self._cache.deserialize(self._cache_path.read_bytes()):
                log.info("%s is of another driver or version, and is made anew", self._cache_path)
        config.set_runtime_cache(self._cache)
        return config

    def _buffer(self) -> "_Buffer":
        buffer = _Buffer(self)
        self._buffers.append(buffer)
        return buffer

    def close(self) -> None:
        """Wait for the calls that run, then release all of the GPU's memory. Calls afterwards raise MisuseError."""
        with self._slot_freed:
            if self._closed:
                return
            self._closed = True
            self._slot_freed.notify_all()
            while len(self._free) < len(self._slots):
                self._slot_freed.wait()
        with self._submit:
            with self._current():
                if self._cache is not None and self._broken is None:
                    self._save_cache()
                self._release()
            self._context.detach()

    def _save_cache(self) -> None:
        try:
            with replacing(self._cache_path) as temporary:
                temporary.write_bytes(bytes(self._cache.serialize()))
        except DeployError as error:
            log.info("what was compiled is not kept: %s", error)

    def _release(self) -> None:
        """Give everything back. Where the GPU has failed, its driver refuses; it is freed with the process then."""
        with suppress(Exception):
            self._cuda.Context.synchronize()
        self._drop_graphs()
        for slot in self._slots:
            slot.release()
        for buffer in self._buffers:
            buffer.release()
        # Contexts go before their engine, and that before its runtime.
        self._slots, self._buffers, self._free = [], [], []
        self._contexts.clear()
        self._cache = self._config = None
        self._engine = self._runtime = None
        self._prepare_kernel = self._label_kernel = self._module = self._compute = None

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The GPU's context, current in this thread; what was current before is so again afterwards."""
        self._context.push()
        try:
            yield
        finally:
            self._cuda.Context.pop()

    # Profiles

    def profile_for(self, padded: tuple[int, int]) -> int:
        """Index of the profile that runs a padded size: of those that hold it, the one with the nearest OPT."""
        fitting = self._profiles_for(padded)
        if not fitting:
            ranges = ", ".join(_range(profile) for profile in self.gpu.profiles)
            raise OverBudgetError(
                f"an image of {padded[0]}×{padded[1]} (padded) is outside every profile of {self.source} ({ranges}); "
                "build it with --sizes that hold it, or label the image in parts"
            )
        return fitting[0]

    def _profiles_for(self, padded: tuple[int, int]) -> list[int]:
        def distance(index: int) -> float:
            opt = self.gpu.profiles[index].opt
            return abs(np.log(padded[0] * padded[1] / (opt[0] * opt[1])))

        return sorted((index for index, p in enumerate(self.gpu.profiles) if p.holds(padded)), key=distance)

    # Running

    def labels(self, image: np.ndarray, padded: tuple[int, int]) -> np.ndarray:
        """Labels of one image.

        Args:
            image: [H, W, C] as the card says.
            padded: (height, width) of the core's input.

        Returns:
            [H, W] uint8 or uint16.

        Raises:
            OverBudgetError: the size is outside every profile, or the GPU's memory does not suffice.
            DeployError: the GPU failed.
        """
        height, width = image.shape[:2]
        dtype = np.dtype(self.card.label_dtype)
        with self._slot() as slot, self._current():
            count = height * width * dtype.itemsize
            self._reserving(lambda: slot.reserve(image.nbytes, count), f"{height}×{width}")
            slot.put(image)
            with self._submit, self._recovering():
                scores = self._run(slot, image, padded)
                self._label(slot, scores, padded, (height, width))
                slot.download(count, self._compute)
            with self._recovering():
                slot.done.synchronize()
            return slot.host_out[:count].view(dtype).reshape(height, width).copy()

    def scores(self, image: np.ndarray, padded: tuple[int, int]) -> np.ndarray:
        """Uncropped scores of one image, float32 [K, h, w]. Arguments and errors as for `labels`."""
        with self._slot() as slot, self._current():
            self._reserving(lambda: slot.reserve(image.nbytes, 0), f"{image.shape[0]}×{image.shape[1]}")
            slot.put(image)
            with self._submit, self._recovering():
                shape = self._run(slot, image, padded)
                found = np.empty(shape, self._score_type)
                self._compute.synchronize()
                self._cuda.memcpy_dtoh(found, self._scores.pointer)
            return found.astype(np.float32, copy=False)

    @contextmanager
    def _slot(self) -> Iterator["_Slot"]:
        with self._slot_freed:
            while not self._free and not self._closed:
                self._slot_freed.wait()
            if self._closed:
                raise MisuseError(f"{self.source} is closed; open it again")
            if self._broken is not None:
                raise DeployError(self._broken)
            slot = self._free.pop()
        try:
            yield slot
        except OverBudgetError:
            with self._submit, self._current():  # what it holds may be what others lack
                slot.image.release()
                slot.labels.release()
            raise
        finally:
            with self._slot_freed:
                self._free.append(slot)
                self._slot_freed.notify_all()

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """After an error nothing is left in flight; where the GPU itself has failed, all later calls say so."""
        try:
            yield
        except BaseException as error:
            try:
                self._cuda.Context.synchronize()
            except self._cuda.Error as failure:
                self._broken = (
                    f"the GPU failed while it ran {self.source} ({_said(failure)}); it cannot be used in this process "
                    "any more: start a new one, and run verify-engine there"
                )
                raise DeployError(self._broken) from error
            if isinstance(error, self._cuda.Error):
                raise DeployError(f"{self.source}: CUDA refused a call: {_said(error)}; please report this") from error
            raise

    def _reserving(self, reserve, what: str) -> None:
        """Allocate; where memory is short, give back what later calls can make again, and try once more."""
        try:
            with self._submit:
                reserve()
        except self._cuda.MemoryError:
            with self._submit:
                self._trim()
                try:
                    reserve()
                except self._cuda.MemoryError as error:
                    raise self._out_of_memory(what) from error

    def _out_of_memory(self, what: str, needed: int = 0) -> OverBudgetError:
        free, total = self._cuda.mem_get_info()
        wants = f"{needed / 1e9:.2f} GB more" if needed else "more"
        return OverBudgetError(
            f"an image of {what} needs {wants} of the GPU's memory, and {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
            "free; close what else uses the GPU, or label the image in parts"
        )

    def _trim(self) -> None:
        """Give back all that grows and is not in use: the network's memory and buffers, with the graphs on them."""
        self._compute.synchronize()
        self._drop_graphs()
        # A slot that is taken from now on waits for us before it allocates.
        idle = [buffer for slot in self._free for buffer in (slot.image, slot.labels)]
        for buffer in (self._memory, self._core, self._scores, *idle):
            buffer.release()

    def _run(self, slot: "_Slot", image: np.ndarray, padded: tuple[int, int]) -> tuple[int, int, int]:
        """Queue the upload, the preparation and the network; returns (K, h, w) of the scores."""
        candidates = self._profiles_for(padded) or [self.profile_for(padded)]
        # Where memory is short, the profile that takes least is tried after the one that suits best.
        least = min(candidates, key=lambda index: self.gpu.profiles[index].bytes or 0)
        for attempt, profile in enumerate((candidates[0], least)):
            try:
                shape = self._reserve(profile, padded)
                break
            except self._cuda.MemoryError as error:
                self._trim()
                if attempt == 1:
                    needed = self._shapes[profile, padded].memory if (profile, padded) in self._shapes else 0
                    raise self._out_of_memory(f"{padded[0]}×{padded[1]} (padded)", needed) from error
        slot.upload(image.nbytes, self._compute)
        height, width = image.shape[:2]
        channels = self.card.channels
        self._prepare_kernel.prepared_async_call(
            _grid(*padded), BLOCK, self._compute,
            int(slot.image.pointer), int(self._core.pointer),
            int(self._factors.pointer), int(self._factors.pointer) + 4 * channels,
            channels, height, width, *padded,
        )  # fmt: skip
        self._enqueue(profile, padded)
        return shape.scores

    def _reserve(self, profile: int, padded: tuple[int, int]) -> _Shape:
        """Make sure that the core's buffers are large enough for a size. Raises pycuda's MemoryError."""
        key = (profile, padded)
        shape = self._shapes.get(key)
        if shape is None:
            context, memory = self._ready(profile, padded)
            found = tuple(context.get_tensor_shape(self._output))
            if len(found) != 4 or min(found) < 1:
                raise DeployError(f"{self.source}: its plan gives scores of {list(found)}; build it again")
            shape = self._shapes[key] = _Shape(memory, found[1:])
            if len(self._shapes) > SHAPES:
                self._shapes.popitem(last=False)
        input_bytes = self.card.channels * padded[0] * padded[1] * np.dtype(self._input_type).itemsize
        score_bytes = int(np.prod(shape.scores)) * np.dtype(self._score_type).itemsize
        needs = ((self._memory, shape.memory), (self._core, input_bytes), (self._scores, score_bytes))
        if any(size > buffer.size for buffer, size in needs):
            # What runs still uses the old ones, and graphs have their addresses in them.
            self._compute.synchronize()
            self._drop_graphs()
            for buffer, size in needs:
                buffer.reserve(size)
        return shape

    def _ready(self, profile: int, padded: tuple[int, int]) -> tuple[Any, int]:
        """The profile's context, set to a size, and the bytes of memory it needs at that."""
        if profile not in self._contexts:
            self._contexts[profile] = self._new_context(profile)
        if profile not in self._set or self._set[profile][0] != padded:
            self._set.pop(profile, None)
            self._set[profile] = padded, self._shape(self._contexts[profile], padded)
        return self._contexts[profile], self._set[profile][1]

    def _new_context(self, profile: int) -> Any:
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy if self._config is None else self._config)
        if context is None or not context.set_optimization_profile_async(profile, self._compute.handle):
            raise DeployError(f"{self.source}: no execution context can be made ({self._log.said()})")
        self._compute.synchronize()
        return context

    def _shape(self, context, padded: tuple[int, int]) -> int:
        """Set a context to a size; bytes of memory that it needs then."""
        if not context.set_input_shape(self._input, (1, self.card.channels, *padded)):
            raise DeployError(f"{self.source} refuses an input of {padded[0]}×{padded[1]} ({self._log.said()})")
        # Without this a context wants what the profile's MAX needs.
        return int(context.update_device_memory_size_for_shapes())

    def _enqueue(self, profile: int, padded: tuple[int, int]) -> None:
        """Queue the network, by its graph where there is one.

        A size that comes a second time is worth a graph. It gets a context of its own, since a graph is valid only as
        long as the context that it was captured from keeps its state (TensorRT's guide, "CUDA Graphs"); all of them
        share one block of memory. That context first runs as usual, and what comes next is captured: the first run
        after a change of shape may do work that must not be.
        """
        key = (profile, padded)
        known = self._graphs.get(key)
        if isinstance(known, _Graph):
            self._graphs.move_to_end(key)
            known.launch(self._compute)
            return
        context = known or self._ready(profile, padded)[0]
        if self._graph_limit:
            if known is not None:
                self._graphs.move_to_end(key)
                self._graphs[key] = graph = _Graph.capture(self._compute, context, lambda: self._execute(context))
                if graph is not None:
                    graph.launch(self._compute)
                    return
                self._graph_limit = 0  # this network cannot be captured
                self._compute.synchronize()
                self._drop_graphs()
                context = self._ready(profile, padded)[0]
            elif key in self._graphs:
                context = self._new_context(profile)
                self._shape(context, padded)
                self._graphs[key] = context
                self._graphs.move_to_end(key)
            else:
                self._graphs[key] = None
                self._evict()
        context.set_device_memory(int(self._memory.pointer), self._memory.size)
        context.set_tensor_address(self._input, int(self._core.pointer))
        context.set_tensor_address(self._output, int(self._scores.pointer))
        self._execute(context)

    def _execute(self, context) -> None:
        if not context.execute_async_v3(self._compute.handle):
            raise DeployError(f"{self.source}: TensorRT did not run the network ({self._log.said()})")

    def _evict(self) -> None:
        while len(self._graphs) > self._graph_limit:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                self._compute.synchronize()
            if isinstance(oldest, _Graph):
                oldest.destroy()

    def _drop_graphs(self) -> None:
        """Forget all graphs and their contexts. Nothing queued may use them."""
        for graph in self._graphs.values():
            if isinstance(graph, _Graph):
                graph.destroy()
        self._graphs.clear()

    def _label(
        self, slot: "_Slot", scores: tuple[int, int, int], padded: tuple[int, int], size: tuple[int, int]
    ) -> None:
        head, card = self.head, self.card
        classes, rows, columns = scores
        factor = head.factor or (padded[0] / rows, padded[1] / columns)
        full = padded if head.factor is None else (int(rows * factor[0]), int(columns * factor[1]))
        self._label_kernel.prepared_async_call(
            _grid(*size), BLOCK, self._compute,
            int(self._scores.pointer), int(slot.labels.pointer), classes, rows, columns, *full, *factor, *size,
            *_codes(head), int(card.activation != "softmax"),
            card.score_threshold if card.activation != "softmax" else 0.0,
        )  # fmt: skip


def _codes(head: Head) -> tuple[int, int, int]:
    """A head as kernels.cu counts it: the order of the enumerations there is that of these tuples."""
    return MODES.index(head.mode), COORDINATES.index(head.coordinates), ROUNDINGS.index(head.rounding)


def _grid(height: int, width: int) -> tuple[int, int]:
    return -(-width // BLOCK[0]), -(-height // BLOCK[1])


def _range(profile: Profile) -> str:
    return f"{profile.min[0]}×{profile.min[1]} to {profile.max[0]}×{profile.max[1]}"


class _Buffer:
    """Device memory that only grows."""

    def __init__(self, backend: TensorRTBackend) -> None:
        self._cuda = backend._cuda
        self.pointer, self.size = None, 0

    def reserve(self, size: int) -> None:
        """At least `size` bytes. Nothing queued may use it. Raises pycuda's MemoryError."""
        if size > self.size or self.pointer is None:
            self.release()
            size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
            self.pointer = self._cuda.mem_alloc(size)
            self.size = size

    def release(self) -> None:
        if self.pointer is not None:
            with suppress(self._cuda.Error):
                self.pointer.free()
        self.pointer, self.size = None, 0


class _Slot:
    """What one image in flight has to itself: pinned memory, its image and labels on the GPU, a stream, events."""

    def __init__(self, backend: TensorRTBackend) -> None:
        self._cuda = cuda = backend._cuda
        self.image, self.labels = _Buffer(backend), _Buffer(backend)
        self.host_in = self.host_out = None
        self.stream = cuda.Stream()
        quiet = cuda.event_flags.DISABLE_TIMING
        self.uploaded, self.computed = cuda.Event(quiet), cuda.Event(quiet)
        # A waiting thread sleeps: the CPU has images to decode.
        self.done = cuda.Event(quiet | cuda.event_flags.BLOCKING_SYNC)

    def reserve(self, image: int, labels: int) -> None:
        """Bytes for an image and its labels. The slot is not in use, so nothing queued has the old memory."""
        self.image.reserve(image)
        self.labels.reserve(labels)
        for name, size in (("host_in", image), ("host_out", labels)):
            array = getattr(self, name)
            if array is None or array.size < size:
                setattr(self, name, None)
                if array is not None:
                    array.base.free()
                size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
                setattr(self, name, self._cuda.pagelocked_empty(size, np.uint8))

    def put(self, image: np.ndarray) -> None:
        """Copy an image into pinned memory."""
        view = self.host_in[: image.nbytes].view(image.dtype).reshape(image.shape)
        np.copyto(view, image)

    def upload(self, size: int, compute) -> None:
        self._cuda.memcpy_htod_async(self.image.pointer, self.host_in[:size], self.stream)
        self.uploaded.record(self.stream)
        compute.wait_for_event(self.uploaded)

    def download(self, size: int, compute) -> None:
        self.computed.record(compute)
        self.stream.wait_for_event(self.computed)
        self._cuda.memcpy_dtoh_async(self.host_out[:size], self.labels.pointer, self.stream)
        self.done.record(self.stream)

    def release(self) -> None:
        for buffer in (self.image, self.labels):
            buffer.release()
        for array in (self.host_in, self.host_out):
            if array is not None:
                with suppress(self._cuda.Error):
                    array.base.free()
        self.host_in = self.host_out = self.stream = self.uploaded = self.computed = self.done = None


class _Graph:
    """A captured CUDA graph, and the context it lives by. pycuda has none, so the driver itself is called."""

    def __init__(self, executable: ctypes.c_void_p, context) -> None:
        self._executable, self._context = executable, context

    @classmethod
    def capture(cls, stream, context, work) -> "_Graph | None":
        """What `work` makes `context` queue on `stream`, without running it; None where it cannot be captured."""
        driver, handle = _libcuda(), ctypes.c_void_p(stream.handle)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if driver.cuStreamBeginCapture_v2(handle, THREAD_LOCAL):
            return None
        failed = True
        try:
            with suppress(DeployError):
                work()
                failed = False
        finally:  # the stream could not be used again
            code = driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        if code or failed or not graph:
            if graph:
                driver.cuGraphDestroy(graph)
            return None
        code = driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        driver.cuGraphDestroy(graph)
        return None if code else cls(executable, context)

    def launch(self, stream) -> None:
        if code := _libcuda().cuGraphLaunch(self._executable, ctypes.c_void_p(stream.handle)):
            raise DeployError(f"CUDA did not launch a graph (error {code}); please report this")

    def destroy(self) -> None:
        _libcuda().cuGraphExecDestroy(self._executable)
        self._context = None


def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


# What is checked before anything is loaded


def _driver(source: str, targets: tuple[str, ...]) -> ModuleType:
    where = f"{source} is an engine for {','.join(targets)}"
    try:
        cuda = need("pycuda.driver", "gpu")
    except DeployError as error:
        if "libcuda" in str(error.__cause__):
            raise DeployError(
                f"{where}, and no NVIDIA driver is installed here; run it on the GPU's machine, or build one with "
                "--target cpu"
            ) from error
        raise DeployError(
            "pycuda is not installed; run: pip install pycuda (it compiles, and needs the CUDA toolkit)"
        ) from error
    try:
        cuda.init()
    except cuda.Error as error:
        raise DeployError(
            f"{where}, and no NVIDIA GPU can be used here ({_said(error)}); run it on the GPU's machine, or build one "
            "with --target cpu"
        ) from error
    return cuda


def _device(cuda: ModuleType, index: int, targets: tuple[str, ...], portable: bool, source: str):
    count = cuda.Device.count()
    if index >= count:
        raise MisuseError(f"device cuda:{index}: there are {count} GPUs here, counted from 0")
    device = cuda.Device(index)
    found = "sm{}{}".format(*device.compute_capability())
    if found not in targets and not portable:
        raise DeployError(
            f"{source} is for {', '.join(targets)}, and this GPU ({device.name()}) is {found}; build it with "
            f"--target {found}"
        )
    return device


def _library(name: str, version: str, compatible: bool, source: str) -> ModuleType:
    trt = need(name, "rtx" if name == "tensorrt_rtx" else "gpu")
    built, found = (tuple(text.split(".")[:3]) for text in (version, trt.__version__))
    if built != found and not (compatible and built[0] == found[0]):
        package = "tensorrt-rtx-cu13" if name == "tensorrt_rtx" else "tensorrt"
        raise DeployError(
            f"{source} was built by {name} {version}, and {trt.__version__} is installed; plans fit one version: run "
            f"pip install '{package}=={version}', or build it again"
        )
    return trt


def _module(cuda: ModuleType, kernels: Mapping[str, bytes], device, source: str):
    """Our kernels: machine code for this GPU where the engine has it, else PTX, which the driver compiles."""
    exact = kernels_for("sm{}{}".format(*device.compute_capability()))
    problem = "it has none"
    for name in (exact, KERNELS_PTX):
        if name in kernels:
            try:
                return cuda.module_from_buffer(kernels[name])
            except cuda.Error as error:
                problem = _said(error)
    raise DeployError(
        f"{source}: its GPU kernels cannot be loaded ({problem}); update the NVIDIA driver, or build the engine again"
    )


def _cache_path(plan: bytes, device) -> Path:
    """Where TensorRT for RTX keeps what it compiled for a plan on a GPU: it is code, so in the user's own folder."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(plan).hexdigest()[:32]
    return base / "fcn-deploy" / f"{digest}-{'sm{}{}'.format(*device.compute_capability())}.rtx-cache"


def _logger(trt: ModuleType):
    class Log(trt.ILogger):
        """Passes messages to logging, and keeps the last error for ours."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity, message: str) -> None:
            kinds = trt.ILogger.Severity
            text = " ".join(message.split())
            if severity in (kinds.ERROR, kinds.INTERNAL_ERROR):
                self.last = text[:300]
                log.debug("%s", text)
            elif severity == kinds.WARNING:
                log.debug("%s", text)

        def said(self) -> str:
            return self.last or "no reason given"

    return Log()


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]

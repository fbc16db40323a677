"""Networks on NVIDIA GPUs: TensorRT or TensorRT for RTX, with our kernels before and after the core.

An image goes up as it is (one copy), a kernel prepares it, the network runs, a kernel makes labels of its scores, and
these come down (one copy). Copies have a stream of their own per slot, and there are two slots, so that one image is
copied while another is computed. All that computes is on one stream: contexts never run at once, and share one block
of memory, one input and one buffer of scores.

Streams are non-blocking, and only these are waited for, never the whole context: another Segmenter, or PyTorch, may use
the GPU in the same process, and capture graphs there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from ..arrays import AnyArray, Floats, Image, Labels, size_of
from ..errors import DeployError, MisuseError, OverBudgetError, one_line
from ..manifest import COORDINATES, MODES, ROUNDINGS, Manifest, Upsampling
from ..no_data import usable
from ..plan import outside_profiles, profiles_for
from ..prepare import padded_size
from .buffers import Buffer, Slot
from .device import cache_path, load_kernels, open_device, open_driver, open_library
from .device_network import GRAPHS, DeviceNetwork
from .graphs import beside_other_captures

SLOTS = 2
BLOCK = (32, 8, 1)  # threads of our kernels, one a pixel
THREADS = 256  # of the one that is not by pixels
PLACE_BYTES = 12  # of a row or column of the labels: two cells and a share


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

    batches = False
    first_runs = 3  # as it is, in a context of its own, and captured

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
        self.card, self.upsampling, self.source, self.gpu = manifest.card, manifest.upsampling, source, gpu
        self._closed = False
        self._broken: str | None = None
        self._cuda = cuda = open_driver(source, gpu.targets)
        self._device = open_device(cuda, device, gpu, source)
        trt = open_library(gpu, source)
        self.name = f"{gpu.library} {trt.__version__}"
        self._submit = threading.Lock()
        self._context = self._device.retain_primary_context()
        self._slots: list[Slot] = []
        self._factors = Buffer(cuda)
        self._network: DeviceNetwork | None = None
        try:
            with self._current():
                try:
                    cache = cache_path(plan, self._device)
                    self._network = DeviceNetwork(cuda, trt, gpu, self.card.channels, plan, cache, source, graphs)
                    self._load_kernels(kernels)
                    self._slots = [Slot(cuda) for _ in range(SLOTS)]
                except BaseException as error:
                    self._release()
                    if isinstance(error, cuda.MemoryError):
                        raise self._out_of_memory("any size") from error
                    raise
        except BaseException:
            self._context.detach()
            raise
        self._free = list(self._slots)
        self._slot_freed = threading.Condition()

    def _load_kernels(self, kernels: Mapping[str, bytes]) -> None:
        std, mean = (np.asarray(values, np.float64) for values in (self.card.std, self.card.mean))
        # As prepare.py has it: image · (1 / std) - mean / std.
        factors = np.concatenate([1.0 / std, mean / std]).astype(np.float32)
        self._factors.reserve(factors.nbytes)
        stream = self.network.stream  # a copy that blocks is ordered with the null stream alone
        self._cuda.memcpy_htod_async(self._factors.pointer, factors, stream)
        stream.synchronize()
        self._kernels = load_kernels(self._cuda, kernels, self._device, self.source)
        network = self.network
        self._prepare_kernel = self._function(f"prepare_{self.card.dtype}_{network.input_type}")
        self._prepare_kernel.prepare("PPPPiiiii")
        self._label_kernel = self._function(f"label_{network.score_type}_{self.card.label_dtype}")
        self._label_kernel.prepare("PPPPPiiiiiiif")
        self._positions_kernel = self._function("positions")
        self._positions_kernel.prepare("PPPiiiiddiiiii")

    def _function(self, name: str) -> Any:
        try:
            return self._kernels.get_function(name)
        except self._cuda.Error as error:
            raise DeployError(
                f"{self.source} has GPU kernels of another release (there is no {name}); build it again with "
                "build-engine"
            ) from error

    @property
    def network(self) -> DeviceNetwork:
        """The core on the GPU. Raises MisuseError once it is closed."""
        if self._network is None:
            raise MisuseError(f"{self.source} is closed; open it again")
        return self._network

    def release(self) -> None:
        """As `Backend` says: on a GPU nothing, as its memory is sized by the profiles."""

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
                if self._broken is None:
                    self.network.save_cache()
                self._release()
            self._context.detach()

    def _keep_cache(self) -> None:
        """Store what was compiled for the first run of a profile: a process that is killed never closes."""
        if self.network.unsaved:
            with self._submit:
                self.network.save_cache()

    def _release(self) -> None:
        """Give everything back. Where the GPU has failed, its driver refuses; it is freed with the process then."""
        if self._network is not None and self._network.stream is not None:
            with suppress(Exception):
                self._network.settle()
        for slot in self._slots:
            with suppress(Exception):
                slot.stream.synchronize()
            slot.release()
        self._factors.release()
        if self._network is not None:
            self._network.release()
        self._network, self._slots, self._free = None, [], []
        self._prepare_kernel = self._label_kernel = self._positions_kernel = self._kernels = None

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The GPU's context, current in this thread; what was current before is so again afterwards."""
        self._context.push()
        try:
            with beside_other_captures():
                yield
        finally:
            self._cuda.Context.pop()

    # Running

    def labels(self, image: Image) -> Labels:
        """As `Backend` says; OverBudgetError also where no profile holds the size."""
        height, width = size_of(image)
        padded, dtype = padded_size(height, width, self.card), np.dtype(self.card.label_dtype)
        with self._slot() as slot, self._current():
            count = height * width * dtype.itemsize
            places = (height + width) * PLACE_BYTES
            self._reserving(lambda: slot.reserve(image.nbytes, count, places), f"{height}×{width}")
            slot.put(image)
            with self._submit, self._recovering(slot):
                scores = self._run(slot, image, padded)
                self._label(slot, scores, padded, (height, width))
                slot.download(count, self.network.stream)
            with self._recovering(slot, submitted=True):
                slot.done.synchronize()
            self._keep_cache()
            labels: Labels = slot.taken(count, dtype).reshape(height, width)
            return labels

    def scores(self, images: Sequence[Image]) -> Floats:
        """As `Backend` says; OverBudgetError also where no profile holds the size."""
        found = [self._scores_of(image) for image in images]
        return found[0][None] if len(found) == 1 else np.stack(found)

    def run_stage(self, index: int, part: AnyArray) -> AnyArray:
        """As `Backend` says; a plan is one stage."""
        assert index == 0, "checked where engines are opened"
        return self._scores_of(part)

    def _scores_of(self, image: Image) -> Floats:
        padded = padded_size(*size_of(image), self.card)
        with self._slot() as slot, self._current():
            self._reserving(lambda: slot.reserve(image.nbytes, 0), f"{image.shape[0]}×{image.shape[1]}")
            slot.put(image)
            with self._submit, self._recovering(slot):
                found = np.empty(self._run(slot, image, padded), self.network.score_type)
                self._cuda.memcpy_dtoh_async(found, self.network.scores.pointer, self.network.stream)
                self.network.stream.synchronize()
            self._keep_cache()
            return usable(found.astype(np.float32, copy=False), self.card, self.upsampling.mode == "linear")

    def _run(self, slot: Slot, image: Image, padded: tuple[int, int]) -> tuple[int, int, int]:
        """Queue the upload, the preparation and the network; returns (K, h, w) of the scores."""
        network, profiles = self.network, self.gpu.profiles
        candidates = profiles_for(padded, profiles)
        if not candidates:
            raise outside_profiles(padded, profiles, self.source)
        # Where memory is short, the profile that takes least is tried after the one that suits best.
        least = min(candidates, key=lambda index: profiles[index].bytes or 0)
        profile = candidates[0]
        try:
            shape = network.reserve(profile, padded)
        except self._cuda.MemoryError:
            self._trim()
            profile = least
            try:
                shape = network.reserve(profile, padded)
            except self._cuda.MemoryError as error:
                self._trim()
                needed = network.memory_at(profile, padded)
                raise self._out_of_memory(f"{padded[0]}×{padded[1]} (padded)", needed) from error
        slot.upload(image.nbytes, network.stream)
        height, width = size_of(image)
        channels = self.card.channels
        self._prepare_kernel.prepared_async_call(
            _grid(*padded), BLOCK, network.stream,
            int(slot.image.pointer), int(network.input.pointer),
            int(self._factors.pointer), int(self._factors.pointer) + 4 * channels,
            channels, height, width, *padded,
        )  # fmt: skip
        network.enqueue(profile, padded)
        return shape.scores

    def _label(self, slot: Slot, scores: tuple[int, int, int], padded: tuple[int, int], size: tuple[int, int]) -> None:
        """Queue the kernel that makes labels of the scores."""
        upsampling, card = self.upsampling, self.card
        classes, rows, columns = scores
        factor = upsampling.factor or (padded[0] / rows, padded[1] / columns)
        full = padded if upsampling.factor is None else (int(rows * factor[0]), int(columns * factor[1]))
        start, entries, stream = int(slot.places.pointer), sum(size), self.network.stream
        places = [start + 4 * index * entries for index in range(3)]
        if slot.placed != (scores, padded, size):
            slot.placed = None
            self._positions_kernel.prepared_async_call(
                (-(-entries // THREADS), 1), (THREADS, 1, 1), stream,
                *places, rows, columns, *full, *factor, *size, *_codes(upsampling),
            )  # fmt: skip
            slot.placed = (scores, padded, size)
        single = card.activation != "softmax"
        self._label_kernel.prepared_async_call(
            _grid(*size), BLOCK, stream,
            int(self.network.scores.pointer), int(slot.labels.pointer), *places, classes, rows, columns, *size,
            int(upsampling.mode == "linear"), int(single), card.score_threshold if single else 0.0,
        )  # fmt: skip

    # Slots, errors and memory

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
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
    def _recovering(self, slot: Slot, submitted: bool = False) -> Iterator[None]:
        """After an error nothing of the call is in flight; where the GPU itself has failed, all later ones say so.

        `submitted`: all of it is queued, so that the slot's stream ends after what the network's does for it.
        """
        try:
            yield
        except BaseException as error:
            try:
                if not submitted:
                    self.network.settle()
                slot.stream.synchronize()
            except self._cuda.Error as failure:
                self._broken = (
                    f"the GPU failed while it ran {self.source} ({one_line(failure, 200)}); it cannot be used in this "
                    "process any more: start a new one, and run verify-engine there"
                )
                raise DeployError(self._broken) from error
            if isinstance(error, self._cuda.Error):
                raise DeployError(
                    f"{self.source}: CUDA refused a call: {one_line(error, 200)}; please report this"
                ) from error
            raise

    def _reserving(self, reserve: Callable[[], None], what: str) -> None:
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

    def _trim(self) -> None:
        # A slot that is taken from now on waits for us before it allocates.
        self.network.trim([buffer for slot in self._free for buffer in (slot.image, slot.labels)])

    def _out_of_memory(self, what: str, needed: int = 0) -> OverBudgetError:
        free, total = self._cuda.mem_get_info()
        wants = f"{needed / 1e9:.2f} GB more" if needed else "more"
        return OverBudgetError(
            f"an image of {what} needs {wants} of the GPU's memory, and {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
            "free; close what else uses the GPU, or label the image in parts"
        )


def _codes(upsampling: Upsampling) -> tuple[int, int, int]:
    """An upsampling as kernels.cu counts it: the order of the enumerations there is that of these tuples."""
    return (
        MODES.index(upsampling.mode),
        COORDINATES.index(upsampling.coordinates),
        ROUNDINGS.index(upsampling.rounding),
    )


def _grid(height: int, width: int) -> tuple[int, int]:
    return -(-width // BLOCK[0]), -(-height // BLOCK[1])

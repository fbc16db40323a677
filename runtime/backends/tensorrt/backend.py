"""TensorRTBackend: a core on an NVIDIA GPU, with our kernels before and after it.

Images go up as they are (one copy), a kernel prepares them, the network runs, kernels make labels of its scores, and
these come down (one copy). Two lanes do so at once where memory allows, each with a stream and memory of its own, so
that copies and kernels of one overlap with those of the other; where memory is short, one lane has all of it for a
while.

Streams are non-blocking, and only these are waited for, never the whole context: another Segmenter, or PyTorch, may use
the GPU in the same process, and capture graphs there.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import numpy as np

from ...arrays import AnyArray, Floats, Image, Labels, size_of
from ...engine_format.manifest import Manifest
from ...errors import DeployError, MisuseError, OverBudgetError, one_line
from ...head.heads import Heads
from ...pixels.prepare import padded_size
from ...planning.profiles import outside_profiles, profiles_for
from .cuda_graphs import beside_other_captures
from .device import cache_path, load_kernels, open_device, open_driver, open_library
from .device_network import DeviceNetwork
from .kernels import Kernels
from .lane import GRAPHS, MOST_PIXELS, RUNS, Batch, Lane

LANES = 2

R = TypeVar("R")


class TensorRTBackend:
    """A plan and its kernels on one GPU.

    Args:
        manifest: of the engine; says which library, version and GPUs the plan is for. Checked before anything loads.
        plan: serialised.
        kernels: name → code of the members that runtime.backends names.
        device: index of the GPU.
        source: names the engine in errors.
        graphs: CUDA graphs kept at most by each lane; 0: none.
        heads: whose scores the plan gives; None: of one output. Results of several are made on the CPU.

    Attributes:
        batches: whether a profile takes several images at once.
        lanes: through the GPU.

    Thread-safe: calls from many threads share the GPU, two at a time.

    Raises:
        DeployError: no driver or GPU, a package that is missing, or a plan for another GPU or version.
    """

    first_runs = LANES * RUNS
    streams = 1

    def __init__(
        self,
        manifest: Manifest,
        plan: bytes,
        kernels: Mapping[str, bytes],
        device: int = 0,
        source: str = "the engine",
        graphs: int = GRAPHS,
        heads: Heads | None = None,
    ) -> None:
        gpu = manifest.gpu
        if gpu is None:
            raise DeployError(f"{source} has no GPU plan of this release; build it again with build-engine")
        self._heads = heads or Heads(manifest.card, manifest.upsampling, (), None, source)
        self.card, self.upsampling, self.source, self.gpu = self._heads.card, self._heads.upsampling, source, gpu
        self.batches = any(profile.batch > 1 for profile in gpu.profiles)
        self._closed = False
        self._broken: str | None = None
        self._cuda = cuda = open_driver(source, gpu.targets)
        self._device = open_device(cuda, device, gpu, source)
        trt = open_library(cuda, gpu, source)
        self.name = f"{gpu.library} {trt.__version__}"
        self._context = self._device.retain_primary_context()
        self.lanes: list[Lane] = []
        self._kernels: Kernels | None = None
        self._network: DeviceNetwork | None = None
        try:
            with self._current():
                try:
                    cache = cache_path(plan, self._device)
                    self._network = network = DeviceNetwork(cuda, trt, gpu, self.card.channels, plan, cache, source)
                    module = load_kernels(cuda, kernels, self._device, source)
                    types = network.input_type, network.score_type
                    self._kernels = Kernels(cuda, module, self.card, self.upsampling, types, source)
                    self.lanes = [Lane(cuda, network, self._kernels, graphs) for _ in range(LANES)]
                except BaseException as error:
                    self._release()
                    if isinstance(error, cuda.MemoryError):
                        raise self._out_of_memory("any size") from error
                    raise
        except BaseException:
            self._context.detach()
            raise
        self._free = list(self.lanes)
        self._turn, self._freed = threading.Lock(), threading.Condition()
        self._wanted = threading.local()  # the lane that this thread warms up

    @property
    def network(self) -> DeviceNetwork:
        """The core on the GPU. Raises MisuseError once it is closed."""
        if self._network is None:
            raise MisuseError(f"{self.source} is closed; open it again")
        return self._network

    def release(self) -> None:
        """As `Backend` says: on a GPU nothing, as its memory is sized by the profiles."""

    def warming(self) -> Iterator[None]:
        """As `Backend` says: each lane captures graphs of its own."""
        try:
            for lane in self.lanes:
                self._wanted.lane = lane
                for _ in range(RUNS):
                    yield
        finally:
            self._wanted.lane = None

    def close(self) -> None:
        """Wait for the calls that run, then release all of the GPU's memory. Calls afterwards raise MisuseError."""
        with self._freed:
            if self._closed:
                return
            self._closed = True
            self._freed.notify_all()
            while len(self._free) < len(self.lanes):
                self._freed.wait()
        with self._current():
            if self._broken is None:
                self.network.save_cache()
            self._release()
        self._context.detach()

    def _keep_cache(self) -> None:
        """Store what was compiled for the first run of a profile: a process that is killed never closes."""
        network = self.network
        if network.unsaved:
            with network.lock:
                network.save_cache()

    def _release(self) -> None:
        """Give everything back. Where the GPU has failed, its driver refuses; it is freed with the process then."""
        for lane in self.lanes:
            with suppress(Exception):
                lane.settle()
            lane.release()
        if self._kernels is not None:
            self._kernels.release()
        if self._network is not None:
            self._network.release()
        self._network, self._kernels, self.lanes, self._free = None, None, [], []

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

    def labels(self, images: Sequence[Image]) -> list[Labels]:
        """As `Backend` says; OverBudgetError also where no profile holds the size."""
        if self._heads.names:  # our kernels make labels of all scores that there are
            return self._heads.labels(self.scores(images), [size_of(image) for image in images])
        return [labels for part in self._parts(images) for labels in self._run(part, self._labels_of)]

    def scores(self, images: Sequence[Image]) -> Floats:
        """As `Backend` says; OverBudgetError also where no profile holds the size."""
        found = [self._run(part, self._scores_of) for part in self._parts(images)]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def run_stage(self, index: int, part: AnyArray) -> AnyArray:
        """As `Backend` says; a plan is one stage."""
        assert index == 0, "checked where engines are opened"
        found: AnyArray = self.scores([part])[0]
        return found

    def _profiles(self, images: Sequence[Image]) -> tuple[tuple[int, int], list[int]]:
        """The padded size of images, and the profiles that hold it, the best first. Raises OverBudgetError."""
        padded, profiles = padded_size(*size_of(images[0]), self.card), self.gpu.profiles
        candidates = profiles_for(padded, profiles)
        if not candidates or padded[0] * padded[1] > MOST_PIXELS:
            raise outside_profiles(padded, profiles, self.source)
        return padded, candidates

    def _parts(self, images: Sequence[Image]) -> list[Sequence[Image]]:
        """As many at once as the profile takes."""
        most = self.gpu.profiles[self._profiles(images)[1][0]].batch
        return [images[start : start + most] for start in range(0, len(images), most)]

    def _run(self, images: Sequence[Image], work: Callable[[Lane, Batch, Sequence[Image]], R]) -> R:
        """What `work` makes of images in a lane that has the memory for them."""
        padded, candidates = self._profiles(images)
        with self._current():
            with self._taking(1) as lanes, self._recovering(lanes[0]):
                result = self._try(lanes[0], Batch(candidates[0], len(images), padded), images, work)
            if result is None:
                # With all that the other lane holds, and at last by the profile that takes least.
                profiles = self.gpu.profiles
                fitting = [index for index in candidates if profiles[index].batch >= len(images)]
                least = min(fitting, key=lambda index: profiles[index].bytes or 0)
                with self._taking(LANES) as lanes, self._recovering(lanes[0]):
                    for index in dict.fromkeys((candidates[0], least)):
                        for lane in lanes[1:] if result is None else ():
                            lane.trim()
                        batch = Batch(index, len(images), padded)
                        result = result or self._try(lanes[0], batch, images, work)
                    if result is None:
                        raise self._out_of_memory(f"{padded[0]}×{padded[1]} (padded)", lanes[0].needs(batch).memory)
            self._keep_cache()
            return result[0]

    def _try(
        self, lane: Lane, batch: Batch, images: Sequence[Image], work: Callable[[Lane, Batch, Sequence[Image]], R]
    ) -> tuple[R] | None:
        """`work`, in a tuple; None where the lane lacks memory: it holds none then, as others may lack it."""
        for _ in range(2):  # what is held for other sizes may be in the way
            try:
                lane.reserve(batch)
            except self._cuda.MemoryError:
                lane.trim()
            else:
                return (work(lane, batch, images),)
        return None

    def _labels_of(self, lane: Lane, batch: Batch, images: Sequence[Image]) -> list[Labels]:
        lane.put(batch, images)
        lane.labels(batch)
        lane.wait()
        dtype = self.card.label_dtype
        return [lane.taken(batch, index, size_of(image), dtype) for index, image in enumerate(images)]

    def _scores_of(self, lane: Lane, batch: Batch, images: Sequence[Image]) -> Floats:
        lane.put(batch, images)
        found = np.empty((batch.count, *lane.score(batch)), self.network.score_type)
        self._cuda.memcpy_dtoh_async(found, lane.scores.pointer, lane.stream)
        lane.stream.synchronize()
        return self._heads.usable(found.astype(np.float32, copy=False), self.upsampling.mode == "linear")

    # Lanes, errors and memory

    @contextmanager
    def _taking(self, count: int) -> Iterator[list[Lane]]:
        """So many lanes, those that hold most memory first."""
        # One thread at a time: two that want all would each wait for the other's.
        with self._turn, self._freed:
            while len(self._free) < count and not self._closed:
                self._freed.wait()
            if self._closed:
                raise MisuseError(f"{self.source} is closed; open it again")
            if self._broken is not None:
                raise DeployError(self._broken)
            wanted = getattr(self._wanted, "lane", None)
            self._free.sort(key=lambda lane: (lane is wanted, lane.held), reverse=True)
            taken, self._free = self._free[:count], self._free[count:]
        try:
            yield taken
        finally:
            with self._freed:
                self._free += taken
                self._freed.notify_all()

    @contextmanager
    def _recovering(self, lane: Lane) -> Iterator[None]:
        """After an error nothing of the call is in flight; where the GPU itself has failed, all later ones say so."""
        try:
            yield
        except BaseException as error:
            try:
                lane.settle()
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

    def _out_of_memory(self, what: str, needed: int = 0) -> OverBudgetError:
        free, total = self._cuda.mem_get_info()
        wants = f"{needed / 1e9:.2f} GB more" if needed else "more"
        return OverBudgetError(
            f"an image of {what} needs {wants} of the GPU's memory, and {free / 1e9:.2f} of {total / 1e9:.2f} GB are "
            "free; close what else uses the GPU, or label the image in parts"
        )

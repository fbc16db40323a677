"""Streams: decoding, inference and writing overlapped, in order, in bounded memory.

A job takes an item all the way (reads it, labels it, writes it) in one of a few threads; the caller's thread reads
the items and hands out the results. What computes for long releases Python's lock: decoders, the network, NumPy.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from .arrays import AnyArray, Image, size_of
from .errors import DeployError, MisuseError, brief, one_line
from .network import Network
from .pixels.no_data import filled
from .pixels.prepare import padded_size
from .planning.batch_cost import BatchCost
from .planning.plan import Plan

if TYPE_CHECKING:
    from .reuse import Frame, Reuse

T = TypeVar("T")
R = TypeVar("R")

CALLERS = 2  # images in the network at once: while one is prepared or labelled, the other has the cores
AHEAD = 32  # items in flight at most
FRAMES_AHEAD = 8  # of a camera, of which each has a copy in flight
TOGETHER = 8  # images of a batch
BATCH_PIXELS = 1 << 16  # of one padded image, at most: no larger one was faster in a batch (docs/results/speed.md)
PIXELS_AHEAD = 1 << 26  # in flight at most, where memory allows them
SHARE_AHEAD = 1 / 8  # of the memory budget, for what is in flight outside the network


@dataclass
class _Flying(Generic[R]):
    """An item in flight.

    Attributes:
        item: until it is in work.
        pixels: that it counts for.
        job: that works on it, once one does.
        place: of the item in its job.
    """

    item: Any  # T, or None
    pixels: int
    job: Future[Sequence[R]] | None = None
    place: int = 0

    def result(self) -> R:
        assert self.job is not None, "every item in flight has been submitted when results are asked for"
        return self.job.result()[self.place]


def overlapped(
    items: Iterable[T],
    work: Callable[[list[T]], Sequence[R]],
    *,
    workers: int,
    pixels: Callable[[T], int],
    most: int,
    alike: Callable[[T], Hashable | None] = lambda item: None,
    ahead: int = AHEAD,
) -> Generator[R, None, None]:
    """What `work` makes of each item, in the items' order, while `workers` threads work on those that follow.

    An item is given to a thread when it is read; one that is alike to others, with them, when `ahead` are in flight.
    As `Executor.map` with a `buffersize` (Python 3.14), with a bound on pixels too, and groups.

    Args:
        items: read in the caller's thread when it asks for a result, with up to `ahead` of them in flight.
        work: takes a list of items and gives a result for each. Called in a thread.
        workers: threads.
        pixels: of an item: what it takes from being read until its result is handed out.
        most: sum of these in flight; an item beyond it is in flight alone.
        alike: items of equal keys that wait at once are given to `work` together, 8 at most; None: alone.

    Raises:
        Whatever `work` or `items` raises, after the results before it. An iterator that is closed or dropped, or whose
        caller is interrupted, starts nothing more and ends when the jobs that run have ended.
    """
    source = iter(items)
    held: list[_Flying[R]] = []  # read, and too large to be in flight with the others
    flying: deque[_Flying[R]] = deque()
    ended: Exception | None = None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fcn-deploy")

    def submit(group: list[_Flying[R]]) -> None:
        job = pool.submit(work, [each.item for each in group])
        for place, each in enumerate(group):
            each.item, each.job, each.place = None, job, place

    def read_ahead() -> Exception | None:
        """Read and submit what may be in flight beside the rest; what ended the items, StopIteration too."""
        groups: dict[Hashable, list[_Flying[R]]] = {}  # that may grow yet
        weight, ended = sum(each.pixels for each in flying), None
        while len(flying) < ahead:
            if held:
                each = held.pop()
            else:
                try:
                    item = next(source)
                except Exception as error:
                    ended = error
                    break
                each = _Flying(item, pixels(item))
            if flying and weight + each.pixels > most:
                held.append(each)
                break
            weight += each.pixels
            flying.append(each)
            key = alike(each.item)
            group = [] if key is None else groups.setdefault(key, [])
            group.append(each)
            if key is None or len(group) == TOGETHER:
                submit(group)
                groups.pop(key, None)
        for group in groups.values():
            submit(group)
        return ended

    try:
        while True:
            # By halves, so that items which are alike wait at once.
            if ended is None and len(flying) <= ahead // 2:
                ended = read_ahead()
            if not flying:
                break
            yield flying[0].result()
            flying.popleft()
        if ended is not None and not isinstance(ended, StopIteration):
            raise ended
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class Labelled:
    """What became of an image.

    Attributes:
        outcome: its results, one of each kind that the stream makes; or the exception that says why there are none.
        plan: how it was run; None where it was refused before.
        seconds: in the network's turn, preparation and upsampling included; an equal share of a batch.
    """

    outcome: tuple[AnyArray, ...] | Exception
    plan: Plan | None
    seconds: float


class Stream:
    """A network as a stream uses it: by two images at once, or by one that takes most of the memory.

    Args:
        network: that may be in use elsewhere, too.
        kinds: of results that it makes of each image.
        reuse: frames of videos keep what equals the frame before. MisuseError where the network is not for that.

    Attributes:
        pixels: that may be in flight, by the memory budget.
    """

    def __init__(self, network: Network, kinds: Sequence[str] = ("labels",), reuse: bool = False) -> None:
        self.network, self.kinds, self.reuse = network, tuple(kinds), reuse
        if reuse:
            from .reuse import Reuse

            Reuse(network)
        self._slots = threading.Semaphore(CALLERS)
        self._turn = threading.Lock()
        memory = network.memory_budget()
        # An image, what its decoder keeps beside it, and its results.
        each = 2 * network.card.channels * np.dtype(network.card.dtype).itemsize
        each += sum(network.result_bytes(kind) for kind in self.kinds)
        self.pixels = min(PIXELS_AHEAD, int(memory * SHARE_AHEAD / each))
        self._shared = memory * (1 - SHARE_AHEAD) / CALLERS  # bytes of a run that has another beside it

    def outcomes(self, images: Iterable[Image], return_exceptions: bool) -> Iterator[AnyArray | Exception]:
        """The first of `kinds` of each image, in order; what went wrong is raised in its turn, or given."""
        results = overlapped(
            images,
            lambda group: [each.outcome for each in self.label(group)],
            workers=CALLERS,
            # What is no image is refused in its turn.
            pixels=lambda image: image.size if isinstance(image, np.ndarray) else 0,
            most=self.pixels * self.network.card.channels,
            alike=lambda i: self.alike(i.shape[:2]) if isinstance(i, np.ndarray) and i.ndim > 1 else None,
        )
        return _raised(results, return_exceptions)

    def reused(self, images: Iterable[Image], return_exceptions: bool) -> Iterator[AnyArray | Exception]:
        """`outcomes` of the labels of a fixed camera's frames. Raises MisuseError where the network is not local."""
        from .reuse import Frame, Reuse

        reuse = Reuse(self.network)

        def followed() -> Iterator[Frame | Exception]:
            for image in images:
                try:
                    yield reuse.follow(image)
                except Exception as error:  # in its turn
                    yield error

        def work(group: list[Frame | Exception]) -> list[tuple[AnyArray, ...] | Exception]:
            return [each if isinstance(each, Exception) else self.of_frame(reuse, each).outcome for each in group]

        results = overlapped(
            followed(), work, workers=CALLERS,
            pixels=lambda frame: math.prod(frame.image.shape) if isinstance(frame, Frame) else 0,
            most=self.pixels * self.network.card.channels, ahead=FRAMES_AHEAD,
        )  # fmt: skip
        return _raised(results, return_exceptions)

    def of_frame(self, reuse: "Reuse", frame: "Frame") -> Labelled:
        """Labels of a frame, after those of the frame that it follows."""
        reuse.wait(frame)
        started = time.perf_counter()
        outcome: tuple[AnyArray, ...] | Exception
        try:
            with self._taking(self._slots_for(size_of(frame.image))):
                started = time.perf_counter()
                outcome = reuse.label(frame)
        except Exception as error:
            outcome = error
        finally:
            frame.done.set()  # whatever happened: the next one waits for it
        return Labelled(outcome, frame.plan, time.perf_counter() - started)

    def alike(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """The padded size of an image of (height, width) that is run with its equals where that pays, else None."""
        padded = padded_size(*size, self.network.card)
        if self.network.card.alone or not self.network.backend.batches:
            return None
        if padded[0] * padded[1] > BATCH_PIXELS or self._slots_for(padded, TOGETHER) > 1:
            return None
        cost = self.network.batch_costs.get(padded)
        return None if cost and cost.pays is False else padded

    def label(
        self,
        images: Sequence[Image],
        kinds: Sequence[str] | None = None,
        begins: Callable[[], None] = lambda: None,
    ) -> list[Labelled]:
        """Label images, in a batch where that pays. Called by many threads.

        Args:
            images: as for a Segmenter's call.
            kinds: of results, as `Network.check_outputs` has seen them; None: those of the stream.
            begins: called when the network is free for an image that is run alone; what it raises is the outcome then,
                and the image is not run.
        """
        kinds = self.kinds if kinds is None else tuple(kinds)
        try:
            batch = self._batch(images, kinds)
        except Exception:  # each is run alone then, and says what is wrong
            batch = None
        return batch or [self._one(image, kinds, begins) for image in images]

    def _one(self, image: Image, kinds: Sequence[str], begins: Callable[[], None]) -> Labelled:
        shape = np.shape(image)
        with self._taking(self._slots_for(shape[:2]) if len(shape) > 1 else 1):
            started = time.perf_counter()
            plan: Plan | None = None
            outcome: tuple[AnyArray, ...] | Exception
            try:
                begins()
                source = self.network.checked(image)
                # Planned here, where it has the memory that it would have alone.
                plan = self.network.plan(*size_of(source), kinds=kinds, source=source)
                outcome = self.network.run(source, plan, kinds)
            except Exception as error:
                outcome = error
            return Labelled(outcome, plan, time.perf_counter() - started)

    def _batch(self, given: Sequence[Image], kinds: Sequence[str]) -> list[Labelled] | None:
        """8 images of one padded size, where a batch pays or is to be measured; else None."""
        network = self.network
        if len(given) != TOGETHER:
            return None
        try:
            images = [network.checked(image)[:, :] for image in given]
        except MisuseError:
            return None  # each is run alone then, and says so
        sizes = {padded_size(*size_of(image), network.card) for image in images}
        padded = sizes.pop()
        if sizes or self.alike(padded) is None:
            return None
        with self._taking(1):
            plans = [network.plan(*size_of(image), kinds=kinds) for image in images]
            if any(plan.grids for plan in plans):
                return None
            cost = network.batch_costs.setdefault(padded, BatchCost(first=network.backend.first_runs - 1))
            if cost.equal is None:
                cost.equal = _same_scores(network, images)
            if cost.equal is False:
                return None
            # In turns until it is known, so that both meet the same company.
            together = cost.pays if cost.pays is not None else len(cost.together) < len(cost.alone)
            started = time.perf_counter()
            if together:
                results = network.run_batch(images, plans, kinds)
            else:
                results = [network.run(image, plan, kinds) for image, plan in zip(images, plans, strict=True)]
            seconds = (time.perf_counter() - started) / len(images)
            if cost.pays is None:
                (cost.together if together else cost.alone).append(seconds)
        return [Labelled(each, plan, seconds) for each, plan in zip(results, plans, strict=True)]

    def _slots_for(self, size: tuple[int, int], count: int = 1) -> int:
        """1, or all for what cannot share the memory budget. A GPU's memory is its backend's to share out."""
        if self.network.on_gpu:
            return 1
        height, width = padded_size(*size, self.network.card)
        return CALLERS if count * self.network.working_memory(height * width) > self._shared else 1

    @contextmanager
    def _taking(self, slots: int) -> Iterator[None]:
        # One thread at a time: two that want all would each wait for the other's half.
        with self._turn:
            for _ in range(slots):
                self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release(slots)


def _raised(
    results: Generator[tuple[AnyArray, ...] | Exception, None, None], return_exceptions: bool
) -> Iterator[AnyArray | Exception]:
    """The first result of each image; what went wrong is raised in its turn, or given."""
    with closing(results):
        for outcome in results:
            if isinstance(outcome, Exception) and not return_exceptions:
                raise outcome
            yield outcome if isinstance(outcome, Exception) else outcome[0]


def _same_scores(network: Network, images: Sequence[Image]) -> bool:
    """Whether a batch gives what single runs give, bit for bit."""
    scores = network.backend.scores
    images = [filled(image, network.card)[0] for image in images]
    try:
        return all(np.array_equal(scores([i])[0], s) for i, s in zip(images, scores(images), strict=True))
    except Exception:  # a model of a fixed batch
        return False


def said(error: Exception, source: object) -> str:
    """What a record says of an error, in one line that names the image."""
    text = one_line(error)
    if not isinstance(error, DeployError):
        text = f"{type(error).__name__}: {text}"
    return text if PurePath(str(source)).name in text else brief(f"{source}: {text}")


def describe_plan(plan: Plan) -> dict[str, Any]:
    """A plan as records have it."""
    return {
        "padded": list(plan.padded),
        "bytes": plan.bytes,
        "profile": plan.profile,
        "stages": [{"tile": list(grid.tile), "halo": list(grid.halo), "tiles": grid.count} for grid in plan.grids],
        "overhead": round(plan.overhead, 3),
        "passes": len(plan.passes),
    }

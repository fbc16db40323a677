"""Streams: decoding, inference and writing overlapped, in order, in bounded memory.

A job takes an item all the way (reads it, labels it, writes it) in one of a few threads; the caller's thread reads
the items and hands out the results. What computes for long releases Python's lock: decoders, the network, NumPy.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .errors import DeployError, MisuseError
from .plan import Plan
from .prepare import check_image, padded_size
from .upsampling import result_bytes

if TYPE_CHECKING:
    from .segmenter import Segmenter

T = TypeVar("T")
R = TypeVar("R")

CALLERS = 2  # images in the network at once: while one is prepared or labelled, the other has the cores
AHEAD = 32  # items in flight at most
TOGETHER = 8  # images of a batch
BATCH_PIXELS = 1 << 16  # of one padded image, at most: no larger one was faster in a batch (docs/results.md)
ROUNDS = 3  # timed runs of each kind, before a size is run in batches or not
PIXELS_AHEAD = 1 << 26  # in flight at most, where memory allows them
SHARE_AHEAD = 1 / 8  # of the memory budget, for what is in flight outside the network


@dataclass
class _Flying:
    """An item in flight."""

    item: object
    pixels: int
    job: Future | None = None
    place: int = 0  # of the item in its job


def overlapped(
    items: Iterable[T],
    work: Callable[[list[T]], Sequence[R]],
    *,
    workers: int,
    pixels: Callable[[T], int],
    most: int,
    alike: Callable[[T], Hashable | None] = lambda item: None,
) -> Iterator[R]:
    """What `work` makes of each item, in the items' order, while `workers` threads work on those that follow.

    An item is given to a thread when it is read; one that is alike to others, with them, when 32 are in flight.
    As `Executor.map` with a `buffersize` (Python 3.14), with a bound on pixels too, and groups.

    Args:
        items: read in the caller's thread when it asks for a result, up to 32 ahead.
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
    held: list[_Flying] = []  # read, and too large to be in flight with the others
    flying: deque[_Flying] = deque()
    groups: dict[Hashable, list[_Flying]] = {}  # that may grow yet
    ended: Exception | None = None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fcn-deploy")

    def submit(group: list[_Flying]) -> None:
        job = pool.submit(work, [each.item for each in group])
        for place, each in enumerate(group):
            each.item, each.job, each.place = None, job, place

    try:
        while True:
            # By halves, so that items which are alike wait at once.
            if ended is None and len(flying) <= AHEAD // 2:
                weight = sum(each.pixels for each in flying)
                while len(flying) < AHEAD:
                    try:
                        item = None if held else next(source)
                    except Exception as error:  # StopIteration too
                        ended = error
                        break
                    each = held.pop() if held else _Flying(item, pixels(item))
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
                groups.clear()
            if not flying:
                break
            yield flying[0].job.result()[flying[0].place]
            flying.popleft()
        if not isinstance(ended, StopIteration):
            raise ended
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class Cost:
    """What runs of one padded size took, in seconds an image.

    Attributes:
        alone, together: one after the other, and in batches of 8.
        equal: whether the scores of a batch are those of single runs, bit for bit; None: not compared yet.
    """

    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    equal: bool | None = None

    @property
    def pays(self) -> bool | None:
        """Whether batches are the faster, by medians; None: not known yet."""
        if self.equal is False:
            return False
        if min(len(self.alone), len(self.together)) < ROUNDS:
            return None
        return bool(np.median(self.together) < np.median(self.alone))


@dataclass(frozen=True)
class Labelled:
    """What became of an image.

    Attributes:
        outcome: its results, one of each kind that the stream makes; or the exception that says why there are none.
        plan: how it was run; None where it was refused before.
        seconds: in the network's turn, preparation and head included; an equal share of a batch.
    """

    outcome: tuple[np.ndarray, ...] | Exception
    plan: Plan | None
    seconds: float


class Stream:
    """A Segmenter's network as a stream uses it: by two images at once, or by one that takes most of the memory.

    Attributes:
        kinds: of results that it makes of each image.
        pixels: that may be in flight, by the memory budget.
    """

    def __init__(self, net: "Segmenter", kinds: Sequence[str] = ("labels",)) -> None:
        self.net, self.kinds = net, tuple(kinds)
        self._slots = threading.Semaphore(CALLERS)
        self._turn = threading.Lock()
        memory = net.memory_budget()
        # An image, what its decoder keeps beside it, and its results.
        each = 2 * net.card.channels * np.dtype(net.card.dtype).itemsize
        each += sum(result_bytes(kind, net.card) for kind in self.kinds)
        self.pixels = min(PIXELS_AHEAD, int(memory * SHARE_AHEAD / each))
        self._shared = memory * (1 - SHARE_AHEAD) / CALLERS  # bytes of a run that has another beside it

    def alike(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """The padded size of an image of (height, width) that is run with its equals where that pays, else None."""
        padded = padded_size(*size, self.net.card)
        if padded[0] * padded[1] > BATCH_PIXELS or self._slots_for(padded, TOGETHER) > 1 or not self.net.can_batch:
            return None
        cost = self.net.costs.get(padded)
        return None if cost and cost.pays is False else padded

    def label(self, images: Sequence[np.ndarray]) -> list[Labelled]:
        """Label images, in a batch where that pays. Called by many threads."""
        try:
            batch = self._batch(images)
        except Exception:  # each is run alone then, and says what is wrong
            batch = None
        return batch or [self._one(image) for image in images]

    def _one(self, image: np.ndarray) -> Labelled:
        shape = np.shape(image)
        with self._taking(self._slots_for(shape[:2]) if len(shape) > 1 else 1):
            started = time.perf_counter()
            plan = None
            try:
                image = check_image(image, self.net.card)
                # Planned here, where it has the memory that it would have alone.
                plan = self.net.plan(*image.shape[:2], kinds=self.kinds)
                outcome = self.net.run(image, plan, self.kinds)
            except Exception as error:
                outcome = error
            return Labelled(outcome, plan, time.perf_counter() - started)

    def _batch(self, images: Sequence[np.ndarray]) -> list[Labelled] | None:
        """8 images of one padded size, where a batch pays or is to be measured; else None."""
        net = self.net
        if len(images) != TOGETHER:
            return None
        try:
            images = [check_image(image, net.card) for image in images]
        except MisuseError:
            return None  # each is run alone then, and says so
        sizes = {padded_size(*image.shape[:2], net.card) for image in images}
        padded = sizes.pop()
        if sizes or self.alike(padded) is None:
            return None
        with self._taking(1):
            plans = [net.plan(*image.shape[:2], kinds=self.kinds) for image in images]
            if any(plan.grids for plan in plans):
                return None
            cost = net.costs.setdefault(padded, Cost())
            if cost.equal is None:
                cost.equal = _same_scores(net, images)
            if cost.equal is False:
                return None
            # In turns until it is known, so that both meet the same company.
            together = cost.pays if cost.pays is not None else len(cost.together) < len(cost.alone)
            started = time.perf_counter()
            if together:
                results = net.run_batch(images, plans, self.kinds)
            else:
                results = [net.run(image, plan, self.kinds) for image, plan in zip(images, plans, strict=True)]
            seconds = (time.perf_counter() - started) / len(images)
            if cost.pays is None:
                (cost.together if together else cost.alone).append(seconds)
        return [Labelled(each, plan, seconds) for each, plan in zip(results, plans, strict=True)]

    def _slots_for(self, size: tuple[int, int], count: int = 1) -> int:
        """1, or all for what cannot share the memory budget. A GPU's memory is its backend's to share out."""
        if not self.net.can_batch:
            return 1
        height, width = padded_size(*size, self.net.card)
        return CALLERS if count * height * width * self.net.bytes_per_pixel > self._shared else 1

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


def _same_scores(net: "Segmenter", images: Sequence[np.ndarray]) -> bool:
    """Whether a batch gives what single runs give, bit for bit."""
    try:
        together = net.scores_of_batch(images)
        return all(np.array_equal(net.scores_of_batch([i])[0], s) for i, s in zip(images, together, strict=True))
    except Exception:  # a model of a fixed batch
        return False


def said(error: Exception, source: object) -> str:
    """What a record says of an error, in one line."""
    text = str(error) if isinstance(error, DeployError) else f"{source}: {type(error).__name__}: {error}"
    return " ".join(text.split())


def describe_plan(plan: Plan) -> dict:
    """A plan as records have it."""
    return {
        "padded": list(plan.padded),
        "bytes": plan.bytes,
        "profile": plan.profile,
        "stages": [{"tile": list(grid.tile), "halo": list(grid.halo), "tiles": grid.count} for grid in plan.grids],
        "overhead": round(plan.overhead, 3),
    }

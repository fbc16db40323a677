"""The working memory of one network: which runs may go on together, and what its backend keeps between them."""

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

KEPT = 64_000_000  # bytes that are kept whatever the usual run takes
USUAL = ((30, 4.0), (64, 2.0))  # so many last runs tell what is usual, and so many times the most of them is kept
STEADY_RUNS, STEADY_KEPT = 16, 16_000_000  # runs of about one size, and what is kept whatever they take
ABOUT = 1.1  # times the least of them
MOST_SHAPES = 64  # times the largest run's memory, all shapes together: they come to far less in truth
GROWTH = 1.5  # times what runs took when memory was last given back, beyond which it is given back again


class WorkingMemory:
    """Admits the runs of a network by the bytes that they take, and has its backend give back what they do not need.

    Backends keep what a run took for the next: fresh pages would cost a large image up to half of its time. What runs
    of many shapes took would add up, though, as one finds no room in what another left. So it is given back before a
    run that takes half again what the first one after the last time took, or of a new shape with which all that were
    run might come to more than the budget; and once a while has gone by without a run that needed half of it, or half
    as long without one that needed a quarter. Not for less: images of mixed sizes would pay for it by a tenth of their
    time (docs/results/tried.md). Images of about one size have what they do not need given back sooner. A network
    that begins with a large run has it done before that one, too: ONNX Runtime never gives back the first memory that
    it took, so that be little.

    Args:
        release: has the backend give back what no run uses.
        resident: tells the bytes that the process holds, or None; for a backend whose memory they are.

    Attributes:
        held: bytes that the backend keeps, by the plans of the runs that took them.
    """

    def __init__(self, release: Callable[[], None], resident: Callable[[], int | None] = lambda: None) -> None:
        self._release, self._resident = release, resident
        self._empty: int | None = None  # bytes that the process held without what runs take
        self.held = 0
        self._ran = False
        self._taken = 0  # bytes, by the runs that go on
        self._least = 0  # bytes that the first run since the last release took
        self._shapes: dict[Hashable, int] = {}  # that were run since the last release, and the bytes they took
        self._all_shapes = 0  # bytes, their sum
        self._limit = 0  # bytes, the budget when it was last asked for
        self._usual: deque[int] = deque(maxlen=USUAL[-1][0])
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def taking(self, needed: int, shape: Hashable, budget: Callable[[], int], keeps: bool = True) -> Iterator[None]:
        """Run something that takes `needed` bytes: alone, or beside others while all of them are within the budget.

        Those that wait come in their order.

        Args:
            needed: by its plan.
            shape: of all that the network is run on; runs of equal shapes find room in what the first of them took.
            budget: tells the bytes that all runs together may take; asked where others run and it matters.
            keeps: whether the backend keeps what it takes; else it is given back by itself.
        """
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self._fits(needed, budget))
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
            if self._empty is None:
                self._empty = self._resident()
            self._taken += needed
            together = self._taken
            first, self._ran = not self._ran, True
            grows = together > max(self.held, GROWTH * self._least) and self.held >= KEPT
            grows = grows or (first and together > KEPT)
            grows = grows or self._fragments(needed, shape, budget)
            if grows:
                self._forget()
            if keeps and shape not in self._shapes:
                self._shapes[shape] = needed
                self._all_shapes += needed
        try:
            if grows:
                self._give_back(needed)
            yield
        finally:
            with self._changed:
                self._taken -= needed
                self._changed.notify_all()
            if keeps:
                self.took(together)

    def took(self, needed: int) -> None:
        """A run has taken so many bytes; what is beyond the usual is given back."""
        with self._changed:
            self._least = self._least or needed
            self.held = max(self.held, needed)
            self._usual.append(needed)
            unusual = self._is_unusual() and not self._taken
            if unusual:
                self._forget()
        if unusual:
            self._give_back(0)

    def rest(self) -> None:
        """Give back all that the backend keeps, where no run goes on: for who knows that none will for a while."""
        with self._changed:
            resting = self.held > 0 and not self._taken
            if resting:
                self._forget()
        if resting:
            self._give_back(0)

    def _is_unusual(self) -> bool:
        """Whether more is held than the last runs show a need for."""
        runs = tuple(self._usual)
        last = runs[-STEADY_RUNS:]
        if len(last) == STEADY_RUNS and max(last) <= ABOUT * min(last):
            return self.held > max(STEADY_KEPT, ABOUT * max(last))
        return any(len(runs) >= count and self.held > max(KEPT, above * max(runs[-count:])) for count, above in USUAL)

    def _give_back(self, needed: int) -> None:
        """Before a run that takes `needed` bytes, or after one."""
        self._release()
        held = self._resident()
        with self._changed:
            self._empty = None if held is None else held - (self._taken - needed)

    def _fragments(self, needed: int, shape: Hashable, budget: Callable[[], int]) -> bool:
        """Whether what runs of other shapes left may be too much beside this one."""
        together = self._all_shapes + needed
        if shape in self._shapes or together <= KEPT:
            return False
        if together > self._limit:
            self._limit = budget()
        limit = min(self._limit, MOST_SHAPES * max(self.held, needed, KEPT))
        if together <= limit:
            return False
        # It might, by the sum of all shapes: mostly they find room in what others left.
        held = self._resident()
        return held is None or self._empty is None or held - self._empty + needed > limit

    def _forget(self) -> None:
        self.held = self._all_shapes = self._least = 0
        self._shapes.clear()

    def _fits(self, needed: int, budget: Callable[[], int]) -> bool:
        together = self._taken + needed
        return not self._taken or together <= self.held or together <= budget()

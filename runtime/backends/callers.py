"""The sessions of a network as its callers share them: on all threads alone, on half of the threads beside another.

Threads of one run wait for each other at the end of every layer. Where two images are in the network at once and a
third is read or written meanwhile, there are more threads than cores, and each layer waits for the last of them to have
had its turn. On half of the threads each takes less of the processors, and no core is idle (docs/results/speed.md).
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from ..arrays import AnyArray
from ..errors import DeployError
from . import Session

Opens = Callable[[], Sequence[Session] | None]
BESIDE_SECONDS = 0.5  # of runs beside others, before it is worth to open the sessions once more


class Callers:
    """Runs the sessions of a network's stages for callers in many threads.

    Args:
        sessions: of each stage, on all threads.
        halves: opens them on half of the threads, once; None, of it or of what it gives: there are no others. They are
            used if they give on one input what the others do, bit for bit.
    """

    def __init__(self, sessions: Sequence[Session], halves: Opens | None = None) -> None:
        self.sessions = tuple(sessions)
        self._halves: tuple[Session, ...] = ()
        self._opens, self._closed = halves, False
        self._lock = threading.Lock()
        self._images, self._spent = 0, 0.0  # in work now; seconds of runs beside others

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """An image is in work, also while it is prepared and labelled."""
        with self._lock:
            self._images += 1
        try:
            yield
        finally:
            with self._lock:
                self._images -= 1

    def run(self, given: AnyArray, stages: slice = slice(None)) -> AnyArray:
        """What some of the stages, one after the other, make of an input of the first of them."""
        beside, started = self._images > 1, time.perf_counter()
        result = _through((self._halves if beside else ()) or self.sessions, stages, given)
        if beside and self._opens is not None:
            self._consider(given, stages, result, time.perf_counter() - started)
        return result

    def _consider(self, given: AnyArray, stages: slice, result: AnyArray, seconds: float) -> None:
        """Open the halves, once runs beside others have taken so long, and compare them on what was run just now."""
        with self._lock:
            self._spent += seconds
            if self._spent < BESIDE_SECONDS or self._opens is None:
                return
            opens, self._opens = self._opens, None
        with suppress(DeployError):  # the engine's file is gone, or another, or memory is: it goes on as before
            halves = tuple(opens() or ())
            equal = bool(halves) and np.array_equal(_through(halves, stages, given), result)
            with self._lock:
                if equal and not self._closed:
                    self._halves, halves = halves, ()
            for session in halves:
                session.close()

    def release(self, smallest: AnyArray) -> None:
        """Have all sessions give back what runs took, by a run of the smallest input. Raises DeployError."""
        for sessions in filter(None, (self.sessions, self._halves)):
            part = smallest
            for session in sessions:
                part = session.release(part)

    def close(self) -> None:
        """Release the network. Running it afterwards raises MisuseError."""
        with self._lock:
            self._closed, self._opens = True, None
            halves, self._halves = self._halves, ()
        for session in (*self.sessions, *halves):
            session.close()


def _through(sessions: Sequence[Session], stages: slice, given: AnyArray) -> AnyArray:
    for session in sessions[stages]:
        given = session.run(given)
    return given

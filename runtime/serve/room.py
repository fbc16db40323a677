"""The engine room: what waits for a network, in a queue of bounded requests and bytes, and the lanes that run it.

There is no timer in it and no padding: a free lane takes the oldest job, and with it those of equal padded size where
the stream has measured that batches pay. It knows nothing of protocols.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..arrays import AnyArray, Image
from ..errors import DeployError
from ..process_memory import give_back_freed
from ..stream import CALLERS, TOGETHER, Stream

# Without a job, after which the memory that was kept for the next one is given back: to the first image after it fresh
# pages cost a third more of the processor's time.
REST_SECONDS = 30.0
RETRY_SECONDS = 1  # what a client that was refused is told to wait, at least


class RefusedError(DeployError):
    """A request that is not run.

    Attributes:
        reason: `queue`, `memory`, `stopping`: it may come again; `too_large`: it may not; `late`: its time is over.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def stopping() -> RefusedError:
    """What those are told who come too late."""
    return RefusedError("stopping", "the server is stopping; send the request to another one")


def bare(error: DeployError) -> DeployError:
    """An error that is told in one line, without the frames that it comes from.

    They hold the image, and would live as long as the error: in a cycle with it, until that is collected.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


@dataclass
class Done:
    """What became of a job that was run.

    Attributes:
        answer: what its `write` made of the results.
        seconds: spent in the parts of its way: `queue`, `read`, `infer` and `write`.
    """

    answer: Any
    seconds: dict[str, float]


@dataclass(eq=False)
class Job:
    """An image that is to be labelled.

    Attributes:
        stream: of the network.
        size: (height, width) of the image, in pixels.
        read: gives the image, [H, W, C]; called in a lane.
        kinds: of the results, which `Network.check_outputs` has seen.
        write: makes the answer of the results; called in a lane.
        deadline: by `time.monotonic`, after which it is not begun; None: there is none.
        pages: images in the file that it is of; one is read.
        future: of its outcome. Cancelling it drops a job that is not in the network yet.
    """

    stream: Stream
    size: tuple[int, int]
    read: Callable[[], Image]
    kinds: tuple[str, ...]
    write: Callable[[tuple[AnyArray, ...]], Any]
    deadline: float | None = None
    pages: int = 1
    future: "Future[Done]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def alike(self, other: "Job") -> bool:
        """Whether the two may be run in one batch."""
        mine = self.stream.alike(self.size)
        return (
            self.stream is other.stream
            and self.kinds == other.kinds
            and mine is not None
            and mine == other.stream.alike(other.size)
        )

    def check_wanted(self) -> None:
        """Raise RefusedError where nobody waits for it any more."""
        if self.future.cancelled():
            raise RefusedError("gone", "the client has gone")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise RefusedError(
                "late", "the request's time was over before it was run; allow more, or send fewer at once"
            )

    def begin(self) -> None:
        """From now on it cannot be dropped. Raises RefusedError where nobody waits for it any more."""
        self.check_wanted()
        if not self.future.set_running_or_notify_cancel():
            raise RefusedError("gone", "the client has gone")
        self.seconds["queue"] = time.perf_counter() - self.arrived - self.seconds.get("read", 0.0)

    def fail(self, error: BaseException) -> None:
        """End it with an error."""
        with suppress(InvalidStateError):  # dropped meanwhile
            self.future.set_exception(bare(error) if isinstance(error, DeployError) else error)


class Held:
    """What a request takes: a place in the queue, and bytes until its answer is sent. A context manager."""

    def __init__(self, room: "Room") -> None:
        self._room, self.bytes = room, 0
        self._inside = False

    def enter(self) -> None:
        """Take a place, before anything of the request is read. Raises RefusedError, `queue` or `stopping`."""
        self._room._enter()
        self._inside = True

    def leave(self) -> None:
        """Give the place back, once it is labelled or dropped."""
        if self._inside:
            self._inside = False
            self._room._leave()

    def more(self, count: int) -> None:
        """Take so many more bytes. Raises RefusedError, `memory` or `too_large`."""
        self._room._hold(self, count)

    def close(self) -> None:
        """Give everything back."""
        self.leave()
        self._room._hold(self, -self.bytes)

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Room:
    """Lanes that run jobs, the oldest first.

    Args:
        requests: that may wait, at most.
        bytes: that requests may hold: bodies, images and results outside the network.
        rest: gives back the memory that was kept for the next job; called once no job has come for a while.

    Attributes:
        held: bytes now.
    """

    def __init__(self, requests: int, bytes: int, rest: Callable[[], None] = give_back_freed) -> None:
        self.requests, self.bytes, self.held = requests, bytes, 0
        self._rest = rest
        self._waiting: deque[Job] = deque()
        self._entered = 0  # requests that have a place, from their first byte on
        self._working = 0  # jobs
        self._busy = 0  # lanes
        self._closed = False
        self._kept = True  # memory, since the last rest
        self._changed = threading.Condition()
        self._lanes = [
            threading.Thread(target=self._work, name=f"lane-{index}", daemon=True) for index in range(CALLERS)
        ]
        for lane in self._lanes:
            lane.start()

    @property
    def waiting(self) -> int:
        """Jobs that no lane has taken."""
        return len(self._waiting)

    @property
    def pending(self) -> int:
        """Jobs that wait or are in work."""
        return len(self._waiting) + self._working

    def _check_open(self, waiting: int) -> None:
        """Raise RefusedError where so many wait that one more would be too many. A free lane is a place too."""
        if self._closed:
            raise stopping()
        if waiting >= self.requests + CALLERS - self._busy:
            raise RefusedError(
                "queue", f"{self.requests} requests wait already, as many as --queue allows; send it again later"
            )

    def _enter(self) -> None:
        with self._changed:
            self._check_open(self._entered - self._working)
            self._entered += 1

    def _leave(self) -> None:
        with self._changed:
            self._entered -= 1

    def hold(self, count: int = 0) -> Held:
        """Bytes for a request. Raises RefusedError, `memory` or `too_large`."""
        held = Held(self)
        held.more(count)
        return held

    def _hold(self, held: Held, count: int) -> None:
        with self._changed:
            if count > 0 and held.bytes + count > self.bytes:
                raise RefusedError(
                    "too_large",
                    f"the request takes {(held.bytes + count) / 1e6:.1f} MB with its image and results, over the "
                    f"{self.bytes / 1e6:.1f} MB that requests may hold; send a smaller image, or raise --queue-memory",
                )
            if count > 0 and self.held + count > self.bytes:
                raise RefusedError(
                    "memory",
                    f"requests hold {self.held / 1e6:.1f} MB of the {self.bytes / 1e6:.1f} MB that they may; send it "
                    "again later",
                )
            held.bytes += count
            self.held += count

    def submit(self, job: Job) -> None:
        """Queue a job. Raises RefusedError, `queue` or `stopping`."""
        with self._changed:
            self._check_open(len(self._waiting))
            self._waiting.append(job)
            self._changed.notify()
        held = weakref.ref(job)  # or a job and its future, with the image, would be in a cycle
        job.future.add_done_callback(lambda future: self._forget(held()) if future.cancelled() else None)

    def _forget(self, job: Job | None) -> None:
        with self._changed:
            if job is not None and job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Take no more jobs, and return when those that were taken have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for lane in self._lanes:
            lane.join()

    def _work(self) -> None:
        while group := self._next():
            try:
                self._run(group)
            finally:
                with self._changed:
                    self._working -= len(group)
                    self._busy -= 1
                del group  # a lane that waits for the next job holds no image

    def _next(self) -> list[Job]:
        """The oldest job, and seven like it where there are so many; nothing once the room is closed and empty."""
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting or self._closed, REST_SECONDS if self._kept else None):
                    return self._taken()
                resting = self._kept and not self._busy  # the other lane may have given it back meanwhile
                self._kept = self._kept and not resting
            if resting:
                self._rest()

    def _taken(self) -> list[Job]:
        if not self._waiting:
            return []
        group = [self._waiting.popleft()]
        if len(self._waiting) >= TOGETHER - 1:
            alike = [job for job in self._waiting if job.alike(group[0])][: TOGETHER - 1]
            if len(alike) == TOGETHER - 1:
                for job in alike:
                    self._waiting.remove(job)
                group += alike
        self._working += len(group)
        self._busy += 1
        self._kept = True
        return group

    def _run(self, group: Sequence[Job]) -> None:
        images: list[Image] = []
        ready: list[Job] = []
        for job in group:
            try:
                job.check_wanted()
                started = time.perf_counter()
                images.append(job.read())
                job.seconds["read"] = time.perf_counter() - started
                if len(group) > 1:
                    job.begin()
                ready.append(job)
            except BaseException as error:  # told to the client; a lane never ends
                del images[len(ready) :]
                job.fail(error)
        if not ready:
            return
        begins = ready[0].begin if len(group) == 1 else lambda: None
        done = ready[0].stream.label(images, ready[0].kinds, begins)
        del images
        for job, each in zip(ready, done, strict=True):
            job.seconds["infer"] = each.seconds
            started = time.perf_counter()
            try:
                if isinstance(each.outcome, Exception):
                    raise each.outcome
                answer = job.write(each.outcome)
                job.seconds["write"] = time.perf_counter() - started
                job.future.set_result(Done(answer, job.seconds))
            except BaseException as error:
                job.fail(error)

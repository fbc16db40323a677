"""What both ways in share: limits, jobs made of requests, and what an error is called."""

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ..arrays import AnyArray, Image, size_of
from ..engine_format.model_card import ModelCard
from ..errors import DeployError, MisuseError, OverBudgetError, one_line
from ..files import WriteError
from ..images.header import Header, read_header
from ..images.memory import file_of
from ..images.numbers import ReadOptions
from ..images.read import decode
from ..pixels.prepare import check_image
from .metrics import Metrics
from .models import Models, Served, UnknownModelError
from .outputs import check_wanted
from .room import Done, Held, Job, RefusedError, Room, bare
from .tensors import InferRequest, Wanted

log = logging.getLogger(__name__)

T = TypeVar("T")
DECODED = 2  # times an image's bytes: what its decoder keeps beside it

# What is refused, by its reason: HTTP's status and gRPC's.
REFUSED = {
    "queue": (503, "RESOURCE_EXHAUSTED"),
    "memory": (503, "RESOURCE_EXHAUSTED"),
    "stopping": (503, "UNAVAILABLE"),
    "too_large": (413, "INVALID_ARGUMENT"),
    "late": (504, "DEADLINE_EXCEEDED"),
    "gone": (499, "CANCELLED"),
    "slow": (408, "DEADLINE_EXCEEDED"),
    "length": (411, "INVALID_ARGUMENT"),
    "type": (415, "INVALID_ARGUMENT"),
    "token": (401, "UNAUTHENTICATED"),
    "origin": (403, "PERMISSION_DENIED"),
    "failing": (503, "UNAVAILABLE"),
}


@dataclass(frozen=True)
class Limits:
    """What one request may be.

    Attributes:
        body: bytes of it.
        pixels: of its image.
    """

    body: int
    pixels: int


@dataclass(frozen=True)
class Problem:
    """What a client is told of an error.

    Attributes:
        http: status.
        grpc: name of the status code.
        reason: for the metrics.
        text: one line.
    """

    http: int
    grpc: str
    reason: str
    text: str


def problem_of(error: BaseException) -> Problem:
    """What a client is told. An error that is ours keeps nothing but its text."""
    text = one_line(error, 300)
    if isinstance(error, DeployError):
        bare(error)
    if isinstance(error, RefusedError):
        return Problem(*REFUSED[error.reason], error.reason, text)
    if isinstance(error, UnknownModelError):
        return Problem(404, "NOT_FOUND", "model", text)
    if isinstance(error, OverBudgetError):
        return Problem(413, "INVALID_ARGUMENT", "too_large", text)
    if isinstance(error, MisuseError):
        return Problem(400, "INVALID_ARGUMENT", "misuse", text)
    if isinstance(error, WriteError):  # a full disk of this machine is no fault of the image
        return Problem(503, "UNAVAILABLE", "failing", text)
    if isinstance(error, DeployError):
        return Problem(422, "INVALID_ARGUMENT", "image", text)
    if isinstance(error, MemoryError):
        return Problem(413, "RESOURCE_EXHAUSTED", "too_large", "the machine has no memory for it; send a smaller image")
    log.error("a request failed: %s", type(error).__name__, exc_info=error)
    return Problem(500, "INTERNAL", "error", f"the server failed ({type(error).__name__}); its log has the reason")


class Service:
    """The server's state, for both ways in. Its coroutines run in one event loop.

    Attributes:
        models: that are served.
        room: that runs them.
        limits: of a request.
        metrics: what was done.
        stopping: whether the end has been asked for: it is not ready then, and does what is asked of it yet.
    """

    def __init__(
        self, models: Models, room: Room, limits: Limits, token: str = "", options: ReadOptions | None = None
    ) -> None:
        self.models, self.room, self.limits = models, room, limits
        self.metrics = Metrics(models, room)
        self.stopping = False
        self._token = token.encode()
        # Headers are read outside the event loop, one at a time: some decoders decode an image to find its size.
        self._headers = ThreadPoolExecutor(1, thread_name_prefix="header")
        self._options = replace(options or ReadOptions(), max_pixels=limits.pixels, strict=True)
        self._checking = threading.Lock()

    @property
    def ready(self) -> bool:
        """Whether requests should be sent to it."""
        return not self.stopping and self.models.ready

    async def check_ready(self) -> bool:
        """`ready`; what has failed is tried again meanwhile."""
        if not self.models.ready and not self.stopping and self._checking.acquire(blocking=False):
            asyncio.get_running_loop().run_in_executor(None, self._check)
        return self.ready

    def _check(self) -> None:
        try:
            self.models.check()
        finally:
            self._checking.release()

    def check_token(self, authorization: str | None) -> None:
        """Raise RefusedError where the server has a token, and this header does not bear it."""
        scheme, _, token = (authorization or "").partition(" ")  # the scheme in letters of any case: RFC 9110, 11.1
        borne = token.strip(" ").encode("utf-8", "replace") if scheme.lower() == "bearer" else b""
        if self._token and not hmac.compare_digest(borne, self._token):
            raise RefusedError(
                "token", "the request bears no token, or another; send the header Authorization: Bearer …"
            )

    def deadline_of(self, timeout: float | None) -> float | None:
        """By time.monotonic, of a request that has so many seconds."""
        return None if timeout is None else time.monotonic() + timeout

    async def job(
        self,
        served: Served,
        request: InferRequest,
        held: Held,
        write: Callable[[tuple[Wanted, ...], tuple[AnyArray, ...]], Any],
        deadline: float | None = None,
    ) -> Job:
        """The job of a request.

        Args:
            served: the network.
            request: checked.
            held: takes the bytes of the image, where it is to be decoded, and of the results.
            write: makes the answer of the outputs that are wanted and their results; called in a lane.
            deadline: by time.monotonic.

        Raises:
            DeployError: an image that the network does not take, or over the limits.
        """
        card = served.card
        outputs = check_wanted(served, request.outputs, request.binary)
        kinds = tuple(dict.fromkeys(each.name for each in outputs))
        read: Callable[[], Image]
        if request.image is not None:
            image = check_image(request.image, card)
            size = size_of(image)
            if size[0] * size[1] > self.limits.pixels:
                raise OverBudgetError(
                    f"the image has {size[0]}×{size[1]} = {size[0] * size[1]:,} pixels, over the limit of "
                    f"{self.limits.pixels:,}; send a smaller one, or raise --max-pixels"
                )
            decoded, pages = 0, 1

            def read() -> Image:
                return image

        else:
            file = request.file
            assert file is not None, "a request has an image or a file"
            page = request.page
            header = await self.off_the_loop(lambda: self._header(file, page))
            size, pages = header.size, header.pages
            # Of what the file stores and of what the card takes, the wider.
            bands = max(header.bands * header.dtype.itemsize, card.channels * 4 if card.dtype == "float32" else 0)
            decoded = DECODED * header.pixels * bands + len(file)

            def read() -> Image:
                return self._decoded(file, page, card)

        held.more(decoded + size[0] * size[1] * sum(served.network.result_bytes(kind) for kind in kinds))

        def answer(results: tuple[AnyArray, ...]) -> Any:
            by_kind = dict(zip(kinds, results, strict=True))
            return write(outputs, tuple(by_kind[each.name] for each in outputs))

        return Job(served.stream, size, read, kinds, answer, deadline, pages)

    def _header(self, file: memoryview, page: int | None) -> Header:
        with file_of(file) as path:
            return read_header(path, self.limits.pixels, page)

    def _decoded(self, file: memoryview, page: int | None, card: ModelCard) -> Image:
        """A file's pixels. What label-images would warn of is refused: a client sees no warnings."""
        try:
            with file_of(file) as path:
                return decode(read_header(path, self.limits.pixels, page), card, self._options)
        except MisuseError as error:
            raise MisuseError(str(error).removesuffix(" (refused by --strict)")) from error

    async def off_the_loop(self, work: Callable[[], T]) -> T:
        """What `work` gives, done in a thread: parsing and reading that would hold up everybody else."""

        def tried() -> T | DeployError:
            try:
                return work()
            except DeployError as error:
                return bare(error)

        found = await asyncio.get_running_loop().run_in_executor(self._headers, tried)
        if not isinstance(found, DeployError):
            return found
        try:
            raise found
        finally:
            del found  # or this frame would be in a cycle with it

    async def outcome(self, served: Served, job: Job) -> Done:
        """Run a job, and give what became of it; a caller that is cancelled drops it.

        A failure that may be the network's own makes it run on zeros, and it is not ready where that fails too.
        """
        self.room.submit(job)
        try:
            done = await asyncio.wrap_future(job.future)
        except DeployError as error:
            if type(error) is DeployError and not await asyncio.get_running_loop().run_in_executor(None, served.check):
                raise RefusedError("failing", f"{served.name} does not run: {error}") from error
            raise
        except Exception:
            await asyncio.get_running_loop().run_in_executor(None, served.check)
            raise
        self.metrics.labelled(served, job, done)
        return done

    def close(self) -> None:
        """End what was begun, and take nothing more."""
        self.room.close()
        self._headers.shutdown()
        self.models.close()

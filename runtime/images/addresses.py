"""What a user's words name: files, and videos that are none: addresses, cameras and standard input."""

import re
import select
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import MisuseError
from .find import IMAGE_SUFFIXES, find_placed

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv",
    ".ogv", ".ogg", ".3gp", ".3g2", ".vob", ".m2v", ".asf", ".f4v", ".mj2", ".divx", ".mxf", ".dv", ".nut", ".y4m",
    ".h264", ".264", ".hevc", ".265", ".ivf",
))  # fmt: skip
SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
STDIN = "-"
LIVE_SCHEMES = frozenset(("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp", "srt", "tcp"))
SCHEMES = LIVE_SCHEMES | {"http", "https"}
WAITING = 2  # frames of a live source that wait for the network at most
SECONDS = 10.0  # without an answer, after which the connection to an address or a camera is lost
RECONNECT = 60.0  # seconds in which a connection that was lost is opened again


@dataclass(frozen=True)
class Address:
    """Where a video comes from that is no file.

    Attributes:
        given: `-`, an address, or the file of a device.
        live: comes at its own pace: what is not labelled in time is dropped.
        reconnect: seconds in which its connection is opened again, where it is lost; 0: it is not.
    """

    given: str
    live: bool
    reconnect: float = RECONNECT

    @classmethod
    def of(cls, given: str, live: bool | None, reconnect: float = RECONNECT) -> "Address":
        """`live`: None: cameras and the schemes of streaming are, standard input and http are not."""
        scheme = urlsplit(given).scheme
        return cls(given, _is_device(given) or scheme in LIVE_SCHEMES if live is None else live, reconnect)

    @property
    def is_device(self) -> bool:
        return _is_device(self.given)

    @property
    def repeats(self) -> bool:
        """Whether it gives the same frames when it is read again."""
        return not self.live and self.given != STDIN

    @property
    def name(self) -> str:
        """For its outputs."""
        if self.given == STDIN:
            return "stdin"
        if self.is_device:
            return Path(self.given).name
        parts = urlsplit(self.given)
        stem = PurePosixPath(unquote(parts.path)).stem or parts.hostname or parts.scheme
        return re.sub(r"[^\w.-]+", "_", stem)[:80]

    def __str__(self) -> str:
        """Without a password."""
        if self.given == STDIN:
            return "standard input"
        parts = urlsplit(self.given)
        if parts.username is None and parts.password is None:
            return self.given
        return parts._replace(netloc="…@" + parts.netloc.rpartition("@")[2]).geturl()


def is_address(given: str) -> bool:
    """Whether a user's word names a video that is no file: `-`, a camera, an address that is not of an image."""
    parts = urlsplit(given)
    if parts.scheme in SCHEMES and given[len(parts.scheme) :].startswith("://"):
        return PurePosixPath(parts.path).suffix.lower() not in IMAGE_SUFFIXES
    return given == STDIN or _is_device(given)


def find_sources(inputs: Sequence[str], live: bool | None, reconnect: float = RECONNECT) -> dict[Path | Address, Path]:
    """Images, videos and addresses for a user's words, in order, and the folder of each as of `find_placed`.

    Args:
        inputs: as `find_placed` takes them, and addresses of videos.
        live: whether the addresses are; None: by what they are.
        reconnect: of an Address.

    Raises:
        MisuseError: an input that does not exist, or nothing in it; `live` without an address.
    """
    sources: dict[Path | Address, Path] = {}
    for several, group in groupby(inputs, is_address):
        words = list(group)
        addresses = {Address.of(each, live, reconnect): Path() for each in words if several}
        for source, folder in (addresses or find_placed(words, SUFFIXES)).items():
            sources.setdefault(source, folder)
    if live is not None and not any(isinstance(source, Address) for source in sources):
        raise MisuseError("--live is of addresses, cameras and standard input, and none is among the images; omit it")
    return sources


def _is_device(given: str) -> bool:
    return given.startswith("/dev/video") or (given.startswith("/dev/") and Path(given).is_char_device())


class StandardInput:
    """Standard input as a file that a reader may be told to leave. Raises MisuseError for a terminal."""

    def __init__(self) -> None:
        if sys.stdin is None or sys.stdin.isatty():
            raise MisuseError("- reads a video from standard input, which is a terminal; pipe one in: … | label-images")
        self._file = open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115 (ours to read, not to close)
        self._left = threading.Event()
        self.seekable = self._file.seekable
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none where it has ended or has been left."""
        while not self._left.is_set():
            if select.select([self._file], [], [], 0.2)[0]:
                return self._file.read(size)
        return b""

    def leave(self) -> None:
        self._left.set()


class Latest:
    """The newest frames of a live source, which is read in a thread of its own as fast as it comes.

    Args:
        frames: of the source. What they raise is raised after the frames before it.
        leave: makes a read that waits come back.

    Attributes:
        dropped: frames that newer ones have pushed out.
    """

    def __init__(self, frames: Iterator[Any], leave: Callable[[], None]) -> None:
        self.dropped = 0
        self._source, self._leave = frames, leave
        self._waiting: deque[Any] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._read, name="fcn-deploy-live", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for frame in self._source:
                with self._changed:
                    if self._stopped:
                        break
                    if len(self._waiting) == WAITING:
                        self._waiting.popleft()
                        self.dropped += 1
                    self._waiting.append(frame)
                    self._changed.notify()
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    def frames(self) -> Iterator[Any]:
        """Each frame that was not dropped, as soon as it is there."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended or self._stopped)
                if not self._waiting:
                    break
                frame = self._waiting.popleft()
            yield frame
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Read no more; what waits is still given."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._leave()

    def ended(self) -> bool:
        """Stop, and wait for the thread; whether it has come back, and the source may be closed."""
        self.stop()
        self._thread.join(SECONDS + 1)
        return not self._thread.is_alive()

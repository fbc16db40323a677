"""Videos labelled frame by frame: a label video of each, and a video of overlays."""

import hashlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..files import WriteError
from ..images.addresses import STDIN, Latest, StandardInput
from ..images.numbers import ReadOptions
from ..images.overlay import overlay
from ..images.video import VideoError, VideoReader
from ..images.video_parts import Size, VideoParts, yuv_frame
from ..reuse import Frame, Reuse
from ..stream import AHEAD, CALLERS, FRAMES_AHEAD, Labelled, Stream, describe_plan, overlapped, said
from .jobs import Job, Record
from .regions import AGAIN, engine_identity

log = logging.getLogger(__name__)

_Item = tuple[Any, NDArray[Any] | None, Frame | None]  # a frame; where what repeats is reused, its image and place


def label_videos(stream: Stream, jobs: Iterable[Job], options: ReadOptions) -> Iterator[Record]:
    """Label each frame of videos, one after the other; frames that cannot be read are left out, and the rest keep
    their times.

    The labels are a Matroska file: FFV1, lossless, grey (`gray`, or `gray16le` beyond 256 classes), whose values are
    class indices. The overlay is an MP4, H.264 (MPEG-4 where PyAV lacks it), in which the last row and column are
    repeated where their number is odd. Where frames change their size, the labels of each size are a file of their own.
    A rotation is applied, as players do; sound is not copied. Of a live source the oldest frames are dropped where they
    come faster than they are labelled; SIGINT and SIGTERM end it, and what was labelled is written.

    Args:
        stream: of an open Network.
        jobs: videos.
        options: how frames are read.

    Yields:
        Records of `label_files`.

    Raises:
        DeployError: an output cannot be written.
        KeyboardInterrupt: its text says how far the run came.
    """
    for job in jobs:
        try:
            yield _label_video(stream, job, options)
        except WriteError:
            raise  # the next would fail too
        except Exception as error:  # whatever PyAV raises of one file, the others are labelled
            log.debug("%s", job.source, exc_info=True)
            yield job.record | {"error": said(error, job.source)}


def _label_video(stream: Stream, job: Job, options: ReadOptions) -> Record:
    """The record of a video. Raises DeployError, KeyboardInterrupt."""
    source = job.address or job.source
    stdin = StandardInput() if job.address and job.address.given == STDIN else None
    kinds = ("labels", "overlay") if job.overlay else ("labels",)
    with VideoReader.open(source, stream.network.card, options, stdin) as reader:
        folder = job.results["labels"].parent / f".{job.results['labels'].name}.partial"
        identity = engine_identity(stream.network) | _source_identity(reader) | {"read": options.identity()}
        parts = VideoParts(reader.av, folder, identity, stream.network.card, kinds, reader.time_base, reader.rate)
        try:
            run = _Run(stream, job, reader, parts)
            run.label(stdin)
            parts.complete()
            record = job.record | run.record()
        except KeyboardInterrupt as error:
            parts.leave()
            raise KeyboardInterrupt(f"interrupted at frame {parts.frames} of {source}; {AGAIN}") from error
        except BaseException:
            parts.drop()
            raise
        parts.drop()
        return record


def _source_identity(reader: VideoReader) -> dict[str, str]:
    """What frames that are done belong to."""
    if isinstance(reader.source, Path):
        stat = reader.source.stat()
        return {"video": f"{reader.source.resolve()} {stat.st_size} {stat.st_mtime_ns}"}
    if not reader.source.repeats:
        return {"video": str(time.time_ns())}  # never the same
    shown = (reader.stream.duration, reader.stream.codec_context.name, reader.stream.codec_context.width)
    return {"video": hashlib.sha256(f"{reader.source.given} {shown}".encode()).hexdigest()}


class _Run:
    """A video being labelled."""

    def __init__(self, stream: Stream, job: Job, reader: VideoReader, parts: VideoParts) -> None:
        self._stream, self._job, self._reader, self._parts = stream, job, reader, parts
        self._times = {"read": 0.0, "label": 0.0, "write": 0.0}
        self._kept = parts.frames
        self._sizes = list(parts.sizes())
        self._count = 0
        self._seconds = 0.0
        self._dropped: int | None = None  # of a live source
        self._reuse = Reuse(stream.network) if stream.reuse else None

    def label(self, stdin: StandardInput | None) -> None:
        """Label the frames and write them into parts. Raises DeployError."""
        address = self._job.address
        started = time.perf_counter()
        if address is None or not address.live:
            self._label(self._reader.frames(self._times, self._kept), AHEAD)
        else:
            reading = {"read": 0.0}  # by the other thread
            latest = Latest(self._reader.frames(reading), stdin.leave if stdin else self._reader.leave.set)
            try:
                with _stopped_by_signals(latest.stop):
                    self._label(self._watched(latest), CALLERS)
            finally:
                self._reader.abandoned = not latest.ended()
            self._times["read"] += reading["read"]
            self._dropped = latest.dropped
        self._seconds = time.perf_counter() - started

    def _watched(self, latest: Latest) -> Iterator[Any]:
        """Its frames; the first drop is said."""
        told = False
        for frame in latest.frames():
            if latest.dropped and not told:
                told = True
                source = self._reader.source
                log.warning("%s sends frames faster than they are labelled; the oldest are dropped", source)
            yield frame

    def _label(self, frames: Iterator[Any], ahead: int) -> None:
        ahead = ahead if self._reuse is None else min(ahead, FRAMES_AHEAD)
        results = overlapped(
            self._followed(frames), self._work, workers=CALLERS + 1, pixels=lambda item: item[0].width * item[0].height,
            most=self._stream.pixels, ahead=ahead,
        )  # fmt: skip
        with closing(results):
            for frame, done, picture, read, drawn in results:
                if isinstance(done.outcome, Exception):
                    number, reader = self._kept + self._count, self._reader
                    raise VideoError(said(done.outcome, f"{reader.source}, frame {number}")) from done.outcome
                started, (labels,) = time.perf_counter(), done.outcome
                self._check_output((labels.shape[0], labels.shape[1]), frame.pts)
                self._parts.write(labels, picture, frame.pts, self._reader.aspect(frame))
                self._count += 1
                self._times["read"] += read
                self._times["label"] += done.seconds
                self._times["write"] += drawn + time.perf_counter() - started

    def _followed(self, frames: Iterator[Any]) -> Iterator[_Item]:
        """Frames, and where what repeats is reused, each as an image that follows the one before."""
        for frame in frames:
            if self._reuse is None:
                yield frame, None, None
            else:
                image = self._reader.image(frame)
                yield frame, image, self._reuse.follow(image)

    def _work(self, items: list[_Item]) -> list[tuple[Any, Labelled, Any, float, float]]:
        ((frame, image, following),) = items
        started = time.perf_counter()
        image = self._reader.image(frame) if image is None else image
        read = time.perf_counter() - started
        if self._reuse is None or following is None:
            (done,) = self._stream.label([image])
        else:
            done = self._stream.of_frame(self._reuse, following)
        started = time.perf_counter()
        picture = None
        if self._job.overlay and not isinstance(done.outcome, Exception):
            picture = yuv_frame(self._reader.av, overlay(image, done.outcome[0], self._stream.network.card))
        return [(frame, done, picture, read, time.perf_counter() - started)]

    def _check_output(self, size: Size, pts: int) -> None:
        """Say where frames have a new size, and refuse it where its outputs are there already."""
        if size in self._sizes:
            return
        self._sizes.append(size)
        if len(self._sizes) == 1:
            return
        for path in (outputs := self._outputs(size)).values():
            if path.resolve() in self._job.inputs or (path.exists() and not self._job.replace):
                raise VideoError(
                    f"{self._reader.source}: its frames change to {_sides(size)}, whose labels would replace {path}; "
                    "choose another -o, or move it"
                )
        log.warning(
            "%s: its frames change from %s to %s at %.2f s, and a label video has one size: theirs are %s",
            self._reader.source, _sides(self._sizes[0]), _sides(size), float(pts * self._reader.time_base),
            outputs["labels"],
        )  # fmt: skip

    def _outputs(self, size: Size) -> dict[str, Path]:
        """Of the frames of a size, by kind."""
        found = {"labels": self._job.results["labels"]}
        if self._job.overlay:
            found["overlay"] = self._job.overlay
        if size != self._sizes[0]:
            stem = found["labels"].stem
            found = {
                kind: path.with_name(f"{stem}.{_sides(size)}{path.name.removeprefix(stem)}")
                for kind, path in found.items()
            }
        return found

    def record(self) -> Record:
        """Join the parts, and say what was done. Raises DeployError."""
        counts, reader, network = self._parts.sizes(), self._reader, self._stream.network
        if not counts:
            raise VideoError(f"{reader.source} has no frame that can be read ({reader.faults() or 'it holds none'})")
        started = time.perf_counter()
        # The first size's labels last: where they are, all is.
        for size in reversed(self._sizes):
            self._parts.join(size, dict(reversed(self._outputs(size).items())))
        self._times["write"] += time.perf_counter() - started
        plan = network.plan(*self._sizes[0], kinds=self._stream.kinds)
        record: Record = {
            "size": list(self._sizes[0]),
            "frames": sum(counts.values()),
            "plan": describe_plan(plan),
            "ms": {name: round(seconds * 1e3, 2) for name, seconds in self._times.items()},
            "fps": round(self._count / self._seconds, 2),
        } | self._job.written
        if self._kept:
            record["resumed"] = self._kept
        if self._dropped is not None:
            record["dropped"] = self._dropped
        if reader.reconnected:
            record["reconnected"] = reader.reconnected
        if len(counts) > 1:
            record["sizes"] = [
                {"size": list(size), "frames": counts[size]}
                | {kind: str(path) for kind, path in self._outputs(size).items()}
                for size in self._sizes
            ]
        if faults := reader.faults():
            many = record["frames"]
            others = "1 other frame is" if many == 1 else f"other {many} frames are"
            rest = f"{reader.source}: {faults}; the {others} labelled"
            if self._dropped is None or reader.stopped:
                record["error"] = rest
            else:  # usual where one joins a stream
                log.warning(rest)
        return record


def _sides(size: Size) -> str:
    """As outputs are called."""
    return f"{size[1]}x{size[0]}"


@contextmanager
def _stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Within it the first SIGINT or SIGTERM calls `stop` instead; not in other threads than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        restore()
        stop()

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()

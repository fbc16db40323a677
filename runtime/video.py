"""Video files in, label videos out, frame by frame (PyAV, the extra [video])."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from .command import need
from .errors import DeployError
from .files import replacing, write_error
from .images import overlay
from .model_card import ModelCard
from .pipeline import CALLERS, Labelled, Stream, describe_plan, overlapped, said

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m2ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp",
))  # fmt: skip
# Demuxers of single files. Playlists and the like, which open other files and addresses, are not among them.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
MOST_TICKS = 65535  # of a second, for MPEG-4


class VideoError(DeployError):
    """A video that cannot be labelled, which does not stop the others."""


def is_video(path: Path) -> bool:
    """By its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def label_video(stream: Stream, source: Path, labels: Path, overlay: Path | None, max_pixels: int) -> dict:
    """Label each frame of a video file; frames that cannot be read are left out, and the rest keep their times.

    Args:
        stream: of the Segmenter.
        source: the video. Its rotation is applied, as players do; its sound is not copied.
        labels: a Matroska file to write: FFV1, lossless, grey (`gray`, or `gray16le` beyond 256 classes), whose values
            are class indices.
        overlay: an MP4 to write, H.264 (MPEG-4 where PyAV lacks it), in which the last row and column are repeated
            where their number is odd; None: none.
        max_pixels: refuse larger frames.

    Returns:
        A record of `label_files`.

    Raises:
        DeployError: an output cannot be written.
    """
    record: dict = {"image": str(source)}
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(_Reader.open(source, stream.net.card, max_pixels))
            _label(stream, reader, labels, overlay, record, stack)
            faults = reader.faults()  # while it is open: it asks the file
    except VideoError as error:
        return {"image": str(source), "error": said(error, source)}
    if faults:
        record["error"] = f"{source}: {faults}; the other {record['frames']} frames are labelled"
    return record


def _label(
    stream: Stream, reader: "_Reader", labels: Path, overlay_path: Path | None, record: dict, stack: ExitStack
) -> None:
    card = stream.net.card
    times = {"read": 0.0, "label": 0.0, "write": 0.0}

    def work(frames: list) -> list[tuple[int, Labelled, object, float, float]]:
        (frame,) = frames
        started = time.perf_counter()
        image = reader.image(frame)
        read = time.perf_counter() - started
        (done,) = stream.label([image])
        started = time.perf_counter()
        picture = None
        if overlay_path and not isinstance(done.outcome, Exception):
            picture = _picture(reader.av, image, done.outcome[0], card)
        return [(frame.pts, done, picture, read, time.perf_counter() - started)]

    results = stack.enter_context(
        closing(
            overlapped(
                reader.frames(times),
                work,
                workers=CALLERS + 1,
                pixels=lambda frame: frame.width * frame.height,
                most=stream.pixels,
            )
        )
    )
    writers: list[_Writer] = []
    count = 0
    for pts, done, picture, read, drawn in results:
        if isinstance(done.outcome, Exception):
            raise VideoError(f"{reader.path}, frame {count}: {said(done.outcome, reader.path)}") from done.outcome
        started, (found,) = time.perf_counter(), done.outcome
        if not count:
            writers.append(stack.enter_context(_Writer.open(labels, reader, found.shape, card)))
            if overlay_path:
                writers.append(stack.enter_context(_Writer.open(overlay_path, reader, found.shape, None)))
        kind = "gray" if found.dtype == np.uint8 else "gray16le"
        for writer, frame in zip(
            writers, (reader.av.VideoFrame.from_ndarray(found, format=kind), picture), strict=False
        ):
            writer.write(frame, pts)
        count += 1
        times["read"] += read
        times["label"] += done.seconds
        times["write"] += drawn + time.perf_counter() - started
    if not count:
        raise VideoError(f"{reader.path} has no frame that can be read ({reader.faults() or 'it is empty'})")
    for writer in writers:
        writer.finish()
    record |= {
        "size": list(done.plan.size),
        "frames": count,
        "plan": describe_plan(done.plan),
        "ms": {name: round(seconds * 1e3, 2) for name, seconds in times.items()},
        "labels": str(labels),
        "overlay": str(overlay_path) if overlay_path else None,
    }


def _picture(av, image: np.ndarray, labels: np.ndarray, card: ModelCard):
    """A frame of the overlay, with even sides."""
    drawn = overlay(image, labels, card)
    odd = [(0, side % 2) for side in drawn.shape[:2]]
    if any(side for _, side in odd):
        drawn = np.pad(drawn, (*odd, (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(drawn, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709")


class _Reader:
    """The frames of a video file, and what was wrong with them."""

    def __init__(self, av, container, path: Path, card: ModelCard) -> None:
        self.av, self.path, self.card = av, path, card
        self._container = container
        self.stream = container.streams.video[0]
        self.time_base: Fraction = self.stream.time_base
        self.rate: Fraction = self.stream.average_rate or self.stream.guessed_rate or Fraction(25)
        self._size = (self.stream.codec_context.width, self.stream.codec_context.height)
        self._broken: list[str] = []  # when, and why
        self._stopped: str | None = None
        self._end: Fraction | None = None  # of the last frame, in seconds

    @classmethod
    @contextmanager
    def open(cls, path: Path, card: ModelCard, max_pixels: int) -> Iterator["_Reader"]:
        """Raises VideoError."""
        if card.dtype != "uint8" or card.channels not in (1, 3):
            raise VideoError(
                f"{path} has frames of 8-bit colour; this model takes {card.channels} channels of {card.dtype}"
            )
        try:
            av = need("av", "video")
        except DeployError as error:
            raise VideoError(f"{path}: {error}") from error
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            container = av.open(str(path), options=options)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VideoError(f"cannot read {path} as a video: {reason}; is it damaged or truncated?") from error
        with container:
            if not container.streams.video:
                raise VideoError(f"{path} has no pictures, only {len(container.streams)} other streams; remove it")
            reader = cls(av, container, path, card)
            width, height = reader._size
            if width * height > max_pixels:
                raise VideoError(
                    f"{path} has frames of {width}×{height} = {width * height:,} pixels, over the limit of "
                    f"{max_pixels:,}; raise it with max_pixels= (--max-pixels) if you trust the file"
                )
            yield reader

    def frames(self, times: dict[str, float]) -> Iterator:
        """Frames with a time each, rising. Adds the seconds of decoding to `times["read"]`."""
        last = None
        step = max(1, round(1 / (self.rate * self.time_base)))
        decoded = self._decoded()
        while True:
            started = time.perf_counter()
            frame = next(decoded, None)
            times["read"] += time.perf_counter() - started
            if frame is None:
                return
            size = (frame.width, frame.height)
            self._size = self._size if all(self._size) else size
            if size != self._size:
                raise VideoError(
                    f"{self.path}: its frames change from {self._size[0]}×{self._size[1]} to {size[0]}×{size[1]}, and "
                    "a label video has one size; split it there"
                )
            if frame.pts is None:
                frame.pts = 0 if last is None else last + step
            if last is not None and frame.pts <= last:
                frame.pts = last + 1
            last = frame.pts
            self._end = (last + (frame.duration or step)) * self.time_base
            yield frame

    def _decoded(self) -> Iterator:
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (self.av.error.FFmpegError, OSError) as error:
                self._stopped = error.strerror or str(error)
                packet = None  # what the decoder still holds
            try:
                frames = self.stream.codec_context.decode(packet)
            except self.av.error.EOFError:
                return
            except (self.av.error.FFmpegError, OSError) as error:
                self._note(packet, error.strerror or str(error))
                frames = []
            for frame in frames:
                if frame.is_corrupt:
                    self._note(frame, "the picture is damaged")
                else:
                    yield frame
            if packet is None:
                return

    def _note(self, what, why: str) -> None:
        when = "" if what is None or what.pts is None else f" at {float(what.pts * self.time_base):.2f} s"
        self._broken.append(f"{when} ({why})")

    def faults(self) -> str:
        """What was wrong, in one line; empty where nothing was."""
        said = []
        if self._broken:
            many = len(self._broken)
            what = f"a frame{self._broken[0]}" if many == 1 else f"{many} frames, the first{self._broken[0]},"
            said.append(f"{what} cannot be read")
        whole = self._duration()
        if self._end is not None and (
            self._stopped or (whole is not None and self._end + Fraction(5, 2) / self.rate < whole)
        ):
            of = "" if whole is None else f" of {float(whole):.2f} s"
            said.append(f"it ends at {float(self._end):.2f} s{of}{f' ({self._stopped})' if self._stopped else ''}")
        elif self._stopped:
            said.append(self._stopped)
        return " and ".join(said)

    def _duration(self) -> Fraction | None:
        """When the pictures end, in seconds, by the file's header."""
        if self.stream.duration is not None:
            return (self.stream.duration + (self.stream.start_time or 0)) * self.time_base
        try:  # Matroska's
            hours, minutes, seconds = self.stream.metadata.get("DURATION", "").split(":")
            return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
        except ValueError:
            return None

    def image(self, frame) -> np.ndarray:
        """A frame upright, [H, W, C] uint8."""
        image = frame.to_ndarray(format="rgb24" if self.card.channels == 3 else "gray")
        image = image.reshape(frame.height, frame.width, -1)
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class _Writer:
    """A video file that is written frame by frame."""

    def __init__(self, av, container, stream, path: Path, time_base: Fraction) -> None:
        self._av, self._container, self._stream, self._path = av, container, stream, path
        self._time_base = time_base  # of the frames that come
        self._last: int | None = None

    @classmethod
    @contextmanager
    def open(cls, path: Path, reader: _Reader, size: tuple[int, int], card: ModelCard | None) -> Iterator["_Writer"]:
        """A label video in the card's classes; an overlay, for None. It appears where the block ends well."""
        av = reader.av
        with replacing(path) as temporary:
            with _writing(av, path):
                container = av.open(str(temporary), "w", format="matroska" if card else "mp4")
            try:
                with _writing(av, path):
                    stream = _output(container, reader, size, card)
                writer = cls(av, container, stream, path, reader.time_base)
                yield writer
            finally:
                with _writing(av, path):
                    container.close()

    def write(self, frame, pts: int) -> None:
        base = self._stream.codec_context.time_base
        frame.pts, frame.time_base = round(pts * self._time_base / base), base
        if self._last is not None and frame.pts <= self._last:  # nearer than the format can tell
            frame.pts = self._last + 1
        self._last = frame.pts
        with _writing(self._av, self._path):
            self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        with _writing(self._av, self._path):
            self._container.mux(self._stream.encode(None))


def _output(container, reader: _Reader, size: tuple[int, int], card: ModelCard | None):
    av = reader.av
    height, width = size
    base = reader.time_base
    if card is not None:
        stream = container.add_stream("ffv1", rate=reader.rate, options={"slicecrc": "1"})
        stream.pix_fmt = "gray" if card.label_dtype == "uint8" else "gray16le"
        container.metadata["fcn_deploy.card"] = card.to_json()
    else:
        height, width = height + height % 2, width + width % 2
        if "libx264" in av.codecs_available:
            stream = container.add_stream("libx264", rate=reader.rate, options={"crf": "20", "preset": "veryfast"})
        else:
            stream = container.add_stream("mpeg4", rate=reader.rate, options={"qscale": "3"})
            if base.denominator > MOST_TICKS:
                base = Fraction(1, MOST_TICKS)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = 1  # BT.709, as its frames are made
    stream.width, stream.height = width, height
    stream.codec_context.time_base = base
    if math.prod(size) and (ratio := reader.stream.sample_aspect_ratio):
        turned = size != (reader.stream.codec_context.height, reader.stream.codec_context.width)
        stream.codec_context.sample_aspect_ratio = 1 / ratio if turned else ratio
    return stream


@contextmanager
def _writing(av, path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise write_error(path, OSError(error.errno, error.strerror)) from error

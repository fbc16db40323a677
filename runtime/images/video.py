"""Video files, frame by frame (PyAV, the extra [video])."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError
from ..extras import need
from ..files import replacing, write_error
from ..model_card import ModelCard

VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv",
    ".ogv", ".3gp",
))  # fmt: skip
# Demuxers of single files. Playlists and the like, which open other files and addresses, are not among them.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg"
MOST_TICKS = 65535  # of a second, for MPEG-4


class VideoError(DeployError):
    """A video that cannot be labelled, which does not stop the others."""


def is_video(path: Path) -> bool:
    """By its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


class VideoReader:
    """The frames of a video file, and what was wrong with them."""

    def __init__(self, av: Any, container: Any, path: Path, card: ModelCard) -> None:
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
    def open(cls, path: Path, card: ModelCard, max_pixels: int) -> Iterator["VideoReader"]:
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

    def frames(self, times: dict[str, float]) -> Iterator[Any]:
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

    def _decoded(self) -> Iterator[Any]:
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

    def _note(self, what: Any, why: str) -> None:
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
            return Fraction(self.stream.duration + (self.stream.start_time or 0)) * self.time_base
        try:  # Matroska's
            hours, minutes, seconds = self.stream.metadata.get("DURATION", "").split(":")
            return int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
        except ValueError:
            return None

    def image(self, frame: Any) -> NDArray[Any]:
        """A frame upright, [H, W, C] uint8."""
        pixels = frame.to_ndarray(format="rgb24" if self.card.channels == 3 else "gray")
        image: NDArray[Any] = pixels.reshape(frame.height, frame.width, -1)
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


class VideoWriter:
    """A video file that is written frame by frame."""

    def __init__(self, av: Any, container: Any, stream: Any, path: Path, time_base: Fraction) -> None:
        self._av, self._container, self._stream, self._path = av, container, stream, path
        self._time_base = time_base  # of the frames that come
        self._last: int | None = None

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, reader: VideoReader, size: tuple[int, int], card: ModelCard | None
    ) -> Iterator["VideoWriter"]:
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

    def write(self, frame: Any, pts: int) -> None:
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


def _output(container: Any, reader: VideoReader, size: tuple[int, int], card: ModelCard | None) -> Any:
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
def _writing(av: Any, path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise write_error(path, OSError(error.errno, error.strerror)) from error


def yuv_frame(av: Any, picture: NDArray[Any]) -> Any:
    """[H, W, 3] uint8 as a frame of H.264's colours; the last row and column are repeated where their number is odd."""
    odd = [(0, side % 2) for side in picture.shape[:2]]
    if any(side for _, side in odd):
        picture = np.pad(picture, (*odd, (0, 0)), mode="edge")
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709")

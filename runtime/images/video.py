"""Video files, frame by frame (PyAV, the extra [video])."""

import logging
import math
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import PERCENTILE, ModelCard
from ..errors import DeployError, MisuseError
from ..extras import need
from .addresses import SECONDS, STDIN, VIDEO_SUFFIXES, Address, StandardInput
from .fit import Fit, fit_of
from .frames import alpha_of, display_matrix, pixels_of, remarks, with_known_data
from .numbers import ReadOptions
from .stored import StoredImage

log = logging.getLogger(__name__)

# Demuxers of single files. Playlists and the like, which open other files and addresses, are not among them.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,asf,flv,ogg,mxf,dv,nut,yuv4mpegpipe,h264,hevc,ivf"
)
STREAMED = f"{CONTAINERS},mjpeg,mpjpeg"  # that a pipe carries
# An address is the user's own; what is behind it may name further addresses, but no files.
REMOTE = f"{STREAMED},rtsp,sdp,rtp,hls"
PROTOCOLS = "http,https,httpproxy,tls,tcp,udp,rtp,rtsp,rtmp,rtmps,rtmpt,srt,crypto"
JUMP = 1  # seconds that times go back, from which on they start anew
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # codec → FFmpeg's decoder of its alpha
WAITS = 0.5, 8.0  # seconds before a lost connection is tried again: the first, and the longest of those twice as long


class VideoError(DeployError):
    """A video that cannot be labelled, which does not stop the others."""


def is_video(path: Path) -> bool:
    """By its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


@dataclass(frozen=True)
class Sent:
    """What a connection has sent: how many packets, and the checksum of them all."""

    packets: int = 0
    checksum: int = 0

    def and_then(self, packet: Any) -> "Sent":
        return Sent(self.packets + 1, zlib.crc32(packet, self.checksum))


class VideoReader:
    """The frames of a video file, a camera or an address, and what was wrong with them.

    Attributes:
        av: the library.
        source: file or address.
        stream: of moving pictures, that players show.
        time_base: of the frames' times, in seconds.
        rate: frames a second, about.
        stopped: why no more could be read, where that was not the end.
        abandoned: a thread reads it still, so that it cannot be closed.
        reconnected: how often a connection that was lost was opened again.
        leave: set, a lost connection is not waited for.
    """

    def __init__(self, av: Any, container: Any, source: Path | Address, card: ModelCard, options: ReadOptions) -> None:
        self.av, self.source, self.card, self.options = av, source, card, options
        self._container = container
        self._said: set[str] = set()
        self.stream = pictures_of(av, container)
        self._decoder = self._decoder_of(self.stream)
        self.time_base: Fraction = self.stream.time_base
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate: Fraction = rate if rate and 0 < rate <= 1000 else Fraction(25)
        self._broken: list[str] = []  # when, and why
        self.stopped: str | None = None
        self._end: Fraction | None = None  # of the last frame, in seconds
        self._fit: Fit | None = None
        self.abandoned = False
        self.reconnected = 0
        self.leave = threading.Event()
        self._ticks = Fraction(1)  # of the frames' times, in one of the connection's
        self._until: float | None = None  # when a lost connection is given up; None: it has given a frame
        self._sent = self._sent_before = Sent()  # by this connection, and by the one before

    @classmethod
    @contextmanager
    def open(
        cls, source: Path | Address, card: ModelCard, options: ReadOptions, stdin: StandardInput | None = None
    ) -> Iterator["VideoReader"]:
        """Raises VideoError, and MisuseError where the options are not of videos."""
        if card.channels not in (1, 3):
            raise VideoError(f"{source} has frames of colours; this model takes {card.channels} channels")
        if (options.input_range or card.range) == PERCENTILE:
            raise MisuseError(
                f"--input-range percentile would give each frame of {source} another range; name two numbers: LO,HI"
            )
        try:
            av = need("av", "video")
        except DeployError as error:
            raise VideoError(f"{source}: {error}") from error
        try:
            container = _opened(av, source, stdin)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            if isinstance(source, Address):
                raise VideoError(f"cannot read {source} as a video: {reason}; is it there, and a video?") from error
            raise VideoError(f"cannot read {source} as a video: {reason}; is it damaged or truncated?") from error
        readers: list[VideoReader] = []
        try:
            if pictures_of(av, container) is None:
                others = len(container.streams)
                what = f"only {others} other stream{'s' if others > 1 else ''}" if others else "and no stream at all"
                raise VideoError(f"{source} has no moving pictures, {what}; remove it")
            reader = cls(av, container, source, card, options)
            readers.append(reader)
            reader._check_size(reader.stream.codec_context.width, reader.stream.codec_context.height)
            reader._say_which()
            yield reader
        finally:
            if not any(reader.abandoned for reader in readers):
                (readers[0]._container if readers else container).close()

    def frames(self, times: dict[str, float], skip: int = 0) -> Iterator[Any]:
        """Frames with a time each, rising. Adds the seconds of decoding to `times["read"]`.

        Args:
            skip: so many are left out, as an earlier run has labelled them.

        Raises:
            VideoError: a frame of more pixels than allowed, or of colours that are not read.
        """
        last = None
        ahead = 0  # ticks, by which times that start anew are set off
        step = max(1, round(1 / (self.rate * self.time_base)))
        live = isinstance(self.source, Address) and self.source.live
        told, fell = 0, False  # the time that the frame before was given, and whether it was before the last
        decoded, connection, arrived = self._decoded(), 0, time.monotonic()
        while True:
            started = time.perf_counter()
            frame = next(decoded, None)
            times["read"] += time.perf_counter() - started
            if frame is None:
                return
            before, arrived = arrived, time.monotonic()
            self._check_size(frame.width, frame.height)
            if frame.pts is None:
                frame.pts = 0 if last is None else last + step - ahead
            elif self._ticks != 1:
                frame.pts = round(frame.pts * self._ticks)
            if connection != self.reconnected:  # the clock is another; what was missed leaves its gap
                connection = self.reconnected
                if last is not None:
                    ahead = last + max(step, round((arrived - before) / self.time_base)) - frame.pts
            if last is None and live:
                ahead = -frame.pts  # a camera's clock is of the day, or of its start
            pts = frame.pts + ahead
            rises, told = fell and frame.pts > told, frame.pts
            fell = False
            if last is not None and pts <= last:
                fell = True
                # A frame that is early alone is set behind the last; a clock that goes on from there has begun anew.
                if (last - pts) * self.time_base > JUMP or (rises and last - pts >= step):
                    self._say("times", f"has times that start anew at {float(last * self.time_base):.2f} s; what "
                              "follows is set after what was before")  # fmt: skip
                    ahead += last + step - pts
                    pts = last + step
                else:
                    pts = last + 1
            frame.pts = last = pts
            self._end = (last + (frame.duration or step)) * self.time_base
            for kind, remark in remarks(frame):
                self._say(kind, remark)
            if skip:
                skip -= 1
                continue
            yield frame

    def _decoder_of(self, stream: Any) -> Any:
        """What decodes a stream: its own decoder, but where VP8 and VP9 have alpha, stored apart, the one that reads
        it."""
        own = stream.codec_context
        name = WITH_ALPHA.get(own.name)
        told = stream.metadata
        if name is None or "1" not in (told.get("alpha_mode"), told.get("ALPHA_MODE")):
            return own
        if name not in self.av.codecs_available:
            self._say("alpha", f"has alpha, which PyAV reads with {name} alone, and lacks here: what it hides is "
                      "labelled too")  # fmt: skip
            return own
        decoder = self.av.CodecContext.create(name, "r")
        decoder.thread_count = 0  # as many as there are cores
        return decoder

    def _say_which(self) -> None:
        """Say which of several streams of pictures is read."""
        streams = _candidates(self.av, self._container)
        if len(streams) > 1:
            context = self.stream.codec_context
            other = next(stream.index for stream in streams if stream.index != self.stream.index)
            self._say(
                "streams",
                f"has {len(streams)} streams of pictures, of which stream {self.stream.index} ({context.name}, "
                f"{context.width}×{context.height}) is labelled, as players show it; for another: ffmpeg -i … -map "
                f"0:{other} -c copy one.mkv",
            )

    def _check_size(self, width: int, height: int) -> None:
        limit = self.options.max_pixels
        if width * height > limit:
            raise VideoError(
                f"{self.source} has frames of {width}×{height} = {width * height:,} pixels, over the limit of "
                f"{limit:,}; raise it with max_pixels= (--max-pixels) if you trust the file"
            )

    def _say(self, kind: str, remark: str) -> None:
        """Once of a video."""
        if kind not in self._said:
            self._said.add(kind)
            log.warning("%s %s", self.source, remark)

    def _decoded(self) -> Iterator[Any]:
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (self.av.error.FFmpegError, OSError) as error:
                self.stopped = error.strerror or str(error)
                packet = None  # what the decoder still holds
            if packet is not None and packet.size:
                self._sent = self._sent.and_then(packet)
            try:
                frames = self._decoder.decode(packet)
            except self.av.error.EOFError:
                return
            except (self.av.error.FFmpegError, OSError) as error:
                self._note(packet, error.strerror or str(error))
                frames = []
            for frame in frames:
                if frame.is_corrupt:
                    self._note(frame, "the picture is damaged")
                else:
                    self._until = None
                    yield with_known_data(self.av, frame)
            if packet is None:
                if not self._reopened():
                    return
                packets = self._container.demux(self.stream)

    def _reopened(self) -> bool:
        """Whether the lost connection of a live address could be opened again.

        One that gives no frame has not been; and what sends the very same again is no camera, but a file that would be
        read without end.
        """
        source, (wait, longest) = self.source, WAITS
        if not isinstance(source, Address) or not source.live or source.given == STDIN or not source.reconnect:
            return False
        if self._sent.packets and self._sent == self._sent_before:
            self.stopped = (
                "its connection closed, and sent byte for byte the same when it was opened again, as a file: "
                "--no-live reads it once"
            )
            return False
        until = self._until = self._until or time.monotonic() + source.reconnect
        self._say("lost", f"has lost its connection ({self.stopped}), which is tried again for {source.reconnect:g} s")
        while not self.leave.wait(min(wait, max(until - time.monotonic(), 0))) and time.monotonic() < until:
            wait = min(2 * wait, longest)
            try:
                container = _opened(self.av, source, None)
            except (self.av.error.FFmpegError, OSError, ValueError):
                continue
            stream = pictures_of(self.av, container)
            if stream is None:
                container.close()
                continue
            self._container.close()
            self._container, self.stream, self.stopped = container, stream, None
            self._decoder = self._decoder_of(stream)
            self._ticks = self.stream.time_base / self.time_base
            self._sent, self._sent_before = Sent(), self._sent
            self.reconnected += 1
            return True
        return False

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
            self.stopped or (whole is not None and self._end + Fraction(5, 2) / self.rate < whole)
        ):
            of = "" if whole is None else f" of {float(whole):.2f} s"
            said.append(f"it ends at {float(self._end):.2f} s{of}{f' ({self.stopped})' if self.stopped else ''}")
        elif self.stopped:
            said.append(self.stopped)
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
        """A frame upright, [H, W, C] of the card's dtype; a MaskedArray where there is no data.

        Raises VideoError, MisuseError.
        """
        try:
            pixels, alpha = pixels_of(frame, self.card.channels), alpha_of(frame)
        except DeployError as error:
            raise VideoError(f"{self.source}: {error}") from error
        path: Any = self.source
        colours = "RGB" if self.card.channels == 3 else "grey"
        size = (pixels.shape[0], pixels.shape[1])
        if alpha is not None:
            pixels = np.concatenate([pixels, alpha], axis=2)
        stored = StoredImage(
            path, size, lambda top, bottom, *sides: pixels[top:bottom, slice(*sides)], colours=colours,
            alpha=None if alpha is None else self.card.channels,
        )  # fmt: skip
        if self._fit is None:
            self._fit = fit_of(stored, self.card, self.options)
        return replace(self._fit, stored=stored).read(0, size[0], 0, size[1])

    def aspect(self, frame: Any) -> Fraction | None:
        """Of a pixel of the upright frame: its width over its height; None: not told."""
        ratio: Fraction | None = self.stream.sample_aspect_ratio
        if not ratio:
            return None
        return 1 / ratio if display_matrix(frame)[0] == 0 else ratio


def pictures_of(av: Any, container: Any) -> Any:
    """The stream of pictures that players show: the first that the file calls its default, else the first; None where
    there is none."""
    streams = _candidates(av, container)
    default = av.stream.Disposition.default
    return next((stream for stream in streams if stream.disposition & default), streams[0] if streams else None)


def _candidates(av: Any, container: Any) -> list[Any]:
    """The streams of pictures that are not covers, as music and films carry them."""
    cover = av.stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def _opened(av: Any, source: Path | Address, stdin: StandardInput | None) -> Any:
    """PyAV's container. Raises its errors, OSError and ValueError."""
    if isinstance(source, Path):
        return av.open(str(source), options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS})
    if source.given == STDIN:
        return av.open(stdin or StandardInput(), mode="r", options={"format_whitelist": STREAMED})
    if source.is_device:
        return av.open(source.given, format="v4l2", timeout=SECONDS)
    options = {"protocol_whitelist": PROTOCOLS, "format_whitelist": REMOTE, "rtsp_flags": "prefer_tcp"}
    if not source.live and source.reconnect:  # a file over HTTP goes on at the byte where it was lost
        options |= {"reconnect": "1", "reconnect_delay_max": str(math.ceil(source.reconnect))}
    return av.open(source.given, options=options, timeout=SECONDS)

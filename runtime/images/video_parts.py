"""Videos written in parts that are kept until all are there, so that a run that was ended can be gone on with.

A part is a run of frames of one size, in a file of its own (NUT, whose times are exact) that can be decoded by itself:
parts joined are the same whether one run has written them or several. A file of lines beside them says which are
complete.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..files import WriteError, replacing, write_error

PART = 50  # frames at most: what is labelled again where a run was ended
MOST_TICKS = 65535  # of a second, for MPEG-4
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Part:
    """Frames of one size that are done: how many, and the times of the first and the last, in ticks."""

    size: Size
    frames: int
    first: int
    last: int


def _line(part: Part) -> str:
    return json.dumps([*part.size, part.frames, part.first, part.last])


class VideoParts:
    """The label video of a source, and its overlay where wanted.

    Args:
        av: the library.
        folder: for the parts, beside the outputs.
        identity: of what they are made of and by: parts of another are dropped.
        card: of the network.
        kinds: of videos: `labels`, and `overlay`.
        tick: of the frames' times, in seconds.
        rate: frames a second, about.

    Attributes:
        done: parts that are complete, in order; first those of an earlier run.
    """

    def __init__(
        self, av: Any, folder: Path, identity: Mapping[str, str], card: ModelCard, kinds: Sequence[str],
        tick: Fraction, rate: Fraction,
    ) -> None:  # fmt: skip
        self._av, self._folder, self._card, self._kinds = av, folder, card, tuple(kinds)
        self._tick, self._rate = tick, rate
        self._list = folder / "parts.jsonl"
        self._identity = json.dumps({**identity, "av": av.__version__, "part": PART, "kinds": ",".join(kinds)})
        self.done: list[Part] = self._kept()
        self._start: int | None = self.done[0].first if self.done else None
        self._open: _OpenPart | None = None
        self._begun = False

    def _kept(self) -> list[Part]:
        """Complete parts of an earlier run of the same."""
        parts: list[Part] = []
        try:
            identity, *lines = self._list.read_text().splitlines()
            if identity != self._identity:
                return []
            for index, line in enumerate(lines):
                height, width, frames, first, last = map(int, json.loads(line))
                if not all(path.is_file() for path in self._paths(index).values()):
                    break
                parts.append(Part((height, width), frames, first, last))
        except (OSError, ValueError, TypeError):
            pass  # none; or the last line was being written
        return parts

    def _paths(self, index: int) -> dict[str, Path]:
        return {kind: self._folder / f"{index:06}.{kind}.nut" for kind in self._kinds}

    @property
    def frames(self) -> int:
        """That are in complete parts."""
        return sum(part.frames for part in self.done)

    def sizes(self) -> dict[Size, int]:
        """Frames of each size, in the order in which they came first."""
        counts: dict[Size, int] = {}
        for part in self.done:
            counts[part.size] = counts.get(part.size, 0) + part.frames
        return counts

    def write(self, labels: NDArray[Any], picture: Any, pts: int, aspect: Fraction | None) -> None:
        """Add a frame.

        Args:
            labels: [H, W].
            picture: its overlay, as a frame of H.264's colours; None where that is not among the kinds.
            pts: its time.
            aspect: a pixel's width over its height; None: not known.

        Raises:
            WriteError
        """
        size = (labels.shape[0], labels.shape[1])
        if self._open is not None and (self._open.size != size or self._open.frames == PART):
            self.complete()
        if self._open is None:
            self._start = pts if self._start is None else self._start
            self._begin()
            self._open = _OpenPart(self._av, self._paths(len(self.done)), self._card, size)
            self._open.start(self._tick, self._rate, aspect)
        kind = "gray" if labels.dtype == np.uint8 else "gray16le"
        frames = {"labels": self._av.VideoFrame.from_ndarray(labels, format=kind), "overlay": picture}
        assert self._start is not None, "set with the first frame"
        self._open.write([frames[kind] for kind in self._kinds], pts, (pts - self._start) * self._tick)

    def _begin(self) -> None:
        """Make the folder, and the list of what is kept, which may end in half a line."""
        if self._begun:
            return
        self._begun = True
        if not self.done:
            shutil.rmtree(self._folder, ignore_errors=True)
        with replacing(self._list) as temporary:
            temporary.write_text("\n".join([self._identity, *map(_line, self.done)]) + "\n")

    def complete(self) -> None:
        """End the part that is being written, if there is one. Raises WriteError."""
        if self._open is None:
            return
        part, self._open = self._open, None
        self.done.append(part.finish())
        try:
            with self._list.open("a") as file:
                file.write(_line(self.done[-1]) + "\n")
        except OSError as error:
            raise write_error(self._list, error) from error

    def join(self, size: Size, outputs: Mapping[str, Path]) -> None:
        """Write the frames of a size to a file of each kind, which appears when it is whole. Raises WriteError."""
        for kind, path in outputs.items():
            parts = [self._paths(index)[kind] for index, part in enumerate(self.done) if part.size == size]
            with replacing(path) as temporary, _writing(self._av, path):
                self._join(parts, temporary, self._card if kind == "labels" else None)

    def _join(self, parts: Sequence[Path], path: Path, card: ModelCard | None) -> None:
        av, joined = self._av, None
        with av.open(str(path), "w", format="mp4" if card is None else "matroska") as container:
            if card is not None:
                container.metadata["fcn_deploy.card"] = card.to_json()
            for part in parts:
                with av.open(str(part), format="nut") as source:
                    stream = source.streams.video[0]
                    joined = joined or container.add_stream_from_template(stream)
                    offset = round(self.done[0].first * self._tick / stream.time_base)
                    for packet in source.demux(stream):
                        if packet.size:
                            packet.pts += offset
                            packet.dts = packet.pts  # no frame is stored out of its order
                            packet.stream = joined
                            container.mux(packet)

    def leave(self) -> None:
        """Close what is open; complete parts stay for a later run."""
        if self._open is not None:
            part, self._open = self._open, None
            part.abandon()

    def drop(self) -> None:
        """Remove the parts."""
        self.leave()
        shutil.rmtree(self._folder, ignore_errors=True)


class _OpenPart:
    """A part that is being written, with a file of each kind. All raise WriteError."""

    def __init__(self, av: Any, paths: Mapping[str, Path], card: ModelCard, size: Size) -> None:
        self.size, self.frames = size, 0
        self._av, self._paths, self._card = av, paths, card
        self._first = self._last = 0
        self._stack = ExitStack()
        self._outputs: list[tuple[Path, Any, Any]] = []  # path, container, stream
        self._ticks: list[int] = []  # of the last frame in each

    def start(self, tick: Fraction, rate: Fraction, aspect: Fraction | None) -> None:
        """Open the files."""
        try:
            for kind, path in self._paths.items():
                temporary = self._stack.enter_context(replacing(path))
                with _writing(self._av, path):
                    container = self._av.open(str(temporary), "w", format="nut")
                self._stack.callback(self._close, container, path)
                with _writing(self._av, path):
                    card = self._card if kind == "labels" else None
                    stream = _encoder(self._av, container, self.size, card, tick, rate, aspect)
                self._outputs.append((path, container, stream))
                self._ticks.append(-1)
        except BaseException:
            self.abandon()
            raise

    def _close(self, container: Any, path: Path) -> None:
        with _writing(self._av, path):
            container.close()

    def write(self, frames: Sequence[Any], pts: int, time: Fraction) -> None:
        """A frame of each kind, `time` seconds after the video's first."""
        for index, (frame, (path, container, stream)) in enumerate(zip(frames, self._outputs, strict=True)):
            base = stream.codec_context.time_base
            # At least a tick later, where the format tells times less finely.
            self._ticks[index] = max(round(time / base), self._ticks[index] + 1)
            frame.pts, frame.time_base = self._ticks[index], base
            with _writing(self._av, path):
                container.mux(stream.encode(frame))
        self._first = self._first if self.frames else pts
        self._last = pts
        self.frames += 1

    def finish(self) -> Part:
        """Close the files, which have their names then."""
        try:
            for path, container, stream in self._outputs:
                with _writing(self._av, path):
                    container.mux(stream.encode(None))
        except BaseException:
            self.abandon()
            raise
        self._stack.close()
        return Part(self.size, self.frames, self._first, self._last)

    def abandon(self) -> None:
        """Close the files and leave none."""
        given_up = _GivenUpError()
        with suppress(_GivenUpError, WriteError):
            self._stack.__exit__(type(given_up), given_up, None)


class _GivenUpError(Exception):
    """Makes what is open close and be removed."""


def _encoder(
    av: Any, container: Any, size: Size, card: ModelCard | None, tick: Fraction, rate: Fraction, aspect: Fraction | None
) -> Any:
    """A stream of a container: labels, or an overlay for None."""
    height, width = size
    if card is not None:
        stream = container.add_stream("ffv1", rate=rate, options={"slicecrc": "1"})
        stream.pix_fmt = "gray" if card.label_dtype == "uint8" else "gray16le"
    else:
        height, width = height + height % 2, width + width % 2
        if "libx264" in av.codecs_available:
            # Frames in their order, so that parts can be joined whatever their times.
            options = {"crf": "20", "preset": "veryfast", "bf": "0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
        else:
            stream = container.add_stream("mpeg4", rate=rate, options={"qscale": "3"})
            tick = max(tick, Fraction(1, MOST_TICKS))
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = 1  # BT.709, as its frames are made
    stream.width, stream.height = width, height
    stream.codec_context.time_base = tick
    if aspect is not None:
        stream.codec_context.sample_aspect_ratio = aspect
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

"""The tiles and strips of a TIFF's page: read where a region needs them, decoded by all cores, and ahead of reading."""

import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError

WHOLE_PIXELS = 64_000_000  # of an image that can be decoded at once only
MOST_DECODERS = 8
AHEAD = 32  # tiles or strips in work at once
PIXELS_AHEAD = 1 << 24  # in work before they are asked for, at most


@cache
def _decoders() -> ThreadPoolExecutor | None:
    """The threads that decode for all files; None where there is one core."""
    cores = os.cpu_count() or 1
    return None if cores == 1 else ThreadPoolExecutor(min(cores, MOST_DECODERS), thread_name_prefix="tiff")


os.register_at_fork(after_in_child=_decoders.cache_clear)  # a forked process has none of its parent's threads


class Chunks:
    """Decodes the tiles or strips of a page that a region needs, and keeps those which regions beside it need too.

    While whoever reads regions one after the other works on one, those that the next will need are decoded.
    """

    def __init__(self, path: Path, page: Any, key: Any) -> None:
        self.path, self.page, self.key = path, page, key
        self.size: tuple[int, int] = (key.imagelength, key.imagewidth)
        self.separate = key.planarconfig == 2 and key.samplesperpixel > 1
        self.planes = key.samplesperpixel if self.separate else 1
        if key.is_tiled:
            self.high, self.wide = key.tilelength, key.tilewidth
        else:
            self.high, self.wide = min(key.rowsperstrip, key.imagelength), key.imagewidth
        most = max(4 * self.size[0] * self.size[1], WHOLE_PIXELS)
        if self.high < 1 or self.wide < 1 or self.high * self.wide > most:
            raise DeployError(f"{path} has tiles of {self.high}×{self.wide} pixels; write it again")
        self.rows, self.columns = -(-self.size[0] // self.high), -(-self.size[1] // self.wide)
        self.decoded: dict[int, NDArray[Any] | Future[NDArray[Any]]] = {}
        self._before: tuple[int, int, int, int] | None = None  # the region that was read last
        self.mapped: NDArray[Any] | None = None
        self.tables = None if page is None else page.jpegtables  # read from the file now, not by threads
        self._plain = None if page is None or int(key.compression) != 1 else _mapped(page)
        if page is None:  # an OME file may leave out planes
            return
        if page.is_memmappable:
            dtype = np.dtype(key.parent.byteorder + key.dtype.char)
            bands = key.samplesperpixel
            shape = (bands, *self.size) if self.separate else (*self.size, bands)
            found: NDArray[Any] = np.memmap(
                page.parent.filehandle.path, dtype, "r", offset=page.dataoffsets[0], shape=shape
            )
            self.mapped = found.transpose(1, 2, 0) if self.separate else found
        elif len(page.dataoffsets) < self.rows * self.columns * self.planes:
            # One run of pixels that is said to be a single strip, or a table that was cut off.
            raise DeployError(
                f"{path} lists {len(page.dataoffsets)} of its {self.rows * self.columns * self.planes} tiles; "
                "is it truncated?"
            )

    def read(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        if self.mapped is not None:
            return self.mapped[top:bottom, left:right]
        if self.page is None:
            return np.zeros((bottom - top, right - left, self.key.samplesperpixel), self.key.dtype)
        out = np.empty((bottom - top, right - left, self.key.samplesperpixel), self.key.dtype)
        places = self._places(top, bottom, left, right)
        keep = self._plain is None and (bottom - top, right - left) != self.size
        first, end = top // self.high, -(-bottom // self.high)
        # Regions come row after row.
        for index in [i for i in self.decoded if not first <= i // self.columns % self.rows < end]:
            del self.decoded[index]
        for (plane, row, column), chunk in zip(places, self._chunks(places, keep), strict=True):
            y, x = row * self.high, column * self.wide
            a, b = max(top, y), min(bottom, y + self.high)
            c, d = max(left, x), min(right, x + self.wide)
            into = out[a - top : b - top, c - left : d - left]
            (into[:, :, plane : plane + 1] if self.separate else into)[:] = chunk[a - y : b - y, c - x : d - x]
        if keep:
            self._look_ahead(top, bottom, left, right)
        return out

    def _places(self, top: int, bottom: int, left: int, right: int) -> list[tuple[int, int, int]]:
        """(plane, row, column) of the tiles or strips of a region."""
        down = range(top // self.high, -(-bottom // self.high))
        across = range(left // self.wide, -(-right // self.wide))
        return [(plane, row, column) for plane in range(self.planes) for row in down for column in across]

    def _chunks(self, places: Sequence[tuple[int, int, int]], keep: bool) -> Iterator[NDArray[Any]]:
        """The tiles or strips at (plane, row, column) in order; where that is work, decoded by all cores."""
        indices = [self._index(place) for place in places]
        for start in range(0, len(indices), AHEAD):
            batch = indices[start : start + AHEAD]
            chunks = [self._begun(index) for index in batch]
            for place, index in enumerate(batch):
                chunk, chunks[place] = chunks[place], None
                chunk = chunk.result() if isinstance(chunk, Future) else chunk
                assert chunk is not None, "each is taken once"
                if keep:
                    self.decoded[index] = chunk
                yield chunk

    def _index(self, place: tuple[int, int, int]) -> int:
        plane, row, column = place
        index: int = (plane * self.rows + row) * self.columns + column
        return index

    def _begun(self, index: int) -> "NDArray[Any] | Future[NDArray[Any]] | None":
        """A tile or strip, decoded or in work."""
        if (known := self.decoded.get(index)) is not None:
            return known
        data = self._stored(index)  # the file has one position: it is read here, and decoded there
        pool = None if data is None or int(self.key.compression) == 1 else _decoders()
        return self._decode(index, data) if pool is None else pool.submit(self._decode, index, data)

    def _look_ahead(self, top: int, bottom: int, left: int, right: int) -> None:
        """Begin to decode what the next region needs, where regions were read side by side, row after row."""
        before, self._before = self._before, (top, bottom, left, right)
        if before is None or int(self.key.compression) == 1 or _decoders() is None:
            return
        beside = before[:2] == (top, bottom) and before[2] < left <= before[3]
        below = before[0] < top <= before[1] and before[3] == self.size[1] and left == 0
        if not beside and not below:
            return
        if right < self.size[1]:
            coming = top, bottom, right, min(2 * right - left, self.size[1])
        else:
            coming = bottom, min(2 * bottom - top, self.size[0]), 0, right - left
        places = [place for place in self._places(*coming) if self._index(place) not in self.decoded]
        for place in places[: min(AHEAD, PIXELS_AHEAD // (self.high * self.wide))]:
            try:
                begun = self._begun(self._index(place))
            except DeployError:  # told when it is asked for
                return
            if isinstance(begun, Future):
                self.decoded[self._index(place)] = begun

    def _stored(self, index: int) -> "bytes | memoryview | None":
        """The bytes of one tile or strip; None where it is left out."""
        with self._telling(index) as rows:
            offset, count = self.page.dataoffsets[index], self.page.databytecounts[index]
            if not count:
                return None
            if self._plain is not None:
                if offset + count > len(self._plain):
                    raise DeployError(f"{self.path} is truncated: {rows} are not there; copy it again")
                return self._plain[offset : offset + count]
            self.page.parent.filehandle.seek(offset)
            data: bytes = self.page.parent.filehandle.read(count)
            if len(data) < count:
                raise DeployError(f"{self.path} is truncated: {rows} are not there; copy it again")
        return data

    def _decode(self, index: int, data: "bytes | memoryview | None") -> NDArray[Any]:
        """[h, w, samples] of one tile or strip."""
        with self._telling(index):
            if data is not None and self.separate and int(self.key.compression) == 7:
                return self._jpeg(data, index)
            chunk, _, shape = self.key.decode(data, index, jpegtables=self.tables)
        # Sparse files omit tiles that hold nothing.
        found: NDArray[Any] = np.full(shape[1:], self._nothing(), self.key.dtype) if chunk is None else chunk[0]
        return found

    @contextmanager
    def _telling(self, index: int) -> Iterator[str]:
        """What goes wrong with a tile or strip is raised as one line that names its rows, which are given."""
        row = index // self.columns % self.rows
        rows = f"rows {row * self.high} to {min((row + 1) * self.high, self.size[0]) - 1}"
        try:
            yield rows
        except DeployError:
            raise
        except Exception as error:  # decoders raise whatever they meet in a hostile file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            remedy = "pip install 'fcn-deploy[tiff]'" if "imagecodecs" in reason else "is it damaged?"
            raise DeployError(f"cannot read {rows} of {self.path}: {reason}; {remedy}") from error

    def _jpeg(self, data: "bytes | memoryview", index: int) -> NDArray[Any]:
        """[h, w, 1] of one plane's JPEG, which is grey whatever the colours of the planes are together."""
        from imagecodecs import jpeg_decode

        row = index // self.columns % self.rows
        high = self.high if self.key.is_tiled else min(self.high, self.size[0] - row * self.high)
        chunk: NDArray[Any] = jpeg_decode(
            bytes(data), tables=self.tables, bitspersample=self.key.bitspersample, shape=(high, self.wide)
        )
        return chunk.reshape(*chunk.shape[:2], 1)

    def _nothing(self) -> Any:
        """What tiles that are left out hold: the no-data value, where it is one of the type, or 0."""
        value, kind = self.key.nodata, self.key.dtype.kind
        if kind in "ui" and not np.iinfo(self.key.dtype).min <= value <= np.iinfo(self.key.dtype).max:
            return 0
        return value


def _mapped(page: Any) -> memoryview | None:
    """The file of a page, mapped, so that what is stored as it is need not be copied; None where that cannot be."""
    try:
        with Path(page.parent.filehandle.path).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return None

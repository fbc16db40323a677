"""The tiles and strips of a TIFF's page: read where a region needs them, and decoded by all cores."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError

WHOLE_PIXELS = 64_000_000  # of an image that can be decoded at once only
PARALLEL_PIXELS = 1 << 19  # of a region, from which on several threads are worth their start
MOST_DECODERS = 8
AHEAD = 32  # tiles or strips in work at once


class Chunks:
    """Decodes the tiles or strips of a page that a region needs, and keeps those which regions beside it need too."""

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
        self.decoded: dict[int, NDArray[Any]] = {}
        self.mapped: NDArray[Any] | None = None
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
        first, end = top // self.high, -(-bottom // self.high)
        keep = (bottom - top, right - left) != self.size
        # Regions come row after row.
        for index in [i for i in self.decoded if not first <= i // self.columns % self.rows < end]:
            del self.decoded[index]
        across = range(left // self.wide, -(-right // self.wide))
        places = [(p, row, column) for p in range(self.planes) for row in range(first, end) for column in across]
        for (plane, row, column), chunk in zip(places, self._chunks(places, keep), strict=True):
            y, x = row * self.high, column * self.wide
            a, b = max(top, y), min(bottom, y + self.high)
            c, d = max(left, x), min(right, x + self.wide)
            into = out[a - top : b - top, c - left : d - left]
            (into[:, :, plane : plane + 1] if self.separate else into)[:] = chunk[a - y : b - y, c - x : d - x]
        return out

    def _chunks(self, places: Sequence[tuple[int, int, int]], keep: bool) -> Iterator[NDArray[Any]]:
        """The tiles or strips at (plane, row, column) in order; where that is work, decoded by all cores."""
        indices = [(plane * self.rows + row) * self.columns + column for plane, row, column in places]
        cores = os.cpu_count() or 1
        if cores == 1 or len(indices) * self.high * self.wide < PARALLEL_PIXELS or int(self.key.compression) == 1:
            for index in indices:
                yield self._kept(index, self._decode(index, self._stored(index)), keep)
            return
        with ThreadPoolExecutor(min(cores, MOST_DECODERS), thread_name_prefix="tiff") as pool:
            for start in range(0, len(indices), AHEAD):
                batch = indices[start : start + AHEAD]
                # The file has one position: it is read here, and decoded there.
                jobs = [pool.submit(self._decode, index, self._stored(index)) for index in batch]
                for index, job in zip(batch, jobs, strict=True):
                    yield self._kept(index, job.result(), keep)

    def _stored(self, index: int) -> bytes | None:
        """The bytes of one tile or strip; None where it is left out, or decoded already."""
        if index in self.decoded:
            return None
        with self._telling(index) as rows:
            offset, count = self.page.dataoffsets[index], self.page.databytecounts[index]
            if not count:
                return None
            self.page.parent.filehandle.seek(offset)
            data: bytes = self.page.parent.filehandle.read(count)
            if len(data) < count:
                raise DeployError(f"{self.path} is truncated: {rows} are not there; copy it again")
        return data

    def _decode(self, index: int, data: bytes | None) -> NDArray[Any]:
        """[h, w, samples] of one tile or strip."""
        if (known := self.decoded.get(index)) is not None:
            return known
        with self._telling(index):
            if data is not None and self.separate and int(self.key.compression) == 7:
                return self._jpeg(data, index)
            chunk, _, shape = self.key.decode(data, index, jpegtables=self.page.jpegtables)
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

    def _kept(self, index: int, chunk: NDArray[Any], keep: bool) -> NDArray[Any]:
        if keep:
            self.decoded[index] = chunk
        return chunk

    def _jpeg(self, data: bytes, index: int) -> NDArray[Any]:
        """[h, w, 1] of one plane's JPEG, which is grey whatever the colours of the planes are together."""
        from imagecodecs import jpeg_decode

        row = index // self.columns % self.rows
        high = self.high if self.key.is_tiled else min(self.high, self.size[0] - row * self.high)
        chunk: NDArray[Any] = jpeg_decode(
            data, tables=self.page.jpegtables, bitspersample=self.key.bitspersample, shape=(high, self.wide)
        )
        return chunk.reshape(*chunk.shape[:2], 1)

    def _nothing(self) -> Any:
        """What tiles that are left out hold: the no-data value, where it is one of the type, or 0."""
        value, kind = self.key.nodata, self.key.dtype.kind
        if kind in "ui" and not np.iinfo(self.key.dtype).min <= value <= np.iinfo(self.key.dtype).max:
            return 0
        return value

"""The tiles and strips of a TIFF's page: read where a region needs them, and decoded by all cores."""

import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError

WHOLE_PIXELS = 64_000_000  # of an image that can be decoded at once only
LERC = 34887  # the compression
MOST_DECODERS = 8
ORIENTATION = 274  # the tag, of TIFF and EXIF
SIDEWAYS = (5, 6, 7, 8)  # its values that exchange rows and columns
AHEAD = 32  # tiles or strips in work at once
KEPT_BYTES = 1 << 25  # of decoded tiles or strips; more where a row of regions needs more
LOOKED_AT = 2  # times as many of lossy ones, of which a look at the margins decodes most before they are read


@cache
def _decoders() -> ThreadPoolExecutor | None:
    """The threads that decode for all files; None where there is one core."""
    cores = os.cpu_count() or 1
    return None if cores == 1 else ThreadPoolExecutor(min(cores, MOST_DECODERS), thread_name_prefix="tiff")


os.register_at_fork(after_in_child=_decoders.cache_clear)  # a forked process has none of its parent's threads


class Chunks:
    """Decodes the tiles or strips of a page that a region needs, and keeps those which regions beside it need too.

    Args:
        path: of the file.
        page: whose tiles or strips they are; None: it was left out, and is 0.
        key: the page whose tags hold.
        kept: bytes that are kept decoded; more where the rows of a region need more.
    """

    def __init__(self, path: Path, page: Any, key: Any, kept: int | None = None) -> None:
        self.path, self.page, self.key = path, page, key
        self.size: tuple[int, int] = (key.imagelength, key.imagewidth)
        self.separate = key.planarconfig == 2 and key.samplesperpixel > 1
        self.planes = key.samplesperpixel if self.separate else 1
        self.high, self.wide = chunk_size(key)
        most = max(4 * self.size[0] * self.size[1], WHOLE_PIXELS)
        if self.high < 1 or self.wide < 1 or self.high * self.wide > most:
            raise DeployError(f"{path} has tiles of {self.high}×{self.wide} pixels; write it again")
        self.sideways = key.tags.valueof(ORIENTATION, 1) in SIDEWAYS  # its columns are the image's rows
        self.rows, self.columns = -(-self.size[0] // self.high), -(-self.size[1] // self.wide)
        self.decoded: dict[int, NDArray[Any]] = {}  # those used last are the last
        each = self.high * self.wide * key.samplesperpixel // self.planes * key.dtype.itemsize
        self._most = (KEPT_BYTES if kept is None else kept) // each
        self.mapped: NDArray[Any] | None = None
        self.tables = page.jpegtables  # read from the file now, not by threads
        self._plain = _mapped(page) if in_place(page) else None
        self.compressed_again = key.tags.valueof(50674, (4, 0))[1]  # LercParameters; read now too
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
        bands, shape = self.key.samplesperpixel, (bottom - top, right - left)
        # Planes stay planes in memory: they are wanted one by one.
        out = np.empty((bands, *shape), self.key.dtype).transpose(1, 2, 0) if self.separate else None
        out = np.empty((*shape, bands), self.key.dtype) if out is None else out
        places = self._places(top, bottom, left, right)
        keep = self._plain is None and shape != self.size
        indices = list(map(self._index, places))
        if keep:
            first, end, side = (left, right, self.wide) if self.sideways else (top, bottom, self.high)
            self._forget(indices, first // side, -(-end // side))
        for (plane, row, column), chunk in zip(places, self._chunks(indices, keep), strict=True):
            y, x = row * self.high, column * self.wide
            a, b = max(top, y), min(bottom, y + self.high)
            c, d = max(left, x), min(right, x + self.wide)
            into = out[a - top : b - top, c - left : d - left]
            (into[:, :, plane : plane + 1] if self.separate else into)[:] = chunk[a - y : b - y, c - x : d - x]
        return out

    def _forget(self, indices: Sequence[int], first: int, end: int) -> None:
        """Make room for those of these indices, which lie in the tiles or strips of rows `first` to `end`.

        All of these rows are kept, as regions come row after row, and of others those used last; columns, where the
        image is stored sideways.
        """
        most = max(self._most, (end - first) * (self.rows if self.sideways else self.columns) * self.planes)
        if len(self.decoded) + len(indices) <= most:
            return
        coming = sum(index not in self.decoded for index in indices)

        def row_of(index: int) -> int:
            return index % self.columns if self.sideways else index // self.columns % self.rows

        others = [index for index in self.decoded if not first <= row_of(index) < end]
        for index in others[: max(len(self.decoded) + coming - most, 0)]:
            del self.decoded[index]

    def _places(self, top: int, bottom: int, left: int, right: int) -> list[tuple[int, int, int]]:
        """(plane, row, column) of the tiles or strips of a region."""
        down = range(top // self.high, -(-bottom // self.high))
        across = range(left // self.wide, -(-right // self.wide))
        return [(plane, row, column) for plane in range(self.planes) for row in down for column in across]

    def _index(self, place: tuple[int, int, int]) -> int:
        plane, row, column = place
        index: int = (plane * self.rows + row) * self.columns + column
        return index

    def _chunks(self, indices: Iterable[int], keep: bool) -> Iterator[NDArray[Any]]:
        """The tiles or strips of these indices in order; where that is work, decoded by all cores."""
        begun = ((index, self._begun(index)) for index in indices)
        in_work = deque(islice(begun, AHEAD))
        while in_work:
            index, chunk = in_work.popleft()
            chunk = chunk.result() if isinstance(chunk, Future) else chunk
            in_work.extend(islice(begun, 1))
            if keep:
                self.decoded[index] = chunk
            yield chunk

    def _begun(self, index: int) -> "NDArray[Any] | Future[NDArray[Any]]":
        """A tile or strip, decoded or in work."""
        if (known := self.decoded.pop(index, None)) is not None:
            return known
        data = self._stored(index)  # the file has one position: it is read here, and decoded there
        pool = None if data is None or int(self.key.compression) == 1 else _decoders()
        return self._decode(index, data) if pool is None else pool.submit(self._decode, index, data)

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
            if data is not None and int(self.key.compression) == LERC:
                return self._lerc(bytes(data), index)
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

        chunk: NDArray[Any] = jpeg_decode(
            bytes(data),
            tables=self.tables,
            bitspersample=self.key.bitspersample,
            shape=(self._height(index), self.wide),
        )
        return chunk.reshape(*chunk.shape[:2], 1)

    def _lerc(self, data: bytes, index: int) -> NDArray[Any]:
        """[h, w, samples] of a tile or strip of LERC: a mask says what is NaN, and bands may follow each other.

        tifffile 2026.3 leaves zeros where the mask has no value, and takes bands that follow each other for pixels.
        """
        import imagecodecs

        again = (bytes, imagecodecs.zlib_decode, imagecodecs.zstd_decode)[self.compressed_again]
        chunk, mask = imagecodecs.lerc_decode(again(data), masks=True)
        high, wide, samples = self._height(index), self.wide, 1 if self.separate else self.key.samplesperpixel
        if mask is not None and mask.ndim == 3:  # some pixels lack some bands: each band is compressed by itself
            chunk, mask = chunk.transpose(1, 2, 0), mask.transpose(1, 2, 0)
        found: NDArray[Any] = chunk.reshape(high, wide, samples)
        if mask is not None and found.dtype.kind == "f":
            found = np.where(mask.reshape(high, wide, -1), found, found.dtype.type(np.nan))
        return found

    def _height(self, index: int) -> int:
        """Rows of a tile, or of a strip, of which the last may have fewer."""
        row = index // self.columns % self.rows
        high: int = self.high if self.key.is_tiled else min(self.high, self.size[0] - row * self.high)
        return high

    def _nothing(self) -> Any:
        """What tiles that are left out hold: the no-data value, where it is one of the type, or 0."""
        value, kind = self.key.nodata, self.key.dtype.kind
        if kind in "ui" and not np.iinfo(self.key.dtype).min <= value <= np.iinfo(self.key.dtype).max:
            return 0
        return value


def chunk_size(key: Any) -> tuple[int, int]:
    """(height, width) of the tiles or strips of a page."""
    if key.is_tiled:
        return key.tilelength, key.tilewidth
    return min(key.rowsperstrip, key.imagelength), key.imagewidth


def in_place(page: Any) -> bool:
    """Whether pixels are read where they lie in the file, mapped: stored as they are, on a disk."""
    path = Path(page.parent.filehandle.path)
    return int(page.keyframe.compression) == 1 and path.is_file() and path.stat().st_size > 0


def _mapped(page: Any) -> memoryview:
    """The file of a page, mapped, so that what is stored as it is need not be copied."""
    with Path(page.parent.filehandle.path).open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

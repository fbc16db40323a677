"""Images too large to be held: TIFFs and .npy read region by region."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import DeployError
from ..planning.kept_rows import NOTHING_KEPT, KeptRows
from .fit import fit_of
from .georeference import Tag, all_tags, beside
from .header import file_kind, read_header, reading
from .numbers import COMMON, ReadOptions
from .stored import open_stored, turned_on_the_ground
from .tiff import Read

Bounds = tuple[int, int, int, int]  # top, bottom, left, right
REGION_PIXELS = 64_000_000  # files of more are not read whole
BY_SUFFIX = {  # what a file is that may have others beside it, as far as its name says
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG",
    ".png": "PNG", ".gif": "GIF", ".bmp": "BMP", ".webp": "WEBP",
    ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM",
}  # fmt: skip


class Regions:
    """An image file read where it is asked for: `image[top:bottom, left:right]` → [h, w, C] as the card says.

    One thread asks at a time, any one; what it expects is read in another.

    Args:
        shape, dtype: of the whole.
        read: (top, bottom, left, right) → a part of it.
        tags: of a TIFF, to be copied to its labels: (code, type, count, value).
        kept: in memory, beside a part that is read.
    """

    ndim = 3

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        read: Read,
        tags: tuple[Tag, ...] = (),
        kept: KeptRows = NOTHING_KEPT,
    ) -> None:
        self.shape, self.dtype, self.tags, self.kept = shape, dtype, tags, kept
        self._read, self._reading = read, threading.Lock()
        self._ahead: ThreadPoolExecutor | None = None
        self._coming: tuple[Bounds, Future[Any]] | None = None

    def __getitem__(self, where: tuple[slice, slice]) -> Any:
        bounds = self._bounds(where)
        if self._coming is not None and self._coming[0] == bounds:
            coming, self._coming = self._coming[1], None
            return coming.result()
        return self._alone(bounds)

    def expect(self, where: tuple[slice, slice], then: Callable[[NDArray[Any]], Any] = lambda part: part) -> None:
        """Begin to read a part, which is kept until it is asked for or another is expected.

        What goes wrong is raised when it is asked for. `then` makes of it, as it is read, what is given instead.
        """
        if self._coming is not None:
            self._coming[1].cancel()
        self._ahead = self._ahead or ThreadPoolExecutor(1, thread_name_prefix="regions")
        bounds = self._bounds(where)
        self._coming = bounds, self._ahead.submit(lambda: then(self._alone(bounds)))

    def close(self) -> None:
        """End reading ahead."""
        if self._ahead is not None:
            self._ahead.shutdown(cancel_futures=True)

    def _bounds(self, where: tuple[slice, slice]) -> Bounds:
        (top, bottom, _), (left, right, _) = (
            part.indices(side) for part, side in zip(where, self.shape[:2], strict=True)
        )
        return top, bottom, left, right

    def _alone(self, bounds: Bounds) -> NDArray[Any]:
        with self._reading:  # an open file has one position
            return self._read(*bounds)


def by_regions(path: str | os.PathLike[str]) -> bool:
    """Whether an image file is read region by region: a large TIFF or .npy, or a georeferenced image.

    False too where its header cannot be read: whoever reads the file says what is wrong.
    """
    path = Path(path)
    try:
        kind = file_kind(path)
        if beside(path, kind or BY_SUFFIX.get(path.suffix.lower(), "")):
            return True
        if not kind:
            return False
        header = read_header(path, sys.maxsize)
    except (DeployError, OSError):
        return False
    return header.pixels > REGION_PIXELS or header.georeferenced


@contextmanager
def open_regions(path: str | os.PathLike[str], card: ModelCard, options: ReadOptions = COMMON) -> Iterator[Regions]:
    """Open an image file (its first image) for reading by regions; all but TIFF and .npy are decoded whole.

    A region is a MaskedArray where there is no data.

    Raises:
        DeployError: not such a file, damaged, or of more pixels than `options` allow; when reading: truncated.
        MisuseError: no such file; channels or dtype that the card does not allow.
    """
    header = read_header(path, options.max_pixels, options.page)
    with open_stored(header, card, options) as stored:
        with reading(header.path):
            fit = fit_of(stored, card, options)
            tags = all_tags(header.path, header.format, stored.size, stored.tags, options.name)
        if tags and stored.turned:
            raise turned_on_the_ground(header.path)

        def read(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
            with reading(header.path):
                return fit.read(top, bottom, left, right)

        pixel, as_stored = read(0, 1, 0, 1), stored.read(0, 1, 0, 1)  # what is wrong is told before the work begins
        holes = (
            fit.no_data is not None
            or bool(stored.each_no_data)
            or stored.mask is not None
            or stored.alpha is not None
            or pixel.dtype.kind == "f"
        )
        # Beside a part that is ready: what it is made of, and later the one without holes.
        ahead = pixel.nbytes + max(as_stored.nbytes * (as_stored.dtype != pixel.dtype), pixel.nbytes * holes)
        kept = replace(stored.kept, ahead=ahead)
        with closing(Regions((*stored.size, card.channels), np.dtype(card.dtype), read, tags, kept)) as image:
            yield image

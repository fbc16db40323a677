"""Images too large to be held: TIFFs and .npy read region by region."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError
from ..model_card import ModelCard
from .georeference import Tag, all_tags, beside
from .header import file_kind, read_header, reading
from .numbers import ReadOptions
from .read import COMMON, fit_of, open_stored, turned_on_the_ground

REGION_PIXELS = 64_000_000  # files of more are not read whole
BY_SUFFIX = {  # what a file is that may have others beside it, as far as its name says
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".png": "PNG", ".gif": "GIF", ".bmp": "BMP", ".webp": "WEBP",
}  # fmt: skip


@dataclass(frozen=True)
class Regions:
    """An image file read where it is asked for: `image[top:bottom, left:right]` → [h, w, C] as the card says.

    By one thread after the other, as a file has one position.

    Attributes:
        shape, dtype: of the whole.
        tags: of a TIFF, to be copied to its labels: (code, type, count, value).
        row_bytes: of a row of what is kept, decoded, for the regions beside the one that is read; 0: nothing is kept.
        more_rows: that are kept beside a region's own, as the file has them in tiles or strips.
        for_threads: it may be read in a thread while its owner reads it, too.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    read: Callable[[int, int, int, int], NDArray[Any]]
    tags: tuple[Tag, ...] = ()
    row_bytes: int = 0
    more_rows: int = 0
    ndim: int = 3
    for_threads: bool = True

    def __getitem__(self, where: tuple[slice, slice]) -> NDArray[Any]:
        (top, bottom, _), (left, right, _) = (
            part.indices(side) for part, side in zip(where, self.shape[:2], strict=True)
        )
        return self.read(top, bottom, left, right)


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

        lock = threading.Lock()

        def read(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
            with lock, reading(header.path):
                return fit.read(top, bottom, left, right)

        read(0, 1, 0, 1)  # channels and dtype are told before the work begins
        sample = stored.read(0, 1, 0, 1)
        row = stored.size[1] * sample.shape[2] * sample.dtype.itemsize if stored.rows_beside else 0
        yield Regions((*stored.size, card.channels), np.dtype(card.dtype), read, tags, row, stored.rows_beside)

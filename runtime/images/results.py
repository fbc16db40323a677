"""Label and mask files that were written here, read again: rows at a time, as the numbers that they hold."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .georeference import Tag, own_tags
from .header import file_kind, reading
from .tiff import page_reader

STRIP_PIXELS = 1 << 24  # of the rows that are in hand at once


@dataclass(frozen=True)
class ResultFile:
    """An open file of labels, or of masks.

    Attributes:
        path: of it.
        size: (height, width) in pixels.
        maps: 1 of labels; one a class of masks.
        rows: (top, bottom) → [maps, rows, width], class indices or bool.
        tags: that say where it lies, of a TIFF.
    """

    path: Path
    size: tuple[int, int]
    maps: int
    rows: Callable[[int, int], NDArray[Any]]
    tags: tuple[Tag, ...] = ()

    def strips(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """(top, rows) of all of it, from top to bottom."""
        height, width = self.size
        step = max(1, STRIP_PIXELS // (width * self.maps))
        for top in range(0, height, step):
            yield top, self.rows(top, min(top + step, height))


@contextmanager
def open_result(path: Path) -> Iterator[ResultFile]:
    """Open a palette PNG or a TIFF. Raises DeployError where it is damaged, or MisuseError where it is not there."""
    with ExitStack() as stack:
        with reading(path):  # what goes wrong while it is open is the caller's
            opened = _open_tiff(path, stack) if file_kind(path) == "TIFF" else _open_picture(path)
        yield opened


def _open_picture(path: Path) -> ResultFile:
    from PIL import Image

    with Image.open(path) as picture:
        labels = np.asarray(picture)
    return ResultFile(path, (labels.shape[0], labels.shape[1]), 1, lambda top, bottom: labels[None, top:bottom])


def _open_tiff(path: Path, stack: ExitStack) -> ResultFile:
    import tifffile

    file = stack.enter_context(tifffile.TiffFile(path))
    page = file.pages.first.aspage()
    height, width = page.imagelength, page.imagewidth
    read = page_reader(path, page)

    def rows(top: int, bottom: int) -> NDArray[Any]:
        with reading(path):
            return read(top, bottom, 0, width).transpose(2, 0, 1)

    return ResultFile(path, (height, width), page.samplesperpixel, rows, own_tags(page))

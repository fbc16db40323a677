"""Images too large to be held: TIFFs and .npy read region by region."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError, MisuseError
from ..model_card import ModelCard
from .header import DEFAULT_MAX_PIXELS, Header, open_npy, read_header, reading
from .read import fit
from .tiff import TiffRegions

log = logging.getLogger(__name__)

REGION_PIXELS = 64_000_000  # files of more are not read whole
GEOREFERENCE = (33550, 33922, 34264, 34735, 34736, 34737)  # the tags of the GeoTIFF standard (OGC 19-008r4)
Tag = tuple[int, int, int, Any]  # of a TIFF: code, type, count, value


@dataclass(frozen=True)
class Regions:
    """An image file read where it is asked for: `image[top:bottom, left:right]` → [h, w, C] as the card says.

    Attributes:
        shape, dtype: of the whole.
        tags: of a TIFF, to be copied to its labels: (code, type, count, value).
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    read: Callable[[int, int, int, int], NDArray[Any]]
    tags: tuple[Tag, ...] = ()
    ndim: int = 3

    def __getitem__(self, where: tuple[slice, slice]) -> NDArray[Any]:
        (top, bottom, _), (left, right, _) = (
            part.indices(side) for part, side in zip(where, self.shape[:2], strict=True)
        )
        return self.read(top, bottom, left, right)


def by_regions(path: str | os.PathLike[str]) -> bool:
    """Whether an image file is read region by region: a large or georeferenced TIFF, or a large .npy.

    False too where its header cannot be read: whoever reads the file says what is wrong.
    """
    path = Path(path)
    if path.suffix.lower() not in (".npy", ".tif", ".tiff"):
        return False
    try:
        header = read_header(path, sys.maxsize)
    except DeployError:
        return False
    return header.pixels > REGION_PIXELS or header.georeferenced


@contextmanager
def open_regions(
    path: str | os.PathLike[str], card: ModelCard, max_pixels: int = DEFAULT_MAX_PIXELS
) -> Iterator[Regions]:
    """Open a TIFF (its first image) or a .npy for reading by regions.

    Raises:
        DeployError: not such a file, damaged, or of more than `max_pixels`; when reading: truncated.
        MisuseError: no such file; channels or dtype that the card does not allow.
    """
    header = read_header(path, max_pixels)
    with ExitStack() as stack:
        with reading(header.path):
            image = _open(header, card, stack)
        yield image


def _open(header: Header, card: ModelCard, stack: ExitStack) -> Regions:
    path = header.path
    tags: tuple[Tag, ...] = ()
    if header.format == "NPY":
        array = open_npy(path)

        def read(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
            return fit(array[top:bottom, left:right], card, path)
    else:
        import tifffile

        file = stack.enter_context(tifffile.TiffFile(path))
        if header.pages > 1:
            log.warning("%s holds %d images; only the first is used", path, header.pages)
        page = file.pages.first
        tags = tuple(
            (tag.code, tag.dtype, tag.count, tag.value) for tag in page.tags.values() if tag.code in GEOREFERENCE
        )
        reader = TiffRegions(path, page, card)
        if (page.imagelength, page.imagewidth) != header.size:
            raise MisuseError(f"{path} is spread over several pages, which are not read by regions; write it anew")

        def read(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
            return fit(reader.read(top, bottom, left, right), card, path)

    read(0, 1, 0, 1)  # channels and dtype are told before the work begins
    return Regions((*header.size, card.channels), np.dtype(card.dtype), read, tags)

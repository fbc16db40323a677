"""An image file's pixels, whole, as the card of a network wants them: the one reader for every use.

`open_stored` (stored.py) gives the samples as the file stores them, with what the file says of their meaning; `fit_of`
(fit.py) makes of them what a card wants; regions.py does so in parts. Whoever reads images (label-images, calibration,
training, evaluation) comes through here, so that no file is right in one and damaged in another.
"""

import os
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..pixels.no_data import filled
from .fit import fit_of
from .header import DEFAULT_MAX_PIXELS, Header, read_header, reading
from .numbers import COMMON, ReadOptions
from .pillow import open_pillow
from .sidecars import told_beside
from .stored import open_stored, parts_of


def read_image(path: str | os.PathLike[str], card: ModelCard, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[Any]:
    """Read an image file as the card wants it.

    Grey, palette, CMYK and other colour spaces become RGB (or grey, for a card of one channel); alpha is
    dropped; for a card of uint8, 16 bits become 8 by dropping the low byte, which is said aloud, and fewer than 8 are
    spread over 0 to 255;
    for others values are as stored, widened where that is exact (uint8 to uint16, int16 to float32, …); JPEGs and TIFFs
    are turned upright by their orientation; of animations and stacks the first image is taken, and a warning says so.
    `.npy` arrays and TIFFs of any bands are taken as they are.

    Returns:
        [H, W, channels] of the card's dtype; pixels that are no data are the card's mean.

    Raises:
        DeployError: not an image, truncated, or larger than `max_pixels`.
        MisuseError: no such file; channels or dtype that the card does not allow.
    """
    return filled(decode(read_header(path, max_pixels), card), card)[0]


def decode(header: Header, card: ModelCard, options: ReadOptions = COMMON) -> NDArray[Any]:
    """`read_image` of a file whose header is known already; a MaskedArray where there is no data."""
    with reading(header.path), open_stored(header, card, options) as stored:
        height, width = stored.size
        pixels = stored.read(0, height, 0, width)
        pixels = np.array(pixels) if isinstance(pixels, np.memmap) else pixels  # read now, and the caller's own
        found = fit_of(replace(stored, read=parts_of(pixels)), card, options).read(0, height, 0, width)
        return found if found.flags.c_contiguous else found.copy(order="C")


def may_have_no_data(header: Header, card: ModelCard, options: ReadOptions = COMMON) -> bool:
    """Whether some pixels of a file may be no data, as far as it can be told before they are decoded."""
    if options.no_data is not None or header.dtype.kind == "f" or told_beside(header.path):
        return True
    if header.format in ("TIFF", "GDAL"):
        with reading(header.path), open_stored(header, card) as stored:
            return stored.no_data is not None or stored.mask is not None or stored.alpha is not None
    if header.format == "NPY" or header.mode is None:
        return False
    with reading(header.path), open_pillow(header.path, header.pixels) as picture:
        return bool(picture.has_transparency_data)

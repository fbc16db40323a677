"""An image file's pixels, whole, as the card of a network wants them."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MisuseError
from ..model_card import ModelCard
from .header import DEFAULT_MAX_PIXELS, Header, open_npy, open_pillow, read_header, reading
from .tiff import read_tiff

log = logging.getLogger(__name__)


def read_image(path: str | os.PathLike[str], card: ModelCard, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[Any]:
    """Read an image file as the card wants it.

    Grey, palette, CMYK and other colour spaces become RGB (or grey, for a card of one channel); alpha is
    dropped; 16 bits become 8 by dropping the low byte; JPEGs are turned upright by their EXIF orientation;
    of animations and stacks the first image is taken, and a warning says so. `.npy` arrays and TIFFs of
    any bands are taken as they are.

    Returns:
        [H, W, channels] of the card's dtype.

    Raises:
        DeployError: not an image, truncated, or larger than `max_pixels`.
        MisuseError: no such file; channels or dtype that the card does not allow.
    """
    return decode(read_header(path, max_pixels), card)


def decode(header: Header, card: ModelCard) -> NDArray[Any]:
    """`read_image` of a file whose header is known already."""
    path = header.path
    with reading(path):
        common = card.dtype == "uint8" and card.channels in (1, 3)
        if header.format == "NPY":
            array = np.array(open_npy(path))
        elif header.format == "TIFF" and not (common and header.mode):
            array = read_tiff(path, card)
        else:
            array = _picture(header, card)
        return fit(array, card, path)


def _picture(header: Header, card: ModelCard) -> NDArray[Any]:
    """By Pillow: grey or RGB, or what it cannot turn into them soundly."""
    from PIL import ImageOps

    if header.pages > 1:
        log.warning("%s holds %d images; only the first is used", header.path, header.pages)
    with open_pillow(header.path, header.pixels) as picture:
        picture.load()
        upright = ImageOps.exif_transpose(picture)
        if upright.mode in ("I", "F"):
            return np.asarray(upright)
        if upright.mode.startswith("I;16"):
            # Pillow would clip to 255 on conversion instead of scaling.
            return np.asarray(upright).astype(np.uint16)
        return np.asarray(upright.convert("L" if card.channels == 1 else "RGB"))


def fit(array: NDArray[Any], card: ModelCard, path: Path) -> NDArray[Any]:
    """[H, W] or [H, W, C] of some dtype as [H, W, channels] of the card's, where that is sound."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        array = array[:, :, None]
        if card.channels == 3:
            array = np.repeat(array, 3, axis=2)
    if array.shape[2] != card.channels:
        raise MisuseError(f"{path} has {array.shape[2]} channels; this model takes {card.channels}")
    if array.dtype == np.int32 and card.dtype in ("uint8", "uint16") and 0 <= array.min() <= array.max() < 65536:
        array = array.astype(np.uint16)  # what Pillow makes of some 16-bit files
    if array.dtype == np.bool_ and card.dtype == "uint8":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16 and card.dtype == "uint8":
        array = (array >> 8).astype(np.uint8)
    if array.dtype != card.dtype:
        raise MisuseError(f"{path} holds {array.dtype} values; this model takes {card.dtype}: convert it first")
    return np.ascontiguousarray(array)

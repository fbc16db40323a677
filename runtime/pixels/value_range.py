"""Value ranges: which numbers of an image or a file are the network's 0 and 1."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import AnyArray, ImageSource, size_of
from ..engine_format.model_card import PERCENTILE, ModelCard
from ..errors import MisuseError

PERCENTILES = (1, 99)  # of an image's values, that become the network's 0 and 1
Range = tuple[float, float]  # LO, HI
AT_A_TIME = 1 << 18  # values that are converted, in numbers of 64 bits
SIDE = 64  # pixels: of the windows in which values are looked at
GRIDS = (4, 16, 64)  # windows a side: more of them where there is no data in fewer


def parse_range(given: object) -> Range | str:
    """`LO,HI` or two numbers as (LO, HI), or `percentile`. Raises MisuseError."""
    if given == PERCENTILE:
        return PERCENTILE
    parts: Sequence[Any] = given.split(",") if isinstance(given, str) else given if isinstance(given, tuple) else ()
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high)):
        raise MisuseError(f"input range {given!r}; write two numbers such as 0,4000, or percentile")
    if low >= high:
        raise MisuseError(f"input range {low:g},{high:g}; the first number must be below the second")
    return low, high


def limits_of(dtype: np.dtype[Any]) -> Range:
    """The least and largest of a type of numbers; infinite of floats."""
    if dtype.kind == "b":
        return 0, 1
    return (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)) if dtype.kind in "ui" else (-math.inf, math.inf)


def windows(size: tuple[int, int], grid: int) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of where values are looked at: all of a small image, or a grid of windows."""
    if size[0] * size[1] <= (grid * SIDE) ** 2:
        return [(0, size[0], 0, size[1])]
    ends = []
    for length in size:
        side = min(SIDE, length)
        starts = sorted(set(np.linspace(0, length - side, grid).astype(int).tolist()))  # np.unique imports numpy.ma
        ends.append([(start, start + side) for start in starts])
    return [(*rows, *columns) for rows in ends[0] for columns in ends[1]]


def scaled(pixels: NDArray[Any], limits: Range, wanted: np.dtype[Any]) -> NDArray[Any]:
    """Values of which LO and HI become 0 and the largest of `wanted` (clipped and rounded), or 0 and 1 of float32."""
    low, high = limits
    out = np.empty(pixels.shape, wanted)
    rows = max(1, AT_A_TIME * len(pixels) // max(1, pixels.size))
    if pixels.dtype in (np.dtype(np.uint8), np.dtype(np.uint16)) and pixels.size > 65536:
        table = scaled(np.arange(np.iinfo(pixels.dtype).max + 1, dtype=pixels.dtype), limits, wanted)
        for top in range(0, len(pixels), rows):
            np.take(table, pixels[top : top + rows], out=out[top : top + rows], mode="clip")
        return out
    for top in range(0, len(pixels), rows):
        part = (pixels[top : top + rows].astype(np.float64) - low) / (high - low)
        if wanted.kind != "f":
            part = np.rint(np.clip(np.nan_to_num(part), 0, 1) * np.iinfo(wanted).max)
        out[top : top + rows] = part
    return out


def limits_within(input_range: Range, dtype: np.dtype[Any], name: object, of_card: bool = False) -> Range:
    """The range itself, which the model's card says or its user.

    Raises MisuseError where an image of this dtype, called `name`, cannot hold it.
    """
    (low, high), (least, most) = input_range, limits_of(dtype)
    if low < least or high > most:
        said = f"this model's range is {low:g} to {high:g}" if of_card else f"input range {low:g},{high:g}"
        remedy = "; say which of them are its 0 and 1 by an input range" if of_card else "; name two of these"
        raise MisuseError(f"{said}, and {name} holds {dtype} values, {least:.0f} to {most:.0f}{remedy}")
    return low, high


def percentiles(values: NDArray[Any] | None) -> Range:
    """The limits of an image with these values that are data; None: it has none."""
    low, high = (0.0, 1.0) if values is None else (float(value) for value in np.percentile(values, PERCENTILES))
    return low, high if low < high else low + 1


class InRange:
    """An image whose numbers are brought into the card's, where it is read. It is an ImageSource.

    Args:
        image: [H, W] or [H, W, C] of any type of numbers; masked or not finite where there is no data.
        input_range: (LO, HI), or `percentile`.
        card: of the network.

    Raises:
        MisuseError: no numbers, or a range that its type cannot hold.
    """

    def __init__(self, image: ImageSource, input_range: Range | str, card: ModelCard) -> None:
        dtype = np.dtype(image.dtype)
        if dtype.kind not in "uif":
            raise MisuseError(f"image of dtype {dtype}; an input range is of numbers")
        if isinstance(image, np.ndarray) and image.ndim == 2 and card.channels == 1:
            image = image[:, :, None]
        self.shape, self.ndim, self.dtype = image.shape, image.ndim, np.dtype(card.dtype)
        self._image = image
        if isinstance(input_range, str):
            self._limits = percentiles(next((v for grid in GRIDS if (v := self._values(grid)).size), None))
        else:
            self._limits = limits_within(input_range, dtype, "the image", input_range == card.range)

    @property
    def has_holes(self) -> bool:
        """Whether pixels may have no data."""
        return isinstance(self._image, np.ma.MaskedArray) or np.dtype(self._image.dtype).kind == "f"

    def __getitem__(self, part: tuple[slice, slice], /) -> AnyArray:
        given = self._image[part]
        values, unknown = np.asarray(given), None
        if isinstance(given, np.ma.MaskedArray):
            unknown = np.ma.getmaskarray(given)
        if values.dtype.kind == "f":
            infinite = ~np.isfinite(values)
            unknown = infinite if unknown is None else unknown | infinite
        found = scaled(values, self._limits, self.dtype)
        return found if unknown is None or not unknown.any() else np.ma.MaskedArray(found, unknown)

    def _values(self, grid: int) -> AnyArray:
        """Values that are data, [n], in so many windows a side."""
        parts = [
            self._image[top:bottom, left:right] for top, bottom, left, right in windows(size_of(self._image), grid)
        ]
        known = [np.ma.MaskedArray(part).compressed() for part in parts]
        found: AnyArray = np.concatenate(known)
        return found[np.isfinite(found)]


def copied_bytes(source: ImageSource | None, card: ModelCard) -> int:
    """Bytes of the copies that are made of a whole image, where it is brought into the card's range or may have holes.

    Images that are not all there are read by parts.
    """
    ranged = isinstance(source, InRange)
    holes = source.has_holes if isinstance(source, InRange) else np.dtype(card.dtype).kind == "f"
    # NumPy loads its masked arrays when they are named.
    if source is None or not (ranged or holes or type(source) is not np.ndarray):
        return 0
    holes = holes or isinstance(source, np.ma.MaskedArray)
    size = np.dtype(card.dtype).itemsize
    return math.prod(source.shape) * size * (ranged + holes) + math.prod(size_of(source)) * 2 * holes

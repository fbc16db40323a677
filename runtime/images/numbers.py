"""What the numbers of image files mean: which are the network's 0 and 1, which are no data, and which look wrong."""

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ..engine_format.model_card import PERCENTILE, ModelCard
from ..errors import MisuseError
from ..pixels.no_data import over_bands
from ..pixels.value_range import Range, limits_of, parse_range
from .header import DEFAULT_MAX_PIXELS

log = logging.getLogger(__name__)

SMALL_PART = 16  # a file that uses less than such a part of what the card expects is named: four bits are missing
REMEDY = "say which values are its 0 and 1 with --input-range LO,HI, or percentile"
LEAST_MEASURED, MOST_MEASURED = -999, 1e20  # values as far out as these, apart from all others, are asked about
NEAR = 15  # of 255, from the no-data value: what GDAL's nearblack takes for black
BLOCK = 8  # pixels of a side, which JPEG compresses together
FAR = 16  # times what the card expects: values beyond are named


class DoubtfulError(MisuseError):
    """Values of a file do not look like the network's, and such files are refused."""


@dataclass
class ReadOptions:
    """How image files are read in one run.

    Attributes:
        max_pixels: files of more are refused.
        input_range: (LO, HI): what becomes the network's 0 and the largest of its dtype (1 of float32); `percentile`:
            the 1st and 99th of each file's values; None: as the card's `range` says.
        no_data: a value that is no data, instead of the file's own tag.
        strict: refuse a file whose values look wrong, instead of naming the first.
        page: of files of several images, counted from 0; None: the first.
        channels: of the files that the network is shown, counted from 0; None: all of them.

    Raises:
        MisuseError: a range with LO ≥ HI, or not of finite numbers.
    """

    max_pixels: int = DEFAULT_MAX_PIXELS
    input_range: Range | str | None = None
    no_data: float | None = None
    strict: bool = False
    page: int | None = None
    channels: tuple[int, ...] | None = None
    _named: set[str] = field(default_factory=set, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.input_range is not None and self.input_range != PERCENTILE:
            self.input_range = parse_range(self.input_range)

    def __reduce__(self) -> tuple[type["ReadOptions"], tuple[Any, ...]]:
        return ReadOptions, (
            self.max_pixels, self.input_range, self.no_data, self.strict, self.page, self.channels,
        )  # fmt: skip

    def identity(self) -> str:
        """What decides how pixels are read."""
        return f"{self.input_range} {self.no_data} {self.page} {self.channels}"

    def name(self, kind: str, remark: str) -> None:
        """Say what looks wrong with a file, once a run for each `kind`. Raises DoubtfulError where strict."""
        if self.strict:
            raise DoubtfulError(f"{remark} (refused by --strict)")
        self.mention(kind, remark)

    def mention(self, kind: str, remark: str) -> None:
        """Say what is to be known of a file, once a run for each `kind`."""
        with self._lock:
            first = kind not in self._named
            self._named.add(kind)
        if first:
            log.warning("%s; other such files of this run are not named", remark)


COMMON = ReadOptions()  # of those who say nothing: what looks wrong is named once a process


def value_of(no_data: float, dtype: np.dtype[Any], told_by: str | None) -> float | None:
    """A no-data value as one of a type; None: no pixel can have it.

    Raises MisuseError for a value outside the type that somebody has told: `told_by` names the file then.
    """
    low, high = limits_of(dtype)
    if dtype.kind not in "uib":
        return no_data
    if low <= no_data <= high and no_data == round(no_data):
        return no_data
    if told_by is not None and not math.isnan(no_data):
        raise MisuseError(
            f"no-data value {no_data:g}, and {told_by} holds {dtype} values, {low:.0f} to {high:.0f}; "
            "name one of these by --nodata"
        )
    return None


def beyond(path: object, values: NDArray[Any], limits: Range, card: ModelCard) -> tuple[str, str] | None:
    """(kind, remark) of a file most of whose values lie outside the range that the card says, or None."""
    low, high = limits
    if low <= float(np.median(values)) <= high:
        return None
    clipped = "" if card.dtype == "float32" else ", and clipped there"
    return "beyond", (
        f"{path} holds values of {values.min():g} to {values.max():g}, most of them outside this model's range, "
        f"{low:g} to {high:g}{clipped}: {REMEDY}"
    )


def apart(path: object, values: NDArray[Any]) -> tuple[float, str] | None:
    """(value, remark) of the lowest or highest value where it looks like one for no data, or None.

    It is far from all others, and such as nobody measures: -999 or less of types with a sign, or 1e20 or more.
    """
    if values.dtype.kind not in "if" or not len(values):
        return None
    low, high = float(values.min()), float(values.max())
    for found, looks_so in ((low, low <= LEAST_MEASURED), (high, high >= MOST_MEASURED)):
        others = values[values != found] if looks_so else values[:0]
        if not len(others):
            continue
        least, most = float(others.min()), float(others.max())
        if max(least - found, found - most) > most - least:
            return found, (
                f"{path} holds {found:g} in {1 - len(others) / len(values):.2g} of the pixels looked at, far from its "
                f"other values, {least:g} to {most:g}: if it is no data, say so with --nodata {found:.9g}"
            )
    return None


def frayed(pixels: NDArray[Any], invalid: NDArray[np.bool_], no_data: float, near: int) -> bool:
    """Whether pixels, [h, w, bands], within `near` of the no-data value in all bands touch a margin that has no data.

    What is dark has single such pixels; of a margin so many as a block of JPEG's is wide follow each other.
    """
    dtype = pixels.dtype
    least, most = limits_of(dtype)
    low, high = (dtype.type(min(max(end, least), most)) for end in (no_data - near, no_data + near))
    # Compared as they are, without copies in floats.
    close = over_bands((pixels >= low) & (pixels <= high), every=True) & ~invalid
    if not close.any():
        return False
    turned = ((np.rot90(close, turns), np.rot90(invalid, turns)) for turns in range(4))
    return any(
        bool((beside[BLOCK:] & sliding_window_view(empty, BLOCK, axis=0)[:-1].all(axis=-1)).any())
        for beside, empty in turned
        if len(empty) > BLOCK
    )


def frayed_margins(path: object, lossy: str, no_data: float | None) -> str:
    """What is said of a file whose compression has changed values beside its no-data value."""
    return (
        f"{path} is compressed as {lossy}, and pixels beside its no-data value {no_data:g} are near that and not equal "
        "to it, so they get classes: give it a mask (GDAL: nearblack -setmask), or compress it without loss"
    )


def wide_type(path: object, values: NDArray[Any], bits: int, card: ModelCard) -> str:
    """What is said of a file of more bits than the card's."""
    return (
        f"{path} holds {bits}-bit values, here {values.min()} to {values.max()}, for a network of {card.dtype} images, "
        f"which is shown their upper 8 bits, {values.min() >> (bits - 8)} to {values.max() >> (bits - 8)}: say which "
        f"values are its 0 and 255 with --input-range LO,HI, such as 0,{2**bits - 1} where that is right, or percentile"
    )


def doubtful(path: object, shown: NDArray[Any], card: ModelCard, stored: NDArray[Any]) -> tuple[str, str] | None:
    """(kind, remark) of values that cannot be what the card's mean and std were taken of, or None.

    `shown` are in the card's units, and `stored` the same as the file has them: others where the card has a range.
    """
    mean, std = card.mean, card.std
    says = f"what this network's mean ({_list(mean)}) and std ({_list(std)}) say"
    if isinstance(card.range, tuple):
        says = f"this model's range, {card.range[0]:g} to {card.range[1]:g}"
    if set(mean) == {0.0} and set(std) == {1.0}:  # a network that normalises by itself, or not at all
        if card.range is None:
            return None  # nothing is known
        mean = std = (limits_of(np.dtype(card.dtype))[1] / 2 if card.dtype != "float32" else 0.5,)
    low, high = float(shown.min()), float(shown.max())
    expected = max(middle + spread for middle, spread in zip(mean, std, strict=True))
    seen = f"{path} holds values of {stored.min():g} to {stored.max():g}"
    if card.dtype != "float32":
        if card.dtype != "int16" and low < high <= expected / SMALL_PART:
            return "small", f"{seen}, a small part of {says}: {REMEDY}"
        return None
    size = max(abs(middle) + spread for middle, spread in zip(mean, std, strict=True))
    if float(np.percentile(np.abs(shown), 99)) > FAR * size:
        return "far", f"{seen}, far outside {says}: {REMEDY}"
    if low < high and low >= 0 and high < min(expected, min(mean)) / SMALL_PART:
        return "small", f"{seen}, a small part of {says}: {REMEDY}"
    return None


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))

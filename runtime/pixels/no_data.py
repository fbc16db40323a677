"""Pixels that are no image: what the network is shown in their place, and what stands there in its results.

Such a pixel is masked in a numpy.ma.MaskedArray (in any of its bands), or not finite in a float image. The network is
given the card's mean there, rounded in images of whole numbers: zeros after normalisation, as its padding is.
"""

import math
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import AnyArray, Floats, ImageSource
from ..engine_format.model_card import ModelCard
from ..errors import DeployError, MisuseError

Invalid = NDArray[np.bool_]  # [H, W], True where there is no data
ROWS = 64  # of a block in which HoleRecorder keeps what it has met
FAR_OUT = 1e30  # values beyond are none that anybody measures
FEW_DIGITS = 1e-4  # of such a value: how far from what is written it may be
LOWEST = np.float32(-1e37)  # in place of a score of -inf, which times a weight of 0 would be NaN


def hold_together(pixels: AnyArray, values: float | Sequence[float]) -> Invalid:
    """Where all bands of pixels, [H, W, C], hold a value that is one for all, or each its own, [C]: bool [H, W]."""
    if isinstance(values, Sequence):
        bands = [equal(pixels[:, :, band : band + 1], value) for band, value in enumerate(values)]
        return over_bands(np.concatenate(bands, axis=2), every=True)
    return over_bands(equal(pixels, values), every=True)


def equal(pixels: AnyArray, value: float) -> NDArray[np.bool_]:
    """Where pixels hold a value of no data, as their type has it: 0.1 is what float32 makes of it.

    The ends of floats are written with few digits, such as -3.4028e+38, and stand for all that is as near.
    """
    dtype = pixels.dtype
    found: NDArray[np.bool_]
    if dtype.kind == "f":
        if abs(value) > FAR_OUT:
            size = min(abs(value), float(np.finfo(dtype).max))
            least, most = size * (1 - FEW_DIGITS), max(abs(value), size) * (1 + FEW_DIGITS)
            with np.errstate(over="ignore"):  # beyond the type: infinite
                low, high = dtype.type(least), dtype.type(most)
            found = (pixels >= low) & (pixels <= high) if value > 0 else (pixels <= -low) & (pixels >= -high)
        else:
            found = pixels == dtype.type(value)
        return found
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if not float(low) <= value <= float(high) or value != round(value):
        return np.zeros(pixels.shape, bool)
    found = pixels == dtype.type(min(int(value), high))  # which as a float may lie beyond it
    return found


def masked(image: Any, valid: object) -> Any:
    """An image as a MaskedArray whose pixels are masked where `valid`, bool [H, W], is False; None: the image as it is.

    Raises MisuseError for a mask of another shape or type.
    """
    if valid is None or not isinstance(image, np.ndarray):
        return image
    if not isinstance(valid, np.ndarray) or valid.dtype != np.bool_ or valid.shape != image.shape[:2]:
        found = f"{valid.dtype} {list(valid.shape)}" if isinstance(valid, np.ndarray) else type(valid).__name__
        raise MisuseError(f"valid is {found}; it is a bool array [H, W] of the image's {list(image.shape[:2])}")
    mask = ~valid if image.ndim == 2 else np.broadcast_to(~valid[:, :, None], image.shape)
    return np.ma.MaskedArray(image, mask)


def number_in(text: object) -> float | None:
    """The number that a no-data tag begins with, as GDAL reads it (CPLAtofM); None where it begins with none.

    Several, such as `0 0 0`, are of bands, and the first is taken; a comma may be the decimal point.
    """
    said = str(text).strip("\0 ").lower()
    if re.match(r"[+-]?1[.,]#(ind|qnan|snan)", said):  # as Microsoft's C library writes them
        return math.nan
    found = re.match(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)(e[+-]?\d+)?(?![\w#]|[.,]#)|[+-]?(inf|nan)\b", said)
    return float(found[0].replace(",", ".")) if found else None


def over_bands(flags: NDArray[np.bool_], every: bool = False) -> Invalid:
    """Where one of the bands is True, or `every` one: [H, W, C] → [H, W].

    As `any(axis=2)` and `all(axis=2)`, which take ten times as long where the last axis is short.
    """
    count = flags.shape[2]
    if count in (2, 4, 8) and flags.flags.c_contiguous:  # a pixel's flags as one number
        words = flags.view(f"u{count}")[:, :, 0]
        return np.asarray(words == int.from_bytes(b"\1" * count) if every else words != 0)
    result: Invalid = np.array(flags[:, :, 0])
    for band in range(1, count):
        (np.logical_and if every else np.logical_or)(result, flags[:, :, band], out=result)
    return result


def mean_values(card: ModelCard) -> AnyArray:
    """The card's mean in the image's dtype, one a channel: what is zero after normalisation, or nearest to it."""
    dtype = np.dtype(card.dtype)
    if dtype.kind == "f":
        return np.asarray(card.mean, dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(card.mean), limits.min, limits.max).astype(dtype)


def filled(image: AnyArray, card: ModelCard) -> tuple[AnyArray, Invalid | None]:
    """A checked image, [H, W, C], as a plain array without holes, and where they were; None: it had none."""
    invalid: Invalid | None = None
    # NumPy loads its masked arrays when they are named, in a fortieth of the time that a program takes for one image.
    if type(image) is not np.ndarray and isinstance(image, np.ma.MaskedArray):
        mask: AnyArray = np.ma.getmaskarray(image)
        invalid = over_bands(mask[:, :, :1] if mask.strides[2] == 0 else mask)  # `masked` makes one for all bands
        image = np.asarray(image)
    if image.dtype.kind == "f":
        with np.errstate(all="ignore"):
            finite = bool(np.isfinite(image.sum()))  # one pass without a temporary; sums of finite values may overflow
        if not finite:
            unknown = over_bands(~np.isfinite(image))
            invalid = unknown if invalid is None else invalid | unknown
    if invalid is None or not invalid.any():
        return image, None
    image, means = image.copy(order="K"), mean_values(card)
    size = image.shape[2] * image.itemsize
    if size in (2, 4, 8) and image.strides[1:] == (size, image.itemsize):  # a pixel as one number
        words = image.view(f"u{size}")[:, :, 0]
        np.copyto(words, means.view(words.dtype)[0], where=invalid)
        return image, invalid
    for channel, mean in enumerate(means):  # a third of the time of all at once
        np.copyto(image[:, :, channel], mean, where=invalid)
    return image, invalid


def marked(
    results: Sequence[AnyArray], kinds: Sequence[str], invalid: Invalid | None, card: ModelCard
) -> tuple[AnyArray, ...]:
    """Results, each of one of `kinds`, with no data where the image has none.

    Labels are the card's `no_data` there, probabilities and values NaN, masks False; coarse scores stay.

    Raises:
        MisuseError: every label is a class.
    """
    if invalid is None:
        return tuple(results)
    made = []
    for result, kind in zip(results, kinds, strict=True):
        if kind == "scores":
            made.append(result)
            continue
        result = result if result.flags.writeable else result.copy()
        if result.ndim == 2:
            result[invalid] = no_data_label(card)
        else:
            result[:, invalid] = False if kind == "masks" else np.nan
        made.append(result)
    return tuple(made)


def no_data_label(card: ModelCard) -> int:
    """The card's `no_data`. Raises MisuseError where every label is a class."""
    if card.no_data is None:
        raise MisuseError(
            f"the image has pixels without data, and this model's {len(card.classes)} classes leave no label for them; "
            "fill them first"
        )
    return card.no_data


class HoleRecorder:
    """An image that is read in parts, filled as it is read, and where its holes are: rows at a time, until forgotten.

    It is an ImageSource.
    """

    ndim = 3

    def __init__(self, image: ImageSource, card: ModelCard) -> None:
        self.shape, self.dtype = image.shape, image.dtype
        self._image, self._card = image, card
        self._blocks: dict[int, Invalid] = {}  # number of the block → [ROWS, W]
        self._forgotten = 0  # blocks
        self._lock = threading.Lock()  # it may be read in one thread and asked in another

    def expect(self, part: tuple[slice, slice]) -> None:
        """As of an image that is read ahead, where it is filled too; one that cannot be is not."""
        if (expect := getattr(self._image, "expect", None)) is not None:
            expect(part, lambda pixels: filled(pixels, self._card))

    def __getitem__(self, part: tuple[slice, slice], /) -> AnyArray:
        (top, bottom, _), (left, right, _) = (
            each.indices(side) for each, side in zip(part, self.shape[:2], strict=True)
        )
        given = self._image[top:bottom, left:right]
        pixels: AnyArray
        pixels, invalid = given if isinstance(given, tuple) else filled(given, self._card)
        if invalid is not None:
            with self._lock:
                for number in range(max(top // ROWS, self._forgotten), -(-bottom // ROWS)):
                    block = self._blocks.setdefault(number, np.zeros((ROWS, self.shape[1]), bool))
                    first, last = max(top, number * ROWS), min(bottom, (number + 1) * ROWS)
                    block[first - number * ROWS : last - number * ROWS, left:right] = invalid[first - top : last - top]
        return pixels

    def invalid(self, top: int, bottom: int) -> Invalid | None:
        """Where these rows, all of them read, have no data: [rows, W]; None: nowhere. Rows above are forgotten."""
        numbers = range(top // ROWS, -(-bottom // ROWS))
        with self._lock:
            self._forgotten = max(self._forgotten, top // ROWS)
            for number in [each for each in self._blocks if each < self._forgotten]:
                del self._blocks[number]
            if not any(number in self._blocks for number in numbers):
                return None
            none = np.zeros((ROWS, self.shape[1]), bool)
            rows = np.concatenate([self._blocks.get(number, none) for number in numbers])
        return rows[top - numbers[0] * ROWS : bottom - numbers[0] * ROWS]


def usable(scores: Floats, card: ModelCard, interpolated: bool) -> Floats:
    """Scores, [..., K, h, w], of which a class can be made; those of a network of values are as they are.

    A score of minus infinity rules its class out, and becomes LOWEST where scores are interpolated.

    Args:
        scores: of the core.
        card: of the model.
        interpolated: whether that happens to them.

    Raises:
        DeployError: NaN, plus infinity, or a place where every class is ruled out.
    """
    if card.kind == "values":
        return scores
    with np.errstate(all="ignore"):
        if np.isfinite(scores.sum()):
            return scores
    best = scores.max(axis=-3)  # NaN where a score is
    if not np.isfinite(best).all():
        share = np.mean(~np.isfinite(best))
        raise DeployError(
            f"the network's scores are NaN or infinite at {share:.2%} of its places, so no class is best there; look "
            "at the image's values, or build the engine without --fp16"
        )
    return np.maximum(scores, LOWEST) if interpolated else scores

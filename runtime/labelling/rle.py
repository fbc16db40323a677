"""COCO's run-length encoding of masks, as annotation tools and pycocotools read it.

The pixels of a mask are read column by column; `counts` are the lengths of the runs, of zeros first, in COCO's
compressed text: each length less the one two before it, from the fourth on, in digits of 5 bits, the lowest first
(`rleToString` in pycocotools' maskApi.c).
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..arrays import AnyArray, Masks
from ..errors import DeployError, MisuseError

FIRST = 48  # the character of the digit 0
MORE, SIGN, DIGIT = 32, 16, 31  # a digit that others follow, the sign of the last one, its bits
DIGITS = 13  # of a 64-bit number, at most


class Rle(TypedDict):
    """A mask in run lengths: `size` [H, W], `counts` in COCO's compressed text."""

    size: list[int]
    counts: str


def encode(mask: AnyArray, class_id: int | None = None) -> Rle:
    """The run lengths of a mask, or of one class of a label map.

    Args:
        mask: [H, W]; bool, or labels where `class_id` is given; other numbers are a mask where they are not 0.
        class_id: the class whose pixels are the mask.

    Raises:
        MisuseError: an array of another rank.
    """
    _check(mask)
    found = mask != 0 if class_id is None else mask == class_id
    return _of_runs(found.shape, *_runs(found), True)


def encode_labels(labels: AnyArray) -> dict[int, Rle]:
    """The run lengths of every class that a label map, [H, W], has; class → Rle, in the classes' order.

    The map is read once, whatever the number of classes. Raises MisuseError for an array of another rank.
    """
    _check(labels)
    starts, values = _runs(labels)
    return {int(label): _of_runs(labels.shape, starts, values, label) for label in np.unique(values)}


def decode(rle: Mapping[str, Any]) -> Masks:
    """The mask, bool [H, W]. `counts` may be text, bytes, or a list of lengths.

    Raises:
        DeployError: it is no mask: a size below 0, another character, lengths that do not add up to the size.
    """
    (height, width), counts = _size(rle), _counts(rle)
    pixels = height * width
    if (counts < 0).any() or (counts > pixels).any() or int(counts.sum()) != pixels:
        raise DeployError(f"run lengths that do not add up to the {height}×{width} pixels of the mask; is it damaged?")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def area(rle: Mapping[str, Any]) -> int:
    """Pixels of the mask, without decoding it. Raises DeployError as `decode` does of its text."""
    return int(_counts(rle)[1::2].sum())


def _check(mask: AnyArray) -> None:
    if mask.ndim != 2:
        raise MisuseError(f"a mask of shape {list(mask.shape)} cannot be encoded; pass one of [H, W] at a time")


def _runs(pixels: AnyArray) -> tuple[NDArray[np.int64], AnyArray]:
    """Where runs of equal values begin, column by column, and the value of each."""
    columns = np.ascontiguousarray(pixels.T).reshape(-1)
    starts = np.concatenate([np.zeros(min(1, columns.size), np.int64), np.flatnonzero(columns[1:] != columns[:-1]) + 1])
    return starts, columns[starts]


def _of_runs(shape: tuple[int, ...], starts: NDArray[np.int64], values: AnyArray, label: Any) -> Rle:
    """The run lengths of the pixels of value `label`: runs that follow each other differ."""
    pixels = shape[0] * shape[1]
    edges = np.append(starts, pixels)
    found = np.flatnonzero(values == label)
    borders = np.stack([edges[found], edges[found + 1]], axis=1).reshape(-1)
    counts = np.diff(borders, prepend=0)
    last = pixels - (int(borders[-1]) if len(borders) else 0)
    counts = np.append(counts, last) if last or not len(counts) else counts
    return {"size": [int(side) for side in shape], "counts": _text(counts)}


def _text(counts: NDArray[np.int64]) -> str:
    """COCO's compressed text of run lengths."""
    rest = counts.copy()
    rest[3:] -= counts[1:-2]
    digits = np.zeros((len(rest), DIGITS), np.uint8)
    going = np.ones(len(rest), bool)
    lengths = np.zeros(len(rest), np.int64)
    place = 0
    while going.any():
        digit = rest & DIGIT
        rest >>= 5  # arithmetic: a negative number ends in −1
        more = np.where(digit & SIGN, rest != -1, rest != 0)
        digits[:, place] = digit + FIRST + np.where(more, MORE, 0)
        lengths += going
        going &= more
        place += 1
    return digits[np.arange(DIGITS) < lengths[:, None]].tobytes().decode("ascii")


def _size(rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    sides = size if isinstance(size, list | tuple) else ()
    if len(sides) != 2 or not all(type(side) is int and side >= 0 for side in sides):
        raise DeployError(f"a mask's size is [H, W], and is {size!r:.60}; is it damaged?")
    return sides[0], sides[1]


def _counts(rle: Mapping[str, Any]) -> NDArray[np.int64]:
    """Lengths of the runs, of zeros first."""
    counts = rle.get("counts")
    try:
        if isinstance(counts, list):
            return np.asarray(counts, np.int64).reshape(-1)
        return _lengths(counts.encode("ascii") if isinstance(counts, str) else bytes(counts))  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError) as error:
        raise DeployError(f"run lengths of a mask are no COCO text: {counts!r:.60}; is it damaged?") from error


def _lengths(text: bytes) -> NDArray[np.int64]:
    """Run lengths of COCO's compressed text. Raises ValueError for any other."""
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - FIRST
    ends = np.flatnonzero(digits & MORE == 0)
    lengths = np.diff(ends, prepend=-1)  # digits of each number
    whole = len(digits) and ends[-1:] == len(digits) - 1
    if not whole or digits.min() < 0 or digits.max() >= 2 * MORE or lengths.max() > DIGITS:
        raise ValueError("not digits of run lengths")
    starts = ends - lengths + 1
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = np.add.reduceat((digits & DIGIT) << np.minimum(5 * places, 62), starts)
    values = np.where(digits[ends] & SIGN, values - (np.int64(1) << np.minimum(5 * lengths, 62)), values)
    # From the fourth on each is a difference to the one two before it: two sums, of every second one.
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values

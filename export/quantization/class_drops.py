"""What low precision costs each class: points of its IoU, against float32's results or against labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fcn_deploy.calibration.metrics import Metrics

# A class is judged from so many pixels on, and so large a share of all: of fewer, a few pixels are points.
LEAST_PIXELS, LEAST_SHARE = 64, 1e-4


@dataclass(frozen=True)
class Judgement:
    """What a core in low precision gives.

    Attributes:
        value: the gate's metric, in 0..1.
        lost: class → points of IoU that it lost; of those that have enough pixels to be judged.
        beyond: the same, but for pixels at the borders of a class, which go either way: what is held against it.
    """

    value: float
    lost: dict[int, float]
    beyond: dict[int, float]

    @property
    def worst(self) -> float:
        """Points that the class lost which lost most; 0 where none is judged."""
        return max(self.beyond.values(), default=0.0)


def against_labels(before: np.ndarray, after: np.ndarray) -> dict[int, float]:
    """Points of IoU that each class lost, by confusion matrices [classes, classes] against labels."""
    whole = max(int(before.sum()), 1)
    first, second = Metrics.of(before).class_iou, Metrics.of(after).class_iou
    return {
        index: 100 * (first[index] - second[index])
        for index, count in enumerate(before.sum(1))
        if _enough(int(count), whole)
    }


def against_results(
    expected: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    data: Sequence[np.ndarray],
    classes: int,
    reach: int,
) -> tuple[dict[int, float], dict[int, float]]:
    """(points of IoU that each class lost, the same but for pixels that lie within `reach` of where the class is).

    Args:
        expected, found: of each image, labels [H, W], or masks bool [classes, H, W], by float32 and in low precision.
        data: bool [H, W] of each, where there is data: other pixels are not looked at.
        classes: how many there are.
        reach: in pixels: so far a border may move.
    """
    area, union, missed, moved = (np.zeros(classes, np.int64) for _ in range(4))
    pixels = 0
    for before, after, valid in zip(expected, found, data, strict=True):
        pixels += int(valid.sum())
        for index in range(classes) if before.ndim == 3 else np.union1d(before[valid], after[valid]):
            ours, theirs = ((each[index] if each.ndim == 3 else each == index) & valid for each in (after, before))
            area[index] += int(theirs.sum())
            union[index] += int((ours | theirs).sum())
            differs = ours != theirs
            if not differs.any():
                continue
            missed[index] += int(differs.sum())
            far = (theirs & ~ours & ~_near(ours, reach)) | (ours & ~theirs & ~_near(theirs, reach))
            moved[index] += int(far.sum())
    judged = [index for index in range(classes) if _enough(int(area[index]), pixels)]
    lost, beyond = (
        {index: 100 * float(count[index]) / float(union[index]) for index in judged} for count in (missed, moved)
    )
    return lost, beyond


def _enough(pixels: int, of: int) -> bool:
    return pixels >= max(LEAST_PIXELS, LEAST_SHARE * of)


def _near(mask: np.ndarray, reach: int) -> np.ndarray:
    """Where a pixel of a mask [H, W] is within so many rows and columns."""
    for axis in (0, 1):
        spread = mask.copy()
        for step in range(1, reach + 1):
            ahead, behind = [slice(None)] * 2, [slice(None)] * 2
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            spread[tuple(ahead)] |= mask[tuple(behind)]
            spread[tuple(behind)] |= mask[tuple(ahead)]
        mask = spread
    return mask

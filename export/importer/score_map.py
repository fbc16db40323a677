"""Which axes of an output are a map of the image, and what stands for the foreign output in the imported model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from fcn_deploy.export.analysis.decision import Decision
from fcn_deploy.export.tolerances import DECISION_MARGIN, SIGMOID_ROUNDING, STANDARD_FORM, TIED_PIXELS


class MapAxes(NamedTuple):
    """The axes of an output that follow the image's height and width; each of its cells is `factor` pixels wide."""

    rows: int
    columns: int
    factor: int


def find_map_axes(shape: Sequence[int], size: tuple[int, int]) -> MapAxes | None:
    """Where an output of `shape`, for an image of `size` (height, width), follows the image; None: nowhere."""
    places = {4: ((2, 3), (1, 2)), 3: ((1, 2), (0, 1)), 2: ((0, 1),)}.get(len(shape), ())
    for rows, columns in places:
        height, width = shape[rows], shape[columns]
        if min(height, width) < 1:
            continue
        factor = max(1, round(size[0] / height))
        if all(
            side in (-(-whole // factor), whole // factor) for side, whole in zip((height, width), size, strict=True)
        ):
            return MapAxes(rows, columns, factor)
    return None


def may_be_either(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether an output of `shape` [N,a,b,c] follows the image by a and b as well as by b and c."""
    turned = (shape[0], 0, *shape[1:3]) if len(shape) == 4 else ()
    return bool(turned) and all(find_map_axes(each, size) is not None for each in ((*shape[:1], 0, *shape[2:]), turned))


@dataclass(frozen=True)
class OutputChange:
    """What the imported model's scores are to the foreign model's output.

    Attributes:
        decision: that made labels of scores, and was cut off; None where scores were the output.
        second_channel: the output was the second of two channels alone, and the scores are both.
        labels_only: the labels are the same, and the scores are not.
        factor: that the output is of the scores.
        whole: whether the output is rounded to whole numbers, or cut off to them.
    """

    decision: Decision | None = None
    second_channel: bool = False
    labels_only: bool = False
    factor: float = 1.0
    whole: bool = False

    def agrees(self, output: np.ndarray, scores: np.ndarray, tolerance: float, size: tuple[int, int]) -> bool:
        """Whether the foreign model's output is what the imported model's scores say.

        Args:
            output: for one image, with rows and columns that follow it, in any layout.
            scores: [1, K, h, w].
            tolerance: share of the range that they may be apart.
            size: (height, width) of the image.
        """
        axes = find_map_axes(output.shape, size)
        if axes is None or (output.shape[axes.rows], output.shape[axes.columns]) != scores.shape[2:]:
            return False
        # [K, h, w]: K axes are before or behind, and of one but for one.
        planes = np.moveaxis(output, (axes.rows, axes.columns), (-2, -1)).reshape(-1, *scores.shape[2:])
        planes = planes / np.float32(self.factor) if self.factor != 1 else planes
        margin = DECISION_MARGIN if tolerance == STANDARD_FORM else tolerance
        margin *= float(np.ptp(scores)) or 1.0
        if self.decision is not None and self.decision.kind == "threshold":
            return _same_masks(planes, scores[0], self.decision.threshold or 0.0, margin)
        if self.decision is not None or self.labels_only:
            one = self.decision is not None and not self.decision.one_hot
            labels = planes[0] / self.decision.factor if one and self.decision is not None else planes.argmax(0)
            return _same_labels(labels, scores[0], margin)
        wanted = scores[0][1:2] if self.second_channel else scores[0]
        if planes.shape != wanted.shape or not np.isfinite(planes).all():
            return False
        spread = float(np.ptp(planes)) or 1.0
        rounding = SIGMOID_ROUNDING + (1 / self.factor if self.whole else 0)
        return float(np.abs(planes - wanted).max()) <= tolerance * spread + rounding


def _same_masks(masks: np.ndarray, scores: np.ndarray, threshold: float, margin: float) -> bool:
    """Whether masks [K,h,w] of two values are scores above a threshold, but for those that are as near as `margin`."""
    if masks.shape != scores.shape or len(np.unique(masks)) > 2:  # rounded values of many
        return False
    above = scores - threshold
    wrong, ties = (masks > 0) != (above > 0), above == 0
    return not wrong[np.abs(above) > margin].any() and bool((wrong & ties).mean() <= TIED_PIXELS)


def _same_labels(labels: np.ndarray, scores: np.ndarray, margin: float) -> bool:
    """Whether labels [h,w] are the best of scores [K,h,w], but where the two best are as near as `margin`."""
    best = np.sort(scores, axis=0)[-2:]
    clear = best[1] - best[0] > margin if len(best) > 1 else np.ones(scores.shape[1:], bool)
    return not (labels != scores.argmax(0))[clear].any()

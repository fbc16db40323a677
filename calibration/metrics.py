"""Segmentation metrics from a confusion matrix."""

from dataclasses import dataclass

import numpy as np

CHUNK = 1 << 17  # pixels counted at once, whose indices stay in the caches
IGNORE = 255  # the label that no metric and no loss counts (Pascal VOC's border)


def confusion_matrix(reference: np.ndarray, predicted: np.ndarray, classes: int, ignore: int = IGNORE) -> np.ndarray:
    """Count pixels by (reference class, predicted class): int64 [classes, classes].

    Args:
        reference: labels of any integer dtype; pixels with `ignore` are left out.
        predicted: labels of the same shape.

    Raises:
        ValueError: the shapes differ, or a label is not below `classes`.
    """
    if reference.shape != predicted.shape:
        raise ValueError(f"labels of shape {reference.shape} against predictions of {predicted.shape}")
    counts = np.zeros(classes**2, np.int64)
    rows = max(1, CHUNK // max(1, reference[:1].size))
    for start in range(0, len(reference), rows):  # indices of a whole scene would take eight bytes a pixel, twice
        part, found = reference[start : start + rows], predicted[start : start + rows]
        counted = part != ignore
        part, found = part[counted].astype(np.intp), found[counted].astype(np.intp)
        if part.size and max(part.max(), found.max()) >= classes:
            raise ValueError(f"label {max(part.max(), found.max())} with {classes} classes")
        counts += np.bincount(part * classes + found, minlength=classes**2)
    return counts.reshape(classes, classes)


@dataclass(frozen=True)
class Metrics:
    """The four metrics of Long, Shelhamer, Darrell (2015), section 5, each in 0..1, and the IoU per class.

    Attributes:
        pixel_accuracy: Σᵢ nᵢᵢ / Σᵢ tᵢ.
        mean_accuracy: mean over the classes present of nᵢᵢ / tᵢ.
        mean_iou: mean over the classes present of nᵢᵢ / (tᵢ + Σⱼ nⱼᵢ − nᵢᵢ).
        frequency_weighted_iou: the same, weighted by tᵢ.
        class_iou: per class; NaN for a class that the reference labels do not hold.
        class_accuracy: per class; NaN likewise.
        class_share: of the counted pixels, per class.
    """

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    frequency_weighted_iou: float
    class_iou: tuple[float, ...]
    class_accuracy: tuple[float, ...]
    class_share: tuple[float, ...]

    @classmethod
    def of(cls, confusion: np.ndarray) -> "Metrics":
        """From a confusion matrix; all NaN where it is empty."""
        return cls.of_counts(np.diag(confusion), confusion.sum(1), confusion.sum(0))

    @classmethod
    def of_counts(cls, hits: np.ndarray, total: np.ndarray, predicted: np.ndarray) -> "Metrics":
        """From pixels by class: labelled right, in the reference, and predicted. All NaN where there are none."""
        hits, total = hits.astype(np.float64), total.astype(np.float64)
        union = total + predicted - hits
        with np.errstate(divide="ignore", invalid="ignore"):
            accuracy = np.where(total > 0, hits / total, np.nan)
            iou = np.where(total > 0, hits / union, np.nan)
            share = total / total.sum()
            pixel = hits.sum() / total.sum()
        present = total > 0
        empty = not present.any()
        return cls(
            pixel_accuracy=float(pixel),
            mean_accuracy=float("nan") if empty else float(accuracy[present].mean()),
            mean_iou=float("nan") if empty else float(iou[present].mean()),
            frequency_weighted_iou=float("nan") if empty else float((share * iou)[present].sum()),
            class_iou=tuple(iou.tolist()),
            class_accuracy=tuple(accuracy.tolist()),
            class_share=tuple(share.tolist()),
        )

    @property
    def absent(self) -> list[int]:
        """Classes that the reference labels do not hold, and the means leave out."""
        return [index for index, value in enumerate(self.class_iou) if np.isnan(value)]

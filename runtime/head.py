"""From coarse scores to full-size labels, exactly.

Bilinear interpolation is a convex combination of four corners: where all four have the same best class, so
has every pixel between them. So only the cells whose corners disagree are interpolated, and the labels are
those of argmax(interpolate(scores)), at a small part of its cost.
"""

import math

import numpy as np

from runtime.engine_file import Head, ModelCard

CHUNK = 4 << 20  # score values interpolated at a time: bounds the working memory on noisy scores


def labels_from_scores(
    scores: np.ndarray, head: Head, card: ModelCard, padded: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Labels of an image from the core's scores.

    Args:
        scores: uncropped, [K, h, w] float. Cells beyond the image take part in its last pixels.
        head: the network's last Resize.
        card: says how scores become labels.
        padded: (height, width) of the core's input, in pixels.
        size: (height, width) of the image, in pixels; at most `padded`.

    Returns:
        [height, width] uint8, or uint16 for more than 256 classes.
    """
    scores = np.asarray(scores, np.float32)
    if card.activation != "softmax":
        # Two classes, the second best where the score is above its threshold.
        scores = np.concatenate([np.full_like(scores, card.score_threshold), scores])
    dtype = np.dtype(card.label_dtype)
    if head.mode == "none":
        return best_class(scores[:, : size[0], : size[1]]).astype(dtype)
    rows, columns = (_axis(head, axis, scores.shape[1 + axis], padded[axis], size[axis]) for axis in (0, 1))
    if head.mode == "nearest":
        return best_class(scores).astype(dtype)[rows[0][:, None], columns[0]]
    if rows[3] and columns[3]:
        return _labels_of_equal_cells(scores, rows[3], columns[3], size, dtype)
    return _labels_of_bands(scores, rows[:3], columns[:3], dtype)


def best_class(scores: np.ndarray) -> np.ndarray:
    """argmax over the first axis, the first of equals, as intp.

    A running maximum: numpy.argmax over a strided axis is several times slower.
    """
    best = scores[0].copy()
    labels = np.zeros(best.shape, np.intp)
    better = np.empty(best.shape, bool)
    for label in range(1, len(scores)):
        np.greater(scores[label], best, out=better)
        np.copyto(best, scores[label], where=better)
        labels[better] = label
    return labels


def _axis(head: Head, axis: int, cells: int, padded: int, pixels: int):
    """Where each output pixel reads, along one axis, by ONNX's definition of Resize.

    Returns (first cell, second cell, weight of the second) per pixel for `linear`, the first alone for
    `nearest`; and (factor, offset) where every cell holds the same `factor` pixels and the pixel `offset`
    is the first right of cell 0's centre, else None.
    """
    if head.factor is None:
        full, scale = padded, padded / cells
    else:
        scale = head.factor[axis]
        full = math.floor(cells * scale)
    x = np.arange(pixels, dtype=np.float64)
    uniform = None
    if head.coordinates == "align_corners":
        x = x * ((cells - 1) / (full - 1)) if full > 1 else x * 0
    elif head.coordinates == "asymmetric":
        x = x / scale
        uniform = (int(scale), 0) if scale == int(scale) else None
    elif head.coordinates == "pytorch_half_pixel" and full == 1:
        x = x * 0
    else:  # half_pixel
        x = (x + 0.5) / scale - 0.5
        uniform = (int(scale), int(scale) // 2) if scale == int(scale) else None
    if head.mode == "nearest":
        rounding = {
            "round_prefer_floor": lambda v: np.ceil(v - 0.5),
            "round_prefer_ceil": lambda v: np.floor(v + 0.5),
            "floor": np.floor,
            "ceil": np.ceil,
        }[head.rounding]
        return (np.clip(rounding(x), 0, cells - 1).astype(np.intp),)
    x = np.clip(x, 0, cells - 1)
    first = np.floor(x).astype(np.intp)
    second = np.minimum(first + 1, cells - 1)
    return first, second, (x - first).astype(np.float32), uniform


def _labels_of_equal_cells(
    scores: np.ndarray,
    vertical: tuple[int, int],
    horizontal: tuple[int, int],
    size: tuple[int, int],
    dtype: np.dtype,
) -> np.ndarray:
    """Linear interpolation by integer factors: all disagreeing cells at once, one matrix product."""
    (factor_y, offset_y), (factor_x, offset_x) = vertical, horizontal
    # A cell spans from one score to the next. The edge is repeated, which is what clamping does; the cells
    # before the first score are skipped where no pixel lies in them.
    before_y, before_x = int(offset_y > 0), int(offset_x > 0)
    cells_y = math.ceil((size[0] - offset_y) / factor_y) + before_y
    cells_x = math.ceil((size[1] - offset_x) / factor_x) + before_x
    cells_y, cells_x = max(cells_y, 1), max(cells_x, 1)
    rows = np.clip(np.arange(-before_y, cells_y + 1 - before_y), 0, scores.shape[1] - 1)
    columns = np.clip(np.arange(-before_x, cells_x + 1 - before_x), 0, scores.shape[2] - 1)
    scores = scores[:, rows[:, None], columns]
    best = best_class(scores).astype(dtype)
    corner = best[:-1, :-1]
    same = (corner == best[:-1, 1:]) & (corner == best[1:, :-1]) & (corner == best[1:, 1:])

    labels = np.empty((cells_y, factor_y, cells_x, factor_x), dtype)
    labels[:] = corner[:, None, :, None]
    y, x = np.nonzero(~same)
    weights = _cell_weights(factor_y, offset_y, factor_x, offset_x)
    step = max(1, CHUNK // (len(scores) * factor_y * factor_x))
    for start in range(0, len(y), step):
        part = slice(start, start + step)
        block = _cell_labels(scores, y[part], x[part], weights, dtype)
        labels[y[part], :, x[part], :] = block.reshape(-1, factor_y, factor_x)
    labels = labels.reshape(cells_y * factor_y, cells_x * factor_x)
    top = factor_y - offset_y if before_y else 0
    left = factor_x - offset_x if before_x else 0
    return np.ascontiguousarray(labels[top : top + size[0], left : left + size[1]])


def _cell_weights(factor_y: int, offset_y: int, factor_x: int, offset_x: int) -> np.ndarray:
    """Weights of a cell's four corners for each of its pixels: [4, factor_y · factor_x] float32."""
    sides = []
    for factor, offset in ((factor_y, offset_y), (factor_x, offset_x)):
        half = 0.5 if offset or factor == 1 else 0.0  # half_pixel; asymmetric starts at the score itself
        second = (np.arange(factor) + offset + half) / factor - half
        sides.append(np.stack([1 - second, second]))
    return np.einsum("ay,bx->abyx", *sides).reshape(4, -1).astype(np.float32)


def _cell_labels(scores: np.ndarray, y: np.ndarray, x: np.ndarray, weights: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Labels of the pixels of M cells, [M, pixels of a cell]; (y, x) is a cell's first corner."""
    corners = np.stack([scores[:, y + dy, x + dx] for dy in (0, 1) for dx in (0, 1)])  # [4, K, M]
    # A class whose best corner is below another's worst corner wins nowhere in the cell.
    possible = corners.max(0) >= corners.min(0).max(0)  # [K, M]
    count = possible.sum(0)
    labels = np.empty((len(y), weights.shape[1]), dtype)
    two = np.flatnonzero(count == 2)
    if len(two):  # most cells: the sign of one interpolated difference
        first = possible[:, two].argmax(0)
        second = len(scores) - 1 - possible[::-1, two].argmax(0)
        difference = corners[:, second, two] - corners[:, first, two]  # [4, M2]
        wins = (difference.T @ weights) > 0
        labels[two] = np.where(wins, second[:, None], first[:, None])
    many = np.flatnonzero(count != 2)
    if len(many):
        labels[many] = best_class(np.einsum("ckm,cp->kmp", corners[:, :, many], weights, optimize=True))
    return labels


def _labels_of_bands(scores: np.ndarray, rows, columns, dtype: np.dtype) -> np.ndarray:
    """Linear interpolation of any kind: one band of pixels between two rows of scores at a time."""
    (y0, y1, wy), (x0, x1, wx) = rows, columns
    best = best_class(scores).astype(dtype)
    labels = best[y0[:, None], x0]
    starts = np.flatnonzero(np.diff(y0, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(y0)], strict=True):
        top, bottom = best[y0[start]], best[y1[start]]
        # Disagreement of a cell, then of the pixels inside it.
        same = (top[x0] == top[x1]) & (top[x0] == bottom[x0]) & (top[x0] == bottom[x1])
        pixels = np.flatnonzero(~same)
        if not len(pixels):
            continue
        step = max(1, CHUNK // (len(scores) * len(pixels)))
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            weight = wy[part, None]
            band = scores[:, y0[start], None] * (1 - weight) + scores[:, y1[start], None] * weight
            left, right = band[:, :, x0[pixels]], band[:, :, x1[pixels]]
            labels[part, pixels] = best_class(left + (right - left) * wx[pixels])
    return labels

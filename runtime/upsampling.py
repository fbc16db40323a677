"""From coarse scores to full-size labels, masks, probabilities and values, exactly.

Bilinear interpolation is a convex combination of four corners: where all four have the same best class, so
has every pixel between them. So only the cells whose corners disagree are interpolated, and the labels are
those of argmax(interpolate(scores)), at a small part of its cost. Of a mask the same holds with its threshold; only
probabilities and values are interpolated everywhere.
"""

import math

import numpy as np

from .manifest import Head
from .model_card import ModelCard

MANY = 4  # classes that may win in a cell; where more may (few cells), all are interpolated
CHUNK = 2 << 20  # score values interpolated at a time: bounds the working memory on noisy scores
VALUES = 1 << 18  # of the result made at a time, where all are interpolated: a few of these fit a core's cache
KINDS = ("labels", "probabilities", "masks", "values")  # of results


def new_result(kind: str, card: ModelCard, rows: int, columns: int) -> np.ndarray:
    """Memory for a result of one of KINDS: labels [rows, columns], or [K, rows, columns] bool masks or float32."""
    if kind == "labels":
        return np.empty((rows, columns), card.label_dtype)
    return np.empty((card.scores, rows, columns), bool if kind == "masks" else np.float32)


def result_bytes(kind: str, card: ModelCard) -> int:
    """Bytes of a result of one of KINDS, per pixel."""
    if kind == "labels":
        return np.dtype(card.label_dtype).itemsize
    return card.scores * (1 if kind == "masks" else 4)


def result_from_scores(
    kind: str,
    scores: np.ndarray,
    head: Head,
    card: ModelCard,
    padded: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
    first: int = 0,
    cells: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A result of one of KINDS from the core's scores; arguments as for `labels_from_scores`.

    `out`: where to write it, as from `new_result` for these rows; None: new memory.
    """
    where = scores, head, card, padded, size, rows, first, cells
    if kind == "masks":
        return masks_from_scores(*where, out)
    if kind != "labels":
        return values_from_scores(*where, out, probabilities=kind == "probabilities")
    labels = labels_from_scores(*where)
    if out is None:
        return labels
    out[:] = labels
    return out


def labels_from_scores(
    scores: np.ndarray,
    head: Head,
    card: ModelCard,
    padded: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
    first: int = 0,
    cells: int | None = None,
) -> np.ndarray:
    """Labels of an image, or of some of its rows, from the core's scores.

    Args:
        scores: uncropped, [K, h, w] float. Cells beyond the image take part in its last pixels.
        head: the network's last Resize.
        card: says how scores become labels.
        padded: (height, width) of the core's input, in pixels.
        size: (height, width) of the image, in pixels; at most `padded`.
        rows: (first, after the last) of the pixels wanted; None: all.
        first: `scores` begin with this row of the score map, which has `cells` rows (None: as many as `scores`).

    Returns:
        [rows, width] uint8, or uint16 for more than 256 classes.
    """
    scores = np.asarray(scores, np.float32)
    if card.activation != "softmax":
        scores = against(scores, card.score_threshold)
    return _best(scores, head, np.dtype(card.label_dtype), padded, size, rows, first, cells)


def masks_from_scores(
    scores: np.ndarray,
    head: Head,
    card: ModelCard,
    padded: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
    first: int = 0,
    cells: int | None = None,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The mask of each class, where its own score is above its threshold: [K, rows, width] bool.

    Arguments as for `labels_from_scores`; `out`: where to write them.
    """
    scores = np.asarray(scores, np.float32)
    start, stop = rows or (0, size[0])
    out = new_result("masks", card, stop - start, size[1]) if out is None else out
    thresholds = card.thresholds if head.activated else card.score_thresholds
    for mask, score, threshold in zip(out, scores, thresholds, strict=True):
        two = against(score[None], threshold)
        mask[:] = _best(two, head, np.dtype(np.uint8), padded, size, rows, first, cells)
    return out


def values_from_scores(
    scores: np.ndarray,
    head: Head,
    card: ModelCard,
    padded: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int] | None = None,
    first: int = 0,
    cells: int | None = None,
    out: np.ndarray | None = None,
    probabilities: bool = False,
) -> np.ndarray:
    """The scores at full size, as ONNX's Resize gives them: [K, rows, width] float32.

    Made a few rows at a time, so that there is one copy of them. Arguments as for `labels_from_scores`.

    Args:
        out: where to write them; None: new memory. It may be `scores` itself where these are full-size.
        probabilities: take the card's softmax or sigmoid of them, unless the network has done so.
    """
    scores = np.asarray(scores, np.float32)
    start, stop = rows or (0, size[0])
    out = new_result("values", card, stop - start, size[1]) if out is None else out
    step = max(1, VALUES // (len(scores) * size[1]))
    for top in range(start, stop, step):
        bottom = min(top + step, stop)
        part = out[:, top - start : bottom - start]
        _interpolate(scores, head, padded, (top, bottom), size[1], first, cells or scores.shape[1], part)
        if probabilities and not head.activated:
            _activate(part, card)
    return out


def against(scores: np.ndarray, threshold: float) -> np.ndarray:
    """One score as two classes, of which the second is best where the score is above its threshold."""
    return np.concatenate([np.full_like(scores, threshold), scores])


def _best(
    scores: np.ndarray,
    head: Head,
    dtype: np.dtype,
    padded: tuple[int, int],
    size: tuple[int, int],
    rows: tuple[int, int] | None,
    first: int,
    cells: int | None,
) -> np.ndarray:
    """The best class of each pixel, [rows, width]; arguments as for `labels_from_scores`."""
    start, stop = rows or (0, size[0])
    cells = (cells or scores.shape[1], scores.shape[2])
    if head.mode == "none":
        return best_class(scores[:, start - first : stop - first, : size[1]], dtype)
    vertical, horizontal = (
        _axis(head, axis, cells[axis], padded[axis], *span) for axis, span in ((0, (start, stop)), (1, (0, size[1])))
    )
    if head.mode == "nearest":
        return best_class(scores, dtype)[vertical[0][:, None] - first, horizontal[0]]
    if vertical[3] and horizontal[3]:
        return _labels_of_equal_cells(
            scores, (*vertical[3], start, stop), (*horizontal[3], 0, size[1]), first, cells, dtype
        )
    return _labels_of_bands(scores, (vertical[0] - first, vertical[1] - first, vertical[2]), horizontal[:3], dtype)


def _interpolate(
    scores: np.ndarray,
    head: Head,
    padded: tuple[int, int],
    rows: tuple[int, int],
    width: int,
    first: int,
    cells: int,
    out: np.ndarray,
) -> None:
    """Write the pixels of some rows, [K, rows, width], into `out`."""
    if head.mode == "none":
        if not np.may_share_memory(out, scores):
            out[:] = scores[:, rows[0] - first : rows[1] - first, :width]
        return
    vertical = _axis(head, 0, cells, padded[0], *rows)
    horizontal = _axis(head, 1, scores.shape[2], padded[1], 0, width)
    if head.mode == "nearest":
        out[:] = scores[:, vertical[0][:, None] - first, horizontal[0]]
        return
    (y0, y1, wy, _), (x0, x1, wx, _) = vertical, horizontal
    weight = wy[:, None]
    band = scores[:, y0 - first] * (1 - weight) + scores[:, y1 - first] * weight
    left, right = band[:, :, x0], band[:, :, x1]
    right -= left
    right *= wx
    np.add(left, right, out=out)
    if head.fades:
        out *= _fading(head.factor[0], cells, *rows)[:, None]
        out *= _fading(head.factor[1], scores.shape[2], 0, width)


def _fading(factor: float, cells: int, start: int, stop: int) -> np.ndarray:
    """What a bilinear transposed convolution leaves of a score, by pixel: less beyond the outermost cells' centres."""
    x = (np.arange(start, stop, dtype=np.float64) + 0.5) / factor - 0.5
    return (1 + np.minimum(x, 0) - np.maximum(x - (cells - 1), 0)).astype(np.float32)


def _activate(values: np.ndarray, card: ModelCard) -> None:
    """Scores to probabilities, in place."""
    if card.activation == "softmax":
        values -= values.max(0)
        np.exp(values, out=values)
        values /= values.sum(0)
    elif card.activation in ("sigmoid", "multilabel"):
        with np.errstate(over="ignore"):  # to infinity, whose inverse is right
            np.exp(np.negative(values, out=values), out=values)
        values += 1
        np.reciprocal(values, out=values)


def last_cells(head: Head, cells: int, padded: int, pixels: int) -> np.ndarray:
    """The last row of the score map, of `cells` rows, that each of the image's `pixels` rows is made of."""
    if head.mode == "none":
        return np.arange(pixels)
    found = _axis(head, 0, cells, padded, 0, pixels)
    return found[0] if head.mode == "nearest" else found[1]


def best_class(scores: np.ndarray, dtype: np.dtype, classes: np.ndarray | None = None) -> np.ndarray:
    """argmax over the first axis, the first of equals, as `dtype`, which holds every class.

    A running maximum without branches: numpy.argmax over a strided axis is ten times slower. `classes`: what each of
    the scores stands for, ascending along the first axis, in a shape that broadcasts with them; None: 0, 1, 2….
    """
    if classes is None:
        classes = np.arange(len(scores), dtype=dtype)
    best = scores[0].copy()
    labels, product = np.empty(best.shape, dtype), np.empty(best.shape, dtype)
    labels[...] = classes[0]
    better = np.empty(best.shape, bool)
    for score, label in zip(scores[1:], classes[1:], strict=True):
        np.greater(score, best, out=better)
        np.maximum(best, score, out=best)
        # A class that is better comes later, so its number is the larger one.
        np.multiply(better.view(np.uint8), label, out=product)
        np.maximum(labels, product, out=labels)
    return labels


def _axis(head: Head, axis: int, cells: int, padded: int, start: int, stop: int):
    """Where each output pixel from `start` to before `stop` reads, along one axis, by ONNX's definition of Resize.

    Returns (first cell, second cell, weight of the second) per pixel for `linear`, the first alone for
    `nearest`; and (factor, offset) where every cell holds the same `factor` pixels and the pixel `offset`
    is the first right of cell 0's centre, else None.
    """
    if head.factor is None:
        full, scale = padded, padded / cells
    else:
        scale = head.factor[axis]
        full = math.floor(cells * scale)
    x = np.arange(start, stop, dtype=np.float64)
    # Multiplied before it is divided: ties between cells come out as such.
    shrink = (lambda v: v * cells / padded) if head.factor is None else (lambda v: v / scale)
    uniform = None
    if head.coordinates == "align_corners":
        x = x * (cells - 1) / (full - 1) if full > 1 else x * 0
    elif head.coordinates == "asymmetric":
        x = shrink(x)
        uniform = (int(scale), 0) if scale == int(scale) else None
    elif head.coordinates == "pytorch_half_pixel" and full == 1:
        x = x * 0
    else:  # half_pixel
        x = shrink(x + 0.5) - 0.5
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
    vertical: tuple[int, int, int, int],
    horizontal: tuple[int, int, int, int],
    first: int,
    cells: tuple[int, int],
    dtype: np.dtype,
) -> np.ndarray:
    """Linear interpolation by integer factors: all disagreeing cells at once.

    `vertical` and `horizontal` are (factor, offset, first pixel, pixel after the last).
    """
    (factor_y, offset_y, *_), (factor_x, offset_x, *_) = vertical, horizontal
    # A cell spans from one score to the next. The edge is repeated, which is what clamping does.
    begins, counts, sides = [], [], []
    for (factor, offset, start, stop), total in zip((vertical, horizontal), cells, strict=True):
        begin, end = (start - offset) // factor, -((offset - stop) // factor)
        begins.append(start - offset - begin * factor)  # pixels of the first cell that are not wanted
        counts.append(end - begin)
        sides.append(np.clip(np.arange(begin, end + 1), 0, total - 1))
    cells_y, cells_x = counts
    rows, columns = sides[0] - first, sides[1]
    best = best_class(scores, dtype)[rows[:, None], columns]
    labels = spread_labels(best, factor_y, factor_x)
    corner = best[:-1, :-1]
    y, x = np.nonzero((corner != best[:-1, 1:]) | (corner != best[1:, :-1]) | (corner != best[1:, 1:]))
    down, across = cell_weights(factor_y, offset_y), cell_weights(factor_x, offset_x)
    flat, width = scores.reshape(len(scores), -1), scores.shape[2]
    step = max(1, CHUNK // (len(scores) * factor_y * factor_x))
    for start in range(0, len(y), step):
        ys, xs = y[start : start + step], x[start : start + step]
        near_y, far_y, near_x, far_x = rows[ys] * width, rows[ys + 1] * width, columns[xs], columns[xs + 1]
        corners = flat[:, np.stack([near_y + near_x, near_y + far_x, far_y + near_x, far_y + far_x])]  # [K, 4, M]
        winners = np.stack([best[ys, xs], best[ys, xs + 1], best[ys + 1, xs], best[ys + 1, xs + 1]])
        block = _cell_labels(corners, winners, down, across)
        labels[ys, :, xs, :] = block.reshape(factor_y, factor_x, -1).transpose(2, 0, 1)
    labels = labels.reshape(cells_y * factor_y, cells_x * factor_x)
    top, left = begins
    high, wide = vertical[3] - vertical[2], horizontal[3] - horizontal[2]
    return np.ascontiguousarray(labels[top : top + high, left : left + wide])


def spread_labels(best: np.ndarray, factor_y: int, factor_x: int) -> np.ndarray:
    """Labels [h, factor_y, w, factor_x] of the pixels between cells, as if all were the upper left cell's.

    `best`: the classes of the cells, [h + 1, w + 1].
    """
    corner = best[:-1, :-1]
    labels = np.empty((corner.shape[0], factor_y, corner.shape[1], factor_x), best.dtype)
    labels.reshape(len(corner), factor_y, -1)[:] = corner.repeat(factor_x, axis=1)[:, None]
    return labels


def cell_weights(factor: int, offset: int) -> np.ndarray:
    """Weights of a cell's first and second corner along one axis, for each of its pixels: [2, factor] float32."""
    half = 0.5 if offset or factor == 1 else 0.0  # half_pixel; asymmetric starts at the score itself
    second = (np.arange(factor) + offset + half) / factor - half
    return np.stack([1 - second, second]).astype(np.float32)


def _cell_labels(corners: np.ndarray, winners: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Labels of the pixels of M cells, [pixels of a cell, M].

    `corners` are the scores of their four corners, [K, 4, M], and `winners` the best class of each, [4, M].
    """
    # A class that is below the same other one at all four corners wins nowhere in the cell. Others: the corners' best.
    possible = np.ones((len(corners), corners.shape[2]), bool)  # [K, M]
    for winner in winners:
        other = corners[winner, :, np.arange(corners.shape[2])].T  # [4, M]
        possible &= ~(corners < other).all(1)
    possible[:, possible.sum(0) > MANY] = True
    counts = possible.sum(0)
    labels = np.empty((down.shape[1] * across.shape[1], len(counts)), winners.dtype)
    for count in np.unique(counts):
        cells = np.flatnonzero(counts == count)
        classes = np.nonzero(possible[:, cells].T)[1].reshape(-1, count).T  # [count, cells], ascending
        inside = interpolated(corners[classes, :, cells], down, across)
        labels[:, cells] = best_class(inside, winners.dtype, classes.astype(winners.dtype))
    return labels


def interpolated(corners: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Values inside M cells, [count, pixels of a cell, M], from their four corners, [count, M, 4].

    One axis after the other, and by no matrix product: BLAS has threads of its own, which wait by spinning and take the
    cores from the network's.
    """
    top_left, top_right, bottom_left, bottom_right = corners.transpose(2, 0, 1)[..., None, :]
    up, low = down[:, :, None]
    left = top_left * up + bottom_left * low  # [count, factor_y, M]
    right = top_right * up + bottom_right * low
    near, far = across[:, :, None]
    inside = left[..., None, :] * near
    inside += right[..., None, :] * far
    return inside.reshape(len(inside), -1, inside.shape[-1])


def _labels_of_bands(scores: np.ndarray, rows, columns, dtype: np.dtype) -> np.ndarray:
    """Linear interpolation of any kind: one band of pixels between two rows of scores at a time."""
    (y0, y1, wy), (x0, x1, wx) = rows, columns
    best = best_class(scores, dtype)
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
            labels[part, pixels] = best_class(left + (right - left) * wx[pixels], dtype)
    return labels

"""The best class of each pixel: argmax(interpolate(scores)), exactly, at a small part of its cost.

Bilinear interpolation is a convex combination of four corners: where all four have the same best class, so has every
pixel between them. So only the cells whose corners disagree are interpolated.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..arrays import AnyArray, Cells, Floats, Labels, Masks
from ..engine_format.stage import Upsampling
from .resize_axis import Axis, Uniform, axis_of, uniform_of
from .score_window import ScoreWindow, gives_its_cells

LabelDtype = np.dtype[np.uint8 | np.uint16]

FEW_PLACES = 1000  # of which numpy.argmax finds the best class sooner than a pass for each class does
GROUP_WORTH = 500  # interpolated cells, times classes: what costs less is done for cells that need it not
CHUNK = 2 << 20  # score values interpolated at a time: bounds the working memory on noisy scores
ROWS_OF_A_BAND = 4  # between two rows of scores, and more, are interpolated by themselves; fewer with other bands
ROWS_OF_BANDS = 16  # at most, by time, for 5 to 150 classes
# Values of the result made at a time, where all are interpolated: a few of these fit a core's cache.
VALUES_AT_A_TIME = 1 << 18
PIXELS_AT_A_TIME = 1 << 22  # whose labels are made at once: several copies of them are


def best_by_rows(window: ScoreWindow, upsampling: Upsampling, dtype: LabelDtype, out: Labels | None = None) -> Labels:
    """The best class of each pixel of the window, a few rows at a time: what is copied on the way stays small."""
    start, stop = window.rows
    step = max(1, PIXELS_AT_A_TIME // window.width)
    if out is None and stop - start <= step:
        return _best(window if window.is_whole else window.needed(upsampling), upsampling, dtype)
    labels: Labels = np.empty((stop - start, window.width), dtype) if out is None else out
    for top in range(start, stop, step):
        bottom = min(top + step, stop)
        labels[top - start : bottom - start] = _best(window.of_rows(top, bottom).needed(upsampling), upsampling, dtype)
    return labels


def _best(window: ScoreWindow, upsampling: Upsampling, dtype: LabelDtype) -> Labels:
    """The best class of each pixel of the window, [rows, width]."""
    scores, first, (start, stop) = window.scores, window.first, window.rows
    left, (begin, end) = window.left, window.columns or (0, window.size[1])
    if gives_its_cells(window, upsampling):
        labels = np.empty((stop - start, window.width), dtype)
        step = max(1, VALUES_AT_A_TIME // (len(scores) * window.width))
        for top in range(start, stop, step):
            bottom = min(top + step, stop)
            labels[top - start : bottom - start] = best_class(
                scores[:, top - first : bottom - first, begin - left : end - left], dtype
            )
        return labels
    vertical = upsampling, 0, window.cells, window.padded[0], start, stop
    horizontal = upsampling, 1, window.across or scores.shape[2], window.padded[1], begin, end
    down, across = uniform_of(*vertical), uniform_of(*horizontal)
    if down and across:
        return _labels_of_equal_cells(window, down, across, dtype)
    rows, columns = axis_of(*vertical), axis_of(*horizontal)
    if upsampling.mode == "nearest":
        return best_class(scores, dtype)[rows.first[:, None] - first, columns.first - left]
    return _labels_of_bands(scores, rows.moved(-first), columns.moved(-left), dtype)


def best_class(scores: AnyArray, dtype: LabelDtype, classes: Labels | None = None) -> Labels:
    """argmax over the first axis, the first of equals, as `dtype`, which holds every class.

    A running maximum without branches: where there are many, numpy.argmax over a strided axis is four times slower.
    There is no NaN. `classes`: what each of
    the scores stands for, ascending along the first axis, in a shape that broadcasts with them; None: 0, 1, 2….
    """
    if classes is None:
        if scores[0].size <= FEW_PLACES:
            few: Labels = scores.argmax(0).astype(dtype)
            return few
        classes = np.arange(len(scores)).astype(dtype)
    best = scores[0].copy("K")  # in the scores' own order, as the others
    labels: Labels = np.empty_like(best, dtype)
    product: Labels = np.empty_like(best, dtype)
    labels[...] = classes[0]
    better = np.empty_like(best, bool)
    for score, label in zip(scores[1:], classes[1:], strict=True):
        np.greater(score, best, out=better)
        np.maximum(best, score, out=best)
        # A class that is better comes later, so its number is the larger one.
        np.multiply(better.view(np.uint8), label, out=product)
        np.maximum(labels, product, out=labels)
    return labels


def _labels_of_equal_cells(window: ScoreWindow, down: Uniform, across: Uniform, dtype: LabelDtype) -> Labels:
    """Linear interpolation by integer factors: all disagreeing cells at once."""
    scores = window.scores
    rows = down.corners(window.cells) - window.first
    columns = across.corners(window.across or scores.shape[2]) - window.left
    flat, width = scores.reshape(len(scores), -1), len(columns)
    corners = rows[:, None] * scores.shape[2] + columns  # of `flat`, at those of each cell
    best = best_class(flat, dtype).take(corners)
    labels = spread_labels(best, down.factor, across.factor)
    corner = best[:-1, :-1]
    y, x = np.nonzero((corner != best[:-1, 1:]) | (corner != best[1:, :-1]) | (corner != best[1:, 1:]))
    # Of each cell as many values are compared at its corners as 16 pixels have.
    step = max(1, CHUNK // (len(scores) * max(16, down.factor * across.factor)))
    for start in range(0, len(y), step):
        ys, xs = y[start : start + step], x[start : start + step]
        around = ys * width + xs + np.array([[0], [1], [width], [width + 1]])  # [4, M]
        for cells, block in _cell_labels(flat, corners.take(around), best.take(around), down.weights, across.weights):
            labels[ys[cells], :, xs[cells], :] = block.transpose(2, 0, 1)
    full = labels.reshape((len(rows) - 1) * down.factor, (len(columns) - 1) * across.factor)
    top, left = down.unwanted, across.unwanted
    return np.ascontiguousarray(full[top : top + window.height, left : left + window.width])


def spread_labels(best: Labels, factor_y: int, factor_x: int) -> Labels:
    """Labels [h, factor_y, w, factor_x] of the pixels between cells, as if all were the upper left cell's.

    `best`: the classes of the cells, [h + 1, w + 1].
    """
    corner = best[:-1, :-1]
    labels: Labels = np.empty((corner.shape[0], factor_y, corner.shape[1], factor_x), best.dtype)
    labels.reshape(len(corner), factor_y, -1)[:] = corner.repeat(factor_x, axis=1)[:, None]
    return labels


def _cell_labels(
    scores: Floats, corners: Cells, winners: Labels, down: Floats, across: Floats
) -> Iterator[tuple[Cells | slice, Labels]]:
    """Which of M cells, and labels of their pixels, [factor_y, factor_x, cells], until there are those of all.

    Args:
        scores: of each class at each score, [K, h · w].
        corners: which scores are the cells' corners, [4, M].
        winners: the best class of each of them, [4, M].
        down, across: as for `interpolated`.
    """
    possible = _possible(scores, corners, winners)
    counts = possible.sum(0)
    which, starts = np.nonzero(possible.T)[1], counts.cumsum() - counts
    for cells in _alike(counts):
        turns = np.arange(counts[cells].max())[:, None]
        # Ascending. The last again where there are fewer: it is no better than itself.
        classes = which[starts[cells] + np.minimum(turns, counts[cells] - 1)]
        values = scores.take(classes * scores.shape[1] + corners[:, None, cells])  # [4, classes, cells]
        inside = interpolated(values.transpose(1, 2, 0), down, across)
        yield cells, best_class(inside, winners.dtype, classes.astype(winners.dtype))


def _possible(scores: Floats, corners: Cells, winners: Labels) -> Masks:
    """The classes that may win somewhere in M cells, [K, M]. Arguments as for `_cell_labels`.

    One that is below the same other class at all four corners wins nowhere in the cell. Others: the corners' best.
    """
    values = scores.take(corners, axis=1)  # [K, 4, M]
    best = scores.take((winners.astype(np.intp) * scores.shape[1])[:, None] + corners)  # [4 winners, 4, M]
    below = values[:, None] < best  # [K, 4 winners, 4, M]
    lost = below[:, :, 0] & below[:, :, 1] & below[:, :, 2] & below[:, :, 3]
    possible: Masks = ~(lost[:, 0] | lost[:, 1] | lost[:, 2] | lost[:, 3])
    return possible


def _alike(counts: Cells) -> Iterator[Cells | slice]:
    """Groups of the cells in which so many classes may win: in most two, which are apart where that is less work."""
    if (counts.max() - 2) * len(counts) < GROUP_WORTH:
        yield slice(None)
        return
    for group in (counts <= 2, counts > 2):
        if group.any():
            yield np.flatnonzero(group)


def interpolated(corners: Floats, down: Floats, across: Floats) -> Floats:
    """Values inside M cells, [count, factor_y, factor_x, M], from their four corners, [count, M, 4].

    One axis after the other, and by no matrix product: BLAS has threads of its own, which wait by spinning and take the
    cores from the network's.
    """
    count, cells, _ = corners.shape
    places = corners.transpose(2, 0, 1)[..., None, :]
    # Into memory in the order in which NumPy's loops are few and long.
    sides, more = np.empty((2, 2, count, down.shape[1], cells), np.float32)  # left and right
    np.multiply(places[:2], down[0, :, None], out=sides)
    sides += np.multiply(places[2:], down[1, :, None], out=more)
    inside, rest = np.empty((2, across.shape[1], count, down.shape[1], cells), np.float32)
    near, far = across[:, :, None, None, None]
    np.multiply(sides[0], near, out=inside)
    inside += np.multiply(sides[1], far, out=rest)
    return inside.transpose(1, 2, 0, 3)


def _labels_of_bands(scores: Floats, vertical: Axis, horizontal: Axis, dtype: LabelDtype) -> Labels:
    """Linear interpolation of any kind: a few bands at a time, of the pixels between two rows of scores each."""
    y0, y1, x0, x1 = vertical.first, vertical.second, horizontal.first, horizontal.second
    best = best_class(scores, dtype)
    labels, mixed = best[y0[:, None], x0], _disagreeing(best)
    if len(y0) < ROWS_OF_A_BAND * (int(y0[-1]) - int(y0[0]) + 1):
        return _labels_of_rows(scores, vertical, horizontal, labels, mixed)
    start = 0
    while start < len(y0):
        stop = int(np.searchsorted(y0, y0[start], "right"))
        pixels = np.flatnonzero(mixed[y0[start]][x0])
        step = max(1, CHUNK // (len(scores) * max(1, len(pixels))))
        for first in range(start, stop if len(pixels) else start, step):
            part = slice(first, min(first + step, stop))
            weight = vertical.weight[part, None]
            # A row of scores is read once for all its pixels.
            band = scores[:, y0[[start]]] * (1 - weight) + scores[:, y1[[start]]] * weight
            left, right = band[:, :, x0[pixels]], band[:, :, x1[pixels]]
            labels[part, pixels] = best_class(left + (right - left) * horizontal.weight[pixels], dtype)
        start = stop
    return labels


def _labels_of_rows(scores: Floats, vertical: Axis, horizontal: Axis, labels: Labels, mixed: Masks) -> Labels:
    """As _labels_of_bands, of bands of few rows: several at once, as Python's steps would take more time than NumPy's.

    Args:
        labels: of each pixel's first score, which those become that lie between scores of other classes.
        mixed: of each score, whether those right and below are of other classes.
    """
    y0, y1, x0, x1 = vertical.first, vertical.second, horizontal.first, horizontal.second
    rows = min(max(1, VALUES_AT_A_TIME // (len(scores) * len(x0))), ROWS_OF_BANDS)
    for first in range(0, len(y0), rows):
        part = slice(first, min(first + rows, len(y0)))
        among = mixed.take(y0[part], 0)
        pixels = np.flatnonzero(np.asarray(among.any(0))[x0])
        if not len(pixels):
            continue
        if 2 * len(pixels) > len(x0):
            pixels = np.arange(len(x0))  # to choose among them takes longer
        weight = vertical.weight[part, None]
        band, below = scores.take(y0[part], 1), scores.take(y1[part], 1)
        band *= 1 - weight
        below *= weight
        band += below
        left, inside = band.take(x0[pixels], 2), band.take(x1[pixels], 2)
        inside -= left
        inside *= horizontal.weight[pixels]
        inside += left
        # Others stay: their two best may be equal but for rounding, and no label depends on what is beside it.
        found, wanted = best_class(inside, labels.dtype), among.take(x0[pixels], 1)
        if len(pixels) == len(x0):
            np.copyto(labels[part], found, where=wanted)
        else:
            np.copyto(found, labels[part, pixels], where=~wanted)
            labels[part, pixels] = found
    return labels


def _disagreeing(best: Labels) -> npt.NDArray[np.bool_]:
    """Of the best classes of scores: whether those right, below and right below a cell are others; [h, w]."""
    right = np.concatenate([best[:, 1:], best[:, -1:]], 1)
    other: npt.NDArray[np.bool_] = np.not_equal(best, right)
    other[:-1] |= (best[:-1] != best[1:]) | (best[:-1] != right[1:])
    return other

"""Labels whose borders follow the image's own, by a guided filter (He, Sun, Tang, 2013; He and Sun, 2015).

A score map has a cell for every 8 pixels or more, so labels interpolated from it alone have smooth borders that miss
those of things. The guided filter finds how scores go with colours in windows of 3×3 cells: the slopes of a linear
model. Here a pixel has the interpolated scores, as without it, and to them is added slopes · (its own colour, smoothed
a little − the colour interpolated from the cells'), where more than one class may win: the best of the cells around,
and others that are so close to it that colours could decide. So the network's word stays, and where the image shows
nothing, nothing is added.

All of it is local: a pixel's label depends on cells within REACH of its own and on no others, so tiles and bands with
that halo give the labels of the whole image. `benchmarks/refine.py` has what else was tried.
"""

import math

import numpy as np
import numpy.typing as npt

from ..arrays import AnyArray, Floats, ImageSource, Labels, Masks
from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Upsampling
from .argmax import CHUNK, best_class, interpolated, spread_labels
from .resize_axis import cell_weights
from .score_window import ScoreWindow
from .upsampling import against

RADIUS = 1  # of the windows, in cells
EPSILON = 7e-3  # variances of colours (of a range of 1) well below it count as flat
CLOSE = 0.05  # of that range: classes that such a difference of colour could bring to win count, besides the best, …
NEAR = 2  # … if they are the best of a cell so many cells away, at most
REACH = max(2 * RADIUS, NEAR) + 1  # cells: two windows, or those, and interpolation
BLOCK = 1 << 19  # scores refined at a time, about, and
PIXELS = 768  # a side: they bound the working memory
LEAST_BLOCK = 32  # cells a side
SMOOTHED = 16  # the sum of (1, 2, 1) along both axes
SPREAD = 4.4  # standard deviations of a channel that its range comes to, where its dtype does not tell


def refusal(card: ModelCard, upsampling: Upsampling, cell: tuple[int, int]) -> str | None:
    """Why labels of this network cannot be refined, or None. `cell`: (height, width) of a score's, in pixels."""
    if card.kind != "labels":
        return f"it gives {card.kind}, and --refine is of labels"
    if upsampling.mode == "none":
        return "its scores are full-size already"
    if upsampling.mode != "linear" or upsampling.coordinates not in ("half_pixel", "pytorch_half_pixel"):
        return f"its scores are enlarged by another rule ({upsampling.mode}, {upsampling.coordinates})"
    high, wide = upsampling.factor or cell
    if high != wide or high != int(high) or not 2 <= high <= 128:
        return f"its scores are enlarged by {high:g}×{wide:g}, and not by one whole number from 2 to 128"
    if upsampling.factor is None and card.size_multiple % int(high):
        return f"its images are padded to multiples of {card.size_multiple}, and its scores stand {high} pixels apart"
    return None


def refined_labels(
    window: ScoreWindow,
    upsampling: Upsampling,
    card: ModelCard,
    stride: int,
    image: ImageSource,
    out: Labels | None = None,
) -> Labels:
    """Labels of the window's rows, from the core's scores and the image.

    Args:
        window: unless its scores begin with the first row of the score map, they begin REACH rows or more above those
            that the wanted pixels are in; and they end as many below, or with the map.
        upsampling, card: of a network that `refusal` has nothing against.
        stride: pixels of a cell, in both directions.
        image: [H, W, C], as the card has it; or what gives its rows as `image[top:bottom, left:right]`.
        out: where to write them; None: new memory.

    Returns:
        [rows, width] uint8, or uint16 for more than 256 classes.
    """
    start, stop = window.rows
    scores = _logits(np.asarray(window.scores, np.float32), upsampling, card)
    window = window.holding(scores)
    labels: Labels = np.empty((window.height, window.width), card.label_dtype) if out is None else out
    side = max(LEAST_BLOCK, min(math.isqrt(BLOCK // len(scores)), PIXELS // stride)) * stride
    # Blocks stand on a grid of the whole image: which rows are wanted changes nothing.
    for top in range(start // side * side, stop, side):
        for left in range(0, window.width, side):
            rows = max(top, start), min(top + side, stop)
            columns = left, min(left + side, window.width)
            block = _refined_block(window, card, stride, image, rows, columns)
            labels[rows[0] - start : rows[1] - start, slice(*columns)] = block
    return labels


def _refined_block(
    window: ScoreWindow,
    card: ModelCard,
    stride: int,
    image: ImageSource,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> Labels:
    """Labels of some rows and columns of pixels, from the cells within REACH of them."""
    scores, first = window.scores, window.first
    (above, below), (before, after) = (
        (max(begin // stride - REACH, low), min(-(-end // stride) + REACH, high))
        for (begin, end), low, high in (
            (rows, first, first + scores.shape[1]),
            (columns, 0, scores.shape[2]),
        )
    )
    bottom, right = min(below * stride, window.size[0]), min(after * stride, window.width)
    part = np.asarray(image[above * stride : bottom, before * stride : right])
    labels = _refined(scores[:, above - first : below - first, before:after], *_colors(part, card), stride)
    top, left = above * stride, before * stride
    return labels[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]


def _logits(scores: Floats, upsampling: Upsampling, card: ModelCard) -> Floats:
    """Scores as logits; of one score, two with its threshold at equality."""
    if card.activation == "softmax":
        return np.log(np.maximum(scores, np.float32(1e-6))) if upsampling.activated else scores
    scores = against(scores, card.score_threshold)
    if card.activation == "sigmoid":
        return scores
    # float32 has no probability between that and 1.
    scores = np.clip(scores, np.float32(1e-30), np.float32(1 - 6e-8))
    logits: Floats = np.log(scores / (1 - scores))
    return logits


def _colors(image: AnyArray, card: ModelCard) -> tuple[AnyArray, np.float32]:
    """An image's pixels as [H, W, 1 or 3], and what brings them to a range of about 1."""
    scale = np.float32(1 / 255)
    if card.dtype != "uint8":
        mean, std = (np.asarray(values, np.float32) for values in (card.mean, card.std))
        with np.errstate(over="ignore", invalid="ignore"):
            image = (image - mean) / (std * np.float32(SPREAD))
        # What marks missing values is far from all colours, and so far that nothing beside it would count.
        image, scale = np.clip(np.nan_to_num(image), -1, 1), np.float32(1)
    if image.shape[2] not in (1, 3):  # no colours: brightness
        image = image.mean(2, dtype=np.float32, keepdims=True)
    return image, scale


@np.errstate(invalid="ignore", over="ignore")  # of infinite scores, as networks have that rule a class out
def _refined(scores: Floats, image: AnyArray, scale: np.float32, stride: int) -> Labels:
    """Labels [h·stride, w·stride] (or fewer, where the image ends) of a block: scores [K, h, w] and its pixels."""
    best = best_class(scores, np.dtype(np.uint8 if len(scores) <= 256 else np.uint16))
    present = np.unique(best)  # no other class becomes a pixel's label
    if len(present) == 1:
        return np.full(image.shape[:2], present[0])
    guide = block_means(image, stride, scores.shape[1:]) * scale
    scores = scores[present]
    slopes = box_filter(slopes_of(scores, guide))
    if not (known := np.isfinite(slopes)).all():  # beside scores of −∞, which rule a class out: as without refining
        slopes[~known] = 0
    offsets = scores - (slopes * guide).sum(1)
    possible = contenders(np.searchsorted(present, best).astype(best.dtype), scores, slopes)
    blocks = smoothed_blocks(image, stride, best.shape)
    labels = guided_labels(best, present, possible, slopes, offsets, blocks, scale / np.float32(SMOOTHED))
    return labels[: image.shape[0], : image.shape[1]]


def contenders(best: Labels, scores: Floats, slopes: Floats) -> Masks:
    """The classes that may win around each cell, [K, h, w] bool, from the best [h, w], scores and slopes [K, C, h, w].

    The best; and those below it that are the best of cells within NEAR, and would be here too, were each channel CLOSE
    off. Not those that equal it: where scores have a floor they all do, and the first of equals stands.
    """
    own = best == np.arange(len(scores))[:, None, None]
    near = own
    for axis in (1, 2):
        # Views with that axis in front, of what is and of what becomes.
        before, after = near.swapaxes(0, axis), near.copy().swapaxes(0, axis)
        for by in range(1, NEAR + 1):
            after[by:] |= before[:-by]
            after[:-by] |= before[by:]
        near = after.swapaxes(0, axis)
    highest = np.take_along_axis(scores, best[None], 0)
    could = np.abs(slopes - np.take_along_axis(slopes, best[None, None], 0)).sum(1)
    could *= np.float32(CLOSE)
    could += scores
    possible: Masks = own | (near & (scores < highest) & (could >= highest))
    return possible


def block_means(image: AnyArray, stride: int, cells: tuple[int, int]) -> Floats:
    """Means, float32 [C, *cells], of the pixels of each cell of an image [H, W, C], its edge repeated beyond it."""
    rows = np.minimum(np.arange(cells[0] * stride), image.shape[0] - 1).reshape(-1, stride)
    total = image[rows[:, 0]].astype(np.uint16 if image.dtype == np.uint8 else np.float32)
    for place in range(1, stride):
        total += image[rows[:, place]]
    columns = np.minimum(np.arange(cells[1] * stride), image.shape[1] - 1).reshape(-1, stride)
    blocks = total[:, columns[:, 0]].astype(np.float32)
    for place in range(1, stride):
        blocks += total[:, columns[:, place]]
    return np.ascontiguousarray(blocks.transpose(2, 0, 1)) * np.float32(1 / stride**2)


def smoothed_blocks(image: AnyArray, stride: int, cells: tuple[int, int]) -> AnyArray:
    """The pixels between the centres of cells: of an image [H, W, C], smoothed by (1, 2, 1) along both axes.

    Scores know nothing of single pixels: without it, noise in them frays the borders.

    Returns:
        [h + 1, stride, w + 1, stride, C] uint16 or float32, for h × w cells: SMOOTHED times the image's values; its
        edge is repeated beyond it.
    """
    dtype = np.uint16 if image.dtype == np.uint8 else np.float32
    half = stride // 2
    beyond = [
        (stride - half + 1, count * stride - size + half + 1) for count, size in zip(cells, image.shape, strict=False)
    ]
    total = np.pad(image, (*beyond, (0, 0)), "edge")
    for _ in range(2):
        total = np.add(total[:-1], total[1:], dtype=dtype)
        total = np.add(total[:, :-1], total[:, 1:], dtype=dtype)
    return total.reshape(cells[0] + 1, stride, cells[1] + 1, stride, -1)


def box_filter(maps: AnyArray, radius: int = RADIUS) -> AnyArray:
    """Means over windows of 2·radius + 1 along the last two axes of [..., h, w]; edges are repeated."""
    for axis in (maps.ndim - 2, maps.ndim - 1):
        last = maps.shape[axis] - 1
        places = np.arange(last + 1)
        total = maps.copy()
        for shift in range(1, radius + 1):
            for moved in (np.minimum(places + shift, last), np.maximum(places - shift, 0)):
                total += maps.take(moved, axis)
        total *= 1 / (2 * radius + 1)
        maps = total
    return maps


def slopes_of(scores: Floats, guide: Floats, radius: int = RADIUS, epsilon: float = EPSILON) -> Floats:
    """How scores go with colours around each cell: the slopes [K, C, h, w] of the guided filter's linear models.

    Args:
        scores: [K, h, w].
        guide: colours of the same cells, [1 or 3, h, w].
        radius: of the windows.
        epsilon: of variances of the guide.
    """
    channels = len(guide)
    # In double precision: colours mostly differ in brightness alone, and the other variances are small.
    exact = guide.astype(np.float64)
    middle = box_filter(exact, radius)
    variance = box_filter(exact[:, None] * exact[None], radius) - middle[:, None] * middle[None]
    variance[range(channels), range(channels)] += epsilon
    inverse = _inverted(variance).astype(np.float32)
    means, center = middle.astype(np.float32), box_filter(scores, radius)
    together = [box_filter(scores * part, radius) - center * mean for part, mean in zip(guide, means, strict=True)]
    return np.stack([sum(inverse[one, two] * together[two] for two in range(channels)) for one in range(channels)], 1)


def _inverted(matrices: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Symmetric matrices, [1, 1, …] or [3, 3, …], inverted; by cofactors, as numpy.linalg takes ten times as long."""
    if len(matrices) != 3:
        return 1 / matrices
    (a, b, c), (_, d, e), (_, _, f) = matrices
    rows = [
        [d * f - e * e, c * e - b * f, b * e - c * d],
        [None, a * f - c * c, b * c - a * e],
        [None, None, a * d - b * b],
    ]
    determinant = a * rows[0][0] + b * rows[0][1] + c * rows[0][2]
    adjugate = np.stack([np.stack([rows[min(i, j)][max(i, j)] for j in range(3)]) for i in range(3)])
    inverse: npt.NDArray[np.float64] = adjugate / determinant
    return inverse


def guided_labels(
    best: Labels,
    classes: Labels,
    possible: Masks,
    slopes: Floats,
    offsets: Floats,
    blocks: AnyArray,
    scale: np.float32,
) -> Labels:
    """Labels of pixels from the classes of cells, linear models of their scores, and the image's colours.

    As the exact upsampling does it: where one class is possible at four neighbours, it is that of the pixels between
    them; elsewhere slopes and offsets are interpolated, of the classes that are possible at one of the four, and
    applied to the image.

    Args:
        best: the best class of each cell, [h, w] uint8 or uint16.
        classes: the K classes that `possible`, `slopes` and `offsets` are of, [K] as `best`, ascending.
        possible: the classes that may win around each cell, its best one among them: [K, h, w] bool.
        slopes: [K, C, h, w] float32, of the image times `scale`.
        offsets: [K, h, w] float32.
        blocks: the image between the cells' centres, [h + 1, stride, w + 1, stride, C].
        scale: what the image is multiplied by.

    Returns:
        [h · stride, w · stride] as `best`.
    """
    stride = blocks.shape[1]
    half = stride // 2
    high, wide = best.shape
    rows, columns = (np.clip(np.arange(-1, size + 1), 0, size - 1) for size in (high, wide))
    labels = spread_labels(best[rows[:, None], columns], stride, stride)
    pairs = possible[:, rows[:-1]] | possible[:, rows[1:]]
    possible = pairs[:, :, columns[:-1]] | pairs[:, :, columns[1:]]
    y, x = np.nonzero(possible.sum(0) > 1)
    possible = possible[:, y, x]  # [K, M]
    counts = possible.sum(0)
    weights = cell_weights(stride, half)
    # [K, h·w, 1 + C]: what one cell has of a class lies together.
    flat = np.stack([offsets, *slopes.transpose(1, 0, 2, 3)], -1).reshape(len(offsets), -1, 1 + slopes.shape[1])
    for count in np.unique(counts):
        found = np.flatnonzero(counts == count)
        step = max(1, CHUNK // (count * flat.shape[2] * stride**2))
        for begin in range(0, len(found), step):
            chosen = found[begin : begin + step]
            ys, xs = y[chosen], x[chosen]
            which = np.nonzero(possible[:, chosen].T)[1].reshape(-1, count).T  # [count, M], ascending
            near_y, far_y, near_x, far_x = rows[ys] * wide, rows[ys + 1] * wide, columns[xs], columns[xs + 1]
            places = np.stack([near_y + near_x, near_y + far_x, far_y + near_x, far_y + far_x], 1)  # [M, 4]
            parts = flat[which[:, :, None], places[None]]  # [count, M, 4, 1 + C]
            # How much better than the first: of two classes, the most frequent case, that is half the work.
            parts = np.moveaxis(parts[1:] - parts[:1], 3, 1).reshape(-1, len(chosen), 4)
            inside = interpolated(parts, weights, weights).reshape(count - 1, -1, stride**2, len(chosen))
            colors = blocks[ys, :, xs].reshape(len(chosen), -1).T * scale  # [pixels · C, M]
            values = np.zeros((count, *inside.shape[2:]), np.float32)
            values[1:] = inside[:, 0]
            for channel, color in enumerate(colors.reshape(stride**2, -1, len(chosen)).swapaxes(0, 1)):
                values[1:] += inside[:, 1 + channel] * color
            block = best_class(values, best.dtype, classes[which][:, None])  # [pixels, M]
            labels[ys, :, xs, :] = block.reshape(stride, stride, -1).transpose(2, 0, 1)
    full = labels.reshape((high + 1) * stride, -1)
    return full[stride - half : full.shape[0] - half, stride - half : full.shape[1] - half]

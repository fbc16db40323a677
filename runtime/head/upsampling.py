"""From coarse scores to full-size labels, masks, probabilities and values, exactly.

Bilinear interpolation is a convex combination of four corners: where all four have the same best class, so
has every pixel between them. So only the cells whose corners disagree are interpolated, and the labels are
those of argmax(interpolate(scores)), at a small part of its cost. Of a mask the same holds with its threshold; only
probabilities and values are interpolated everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..arrays import AnyArray, Cells, Floats, Labels, Masks
from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Upsampling
from .resize_axis import Axis, Uniform, axis_of, uniform_of

LabelDtype = np.dtype[np.uint8 | np.uint16]

FEW_PLACES = 1000  # of which numpy.argmax finds the best class sooner than a pass for each class does
GROUP_WORTH = 500  # interpolated cells, times classes: what costs less is done for cells that need it not
CHUNK = 2 << 20  # score values interpolated at a time: bounds the working memory on noisy scores
# Values of the result made at a time, where all are interpolated: a few of these fit a core's cache.
VALUES_AT_A_TIME = 1 << 18
ROWS_OF_A_BAND = 4  # between two rows of scores, and more, are interpolated by themselves; fewer with other bands
ROWS_OF_BANDS = 16  # at most, by time, for 5 to 150 classes
PIXELS_AT_A_TIME = 1 << 22  # whose labels are made at once: several copies of them are
KINDS = ("labels", "probabilities", "masks", "values")  # of results
LABEL_KINDS = ("labels", "refined")  # the second: labels whose borders follow the image's, of a network that may refine


@dataclass(frozen=True)
class ScoreWindow:
    """Rows of an image's pixels, and the part of its score map that they are made of.

    Attributes:
        scores: uncropped, [K, h, w] float. Cells beyond the image take part in its last pixels.
        padded: (height, width) of the core's input, in pixels.
        size: (height, width) of the image, in pixels; at most `padded`.
        rows: (first, after the last) of the pixels wanted.
        first: `scores` begin with this row of the score map.
        cells: rows of the whole score map.
        columns: (first, after the last) of the pixels wanted; None: all of the image. Of labels and masks alone.
        left: `scores` begin with this column of the score map.
        across: columns of the whole score map; None: those of `scores`.
    """

    scores: AnyArray
    padded: tuple[int, int]
    size: tuple[int, int]
    rows: tuple[int, int]
    first: int
    cells: int
    columns: tuple[int, int] | None = None
    left: int = 0
    across: int | None = None

    @classmethod
    def whole(cls, scores: AnyArray, padded: tuple[int, int], size: tuple[int, int]) -> "ScoreWindow":
        """All of an image, from its whole score map."""
        return cls(scores, padded, size, (0, size[0]), 0, scores.shape[1])

    def of_rows(self, start: int, stop: int) -> "ScoreWindow":
        """The same scores for other rows of pixels."""
        return replace(self, rows=(start, stop))

    def holding(self, scores: AnyArray) -> "ScoreWindow":
        """Other scores of the same cells."""
        return replace(self, scores=scores)

    @property
    def height(self) -> int:
        """Rows of pixels wanted."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Columns of pixels wanted."""
        return self.size[1] if self.columns is None else self.columns[1] - self.columns[0]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of an image: but for the padding, all of its scores are needed."""
        return self.rows == (0, self.size[0]) and self.scores.shape[1] == self.cells and self.columns is None

    def needed(self, upsampling: Upsampling) -> "ScoreWindow":
        """The same without the rows of scores that its rows of pixels are not made of."""
        first, stop = _cells_read(upsampling, 0, self.cells, self.padded[0], *self.rows)
        first = max(first, self.first)
        return replace(self, scores=self.scores[:, first - self.first : stop - self.first], first=first)

    def part(self, upsampling: Upsampling, rows: tuple[int, int], columns: tuple[int, int]) -> "ScoreWindow":
        """Of a whole image: a rectangle of its pixels, with the scores that these are made of."""
        read = [
            _cells_read(upsampling, axis, self.scores.shape[1 + axis], self.padded[axis], *span)
            for axis, span in enumerate((rows, columns))
        ]
        scores = self.scores[:, slice(*read[0]), slice(*read[1])]
        return replace(
            self, scores=scores, rows=rows, first=read[0][0], columns=columns, left=read[1][0],
            across=self.scores.shape[2],
        )  # fmt: skip


def new_result(kind: str, card: ModelCard, rows: int, columns: int) -> AnyArray:
    """Memory for a result of one of KINDS: labels [rows, columns], or [K, rows, columns] bool masks or float32."""
    if kind in LABEL_KINDS:
        return np.empty((rows, columns), card.label_dtype)
    return np.empty((card.scores, rows, columns), bool if kind == "masks" else np.float32)


def result_bytes(kind: str, card: ModelCard) -> int:
    """Bytes of a result of one of KINDS, per pixel."""
    if kind in LABEL_KINDS:
        return np.dtype(card.label_dtype).itemsize
    if kind == "scores":  # rounded up to whole cells
        return -(-4 * card.scores // card.stride**2)
    return card.scores * (1 if kind == "masks" else 4)


def result_from_scores(
    kind: str, window: ScoreWindow, upsampling: Upsampling, card: ModelCard, out: AnyArray | None = None
) -> AnyArray:
    """A result of one of KINDS from the core's scores, of the window's rows.

    Args:
        kind: of KINDS.
        window: the scores, and the rows of pixels wanted.
        upsampling: the network's last Resize.
        card: says how scores become labels.
        out: where to write it, as from `new_result` for these rows; None: new memory.
    """
    if kind == "masks":
        return masks_from_scores(window, upsampling, card, out)
    if kind != "labels":
        return values_from_scores(window, upsampling, card, out, probabilities=kind == "probabilities")
    return labels_from_scores(window, upsampling, card, out)


def labels_from_scores(
    window: ScoreWindow, upsampling: Upsampling, card: ModelCard, out: Labels | None = None
) -> Labels:
    """Labels, [rows, width] uint8, or uint16 for more than 256 classes. Arguments as for `result_from_scores`."""
    scores = np.asarray(window.scores, np.float32)
    if card.activation != "softmax":
        scores = against(scores, card.score_threshold)
    window = window if scores is window.scores else window.holding(scores)
    return _best_by_rows(window, upsampling, np.dtype(card.label_dtype), out)


def masks_from_scores(window: ScoreWindow, upsampling: Upsampling, card: ModelCard, out: Masks | None = None) -> Masks:
    """The mask of each class, where its own score is above its threshold: [K, rows, width] bool.

    Arguments as for `result_from_scores`.
    """
    out = new_result("masks", card, window.height, window.width) if out is None else out
    thresholds = card.thresholds if upsampling.activated else card.score_thresholds
    for mask, score, threshold in zip(out, np.asarray(window.scores, np.float32), thresholds, strict=True):
        two = against(score[None], threshold)
        _best_by_rows(window.holding(two), upsampling, np.dtype(np.uint8), mask.view(np.uint8))
    return out


def values_from_scores(
    window: ScoreWindow,
    upsampling: Upsampling,
    card: ModelCard,
    out: Floats | None = None,
    probabilities: bool = False,
) -> Floats:
    """The scores at full size, as ONNX's Resize gives them: [K, rows, width] float32.

    Made a few rows at a time, so that there is one copy of them. Arguments as for `result_from_scores`.

    Args:
        out: where to write them; None: new memory. It may be `window.scores` itself where these are full-size.
        probabilities: take the card's softmax or sigmoid of them, unless the network has done so.
    """
    window = window.holding(np.asarray(window.scores, np.float32))
    start, stop = window.rows
    out = new_result("values", card, window.height, window.width) if out is None else out
    step = max(1, VALUES_AT_A_TIME // (len(window.scores) * window.width))
    for top in range(start, stop, step):
        bottom = min(top + step, stop)
        part = out[:, top - start : bottom - start]
        _interpolate(window.of_rows(top, bottom), upsampling, part)
        if probabilities and not upsampling.activated:
            _activate(part, card)
    return out


def against(scores: Floats, threshold: float) -> Floats:
    """One score as two classes, of which the second is best where the score is above its threshold."""
    return np.concatenate([np.full_like(scores, threshold), scores])


def _best_by_rows(window: ScoreWindow, upsampling: Upsampling, dtype: LabelDtype, out: Labels | None = None) -> Labels:
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


def _gives_its_cells(window: ScoreWindow, upsampling: Upsampling) -> bool:
    """Whether pixels are cells: where nothing is upsampled, or to the size that scores have already.

    Interpolated, each pixel would be compared with its neighbours, and take ten times as long.
    """
    if upsampling.mode == "none":
        return True
    cells = (window.cells, window.across or window.scores.shape[2])
    return cells == window.padded if upsampling.factor is None else upsampling.factor == (1, 1)


def _best(window: ScoreWindow, upsampling: Upsampling, dtype: LabelDtype) -> Labels:
    """The best class of each pixel of the window, [rows, width]."""
    scores, first, (start, stop) = window.scores, window.first, window.rows
    left, (begin, end) = window.left, window.columns or (0, window.size[1])
    if _gives_its_cells(window, upsampling):
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


def _interpolate(window: ScoreWindow, upsampling: Upsampling, out: Floats) -> None:
    """Write the pixels of the window, [K, rows, width], into `out`."""
    scores, first, (start, stop) = window.scores, window.first, window.rows
    if _gives_its_cells(window, upsampling):
        if not np.may_share_memory(out, scores):
            out[:] = scores[:, start - first : stop - first, : window.width]
        return
    vertical = axis_of(upsampling, 0, window.cells, window.padded[0], start, stop).moved(-first)
    horizontal = axis_of(upsampling, 1, scores.shape[2], window.padded[1], 0, window.width)
    if upsampling.mode == "nearest":
        out[:] = scores[:, vertical.first[:, None], horizontal.first]
        return
    weight = vertical.weight[:, None]
    band = scores[:, vertical.first] * (1 - weight) + scores[:, vertical.second] * weight
    left, right = band[:, :, horizontal.first], band[:, :, horizontal.second]
    right -= left
    right *= horizontal.weight
    np.add(left, right, out=out)
    if upsampling.fades:
        assert upsampling.factor is not None, "checked by Upsampling"
        out *= _fading(upsampling.factor[0], window.cells, start, stop)[:, None]
        out *= _fading(upsampling.factor[1], scores.shape[2], 0, window.width)


def _fading(factor: float, cells: int, start: int, stop: int) -> Floats:
    """What a bilinear transposed convolution leaves of a score, by pixel: less beyond the outermost cells' centres."""
    x = (np.arange(start, stop, dtype=np.float64) + 0.5) / factor - 0.5
    left: Floats = (1 + np.minimum(x, 0) - np.maximum(x - (cells - 1), 0)).astype(np.float32)
    return left


def _activate(values: Floats, card: ModelCard) -> None:
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


def last_cells(upsampling: Upsampling, cells: int, padded: int, pixels: int) -> Cells:
    """The last row of the score map, of `cells` rows, that each of the image's `pixels` rows is made of."""
    if upsampling.mode == "none":
        return np.arange(pixels)
    found = axis_of(upsampling, 0, cells, padded, 0, pixels)
    return found.first if upsampling.mode == "nearest" else found.second


def _cells_read(upsampling: Upsampling, axis: int, cells: int, padded: int, start: int, stop: int) -> tuple[int, int]:
    """(first, after the last) of the scores that pixels along an axis are made of."""
    if upsampling.mode == "none":
        return start, stop
    found = axis_of(upsampling, axis, cells, padded, start, stop)
    # One more on either side: where cells hold equal numbers of pixels, whole cells are looked at.
    return max(int(found.first.min()) - 1, 0), min(int(found.second.max()) + 2, cells)


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

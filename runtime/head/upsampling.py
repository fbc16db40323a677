"""From coarse scores to full-size labels, masks, probabilities and values, exactly.

Labels are made by `argmax.py`, which interpolates only where classes meet, and a mask by the same with its threshold;
only probabilities and values are interpolated everywhere.
"""

import numpy as np

from ..arrays import AnyArray, Floats, Labels, Masks
from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Upsampling
from .argmax import VALUES_AT_A_TIME, best_by_rows
from .resize_axis import axis_of
from .score_window import ScoreWindow, gives_its_cells

KINDS = ("labels", "probabilities", "masks", "values")  # of results
LABEL_KINDS = ("labels", "refined")  # the second: labels whose borders follow the image's, of a network that may refine


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
    return best_by_rows(window, upsampling, np.dtype(card.label_dtype), out)


def masks_from_scores(window: ScoreWindow, upsampling: Upsampling, card: ModelCard, out: Masks | None = None) -> Masks:
    """The mask of each class, where its own score is above its threshold: [K, rows, width] bool.

    Arguments as for `result_from_scores`.
    """
    out = new_result("masks", card, window.height, window.width) if out is None else out
    thresholds = card.thresholds if upsampling.activated else card.score_thresholds
    for mask, score, threshold in zip(out, np.asarray(window.scores, np.float32), thresholds, strict=True):
        two = against(score[None], threshold)
        best_by_rows(window.holding(two), upsampling, np.dtype(np.uint8), mask.view(np.uint8))
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


def _interpolate(window: ScoreWindow, upsampling: Upsampling, out: Floats) -> None:
    """Write the pixels of the window, [K, rows, width], into `out`."""
    scores, first, (start, stop) = window.scores, window.first, window.rows
    if gives_its_cells(window, upsampling):
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

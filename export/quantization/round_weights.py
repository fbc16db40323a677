"""Weights as INT8, such that no kernel's sums of two products saturate; and as FP8."""

import ml_dtypes
import numpy as np
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

PAIR_LIMIT = 128  # of the magnitudes of two neighbours together: 255 · 128 < 2¹⁵
NO_LIMIT = 1e-12  # of a scale: above 0
ZEROS_SCALE = 1e-3  # of a channel of zeros: fine enough for its bias


def depthwise(node: NodeProto, weight: np.ndarray) -> bool:
    """Whether each channel is filtered alone: those kernels multiply one by one in wider integers."""
    groups = attributes(node).get("group", 1)
    return groups > 1 and groups == len(weight) and weight.shape[1] == 1


def round_weights(weight: np.ndarray, pairs: bool, least_scale: float = NO_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Weights [K, C, h, w] as int8 and a scale per output channel, float32 [K].

    With `pairs`, any two weights that are neighbours in the order (C, h, w) or (h, w, C), in which kernels walk
    them, have magnitudes that sum to at most PAIR_LIMIT: the range is reduced where it must be, not everywhere.
    Each channel takes the number of steps, 64 to 127, of least squared error.
    """
    rows: np.ndarray = weight.reshape(len(weight), -1)
    peak = np.abs(rows).max(1, keepdims=True)
    safe = np.where(peak > 0, peak, 1.0)
    if not pairs:
        scale = np.maximum(safe / 127, least_scale)
        integers = np.clip(np.round(rows / scale), -127, 127)
    else:
        best = np.full(rows.shape[:1], np.inf)
        integers, scale = np.zeros_like(rows), safe.copy()
        for steps in range(PAIR_LIMIT // 2, 128, 3):
            step = np.maximum(safe / steps, least_scale)
            tried = _limit_pairs(np.round(rows / step), weight.shape)
            error = ((tried * step - rows) ** 2).sum(1)
            better = error < best
            best[better], integers[better], scale[better] = error[better], tried[better], step[better]
    scale = np.where(peak > 0, scale, ZEROS_SCALE).astype(np.float32)[:, 0]
    return integers.reshape(weight.shape).astype(np.int8), scale


def round_to_fp8(weight: np.ndarray, least_scale: float = NO_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Weights [K, C, h, w] as E4M3, saturating, and a scale per output channel, float32 [K].

    The largest weight of a channel becomes 224 to 448, where the squared error is least: powers of two make no
    difference, but where weights lie between two of them does.
    """
    largest = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    rows: np.ndarray = weight.reshape(len(weight), -1).astype(np.float32)
    peak = np.abs(rows).max(1, keepdims=True)
    best = np.full(len(rows), np.inf)
    stored, scale = np.zeros(rows.shape, ml_dtypes.float8_e4m3fn), np.full_like(peak, ZEROS_SCALE)
    for stretch in np.arange(1, 2, 1 / 16, dtype=np.float32):
        step = np.where(peak > 0, np.maximum(peak * stretch / np.float32(largest), np.float32(least_scale)), scale)
        tried = np.clip(rows / step, -largest, largest).astype(ml_dtypes.float8_e4m3fn)
        error = ((tried.astype(np.float32) * step - rows) ** 2).sum(1)
        better = error < best
        best[better], stored[better], scale[better] = error[better], tried[better], step[better]
    return stored.reshape(weight.shape), scale[:, 0]


def _limit_pairs(integers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pull neighbours whose magnitudes sum to more than PAIR_LIMIT towards zero, half of the excess each."""
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        values = integers.reshape(shape).transpose(order)
        line = values.reshape(len(integers), -1).copy()
        size = np.abs(line)
        rows, places = np.nonzero(size[:, :-1] + size[:, 1:] > PAIR_LIMIT)
        # Few pairs are too large. Even ones first, then odd ones: within each, no weight is in two.
        for parity in (0, 1):
            chosen = places % 2 == parity
            row, left = rows[chosen], places[chosen]
            a, b = size[row, left], size[row, left + 1]
            excess = np.maximum(a + b - PAIR_LIMIT, 0)
            from_smaller = np.minimum(np.ceil(excess / 2), np.minimum(a, b))
            from_larger = excess - from_smaller
            size[row, left] = a - np.where(a <= b, from_smaller, from_larger)
            size[row, left + 1] = b - np.where(a <= b, from_larger, from_smaller)
        line = np.copysign(size, line)
        integers = line.reshape(values.shape).transpose(np.argsort(order)).reshape(len(integers), -1)
        if shape[2] == shape[3] == 1:
            break  # both orders are the same
    return integers

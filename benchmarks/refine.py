"""Borders: what finding them in the photograph, from the coarse scores, would gain, and what it would cost.

    python -m benchmarks.refine cam.engine --data ../shared/camvid [--count 30] [--json refine.json] [--plot refine.png]

Each candidate makes labels of full size from the engine's coarse scores and the photograph, in NumPy alone:

- `bilinear`: the engine's own upsampling, to compare with;
- `slopes added` is what `--refine` does: a guided filter's slopes add to the interpolated scores what the photograph
  shows beyond its coarse image (`runtime/head/refine.py`);
- `guided filter` (He, Sun, Tang, 2013): of the probabilities at full size;
- `fast guided filter` (He, Sun, 2015): its linear coefficients found at stride 8 or 4 in windows of 3×3, interpolated
  to full size, by the photograph's colour or brightness; only where neighbouring coarse pixels disagree;
- `joint bilateral` upsampling (Kopf et al., 2007);
- `mean field`: a CRF (Krähenbühl, Koltun, 2011) at stride 8 or 4 whose pixels see 8 neighbours, in two rounds;
- `mean field, guided`: its probabilities brought to full size by the fast guided filter.

Boundary IoU as Cheng et al. (2021) define it: IoU of the pixels within d of a mask's own border, inside it; d is 2 % of
the diagonal, and 0.5 % as they take for Cityscapes. Times: each round has every candidate and one whole call, in random
order; `added` is (candidate − bilinear) / whole call, the median over images and rounds. Drawn: photographs with the
true labels and those of `bilinear` and `--refine` (with --predictions their labels alone).
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.datasets import LabelledImages, load_dataset
from fcn_deploy.calibration.metrics import IGNORE, Metrics, confusion_matrix
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.head.argmax import best_class
from fcn_deploy.runtime.head.refine import (
    SMOOTHED,
    block_means,
    box_filter,
    guided_labels,
    refined_labels,
    slopes_of,
    smoothed_blocks,
)
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import labels_from_scores

from benchmarks.common import draw_labels
from fcn_deploy import ModelCard, Segmenter

SHARES = (0.02, 0.005)  # of the diagonal
NEIGHBOURS = ((0, 1), (1, -1), (1, 0), (1, 1))  # and their opposites


# Boundary IoU


def inner_border(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels of a mask, [H, W] bool, within `distance` (chessboard) of what is not in it; the image's edge counts."""
    inside = np.pad(mask, distance)
    for axis in (0, 1):
        total = np.cumsum(inside, axis, dtype=np.int32)
        total = np.concatenate([np.zeros_like(total.take([0], axis)), total], axis)
        size, width = mask.shape[axis], 2 * distance + 1
        inside = total.take(range(width, width + size), axis) - total.take(range(size), axis) == width
    return mask & ~inside


def border_counts(reference: np.ndarray, predicted: np.ndarray, classes: int, share: float) -> np.ndarray:
    """(intersection, union) of the inner borders by class, int64 [2, classes]; add them up over images.

    `share` of the diagonal is the distance. Pixels that are not counted in `reference` belong to no class in either.
    """
    distance = max(1, round(share * math.hypot(*reference.shape)))
    predicted = np.where(reference == IGNORE, IGNORE, predicted)
    counts = np.zeros((2, classes), np.int64)
    for index in range(classes):
        masks = [inner_border(labels == index, distance) for labels in (reference, predicted)]
        counts[:, index] = (masks[0] & masks[1]).sum(), (masks[0] | masks[1]).sum()
    return counts


def boundary_iou(counts: np.ndarray, confusion: np.ndarray) -> float:
    """The mean over the classes that the reference holds."""
    present = confusion.sum(1) > 0
    return float((counts[0, present] / counts[1, present]).mean())


# What the candidates are made of. Arrays are float32, [K, h, w] for scores and [C, h, w] for photographs in 0…1.


def enlarged(scores: np.ndarray, factor: int) -> np.ndarray:
    """Bilinear, half-pixel, by an even factor."""
    if factor == 1:
        return scores
    for axis in (1, 2):
        low = scores.take([0, *range(scores.shape[axis] - 1)], axis)
        high = scores.take([*range(1, scores.shape[axis]), -1], axis)
        shape = list(scores.shape)
        shape[axis] *= factor
        parts = []
        for place in range(factor):
            offset = (place + 0.5) / factor - 0.5
            other = low if offset < 0 else high
            parts.append(scores + np.float32(abs(offset)) * (other - scores))
        scores = np.stack(parts, axis + 1).reshape(shape)
    return scores


def softmax(scores: np.ndarray) -> np.ndarray:
    likely = np.exp(scores - scores.max(0))
    likely /= likely.sum(0)
    return likely


def linear_model(
    likely: np.ndarray, guide: np.ndarray, radius: int = 1, epsilon: float = 1e-4
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes [K, C, h, w] and offsets [K, h, w] of the guided filter: likely ≈ Σ slopes · guide + offsets."""
    slopes = slopes_of(likely, guide, radius, epsilon)
    offsets = box_filter(likely, radius) - (slopes * box_filter(guide, radius)).sum(1)
    return box_filter(slopes, radius), box_filter(offsets, radius)


def mean_field(
    scores: np.ndarray, guide: np.ndarray, rounds: int, apart: int, color: float, strength: float
) -> np.ndarray:
    """Probabilities after `rounds` of mean field.

    Each pixel hears those of 8 neighbours `apart` pixels away, as much as their colours are alike (`color`: standard
    deviation of the guide's), and weighs them by `strength`.
    """
    likely = softmax(scores)
    spans, norm = [], np.full(scores.shape[1:], 1e-3, np.float32)
    for down, right in NEIGHBOURS:
        down, right = down * apart, right * apart
        if down >= scores.shape[1] or abs(right) >= scores.shape[2]:
            continue
        here = slice(None, -down or None), slice(max(-right, 0), -right if right > 0 else None)
        there = slice(down, None), slice(max(right, 0), right if right < 0 else None)
        distance = ((guide[:, *here] - guide[:, *there]) ** 2).sum(0)
        alike = np.exp(distance * np.float32(-0.5 / color**2))
        norm[here] += alike
        norm[there] += alike
        spans.append((here, there, alike))
    factor = np.float32(strength) / norm
    for _ in range(rounds):
        heard = np.zeros_like(likely)
        for here, there, alike in spans:
            heard[:, *here] += likely[:, *there] * alike
            heard[:, *there] += likely[:, *here] * alike
        heard *= factor
        heard += scores
        likely = softmax(heard)
    return likely


def _guide(image: np.ndarray, stride: int, cells: tuple[int, int]) -> np.ndarray:
    return block_means(image, stride, cells) * np.float32(1 / 255)


# The candidates: scores [K, h, w], image [H, W, C] uint8, stride → labels [H, W]


def slopes_added(scores: np.ndarray, image: np.ndarray, stride: int) -> np.ndarray:
    head, card = Upsampling("linear", "half_pixel", (stride, stride)), ModelCard(tuple(map(str, range(len(scores)))))
    high, wide = (cells * stride for cells in scores.shape[1:])
    return refined_labels(ScoreWindow.whole(scores, (high, wide), image.shape[:2]), head, card, stride, image)


def guided_filter(scores: np.ndarray, image: np.ndarray, stride: int) -> np.ndarray:
    height, width = image.shape[:2]
    guide = image.mean(2, dtype=np.float32)[None] / 255
    likely = softmax(enlarged(scores, stride)[:, :height, :width])
    slopes, offsets = linear_model(likely, guide, radius=8, epsilon=1e-3)
    return best_class((slopes * guide).sum(1) + offsets, np.dtype(np.uint8))


def refined(
    scores: np.ndarray,
    image: np.ndarray,
    stride: int,
    *,
    finer: int = 1,
    field: bool = False,
    guided: bool = True,
    grey: bool = False,
) -> np.ndarray:
    """Mean field, the fast guided filter, or one after the other, at stride / finer."""
    scores, stride = enlarged(scores, finer), stride // finer
    guide = _guide(image, stride, scores.shape[1:])
    # Neighbours are 16 pixels away at stride 8, and 12 at stride 4: beyond what the scores' own blur mixes.
    likely = mean_field(scores, guide, 2, 3 if finer > 1 else 2, 0.05, 3.0) if field else softmax(scores)
    if not guided:
        return best_class(enlarged(likely, stride), np.dtype(np.uint8))[: image.shape[0], : image.shape[1]]
    guide = guide.mean(0, keepdims=True) if grey else guide
    image = image.mean(2, dtype=np.float32, keepdims=True) if grey else image
    best, classes = best_class(likely, np.dtype(np.uint8)), np.arange(len(likely), dtype=np.uint8)
    possible = best == classes[:, None, None]
    blocks, scale = smoothed_blocks(image, stride, best.shape), np.float32(1 / 255 / SMOOTHED)
    labels = guided_labels(best, classes, possible, *linear_model(likely, guide), blocks, scale)
    return labels[: image.shape[0], : image.shape[1]]


def joint_bilateral(scores: np.ndarray, image: np.ndarray, stride: int) -> np.ndarray:
    guide, low = image.transpose(2, 0, 1).astype(np.float32) / 255, _guide(image, stride, scores.shape[1:])
    y, x = ((np.arange(size) + 0.5) / stride - 0.5 for size in image.shape[:2])
    total, norm = 0, np.float32(0)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows = np.clip(np.round(y).astype(int) + down, 0, scores.shape[1] - 1)
            columns = np.clip(np.round(x).astype(int) + right, 0, scores.shape[2] - 1)
            distance = (rows - y)[:, None] ** 2 + (columns - x)[None] ** 2
            color = ((guide - low[:, rows[:, None], columns]) ** 2).sum(0)
            # A floor, so that a pixel like none of its neighbours still has the nearest's labels.
            weight = (np.exp(-distance / (2 * 0.7**2)) * (np.exp(-color / (2 * 0.1**2)) + 1e-6)).astype(np.float32)
            total, norm = total + weight * scores[:, rows[:, None], columns], norm + weight
    return best_class(total / norm, np.dtype(np.uint8))


CANDIDATES: dict[str, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "slopes added": slopes_added,
    "guided filter": guided_filter,
    "fast guided filter, stride 8": refined,
    "fast guided filter, stride 8, brightness": partial(refined, grey=True),
    "fast guided filter, stride 4": partial(refined, finer=2),
    "joint bilateral": joint_bilateral,
    "mean field, stride 8": partial(refined, field=True, guided=False),
    "mean field, stride 4": partial(refined, finer=2, field=True, guided=False),
    "mean field, guided, stride 8": partial(refined, field=True),
    "mean field, guided, stride 8, brightness": partial(refined, field=True, grey=True),
    "mean field, guided, stride 4": partial(refined, finer=2, field=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--split", default="val")
    parser.add_argument("--count", type=int, default=30, help="images, spread evenly over the split")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="names of candidates, separated by semicolons")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--predictions", action="store_true", help="draw no photographs and no true labels")
    options = parser.parse_args()
    names = options.only.split(";") if options.only else list(CANDIDATES)
    if unknown := [name for name in names if name not in CANDIDATES]:
        parser.error(f"no candidate {unknown[0]!r}; choose of {'; '.join(CANDIDATES)}")
    with Segmenter(options.engine, threads=options.threads) as net:
        try:
            data = load_dataset(options.data, options.split, count=options.count, card=net.card)
            result = measured(net, data, options, names)
        except MisuseError as error:
            parser.error(str(error))
    for line in table(result):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        labels = {}
        for name, refine in (("bilinear", False), ("refined", True)):
            with Segmenter(options.engine, threads=options.threads, refine=refine) as net:
                labels[name] = [net(data[index][0]) for index in range(len(data))]
        draw_labels(data, labels, options.plot, options.predictions)


def measured(net: Segmenter, data: LabelledImages, options: argparse.Namespace, names: list[str]) -> dict:
    """mIoU, boundary IoU and times of the candidates; the engine's own labels are the first row."""
    classes, stride = len(net.card.classes), net.card.stride
    if net.card.activation != "softmax" or net.network.manifest is None or stride not in (8, 16, 32):
        raise MisuseError(f"{net.network.path}: refining is measured on engines with coarse scores and an argmax")
    names, upsampling = ["bilinear", *names], net.network.upsampling
    confusions = np.zeros((len(names), classes, classes), np.int64)
    borders = np.zeros((len(names), len(SHARES), 2, classes), np.int64)
    times, random = np.zeros((len(data), options.rounds, len(names) + 1)), np.random.default_rng(0)
    for index in range(len(data)):
        image, reference = data[index]
        scores, plan = net.network.scores(image), net.plan(*image.shape[:2])

        def bilinear(scores=scores, plan=plan) -> np.ndarray:
            return labels_from_scores(ScoreWindow.whole(scores, plan.padded, plan.size), upsampling, net.card)

        calls = [bilinear]
        calls += [lambda one=CANDIDATES[name], s=scores, i=image: one(s, i, stride) for name in names[1:]]
        for place, call in enumerate(calls):
            labels = call()
            confusions[place] += confusion_matrix(reference, labels, classes)
            for which, share in enumerate(SHARES):
                borders[place, which] += border_counts(reference, labels, classes, share)
        calls.append(lambda i=image: net(i))
        for turn in range(options.rounds):
            for place in random.permutation(len(calls)):
                started = time.perf_counter()
                calls[place]()
                times[index, turn, place] = (time.perf_counter() - started) * 1e3
    rows = []
    for place, name in enumerate(names):
        added = times[..., place] - times[..., 0]
        rows.append(
            {
                "name": name,
                "miou": Metrics.of(confusions[place]).mean_iou,
                "boundary_iou": [boundary_iou(counts, confusions[place]) for counts in borders[place]],
                "ms": float(np.median(times[..., place])),
                "added": float(np.median(added / times[..., -1])),
            }
        )
    return {
        "engine": str(net.network.path), "images": len(data), "threads": options.threads, "rounds": options.rounds,
        "engine_ms": float(np.median(times[..., -1])), "shares": list(SHARES), "rows": rows,
    }  # fmt: skip


def table(result: dict) -> list[str]:
    """Markdown: points of mIoU and of boundary IoU, what is gained on the first row, and the time."""
    first = result["rows"][0]
    heads = " | ".join(f"boundary IoU, {share:.1%} | gain" for share in result["shares"])
    lines = [
        f"{result['images']} images, {result['threads']} threads; whole call: {result['engine_ms']:.1f} ms",
        f"| candidate | mIoU | gain | {heads} | ms | added | points a ms |",
        "|---|" + "---|" * (5 + 2 * len(result["shares"])),
    ]
    for row in result["rows"]:
        pairs = zip(row["boundary_iou"], first["boundary_iou"], strict=True)
        words = " | ".join(f"{100 * iou:.2f} | {100 * (iou - base):+.2f}" for iou, base in pairs)
        added = row["ms"] - first["ms"]
        per_ms = f"{100 * (row['boundary_iou'][0] - first['boundary_iou'][0]) / added:.2f}" if added > 0 else "–"
        lines.append(
            f"| {row['name']} | {100 * row['miou']:.2f} | {100 * (row['miou'] - first['miou']):+.2f} | {words} | "
            f"{row['ms']:.1f} | {row['added']:+.0%} | {per_ms} |"
        )
    return lines


if __name__ == "__main__":
    main()

"""The sections on accuracy: stages, other sizes, classes, confusion, and the worst images."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.calibration.report.charts import Series, key, line_chart
from fcn_deploy.calibration.report.layout import (
    NONE,
    Bars,
    Block,
    Chart,
    Gallery,
    Number,
    Section,
    Shade,
    Swatch,
    Table,
    counted,
    in_ms,
    in_points,
    percent,
    ratio,
)
from fcn_deploy.calibration.report.results import MIXED, OWN, Entry, ImageResult, metrics_of
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.images.overlay import overlay

SIZE_GROUPS = 10  # rows at most of the tables by size
CONFUSIONS = 12  # rows of the largest confusions
MATRIX_WORDS = 40  # up to so many classes each cell of the confusion matrix has room for a decimal


def sections_on_accuracy(entries: Sequence[Entry]) -> list[Section]:
    """The sections of models that were evaluated."""
    entries = [entry for entry in entries if entry.evaluated is not None]
    if not entries:
        return []
    last, several = entries[-1], len(entries) > 1
    of_last = f" of {last.name}" if several else ""
    scales, metrics = list(last.evaluation.results), last.evaluation.metrics
    lead = ["Metrics are those of Long, Shelhamer and Darrell (2015), in 0 to 1, over all counted pixels together."]
    if metrics.absent:
        lead.append(
            f"Means are over the {len(metrics.class_iou) - len(metrics.absent)} of {len(metrics.class_iou)} classes "
            "that the labels hold."
        )
    if several:
        lead.append("“Labels as the first” is the share of all pixels that have the same label as by the first model.")
    sections = [Section("stages", "Stages" if several else "Accuracy", [*lead, stages_table(entries)])]
    if len(scales) > 1:
        sections.append(_scales(entries))
    if len({result.size for result in last.evaluation.results[OWN]}) > 1:
        text = "Each image at its own size; mIoU is over the classes that the labels of its group hold."
        sections.append(Section("sizes", "By image size", [text, _sizes_table(entries)]))
    keys = [(key(Series(e.name, (), i)), e.name) for i, e in enumerate(entries)] if several else []
    table = classes_table(entries)
    sections.append(Section("classes", "By class", [replace(table, legend=keys)]))
    text = (
        f"Rows are the reference labels, columns the predictions{of_last}; cells are percentages of the row's pixels. "
        "The diagonal is each class's accuracy; mistakes are coloured by the square root, so that few are seen too."
    )
    blocks: list[Block] = [text, _confusion_table(last)]
    if (largest := _largest_confusions(last)).rows:
        blocks.append(largest)
    sections.append(Section("confusion", "Confusion matrix", blocks))
    if last.evaluation.worst:
        text = (
            f"The images with the lowest mIoU{of_last}, over the classes that their own labels hold. In the fourth "
            "picture wrong pixels are red, and dark ones are not counted."
        )
        sections.append(Section("worst", "Worst images", [text, _gallery(last)]))
    return sections


def stages_table(entries: Sequence[Entry]) -> Table:
    """The four metrics, size and time of evaluated models, and the difference from the first."""
    first, several = entries[0].evaluation.metrics, len(entries) > 1
    headers = ["model", "run as", "pixel accuracy", "mean accuracy", "mIoU", "freq.-weighted IoU"]
    headers += ["mIoU against the first, points", "labels as the first"] if several else []
    headers += ["file, MB", "ms/image"]
    rows = []
    for index, entry in enumerate(entries):
        m = entry.evaluation.metrics
        row = [entry.name, entry.kind, ratio(m.pixel_accuracy), ratio(m.mean_accuracy), ratio(m.mean_iou)]
        row.append(ratio(m.frequency_weighted_iou))
        if several:
            row.append(Number(NONE) if not index else in_points(m.mean_iou - first.mean_iou))
            row.append(percent(entry.evaluation.equal, 3))
        rows.append([*row, Number(f"{entry.bytes / 1e6:.1f}"), in_ms(entry.evaluation.milliseconds())])
    return Table("Each model on the same images, at their own sizes", headers, rows)


def scales_table(entries: Sequence[Entry]) -> Table:
    """mIoU and time of evaluated models at each scale."""
    several, last = len(entries) > 1, entries[-1].evaluation
    headers = ["images", "sizes", *(f"mIoU, {e.name}" if several else "mIoU" for e in entries)]
    headers.append("last against own size, points" if several else "against own size, points")
    headers += [f"ms/image, {e.name}" if several else "ms/image" for e in entries]
    rows = []
    for scale, results in entries[0].evaluation.results.items():
        values = [metrics_of(entry.evaluation.results[scale]).mean_iou for entry in entries]
        row = [scale_name(scale), extent(results), *map(ratio, values)]
        row.append(Number(NONE) if scale == OWN else in_points(values[-1] - last.metrics.mean_iou))
        rows.append([*row, *(in_ms(entry.evaluation.milliseconds(scale)) for entry in entries)])
    return Table("Accuracy and time where the same images come at other sizes", headers, rows)


def classes_table(entries: Sequence[Entry]) -> Table:
    """IoU by class of evaluated models."""
    last, card, several = entries[-1].evaluation.metrics, entries[0].card, len(entries) > 1
    headers = ["class", "share of pixels", *(f"IoU, {e.name}" if several else "IoU" for e in entries)]
    headers += ["last against first, points"] if several else []
    headers += ["accuracy, last" if several else "accuracy", "IoU from 0 to 1"]
    rows = []
    for index, name in enumerate(card.classes):
        values = [entry.evaluation.metrics.class_iou[index] for entry in entries]
        present = index not in last.absent
        row = [Swatch(name, card.colors[index]), percent(last.class_share[index], 2)]
        row += [ratio(value) if present else Number("absent") for value in values]
        row += [in_points(values[-1] - values[0])] if several else []
        row += [ratio(last.class_accuracy[index]), Bars([(v, i) for i, v in enumerate(values) if present])]
        rows.append(row)
    return Table("By class, in label order", headers, rows, "classes")


def _scales(entries: Sequence[Entry]) -> Section:
    blocks: list[Block] = [
        "Images are resized (bilinear, antialiased) and labelled at that size; their reference labels are resized to "
        "it by nearest neighbour at pixel centres, and compared there: without mistakes mIoU is 1 at every scale.",
    ]
    results = entries[0].evaluation.results
    if MIXED in results:
        blocks.append("Mixed: every image at an odd height and width of its own, 0.5 to 2 times as large.")
    numbers = sorted((float(scale), scale) for scale in results if scale != MIXED)
    lines = []
    for index, entry in enumerate(entries):
        points = [(number, metrics_of(entry.evaluation.results[scale]).mean_iou) for number, scale in numbers]
        lines.append(Series(entry.name, tuple((x, y) for x, y in points if not math.isnan(y)), index))
    if len(numbers) > 1 and any(line.points for line in lines):
        ticks = [number for number, _ in numbers]
        title = "mIoU against scale: " + "; ".join(
            f"{line.name} " + ", ".join(f"{y:.3f} at {x:g}" for x, y in line.points) for line in lines
        )
        svg = line_chart(lines, title, "scale of the images", "mIoU", x_ticks=ticks)
        blocks.append(Chart(svg, "mIoU against the scale of the images", legend(lines)))
    return Section("scales", "At other sizes", [*blocks, scales_table(entries)])


def _sizes_table(entries: Sequence[Entry]) -> Table:
    several = len(entries) > 1
    headers = ["size", "images"]
    headers += [f"mIoU, {e.name}" if several else "mIoU" for e in entries]
    headers += [f"ms/image, {e.name}" if several else "ms/image" for e in entries]
    rows = []
    for groups in zip(*(grouped(entry.evaluation.results[OWN]) for entry in entries), strict=True):
        row = [extent(groups[0]), Number(len(groups[0])), *(ratio(metrics_of(group).mean_iou) for group in groups)]
        rows.append([*row, *(in_ms(float(np.median([r.seconds for r in group])) * 1e3) for group in groups)])
    return Table("By size, the smallest first", headers, rows)


def _confusion_table(entry: Entry) -> Table:
    confusion, card = entry.evaluation.confusion, entry.card
    few = len(card.classes) <= MATRIX_WORDS
    rows = []
    for index, counts in enumerate(confusion):
        total, cells = int(counts.sum()), []
        for other, count in enumerate(counts):
            share = int(count) / total if total else 0.0
            text = (f"{share * 100:.1f}" if few else f"{share * 100:.0f}") if count else ""
            if not few and share < 0.005:
                text = ""
            strength = share if index == other else math.sqrt(share)
            cells.append(Shade(text, round(strength * 20) if text else 0, index == other))
        rows.append([Swatch(card.classes[index] + ("" if total else " (absent)"), card.colors[index]), *cells])
    caption = "Percent of the pixels of each reference class (rows), by predicted class (columns); empty cells: "
    caption += "none" if few else "below half of one"
    return Table(caption, ["", *card.classes], rows, "matrix" if few else "matrix many")


def _largest_confusions(entry: Entry) -> Table:
    confusion, card = entry.evaluation.confusion, entry.card
    wrong = confusion * (1 - np.eye(len(confusion), dtype=np.int64))
    order = [int(i) for i in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]]
    rows = []
    for reference, predicted in (divmod(index, len(confusion)) for index in order):
        if count := int(wrong[reference, predicted]):
            row: list[Any] = [Swatch(card.classes[reference], card.colors[reference])]
            row += [Swatch(card.classes[predicted], card.colors[predicted]), Number(f"{count:,}")]
            row.append(percent(count / int(confusion[reference].sum()), 1))
            rows.append([*row, percent(count / int(wrong.sum()), 1)])
    headers = ["labelled", "predicted", "pixels", "of the class", "of all mistakes"]
    return Table("The largest confusions", headers, rows)


def _gallery(entry: Entry) -> Gallery:
    card, rows, present = entry.card, [], set()
    for example in entry.evaluation.worst:
        name, metrics = example.result.name, example.result.metrics
        valid = example.reference != IGNORE
        shown = np.where(valid, example.reference, 0)
        grey = (example.photo @ np.array([0.299, 0.587, 0.114], np.float32))[:, :, None].repeat(3, 2)
        labels = overlay(example.photo, shown, card)
        labels[~valid] = (grey * 0.25)[~valid].astype(np.uint8)
        errors = grey * 0.55 + 90
        errors[~valid] = grey[~valid] * 0.25
        errors[valid & (example.reference != example.predicted)] = (225, 20, 50)
        present |= set(np.unique(shown[valid])) | set(np.unique(example.predicted))
        wrong = 1 - metrics.pixel_accuracy
        pictures = [
            (example.photo, f"the photo {name}", "photo"),
            (labels, f"{name} under its labels: {_words(shown[valid], card)}", "labels"),
            (
                overlay(example.photo, example.predicted, card),
                f"{name} under the prediction: {_words(example.predicted, card)}",
                "prediction",
            ),
            (
                errors.astype(np.uint8),
                f"{name} with {wrong:.1%} of the counted pixels in red, which are wrong",
                f"errors: {wrong:.1%}",
            ),
        ]
        height, width = example.result.size
        classes = int((example.result.total > 0).sum())
        heading = (
            f"{name}, {height}×{width}: mIoU {metrics.mean_iou:.3f} over {counted(classes, 'class', 'classes')}, "
            f"pixel accuracy {metrics.pixel_accuracy:.3f}"
        )
        rows.append((heading, [(_jpeg(picture), alt, caption) for picture, alt, caption in pictures]))
    legend = [(Swatch("", card.colors[i]), card.classes[i]) for i in sorted(int(i) for i in present)]
    return Gallery(rows, legend)


def _words(labels: np.ndarray, card: ModelCard) -> str:
    """The three largest classes and their shares."""
    counts = np.bincount(labels.ravel(), minlength=len(card.classes))
    largest = [int(i) for i in np.argsort(-counts, kind="stable")[:3] if counts[i]]
    return ", ".join(f"{card.classes[i]} {counts[i] / labels.size:.0%}" for i in largest) or "none"


def _jpeg(picture: np.ndarray) -> str:
    """A data URI of [h, w, 3] uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def grouped(results: Sequence[ImageResult], groups: int = SIZE_GROUPS) -> list[list[ImageResult]]:
    """Results by size, the smallest first; more sizes than groups are put together, evenly."""
    by_size: dict[tuple[int, int], list[ImageResult]] = {}
    for result in sorted(results, key=lambda r: (r.size[0] * r.size[1], r.size)):
        by_size.setdefault(result.size, []).append(result)
    parts = np.array_split(np.arange(len(by_size)), min(groups, len(by_size)))
    members = list(by_size.values())
    return [[result for index in part for result in members[index]] for part in parts]


def extent(results: Sequence[ImageResult]) -> str:
    """The size of images, or the smallest and the largest."""
    sizes = sorted({result.size for result in results}, key=lambda size: (size[0] * size[1], size))
    words = [f"{height}×{width}" for height, width in sizes]
    return words[0] if len(words) == 1 else f"{words[0]} to {words[-1]}, {len(words)} sizes"


def scale_name(scale: str) -> str:
    return {OWN: "own size", MIXED: "mixed odd sizes"}.get(scale, f"{scale}×")


def legend(lines: Sequence[Series]) -> list[tuple[Any, str]]:
    return [(key(line), line.name) for line in lines] if len(lines) > 1 else []

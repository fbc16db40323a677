"""Metrics of checkpoints, ONNX models and engines on labelled images of any size."""

import heapq
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.datasets import LabelledImages
from fcn_deploy.calibration.metrics import IGNORE, Metrics, confusion_matrix
from fcn_deploy.calibration.report.engine_report import EngineReport, read_report
from fcn_deploy.calibration.report.results import MIXED, OWN, Evaluated, Example, ImageResult
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.images.overlay import displayable
from PIL import Image

Predict = Callable[[np.ndarray], np.ndarray]
PredictWhere = Callable[[np.ndarray, np.ndarray], np.ndarray]

WORST = 6
THUMBNAIL = 360  # pixels of the longer side
SMALLEST_SCALE, LARGEST_SCALE = 0.05, 8.0


@dataclass(frozen=True)
class Prediction:
    """One image, labelled.

    Attributes:
        index: in its collection.
        image, reference, labels: [H, W, C], [H, W] and [H, W].
        confusion: int64 [K, K], by (reference, predicted).
        seconds: of the prediction.
    """

    index: int
    image: np.ndarray
    reference: np.ndarray
    labels: np.ndarray
    confusion: np.ndarray
    seconds: float


def predictions(
    predict: Predict, data: LabelledImages, classes: int, scale: str = OWN, where: PredictWhere | None = None
) -> Iterator[Prediction]:
    """Label a collection, image by image, at a scale (see `size_at`); with `where` only what the references count.

    Raises:
        DeployError: labels beyond the classes, or predictions of another size.
    """
    for index in range(len(data)):
        image, reference = data[index]
        height, width = size_at(scale, reference.shape[0], reference.shape[1], index)
        image, reference = resized(image, reference, height, width)
        start = time.perf_counter()
        labels = predict(image) if where is None else where(reference != IGNORE, image)
        seconds = time.perf_counter() - start
        try:
            confusion = confusion_matrix(reference, labels, classes)
        except ValueError as error:
            raise DeployError(f"{data.name(index)}: {error}; does the data fit the model?") from error
        yield Prediction(index, image, reference, labels, confusion, seconds)


def evaluate(
    predict: Predict,
    data: LabelledImages,
    classes: int,
    done: Callable[[int], None] = lambda count: None,
    where: PredictWhere | None = None,
) -> np.ndarray:
    """The confusion matrix of `predict` on a collection, image by image at its own size.

    Args:
        predict: image → labels.
        data: images with labels.
        classes: of the model.
        done: called after each image with how many are finished.
        where: likewise with bool [H, W] before the image: labels that may be anything where that is False.

    Returns:
        int64 [classes, classes], by (reference, predicted).
    """
    confusion = np.zeros((classes, classes), np.int64)
    for prediction in predictions(predict, data, classes, where=where):
        confusion += prediction.confusion
        done(prediction.index + 1)
    return confusion


def evaluate_in_detail(
    predict: Predict,
    data: LabelledImages,
    classes: int,
    scales: Sequence[str] = (OWN,),
    first: list[bytes] | None = None,
    worst: int = WORST,
    done: Callable[[], None] = lambda: None,
) -> Evaluated:
    """What `evaluate` counts, and beside it each image's own counts and time, other scales, and the worst images.

    Args:
        predict, data, classes: as of `evaluate`.
        scales: of `parse_scales`, OWN the first.
        first: packed labels of the model to compare with, by image; an empty list is filled with this model's.
        worst: so many images of the lowest mIoU are kept to look at.
        done: called after each image at each scale.
    """
    confusion = np.zeros((classes, classes), np.int64)
    results: dict[str, list[ImageResult]] = {scale: [] for scale in scales}
    examples: list[tuple[float, int, Example]] = []
    equal, pixels, reference = 0, 0, list(first or ())
    if len(data):
        predict(data[0][0])  # what a first call costs is no image's time
    for scale in scales:
        for prediction in predictions(predict, data, classes, scale):
            counts, index = prediction.confusion, prediction.index
            result = ImageResult(
                data.name(index), prediction.reference.shape, np.diag(counts).copy(), counts.sum(1), counts.sum(0),
                prediction.seconds,
            )  # fmt: skip
            results[scale].append(result)
            done()
            if scale != OWN:
                continue
            confusion += counts
            if reference:
                labels = np.frombuffer(zlib.decompress(reference[index]), np.uint16)
                equal += int((labels == prediction.labels.ravel()).sum())
                pixels += labels.size
            elif first is not None:
                first.append(zlib.compress(prediction.labels.astype(np.uint16).tobytes(), 1))
            score = result.metrics.mean_iou
            if worst and not math.isnan(score) and (len(examples) < worst or -score > examples[0][0]):
                # Of equal ones the earlier stays.
                example = (-score, -index, _example(result, prediction))
                (heapq.heappush if len(examples) < worst else heapq.heapreplace)(examples, example)
    shown = tuple(example for _, _, example in sorted(examples, key=lambda item: (-item[0], -item[1])))
    return Evaluated(confusion, results, shown, equal / pixels if pixels else None)


def _example(result: ImageResult, prediction: Prediction) -> Example:
    """A thumbnail: the photograph averaged, labels by nearest neighbour."""
    height, width = prediction.reference.shape
    factor = min(1.0, THUMBNAIL / max(height, width))
    height, width = max(1, round(height * factor)), max(1, round(width * factor))
    photo, reference = resized(displayable(prediction.image), prediction.reference, height, width)
    return Example(result, photo, reference, resized_labels(prediction.labels, height, width))


def parse_scales(text: str) -> list[str]:
    """`0.5,1.5,mixed` as the names of scales, images' own size first. Raises MisuseError."""
    scales = [OWN]
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word != MIXED:
            try:
                value = float(word)
            except ValueError:
                value = math.nan
            if not SMALLEST_SCALE <= value <= LARGEST_SCALE:
                raise MisuseError(
                    f"scale {word!r}; write numbers from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g} with commas, such as "
                    f"0.5,0.75,1.5,2, or {MIXED}: odd sizes, another for each image"
                )
            word = f"{value:g}"
        if word not in scales:
            scales.append(word)
    return scales


def size_at(scale: str, height: int, width: int, index: int) -> tuple[int, int]:
    """The size of an image at a scale of `parse_scales`; `mixed` draws an odd height and width by the image's index."""
    if scale != MIXED:
        return max(1, round(height * float(scale))), max(1, round(width * float(scale)))
    rng = np.random.default_rng(index)
    factor, aspect = 2 ** rng.uniform(-0.8, 0.8), 2 ** rng.uniform(-0.2, 0.2)
    return round(height * factor * aspect) | 1, round(width * factor / aspect) | 1


def resized(image: np.ndarray, labels: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image, [H, W, C] of any dtype, bilinear and antialiased, and labels, [H, W], by nearest pixel centres."""
    if labels.shape == (height, width):
        return image, labels
    labels = resized_labels(labels, height, width)

    def bilinear(values: np.ndarray) -> np.ndarray:
        return np.array(Image.fromarray(values).resize((width, height), Image.Resampling.BILINEAR))

    if image.dtype == np.uint8 and image.shape[2] == 3:
        return bilinear(image), labels
    values = np.stack([bilinear(band.astype(np.float32)) for band in np.moveaxis(image, 2, 0)], axis=2)
    return (np.rint(values) if np.issubdtype(image.dtype, np.integer) else values).astype(image.dtype), labels


def resized_labels(labels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Labels, [H, W], by nearest pixel centres."""
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    return labels[rows[:, None], columns]


@dataclass(frozen=True)
class OpenedModel:
    """A model opened for evaluation.

    Attributes:
        predict: image → labels.
        card: its own, or assumed.
        kind: what it is and what runs it, in a few words.
        report: of an engine; None where there is none, or it is none, or it is of unrefined labels.
    """

    predict: Predict
    card: ModelCard
    kind: str
    report: EngineReport | None = None


def open_model(path: Path, threads: int | None = None, refine: bool = False) -> OpenedModel:
    """A .safetensors (or .pth), .onnx or .engine, ready to label images; an engine's labels refined if asked for.

    Raises:
        MisuseError, DeployError: a file that is missing, damaged or of another kind, or a network of masks or values;
            labels that cannot be refined.
    """
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name a checkpoint, an ONNX or an engine")
    if refine and path.suffix != ".engine":
        raise MisuseError(f"{path} is no engine, and --refine is of engines; name one last, or omit --refine")
    if path.suffix in (".safetensors", ".pth", ".pt"):
        import torch
        from fcn_deploy.fcn.checkpoint import load_checkpoint
        from fcn_deploy.fcn.staged import TorchPredictor

        if threads:
            torch.set_num_threads(threads)
        checkpoint = load_checkpoint(path)
        _check_kind(checkpoint.card, path)
        checkpoint.model.channels_last()
        return OpenedModel(
            TorchPredictor(checkpoint.model, checkpoint.card), checkpoint.card, "PyTorch checkpoint, float32"
        )
    from fcn_deploy.runtime.network import Network  # whose images are in the card's numbers, as they are read here

    net = Network(path, threads=threads, refine=refine)
    _check_kind(net.card, path)
    if (manifest := net.manifest) is None:
        return OpenedModel(net.result, net.card, f"ONNX, {net.precision}, {net.backend.name}")
    kind = f"engine for {manifest.target}, {net.precision}, {net.backend.name}{', refined' if refine else ''}"
    return OpenedModel(net.result, net.card, kind, None if refine else read_report(path))


def same_classes(paths: Sequence[Path], cards: Sequence[ModelCard]) -> list[ModelCard]:
    """The cards of models that label the same classes, each with the names and colours of the first that has names.

    Raises:
        MisuseError: their classes differ in number, in name or in order.
    """

    def named(card: ModelCard) -> bool:
        return card.classes != tuple(f"class {index}" for index in range(len(card.classes)))

    chosen = next((index for index, card in enumerate(cards) if named(card)), 0)
    for path, card in zip(paths, cards, strict=True):
        if len(card.classes) != len(cards[chosen].classes):
            raise MisuseError(
                f"{path} has {len(card.classes)} classes and {paths[chosen]} has {len(cards[chosen].classes)}; "
                "evaluate models of the same classes together"
            )
        pairs = enumerate(zip(card.classes, cards[chosen].classes, strict=True))
        other = next((index for index, (a, b) in pairs if a != b), None)
        if other is not None and named(card):
            raise MisuseError(
                f"class {other} is {card.classes[other]!r} of {path} and {cards[chosen].classes[other]!r} of "
                f"{paths[chosen]}; evaluate models of the same classes, in the same order, together"
            )
    return [replace(card, classes=cards[chosen].classes, colors=cards[chosen].colors) for card in cards]


def _check_kind(card: ModelCard, path: Path) -> None:
    if card.kind != "labels":
        raise MisuseError(
            f"{path} gives {card.kind} ({card.activation}), and these metrics are of labels; compare what "
            f"Segmenter.{card.kind} gives with your references"
        )


def means_over(present: int) -> str:
    """Which classes the means are of, where some are absent."""
    if present == 1:
        return "(one class is present: the means say nothing of how others are found)"
    return f"(means are over the {present} classes present)"


def metrics_table(metrics: Metrics, classes: Sequence[str]) -> str:
    """The four metrics and a line per class, as text."""
    width = max(len(name) for name in (*classes, "class"))
    lines = [f"{'class':<{width}}  {'IoU':>7}  {'accuracy':>8}  {'share':>7}"]
    for name, iou, accuracy, share in zip(
        classes, metrics.class_iou, metrics.class_accuracy, metrics.class_share, strict=True
    ):
        if np.isnan(iou):
            lines.append(f"{name:<{width}}  {'absent':>7}")
        else:
            lines.append(f"{name:<{width}}  {iou:7.4f}  {accuracy:8.4f}  {share:7.2%}")
    lines += [
        "",
        f"pixel accuracy          {metrics.pixel_accuracy:.4f}",
        f"mean accuracy           {metrics.mean_accuracy:.4f}",
        f"mean IoU                {metrics.mean_iou:.4f}",
        f"frequency-weighted IoU  {metrics.frequency_weighted_iou:.4f}",
    ]
    if metrics.absent:
        lines.append(means_over(len(classes) - len(metrics.absent)))
    return "\n".join(lines)

"""Metrics of a checkpoint, an ONNX or an engine on labelled images of any size."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from calibration.datasets import LabelledImages
from calibration.metrics import Metrics, confusion_matrix
from runtime.engine_file import ModelCard
from runtime.errors import DeployError, MisuseError
from runtime.prepare import check_image, normalise

Predict = Callable[[np.ndarray], np.ndarray]


def evaluate(
    predict: Predict, data: LabelledImages, classes: int, done: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """The confusion matrix of `predict` on a collection, image by image at its own size.

    Args:
        predict: image → labels.
        data: images with labels.
        classes: of the model.
        done: called after each image with how many are finished.

    Returns:
        int64 [classes, classes], by (reference, predicted).
    """
    confusion = np.zeros((classes, classes), np.int64)
    for index in range(len(data)):
        image, labels = data[index]
        try:
            confusion += confusion_matrix(labels, predict(image), classes)
        except ValueError as error:
            raise DeployError(f"{data.name(index)}: {error}; does the data fit the model?") from error
        done(index + 1)
    return confusion


def torch_predictor(model, card: ModelCard) -> Predict:
    """The labels of a PyTorch network, on the device of its parameters, one image at a time."""
    import torch

    device = next(model.parameters()).device

    def predict(image: np.ndarray) -> np.ndarray:
        image = check_image(image, card)
        x = np.empty((1, card.channels, *image.shape[:2]), np.float32)
        normalise(image, card, x[0])
        with torch.inference_mode():
            logits = model(torch.from_numpy(x).to(device))[0]
        if card.activation != "softmax":
            return (logits[0] > card.score_threshold).cpu().numpy().astype(card.label_dtype)
        return logits.argmax(0).cpu().numpy().astype(card.label_dtype)

    return predict


def open_predictor(path: Path, threads: int | None = None) -> tuple[Predict, ModelCard]:
    """What labels images, and its card, for a .safetensors (or .pth), .onnx or .engine.

    Raises:
        MisuseError, DeployError: a file that is missing, damaged or of another kind, or a network of masks or values.
    """
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name a checkpoint, an ONNX or an engine")
    if path.suffix in (".safetensors", ".pth", ".pt"):
        import torch

        from fcn.checkpoint import load_checkpoint

        if threads:
            torch.set_num_threads(threads)
        checkpoint = load_checkpoint(path)
        _check_kind(checkpoint.card, path)
        model = checkpoint.model.to(memory_format=torch.channels_last)
        return torch_predictor(model, checkpoint.card), checkpoint.card
    from runtime.segmenter import Segmenter

    net = Segmenter(path, threads=threads)
    _check_kind(net.card, path)
    return net, net.card


def _check_kind(card: ModelCard, path: Path) -> None:
    if card.kind != "labels":
        raise MisuseError(
            f"{path} gives {card.kind} ({card.activation}), and these metrics are of labels; compare what "
            f"Segmenter.{card.kind} gives with your references"
        )


def table(metrics: Metrics, classes: Sequence[str]) -> str:
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
        lines.append(f"(means are over the {len(classes) - len(metrics.absent)} classes present)")
    return "\n".join(lines)

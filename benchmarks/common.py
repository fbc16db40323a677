"""What the benchmarks share: photographs of any size, sizes drawn by a seed, the memory of a process, plots."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.datasets import LabelledImages
from fcn_deploy.calibration.metrics import IGNORE, Metrics, confusion_matrix
from fcn_deploy.calibration.stream import ImageStream, open_stream
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import labels_from_scores
from fcn_deploy.runtime.pixels.prepare import padded_size, prepare
from onnx import ModelProto
from PIL import Image

from fcn_deploy import ModelCard

DRAWN = (0.9, 0.5, 0.1)  # images that are drawn, by their place among all by gain
RGB = ModelCard(("a", "b"))  # how photographs are read: 8-bit RGB


def photographs(data: str) -> ImageStream:
    """Photographs of a folder, a data set (its train split) or `digits`, as 8-bit RGB arrays by `.read(index)`."""
    layouts = ("train/images", "train", "images/train", "images", "JPEGImages")
    folders = [Path(data) / name for name in layouts if (Path(data) / name).is_dir()]
    return open_stream(str(folders[0]) if folders else data, RGB)


def fitted(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture, [H, W, 3] uint8, scaled to cover height × width and cropped in the middle."""
    scale = max(height / image.shape[0], width / image.shape[1])
    box = []
    for side, wanted in ((image.shape[1], width), (image.shape[0], height)):
        taken = min(wanted / scale, side)  # rounding may come to a little more
        box.append(((side - taken) / 2, (side + taken) / 2))
    (left, right), (top, bottom) = box
    part = (left, top, right, bottom)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR, box=part))


def mixed_sizes(count: int, least: tuple[int, int], most: tuple[int, int], seed: int = 0) -> list[tuple[int, int]]:
    """Seeded (height, width) from `least` to `most`, which are among them where `count` allows.

    Pixels are log-uniform between those of the two; heights are 0.5 to 2 times the widths.
    """
    random = np.random.default_rng(seed)
    low, high = math.log(math.prod(least)), math.log(math.prod(most))
    sizes = [least, most][:count]
    while len(sizes) < count:
        pixels, aspect = math.exp(random.uniform(low, high)), 2 ** random.uniform(-1, 1)
        sizes.append((max(1, round(math.sqrt(pixels * aspect))), max(1, round(math.sqrt(pixels / aspect)))))
    return sizes


def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes that a process holds now: `anonymous`, `files` (mapped), and `peak` of both together. Linux."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    names = {"anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    return {name: int(values[key][0]) * 1024 if key in values else 0 for name, key in names.items()}


def spread(values) -> tuple[float, float, float]:
    """(median, 10 %, 90 %)."""
    low, middle, high = np.percentile(values, (10, 50, 90))
    return float(middle), float(low), float(high)


def pyplot():
    """matplotlib's, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw_labels(
    data: LabelledImages, labels: dict[str, Sequence[np.ndarray]], out: Path, predictions: bool = False
) -> None:
    """Photograph, truth and labels by several, three images of them: of large, middling and small gain in mIoU.

    Args:
        data: the images.
        labels: of each image, [H, W], by the name of what made them; the gain is of the last on the first.
        out: the picture's file.
        predictions: neither photographs nor the truth, for where they may not be shown.
    """
    classes = len(data.classes)
    mious = {name: [] for name in labels}
    for index in range(len(data)):
        reference = data[index][1]
        for name, arrays in labels.items():
            mious[name].append(Metrics.of(confusion_matrix(reference, arrays[index], classes)).mean_iou)
    first, *_, last = mious.values()
    order = np.argsort(np.nan_to_num(np.subtract(last, first)))
    chosen = [int(order[round(place * (len(order) - 1))]) for place in DRAWN]
    colors = np.zeros((256, 3), np.uint8)
    colors[:classes] = data.colors
    plt = pyplot()
    columns = len(labels) + (0 if predictions else 2)
    figure, axes = plt.subplots(len(chosen), columns, figsize=(3.4 * columns, 2.9 * len(chosen)), layout="constrained")
    for line, index in zip(axes, chosen, strict=True):
        image, reference = data[index]
        shown = {} if predictions else {data.name(index): image[:, :, :3], "truth": colors[reference]}
        for name, arrays in labels.items():
            # What is not counted is left black, so that the eye does not count it either.
            masked = arrays[index] if predictions else np.where(reference == IGNORE, IGNORE, arrays[index])
            shown[f"{name}, mIoU {mious[name][index]:.2f}"] = colors[masked]
        for axis, (title, picture) in zip(line, shown.items(), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
    patches = [plt.Rectangle((0, 0), 1, 1, color=colors[index] / 255) for index in range(classes)]
    wide = min(classes, 2 * columns)
    figure.legend(patches, data.classes, loc="outside lower center", ncols=wide, fontsize=8, frameon=False)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def graph_labels(
    model: ModelProto | bytes, head: Upsampling, card: ModelCard, optimise: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Image → labels by a core network in ONNX Runtime on the CPU, as it is written unless `optimise`."""
    run = session(model if isinstance(model, bytes) else model.SerializeToString(), optimise=optimise)

    def labels(image: np.ndarray) -> np.ndarray:
        scores = run.run(["scores"], {"image": prepare(image, card)})[0][0]
        size = image.shape[:2]
        return labels_from_scores(ScoreWindow.whole(scores, padded_size(*size, card), size), head, card)

    return labels

"""What the benchmarks share: photographs of any size, sizes drawn by a seed, the memory of a process, plots."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from onnx import ModelProto
from PIL import Image

from calibration.stream import ImageStream, open_stream
from runtime import ModelCard
from runtime.backends.onnxruntime import session
from runtime.engine_file import Head
from runtime.head import labels_from_scores
from runtime.prepare import padded_size, prepare

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


def graph_labels(
    model: ModelProto | bytes, head: Head, card: ModelCard, optimise: bool
) -> Callable[[np.ndarray], np.ndarray]:
    """Image → labels by a core network in ONNX Runtime on the CPU, as it is written unless `optimise`."""
    run = session(model if isinstance(model, bytes) else model.SerializeToString(), optimise=optimise)

    def labels(image: np.ndarray) -> np.ndarray:
        scores = run.run(["scores"], {"image": prepare(image, card)})[0][0]
        size = image.shape[:2]
        return labels_from_scores(scores, head, card, padded_size(*size, card), size)

    return labels

"""How long a large scene takes at each validation of train-fcn: whole logits in PyTorch against the stages of engines.

    python -m benchmarks.validation [--size 5000x5200] [--rounds 3] [--backbone efficientnet-lite0] [--json v.json]

`whole`: the network's forward pass at once, full-size logits and argmax. `stages`: its parts by PyTorch, the first in
tiles, and exact upsampling (what is done while weights are rounded for INT8). `onnxruntime` and `openvino`: the same
parts by those, which is what train-fcn does for more than 8 megapixels of validation images, by OpenVINO where it is
installed; writing and opening the network is counted, as it is done anew at each validation. They take turns, in random
order, and shares are of a round. Times are of the process's own processors, which hardly depend on what else the
machine does, and by the clock. Weights are random; labels and the counts that metrics are made of are compared.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fcn_deploy.calibration.metrics import confusion_matrix
from fcn_deploy.fcn import staged
from fcn_deploy.fcn.architecture import AnySize, Architecture
from fcn_deploy.fcn.checkpoint import card_for
from fcn_deploy.fcn.cli.train_fcn import parse_size
from fcn_deploy.fcn.model import build_network
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession
from fcn_deploy.runtime.backends.openvino import OpenVinoSession, installed
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import normalise

from benchmarks.common import spread

CLASSES = 6


def whole(model: AnySize, card: ModelCard, image: np.ndarray) -> np.ndarray:
    """Labels by argmax of logits of the image's size."""
    x = np.empty((1, card.channels, *image.shape[:2]), np.float32)
    normalise(image, card, x[0])
    with torch.inference_mode():
        labels: np.ndarray = model(torch.from_numpy(x))[0].argmax(0).numpy()
    return labels


def exported(session: staged.Opens, model: AnySize, card: ModelCard, image: np.ndarray) -> np.ndarray:
    """Labels by the stages in one library."""
    net = staged.staged_network(model, card, exported=True, opens=session)
    labels: np.ndarray = net.result(image, "labels")
    return labels


@contextmanager
def timed(into: dict[str, list[float]]) -> Iterator[None]:
    """Seconds of the process's own processors, and by the clock."""

    def now() -> tuple[float, float]:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime, time.perf_counter()

    before = now()
    yield
    for name, start, end in zip(("processor", "clock"), before, now(), strict=True):
        into[name].append(end - start)


def compare(model: AnySize, card: ModelCard, image: np.ndarray, rounds: int) -> dict[str, dict[str, Any]]:
    """How → seconds, and the share of labels that are those of whole logits."""
    ways = {
        "whole": lambda of: whole(model, card, of),
        "stages": lambda of: staged.TorchPredictor(model, card)(of),
        "onnxruntime": lambda of: exported(OnnxRuntimeSession, model, card, of),
    }
    if installed():
        ways["openvino"] = lambda of: exported(OpenVinoSession, model, card, of)
    small = natural_noise(256, 256, card, 1)
    for way in ways.values():  # what a first call costs
        way(small)
    random = np.random.default_rng(0)
    seconds: dict[str, dict[str, list[float]]] = {name: {"processor": [], "clock": []} for name in ways}
    labels: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name in random.permutation(list(ways)).tolist():
            with timed(seconds[name]):
                labels[name] = ways[name](image)
    reference = natural_noise(*image.shape[:2], card, 2)[:, :, 0] % np.uint8(CLASSES)
    counts = {name: confusion_matrix(reference, found, CLASSES) for name, found in labels.items()}
    return {
        name: {
            **{f"{kind}_s": spread(taken) for kind, taken in each.items()},
            **{f"{kind}_share": spread(np.array(each[kind]) / np.array(seconds["whole"][kind])) for kind in each},
            "equal": float((labels[name] == labels["whole"]).mean()),
            "counts_apart": int(np.abs(counts[name] - counts["whole"]).sum()),
        }
        for name, each in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="5000x5200")
    parser.add_argument("--backbone", default="efficientnet-lite0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build_network(Architecture(CLASSES, backbone=options.backbone)).eval()
    model.channels_last()
    card = card_for(model.architecture, tuple(f"class {index}" for index in range(CLASSES)))
    height, width = parse_size(options.size)
    rows = compare(model, card, natural_noise(height, width, card, 0), options.rounds)
    print(f"{height}×{width}, {options.backbone}, {torch.get_num_threads()} threads")
    for name, row in rows.items():
        print(
            f"{name:<12} {row['processor_s'][0]:7.2f} s of processors, {row['processor_share'][0]:.3f} of whole; "
            f"{row['clock_s'][0]:7.2f} s by the clock, {row['clock_share'][0]:.3f}; {row['equal']:.5%} equal labels, "
            f"counts {row['counts_apart']} apart"
        )
    if options.json:
        options.json.write_text(json.dumps({"size": [height, width], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

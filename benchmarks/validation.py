"""How long a large scene takes at each validation of train-fcn: whole logits in PyTorch against the stages of engines.

    python -m benchmarks.validation [--size 5000x5200] [--rounds 3] [--backbone efficientnet-lite0] [--json v.json]

`whole`: the network's forward pass at once, full-size logits and argmax. `stages`: its parts by PyTorch, the first in
tiles, and exact upsampling (what is done while weights are rounded for INT8). `exported`: the same parts by ONNX
Runtime, which is what train-fcn does for more than 8 megapixels of validation images; writing the network is counted,
as it is done anew at each validation. They take turns, in random order; weights are random, and labels are compared.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fcn_deploy.fcn.architecture import AnySize, Architecture
from fcn_deploy.fcn.checkpoint import card_for
from fcn_deploy.fcn.cli.train_fcn import parse_size
from fcn_deploy.fcn.model import build_network
from fcn_deploy.fcn.staged import torch_predictor
from fcn_deploy.runtime.model_card import ModelCard
from fcn_deploy.runtime.noise_image import natural_noise
from fcn_deploy.runtime.prepare import normalise

from benchmarks.common import spread

CLASSES = 6


def whole(model: AnySize, card: ModelCard, image: np.ndarray) -> np.ndarray:
    """Labels by argmax of logits of the image's size."""
    x = np.empty((1, card.channels, *image.shape[:2]), np.float32)
    normalise(image, card, x[0])
    with torch.inference_mode():
        labels: np.ndarray = model(torch.from_numpy(x))[0].argmax(0).numpy()
    return labels


def compare(model: AnySize, card: ModelCard, image: np.ndarray, rounds: int) -> dict[str, dict[str, Any]]:
    """How → seconds, and the share of labels that are those of whole logits."""
    ways = {
        "whole": lambda: whole(model, card, image),
        "stages": lambda: torch_predictor(model, card)(image),
        "exported": lambda: torch_predictor(model, card, exported=True)(image),
    }
    small = natural_noise(256, 256, card, 1)  # what a first call costs
    whole(model, card, small), torch_predictor(model, card, exported=True)(small)
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    labels: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name in random.permutation(list(ways)).tolist():
            started = time.perf_counter()
            labels[name] = ways[name]()
            seconds[name].append(time.perf_counter() - started)
    first = np.array(seconds["whole"])
    return {
        name: {
            "seconds": spread(taken),
            "share": spread(np.array(taken) / first),
            "equal": float((labels[name] == labels["whole"]).mean()),
        }
        for name, taken in seconds.items()
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
        print(f"{name:<10} {row['seconds'][0]:8.2f} s  {row['share'][0]:.3f} of whole  {row['equal']:.4%} equal labels")
    if options.json:
        options.json.write_text(json.dumps({"size": [height, width], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

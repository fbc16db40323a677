"""How long exporting takes beside PyTorch's own exporters, which compare nothing: a plain U-Net, in processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.export_time [--widths 24,48,96,192] [--pairs 5]

In each round PyTorch's TorchScript exporter runs, then its default one (dynamo), then ours, in one process, on one
thread; medians over the rounds, so that what else the machine does counts for all alike. The first round, which loads
modules, is left out.
"""

import argparse
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fcn_deploy.export.from_torch import export_module
from torch import nn


class UNet(nn.Module):
    """Ronneberger et al., 2015: two convolutions at each width, transposed convolutions up again."""

    def __init__(self, widths: tuple[int, ...], classes: int = 4) -> None:
        super().__init__()
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.down = nn.ModuleList(double(old, new) for old, new in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, deep, 2, 2) for deep, _ in pairs)
        self.merge = nn.ModuleList(double(deep + width, width) for deep, width in pairs)
        self.score = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        return self.score(x)


def double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers += [nn.Conv2d(before, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def seconds(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def by_pytorch(model: nn.Module) -> None:
    axes = {name: {0: "N", 2: "H", 3: "W"} for name in ("image", "logits")}
    torch.onnx.export(
        model, (torch.zeros(1, 3, 64, 96),), io.BytesIO(), dynamo=False, opset_version=18, input_names=["image"],
        output_names=["logits"], dynamic_axes=axes,
    )  # type: ignore[arg-type]  # fmt: skip


def by_default(model: nn.Module) -> None:
    """As `torch.onnx.export` exports where nothing else is said, but for the free sizes."""
    batch, rows, columns = (torch.export.Dim(letter) for letter in ("N", "h", "w"))
    with redirect_stdout(io.StringIO()):
        torch.onnx.export(
            model, (torch.zeros(2, 3, 64, 96),), io.BytesIO(), opset_version=18, input_names=["image"],
            output_names=["logits"], dynamic_shapes=({0: batch, 2: 8 * rows, 3: 8 * columns},),
        )  # type: ignore[arg-type]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="24,48,96,192", help="channels from the finest map to the coarsest")
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = UNet(tuple(map(int, options.widths.split(",")))).eval()
    print(f"plain U-Net of {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.pairs + 1):
            theirs, default = seconds(lambda: by_pytorch(model)), seconds(lambda: by_default(model))
            rounds.append((theirs, default, seconds(lambda: export_module(model, None, Path(folder) / "m.onnx"))))
    theirs, default, ours = np.median(rounds[1:], axis=0)
    times = np.median([(ours / theirs, ours / default) for theirs, default, ours in rounds[1:]], axis=0)
    print(f"torch.onnx.export(dynamo=False) {theirs:.2f} s, export_module {ours:.2f} s: × {times[0]:.1f}")
    print(f"torch.onnx.export, by default {default:.2f} s: × {times[1]:.2f}")


if __name__ == "__main__":
    main()

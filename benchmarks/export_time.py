"""How long exporting takes beside PyTorch's own exporter, which compares nothing: a plain U-Net, in processor time.

    OMP_NUM_THREADS=1 python -m benchmarks.export_time [--widths 24,48,96,192] [--pairs 5]

In each pair PyTorch's TorchScript exporter runs and then ours, in one process, on one thread; medians over the pairs,
so that what else the machine does counts for both alike. The first pair, which loads modules, is left out.
"""

import argparse
import io
import tempfile
import time
import warnings
from collections.abc import Callable
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
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.pairs + 1):
            theirs = seconds(lambda: by_pytorch(model))
            pairs.append((theirs, seconds(lambda: export_module(model, None, Path(folder) / "m.onnx"))))
    theirs, ours = np.median(pairs[1:], axis=0)
    ratio = np.median([ours / theirs for theirs, ours in pairs[1:]])
    print(f"torch.onnx.export(dynamo=False) {theirs:.2f} s, export_module {ours:.2f} s: × {ratio:.1f}")


if __name__ == "__main__":
    main()

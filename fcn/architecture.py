"""What every network here is: an architecture, that is a network apart from its weights, and a module for any size."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fcn_deploy.fcn import backbones
from fcn_deploy.fcn.backbones import Backbone
from fcn_deploy.runtime.errors import MisuseError
from torch import nn

UPSAMPLINGS = ("fixed", "learned")
# torchvision's networks: (arch, backbone) → stride of the scores.
TORCHVISION = {
    ("dilated8", "resnet50"): 8,
    ("dilated8", "resnet101"): 8,
    ("deeplabv3", "resnet50"): 8,
    ("deeplabv3", "resnet101"): 8,
    ("deeplabv3", "mobilenet-v3-large"): 16,
    ("lraspp", "mobilenet-v3-large"): 8,
}


@dataclass(frozen=True)
class Architecture:
    """What a network is, apart from its weights.

    Attributes:
        classes: channels of the scores.
        arch: `fcn` (skips, section 4 of the paper), or one of torchvision's: `dilated8` (fcn_resnet50 and 101),
            `deeplabv3`, `lraspp`.
        backbone: one of `fcn.backbones.NAMES`; torchvision's are built on those of TORCHVISION.
        stride: of the finest scores: 32, 16 or 8.
        upsampling: `fixed` (bilinear) or `learned` (transposed convolutions that start as bilinear; the
            last one, to full size, stays bilinear as in the paper).
        width: multiplies the backbone's channels.
        channels: of the image.
    """

    classes: int
    arch: str = "fcn"
    backbone: str = "efficientnet-lite0"
    stride: int = 8
    upsampling: str = "fixed"
    width: float = 1.0
    channels: int = 3

    def __post_init__(self) -> None:
        if self.arch != "fcn":
            built_on = {backbone: stride for (arch, backbone), stride in TORCHVISION.items() if arch == self.arch}
            if not built_on:
                raise MisuseError(f"arch {self.arch!r}; choose fcn, dilated8, deeplabv3 or lraspp")
            if built_on.get(self.backbone) != self.stride:
                choices = ", ".join(f"{backbone} at stride {stride}" for backbone, stride in built_on.items())
                raise MisuseError(f"{self.arch} on {self.backbone} at stride {self.stride}; it is built on {choices}")
        elif self.backbone not in backbones.NAMES:
            raise MisuseError(f"backbone {self.backbone!r}; choose one of {', '.join(backbones.NAMES)}")
        if self.stride not in (32, 16, 8):
            raise MisuseError(f"stride {self.stride}; choose 32, 16 or 8")
        if self.backbone == "alexnet" and self.stride != 32:
            raise MisuseError(f"alexnet serves FCN-32s only, not stride {self.stride}; pass --stride 32")
        if self.upsampling not in UPSAMPLINGS:
            raise MisuseError(f"upsampling {self.upsampling!r}; choose {' or '.join(UPSAMPLINGS)}")
        if self.classes < 1 or self.channels < 1:
            raise MisuseError(f"{self.classes} classes and {self.channels} channels; both must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def upsample(scores: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear upsampling by a constant factor, pixel centres aligned (ONNX: half_pixel)."""
    return F.interpolate(scores, scale_factor=float(factor), mode="bilinear", align_corners=False)


class AnySize(nn.Module):
    """What every network here shares: `core` at multiples of `size_multiple`, `forward` at any size.

    Attributes:
        architecture: what it is.
        stride: of the scores that `core` gives.
        size_multiple: H and W of `core`'s input are multiples of it.
        backbone: the features it starts from.
    """

    architecture: Architecture
    backbone: Backbone
    stride: int
    size_multiple: int

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images [N, C, H, W] → scores [N, K, H/stride, W/stride]."""
        raise TypeError(f"{type(self).__name__} has no core")

    def parts(self) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
        """`core` in parts that follow each other, each with the stride of what it gives: all but the last are local.

        What a cell of a local part depends on is near: `fcn.staged` runs it in tiles.
        """
        return [(self.core, self.stride)]

    def final_upsampling(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [N, K, h, w] → [N, K, stride·h, stride·w]."""
        return upsample(scores, self.stride)

    def at_multiples(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images of multiples of `size_multiple`, [N, C, H, W] → logits [N, K, H, W]."""
        return self.final_upsampling(self.core(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images of any H, W ≥ 1, [N, C, H, W] → logits [N, K, H, W].

        Zeros pad the image right and bottom to the next multiple; the logits are cropped last.
        """
        height, width = x.shape[2:]
        return self.at_multiples(self._padded(x))[:, :, :height, :width]

    def heatmap(self, x: torch.Tensor) -> torch.Tensor:
        """The coarse scores of images of any size, cropped: [N, K, ⌈H/stride⌉, ⌈W/stride⌉]."""
        height, width = (-(-side // self.stride) for side in x.shape[2:])
        return self.core(self._padded(x))[:, :, :height, :width]

    def channels_last(self) -> None:
        """Lay weights out as [K, H, W, C]: twice as fast on CPUs as PyTorch's default layout."""
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # unknown to its stubs

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        return F.pad(x, (0, -width % self.size_multiple, 0, -height % self.size_multiple))

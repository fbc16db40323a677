"""FCN-32s, FCN-16s and FCN-8s (Long, Shelhamer, Darrell, 2015), and torchvision's networks."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fcn_deploy.fcn import backbones
from fcn_deploy.fcn.backbones.resnet50 import ResNet
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


def bilinear_kernel(factor: int) -> torch.Tensor:
    """The kernel that makes a transposed convolution of stride `factor` (even) bilinear: [2·factor]²."""
    position = torch.arange(2 * factor, dtype=torch.float32)
    side = 1 - (position - (factor - 0.5)).abs() / factor
    return side[:, None] * side[None, :]


def bilinear_deconvolution(classes: int, factor: int, groups: int = 1) -> nn.ConvTranspose2d:
    """[N, K, h, w] → [N, K, factor·h, factor·w], bilinear to begin with; no bias."""
    layer = nn.ConvTranspose2d(classes, classes, 2 * factor, factor, padding=factor // 2, groups=groups, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        for index in range(classes):
            layer.weight[index, 0 if groups > 1 else index] = bilinear_kernel(factor)
    return layer


def upsample(scores: torch.Tensor, factor: int) -> torch.Tensor:
    """Bilinear upsampling by a constant factor, pixel centres aligned (ONNX: half_pixel)."""
    return F.interpolate(scores, scale_factor=float(factor), mode="bilinear", align_corners=False)


class AnySize(nn.Module):
    """What every network here shares: `core` at multiples of `size_multiple`, `forward` at any size.

    Attributes:
        architecture: what it is.
        stride: of the scores that `core` gives.
        size_multiple: H and W of `core`'s input are multiples of it.
    """

    architecture: Architecture
    stride: int
    size_multiple: int

    def core(self, x: torch.Tensor) -> torch.Tensor:
        """Normalised images [N, C, H, W] → scores [N, K, H/stride, W/stride]."""
        raise TypeError(f"{type(self).__name__} has no core")

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

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        return F.pad(x, (0, -width % self.size_multiple, 0, -height % self.size_multiple))


class FCN(AnySize):
    """FCN-32s, 16s or 8s: 1×1 scores at each stride, coarse ones upsampled by two and added to finer ones."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.stride, self.size_multiple = architecture.stride, 32
        self.backbone = backbones.build(architecture.backbone, architecture.channels, architecture.width)
        classes = architecture.classes
        self.strides = [stride for stride in (32, 16, 8) if stride >= self.stride]
        self.score = nn.ModuleDict(
            {str(stride): nn.Conv2d(self.backbone.features[stride], classes, 1) for stride in self.strides}
        )
        for layer in self.score.values():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.learned = architecture.upsampling == "learned"
        if self.learned:
            self.up = nn.ModuleDict({str(stride): bilinear_deconvolution(classes, 2) for stride in self.strides[:-1]})
            # The paper fixes the last upsampling and learns the others.
            self.last = bilinear_deconvolution(classes, self.stride, groups=classes)
            self.last.requires_grad_(False)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        features = self.backbone(x)
        scores = self.score["32"](features[32])
        for coarse, stride in zip(self.strides, self.strides[1:], strict=False):
            scores = self.up[str(coarse)](scores) if self.learned else upsample(scores, 2)
            scores = scores + self.score[str(stride)](features[stride])
        return scores

    def final_upsampling(self, scores: torch.Tensor) -> torch.Tensor:
        return self.last(scores) if self.learned else upsample(scores, self.stride)


class Dilated8(AnySize):
    """torchvision's fcn_resnet50 and 101: a ResNet dilated to stride 8, a small head, no skips.

    At sizes that are multiples of 8 its logits are torchvision's. Parameters have torchvision's names.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.stride = self.size_multiple = 8
        self.backbone = ResNet(architecture.channels, architecture.width, architecture.backbone, dilated=True)
        inputs = self.backbone.features[8]
        self.classifier = nn.Sequential(
            nn.Conv2d(inputs, inputs // 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(inputs // 4),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(inputs // 4, architecture.classes, 1),
        )

    def core(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.backbone(x)[8])


def build(architecture: Architecture) -> AnySize:
    """A network with random weights."""
    if architecture.arch in ("deeplabv3", "lraspp"):
        from fcn_deploy.fcn import pooled

        return pooled.build(architecture)
    return Dilated8(architecture) if architecture.arch == "dilated8" else FCN(architecture)

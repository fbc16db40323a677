"""FCN-32s, FCN-16s and FCN-8s (Long, Shelhamer, Darrell, 2015), and any network by its architecture."""

from collections.abc import Callable

import torch
from fcn_deploy.fcn import backbones
from fcn_deploy.fcn.architecture import AnySize, Architecture, upsample
from fcn_deploy.fcn.torchvision import LRASPP, DeepLabV3, Dilated8
from torch import nn


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


class FCN(AnySize):
    """FCN-32s, 16s or 8s: 1×1 scores at each stride, coarse ones upsampled by two and added to finer ones."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.stride, self.size_multiple = architecture.stride, 32
        self.backbone = backbones.build_backbone(architecture.backbone, architecture.channels, architecture.width)
        classes = architecture.classes
        self.strides = [stride for stride in (32, 16, 8) if stride >= self.stride]
        layers = {str(stride): nn.Conv2d(self.backbone.features[stride], classes, 1) for stride in self.strides}
        for layer in layers.values():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(layer.get_parameter("bias"), 0.0)
        self.score = nn.ModuleDict(layers)
        self.learned = architecture.upsampling == "learned"
        if self.learned:
            self.up = nn.ModuleDict({str(stride): bilinear_deconvolution(classes, 2) for stride in self.strides[:-1]})
            # The paper fixes the last upsampling and learns the others.
            self.last = bilinear_deconvolution(classes, self.stride, groups=classes)
            self.last.requires_grad_(False)

    def core(self, x: torch.Tensor) -> torch.Tensor:
        return self._scores(self.backbone(x))

    def parts(self) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
        return [(self.backbone.early, backbones.EARLY), (lambda x: self._scores(self.backbone.late(x)), self.stride)]

    def _scores(self, features: dict[int, torch.Tensor]) -> torch.Tensor:
        scores = self.score["32"](features[32])
        for coarse, stride in zip(self.strides, self.strides[1:], strict=False):
            scores = self.up[str(coarse)](scores) if self.learned else upsample(scores, 2)
            scores = scores + self.score[str(stride)](features[stride])
        return scores

    def final_upsampling(self, scores: torch.Tensor) -> torch.Tensor:
        return self.last(scores) if self.learned else upsample(scores, self.stride)


NETWORKS = {"fcn": FCN, "dilated8": Dilated8, "deeplabv3": DeepLabV3, "lraspp": LRASPP}


def build_network(architecture: Architecture) -> AnySize:
    """A network with random weights."""
    return NETWORKS[architecture.arch](architecture)

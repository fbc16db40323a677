"""torchvision's segmentation networks: the dilated FCN, DeepLabv3 (Chen et al., 2017), LR-ASPP (Howard et al., 2019).

Parameters have torchvision's names. DeepLabv3 and LR-ASPP pool the whole image, so nothing is padded, and their logits
are torchvision's at every size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fcn_deploy.fcn.architecture import AnySize, Architecture
from fcn_deploy.fcn.backbones import EARLY, scaled
from fcn_deploy.fcn.backbones.mobilenet_v3_large import MobileNetV3Large
from fcn_deploy.fcn.backbones.resnet50 import ResNet
from torch import nn

RATES = (12, 24, 36)  # of dilation, at stride 8 and 16 alike


class Dilated8(AnySize):
    """torchvision's fcn_resnet50 and 101: a ResNet dilated to stride 8, a small head, no skips.

    At sizes that are multiples of 8 its logits are torchvision's.
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

    def parts(self) -> list[tuple[Callable[[torch.Tensor], torch.Tensor], int]]:
        return [(self.backbone.early, EARLY), (lambda x: self.classifier(self.backbone.late(x)[8]), self.stride)]


def to_size(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def _conv(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


class ASPP(nn.Module):
    """Convolutions of several dilations side by side, and the mean of the whole image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        branches = [_conv(inputs, outputs), *(_conv(inputs, outputs, 3, rate) for rate in RATES)]
        branches.append([nn.AdaptiveAvgPool2d(1), *_conv(inputs, outputs)])
        self.convs = nn.ModuleList(nn.Sequential(*branch) for branch in branches)
        self.project = nn.Sequential(*_conv(len(branches) * outputs, outputs), nn.Dropout(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *maps, mean = (branch(x) for branch in self.convs)
        return self.project(torch.cat([*maps, to_size(mean, x)], 1))


class _ToSize(AnySize):
    """Takes every size by itself, and upsamples its scores to it."""

    size_multiple = 1

    def at_multiples(self, x: torch.Tensor) -> torch.Tensor:
        return to_size(self.core(x), x)


class DeepLabV3(_ToSize):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture, self.stride = architecture, architecture.stride
        channels, width = architecture.channels, architecture.width
        if architecture.backbone == "mobilenet-v3-large":
            self.backbone = MobileNetV3Large(channels, width)
        else:
            self.backbone = ResNet(channels, width, architecture.backbone, dilated=True)
        inner = scaled(256, width)
        head = [ASPP(self.backbone.features[self.stride], inner), *_conv(inner, inner, 3)]
        self.classifier = nn.Sequential(*head, nn.Conv2d(inner, architecture.classes, 1))

    def core(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.backbone(x)[self.stride])


class LRASPP(_ToSize):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture, self.stride = architecture, architecture.stride
        self.backbone = MobileNetV3Large(architecture.channels, architecture.width)
        features, inner = self.backbone.features, scaled(128, architecture.width)
        self.classifier = nn.ModuleDict(
            {
                "cbr": nn.Sequential(*_conv(features[16], inner)),
                "scale": nn.Sequential(
                    nn.AdaptiveAvgPool2d(1), nn.Conv2d(features[16], inner, 1, bias=False), nn.Sigmoid()
                ),
                "low_classifier": nn.Conv2d(features[8], architecture.classes, 1),
                "high_classifier": nn.Conv2d(inner, architecture.classes, 1),
            }
        )

    def core(self, x: torch.Tensor) -> torch.Tensor:
        features, head = self.backbone(x), self.classifier
        low, high = features[8], features[16]
        high = to_size(head["cbr"](high) * head["scale"](high), low)
        return head["low_classifier"](low) + head["high_classifier"](high)

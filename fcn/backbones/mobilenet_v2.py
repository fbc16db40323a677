"""MobileNetV2 (Sandler et al., 2018), parameters named as in torchvision."""

from collections.abc import Mapping

import torch
from fcn_deploy.fcn.backbones import Backbone, load_published, scaled
from fcn_deploy.runtime.engine_format.model_card import IMAGENET_MEAN, IMAGENET_STD
from torch import nn

# Per stage: expansion, output channels, repeats, stride (table 2 of the paper).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
TAPS = {6: 8, 13: 16, 18: 32}  # index in `layers` → stride
FIRST_LATE = 7  # index in `layers`


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        layers: list[nn.Module] = [_conv(inputs, inner, 1)] if expansion != 1 else []
        layers.append(_conv(inner, inner, 3, stride, groups=inner))
        layers += [nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(Backbone):
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        inputs = scaled(32, width)
        layers: list[nn.Module] = [_conv(channels, inputs, 3, 2)]
        for expansion, outputs, repeats, stride in STAGES:
            outputs = scaled(outputs, width)
            for repeat in range(repeats):
                layers.append(InvertedResidual(inputs, outputs, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        layers.append(_conv(inputs, scaled(1280, width), 1))
        self.layers = nn.Sequential(*layers)
        self.features = {8: scaled(32, width), 16: scaled(96, width), 32: scaled(1280, width)}

    def early(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(FIRST_LATE):
            x = self.layers[index](x)
        return x

    def late(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        taps = {8: x}
        for index in range(FIRST_LATE, len(self.layers)):
            x = self.layers[index](x)
            if index in TAPS:
                taps[TAPS[index]] = x
        return taps

    def load_classification(self, state: Mapping[str, torch.Tensor]) -> None:
        # torchvision calls the layers `features`, which here is the table of what they give.
        renamed = {name.replace("features.", "layers.", 1): tensor for name, tensor in state.items()}
        load_published(self, renamed, ignored=("classifier.",))

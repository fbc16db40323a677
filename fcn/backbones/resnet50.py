"""ResNet-50 and 101 (He et al., 2015; stride in the 3×3 convolution), parameters named as in torchvision."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from fcn_deploy.fcn.backbones import Backbone, load_published, scaled
from fcn_deploy.runtime.engine_format.model_card import IMAGENET_MEAN, IMAGENET_STD
from torch import nn

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, dilation: int, project: bool) -> None:
        super().__init__()
        outputs = planes * 4
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if project
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(Backbone):
    """One of BLOCKS. `dilated` trades the strides of layer3 and layer4 for dilation, so that all ends at stride 8."""

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, channels: int, width: float, name: str = "resnet50", dilated: bool = False) -> None:
        super().__init__()
        inputs = scaled(64, width)
        self.conv1 = nn.Conv2d(channels, inputs, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        stride, dilation = 4, 1
        self.features = {}
        self.strides = []
        for index, repeats in enumerate(BLOCKS[name]):
            planes = scaled(64 << index, width)
            step = 1 if index == 0 else 2
            first_dilation = dilation
            if dilated and index >= 2:
                # The first block still sees the dilation that came before it (torchvision does the same).
                dilation, step = dilation * 2, 1
            layer = nn.Sequential()
            for repeat in range(repeats):
                first = repeat == 0
                layer.append(
                    Bottleneck(inputs, planes, step if first else 1, first_dilation if first else dilation, first)
                )
                inputs = planes * 4
            setattr(self, f"layer{index + 1}", layer)
            stride *= step
            self.strides.append(stride)
            if stride > 4:  # that of layer1 serves nobody
                self.features[stride] = inputs

    def early(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for name in ("layer1", "layer2"):
            x = getattr(self, name)(x)
        return x

    def late(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        taps = {8: x}
        for name, stride in zip(("layer3", "layer4"), self.strides[2:], strict=True):
            x = taps[stride] = getattr(self, name)(x)
        return taps

    def load_classification(self, state: Mapping[str, torch.Tensor]) -> None:
        load_published(self, state, ignored=("fc.",))

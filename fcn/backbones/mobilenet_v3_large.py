"""MobileNetV3-Large (Howard et al., 2019), dilated at its end and named as in torchvision's segmentation networks."""

import torch
import torch.nn.functional as F
from fcn_deploy.fcn.backbones import Backbone, scaled
from fcn_deploy.runtime.engine_format.model_card import IMAGENET_MEAN, IMAGENET_STD
from torch import nn

# Per block: kernel, inner channels, output channels, squeeze and excite, hard swish, stride (table 1 of the paper).
BLOCKS = (
    (3, 16, 16, False, False, 1), (3, 64, 24, False, False, 2), (3, 72, 24, False, False, 1),
    (5, 72, 40, True, False, 2), (5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1),
    (3, 240, 80, False, True, 2), (3, 200, 80, False, True, 1), (3, 184, 80, False, True, 1),
    (3, 184, 80, False, True, 1), (3, 480, 112, True, True, 1), (3, 672, 112, True, True, 1),
    (5, 672, 160, True, True, 2), (5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1),
)  # fmt: skip
DILATED = 12  # the first block whose stride is dilation instead, so that all ends at stride 16
LOW = 4  # the layer whose features, at stride 8, LR-ASPP reads


def _conv(inputs: int, outputs: int, kernel: int, activation: nn.Module | None, groups: int = 1, stride=1, dilation=1):
    layers = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 * dilation, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs, eps=0.001),
    ]
    return nn.Sequential(*layers, *([activation] if activation is not None else []))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        wanted = channels // 4
        squeezed = max(8, (wanted + 4) // 8 * 8)
        squeezed += 8 if squeezed < 0.9 * wanted else 0
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, kernel, inner, outputs, excite, swish, stride, dilation, expand) -> None:
        super().__init__()
        activation = nn.Hardswish if swish else nn.ReLU
        self.residual = stride == 1 and inputs == outputs
        layers = [_conv(inputs, inner, 1, activation())] if expand else []
        layers.append(_conv(inner, inner, kernel, activation(), inner, 1 if dilation > 1 else stride, dilation))
        layers += [SqueezeExcite(inner)] if excite else []
        self.block = nn.Sequential(*layers, _conv(inner, outputs, 1, None))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3Large(Backbone):
    """[N, C, H, W] → {8: features of the fifth layer, 16: of the last}, for any H and W ≥ 1."""

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        inputs = scaled(16, width)
        layers: list[nn.Module] = [_conv(channels, inputs, 3, nn.Hardswish(), stride=2)]
        for index, (kernel, inner, outputs, excite, swish, stride) in enumerate(BLOCKS):
            outputs = scaled(outputs, width)
            dilation = 2 if index >= DILATED else 1
            sizes = (inputs, kernel, scaled(inner, width), outputs)
            layers.append(InvertedResidual(*sizes, excite, swish, stride, dilation, expand=index > 0))
            inputs = outputs
        layers.append(_conv(inputs, 6 * inputs, 1, nn.Hardswish()))
        # By number, as in torchvision's Sequential, so that parameters have its names.
        for index, layer in enumerate(layers):
            self.add_module(str(index), layer)
        self.features = {8: scaled(BLOCKS[LOW - 1][2], width), 16: 6 * inputs}

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        taps = {}
        for index, layer in enumerate(self.children()):
            x = layer(x)
            if index == LOW:
                taps[8] = x
        return taps | {16: x}

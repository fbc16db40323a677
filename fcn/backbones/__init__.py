"""Interchangeable backbones, one a file."""

from collections.abc import Mapping
from importlib import import_module

import torch
from fcn_deploy.runtime.errors import DeployError, MisuseError
from torch import nn

# The class of each, in a file named like the backbone.
CLASSES = {
    "efficientnet-lite0": "EfficientNetLite0",
    "mobilenet-v2": "MobileNetV2",
    "resnet50": "ResNet",
    "vgg16": "VGG16",
    "alexnet": "AlexNet",
}
NAMES = tuple(CLASSES)
EARLY = 8  # stride up to which layers are `early`: large maps, and a small receptive field


class Backbone(nn.Module):
    """Features of an image at several strides; made from (channels of the image, width).

    Attributes:
        features: {stride: channels} of what `forward` gives.
        mean, std: of the images its published weights saw, per channel, in 0..255.
    """

    features: dict[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """[N, C, H, W] with H and W multiples of 32 → {stride: [N, features[stride], H/stride, W/stride]}."""
        return self.late(self.early(x))

    def early(self, x: torch.Tensor) -> torch.Tensor:
        """The layers up to stride EARLY: [N, C, H, W] → [N, c, H/EARLY, W/EARLY]."""
        raise NotImplementedError

    def late(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        """What `forward` gives, of what `early` gives."""
        raise NotImplementedError

    def load_classification(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take a published classifier's state dict, leaving its last layers out.

        Raises:
            DeployError: the weights are of another network or width.
        """
        raise MisuseError(f"{type(self).__name__} takes no weights of a classifier")


def build_backbone(name: str, channels: int = 3, width: float = 1.0) -> Backbone:
    """A backbone by name, with random weights.

    Args:
        name: one of NAMES.
        channels: of the image.
        width: multiplies the number of channels inside; published weights fit 1.0 alone.
    """
    if name not in NAMES:
        raise MisuseError(f"backbone {name!r}; choose one of {', '.join(NAMES)}")
    if not 0 < width <= 4:
        raise MisuseError(f"width {width}; it must be above 0 and at most 4")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    backbone: Backbone = getattr(module, CLASSES[name])(channels, width)
    return backbone


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, as a multiple of 8 that is at least 8."""
    return channels if width == 1 else max(8, int(channels * width + 4) // 8 * 8)


def initialise(module: nn.Module) -> None:
    """He's initialisation (2015), without which a signal dies out in deep networks that have no batch norm."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def load_published(backbone: Backbone, state: Mapping[str, torch.Tensor], ignored: tuple[str, ...]) -> None:
    """`load_matching` of weights for RGB, whose first convolution is brought to the bands that the backbone takes.

    Its weights are repeated band by band and scaled by 3/bands, so that what it adds up keeps its size; of one band
    they are added. That is the habit of timm and segmentation_models.pytorch.
    """
    adapted, own = dict(state), backbone.state_dict()
    for name, weight in state.items():
        if name not in own or weight.ndim != 4 or own[name].ndim != 4:
            continue
        count, bands, *kernel = own[name].shape
        if [count, 3, *kernel] == list(weight.shape) and bands != 3:
            repeated = weight[:, torch.arange(bands) % 3] * (3 / bands)
            adapted[name] = weight.sum(1, keepdim=True) if bands == 1 else repeated
    load_matching(backbone, adapted, ignored)


def load_matching(module: nn.Module, state: Mapping[str, torch.Tensor], ignored: tuple[str, ...]) -> None:
    """Load every parameter of `module` from `state`; entries whose names start as in `ignored` may be left.

    Raises:
        DeployError: names the first entry that is missing, unknown or of another shape.
    """
    own = module.state_dict()
    for name, tensor in own.items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state:
            raise DeployError(f"the weights have no {name}; are they of another network?")
        if state[name].shape != tensor.shape:
            raise DeployError(
                f"the weights hold {name} of shape {list(state[name].shape)}, and the network has "
                f"{list(tensor.shape)}; are they of another network or width?"
            )
    unknown = [name for name in state if name not in own and not name.startswith(ignored)]
    if unknown:
        raise DeployError(f"the weights hold {unknown[0]}, which the network has not; are they of another one?")
    module.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})

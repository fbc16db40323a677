"""A classifier's dense layers as convolutions, so that it takes any size and gives a heat map.

Long, Shelhamer, Darrell (2015), section 3.1 and figure 2. Weights are reshaped, never retrained.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from fcn_deploy.runtime.errors import MisuseError
from torch import nn

Padding = Literal["valid", "same"]
POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid,
    nn.Sigmoid, nn.Tanh, nn.Identity,
)  # fmt: skip


def convolutionalize(
    classifier: nn.Module, input_shape: tuple[int, int, int], padding: Padding = "valid"
) -> nn.Sequential:
    """A classifier as a fully convolutional network with the same weights.

    Args:
        classifier: an nn.Sequential (nested ones are walked) that ends in Flatten and dense layers; or a
            module with `features`, `classifier` and perhaps `avgpool`, called in torchvision's order.
        input_shape: (C, H, W) of the images it was made for.
        padding: of the first dense layer turned convolution. `valid`: at the original size the output is
            the classifier's own, [N, K, 1, 1]; at larger sizes each cell is what the classifier gives
            for the window below it (exactly so where its features pad nothing). `same`: as many cells as
            the features have, as the FCN needs.

    Returns:
        Layers that take [N, C, H', W'] and give [N, K, h, w]. Convolutions share the classifier's
        parameters where their shape allows, and copy nothing else.

    Raises:
        MisuseError: names the layer that has no convolutional counterpart.
    """
    layers = _flat(classifier)
    flatten = next((i for i, layer in enumerate(layers) if isinstance(layer, nn.Flatten)), None)
    if flatten is None or not any(isinstance(layer, nn.Linear) for layer in layers[flatten:]):
        raise MisuseError("the classifier has no Flatten with Linear layers after it; there is nothing to convert")
    body = nn.Sequential(*layers[:flatten])
    shapes: list[tuple[int, int, int]] = []
    training = classifier.training
    with torch.no_grad():
        x = torch.zeros(1, *input_shape)
        body.eval()
        for layer in body:
            shapes.append((x.shape[1], x.shape[2], x.shape[3]))
            x = layer(x)
        body.train(training)
    kept = [_convolutional(layer, shape, padding) for layer, shape in zip(body, shapes, strict=True)]
    dense = dense_to_convolutions(layers[flatten + 1 :], (x.shape[1], x.shape[2], x.shape[3]), padding)
    return nn.Sequential(*kept, *dense).train(training)


def dense_to_convolutions(
    layers: Sequence[nn.Module], shape: tuple[int, int, int], padding: Padding = "valid"
) -> nn.Sequential:
    """The dense layers after a Flatten of [N, *shape] as convolutions.

    The first Linear becomes a convolution as large as the feature map, the others 1×1.

    Args:
        layers: Linear, BatchNorm1d, Dropout and pointwise activations.
        shape: (C, h, w) of what is flattened.
        padding: as for `convolutionalize`.
    """
    converted: list[nn.Module] = []
    channels, kernel = shape[0], shape[1:]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            expected = channels * kernel[0] * kernel[1]
            if layer.in_features != expected:
                raise MisuseError(
                    f"{layer} takes {layer.in_features} values, and the features give {channels}×{kernel[0]}×"
                    f"{kernel[1]} = {expected}; is input_shape the classifier's own?"
                )
            if padding == "same" and kernel != (1, 1):
                top, left = ((size - 1) // 2 for size in kernel)
                converted.append(nn.ZeroPad2d((left, kernel[1] - 1 - left, top, kernel[0] - 1 - top)))
            conv = nn.Conv2d(channels, layer.out_features, kernel, bias=layer.bias is not None)
            conv.weight = nn.Parameter(layer.weight.detach().reshape(conv.weight.shape))
            if layer.bias is not None:
                conv.bias = nn.Parameter(layer.bias.detach())
            converted.append(conv)
            channels, kernel = layer.out_features, (1, 1)
        elif isinstance(layer, nn.BatchNorm1d):
            norm = nn.BatchNorm2d(
                layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
            )
            norm.load_state_dict(layer.state_dict())
            converted.append(norm)
        elif isinstance(layer, (nn.Dropout, *POINTWISE)):
            converted.append(layer)
        elif not isinstance(layer, nn.Flatten):
            raise MisuseError(f"{type(layer).__name__} after the Flatten has no convolutional counterpart here")
    return nn.Sequential(*converted)


def convolutionalize_state(
    state: Mapping[str, torch.Tensor], dense: Mapping[str, tuple[str, int]]
) -> dict[str, torch.Tensor]:
    """A state dict with the weights of dense layers reshaped for convolutions.

    Args:
        state: of a classifier.
        dense: name of a dense layer → (name of the convolution, its kernel size in cells).
    """
    converted = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if layer in dense:
            layer, kernel = dense[layer]
            name = f"{layer}.{kind}"
            if kind == "weight" and tensor.shape[1] % kernel**2 == 0:
                tensor = tensor.reshape(tensor.shape[0], -1, kernel, kernel)
        converted[name] = tensor
    return converted


def _flat(module: nn.Module) -> list[nn.Module]:
    """The layers of a classifier in the order they run."""
    if isinstance(module, nn.Sequential):
        return [layer for child in module for layer in _flat(child)]
    features, classifier = getattr(module, "features", None), getattr(module, "classifier", None)
    if isinstance(features, nn.Module) and isinstance(classifier, nn.Module):
        pool = getattr(module, "avgpool", None)
        tail = _flat(classifier)
        if not any(isinstance(layer, nn.Flatten) for layer in tail):
            tail = [nn.Flatten(), *tail]
        return [*_flat(features), *([pool] if pool is not None else []), *tail]
    return [module]


def _convolutional(layer: nn.Module, shape: tuple[int, int, int], padding: Padding) -> nn.Module:
    """A layer before the Flatten; adaptive pooling, which depends on the image's size, is made constant."""
    if not isinstance(layer, nn.AdaptiveAvgPool2d):
        return layer
    size = layer.output_size
    rows, columns = (size, size) if size is None or isinstance(size, int) else size
    wanted = (shape[1] if rows is None else rows, shape[2] if columns is None else columns)
    if wanted == shape[1:]:
        return nn.Identity()
    if wanted == (1, 1) and padding == "valid":
        return nn.AvgPool2d(shape[1:], stride=1)
    raise MisuseError(
        f"{layer} pools {shape[1]}×{shape[2]} features to {wanted[0]}×{wanted[1]}, which is no convolution"
        + (" with padding='same'; use 'valid'" if wanted == (1, 1) else "; make it global, or remove it")
    )

"""Quantization-aware training: the forward pass rounds as an INT8 engine will, gradients pass straight through."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

WEIGHT_STEPS = 64  # the fewest a channel of a CPU engine gets; TensorRT's channels all have 127
MOMENTUM = 0.05  # of the running ranges of activations


class _Round(torch.autograd.Function):
    """Round to nearest; the gradient of the identity (Bengio et al., 2013: straight-through)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def fake_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight rounded per output channel, [K, ...]; symmetric.

    A batch norm that is folded later multiplies each channel by one number, and its scale with it: rounding
    before or after folding is the same.
    """
    peak = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-12)
    scale = (peak / WEIGHT_STEPS).view(-1, *[1] * (weight.ndim - 1))
    return _Round.apply(weight / scale) * scale


class ActivationRange:
    """A running range of one tensor, and its rounding to 256 levels around zero."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0
        self.seen = False

    def __call__(self, x: torch.Tensor, training: bool) -> torch.Tensor:
        if training or not self.seen:
            low, high = (float(value) for value in torch.aminmax(x.detach()))
            low, high = min(low, 0.0), max(high, 0.0)
            rate = MOMENTUM if self.seen else 1.0
            self.low += rate * (low - self.low)
            self.high += rate * (high - self.high)
            self.seen = True
        scale = max((self.high - self.low) / 255, 1e-9)
        zero = round(-self.low / scale)
        return (_Round.apply(x / scale).clamp(-zero, 255 - zero)) * scale


@contextmanager
def fake_quantized(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block, every convolution of `model` rounds its input and its weight.

    Parameters and their names stay as they are, so checkpoints, exports and calibration know nothing of it.
    Transposed convolutions stay float, as in the engines.
    """
    changed: list[nn.Conv2d] = []
    try:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                # An attribute of the module itself stands before its class's method.
                module.__dict__["_conv_forward"] = _rounding(module, ActivationRange())
                changed.append(module)
        yield model
    finally:
        for module in changed:
            del module.__dict__["_conv_forward"]


def _rounding(module: nn.Conv2d, activation: ActivationRange) -> Callable[..., torch.Tensor]:
    plain = type(module)._conv_forward

    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return plain(module, activation(x, module.training), fake_weight(weight), bias)

    return forward

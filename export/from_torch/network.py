"""What is traced of a PyTorch module, the sizes that it takes, and the size of the image that it is traced at."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, find_accepted_sizes
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.fcn.architecture import AnySize
from fcn_deploy.fcn.foreign import scores_of
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.model_card import ModelCard
from torch import nn

TRACED = (64, 96)  # or two and three multiples, where those are larger

Note = Callable[[str], None]


@dataclass(frozen=True)
class Network:
    """What is traced of a module.

    Attributes:
        module: float32 [N,C,H,W] → [N,K,h,w], in eval mode.
        channels: C.
        sizes: that it takes.
        name: of the model, for errors.
        ours: whether it is one of fcn/, which pads and crops as its card says.
    """

    module: nn.Module
    channels: int
    sizes: AcceptedSizes
    name: str
    ours: bool

    def scores(self, height: int, width: int, strength: float = 1.0) -> np.ndarray | tuple[int, ...]:
        """What the module gives for an image of noise; () where that is no tensor."""
        noise = strength * torch.randn(1, self.channels, height, width, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            result = self.module(noise)
        return result.numpy() if isinstance(result, torch.Tensor) else ()


def network_of(model: nn.Module, card: ModelCard | None, options: ImportOptions, name: str, note: Note) -> Network:
    # The exporters put modules back into the mode they came in.
    if isinstance(model, AnySize):
        if options.output is not None:
            raise MisuseError(f"{name} gives scores alone; omit --output {options.output}")
        sizes = AcceptedSizes(model.size_multiple, scores=model.architecture.classes)
        return Network(_Multiples(model.eval()).eval(), model.architecture.channels, sizes, name, True)
    scores = scores_of(model, name, card.channels if card else None, options.output, note)
    network = Network(scores.eval(), scores.channels, AcceptedSizes(), name, False)
    return replace(network, sizes=find_accepted_sizes(network.scores, name))


class _Multiples(nn.Module):
    """What is traced of our networks: all but padding and cropping, which are added to the graph."""

    def __init__(self, model: AnySize) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.at_multiples(x)


def traced_size(sizes: AcceptedSizes) -> tuple[int, int]:
    """(height, width) of the image that the exporters run: of a size that the network takes, and not square."""

    def side(usual: int, count: int) -> int:
        return max(-(-usual // sizes.multiple), count) * sizes.multiple

    return (
        side(max(TRACED[0], sizes.smallest), 2),
        side(max(TRACED[1], sizes.smallest + sizes.multiple), 3),
    )

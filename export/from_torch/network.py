"""What is traced of a PyTorch module, the sizes that it takes, and the size of the image that it is traced at."""

import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fcn_deploy.export.analysis.accepted_sizes import (
    AcceptedSizes,
    find_accepted_sizes,
    only_at,
    size_that_runs,
)
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.tolerances import SAME_IMAGE
from fcn_deploy.fcn.architecture import AnySize
from fcn_deploy.fcn.foreign import ScoresModule, likely_sizes, scores_of
from fcn_deploy.fcn.programs import is_program
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError, MisuseError
from torch import nn

TRACED = (64, 96)  # or two and three multiples, where those are larger
WHITE = 2.0  # about a white pixel, normalised

# Runs of a module that draws random numbers of which no operator of its graph is made, and their processor time.
RUNS, SECONDS_OF_RUNS = 300, 5.0

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

    def image(self, height: int, width: int, strength: float = 1.0) -> torch.Tensor:
        """An image of noise."""
        return strength * torch.randn(1, self.channels, height, width, generator=torch.Generator().manual_seed(0))

    def scores(self, height: int, width: int, strength: float = 1.0) -> np.ndarray | tuple[int, ...]:
        """What the module gives for an image of noise; () where that is no tensor."""
        with torch.inference_mode():
            result = self.module(self.image(height, width, strength))
        return result.numpy() if isinstance(result, torch.Tensor) else ()


def network_of(model: nn.Module, card: ModelCard | None, options: ImportOptions, name: str, note: Note) -> Network:
    # The exporters put modules back into the mode they came in.
    if isinstance(model, AnySize):
        if options.output is not None:
            raise MisuseError(f"{name} gives scores alone; omit --output {options.output}")
        if options.fit_size is not None:
            raise MisuseError(f"{name} takes every size by itself; omit --fit {options.fit}")
        sizes = AcceptedSizes(model.size_multiple, scores=model.architecture.classes)
        return Network(_Multiples(model.eval()).eval(), model.architecture.channels, sizes, name, True)
    only, own = options.fit_size, likely_sizes(model)
    scores = scores_of(model, name, card.channels if card else None, options.output, note, [only] if only else own)
    network = Network(scores.eval(), scores.channels, AcceptedSizes(), name, False)
    if only is not None:
        network = replace(network, sizes=only_at(network.scores, name, only))
    else:
        try:
            network = replace(network, sizes=find_accepted_sizes(network.scores, name))
        except DeployError as error:
            if size_that_runs(network.scores, [TRACED]):  # a map that is kept may be what fails at other sizes
                _refuse_state(network, TRACED)
            raise _of_one_size(network, own) or error from error
    _refuse_state(network, traced_size(network.sizes))
    return network


def _refuse_state(network: Network, size: tuple[int, int]) -> None:
    """Raise DeployError where an image has other scores after another image; says what keeps them."""

    def scores(height: int, width: int) -> np.ndarray:
        torch.manual_seed(0)  # what draws random numbers is another matter
        return np.asarray(network.scores(height, width))

    def run_white(height: int, width: int) -> None:  # means of it are far from those of noise
        with torch.inference_mode():
            network.module(torch.full((1, network.channels, height, width), WHITE))

    def gives(before: np.ndarray, height: int, width: int) -> bool:
        with suppress(Exception):  # of what is kept of another size
            after = scores(height, width)
            if np.array_equal(before, after, equal_nan=True):
                return True
            return before.shape == after.shape and bool(np.abs(after - before).max() <= SAME_IMAGE * np.ptp(before))
        return False

    before, other = scores(*size), size
    run_white(*other)
    same = gives(before, *size)
    if same and network.sizes.only is None:  # what is kept by the number of pixels, or grows with the largest image
        with suppress(Exception):  # of a size that it refuses
            turned, other = scores(*size[::-1]), (2 * size[0], size[1])
            run_white(*other)
            same = gives(turned, *size[::-1])
        same = same and gives(before, *size)
    if same:
        return
    drawn = _random_states()
    run_white(*size)
    if _random_states()[1:] != drawn[1:]:
        raise DeployError(_random(network.name))
    held = _tensors_held(network.module)
    run_white(*other)
    now = _tensors_held(network.module)
    differ = [key for key, value in now.items() if key not in held or not torch.equal(value, held[key])]
    changed = list(dict.fromkeys(key.partition("[")[0] for key in differ))
    what = f"{', '.join(changed[:3])}{', …' if len(changed) > 3 else ''}" if changed else "what its forward keeps"
    raise DeployError(
        f"{network.name} keeps state from image to image ({what}): an image's scores are others after another image; "
        "have forward change it in training alone (if self.training)"
    )


def find_random(network: Network) -> str:
    """What is said of a module that draws random numbers in evaluation mode, and gives the same scores in all runs; "".

    Raises DeployError where an image has other scores in another run.
    """
    multiple, smallest = network.sizes.multiple, network.sizes.smallest
    least = [multiple * -(-(smallest + side) // multiple) for side in (7, 9)]
    size = network.sizes.only or (least[0], least[1])
    drawn, first = _random_states(), np.asarray(network.scores(*size))
    if _random_states() == drawn:
        return ""
    end, runs = time.process_time() + SECONDS_OF_RUNS, 1
    while runs < RUNS and time.process_time() < end:
        runs += 1
        if not np.array_equal(first, np.asarray(network.scores(*size)), equal_nan=True):
            raise DeployError(_random(network.name))
    return f"{network.name} draws random numbers in evaluation mode; {runs} runs of an image gave the same scores"


def _random(name: str) -> str:
    return (
        f"{name} draws random numbers in evaluation mode, so that no two runs of an image need give the same scores; "
        "draw them in training alone (if self.training)"
    )


def _random_states() -> tuple[object, ...]:
    """Of PyTorch, Python and NumPy."""
    of_numpy: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), of_numpy[1].tobytes(), of_numpy[2:]


def _tensors_held(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what modules hold beside their weights: buffers, tensors, and tensors in lists and dictionaries."""
    found = {}
    for path, layer in nn.Module.named_modules(module):
        path = path.removeprefix("model").removeprefix(".")
        held: dict[str, object] = {**layer._buffers, **{k: v for k, v in vars(layer).items() if not k.startswith("_")}}
        for name, value in held.items():
            entries = {name: value}
            if isinstance(value, dict | list | tuple):
                pairs = value.items() if isinstance(value, dict) else enumerate(value)
                entries = {f"{name}[{key}]": each for key, each in pairs}
            for entry, each in entries.items():
                if isinstance(each, torch.Tensor):
                    found[f"{path}.{entry}" if path else entry] = each.detach().clone()
    return found


def _of_one_size(network: Network, own: Sequence[tuple[int, int]]) -> DeployError | None:
    """What is said of a network that takes one size, or squares alone; `own`: sizes that it may take."""
    size = size_that_runs(network.scores, own)
    if size is None:
        return None
    height, width = size
    what = f"{height}×{width} only"
    if size_that_runs(network.scores, [(height, 2 * width), (2 * height, 2 * width)]) == (2 * height, 2 * width):
        what = f"squares only, such as {height}×{width}"
    remedy = f"--fit {height}x{width} resizes every image to that and its scores back, bilinearly, which is inexact"
    if isinstance(network.module, ScoresModule) and is_program(network.module.model):
        remedy = f"export the program with dynamic_shapes for N, H and W; or {remedy}"
    return DeployError(f"{network.name} takes {what}; {remedy}")


class _Multiples(nn.Module):
    """What is traced of our networks: all but padding and cropping, which are added to the graph."""

    def __init__(self, model: AnySize) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.at_multiples(x)


def traced_size(sizes: AcceptedSizes) -> tuple[int, int]:
    """(height, width) of the image that the exporters run: of a size that the network takes, not square if it may."""
    if sizes.only is not None:
        return sizes.only

    def side(usual: int, count: int) -> int:
        return max(-(-usual // sizes.multiple), count) * sizes.multiple

    return (
        side(max(TRACED[0], sizes.smallest), 2),
        side(max(TRACED[1], sizes.smallest + sizes.multiple), 3),
    )

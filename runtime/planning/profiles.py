"""How an image is run by a TensorRT plan: by one of its optimisation profiles, or in tiles that one of them holds."""

import math
from collections.abc import Sequence
from dataclasses import replace

from ..engine_format.manifest import Profile
from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Stage
from ..errors import OverBudgetError
from ..pixels.prepare import padded_size
from .grid import grid_of, lengths_of
from .plan import Plan, stages_in_tiles


def profiles_for(padded: tuple[int, int], profiles: Sequence[Profile]) -> list[int]:
    """Indices of the TensorRT profiles that hold a padded size, the one with the nearest OPT first."""

    def distance(index: int) -> float:
        height, width = profiles[index].opt
        return abs(math.log(padded[0] * padded[1] / (height * width)))

    return sorted((index for index, profile in enumerate(profiles) if profile.holds(padded)), key=distance)


def plan_on_gpu(
    size: tuple[int, int], card: ModelCard, stage: Stage, profiles: Sequence[Profile], source: str, result: int = 0
) -> Plan:
    """Plan one image of `size` (height, width) for a TensorRT plan: by a profile that holds it, or in tiles that do.

    Of the GPU's own memory the backend takes what a size needs.

    Args:
        source: names the engine in errors.
        result: bytes of what is given back, where that is more than labels.

    Raises:
        OverBudgetError: no profile holds it, and it cannot be tiled.
    """
    padded = padded_size(*size, card)
    if fitting := profiles_for(padded, profiles):
        return Plan(size, padded, result, fitting[0], result=result)
    if (plan := plan_profile(size, card, stage, profiles)) is not None:
        return replace(plan, bytes=result, result=result)
    raise outside_profiles(padded, profiles, source)


def outside_profiles(padded: tuple[int, int], profiles: Sequence[Profile], source: str) -> OverBudgetError:
    """The error of a padded size that no profile of an engine holds."""
    ranges = ", ".join("{}×{} to {}×{}".format(*profile.min, *profile.max) for profile in profiles)
    return OverBudgetError(
        f"an image of {padded[0]}×{padded[1]} (padded) is outside every profile of {source} ({ranges}); "
        "build it with --sizes that hold it, or label the image in parts"
    )


def plan_profile(size: tuple[int, int], card: ModelCard, stage: Stage, profiles: Sequence[Profile]) -> Plan | None:
    """Plan an image that no profile of a TensorRT plan holds: the cheapest tiles that are all within one; else None."""
    padded, (stage,) = padded_size(*size, card), stages_in_tiles(card, (stage,))
    if stage.halo is None:
        return None
    best = None
    for index, profile in enumerate(profiles):
        tile = []
        for axis in (0, 1):
            low, high = profile.min[axis], profile.max[axis]
            fitting = [
                (work, length)
                for length, work, shortest, longest in lengths_of(padded[axis], stage, axis, card)
                if low <= shortest and longest <= high
            ]
            if fitting:
                tile.append(min(fitting))
        if len(tile) == 2 and (best is None or tile[0][0] * tile[1][0] < best[0]):
            best = tile[0][0] * tile[1][0], index, (tile[0][1], tile[1][1])
    if best is None:
        return None
    grid = grid_of(padded, best[2], stage, card)
    return Plan(size, padded, 0, best[1], (grid,), grid.overhead)

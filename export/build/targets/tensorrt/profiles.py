"""Optimisation profiles for TensorRT, planned from the sizes of the images that will come."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.build.targets.tensorrt.profile_search import (
    Cost,
    PaddedSizes,
    Partition,
    few_enough,
    least_bytes,
    partitions,
)
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.pixels.prepare import padded_size
from fcn_deploy.runtime.sizes import EXAMPLE, Size, Sizes

MOST_PROFILES = 16  # each adds its context's memory and a share of the build time
USUAL_MOST = 6  # where the user leaves the number to us
DEFAULT_RANGE = ((1, 1), (512, 1024), (2176, 3840))  # (min, opt, max) where no sizes are given


@dataclass(frozen=True)
class PlannedProfile:
    """An optimisation profile to build.

    Attributes:
        min, opt, max: (height, width) in pixels, multiples of the network's size_multiple.
        batch: most images at once; the least, and the number kernels are chosen for, is one.
        sizes: (padded size, images of it) it was planned for; empty where the user gave the range.
    """

    min: Size
    opt: Size
    max: Size
    batch: int = 1
    sizes: tuple[tuple[Size, int], ...] = ()

    @property
    def images(self) -> int:
        return sum(count for _, count in self.sizes)

    @property
    def objective(self) -> float:
        """Σ images · |ln(area / area of OPT)|: how far kernels run from the size they were chosen at."""
        opt = np.log(self.opt[0] * self.opt[1])
        return float(sum(count * abs(np.log(h * w) - opt) for (h, w), count in self.sizes))

    @property
    def pixels(self) -> int:
        """Of the largest input, all images of a batch together: what activation memory is proportional to."""
        return self.batch * self.max[0] * self.max[1]

    def holds(self, size: Size) -> bool:
        return all(low <= side <= high for low, side, high in zip(self.min, size, self.max, strict=True))


def default_profiles(card: ModelCard, batch: int = 1) -> list[PlannedProfile]:
    """One profile for everything up to 2176×3840, where the user says nothing of sizes."""
    return _given([DEFAULT_RANGE], card, batch)


def _given(ranges: Iterable[tuple[Size, Size, Size]], card: ModelCard, batch: int) -> list[PlannedProfile]:
    profiles = []
    for sizes in ranges:
        least, best, most = (padded_size(*size, card) for size in sizes)
        profiles.append(PlannedProfile(least, best, most, batch))
    return profiles


def plan_profiles(
    sizes: Sizes | Mapping[Size, int],
    card: ModelCard,
    k: int | None = None,
    budget: int | None = None,
    cost: Cost = lambda pixels: 4 * pixels,
    batch: int = 1,
) -> list[PlannedProfile]:
    """The profiles that hold every size and keep each near the OPT of its own, smallest OPT first.

    Sizes are padded first, then partitioned: a profile's MIN and MAX are the bounding box of its
    sizes, its OPT is their weighted median by area. The partition minimises Σ images · |ln(area / area of OPT)|,
    and of equal ones the memory, subject to the budget. Up to EXACT distinct sizes it is the best of all partitions;
    beyond, the best of all partitions into intervals of area where memory does not bind, and a search otherwise.

    Args:
        sizes: with the number of images of each, or ranges, which become profiles as they are.
        card: says what sizes are padded to.
        k: most profiles, 1 to MOST_PROFILES; None: as many, up to USUAL_MOST, as each bring WORTH of the objective.
        budget: bytes that the activations of all profiles may take together; None: no limit.
        cost: activation bytes of an input of so many pixels (batch · H · W of a MAX), elementwise on float64 arrays
            and never decreasing.
        batch: most images at once.

    Raises:
        MisuseError: k, batch or budget out of range, or k with ranges.
        DeployError: no partition fits the budget; says how many bytes do.
    """
    sizes = Sizes(sizes) if not isinstance(sizes, Sizes) else sizes
    check_profile_options(sizes, k, batch)
    if budget is not None and budget <= 0:
        raise MisuseError(f"a memory budget of {budget} bytes; give more than 0")
    if sizes.ranges:
        profiles = _given(sizes.ranges, card, batch)
        _check_budget(sum(float(cost(float(profile.pixels))) for profile in profiles), budget)
        return profiles
    if not sizes.counts:
        raise MisuseError(f"no sizes to plan profiles for; give --sizes {EXAMPLE}")
    padded = PaddedSizes(_padded(sizes.counts, card), cost, batch)
    profiles = [_profile(padded, block) for block in _chosen(padded, k, budget).blocks]
    return sorted(profiles, key=lambda profile: (profile.opt[0] * profile.opt[1], profile.opt, profile.max))


def _padded(counts: Mapping[Size, int], card: ModelCard) -> Counter[Size]:
    """How many images there are of each padded size. Raises MisuseError for what is no size."""
    padded: Counter[Size] = Counter()
    for (height, width), count in counts.items():
        if height < 1 or width < 1 or count < 1:
            raise MisuseError(f"{count} images of {height}×{width}; sides and counts are at least 1")
        padded[padded_size(height, width, card)] += count
    return padded


def _chosen(padded: PaddedSizes, k: int | None, budget: int | None) -> Partition:
    """The partition to build. Raises DeployError where none fits the budget."""
    limit = float("inf") if budget is None else float(budget)
    plans = partitions(padded, min(k or USUAL_MOST, len(padded)), limit)
    if not plans:
        most = min(k or MOST_PROFILES, len(padded))
        least = least_bytes(padded, most)
        _check_budget(least.bytes, budget)
        # More profiles than usual fit, as those of narrow images of both orientations may.
        plans = partitions(padded, most, limit) or [least]
    return plans[-1] if k is not None else few_enough(plans, padded.loss(np.arange(len(padded))))


def _profile(padded: PaddedSizes, block: np.ndarray) -> PlannedProfile:
    """The profile of some of the sizes."""
    sizes = [padded.sizes[index] for index in block]
    heights, widths = zip(*sizes, strict=True)
    return PlannedProfile(
        (min(heights), min(widths)),
        padded.best_opt(block),
        (max(heights), max(widths)),
        padded.batch,
        tuple((padded.sizes[index], padded.counts[index]) for index in block),
    )


def check_profile_options(sizes: Sizes | None, k: int | None, batch: int) -> None:
    """Refuse numbers of profiles and images that cannot be planned with. Raises MisuseError."""
    if k is not None and not 1 <= k <= MOST_PROFILES:
        raise MisuseError(f"--profiles {k}; choose 1 to {MOST_PROFILES}, as each takes memory and build time")
    if batch < 1:
        raise MisuseError(f"--max-batch {batch}; a batch has at least 1 image")
    if sizes is not None and sizes.ranges and k not in (None, len(sizes.ranges)):
        raise MisuseError(f"--profiles {k} and {len(sizes.ranges)} ranges in --sizes; omit --profiles")


def _check_budget(needed: float, budget: int | None) -> None:
    if budget is not None and needed > budget:
        raise DeployError(
            f"the profiles need about {needed:,.0f} bytes ({needed / 1e6:,.0f} MB) of activation memory at least, "
            f"over the budget of {budget:,} ({budget / 1e6:,.0f} MB); raise --workspace, lower --max-batch, or omit "
            "the largest sizes (the runtime tiles them)"
        )

"""Optimisation profiles for TensorRT, planned from the sizes of the images that will come."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.model_card import ModelCard
from fcn_deploy.runtime.prepare import padded_size
from fcn_deploy.runtime.sizes import EXAMPLE, Size, Sizes

Cost = Callable[[Any], Any]

MOST_PROFILES = 16  # each adds its context's memory and a share of the build time
USUAL_MOST = 6  # where the user leaves the number to us
WORTH = 0.1  # of the objective of one profile: what another must bring
EXACT = 10  # distinct sizes up to which every partition is considered
SMALLEST, USUAL, LARGEST = (1, 1), (512, 1024), (2176, 3840)  # where no sizes are given


@dataclass(frozen=True)
class Profile:
    """One optimisation profile.

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


def default_profiles(card: ModelCard, batch: int = 1) -> list[Profile]:
    """One profile for everything up to 2176×3840, where the user says nothing of sizes."""
    return _given([(SMALLEST, USUAL, LARGEST)], card, batch)


def _given(ranges, card: ModelCard, batch: int) -> list[Profile]:
    return [Profile(*(padded_size(*size, card) for size in sizes), batch=batch) for sizes in ranges]


def plan_profiles(
    sizes: Sizes | Mapping[Size, int],
    card: ModelCard,
    k: int | None = None,
    budget: int | None = None,
    cost: Cost = lambda pixels: 4 * pixels,
    batch: int = 1,
) -> list[Profile]:
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
    counts: Counter[Size] = Counter()
    for (height, width), count in sizes.counts.items():
        if height < 1 or width < 1 or count < 1:
            raise MisuseError(f"{count} images of {height}×{width}; sides and counts are at least 1")
        counts[padded_size(height, width, card)] += count
    items = _Items(counts, cost, batch)
    limit = float("inf") if budget is None else float(budget)
    plans = _plans(items, min(k or USUAL_MOST, len(items)), limit)
    if not plans:
        most = min(k or MOST_PROFILES, len(items))
        least = _least_bytes(items, most)
        _check_budget(least.bytes, budget)
        # More profiles than usual fit, as those of narrow images of both orientations may.
        plans = _plans(items, most, limit) or [least]
    chosen = plans[-1] if k is not None else _few_enough(plans, items.loss(np.arange(len(items))))
    profiles = [items.profile(block) for block in chosen.blocks]
    return sorted(profiles, key=lambda profile: (profile.opt[0] * profile.opt[1], profile.opt, profile.max))


def check_profile_options(sizes: Sizes | None, k: int | None, batch: int) -> None:
    """Refuse numbers of profiles and images that cannot be planned with. Raises MisuseError."""
    if k is not None and not 1 <= k <= MOST_PROFILES:
        raise MisuseError(f"--profiles {k}; choose 1 to {MOST_PROFILES}, as each takes memory and build time")
    if batch < 1:
        raise MisuseError(f"--batch {batch}; a batch has at least 1 image")
    if sizes is not None and sizes.ranges and k not in (None, len(sizes.ranges)):
        raise MisuseError(f"--profiles {k} and {len(sizes.ranges)} ranges in --sizes; omit --profiles")


def _check_budget(needed: float, budget: int | None) -> None:
    if budget is not None and needed > budget:
        raise DeployError(
            f"the profiles need about {needed:,.0f} bytes ({needed / 2**20:,.0f} MiB) of activation memory at least, "
            f"over the budget of {budget:,} ({budget / 2**20:,.0f} MiB); raise --workspace, lower --batch, or leave "
            "the largest sizes away (the runtime tiles them)"
        )


class _Items:
    """The distinct padded sizes, ascending by area, and what blocks of them (ascending index arrays) cost."""

    def __init__(self, counts: Mapping[Size, int], cost: Cost, batch: int) -> None:
        self.sizes = sorted(counts, key=lambda size: (size[0] * size[1], size))
        self.counts = [counts[size] for size in self.sizes]
        self.height, self.width = np.array(self.sizes, np.float64).T
        self.count = np.array(self.counts, np.float64)
        self.log = np.log(self.height * self.width)
        self.cost, self.batch = cost, batch

    def __len__(self) -> int:
        return len(self.sizes)

    def memory(self, height, width):
        """Bytes of boxes whose MAX is height × width."""
        return self.cost(self.batch * height * width)

    def median(self, block: np.ndarray) -> int:
        """Index of the size that makes the best OPT: the weighted median of log area."""
        weight = np.cumsum(self.count[block])
        return int(block[np.searchsorted(weight, weight[-1] / 2)])

    def loss(self, block: np.ndarray) -> float:
        distances = np.abs(self.log[block] - self.log[self.median(block)])
        return float(distances @ self.count[block])

    def bytes(self, block: np.ndarray) -> float:
        return float(self.memory(self.height[block].max(), self.width[block].max()))

    def profile(self, block: np.ndarray) -> Profile:
        median = self.median(block)
        # Of sizes of one area, as portrait and landscape have, the more frequent.
        best = max((i for i in block if self.log[i] == self.log[median]), key=lambda i: self.counts[i])
        sizes = [self.sizes[i] for i in block]
        return Profile(
            tuple(map(min, zip(*sizes, strict=True))),
            self.sizes[best],
            tuple(map(max, zip(*sizes, strict=True))),
            self.batch,
            tuple((self.sizes[i], self.counts[i]) for i in block),
        )


@dataclass(frozen=True)
class _Plan:
    blocks: tuple[np.ndarray, ...]
    loss: float
    bytes: float

    @classmethod
    def of(cls, items: _Items, blocks) -> "_Plan":
        blocks = tuple(block for block in blocks if len(block))
        return cls(blocks, sum(map(items.loss, blocks)), sum(map(items.bytes, blocks)))

    def better(self, other: "_Plan | None") -> bool:
        """Less loss; where it is equal but for rounding, less memory; then fewer profiles."""
        if other is None:
            return True
        close = 1e-9 * max(1.0, self.loss)
        if abs(self.loss - other.loss) > close:
            return self.loss < other.loss
        return (self.bytes, len(self.blocks)) < (other.bytes, len(other.blocks))


def _plans(items: _Items, k: int, limit: float) -> list[_Plan]:
    """The best plan found of at most 1, 2, … k profiles, each at least as good as the one before; those that fit."""
    found = _exact(items, k, limit) if len(items) <= EXACT else _searched(items, k, limit)
    plans: list[_Plan] = []
    for plan in found:
        if plan is not None and plan.bytes <= limit and (not plans or plan.better(plans[-1])):
            plans.append(plan)
        elif plans:
            plans.append(plans[-1])
    return plans


def _few_enough(plans: list[_Plan], whole: float) -> _Plan:
    for plan, more in pairwise(plans):
        if plan.loss - more.loss < WORTH * whole or not plan.loss:
            return plan
    return plans[-1]


def _subsets(items: _Items) -> tuple[list[float], list[float]]:
    """Loss and bytes of every subset of a few items, by bit mask."""
    losses, sizes = [0.0], [0.0]
    for block in _blocks(range(1, 1 << len(items)), len(items)):
        losses.append(items.loss(block))
        sizes.append(items.bytes(block))
    return losses, sizes


def _blocks(masks, n: int) -> list[np.ndarray]:
    """Bit masks of n items as index arrays."""
    return [np.flatnonzero([mask >> item & 1 for item in range(n)]) for mask in masks]


def _exact(items: _Items, k: int, limit: float) -> list[_Plan | None]:
    """The best of all partitions into at most 1, 2, … k blocks."""
    losses, sizes = _subsets(items)
    plans: list[_Plan | None] = []
    for most in range(1, k + 1):
        masks = _best_partition(losses, sizes, len(items), most, limit)
        plans.append(masks and _Plan.of(items, _blocks(masks, len(items))))
    return plans


def _best_partition(losses, sizes, n: int, k: int, limit: float) -> tuple[int, ...] | None:
    """Blocks, as bit masks, of least loss (then least bytes) within `limit` bytes. None where nothing fits.

    Both only grow as a block does, so a branch that is worse already is left. The largest sizes are placed first:
    they decide most of the memory.
    """
    best: list = [float("inf"), float("inf"), None]

    def place(item: int, masks: tuple[int, ...], loss: float, size: float) -> None:
        close = 1e-9 * max(1.0, loss)
        if size > limit or loss > best[0] + close or (loss > best[0] - close and size >= best[1]):
            return
        if item < 0:
            best[:] = loss, size, masks
            return
        bit = 1 << item
        for index, mask in enumerate(masks):
            grown = mask | bit
            place(
                item - 1,
                (*masks[:index], grown, *masks[index + 1 :]),
                loss + losses[grown] - losses[mask],
                size + sizes[grown] - sizes[mask],
            )
        if len(masks) < k:
            place(item - 1, (*masks, bit), loss + losses[bit], size + sizes[bit])

    place(n - 1, (), 0.0, 0.0)
    return best[2]


def _least_bytes(items: _Items, k: int) -> _Plan:
    """The partition that takes the least memory: proven for few sizes, the least found for many."""
    if len(items) <= EXACT:
        sizes = _subsets(items)[1]
        return _Plan.of(items, _blocks(_best_partition(sizes, sizes, len(items), k, float("inf")), len(items)))
    return min((plan for plan in _searched(items, k, 0.0) if plan is not None), key=lambda plan: plan.bytes)


class _Intervals:
    """Partitions of some items (ascending by area) into intervals of area, by dynamic programming.

    Without a budget they hold the optimum: the loss is that of k-medians in one dimension.
    """

    def __init__(self, items: _Items, chosen: np.ndarray) -> None:
        self.chosen = chosen
        n = len(chosen)
        self.loss, self.bytes = np.full((n, n), np.inf), np.full((n, n), np.inf)
        count, log = items.count[chosen], items.log[chosen]
        weight = np.concatenate(([0.0], np.cumsum(count)))
        moment = np.concatenate(([0.0], np.cumsum(count * log)))
        for first in range(n):
            last = np.arange(first, n)
            # Where the running weight reaches half of the interval's: its median.
            middle = np.searchsorted(weight[1:], (weight[first] + weight[last + 1]) / 2)
            below = log[middle] * (weight[middle + 1] - weight[first]) - (moment[middle + 1] - moment[first])
            above = (moment[last + 1] - moment[middle + 1]) - log[middle] * (weight[last + 1] - weight[middle + 1])
            self.loss[first, first:] = np.maximum(below + above, 0)
            self.bytes[first, first:] = items.memory(
                np.maximum.accumulate(items.height[chosen[first:]]), np.maximum.accumulate(items.width[chosen[first:]])
            )

    def best(self, k: int, price: float) -> list[tuple[float, list[np.ndarray]]]:
        """For exactly 1, 2, … k intervals: the least loss + price · bytes, and the blocks."""
        n = len(self.chosen)
        value = self.loss + price * self.bytes
        totals, cuts = [value[0]], [np.zeros(n, int)]
        for _ in range(1, min(k, n)):
            ways = totals[-1][:-1, None] + value[1:]
            cuts.append(ways.argmin(0) + 1)
            totals.append(ways.min(0))
        found = []
        for count in range(len(totals)):
            blocks, end = [], n
            for level in range(count, -1, -1):
                start = int(cuts[level][end - 1])
                blocks.append(self.chosen[start:end])
                end = start
            found.append((float(totals[count][-1]), blocks[::-1]))
        return found


def _searched(items: _Items, k: int, limit: float) -> list[_Plan | None]:
    """Good partitions into at most 1, 2, … k blocks, for many sizes.

    Intervals of area are optimal where memory does not bind. Where it does, memory gets a price, which is raised
    until the plan fits (Lagrangian relaxation), for intervals of all sizes and for landscapes and portraits apart,
    whose common box would be larger than either; then sizes move between profiles while that helps and fits.
    """
    every = np.arange(len(items))
    wide = items.width >= items.height
    families = [[_Intervals(items, every)]]
    if limit < float("inf") and wide.any() and not wide.all():
        families.append([_Intervals(items, every[wide]), _Intervals(items, every[~wide])])
    whole = _Plan.of(items, [every])
    best: list[_Plan | None] = [None] * k
    least: list[_Plan | None] = [None] * k
    # Of the plans that do not fit, the one that is nearest to fitting, and the price it was found at.
    near: list[tuple[_Plan, float] | None] = [None] * k

    def consider(index: int, blocks, price: float) -> _Plan:
        plan = _Plan.of(items, blocks)
        if plan.bytes <= limit and plan.better(best[index]):
            best[index] = plan
        if plan.bytes > limit and (near[index] is None or plan.bytes < near[index][0].bytes):
            near[index] = plan, price
        if least[index] is None or plan.bytes < least[index].bytes:
            least[index] = plan
        return plan

    def try_price(price: float) -> list[_Plan]:
        plans = [consider(index, blocks, price) for index, (_, blocks) in enumerate(families[0][0].best(k, price))]
        for first, second in ((one.best(k - 1, price), two.best(k - 1, price)) for one, two in families[1:]):
            for index in range(1, k):
                pairs = [
                    (first[i][0] + second[index - 1 - i][0], i)
                    for i in range(index)
                    if i < len(first) and index - 1 - i < len(second)
                ]
                if pairs:
                    i = min(pairs)[1]
                    consider(index, first[i][1] + second[index - 1 - i][1], price)
        return plans

    scale = max(whole.loss, 1e-9) / whole.bytes
    free = try_price(1e-9 * scale)
    if all(plan.bytes <= limit for plan in free):
        return best
    for exponent in range(-7, 6):
        try_price(scale * 4.0**exponent)
    for index in range(k):
        starts = [(plan, 0.0) for plan in (best[index], best[index - 1] if index else None) if plan is not None]
        if near[index] is not None:
            plan, price = near[index]
            starts += [(_moved(items, plan, index + 1, step * price, float("inf")), 0.0) for step in (1, 4, 16, 1e6)]
        for plan, price in starts:
            for moved in (plan, _moved(items, plan, index + 1, price, limit)):
                consider(index, moved.blocks, price)
    return best if limit > 0 else least


MOVES = 80  # at most, of a search that ends by itself long before


def _moved(items: _Items, plan: _Plan, k: int, price: float, limit: float) -> _Plan:
    """`plan` after moving sizes, one at a time, to other profiles, while that lowers loss + price · bytes and fits."""
    if plan.bytes > limit:
        return plan
    n = len(items)
    blocks = [*plan.blocks, *([np.empty(0, int)] * (k - len(plan.blocks)))]
    owner = np.empty(n, int)
    for index, block in enumerate(blocks):
        owner[block] = index
    rows = np.arange(n)
    # Of each block its box and OPT; of each size the box its block would have without it.
    height, width, opt = np.zeros(k), np.zeros(k), np.full(k, np.nan)
    without = np.zeros((2, n))

    def measure(index: int) -> None:
        block = blocks[index]
        height[index] = width[index] = 0.0
        opt[index] = items.log[items.median(block)] if len(block) else np.nan
        if not len(block):
            return
        for side, largest, rest in ((items.height, height, without[0]), (items.width, width, without[1])):
            values = side[block]
            top = int(values.argmax())
            largest[index] = rest[block] = values[top]
            values[top] = 0.0
            rest[block[top]] = values.max()

    for index in range(k):
        measure(index)
    for _ in range(MOVES):
        now = np.where(height > 0, items.memory(height, width), 0.0)
        left = np.where(without[0] > 0, items.memory(*without), 0.0)
        joined = items.memory(np.maximum(height, items.height[:, None]), np.maximum(width, items.width[:, None]))
        change = joined - now + (left - now[owner])[:, None]
        # An empty block takes the size as its OPT.
        distance = np.nan_to_num(np.abs(items.log[:, None] - opt))
        gain = (distance[rows, owner][:, None] - distance) * items.count[:, None] - price * change
        gain[rows, owner] = 0.0
        gain[now.sum() + change > limit] = 0.0
        item, target = divmod(int(gain.argmax()), k)
        if gain[item, target] <= 1e-9 * max(1.0, plan.loss):
            break
        source = int(owner[item])
        blocks[source] = blocks[source][blocks[source] != item]
        blocks[target] = np.sort(np.append(blocks[target], item))
        owner[item] = target
        measure(source)
        measure(target)
    return _Plan.of(items, blocks)


def table(profiles: list[Profile], activation_bytes: tuple[int | None, ...] | None = None) -> list[dict[str, Any]]:
    """Rows to print: profile, min, opt, max, batch, images it serves, mean |ln(area / area of OPT)|, bytes.

    `images` and `mean_log_ratio` are None where the user gave ranges, `activation_bytes` where it is not known.
    """
    rows = []
    for index, profile in enumerate(profiles):
        rows.append(
            {
                "profile": index,
                **{name: f"{size[0]}x{size[1]}" for name, size in _corners(profile)},
                "batch": profile.batch,
                "images": profile.images or None,
                "mean_log_ratio": round(profile.objective / profile.images, 4) if profile.images else None,
                "activation_bytes": activation_bytes[index] if activation_bytes else None,
            }
        )
    return rows


def show(profiles: list[Profile], activation_bytes: tuple[int | None, ...] | None = None) -> str:
    """The table as text."""
    return show_rows(table(profiles, activation_bytes))


def show_rows(rows: list[dict[str, Any]]) -> str:
    """Rows of `table` as text."""
    lines = [
        f"{'profile':>7} {'min':>10} {'opt':>10} {'max':>10} {'batch':>5} {'images':>7} {'mean |ln|':>9} {'memory':>10}"
    ]
    for row in rows:
        images = "-" if row["images"] is None else f"{row['images']:,}"
        ratio = "-" if row["mean_log_ratio"] is None else f"{row['mean_log_ratio']:.3f}"
        memory = "-" if row["activation_bytes"] is None else f"{row['activation_bytes'] / 2**20:,.0f} MiB"
        lines.append(
            f"{row['profile']:>7} {row['min']:>10} {row['opt']:>10} {row['max']:>10} {row['batch']:>5} {images:>7} "
            f"{ratio:>9} {memory:>10}"
        )
    return "\n".join(lines)


def _corners(profile: Profile):
    return ("min", profile.min), ("opt", profile.opt), ("max", profile.max)

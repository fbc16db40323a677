"""The best partition of image sizes into a few profiles: exact for few sizes, a search for many."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from fcn_deploy.runtime.sizes import Size

Cost = Callable[[Any], Any]  # activation bytes of so many pixels, elementwise on float64 arrays and never decreasing
EXACT = 10  # distinct sizes up to which every partition is considered
PROFILE_WORTH = 0.1  # of the objective of one profile: what another must bring


class PaddedSizes:
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

    def best_opt(self, block: np.ndarray) -> Size:
        """The OPT of a block: of sizes of the median's area, as portrait and landscape have, the more frequent."""
        median = self.median(block)
        return self.sizes[max((i for i in block if self.log[i] == self.log[median]), key=lambda i: self.counts[i])]


@dataclass(frozen=True)
class Partition:
    """Sizes divided among profiles.

    Attributes:
        blocks: indices of each profile's sizes, ascending.
        loss: Σ images · |ln(area / area of OPT)|.
        bytes: of all profiles' activations.
    """

    blocks: tuple[np.ndarray, ...]
    loss: float
    bytes: float

    @classmethod
    def of(cls, items: PaddedSizes, blocks: Iterable[np.ndarray]) -> "Partition":
        taken = tuple(block for block in blocks if len(block))
        return cls(taken, sum(map(items.loss, taken)), sum(map(items.bytes, taken)))

    def better(self, other: "Partition | None") -> bool:
        """Less loss; where it is equal but for rounding, less memory; then fewer profiles."""
        if other is None:
            return True
        close = 1e-9 * max(1.0, self.loss)
        if abs(self.loss - other.loss) > close:
            return self.loss < other.loss
        return (self.bytes, len(self.blocks)) < (other.bytes, len(other.blocks))


def partitions(items: PaddedSizes, k: int, limit: float) -> list[Partition]:
    """The best plan found of at most 1, 2, … k profiles, each at least as good as the one before; those that fit."""
    found = _exact(items, k, limit) if len(items) <= EXACT else _searched(items, k, limit)
    plans: list[Partition] = []
    for plan in found:
        if plan is not None and plan.bytes <= limit and (not plans or plan.better(plans[-1])):
            plans.append(plan)
        elif plans:
            plans.append(plans[-1])
    return plans


def few_enough(plans: list[Partition], whole: float) -> Partition:
    """The first plan after which another profile brings less than PROFILE_WORTH of `whole`, the loss of one."""
    for plan, more in pairwise(plans):
        if plan.loss - more.loss < PROFILE_WORTH * whole or not plan.loss:
            return plan
    return plans[-1]


def _subsets(items: PaddedSizes) -> tuple[list[float], list[float]]:
    """Loss and bytes of every subset of a few items, by bit mask."""
    losses, sizes = [0.0], [0.0]
    for block in _blocks(range(1, 1 << len(items)), len(items)):
        losses.append(items.loss(block))
        sizes.append(items.bytes(block))
    return losses, sizes


def _blocks(masks: Iterable[int], n: int) -> list[np.ndarray]:
    """Bit masks of n items as index arrays."""
    return [np.flatnonzero([mask >> item & 1 for item in range(n)]) for mask in masks]


def _exact(items: PaddedSizes, k: int, limit: float) -> list[Partition | None]:
    """The best of all partitions into at most 1, 2, … k blocks."""
    losses, sizes = _subsets(items)
    plans: list[Partition | None] = []
    for most in range(1, k + 1):
        masks = _best_partition(losses, sizes, len(items), most, limit)
        plans.append(None if masks is None else Partition.of(items, _blocks(masks, len(items))))
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


def least_bytes(items: PaddedSizes, k: int) -> Partition:
    """The partition that takes the least memory: proven for few sizes, the least found for many."""
    if len(items) <= EXACT:
        sizes = _subsets(items)[1]
        masks = _best_partition(sizes, sizes, len(items), k, float("inf"))
        assert masks is not None  # as nothing limits it
        return Partition.of(items, _blocks(masks, len(items)))
    return min((plan for plan in _searched(items, k, 0.0) if plan is not None), key=lambda plan: plan.bytes)


class _Intervals:
    """Partitions of some items (ascending by area) into intervals of area, by dynamic programming.

    Without a budget they hold the optimum: the loss is that of k-medians in one dimension.
    """

    def __init__(self, items: PaddedSizes, chosen: np.ndarray) -> None:
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


def _searched(items: PaddedSizes, k: int, limit: float) -> list[Partition | None]:
    """Good partitions into at most 1, 2, … k blocks, for many sizes.

    Intervals of area are optimal where memory does not bind. Where it does, memory gets a price, which is raised
    until the plan fits (Lagrangian relaxation), for intervals of all sizes and for landscapes and portraits apart,
    whose common box would be larger than either; then sizes move between profiles while that helps and fits.
    """
    search = _PriceSearch(items, k, limit)
    scale = max(search.whole.loss, 1e-9) / search.whole.bytes
    if all(plan.bytes <= limit for plan in search.try_price(1e-9 * scale)):
        return search.best
    for exponent in range(-7, 6):
        search.try_price(scale * 4.0**exponent)
    for index in range(k):
        search.try_moves(index)
    return search.best if limit > 0 else search.least


class _PriceSearch:
    """What `_searched` tries, and the best that it found.

    Attributes:
        whole: one profile for all.
        best: of at most 1, 2, … blocks, of those that fit; None where none does yet.
        least: the same, of least memory.
    """

    def __init__(self, items: PaddedSizes, k: int, limit: float) -> None:
        self.items, self.k, self.limit = items, k, limit
        every = np.arange(len(items))
        wide = items.width >= items.height
        self.families = [[_Intervals(items, every)]]
        if limit < float("inf") and wide.any() and not wide.all():
            self.families.append([_Intervals(items, every[wide]), _Intervals(items, every[~wide])])
        self.whole = Partition.of(items, [every])
        self.best: list[Partition | None] = [None] * k
        self.least: list[Partition | None] = [None] * k
        # Of the plans that do not fit, the one that is nearest to fitting, and the price it was found at.
        self._near: list[tuple[Partition, float] | None] = [None] * k

    def _consider(self, index: int, blocks: Iterable[np.ndarray], price: float) -> Partition:
        plan = Partition.of(self.items, blocks)
        near, least = self._near[index], self.least[index]
        if plan.bytes <= self.limit and plan.better(self.best[index]):
            self.best[index] = plan
        if plan.bytes > self.limit and (near is None or plan.bytes < near[0].bytes):
            self._near[index] = plan, price
        if least is None or plan.bytes < least.bytes:
            self.least[index] = plan
        return plan

    def try_price(self, price: float) -> list[Partition]:
        """The plans of intervals of all sizes where a byte costs so much; those of two families are considered too."""
        intervals = self.families[0][0].best(self.k, price)
        plans = [self._consider(index, blocks, price) for index, (_, blocks) in enumerate(intervals)]
        for one, two in self.families[1:]:
            first, second = one.best(self.k - 1, price), two.best(self.k - 1, price)
            for index in range(1, self.k):
                pairs = [
                    (first[i][0] + second[index - 1 - i][0], i)
                    for i in range(index)
                    if i < len(first) and index - 1 - i < len(second)
                ]
                if pairs:
                    i = min(pairs)[1]
                    self._consider(index, first[i][1] + second[index - 1 - i][1], price)
        return plans

    def try_moves(self, index: int) -> None:
        """Plans after sizes moved between profiles, from the best of so many, and from what nearly fits."""
        items, most = self.items, index + 1
        known = (self.best[index], self.best[index - 1] if index else None)
        starts = [(plan, 0.0) for plan in known if plan is not None]
        if (near := self._near[index]) is not None:
            plan, price = near
            starts += [(_moved(items, plan, most, step * price, float("inf")), 0.0) for step in (1, 4, 16, 1e6)]
        for plan, price in starts:
            for moved in (plan, _moved(items, plan, most, price, self.limit)):
                self._consider(index, moved.blocks, price)


MOST_MOVES = 80  # at most, of a search that ends by itself long before


def _moved(items: PaddedSizes, plan: Partition, k: int, price: float, limit: float) -> Partition:
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
    for _ in range(MOST_MOVES):
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
    return Partition.of(items, blocks)

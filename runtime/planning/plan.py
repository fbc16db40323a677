"""From an image's size to how it is run: whole, or each stage in tiles, under a memory budget."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..engine_format.manifest import Manifest
from ..engine_format.model_card import ModelCard
from ..engine_format.pooled import Pooled
from ..engine_format.stage import Stage
from ..errors import OverBudgetError
from ..pixels.prepare import padded_size
from .grid import Grid
from .kept_rows import NOTHING_KEPT, KeptRows
from .tile_costs import Numbers, cheapest, made_at_once, tile_options

WORK_WORTH_A_PLAN = 1.1  # over that of the whole image: of less, other tiles would not save what it takes to find them
WEIGHTS_OPENED = 2  # times the weights' bytes: what a library keeps of them, in layouts of its own
ARENA_SHARES = tuple(0.08 * 1.25**step for step in range(11))  # of the budget, that are tried: to three quarters


@dataclass(frozen=True)
class Plan:
    """How an image is run: by one run of the core, or in tiles.

    Attributes:
        size: of the image, (height, width) in pixels.
        padded: what the core would see, whole. Grids of a network that looks at a resized image are of that.
        bytes: estimated working memory, and `result`; that of a plain ONNX or on a GPU is not known, and counts as 0.
        result: bytes of what is given back, where that is more than labels.
        profile: index of the TensorRT profile that runs it, or each of its tiles, on a GPU.
        grids: of each stage; empty where the image is run whole.
        overhead: work over that of the whole image, halos included.
        fine: the grids are of an engine's stages for tiles alone.
        passes: grids of the stages of each pass before the scores, of a network that pools over the whole image.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    bytes: int
    profile: int | None = None
    grids: tuple[Grid, ...] = ()
    overhead: float = 1.0
    result: int = 0
    passes: tuple[tuple[Grid, ...], ...] = ()
    fine: bool = False


@dataclass(frozen=True)
class Beside:
    """What an image takes in memory beside the runs of a network on it.

    Attributes:
        result: bytes of what is given back, where that is more than labels.
        kept: what its reader keeps.
        making: bytes of each pixel that results are made in, some rows at a time.
        copied: bytes of copies of the image that are made where it is run whole.
    """

    result: int = 0
    kept: KeptRows = NOTHING_KEPT
    making: float = 0.0
    copied: int = 0

    def made_at_once(self, pixels: int) -> float:
        """Bytes that results of so many pixels are made in."""
        return float(made_at_once(pixels, self.making))


NOTHING_BESIDE = Beside()


def stages_in_tiles(card: ModelCard, stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """The stages as they may be tiled.

    A card's `whole` says that some stage needs the whole image. Where a stage has been found to be it, those before it
    are tiled; where none has, it may be any, and none is tiled.
    """
    if card.whole and all(stage.halo is not None for stage in stages):
        return tuple(replace(stage, halo=None, whole=card.whole) for stage in stages)
    return tuple(stages)


def plan_run(
    size: tuple[int, int],
    card: ModelCard,
    stages: Sequence[Stage],
    memory: float,
    beside: Beside = NOTHING_BESIDE,
) -> Plan:
    """Plan one image of `size` (height, width) within `memory` bytes: whole where that suffices, else in tiles.

    Each stage has tiles of its own shape, chosen together: the least work whose memory is in the budget. Memory is that
    of every stage's largest run, as backends keep what they once took, of the rows between them, and of what is
    `beside`. A stage with a `tile` is run in tiles of at most that, which are faster, whatever the memory.

    Raises:
        OverBudgetError: not even the smallest tiles fit, or the network cannot be tiled.
    """
    check_result(size, beside.result, memory)
    plan = plan_unbounded(size, card, tuple(stages))
    taken = plan.bytes + beside.result + (0 if plan.grids else beside.copied)
    if taken + beside.made_at_once(math.prod(size)) > memory:
        return _cheapest_within(size, card, stages, memory, beside)
    return plan if taken == plan.bytes else replace(plan, bytes=taken, result=beside.result)


@lru_cache(maxsize=1024)
def plan_unbounded(size: tuple[int, int], card: ModelCard, stages: tuple[Stage, ...]) -> Plan:
    """The plan of an image where memory does not matter."""
    padded, stages = padded_size(*size, card), stages_in_tiles(card, stages)
    if all(stage.tile is None or stage.halo is None or stage.tile**2 >= math.prod(padded) for stage in stages):
        return Plan(size, padded, _whole(padded, stages))
    return _cheapest_within(size, card, stages, math.inf)


def _cheapest_within(
    size: tuple[int, int],
    card: ModelCard,
    stages: Sequence[Stage],
    memory: float,
    beside: Beside = NOTHING_BESIDE,
    arena: float | None = None,
    seen: tuple[int, int] | None = None,
) -> Plan:
    """The plan of the least work in tiles that take at most `memory` bytes. Raises OverBudgetError.

    Args:
        arena: bytes of it for the runs of all stages, one after the other; None: each stage has what its own take.
        seen: (height, width) that the network looks at; None: those of the padded image.
    """
    padded, stages = seen or padded_size(*size, card), stages_in_tiles(card, stages)
    cost, taken, grids = _worth_a_look(padded, card, stages, beside, arena)
    fitting = np.flatnonzero(taken <= memory)
    if not len(fitting):
        needed = _whole(padded, stages) + beside.result + beside.copied + beside.made_at_once(math.prod(size))
        need = (
            f"an image of {size[0]}×{size[1]} pixels needs about {_gb(needed)}, over the memory budget of {_gb(memory)}"
        )
        reasons = [stage.whole for stage in stages if stage.halo is None]
        if reasons and len(stages) == 1:
            raise OverBudgetError(
                f"{need}, and this network cannot be cut into tiles ({reasons[0]}); raise it with memory= (--memory), "
                "or label a smaller image"
            )
        least = taken.min()
        why = f", as a part of the network cannot be cut into tiles ({reasons[0]})" if reasons else ""
        raise OverBudgetError(
            f"{need}, and in the smallest tiles it takes {_gb(least)}{why}; raise it with memory= (--memory)"
        )
    chosen = fitting[np.argmin(cost[fitting])]
    overhead = _overhead(stages, grids[chosen])
    return Plan(size, padded, int(taken[chosen]), grids=grids[chosen], overhead=overhead, result=beside.result)


@lru_cache(maxsize=4)  # as builders ask for several budgets, one after the other
def _worth_a_look(
    padded: tuple[int, int],
    card: ModelCard,
    stages: tuple[Stage, ...],
    beside: Beside,
    arena: float | None,
) -> tuple[Numbers, Numbers, list[tuple[Grid, ...]]]:
    """Work, bytes and grids of the tiles that no others beat in both; infinite bytes where there are none."""
    cost, taken = np.zeros(1), np.full(1, float(beside.result) + (arena or 0))
    grids: list[tuple[Grid, ...]] = [()]
    pixel: float = card.channels * np.dtype(card.dtype).itemsize
    last = len(stages) - 1
    for index, stage in enumerate(stages):
        kept = beside.kept if index == 0 else KeptRows(padded[1] * pixel)
        making = beside.making if index == last else None
        more, further, options = tile_options(stage, padded, card, pixel, kept, making, arena)
        if not options:
            return cost, np.full(1, math.inf), grids
        cost, taken = np.add.outer(cost, more).ravel(), np.add.outer(taken, further).ravel()
        best = cheapest(cost, taken)
        cost, taken = cost[best], taken[best]
        grids = [(*grids[index // len(options)], options[index % len(options)]) for index in best]
        pixel = stage.output_bytes
    return cost, taken, grids


@lru_cache(maxsize=64)
def plan_fine(
    size: tuple[int, int],
    card: ModelCard,
    stages: tuple[Stage, ...],
    memory: float,
    weights: int,
    beside: Beside = NOTHING_BESIDE,
) -> Plan | None:
    """The plan of an image by an engine's stages for tiles alone; None where these do not fit.

    Their runs find room in what those of the others left: memory is that of the largest of them. Arguments as of
    plan_run.

    Args:
        weights: bytes of the stages' weights, which are in memory once more while they are open.
    """
    free, best = replace(card, whole=""), None
    for share in ARENA_SHARES:
        arena = (memory - weights) * share
        try:
            found = _cheapest_within(size, free, stages, memory - weights, beside, arena)
        except OverBudgetError:
            continue
        if best is None or found.overhead < best.overhead:
            best = found
    return None if best is None else replace(best, bytes=best.bytes + weights, fine=True)


def plan_passes(
    size: tuple[int, int],
    card: ModelCard,
    pooled: Pooled,
    memory: float,
    beside: Beside = NOTHING_BESIDE,
) -> Plan:
    """Plan one image of a network that pools over the whole image: passes for its pooled values, then its scores.

    Each is run in tiles of its own, and gives its memory back before the next. Arguments and errors as of plan_run.
    """
    check_result(size, beside.result, memory)
    free = pooled.card(replace(card, whole=""))
    seen = pooled.padded(size, padded_size(*size, card))
    plans = [_cheapest_within(size, free, chain, memory, beside, seen=seen) for chain in pooled.chains]
    works = [sum(stage.cost for stage in chain) for chain in pooled.chains]
    overhead = sum(work * plan.overhead for work, plan in zip(works, plans, strict=True)) / works[-1]
    *passes, last = plans
    needed = max(plan.bytes for plan in plans)
    return replace(
        last, padded=padded_size(*size, card), bytes=needed, overhead=overhead,
        passes=tuple(plan.grids for plan in passes),
    )  # fmt: skip


def plan_engine(
    size: tuple[int, int],
    card: ModelCard,
    stages: tuple[Stage, ...],
    manifest: Manifest | None,
    memory: float,
    beside: Beside = NOTHING_BESIDE,
    fine: bool = True,
) -> Plan:
    """Plan one image by the stages of whole images where that is no more work, else by those for tiles, or in passes.

    Args:
        stages: of whole images.
        manifest: of the engine, which tells of the others; None of an ONNX model.
        fine: whether it may be by the stages for tiles alone.

    Other arguments and errors as of plan_run.
    """
    plan, over = None, ""
    try:
        plan = plan_run(size, card, stages, memory, beside)
    except OverBudgetError as error:
        if manifest is None:
            raise
        over = str(error)  # itself it would keep the frames of all callers, and their arrays, for as long as it is kept
    # Tiles that fit the caches are of the stages that they were measured with.
    whole = plan is not None and plan.grids == plan_unbounded(size, card, stages).grids
    much = plan is None or plan.overhead > WORK_WORTH_A_PLAN
    if fine and not whole and much and manifest is not None and manifest.fine:
        weights = sum(manifest.members[stage.file]["bytes"] for stage in manifest.stages)
        other = plan_fine(size, card, manifest.fine, memory, WEIGHTS_OPENED * weights, beside)
        if other is not None and (plan is None or other.overhead < plan.overhead):
            return other
    if plan is not None:
        return plan
    if manifest is None or manifest.pooled is None:
        raise OverBudgetError(over)
    return plan_passes(size, card, manifest.pooled, memory, beside)


def plan_bands(
    size: tuple[int, int],
    card: ModelCard,
    stages: tuple[Stage, ...],
    manifest: Manifest | None,
    memory: float,
    most: float,
    beside: Beside = NOTHING_BESIDE,
    fine: bool = True,
) -> Plan:
    """Plan one image that is read by regions, within `memory` and, but for rows that its reader keeps, within `most`.

    Where there is room for these beside, the tiles are those of an image of which none are kept. Other arguments and
    errors as of plan_engine.
    """
    kept, plain = beside.kept, beside.kept.without_rows
    if plain != kept and memory > most:
        plan = plan_engine(size, card, stages, manifest, most, replace(beside, kept=plain), fine)
        firsts = [grids[0] for grids in (*plan.passes, plan.grids) if grids]
        sides = [np.array(grid.largest, float) for grid in firsts]
        rows_kept = max((float(kept.rows_taken(rows, plan.padded[0])) for rows, _ in sides), default=0.0)
        if plan.bytes + rows_kept <= memory:
            return replace(plan, bytes=plan.bytes + int(rows_kept))
    return plan_engine(size, card, stages, manifest, min(memory, most), beside, fine)


def check_result(size: tuple[int, int], result: int, memory: float) -> None:
    """Raise OverBudgetError where the bytes of a result are more than the memory budget."""
    if result > memory:
        raise OverBudgetError(
            f"the result of an image of {size[0]}×{size[1]} pixels takes {_gb(result)}, over the memory budget of "
            f"{_gb(memory)}; take it a few rows at a time by bands(), or raise the budget with memory= (--memory)"
        )


def _whole(padded: tuple[int, int], stages: Sequence[Stage]) -> int:
    """Bytes that all stages take for a whole image: backends keep what each once took."""
    return int(sum(stage.working_memory(math.prod(padded)) for stage in stages))


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _overhead(stages: Sequence[Stage], grids: Sequence[Grid]) -> float:
    work = sum(stage.cost * grid.overhead for stage, grid in zip(stages, grids, strict=True))
    return work / sum(stage.cost for stage in stages)

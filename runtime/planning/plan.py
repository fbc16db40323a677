"""From an image's size to how it is run: whole, or each stage in tiles, under a memory budget."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..engine_format.manifest import Manifest, Profile
from ..engine_format.model_card import ModelCard
from ..engine_format.pooled import Pooled
from ..engine_format.stage import Stage
from ..errors import OverBudgetError
from ..pixels.prepare import padded_size
from .grid import Grid, grid_of, lengths_of
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
    result: int = 0,
    kept: KeptRows = NOTHING_KEPT,
    making: float = 0.0,
    copied: int = 0,
) -> Plan:
    """Plan one image of `size` (height, width) within `memory` bytes: whole where that suffices, else in tiles.

    Each stage has tiles of its own shape, chosen together: the least work whose memory is in the budget. Memory is that
    of every stage's largest run, as backends keep what they once took, of the rows between them, and of the result. A
    stage with a `tile` is run in tiles of at most that, which are faster, whatever the memory.

    Args:
        result: bytes of what is given back, where that is more than labels.
        kept: by the image's reader.
        making: bytes of each pixel that results are made in, some rows at a time.
        copied: bytes of copies of the image that are made where it is run whole.

    Raises:
        OverBudgetError: not even the smallest tiles fit, or the network cannot be tiled.
    """
    check_result(size, result, memory)
    plan = plan_unbounded(size, card, tuple(stages))
    beside = result if plan.grids else result + copied
    if plan.bytes + beside + made_at_once(math.prod(size), making) > memory:
        return _cheapest_within(size, card, stages, memory, result, kept, making, copied=copied)
    return replace(plan, bytes=plan.bytes + beside, result=result) if beside else plan


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
    result: int = 0,
    kept: KeptRows = NOTHING_KEPT,
    making: float = 0.0,
    arena: float | None = None,
    seen: tuple[int, int] | None = None,
    copied: int = 0,
) -> Plan:
    """The plan of the least work in tiles that take at most `memory` bytes. Raises OverBudgetError.

    Args:
        arena: bytes of it for the runs of all stages, one after the other; None: each stage has what its own take.
        seen: (height, width) that the network looks at; None: those of the padded image.
        copied: as of plan_run, for what is said.
    """
    padded, stages = seen or padded_size(*size, card), stages_in_tiles(card, stages)
    needed = _whole(padded, stages) + result + copied + float(made_at_once(math.prod(size), making))
    cost, taken, grids = _worth_a_look(padded, card, stages, result, kept, making, arena)
    fitting = np.flatnonzero(taken <= memory)
    if not len(fitting):
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
    return Plan(size, padded, int(taken[chosen]), grids=grids[chosen], overhead=overhead, result=result)


@lru_cache(maxsize=4)  # as builders ask for several budgets, one after the other
def _worth_a_look(
    padded: tuple[int, int],
    card: ModelCard,
    stages: tuple[Stage, ...],
    result: int,
    kept: KeptRows,
    making: float,
    arena: float | None,
) -> tuple[Numbers, Numbers, list[tuple[Grid, ...]]]:
    """Work, bytes and grids of the tiles that no others beat in both; infinite bytes where there are none."""
    cost, taken = np.zeros(1), np.full(1, float(result) + (arena or 0))
    grids: list[tuple[Grid, ...]] = [()]
    pixel: float = card.channels * np.dtype(card.dtype).itemsize
    last = len(stages) - 1
    for index, stage in enumerate(stages):
        rows = kept if index == 0 else KeptRows(padded[1] * pixel)
        more, further, options = tile_options(
            stage, padded, card, pixel, rows, making if index == last else None, arena
        )
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
    result: int = 0,
    kept: KeptRows = NOTHING_KEPT,
    making: float = 0.0,
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
            found = _cheapest_within(size, free, stages, memory - weights, result, kept, making, arena)
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
    result: int = 0,
    kept: KeptRows = NOTHING_KEPT,
    making: float = 0.0,
) -> Plan:
    """Plan one image of a network that pools over the whole image: passes for its pooled values, then its scores.

    Each is run in tiles of its own, and gives its memory back before the next. Arguments and errors as of plan_run.
    """
    check_result(size, result, memory)
    free = pooled.card(replace(card, whole=""))
    seen = pooled.padded(size, padded_size(*size, card))
    plans = [_cheapest_within(size, free, chain, memory, result, kept, making, seen=seen) for chain in pooled.chains]
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
    result: int = 0,
    kept: KeptRows = NOTHING_KEPT,
    making: float = 0.0,
    fine: bool = True,
    copied: int = 0,
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
        plan = plan_run(size, card, stages, memory, result, kept, making, copied)
    except OverBudgetError as error:
        if manifest is None:
            raise
        over = str(error)  # itself it would keep the frames of all callers, and their arrays, for as long as it is kept
    # Tiles that fit the caches are of the stages that they were measured with.
    whole = plan is not None and plan.grids == plan_unbounded(size, card, stages).grids
    much = plan is None or plan.overhead > WORK_WORTH_A_PLAN
    if fine and not whole and much and manifest is not None and manifest.fine:
        weights = sum(manifest.members[stage.file]["bytes"] for stage in manifest.stages)
        other = plan_fine(size, card, manifest.fine, memory, WEIGHTS_OPENED * weights, result, kept, making)
        if other is not None and (plan is None or other.overhead < plan.overhead):
            return other
    if plan is not None:
        return plan
    if manifest is None or manifest.pooled is None:
        raise OverBudgetError(over)
    return plan_passes(size, card, manifest.pooled, memory, result, kept, making)


def plan_bands(
    size: tuple[int, int],
    card: ModelCard,
    stages: tuple[Stage, ...],
    manifest: Manifest | None,
    memory: float,
    most: float,
    kept: KeptRows = NOTHING_KEPT,
    making: float = 0.0,
    fine: bool = True,
) -> Plan:
    """Plan one image that is read by regions, within `memory` and, but for rows that its reader keeps, within `most`.

    Where there is room for these beside, the tiles are those of an image of which none are kept. Other arguments and
    errors as of plan_engine.
    """
    plain = kept.without_rows
    if plain != kept and memory > most:
        plan = plan_engine(size, card, stages, manifest, most, 0, plain, making, fine)
        firsts = [grids[0] for grids in (*plan.passes, plan.grids) if grids]
        sides = [np.array(grid.largest, float) for grid in firsts]
        beside = max((float(kept.rows_taken(rows, plan.padded[0])) for rows, _ in sides), default=0.0)
        if plan.bytes + beside <= memory:
            return replace(plan, bytes=plan.bytes + int(beside))
    return plan_engine(size, card, stages, manifest, min(memory, most), 0, kept, making, fine)


def check_result(size: tuple[int, int], result: int, memory: float) -> None:
    """Raise OverBudgetError where the bytes of a result are more than the memory budget."""
    if result > memory:
        raise OverBudgetError(
            f"the result of an image of {size[0]}×{size[1]} pixels takes {_gb(result)}, over the memory budget of "
            f"{_gb(memory)}; take it a few rows at a time by bands(), or raise the budget with memory= (--memory)"
        )


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


def _whole(padded: tuple[int, int], stages: Sequence[Stage]) -> int:
    """Bytes that all stages take for a whole image: backends keep what each once took."""
    return int(sum(stage.working_memory(math.prod(padded)) for stage in stages))


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _overhead(stages: Sequence[Stage], grids: Sequence[Grid]) -> float:
    work = sum(stage.cost * grid.overhead for stage, grid in zip(stages, grids, strict=True))
    return work / sum(stage.cost for stage in stages)


def available_memory() -> int:
    """Bytes that can be allocated now without swapping, also inside a container whose limit is set by cgroup v2."""
    limits = [int(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            # What was read from files is counted as used, and given back when it is needed.
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            limits.append(int(limit) - used)
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup: physical memory is the bound
    return max(0, min(limits))

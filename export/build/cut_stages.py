"""The core as stages: cut where its features are small, so that the tiles of each need a halo of their own alone.

Early layers take the memory and see little of the image around a pixel; late layers the reverse.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.analysis.receptive_fields import Field, WholeImageError
from fcn_deploy.export.build.config import DEFAULT_STAGES
from fcn_deploy.export.build.cutting_places import CuttingPlaces, Place
from fcn_deploy.export.build.working_memory import measure_tensors, working_memory
from fcn_deploy.export.passes.mean_in_steps import mean_in_steps
from fcn_deploy.export.tolerances import REORDERED_SUMS
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.errors import OverBudgetError
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import padded_size, prepare
from fcn_deploy.runtime.planning.grid import Grid
from fcn_deploy.runtime.planning.plan import plan_run, stages_in_tiles
from onnx import ModelProto, NodeProto

# The cut is the best on average for this image and these bytes.
REFERENCE_SIZE, REFERENCE_BUDGETS = (4096, 4096), (1e8, 2e8, 5e8, 2e9)
VALUE_COST = 10  # multiplications in whose time a value is read or written, about (measured by stages, 2 cores)
CUT_WORTH = 0.95  # a cut is made where it leaves so much of the work at most


@dataclass(frozen=True)
class Part:
    """A stage and its network."""

    stage: Stage
    model: ModelProto


def members_of(parts: Sequence[Part]) -> dict[str, bytes]:
    """The parts as members of an engine file: name → content."""
    return {part.stage.file: mean_in_steps(part.model).model.SerializeToString() for part in parts}


def cut_core(core: ModelProto, card: ModelCard, most: int = DEFAULT_STAGES, packed: bool = True) -> tuple[Part, ...]:
    """The core as stages, each with what tells how it is tiled.

    Receptive fields are computed on the graph and tried on strips of an image. A stage whose tiles cannot be exact says
    why, and is run whole.

    Args:
        core: `image` → `scores`, float32 or with Q/DQ.
        card: of the model.
        most: stages that there may be; fewer where another cut is not worth it.
        packed: whether it may be cut where several maps cross, which whole images pay for.
    """
    tensors = measure_tensors(core, padded_size(256, 256, card)[0])
    whole = (_part(core, card, tensors),)
    parts = _cut(core, card, tensors, most, packed) if most > 1 else whole
    tried = _checked_on_strips(parts, card)
    if len(parts) > 1 and any(ours.stage.halo != theirs.stage.halo for ours, theirs in zip(tried, parts, strict=True)):
        return _checked_on_strips(whole, card)
    return tried


def _cut(
    core: ModelProto, card: ModelCard, tensors: dict[str, np.ndarray], most: int, packed: bool
) -> tuple[Part, ...]:
    """The core cut at one place after the other, each the best beside those before it, as long as that is worth it."""
    between = CuttingPlaces(core, card, tensors, lambda node: work_of(node, tensors), packed)

    known = _known_stages(hashlib.blake2b(core.SerializeToString(deterministic=True)).digest(), card)

    def part(start: Place | None, stop: Place | None) -> Part:
        return _part(core if start is stop else between.network(start, stop), card, tensors, start)

    def stage(start: Place | None, stop: Place | None) -> Stage:
        if (start, stop) not in known:
            known[start, stop] = part(start, stop).stage
        return known[start, stop]

    def stages_of(places: tuple[Place, ...]) -> tuple[Stage, ...]:
        return tuple(stage(*ends) for ends in _ends(places))

    chosen: tuple[Place, ...] = ()
    cost = _cost(stages_of(()), card)
    while len(chosen) + 1 < most:
        more = [
            tuple(sorted((*chosen, place), key=lambda each: each.position))
            for place in between.candidates
            if place not in chosen
        ]
        # What is before a cut must be tiled, or nothing is gained.
        tiled = [places for places in more if all(each.halo is not None for each in stages_of(places)[:-1])]
        costs = {places: _cost(stages_of(places), card) for places in tiled}
        if not costs or min(costs.values()) > CUT_WORTH * cost:
            break
        chosen = min(costs, key=costs.__getitem__)
        cost = costs[chosen]
    parts = (part(*ends) for ends in _ends(chosen))
    return tuple(
        replace(each, stage=replace(each.stage, file=f"stage-{index}.onnx")) for index, each in enumerate(parts)
    )


@lru_cache(maxsize=8)  # builders cut a core several times, for whole images and for tiles alone
def _known_stages(core: bytes, card: ModelCard) -> dict[tuple[Place | None, Place | None], Stage]:
    """Of the core of a digest: what lies between two places, once it was asked for; without networks and weights."""
    return {}


def _ends(places: tuple[Place, ...]) -> Iterable[tuple[Place | None, Place | None]]:
    """What is between places, the first from the image and the last to the scores."""
    return pairwise((None, *places, None))


@lru_cache(maxsize=512)
def _cost(stages: tuple[Stage, ...], card: ModelCard) -> float:
    """Mean work of the reference images, over that without tiles; one that cannot be had counts as ten."""
    costs = []
    for budget in REFERENCE_BUDGETS:
        try:
            costs.append(plan_run(REFERENCE_SIZE, card, stages, int(budget)).overhead)
        except OverBudgetError:
            costs.append(10.0)
    return float(np.mean(costs))


def _part(model: ModelProto, card: ModelCard, tensors: Mapping[str, np.ndarray], start: Place | None = None) -> Part:
    """A part of the core that begins behind a cut; None: with the image."""
    image, result = model.graph.input[0].name, model.graph.output[0].name
    area = tensors["image"].shape[2] * tensors["image"].shape[3]
    stage = Stage(
        "stage-0.onnx",
        image,
        result,
        bytes_per_pixel=working_memory(model, tensors) / area,
        output_bytes=tensors[result].nbytes / area,
        cost=sum(work_of(node, tensors) for node in model.graph.node) / area,
    )
    cell = Field() if start is None else Field(start.stride, 0, start.stride - 1, start.stride)
    try:
        field = receptive_field(model, (cell, cell), tensors)
    except WholeImageError as error:
        return Part(replace(stage, whole=str(error)), model)
    down, right = (each.stride for each in field.fields)
    if down.denominator != 1 or right.denominator != 1:
        return Part(replace(stage, whole=f"its result has cells of {down} of a pixel"), model)
    unit = math.lcm(field.period, card.size_multiple)
    # A part of the image is padded to the card's multiple; one of features is taken as it is, to whole cells.
    step = unit if start is None else field.period
    above, left = (math.ceil(side / step) * step for side in field.halo)
    return Part(replace(stage, halo=(above, left), period=unit, stride=(int(down), int(right))), model)


def work_of(node: NodeProto, tensors: Mapping[str, np.ndarray]) -> int:
    """Multiplications and additions of a node, and what its values cost to be read and written: by time, roughly."""
    values = sum(tensors[name].size for name in node.output if name in tensors)
    read = tensors[node.input[0]].size if node.input and node.input[0] in tensors else 0
    moved = VALUE_COST * (values + read)
    if node.op_type == "Conv" and node.input[1] in tensors:
        return values * math.prod(tensors[node.input[1]].shape[1:]) + moved
    if node.op_type == "ConvTranspose" and node.input[1] in tensors:
        return tensors[node.input[0]].size * math.prod(tensors[node.input[1]].shape[1:]) + moved
    return moved


def _checked_on_strips(parts: Sequence[Part], card: ModelCard) -> tuple[Part, ...]:
    """The parts, whose tiles were run on strips of an image: those that differ from the whole are not tiled.

    Nor are those of a network that is said to see the whole image, where nothing tells which part does.
    """
    runs = [session(part.model.SerializeToString()) for part in parts]
    tried: list[Part] = []
    for index, part in enumerate(parts):
        stage, feed = part.stage, _features_before(parts[:index], runs[:index], card)
        # Images end where they do, also within a period.
        ends = {0, (stage.period - card.size_multiple) // 2, stage.period - card.size_multiple}
        tries = [(axis, end) for axis in (0, 1) for end in ends if end % card.size_multiple == 0]
        before = tried[-1].stage.stride if tried else (1, 1)
        if stage.halo is not None and not all(
            _tiles_equal_strip(stage, runs[index], feed, before, card, *each) for each in tries
        ):
            stage = replace(stage, halo=None, whole="its tiles were tried, and differ from the whole image")
        tried.append(replace(part, stage=stage))
    stages = stages_in_tiles(card, [part.stage for part in tried])
    return tuple(replace(part, stage=stage) for part, stage in zip(tried, stages, strict=True))


def _features_before(before, runs, card: ModelCard):
    """(height, width) → the input of the stage after `before`, for an image of that size."""

    def feed(size: tuple[int, int]) -> np.ndarray:
        features = prepare(natural_noise(*size, card, seed=0), card)
        for part, run in zip(before, runs, strict=True):
            features = run.run([part.stage.output], {part.stage.input: features})[0]
        return features

    return feed


def _tiles_equal_strip(stage: Stage, run, feed, before: tuple[int, int], card: ModelCard, axis: int, end: int) -> bool:
    """Whether tiles of one unit give the scores of a strip: one in its middle, whose halo ends inside, and the last.

    `before`: pixels of a cell of its input; `end`: those that the strip is shorter than whole units.
    """
    assert stage.halo is not None
    unit, halo, stride, step = stage.period, stage.halo[axis], stage.stride[axis], before[axis]
    least = -(-card.smallest // unit) * unit
    length = max(2 * halo + 3 * unit, least + 2 * unit) - end
    strip = feed((length, unit) if axis == 0 else (unit, length))
    whole = run.run([stage.output], {stage.input: strip})[0]
    if whole.shape[2 + axis] != -(-length // stride):
        return False
    spans = Grid((length,) * 2, (unit,) * 2, (halo,) * 2, card.smallest, unit).spans(axis)
    for span in (spans[1 + halo // unit], spans[-1]):
        part = strip.take(range(span.outer_start // step, -(-span.outer_stop // step)), 2 + axis)
        tile = run.run([stage.output], {stage.input: np.ascontiguousarray(part)})[0]
        if tile.shape[2 + axis] != -(-(span.outer_stop - span.outer_start) // stride):
            return False
        cells, first = -(-(span.stop - span.start) // stride), (span.start - span.outer_start) // stride
        ours = tile.take(range(first, first + cells), 2 + axis).astype(np.float32)
        theirs = whole.take(range(span.start // stride, span.start // stride + cells), 2 + axis).astype(np.float32)
        # Not "difference > tolerance": a NaN must fail.
        if not np.abs(ours - theirs).max() <= REORDERED_SUMS * float(np.ptp(whole.astype(np.float32))):
            return False
    return True

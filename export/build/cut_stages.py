"""The core as stages: cut where its features are small, so that the tiles of each need a halo of their own alone.

Early layers take the memory and see little of the image around a pixel; late layers the reverse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.analysis.receptive_fields import Field, WholeImageError
from fcn_deploy.export.analysis.separators import separators
from fcn_deploy.export.build.working_memory import measure_tensors, working_memory
from fcn_deploy.export.graph.edit import clone, prune
from fcn_deploy.export.tolerances import REORDERED_SUMS
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import OverBudgetError
from fcn_deploy.runtime.manifest import Stage
from fcn_deploy.runtime.model_card import ModelCard
from fcn_deploy.runtime.noise_image import natural_noise
from fcn_deploy.runtime.plan import Grid, plan_run, stages_in_tiles
from fcn_deploy.runtime.prepare import padded_size, prepare
from onnx import ModelProto, NodeProto, helper

# The cut is the best on average for this image and these bytes.
REFERENCE_SIZE, REFERENCE_BUDGETS = (4096, 4096), (1e8, 2e8, 5e8, 2e9)
CUT_CANDIDATES = 10  # feature maps to cut at that are looked at, the smallest
CUT_WORTH = 0.95  # a cut is made where it leaves so much of the work at most


@dataclass(frozen=True)
class Part:
    """A stage and its network."""

    stage: Stage
    model: ModelProto


def members_of(parts: Sequence[Part]) -> dict[str, bytes]:
    """The parts as members of an engine file: name → content."""
    return {part.stage.file: part.model.SerializeToString() for part in parts}


def cut_core(core: ModelProto, card: ModelCard, cut: bool = True) -> tuple[Part, ...]:
    """The core as one stage or two, each with what tells how it is tiled.

    Receptive fields are computed on the graph and tried on strips of an image. A stage whose tiles cannot be exact says
    why, and is run whole.

    Args:
        core: `image` → `scores`, float32 or with Q/DQ.
        card: of the model.
        cut: False: one stage.
    """
    tensors = measure_tensors(core, padded_size(256, 256, card)[0])
    whole: tuple[Part, ...] = (_part(core, card, tensors, (Field(), Field())),)
    costs, found = {"": _cost(whole, card)}, {"": whole}  # by the feature map that is cut at
    places = sorted(separators(core), key=lambda name: tensors[name].nbytes) if cut else []
    for name in places[:CUT_CANDIDATES]:
        if (parts := _parts(core, card, tensors, name)) is not None:
            found[name], costs[name] = parts, _cost(parts, card)
    best = min(costs, key=costs.__getitem__)
    if best and costs[best] <= CUT_WORTH * costs[""]:
        tried = _checked_on_strips(found[best], card)
        if all(ours.stage.halo == theirs.stage.halo for ours, theirs in zip(tried, found[best], strict=True)):
            return tried
    return _checked_on_strips(whole, card)


def _cost(parts: Sequence[Part], card: ModelCard) -> float:
    """Mean work of the reference images, over that without tiles; one that cannot be had counts as ten."""
    costs = []
    for budget in REFERENCE_BUDGETS:
        try:
            costs.append(plan_run(REFERENCE_SIZE, card, [part.stage for part in parts], int(budget)).overhead)
        except OverBudgetError:
            costs.append(10.0)
    return float(np.mean(costs))


def _parts(core: ModelProto, card: ModelCard, tensors, name: str) -> tuple[Part, Part] | None:
    """The core cut at a feature map; None where that cannot be tiled, or is no feature map."""
    tensor = tensors[name]
    if tensor.ndim != 4 or tensor.dtype not in (np.float32, np.uint8, np.int8):
        return None
    kind = helper.np_dtype_to_tensor_dtype(tensor.dtype)
    value = helper.make_tensor_value_info(name, kind, ["N", tensor.shape[1], "h", "w"])
    first, second = clone(core), clone(core)
    del first.graph.output[:], second.graph.input[:]
    first.graph.output.append(value)
    second.graph.input.append(value)
    prune(first)
    made = {result for node in first.graph.node for result in node.output}
    kept = [node for node in second.graph.node if not made & set(node.output)]
    del second.graph.node[:]
    second.graph.node.extend(kept)
    prune(second)
    try:
        fields = receptive_field(first).fields
    except WholeImageError:
        return None
    strides = [field.stride for field in fields]
    if any(stride.denominator != 1 for stride in strides):
        return None
    vertical, horizontal = (Field(stride, Fraction(0), stride - 1, int(stride)) for stride in strides)
    start = vertical, horizontal
    return _part(first, card, tensors, (Field(), Field()), 0), _part(second, card, tensors, start, 1)


def _part(model: ModelProto, card: ModelCard, tensors, start: tuple[Field, Field], index: int = 0) -> Part:
    """A part of the core whose input has the field `start`."""
    image, result = model.graph.input[0].name, model.graph.output[0].name
    area = tensors["image"].shape[2] * tensors["image"].shape[3]
    stage = Stage(
        f"stage-{index}.onnx",
        image,
        result,
        bytes_per_pixel=working_memory(model, tensors) / area,
        output_bytes=tensors[result].nbytes / area,
        cost=sum(work_of(node, tensors) for node in model.graph.node) / area,
    )
    try:
        field = receptive_field(model, start)
    except WholeImageError as error:
        return Part(replace(stage, whole=str(error)), model)
    down, right = (each.stride for each in field.fields)
    if down.denominator != 1 or right.denominator != 1:
        return Part(replace(stage, whole=f"its result has cells of {down} of a pixel"), model)
    unit = math.lcm(field.period, card.size_multiple)
    above, left = (math.ceil(side / unit) * unit for side in field.halo)
    return Part(replace(stage, halo=(above, left), period=unit, stride=(int(down), int(right))), model)


def work_of(node: NodeProto, tensors: Mapping[str, np.ndarray]) -> int:
    """Multiplications and additions of a node, roughly; what only moves values counts a few for each."""
    values = sum(tensors[name].size for name in node.output if name in tensors)
    if node.op_type == "Conv" and node.input[1] in tensors:
        return values * math.prod(tensors[node.input[1]].shape[1:])
    if node.op_type == "ConvTranspose" and node.input[1] in tensors:
        return tensors[node.input[0]].size * math.prod(tensors[node.input[1]].shape[1:])
    return 4 * values


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

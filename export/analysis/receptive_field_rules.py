"""How each operator passes receptive fields on: a rule for each family, in RULES; what sees the whole image: GLOBAL."""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from fcn_deploy.export.analysis.followed_node import FollowedNode
from fcn_deploy.export.analysis.receptive_fields import (
    NCHW,
    PLACES,
    STRETCH,
    FeatureMap,
    Field,
    WholeImageError,
)
from fcn_deploy.export.analysis.reshape_shapes import Shape
from fcn_deploy.export.graph.operators import BEYOND, ELEMENTWISE

POINTWISE = ELEMENTWISE | {
    "BatchNormalization", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CastLike", "Cos", "DequantizeLinear",
    "IsInf", "IsNaN", "Mod", "QuantizeLinear", "Shrink", "Sin", "Swish", "Xor",
}  # fmt: skip
REDUCTIONS = frozenset((
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
))  # fmt: skip
# What is sure to look at all of its input, or to carry something from one end of it to the other.
GLOBAL = frozenset((
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GroupNormalization", "InstanceNormalization",
    "MeanVarianceNormalization", "CumSum", "LSTM", "GRU", "RNN", "Attention",
))  # fmt: skip
WEIGHT = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}  # index of its weight among the inputs
# Cells of what is stretched, beside a Resize by the factor of the strides: maps are rounded up, each to its own stride.
STRETCHED = 2
UNCHANGING_COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric")  # whatever the image's size
LARGEST_RATIO = 1024  # denominator of a scale; others are rounded numbers of sizes


def _pointwise(node: FollowedNode) -> FeatureMap:
    found = node.joined_maps()
    if node.operator == "BatchNormalization":
        if found.layout[1] != "C" or node.attributes.get("training_mode"):
            raise WholeImageError(f"{node.name} takes its statistics from the image")
        return found
    for name in node.proto.input:
        shape = node.constants[name].shape if name in node.constants else ()
        if node.operator in ("QuantizeLinear", "DequantizeLinear"):
            if math.prod(shape) > 1:
                node.works_over_channels([node.attributes.get("axis", 1) % found.rank], found.layout)
            continue
        # A constant that differs from place to place ties the network to it.
        if len(shape) > found.rank or any(
            side > 1 and label != "C" for side, label in zip(shape[::-1], found.layout[::-1], strict=False)
        ):
            raise WholeImageError(f"{node.name} has a constant of {list(shape)}, which differs from place to place")
    return found


def _normalised(node: FollowedNode) -> FeatureMap:
    """Softmax and the like over all channels of a place."""
    found = node.joined_maps()
    axis = node.attributes.get("axis", -1) % found.rank
    axes = [axis]
    if node.operator.endswith("Normalization"):
        axes = list(range(axis, found.rank))
    elif node.opset < 13:
        # Everything from the axis on is one, there; the axis is 1 where nothing is said.
        axes = list(range(node.attributes.get("axis", 1) % found.rank, found.rank))
    return _one_over_channels(node, found, axes)


def _one_over_channels(node: FollowedNode, found: FeatureMap, axes: list[int]) -> FeatureMap:
    node.works_over_channels(axes, found.layout)
    if len(node.maps) > 1:
        raise WholeImageError(f"{node.name} takes two feature maps")
    return found


def _chosen(node: FollowedNode) -> FeatureMap:
    """ArgMax, ArgMin, TopK and Split."""
    found = node.joined_maps()
    axes = [node.attributes.get("axis", -1 if node.operator == "TopK" else 0) % found.rank]
    found = _one_over_channels(node, found, axes)
    return found.without(axes) if node.operator[:3] == "Arg" and not node.attributes.get("keepdims", 1) else found


def _concatenated(node: FollowedNode) -> FeatureMap:
    found = node.joined_maps()
    node.works_over_channels([node.attributes.get("axis", 0) % found.rank], found.layout)
    for name in node.proto.input:
        shape = node.constants[name].shape if name in node.constants else ()
        if any(side > 1 for side, label in zip(shape, found.layout, strict=False) if label != "C"):
            raise WholeImageError(f"{node.name} has a constant of {list(shape)}, which is of one size")
    return found


def _reduced(node: FollowedNode) -> FeatureMap:
    found = node.single_map()
    axes = node.numbers("axes", 1)
    if not axes and node.attributes.get("noop_with_empty_axes"):
        return found
    if axes is None or any(found.layout[axis] != "C" for axis in axes):
        raise WholeImageError(node.name)
    return found if node.attributes.get("keepdims", 1) else found.without([axis % found.rank for axis in axes])


def _multiplied(node: FollowedNode) -> FeatureMap:
    """A dense layer at every place, from either side: the channels are the last dimension, or the last but one."""
    found = node.maps[0]
    on_right = node.proto.input[0] in node.constants
    weight = node.constant(0 if on_right else 1)
    if len(node.maps) > 1 or weight is None or weight.ndim != 2:
        raise WholeImageError(node.name)
    node.works_over_channels([found.rank - (2 if on_right else 1)], found.layout)
    return found


def _gathered(node: FollowedNode) -> FeatureMap:
    found, indices = node.single_map(), node.constant(1)
    axis = node.attributes.get("axis", 0) % found.rank
    if indices is None or indices.ndim > 1:
        raise WholeImageError(f"{node.name} chooses by what is computed")
    node.works_over_channels([axis], found.layout)
    return found if indices.ndim else found.without([axis])


def _squeezed(node: FollowedNode) -> FeatureMap:
    found, axes = node.single_map(), node.numbers("axes", 1)
    node.works_over_channels(axes, found.layout)
    return found.without([axis % found.rank for axis in axes or ()])


def _unsqueezed(node: FollowedNode) -> FeatureMap:
    found, axes = node.single_map(), node.numbers("axes", 1)
    if axes is None:
        raise WholeImageError(f"{node.name} takes axes that are computed")
    rank, labels = found.rank + len(axes), iter(found.layout)
    new = {axis % rank for axis in axes}
    return FeatureMap(found.fields, tuple("C" if place in new else next(labels) for place in range(rank)))


def _transposed(node: FollowedNode) -> FeatureMap:
    found = node.single_map()
    order = node.attributes.get("perm", range(found.rank)[::-1])
    return FeatureMap(found.fields, tuple(found.layout[axis] for axis in order))


def _sliced(node: FollowedNode) -> FeatureMap:
    found = node.single_map()
    if len(node.proto.input) < 3:
        raise WholeImageError(f"{node.name} is of an opset before 10")
    starts, ends, axes, steps = (node.constant(place) for place in (1, 2, 3, 4))
    if starts is not None and ends is None and not starts.any() and not node.has_input(4):
        return _cropped(node, found, axes)
    if starts is None or ends is None:
        raise WholeImageError(f"{node.name} cuts at places that are computed")
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        label = found.layout[int(axis) % found.rank]
        if label == "C":
            continue
        # To the end of the map, or so many cells before it: an end that is counted from the start is of one size.
        if label == "N" or start < 0 or step < 1 or 0 <= end < BEYOND:
            raise WholeImageError(f"{node.name} cuts at places that belong to one size")
        found = found.read_by(label, int(step), int(start), int(start))
    return found


def _cropped(node: FollowedNode, found: FeatureMap, axes: np.ndarray | None) -> FeatureMap:
    """To the sides of another map of its stride: a cell is left where that has one too."""
    ends = node.sides.of(node.proto.input[2])
    if ends is None or axes is None:
        raise WholeImageError(f"{node.name} cuts at places that are computed")
    for axis, (other, other_axis) in zip(axes, ends, strict=True):
        place = found.layout[int(axis) % found.rank]
        if place not in PLACES or other.layout[other_axis] != place:
            raise WholeImageError(f"{node.name} cuts at places that are computed")
        ours, theirs = (list(each.fields) for each in (found, other))
        at = PLACES.index(place)
        if ours[at].stride != theirs[at].stride:
            raise WholeImageError(f"{node.name} cuts to the side of a map of another stride")
        ours[at] = ours[at].joined(theirs[at])
        found = FeatureMap((ours[0], ours[1]), found.layout)
    return found


def _windowed(node: FollowedNode) -> FeatureMap:
    """Conv and pooling."""
    given, found = node.attributes, node.single_map(NCHW)
    kernel = given.get("kernel_shape")
    if kernel is None and node.operator in WEIGHT and (weight := node.constant(WEIGHT[node.operator])) is not None:
        kernel = weight.shape[2:]
    if kernel is None or len(kernel) != 2:
        raise WholeImageError(f"{node.name} has no kernel of a known size")
    for axis, place in enumerate(PLACES):
        step, dilation = (given.get(name, (1, 1))[axis] for name in ("strides", "dilations"))
        reach = (kernel[axis] - 1) * dilation
        if (auto := given.get("auto_pad", "NOTSET")) in ("SAME_UPPER", "SAME_LOWER"):
            # It differs with what is left of the map after whole steps; at multiples of them it is that of `step`.
            totals = [max(reach + 1 - left, 0) for left in range(1, step + 1)]
            before = [total // 2 if auto == "SAME_UPPER" else total - total // 2 for total in totals]
        else:
            before = [0 if auto == "VALID" else given.get("pads", (0, 0, 0, 0))[axis]]
        found = found.read_by(place, step, -max(before), reach - min(before))
    return found


def _deconvolved(node: FollowedNode) -> FeatureMap:
    given, found, weight = node.attributes, node.single_map(NCHW), node.constant(1)
    if weight is None or weight.ndim != 4 or given.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in given:
        raise WholeImageError(f"{node.name} has no padding or kernel of a known size")
    for axis, place in enumerate(PLACES):
        step, dilation = (given.get(name, (1, 1))[axis] for name in ("strides", "dilations"))
        before, reach = given.get("pads", (0, 0, 0, 0))[axis], (weight.shape[2 + axis] - 1) * dilation
        # Output j reads input i where 0 ≤ j + before - step·i ≤ reach.
        found = found.read_by(place, Fraction(1, step), Fraction(before - reach, step), Fraction(before, step))
    return found


def _resized(node: FollowedNode) -> FeatureMap:
    given, found, old = node.attributes, node.single_map(), node.operator == "Upsample"
    scales = node.constant(1 if old else 2)
    axes = [int(axis) % found.rank for axis in given.get("axes", range(found.rank))]
    if scales is None or scales.size != len(axes):
        raise WholeImageError(f"{node.name} goes to a size that is computed, not by a constant factor")
    coordinates = "asymmetric" if old else given.get("coordinate_transformation_mode", "half_pixel")
    if coordinates not in UNCHANGING_COORDINATES or given.get("antialias"):
        raise WholeImageError(f"{node.name} has the coordinates {coordinates}, which depend on the image's size")
    shift = Fraction(0) if coordinates == "asymmetric" else Fraction(1, 2)
    for axis, scale in zip(axes, scales, strict=True):
        place, factor = found.layout[axis], Fraction(float(scale)).limit_denominator(LARGEST_RATIO)
        if factor == 1:
            continue
        if place not in PLACES:
            raise WholeImageError(f"{node.name} resizes channels")
        offsets = _interpolation_offsets(factor, shift, given.get("mode", "nearest"))
        found = found.read_by(place, 1 / factor, min(offsets), max(offsets))
    return found


def _stretched(node: FollowedNode) -> FeatureMap:
    """A Resize to the size of another map: near where one by the factor of their strides reads."""
    found, given = node.single_map(NCHW), node.attributes
    for axis, place in enumerate(PLACES):
        step = Fraction(given["stride"][axis], given["source"][axis])
        reach = max(1, math.ceil(step)) * STRETCHED + (given["short"][axis] != given["source_short"][axis])
        found = found.read_by(place, step, -reach - 1, reach + 1)
    return found


def spread_grid(given: Mapping[str, Any]) -> FeatureMap:
    """What a Stretch makes of a grid of pooled values: its cells depend on no pixels beyond their own."""
    down, right = (Field(Fraction(side), Fraction(0), Fraction(side - 1), side) for side in given["stride"])
    return FeatureMap((down, right))


def _interpolation_offsets(factor: Fraction, shift: Fraction, mode: str) -> list[Fraction]:
    """How far from its own place, in cells of the input, a cell of a resized map reads, for every phase."""
    offsets = []
    for phase in range(factor.numerator):  # after which the pattern repeats
        x = (phase + shift) / factor - shift
        nearest = (math.floor(x), math.ceil(x)) if mode == "nearest" else (math.floor(x), math.floor(x) + 1)
        reach = 1 if mode == "cubic" else 0
        offsets += [cell - phase / factor for cell in (nearest[0] - reach, nearest[1] + reach)]
    return offsets


def _padded(node: FollowedNode) -> FeatureMap:
    found, pads, mode = node.single_map(), node.numbers("pads", 1), node.attributes.get("mode", "constant")
    axes: Sequence[int] | None = range(found.rank)
    if node.has_input(3):
        given = node.constant(3)
        axes = None if given is None else [int(axis) % found.rank for axis in given]
    if pads is None or axes is None or len(pads) != 2 * len(axes) or mode == "wrap":
        raise WholeImageError(f"{node.name} pads by what is computed")
    for index, axis in enumerate(axes):
        before, after, place = pads[index], pads[len(axes) + index], found.layout[axis]
        if place == "C" or before == after == 0:
            continue
        if place == "N":
            raise WholeImageError(f"{node.name} pads the batch")
        # A cell beyond a border is one at it (edge), or as far inside as it is outside (reflect).
        reach = max(before, after, 0) * {"constant": 0, "edge": 1}.get(mode, 2)
        found = found.read_by(place, 1, -before - reach, -before + reach)
    return found


def _depth_to_space(node: FollowedNode) -> FeatureMap:
    found, block = node.single_map(NCHW), node.attributes["blocksize"]
    for place in PLACES:
        found = found.read_by(place, Fraction(1, block), Fraction(1 - block, block), 0)
    return found


def _space_to_depth(node: FollowedNode) -> FeatureMap:
    found, block = node.single_map(NCHW), node.attributes["blocksize"]
    for place in PLACES:
        found = found.read_by(place, block, 0, block - 1)
    return found


def _reshaped(node: FollowedNode) -> FeatureMap:
    """Channels divided or joined (a shuffle), or places divided into blocks or joined from them (a pixel shuffle).

    Which dimensions go where is seen from the shapes at two sizes: what belongs to the size differs in them.
    """
    found = node.maps[0]
    try:
        (before, after), (before_too, after_too) = node.shapes.at_two_sizes(node.proto, node.unit)
    except ValueError as error:
        raise WholeImageError(f"{node.name} goes to a shape that cannot be followed: {error}") from error
    refusal = WholeImageError(f"{node.name} mixes places, or goes to a shape of one size")
    if found.layout[0] != "N" or after[0] != 1 or len(after) != len(after_too):
        raise refusal
    inside, outside = _more_than_one(before, before_too), _more_than_one(after, after_too)
    pieces = _pieces([before[axis] for axis in inside], [after[axis] for axis in outside])
    if pieces is None or pieces != _pieces(
        [before_too[axis] for axis in inside], [after_too[axis] for axis in outside]
    ):
        raise refusal
    layout = ["N"] + ["C"] * (len(after) - 1)
    for left, right in pieces:
        old, new = [inside[index] for index in left], [outside[index] for index in right]
        labels = [found.layout[axis] for axis in old]
        if all(label == "C" for label in labels):
            continue
        if labels[0] not in PLACES or any(label != "C" for label in labels[1:]):
            raise refusal
        sides, sides_after, sides_too = (
            [shape[axis] for axis in axes] for shape, axes in ((before, old), (after, new), (after_too, new))
        )
        if len(new) > 1 and (len(old) > 1 or math.prod(sides_after[1:]) != math.prod(sides_too[1:])):
            raise refusal
        found = _regrouped(found, labels[0], math.prod(sides[1:]), math.prod(sides_after[1:]))
        layout[new[0]] = labels[0]
    return FeatureMap(found.fields, tuple(layout))


def _more_than_one(shape: Shape, shape_too: Shape) -> list[int]:
    """The axes but the first that are not of 1, which go anywhere."""
    return [axis for axis in range(1, len(shape)) if (shape[axis], shape_too[axis]) != (1, 1)]


def _regrouped(found: FeatureMap, place: str, joined: int, divided: int) -> FeatureMap:
    """The map where so many blocks of channels become places, or places become blocks of so many channels."""
    if joined > 1:
        return found.read_by(place, Fraction(1, joined), Fraction(1 - joined, joined), 0)
    return found.read_by(place, divided, 0, divided - 1) if divided > 1 else found


def _pieces(before: Sequence[int], after: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """The least runs of dimensions that hold as many values before and after; None where they are not all in one."""
    pieces, left, right = [], 0, 0
    while left < len(before) and right < len(after):
        ours, theirs, first, second = before[left], after[right], left, right
        left, right = left + 1, right + 1
        while ours != theirs:
            if ours < theirs and left < len(before):
                ours, left = ours * before[left], left + 1
            elif theirs < ours and right < len(after):
                theirs, right = theirs * after[right], right + 1
            else:
                return None
        pieces.append((tuple(range(first, left)), tuple(range(second, right))))
    return pieces if (left, right) == (len(before), len(after)) else None


RULES: dict[str, Callable[[FollowedNode], FeatureMap]] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(("ArgMax", "ArgMin", "Split", "TopK"), _chosen),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization"), _normalised),
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool"), _windowed),
    **dict.fromkeys(("Resize", "Upsample"), _resized),
    **dict.fromkeys(("Reshape", "Flatten"), _reshaped),
    "Concat": _concatenated,
    "ConvTranspose": _deconvolved,
    "DepthToSpace": _depth_to_space,
    "Gather": _gathered,
    "LRN": lambda node: node.single_map(NCHW),
    "MatMul": _multiplied,
    "Pad": _padded,
    "Slice": _sliced,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeezed,
    STRETCH: _stretched,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}

"""Resize, and MaxUnpool with the size of its output: to a share of the input's size, or to the size of another map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, Rewrite, candidates
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import (
    SampledSize,
    Shape,
    axis_of,
    axis_sizes,
    changes_with,
    describe,
    is_fixed,
    multiplied,
    scaled,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, input_of, integers
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


@dataclass(frozen=True)
class _Target:
    """Where a node resizes to, as its numbers stand.

    Attributes:
        axes: that it resizes.
        sizes: that these come to.
        factors: by which each grows, for each sample; None: the node names sizes.
    """

    axes: list[int]
    sizes: list[SampledSize]
    factors: list[list[float]] | None = None


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    shape = state.shape(node.input[0])
    target = _target(node, state, shape)
    if target is None:
        return None
    before = axis_sizes(shape)
    options = [_options(node, state, before, target, index, len(shape)) for index in range(len(target.axes))]
    found = []
    for picked in product(*options):
        sizes = [size for size, _ in picked]
        after = list(before)
        for place, size in zip(target.axes, sizes, strict=True):
            after[place] = size
        cost = max([cost for _, cost in picked], default=0)
        letters = "".join(changes_with(size) for size in after if changes_with(size) in ("H", "W"))
        # Of two sides that may be meant as they are, either both are or none.
        stays = {
            size == wanted for size, wanted, some in zip(sizes, target.sizes, options, strict=True) if len(some) > 1
        }
        if letters == "WH" or len(stays) > 1:
            cost = max(cost, 2)
        result = tuple(
            factors if multiplied(factors) == size else axis_of(size)
            for factors, size in zip(shape, after, strict=True)
        )
        shapes = {node.output[0]: result}
        if sizes == target.sizes:
            said = "to the size it names, at any size of the image"
            found.append(Interpretation(shapes, cost, description=said))
            continue
        traced = state.graph.traced
        said = "to any batch"
        if traced:
            said = f"{_in_words(node, state, before, after, target)} instead of "
            said += " by ".join(str(size[0]) for size in target.sizes[-2:])
        found.append(Interpretation(shapes, cost, _rewrite(node, before, after, target, traced), said))
    return found


def _target(node: NodeProto, state: State, shape: Shape) -> _Target | None:
    """None where nothing but what the node says can be meant."""
    settings, unpool = attributes(node), node.op_type == "MaxUnpool"
    if settings.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    axes = [place % len(shape) for place in settings.get("axes", range(len(shape)))]
    sizes = integers(node, state, "sizes", 2 if unpool else 3)
    if sizes:
        return _Target(axes, sizes)
    if unpool:
        return None
    values = state.values_of(input_of(node, 2))
    if values is None:
        raise ConflictError(node, "its scales are computed from the image's pixels")
    factors = [[float(array[place]) for array in values] for place in range(len(axes))]
    before = axis_sizes(shape)
    scaled_sizes = [
        tuple(math.floor(side * factor + 1e-6) for side, factor in zip(before[place], scale, strict=True))
        for place, scale in zip(axes, factors, strict=True)
    ]
    return _Target(axes, scaled_sizes, factors)


def _options(
    node: NodeProto, state: State, before: Sequence[SampledSize], target: _Target, index: int, rank: int
) -> list[tuple[SampledSize, int]]:
    """What one of the resized axes can come to, each with its cost."""
    place, wanted = target.axes[index], target.sizes[index]
    size, number = before[place], wanted[0]
    factors = None if target.factors is None else target.factors[index]
    if not is_fixed(wanted) and (factors is None or len(set(factors)) > 1 or _is_simple(factors[0])):
        return [(wanted, 0)]
    if (
        factors is not None
        and state.graph.traced
        and is_fixed(size)
        and number > size[0] > 1
        and len(set(factors)) == 1
    ):
        # By scales, its input was a share of the image; a grid that pooling fixed is of one cell, or was refused.
        raise ConflictError(node, _what_holds(node, state, size[0], place))
    if number == size[0] and (is_fixed(size) or (place < rank - 2 and changes_with(size) == "N")):
        return [(size, 0)]
    # Numbers as they are: rarely meant where a map grows by a whole factor, as well as anything elsewhere.
    stays = 1 if changes_with(size) and number % size[0] == 0 else 0
    return [*((other, 0) for other in candidates(state, size, number)), (wanted, stays)]


def _what_holds(node: NodeProto, state: State, side: int, place: int) -> str:
    """That the map a Resize by scales reads does not follow the image, and what stopped it, in words."""
    text = f"it enlarges, by a number, a map that has {side} cells at every size of the image"
    for index in sorted(state.graph.ancestors[state.graph.place[node.output[0]]]):
        other = state.graph.nodes[index]
        name = other.output[0]
        if state.is_data(name) and other.input and state.is_data(other.input[0]):
            before, after = (axis_sizes(state.shape(each)) for each in (other.input[0], name))
            if len(before) == len(after) > place and not is_fixed(before[place]) and is_fixed(after[place]):
                return f"{text}, from {other.op_type} {other.name or name} on"
    return text


def _is_simple(factor: float) -> bool:
    """Whether a scale is one that people write."""
    ratio = Fraction(factor).limit_denominator(64)
    return abs(float(ratio) - factor) < 1e-6 and (ratio.denominator <= 4 or ratio.numerator == 1)


def _whole_factors(before: Sequence[SampledSize], after: Sequence[SampledSize]) -> list[int] | None:
    """By which whole numbers sizes grow, at all sizes of the image; None: by others."""
    factors = [new[0] // old[0] for old, new in zip(before, after, strict=True)]
    grown = [scaled(old, factor, 1) for old, factor in zip(before, factors, strict=True)]
    return factors if grown == list(after) else None


def _in_words(
    node: NodeProto, state: State, before: Sequence[SampledSize], after: Sequence[SampledSize], target: _Target
) -> str:
    factors = None if node.op_type == "MaxUnpool" else _whole_factors(before, after)
    if factors is None:
        return "to " + " by ".join(describe(after[place], state.image) for place in target.axes[-2:])
    return "to " + " by ".join(str(factors[place]) for place in target.axes[-2:]) + " times its input's size"


def _rewrite(
    node: NodeProto, before: Sequence[SampledSize], after: Sequence[SampledSize], target: _Target, traced: bool
) -> Rewrite:
    unpool = node.op_type == "MaxUnpool"

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        # Sizes that the network computes are right at odd sizes too.
        factors = None if unpool or not traced else _whole_factors(before, after)
        if factors is not None:
            scales = writer.constant("scales", np.array(factors, np.float32))
            return [writer.replaced(node, {1: writer.nothing(), 2: scales}, drop=("axes",), count=3)]
        parts: list[int | str] = []
        for place, size in enumerate(after):
            index = target.axes.index(place) if place in target.axes else None
            if is_fixed(size):
                parts.append(size[0])
            elif index is not None and target.factors is None and size == target.sizes[index]:  # computed already
                parts.append(writer.element(node.input[2 if unpool else 3], index))
            else:
                parts.append(writer.size(size, node))
        sizes = writer.concat(parts)
        if unpool:
            return [writer.replaced(node, {2: sizes})]
        return [writer.replaced(node, {1: writer.nothing(), 2: writer.nothing(), 3: sizes}, drop=("axes",))]

    return rewrite

"""Slice: from and to places that are shares of the map, sizes of other maps, or so far from its end."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import numpy as np
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, Rewrite, candidates, coarsest, map_sizes
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import (
    SampledSize,
    Shape,
    added,
    axis_of,
    axis_sizes,
    changes_with,
    describe,
    fixed,
    is_fixed,
    scaled,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import (
    ConflictError,
    State,
    axes_of,
    integers,
    needed_integers,
)
from fcn_deploy.export.graph.operators import BEYOND
from onnx import NodeProto

TO_THE_END = np.iinfo(np.int64).max
WIDE_BORDER = 8  # cells that are cut off at every size only where more are left
LARGE_SHARE = 4  # largest denominator of a share of a map that a number is hardly by chance


@dataclass(frozen=True)
class _Span:
    """From where to where a Slice goes along an axis, and the cost of taking its numbers so."""

    start: SampledSize
    end: SampledSize
    cost: int


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    shape = state.shape(node.input[0])
    starts, ends = needed_integers(node, state, "starts", 1), needed_integers(node, state, "ends", 2)
    axes = axes_of(node, state, 3, len(shape)) or list(range(len(starts)))
    steps = integers(node, state, "steps", 4) or [fixed(1)] * len(starts)
    before = axis_sizes(shape)
    options = [
        [_Span(start, end, 0)]
        if is_fixed(before[place]) or step[0] < 0
        else list(_spans(state, before[place], start[0], end[0]))
        if is_fixed(start) and is_fixed(end)
        else list(_half_computed(state, before[place], start, end))
        for place, start, end, step in zip(axes, starts, ends, steps, strict=True)
    ]
    multiple = math.lcm(1, *(_of_no_crop(state, before[place], end) for place, end in zip(axes, ends, strict=True)))
    found = []
    for picked in product(*options):
        after = _sliced(node, shape, axes, picked, steps)
        if after is None:
            continue
        shapes = {node.output[0]: after}
        cost = max((span.cost for span in picked), default=0)
        if all(span.start == start and span.end == end for span, start, end in zip(picked, starts, ends, strict=True)):
            said = "from and to the places it names"
            found.append(Interpretation(shapes, cost, description=said, multiple=multiple))
            continue
        text = " and ".join(
            f"{describe(span.start, state.image)} to "
            f"{'the end' if span.end[0] >= BEYOND else describe(span.end, state.image)}"
            for span in picked
        )
        # What a network pads its images to itself, where the traced one needs none, is in no node.
        guess = any(
            _crops_nothing(state, before[place], end) and span.end[0] >= BEYOND
            for place, end, span in zip(axes, ends, picked, strict=True)
        )
        assumption = (
            f"it crops nothing at the traced size, and its numbers are taken for the end of maps at all multiples of "
            f"{multiple}; images that the network pads to larger multiples, and crops, are another matter"
        )
        found.append(
            Interpretation(
                shapes, cost, _rewrite(node, picked, axes, steps), f"from {text}", multiple=multiple,
                assumption=assumption if guess else "",
            )
        )  # fmt: skip
    return found


def _of_no_crop(state: State, size: SampledSize, end: SampledSize) -> int:
    """What H or W must be a multiple of where a Slice ends, by a number, where the traced map does.

    At other sizes it crops what sums of rounded sizes have beyond, most likely.
    """
    return coarsest(state, changes_with(size)) if _crops_nothing(state, size, end) else 1


def _crops_nothing(state: State, size: SampledSize, end: SampledSize) -> bool:
    """Whether a Slice along H or W ends, by a number, where the traced map does."""
    return state.graph.traced and is_fixed(end) and end[0] == size[0] and changes_with(size) in ("H", "W")


def _sliced(
    node: NodeProto, shape: Shape, axes: Sequence[int], spans: Sequence[_Span], steps: Sequence[SampledSize]
) -> Shape | None:
    """The shape of what is left; None where nothing is. Raises ConflictError where it is read backwards."""
    after = list(shape)
    for place, span, step in zip(axes, spans, steps, strict=True):
        size = axis_sizes(shape)[place]
        if step[0] < 0:
            if span.end[0] > -BEYOND or span.start[0] != -1:
                raise ConflictError(node, "it reads the map backwards from a place of its own")
            continue
        first = tuple(_clipped(number, side) for number, side in zip(span.start, size, strict=True))
        behind = tuple(_clipped(number, side) for number, side in zip(span.end, size, strict=True))
        length = tuple(-(-(b - a) // by) for a, b, by in zip(first, behind, step, strict=True))
        if min(length) < 1:
            return None
        after[place] = after[place] if length == size else axis_of(length)
    return tuple(after)


def _clipped(number: int, side: int) -> int:
    return min(max(number + side if number < 0 else number, 0), side)


def _spans(state: State, size: SampledSize, start: int, end: int) -> Iterator[_Span]:
    """What a Slice's numbers can stand for along an axis that changes with the image."""
    if not state.graph.traced and changes_with(size) != "N":
        yield _Span(fixed(start), fixed(end), 0)
        return
    starts: list[SampledSize] = [fixed(start)]
    if start > 0:
        starts += [other for other in candidates(state, size, start) if other != fixed(start)]
    starts += _from_the_middle(size, start)
    for first in starts:
        if end >= size[0]:
            ends = [fixed(end) if end >= BEYOND else fixed(TO_THE_END)]
        elif end <= 1:
            ends = [fixed(end), *_from_the_middle(size, end)]  # counted from the end, or the first of all
        else:
            ends = candidates(state, size, end)
            if _is_border(size, end):
                ends.append(tuple(side - (size[0] - end) for side in size))
            if start > 0 and end > start:
                ends += [added([length, first]) for length in candidates(state, size, end - start)]
            ends.append(fixed(end))
        for behind in dict.fromkeys(ends):
            # Of most of a map, a number of its own is rarely meant.
            yield _Span(first, behind, 1 if behind == fixed(end) and size[0] / 2 < end < size[0] else 0)


def _is_border(size: SampledSize, end: int) -> bool:
    """Whether what lies beyond a place can be a border, so wide at every size: it is narrow, or less than is left."""
    return size[0] - end < WIDE_BORDER or 2 * end > size[0]


def _from_the_middle(size: SampledSize, number: int) -> list[SampledSize]:
    """Where a number that counts from the end of the traced map is its middle, that; a border of 1 is one anywhere."""
    middle = scaled(size, 1, 2)
    return [middle] if middle is not None and number < -1 and -2 * number == size[0] else []


def _half_computed(state: State, size: SampledSize, start: SampledSize, end: SampledSize) -> Iterator[_Span]:
    """What a Slice can go from or to along an axis where one of both is a number, and the other is computed.

    A large share of the traced map may be meant; fewer cells are a border, as crops have it. Of both computed, the
    middle of the map may be meant, as large as another.
    """
    if middles := list(_middles(state, size, start, end)):
        yield from middles
        yield _Span(start, end, 1)
        return
    for first in (start, *_large_shares(state, size, start)):
        for behind in (end, *_large_shares(state, size, end)):
            yield _Span(first, behind, 0)


def _middles(state: State, size: SampledSize, start: SampledSize, end: SampledSize) -> Iterator[_Span]:
    """Of so many cells in the middle of a map of every size: the middle, as large as other maps are."""
    number = end[0] - start[0]
    middle = all(a == (side - number) // 2 and b == a + number for side, a, b in zip(size, start, end, strict=True))
    if not middle or number < 2 or not state.graph.traced or is_fixed(start):
        return
    for length in map_sizes(state, number, changes_with(size)):
        first = tuple((side - cells) // 2 for side, cells in zip(size, length, strict=True))
        if min(first) >= 0:
            yield _Span(first, added([first, length]), 0)


def _large_shares(state: State, size: SampledSize, number: SampledSize) -> list[SampledSize]:
    """What a number can be that is a half, a third or a quarter of a traced map, or so many of them."""
    traced = state.graph.traced and is_fixed(number) and 1 < number[0] < size[0]
    if not traced or Fraction(number[0], size[0]).denominator > LARGE_SHARE:
        return []
    return [other for other in candidates(state, size, number[0]) if other != number]


def _rewrite(node: NodeProto, spans: Sequence[_Span], axes: Sequence[int], steps: Sequence[SampledSize]) -> Rewrite:
    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        starts, ends = (
            writer.concat([size[0] if is_fixed(size) else writer.size(size, node) for size in sizes])
            for sizes in ([span.start for span in spans], [span.end for span in spans])
        )
        inputs = {1: starts, 2: ends, 3: writer.constant("axes", np.array(axes, np.int64))}
        inputs[4] = writer.constant("steps", np.array([step[0] for step in steps], np.int64))
        return [writer.replaced(node, inputs)]

    return rewrite

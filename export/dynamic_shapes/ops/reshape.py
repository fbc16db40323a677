"""Reshape: its target is a regrouping of the factors of its input's axes, which other sizes have as well."""

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile

from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, Rewrite, map_sizes
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import (
    SAMPLES,
    Axis,
    SampledSize,
    Shape,
    axis_sizes,
    changes_with,
    describe,
    fixed,
    is_fixed,
    multiplied,
    scaled,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, Values
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def check(node: NodeProto, state: State) -> None:
    targets, shape = state.values_of(node.input[1]), state.shape(node.input[0])
    for sample, target in enumerate(targets or ()):
        before = [size[sample] for size in axis_sizes(shape)]
        if (target > 0).all() and math.prod(map(int, target)) != math.prod(before):
            raise ConflictError(node, f"it makes {target.tolist()} of {before}")


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    shape = state.shape(node.input[0])
    targets = state.values_of(node.input[1])
    if targets is None:
        raise ConflictError(node, f"it goes to {node.input[1]}, which is computed from the image's pixels")
    traced = [size[0] for size in axis_sizes(shape)]
    as_it_stands = _resolved(node, shape, targets, 0)
    if as_it_stands is None or math.prod(as_it_stands) != math.prod(traced):
        raise ConflictError(node, f"it makes {targets[0].tolist()} of {traced}")
    everywhere = [_resolved(node, shape, targets, sample) for sample in range(SAMPLES)]
    found = []
    for axes, cost in _regroupings(tuple(f for factors in shape for f in factors), as_it_stands, state):
        after = tuple(axes)
        shapes = {node.output[0]: after}
        if [[size[sample] for size in axis_sizes(after)] for sample in range(SAMPLES)] == everywhere:
            found.append(Interpretation(shapes, cost))
            continue
        text = ", ".join(describe(size, state.image) for size in axis_sizes(after))
        description = f"to [{text}]" + f" instead of {as_it_stands}" * state.graph.traced
        found.append(Interpretation(shapes, cost, _rewrite(node, shape, after), description))
    if not found:
        raise ConflictError(node, f"it makes {as_it_stands} of {traced}, which is no regrouping of its axes")
    return found


def _resolved(node: NodeProto, shape: Shape, targets: Values, sample: int) -> list[int] | None:
    """The target for a sample, its 0 and -1 filled in; None: they cannot be."""
    before = [size[sample] for size in axis_sizes(shape)]
    numbers = [int(number) for number in targets[sample]]
    if not attributes(node).get("allowzero"):
        if any(number == 0 and place >= len(before) for place, number in enumerate(numbers)):
            return None
        numbers = [before[place] if number == 0 else number for place, number in enumerate(numbers)]
    if -1 in numbers:
        rest = math.prod(number for number in numbers if number != -1)
        if rest <= 0 or math.prod(before) % rest:
            return None
        numbers[numbers.index(-1)] = math.prod(before) // rest
    return numbers


def _regroupings(flat: Axis, targets: Sequence[int], state: State) -> Iterator[tuple[list[Axis], int]]:
    """The ways to regroup factors, in their order, into axes that were of these numbers when traced, with a cost."""
    if not targets:
        if not flat:
            yield [], 0
        return
    for taken, rest, cost in _first_group(flat, targets[0], state, len(targets) == 1):
        for others, more in _regroupings(rest, targets[1:], state):
            yield [taken, *others], max(cost, more)


def _first_group(flat: Axis, number: int, state: State, last: bool) -> Iterator[tuple[Axis, Axis, int]]:
    """(an axis of `number`, the factors left, a cost) by taking factors from the front."""
    if number == 1 and not last:
        if flat and flat[0][0] == 1:
            yield flat[:1], flat[1:], 0
            yield (), flat, 2
        else:
            yield (), flat, 0
        return
    taken: list[SampledSize] = []
    rest, missing = flat, number
    while missing > 1:
        if not rest:
            return
        size, rest = rest[0], rest[1:]
        if missing % size[0] == 0:  # also those that were 1, such as the batch, which nothing may jump over
            taken.append(size)
            missing //= size[0]
        elif size[0] % missing:
            return
        elif is_fixed(size):
            taken.append(fixed(missing))
            rest, missing = (fixed(size[0] // missing), *rest), 1
        else:
            for outer, inner, cost in _split(size, missing, state):
                yield (*taken, outer), (inner, *rest), cost
            return
    beside = len([*takewhile(lambda size: size[0] == 1, rest)])  # such as the batch, which goes with either neighbour
    if last or number == 1:
        taken, rest, beside = [*taken, *rest[:beside]], rest[beside:], 0
    yield _merged(taken), rest, 0
    if beside:
        yield _merged([*taken, *rest[:beside]]), rest[beside:], 1


def _merged(factors: Sequence[SampledSize]) -> Axis:
    """Factors, constants that are neighbours as one."""
    merged: list[SampledSize] = []
    for size in factors:
        if merged and is_fixed(size) and is_fixed(merged[-1]):
            merged[-1] = multiplied([merged[-1], size])
        else:
            merged.append(size)
    return tuple(merged)


def _split(size: SampledSize, number: int, state: State) -> Iterator[tuple[SampledSize, SampledSize, int]]:
    """One factor as two, the outer of `number` when traced: one of them a constant, or both sizes of maps."""
    cost = 0
    if len(changes_with(size)) > 1:
        for outer in map_sizes(state, number, "N H W"):
            if all(whole % part == 0 for whole, part in zip(size, outer, strict=True)):
                inner = tuple(whole // part for whole, part in zip(size, outer, strict=True))
                if not is_fixed(inner):
                    yield outer, inner, 0
                    cost = 1
    other = size[0] // number
    if (share := scaled(size, 1, other)) is not None:
        yield share, fixed(other), cost
    if (share := scaled(size, 1, number)) is not None:
        yield fixed(number), share, cost


def _rewrite(node: NodeProto, before: Shape, after: Shape) -> Rewrite:
    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        entries: list[int | Axis] = []
        for place, factors in enumerate(after):
            size = multiplied(factors)
            if is_fixed(size):
                entries.append(size[0])
            elif place < len(before) and multiplied(before[place]) == size:
                entries.append(0)
            else:
                entries.append(factors)
        computed = {place: len(entry) for place, entry in enumerate(entries) if isinstance(entry, tuple)}
        if computed:  # the one that takes most arithmetic is what is left over
            entries[max(computed, key=computed.__getitem__)] = -1
        parts = [writer.axis(entry, node) if isinstance(entry, tuple) else entry for entry in entries]
        return [writer.replaced(node, {1: writer.concat(parts)}, drop=("allowzero",))]

    return rewrite

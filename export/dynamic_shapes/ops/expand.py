"""Expand: an axis of 1 is repeated to the size of a map."""

from collections.abc import Sequence
from itertools import product

from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, map_sizes
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import (
    SampledSize,
    axis_of,
    axis_sizes,
    changes_with,
    describe,
    fixed,
    is_fixed,
    multiplied,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, needed_integers
from onnx import NodeProto


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    shape = state.shape(node.input[0])
    target = needed_integers(node, state, "shape", 1)
    rank = max(len(shape), len(target))
    before = [fixed(1)] * (rank - len(shape)) + axis_sizes(shape)
    wanted = [fixed(1)] * (rank - len(target)) + target
    if (same := _constant(node, state, before, wanted)) is not None:
        return [same]
    if not state.is_data(node.input[0]):
        return None
    options = [repeated(state, size, entry, entry) for size, entry in zip(before, wanted, strict=True)]
    found = []
    for picked in product(*options):
        after = [size for size, _ in picked]
        cost = max((cost for _, cost in picked), default=0)
        result = tuple(axis_of(size) for size in after)
        if len(shape) == rank:
            result = tuple(
                factors if multiplied(factors) == size else axis
                for factors, size, axis in zip(shape, after, result, strict=True)
            )
        shapes = {node.output[0]: result}
        if all(
            new in (entry, size) and entry in (fixed(1), new)
            for new, entry, size in zip(after, wanted, before, strict=True)
        ):
            found.append(Interpretation(shapes, cost, description="to the size it names"))
            continue
        text = ", ".join(describe(size, state.image) for size in after)

        def rewrite(writer: ShapeWriter, after: list[SampledSize] = after) -> list[NodeProto]:
            parts = [
                1 if old == new else new[0] if is_fixed(new) else writer.size(new, node)
                for old, new in zip(before, after, strict=True)
            ]
            return [writer.replaced(node, {1: writer.concat(parts)})]

        found.append(Interpretation(shapes, cost, rewrite, f"to [{text}]"))
    return found


def _constant(
    node: NodeProto, state: State, before: Sequence[SampledSize], wanted: Sequence[SampledSize]
) -> Interpretation | None:
    """A constant of the traced size that is repeated to what follows the image, the same everywhere; None: another."""
    array = state.graph.constants.get(node.input[0])
    grown = [
        place
        for place, (size, entry) in enumerate(zip(before, wanted, strict=True))
        if size[0] > 1 and not is_fixed(entry) and entry[0] == size[0]
    ]
    if array is None or array.ndim != len(wanted) or not grown:
        return None
    first = array[tuple(slice(0, 1) if place in grown else slice(None) for place in range(array.ndim))]
    if (first != array).any():
        raise ConflictError(node, f"its constant of {list(array.shape)} has a value of its own for each place")
    after = tuple(axis_of(entry if entry != fixed(1) else size) for size, entry in zip(before, wanted, strict=True))

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        return [writer.replaced(node, {0: writer.constant("one", first)})]

    return Interpretation({node.output[0]: after}, 0, rewrite, "of one value, to the size that is computed")


def repeated(state: State, size: SampledSize, count: SampledSize, result: SampledSize) -> list[tuple[SampledSize, int]]:
    """What an axis of `size` can become where it is repeated to `count`, which gives `result` as it stands; costs."""
    if not is_fixed(count):
        return [(result, 0)]
    if count[0] == 1:
        # The batch is 1 as well when traced.
        batch = state.image["N"]
        maybe = set(size) == {1} and batch[0] == 1 and changes_with(batch)
        return [(size, 0), *([(batch, 2)] if maybe else [])]
    if not is_fixed(size):
        return [(size, 0)] if size[0] == count[0] else []
    if size[0] != 1:
        return [(result, 0)]
    return [*((other, 0) for other in map_sizes(state, count[0], "N H W NH HW NW NHW")), (result, 0)]

"""Tile: an axis of 1 is repeated as often as a map has places."""

from itertools import product

from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.ops.expand import repeated
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, axis_of, axis_sizes, describe, fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import State, needed_integers
from onnx import NodeProto


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    before = axis_sizes(state.shape(node.input[0]))
    counts = needed_integers(node, state, "repeats", 1)
    as_named = [multiplied(pair) for pair in zip(before, counts, strict=True)]
    options = [
        [(result, 0)] if size != fixed(1) else repeated(state, size, count, result)
        for size, count, result in zip(before, counts, as_named, strict=True)
    ]
    found = []
    for picked in product(*options):
        after = [size for size, _ in picked]
        shapes = {node.output[0]: tuple(map(axis_of, after))}
        cost = max((cost for _, cost in picked), default=0)
        if after == as_named:
            found.append(Interpretation(shapes, cost, description="as often as it names"))
            continue
        text = ", ".join(describe(size, state.image) for size in after)

        def rewrite(writer: ShapeWriter, after: list[SampledSize] = after) -> list[NodeProto]:
            parts = [
                count[0] if new == named else writer.size(new, node)
                for named, new, count in zip(as_named, after, counts, strict=True)
            ]
            return [writer.replaced(node, {1: writer.concat(parts)})]

        found.append(Interpretation(shapes, cost, rewrite, f"to [{text}]"))
    return found

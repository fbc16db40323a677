"""Div and Mul by one number: a sum over the map divided by the number of its places, which no shape betrays."""

from collections.abc import Iterable

from fcn_deploy.export.dynamic_shapes.inference import broadcast
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.ops.broadcasting import interpret as interpret_constants
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, axes_of
from onnx import NodeProto, helper


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    found = _by_places(node, state)
    return [found] if found is not None else interpret_constants(node, state)


def _by_places(node: NodeProto, state: State) -> Interpretation | None:
    """The node as a division by the number of places that were summed; None: it is something else."""
    graph, count = state.graph, _divisor(node, state)
    made = graph.producers.get(node.input[0])
    if made is None or count is None:
        return None
    summed, last = _summed(made, state)
    size = summed or last
    if size is None or is_fixed(size) or size[0] != count:
        return None
    if not summed:
        raise ConflictError(
            node,
            f"it divides by {count}, which is the number of places of its last axis at the traced size, and may be "
            "another",
        )

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        total = writer.node("Cast", [writer.size(size, node)], to=graph.type_of(node.input[0]))
        return [helper.make_node("Div", [node.input[0], total], node.output, name=node.name)]

    shapes = {node.output[0]: broadcast(node, [state.shape(name) for name in node.input])}
    return Interpretation(shapes, 0, rewrite, f"by the number of places it sums over instead of {count}")


def _divisor(node: NodeProto, state: State) -> int | None:
    """The whole number that a node divides data by, 2 or larger; None: it does not."""
    constants = state.graph.constants
    number = next((constants[name] for name in node.input if name in constants), None)
    if number is None or number.size != 1 or number.dtype.kind != "f" or node.input[0] in constants:
        return None
    value = float(number.flat[0])
    count = value if node.op_type == "Div" else 1 / value if value else 0
    return round(count) if count >= 2 and abs(count - round(count)) <= 1e-3 else None


def _summed(made: NodeProto, state: State) -> tuple[SampledSize | None, SampledSize | None]:
    """(the places that a node sums over; of a product that sums over none, its last axis)."""
    if made.op_type == "ReduceSum":
        shape = state.shape(made.input[0])
        axes: Iterable[int] = axes_of(made, state, 1, len(shape)) or range(len(shape))
        return multiplied(multiplied(shape[place]) for place in axes), None
    if made.op_type == "MatMul":
        size = multiplied(state.shape(made.input[0])[-1])
        return (None, multiplied(state.shape(made.output[0])[-1])) if is_fixed(size) else (size, None)
    return None, None

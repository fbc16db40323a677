"""Concat: a constant of the traced map's size that is put beside the map, such as coordinates, follows it."""

from fcn_deploy.export.dynamic_shapes.inference import joined
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.ops.broadcasting import describe_laws, growing_constants
from fcn_deploy.export.dynamic_shapes.position_constants import find_law
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import Shape, added, axis_of, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    shapes = [state.shape(name) for name in node.input]
    rank = len(shapes[0])
    along = attributes(node)["axis"] % rank
    return {
        node.output[0]: tuple(
            axis_of(added(multiplied(shape[place]) for shape in shapes))
            if place == along
            else joined(node, [shape[place] for shape in shapes])
            for place in range(rank)
        )
    }


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    rank = max(len(state.shape(name)) for name in node.input)
    along = attributes(node)["axis"] % rank
    growing = growing_constants(node, state, along)
    if not growing:
        return None
    laws = {index: find_law(node, *constant) for index, constant in growing.items()}

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        inputs = {}
        for index, (array, sides) in growing.items():
            name = laws[index].write(writer, node, sides)
            target = [writer.size(sides[place], node) if place in sides else 1 for place in range(array.ndim)]
            inputs[index] = writer.node("Expand", [name, writer.concat(target)])
        return [writer.replaced(node, inputs)]

    shapes = [state.shape(name) for name in node.input]
    after = list(next(state.shape(name) for name in node.input if name not in state.graph.constants))
    after[along] = axis_of(added(multiplied(shape[along]) for shape in shapes))
    return [
        Interpretation(
            {node.output[0]: tuple(after)}, 0, rewrite, describe_laws(growing, laws),
            size_dependent=any(law.ramps for law in laws.values()),
        )
    ]  # fmt: skip

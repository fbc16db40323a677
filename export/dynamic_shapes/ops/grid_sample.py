"""GridSample: a constant grid, which is of the traced map's size and of one image, follows both."""

from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, map_sizes
from fcn_deploy.export.dynamic_shapes.position_constants import find_law
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, axis_of, axis_sizes, changes_with
from fcn_deploy.export.dynamic_shapes.traced_graph import State, input_of
from onnx import NodeProto


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    """Of a constant grid [N, h, w, 2]; None: it is computed, or for as many images and places as it is."""
    shape, array = state.shape(node.input[0]), state.graph.constants.get(input_of(node, 1))
    if array is None or array.ndim != 4 or not state.graph.traced:
        return None
    whole = axis_sizes(shape)
    sides: dict[int, SampledSize] = {}
    for place, letter in ((1, "H"), (2, "W")):
        own = [size for size in (whole[place + 1],) if size[0] == array.shape[place] and changes_with(size) == letter]
        found = own or map_sizes(state, array.shape[place], letter)
        if not found:
            return None
        sides[place] = found[0]
    law = find_law(node, array, sides)
    batch = whole[0] if array.shape[0] == whole[0][0] else None

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        grid = law.write(writer, node, sides)
        images = array.shape[0] if batch is None else writer.size(batch, node)
        target = writer.concat([images, *(writer.size(sides[place], node) for place in (1, 2)), 2])
        return [writer.replaced(node, {1: writer.node("Expand", [grid, target])})]

    after = (shape[0], shape[1], *(axis_of(sides[place]) for place in (1, 2)))
    text = f"its constant of {list(array.shape)}: {law.description}"
    return [Interpretation({node.output[0]: after}, 0, rewrite, text, size_dependent=True)]

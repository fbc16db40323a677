"""Flatten: two axes of all factors before a place, and of all from it on."""

from fcn_deploy.export.dynamic_shapes.sizes import Shape
from fcn_deploy.export.dynamic_shapes.traced_graph import State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    shape = state.shape(node.input[0])
    place = attributes(node).get("axis", 1)
    return {
        node.output[0]: tuple(tuple(f for factors in part for f in factors) for part in (shape[:place], shape[place:]))
    }

"""Transpose: axes keep their factors in their new places."""

from fcn_deploy.export.dynamic_shapes.sizes import Shape
from fcn_deploy.export.dynamic_shapes.traced_graph import State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    shape = state.shape(node.input[0])
    return {node.output[0]: tuple(shape[place] for place in attributes(node).get("perm", range(len(shape))[::-1]))}

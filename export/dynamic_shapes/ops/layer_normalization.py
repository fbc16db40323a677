"""LayerNormalization: that its weights are not of the traced map's size."""

from fcn_deploy.export.dynamic_shapes.inference import broadcast
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def check(node: NodeProto, state: State) -> None:
    shape, weight = state.shape(node.input[0]), state.shape(node.input[1])
    place = attributes(node).get("axis", -1) % len(shape)
    if broadcast(node, [shape[place:], weight]) != shape[place:]:
        raise ConflictError(node, "its weights are for one size alone")

"""Convolutions and normalisations per channel: that their weights are for as many channels as they are given."""

from fcn_deploy.export.dynamic_shapes.sizes import fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

PER_GROUP = 21  # before this opset, GroupNormalization has weights per group


def check(node: NodeProto, state: State) -> None:
    weight = state.shape(node.input[1])
    channels = multiplied(state.shape(node.input[0])[1])
    if node.op_type == "GroupNormalization" and state.graph.opset < PER_GROUP:
        return
    taken = multiplied(weight[0])
    if node.op_type in ("Conv", "ConvInteger", "DeformConv"):
        taken = multiplied([*weight[1], fixed(attributes(node).get("group", 1))])
    if channels != taken:
        raise ConflictError(node, f"it has weights for {taken[0]} channels, and is given a number that changes")

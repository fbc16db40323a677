"""Gather, Scatter and their kind: that they pick no places of the traced map by number."""

from fcn_deploy.export.dynamic_shapes.sizes import axis_sizes, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, input_of
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def check(node: NodeProto, state: State) -> None:
    data, index = node.input[0], input_of(node, 1)
    if node.op_type.startswith("Scatter") and not state.is_data(data) and state.is_data(index):
        raise ConflictError(node, "it writes into a constant of the traced map's size")
    if index in state.graph.constants and state.is_data(data) and not _is_of_every_size(node, state, index):
        raise ConflictError(node, "it picks places of the map by number")


def _is_of_every_size(node: NodeProto, state: State, index: str) -> bool:
    """Whether constant places mean the same at other sizes."""
    shape = state.shape(node.input[0])
    if node.op_type != "Gather":
        return all(is_fixed(size) for size in axis_sizes(shape)[1:])
    size = multiplied(shape[attributes(node).get("axis", 0) % len(shape)])
    places = state.graph.constants[index]
    return is_fixed(size) or (places.size == 1 and bool(places.flat[0] < 0 or places.flat[0] < size[0] - 1))

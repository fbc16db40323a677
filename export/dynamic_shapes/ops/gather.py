"""Gather, Scatter and their kind: that they pick no places of the traced map by number."""

from fcn_deploy.export.dynamic_shapes.sizes import axis_sizes, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, input_of, name_of_node
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

LARGE_SHARE = 4  # of a map: a place beyond so many parts of it is hardly meant as it is


def check(node: NodeProto, state: State) -> None:
    data, index = node.input[0], input_of(node, 1)
    if node.op_type.startswith("Scatter") and not state.is_data(data) and state.is_data(index):
        raise ConflictError(node, "it writes into a constant of the traced map's size")
    if index in state.graph.constants and state.is_data(data) and not _is_of_every_size(node, state, index):
        raise ConflictError(node, f"it picks places of the map by number; --assume {name_of_node(node)}=fixed if meant")


def _is_of_every_size(node: NodeProto, state: State, index: str) -> bool:
    """Whether constant places mean the same at other sizes."""
    shape = state.shape(node.input[0])
    if node.op_type != "Gather":
        return all(is_fixed(size) for size in axis_sizes(shape)[1:])
    size = multiplied(shape[attributes(node).get("axis", 0) % len(shape)])
    places = state.graph.constants[index]
    if is_fixed(size) or state.graph.assumed.get(name_of_node(node)) == "fixed":
        return True
    place = int(places.flat[0]) if places.size == 1 else size[0]
    return place < 2 or place < size[0] // LARGE_SHARE  # from the middle on, it is a share of the map, most likely

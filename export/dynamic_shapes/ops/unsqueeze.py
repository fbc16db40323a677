"""Unsqueeze: axes keep their factors beside new ones of 1."""

from fcn_deploy.export.dynamic_shapes.sizes import Shape
from fcn_deploy.export.dynamic_shapes.traced_graph import State, needed_integers
from onnx import NodeProto


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    shape = state.shape(node.input[0])
    axes = needed_integers(node, state, "axes", 1)
    new = {size[0] % (len(shape) + len(axes)) for size in axes}
    rest = iter(shape)
    return {node.output[0]: tuple(() if place in new else next(rest) for place in range(len(shape) + len(new)))}

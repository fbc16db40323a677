"""Squeeze: of axes that are 1 at every size."""

from fcn_deploy.export.dynamic_shapes.sizes import Shape, axis_sizes, changes_with, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, axes_of
from onnx import NodeProto


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    shape = state.shape(node.input[0])
    gone = axes_of(node, state, 1, len(shape))
    if gone is None:
        gone = [place for place, size in enumerate(axis_sizes(shape)) if size[0] == 1]
    for place in gone:
        if shape[place]:
            batch = changes_with(multiplied(shape[place])) == "N"
            what = "the batch" if batch else "an axis that is 1 at the traced size alone"
            raise ConflictError(node, f"it squeezes {what}")
    return {node.output[0]: tuple(factors for place, factors in enumerate(shape) if place not in gone)}

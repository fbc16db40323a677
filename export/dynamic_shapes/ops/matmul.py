"""MatMul and Gemm: a dense layer over the flattened map has weights for one size alone, and is refused."""

from fcn_deploy.export.dynamic_shapes.inference import broadcast, joined, refuse_mixed_batch
from fcn_deploy.export.dynamic_shapes.sizes import Axis, Shape, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    first, second = (state.shape(name) for name in node.input[:2])
    if node.op_type == "Gemm":
        settings = attributes(node)
        first, second = first[:: -1 if settings.get("transA") else 1], second[:: -1 if settings.get("transB") else 1]
        _check_summed(node, first[1], second[0], state)
        return {node.output[0]: (first[0], second[1])}
    left = first if len(first) > 1 else ((), *first)
    right = second if len(second) > 1 else (*second, ())
    _check_summed(node, left[-1], right[-2], state)
    batch = broadcast(node, [left[:-2], right[:-2]])
    return {node.output[0]: (*batch, *left[-2:-1] * (len(first) > 1), *right[-1:] * (len(second) > 1))}


def _check_summed(node: NodeProto, left: Axis, right: Axis, state: State) -> None:
    """Raise ConflictError where the axes that are summed over are the batch's, or differ."""
    refuse_mixed_batch(node, left)
    if multiplied(left) != multiplied(right):
        if any(name in state.graph.constants for name in node.input[:2]):
            raise ConflictError(node, "a dense layer over the flattened map has weights for one size alone")
        joined(node, [left, right])

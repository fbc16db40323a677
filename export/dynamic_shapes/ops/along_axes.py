"""Operators that reduce or order axes (ReduceMean, ArgMax, Softmax): of the batch's they would mix images."""

from fcn_deploy.export.dynamic_shapes.inference import refuse_mixed_batch
from fcn_deploy.export.dynamic_shapes.traced_graph import State, axes_of
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
ORDERING = ("ArgMax", "ArgMin", "Hardmax", "LogSoftmax", "Softmax", "TopK")


def check(node: NodeProto, state: State) -> None:
    shape = state.shape(node.input[0])
    settings = attributes(node)
    if node.op_type in REDUCTIONS:
        axes = axes_of(node, state, 1, len(shape))
        if axes is None:
            axes = [] if settings.get("noop_with_empty_axes") else list(range(len(shape)))
    else:
        usual = 0 if node.op_type.startswith("Arg") else -1 if state.graph.opset >= 13 else 1
        axes = [settings.get("axis", usual) % len(shape)]
    for place in axes:
        refuse_mixed_batch(node, shape[place])

"""What a node gives, its numbers taken as they stand: shapes, and values where it computes with shapes alone."""

from fcn_deploy.export.dynamic_shapes.inference import MIXED, infer_shapes
from fcn_deploy.export.dynamic_shapes.ops import operator_of
from fcn_deploy.export.dynamic_shapes.shape_arithmetic import evaluate_for_samples
from fcn_deploy.export.dynamic_shapes.sizes import Shape, axis_sizes, changes_with
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, Values
from onnx import NodeProto

BY_DATA = frozenset(("NonZero", "Unique", "Compress", "NonMaxSuppression", "Loop", "Scan", "If", "SequenceAt"))


def propagate(node: NodeProto, state: State) -> tuple[dict[str, Shape], dict[str, Values]]:
    """(shapes of a node's results, their values where they are arithmetic on shapes).

    Raises:
        ConflictError: it does not fit what it reads.
    """
    if any(item.HasField("g") or item.graphs for item in node.attribute) or node.op_type in BY_DATA:
        raise ConflictError(node, "what it gives is decided while it runs")
    if (found := evaluate_for_samples(node, state)) is not None:
        return found
    operator = operator_of(node)
    if operator.check is not None:
        operator.check(node, state)
    made = operator.propagate(node, state) if operator.propagate is not None else infer_shapes(node, state)
    if any(sum("N" in changes_with(size) for size in axis_sizes(shape)) > 1 for shape in made.values()):
        raise ConflictError(node, MIXED)
    return made, {}

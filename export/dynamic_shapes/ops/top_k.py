"""TopK along the map: as many at every size, which is taken for granted."""

from fcn_deploy.export.dynamic_shapes.inference import infer_shapes
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.ops.along_axes import check as check_axes
from fcn_deploy.export.dynamic_shapes.sizes import changes_with, describe, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import State, integers
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    count = integers(node, state, "k", 1)
    size = multiplied(state.shape(node.input[0])[attributes(node).get("axis", -1)])
    if not changes_with(size) or count is None or not is_fixed(count[0]):
        return None
    check_axes(node, state)
    assumption = f"the first {count[0][0]} of {describe(size, state.image)} are taken at every size"
    return [Interpretation(infer_shapes(node, state), assumption=assumption)]

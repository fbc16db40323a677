"""TopK along the map: as many at every size, which is taken for granted; or a share of the map, where it is one."""

from fcn_deploy.export.dynamic_shapes.inference import infer_shapes
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.ops.along_axes import check as check_axes
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import axis_of, changes_with, describe, is_fixed, multiplied, scaled
from fcn_deploy.export.dynamic_shapes.traced_graph import State, integers
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

SHARES = 16  # largest share of the map that a number is hardly by chance


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    count, shape = integers(node, state, "k", 1), state.shape(node.input[0])
    axis = attributes(node).get("axis", -1) % len(shape)
    size = multiplied(shape[axis])
    if not changes_with(size) or count is None or not is_fixed(count[0]):
        return None
    check_axes(node, state)
    most = describe(size, state.image)
    assumption = f"the first {count[0][0]} of {most} are taken at every size"
    found = [Interpretation(infer_shapes(node, state), assumption=assumption)]
    share = scaled(size, 1, size[0] // count[0][0]) if count[0][0] > 1 and size[0] % count[0][0] == 0 else None
    if not state.graph.traced or share is None or size[0] > SHARES * count[0][0]:
        return found

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        return [writer.replaced(node, {1: writer.size(share, node)})]

    after = (*shape[:axis], axis_of(share), *shape[axis + 1 :])
    text = f"the first {describe(share, state.image)} of {most}"
    all_of_them = [] if share == size else found  # which is sorting
    return [*all_of_them, Interpretation(dict.fromkeys(node.output, after), 0, rewrite, text)]

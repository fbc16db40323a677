"""Split: into parts that are shares of the map, or sizes of other maps."""

from itertools import product

from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, candidates
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, added, axis_of, describe, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, integers
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

COMPUTED_PARTS = 13  # the opset from which on the parts are an input


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    shape, opset = state.shape(node.input[0]), state.graph.opset
    place = attributes(node).get("axis", 0) % len(shape)
    size = multiplied(shape[place])
    parts = integers(node, state, "split", 1)
    if is_fixed(size) or parts is None or not all(map(is_fixed, parts)):
        return None
    found = []
    for picked in product(*([*candidates(state, size, part[0]), part] for part in parts)):
        if added(picked) != size:
            continue
        shapes = {
            name: (*shape[:place], axis_of(part), *shape[place + 1 :])
            for name, part in zip(node.output, picked, strict=True)
        }

        def rewrite(writer: ShapeWriter, picked: tuple[SampledSize, ...] = picked) -> list[NodeProto]:
            if len(set(picked)) == 1 and opset < COMPUTED_PARTS:
                return [writer.replaced(node, {}, drop=("split",))]
            if opset < COMPUTED_PARTS:
                raise ConflictError(node, f"opset {opset} has no Split into computed parts")
            lengths = [part[0] if is_fixed(part) else writer.size(part, node) for part in picked]
            return [writer.replaced(node, {1: writer.concat(lengths)})]

        text = ", ".join(describe(part, state.image) for part in picked)
        # A graph has no other number of parts, which those of one length may have had at other sizes.
        several = len(set(parts)) == 1 and len(parts) > 1
        guess = f"parts of {parts[0][0]} are taken for shares of the map: {text}" if several else ""
        found.append(Interpretation(shapes, 0, rewrite, f"into {text}", assumption=guess))
    return found

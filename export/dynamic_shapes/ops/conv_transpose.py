"""ConvTranspose that names its output's size: how much it pads is what that stands for."""

from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import Axis, axis_of, axis_sizes, fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto, helper


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    settings = attributes(node)
    if "output_shape" not in settings:
        return None
    shape = state.shape(node.input[0])
    weight = [size[0] for size in axis_sizes(state.shape(node.input[1]))]
    wanted = list(settings["output_shape"])[-(len(shape) - 2) :]
    count = len(wanted)
    strides, dilations = settings.get("strides", [1] * count), settings.get("dilations", [1] * count)
    extra = settings.get("output_padding", [0] * count)
    begins: list[int] = []
    ends: list[int] = []
    after: list[Axis] = []
    for place in range(count):
        unpadded = tuple(
            strides[place] * (number - 1) + extra[place] + (weight[2 + place] - 1) * dilations[place] + 1
            for number in multiplied(shape[2 + place])
        )
        total = unpadded[0] - wanted[place]
        if total < 0:
            return None
        first = total // 2 if settings.get("auto_pad") == "SAME_UPPER" else total - total // 2
        begins.append(first)
        ends.append(total - first)
        after.append(axis_of(tuple(number - total for number in unpadded)))

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        made = writer.replaced(node, {}, drop=("output_shape", "pads", "auto_pad"))
        made.attribute.append(helper.make_attribute("pads", [*begins, *ends]))
        return [made]

    channels = fixed(weight[1] * settings.get("group", 1))
    text = f"padding {[*begins, *ends]} instead of a size of {wanted}"
    return [Interpretation({node.output[0]: (shape[0], axis_of(channels), *after)}, 0, rewrite, text)]

"""The input of a model as float32 [N,C,H,W], whatever it was."""

from dataclasses import dataclass

from fcn_deploy.export.graph.edit import (
    attributes,
    clone,
    constant,
    consumers,
    dims,
    producers,
    rename_reads,
    set_shape,
)
from fcn_deploy.export.passes.cancel_transposes import ELEMENTWISE
from onnx import ModelProto, NodeProto, TensorProto, helper

# Operators that keep the order of axes, beside those that work on each element.
KEEP_AXES = ELEMENTWISE | {
    "Pad", "Slice", "Concat", "Resize", "Upsample", "SpaceToDepth", "QuantizeLinear", "DequantizeLinear", "MaxPool",
    "AveragePool",
}  # fmt: skip
KEEP_COUNT = ELEMENTWISE | {"Pad", "Resize", "Upsample", "QuantizeLinear", "DequantizeLinear", "MaxPool", "AveragePool"}
WEIGHT = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}  # index of its weight among the inputs
PER_CHANNEL = {"BatchNormalization": 1, "InstanceNormalization": 1}


@dataclass(frozen=True)
class Channels:
    """Which axis of a model's input holds the channels.

    Attributes:
        axis: 0 to 3.
        count: of the channels; None where the path to `node` may change their number.
        node: the first operator that tells.
    """

    axis: int
    count: int | None
    node: NodeProto


def channels_of_input(model: ModelProto) -> Channels | None:
    """The channel axis of a four-dimensional input, from the first operator that has one; None where none is met."""
    # Tensor → (axes of the input in its order, whether channels are as many as the input's)
    known = {model.graph.input[0].name: ((0, 1, 2, 3), True)}
    found: list[Channels] = []
    for node in model.graph.node:
        read = next((name for name in node.input if name in known), None)
        if read is None:
            continue
        axes, counted = known[read]
        if node.op_type in WEIGHT and node.input[0] == read and len(node.input) > WEIGHT[node.op_type]:
            shape = _shape(model, node.input[WEIGHT[node.op_type]])
            count = None
            if shape is not None and len(shape) == 4:
                groups = attributes(node).get("group", 1)
                count = shape[0] if node.op_type == "ConvTranspose" else shape[1] * groups
            found.append(Channels(axes[1], count if counted else None, node))
        elif node.op_type in PER_CHANNEL and node.input[0] == read:
            shape = _shape(model, node.input[PER_CHANNEL[node.op_type]])
            found.append(Channels(axes[1], shape[0] if shape and counted else None, node))
        elif node.op_type == "MatMul" and node.input[0] == read and (shape := _shape(model, node.input[1])):
            found.append(Channels(axes[-1], shape[-2] if counted and len(shape) == 2 else None, node))
        elif node.op_type == "Transpose":
            perm = attributes(node).get("perm", [3, 2, 1, 0])
            if len(perm) == 4:
                known[node.output[0]] = (tuple(axes[place] for place in perm), counted)
        elif node.op_type in KEEP_AXES:
            same = node.op_type in KEEP_COUNT
            known[node.output[0]] = (axes, counted and same)
        elif node.op_type == "Split":
            known |= dict.fromkeys(node.output, (axes, False))
    # One that counts tells more than one that does not.
    return next((each for each in found if each.count is not None), found[0] if found else None)


def _shape(model: ModelProto, name: str) -> tuple[int, ...] | None:
    """Shape of a weight, also of one that is cast or dequantised first."""
    value = constant(model, name)
    if value is not None:
        return value.shape
    node = producers(model).get(name)
    if node is not None and node.op_type in ("Cast", "DequantizeLinear", "QuantizeLinear", "Identity"):
        return _shape(model, node.input[0])
    return None


def image_input(model: ModelProto, axis: int = 1) -> ModelProto:
    """A model that takes float32 [N,C,H,W], from one of any type of number with channels on `axis`, 1 or 3."""
    model = clone(model)
    image = model.graph.input[0]
    kind, channels = image.type.tensor_type.elem_type, dims(image)[axis]
    before = []
    if kind != TensorProto.FLOAT:
        readers = consumers(model, image.name)
        if all(node.op_type in ("Cast", "Shape") for node in readers) and all(
            attributes(node)["to"] == TensorProto.FLOAT for node in readers if node.op_type == "Cast"
        ):
            for node in readers:
                if node.op_type == "Cast":
                    node.CopyFrom(helper.make_node("Identity", [image.name], list(node.output), name=node.name))
        else:
            before.append(("Cast", "image_input/cast", {"to": kind}))
    if axis == 3:
        before.append(("Transpose", "image_input/channels_last", {"perm": [0, 2, 3, 1]}))
    if before:
        rename_reads(model, image.name, before[-1][1])
        reads, nodes = image.name, []
        for operator, result, extra in before:
            nodes.append(helper.make_node(operator, [reads], [result], name=result, **extra))
            reads = result
        nodes += model.graph.node
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    set_shape(image, ["N", channels if isinstance(channels, int) and channels > 0 else "C", "H", "W"])
    return model

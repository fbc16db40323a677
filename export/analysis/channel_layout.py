"""Which axis of a model's input or output holds the channels, told by the operators next to it."""

from dataclasses import dataclass

from fcn_deploy.export.graph.edit import attributes
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.graph.operators import ELEMENTWISE
from onnx import ModelProto, NodeProto

KEEP_COUNT = ELEMENTWISE | {"Pad", "Resize", "Upsample", "QuantizeLinear", "DequantizeLinear", "MaxPool", "AveragePool"}
# Operators that keep the order of axes.
KEEP_AXES = KEEP_COUNT | {"Slice", "Concat", "SpaceToDepth"}
WEIGHT = {"Conv": 1, "ConvTranspose": 1, "ConvInteger": 1, "QLinearConv": 3}  # index of its weight among the inputs
PER_CHANNEL = {"BatchNormalization": 1, "InstanceNormalization": 1}
Axes = tuple[int, ...]


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
    index = GraphIndex(model)
    # Tensor → (axes of the input in its order, whether channels are as many as the input's)
    known: dict[str, tuple[Axes, bool]] = {index.image: ((0, 1, 2, 3), True)}
    first: Channels | None = None
    for node in model.graph.node:
        read = next((name for name in node.input if name in known), None)
        if read is None:
            continue
        axes, counted = known[read]
        if (told := _told_by(index, node, read)) is not None:
            place, count = told
            found = Channels(axes[place], count if counted else None, node)
            # One that counts tells more than one that does not.
            if found.count is not None:
                return found
            first = first or found
        elif node.op_type == "Transpose":
            order = attributes(node).get("perm", [3, 2, 1, 0])
            if len(order) == 4:
                known[node.output[0]] = (tuple(axes[place] for place in order), counted)
        elif node.op_type in KEEP_AXES:
            known[node.output[0]] = (axes, counted and node.op_type in KEEP_COUNT)
        elif node.op_type == "Split":
            known |= dict.fromkeys(node.output, (axes, False))
    return first


def channels_of_output(model: ModelProto, name: str) -> int | None:
    """The channel axis, 1 or 3, of an output of four axes, from the last operator that has one; None: none is met."""
    index = GraphIndex(model)
    axes: Axes = (0, 1, 2, 3)  # of the tensor reached → place in the output
    while (node := index.producer(name)) is not None:
        if node.op_type in ("Softmax", "LogSoftmax") and "axis" in attributes(node):
            return axes[attributes(node)["axis"] % 4]
        if node.op_type in WEIGHT or node.op_type in PER_CHANNEL:
            return axes[1]
        if node.op_type == "MatMul" and index.constant(node.input[1]) is not None:
            return axes[3]
        if node.op_type == "Transpose":
            order = attributes(node).get("perm", [3, 2, 1, 0])
            if len(order) != 4:
                return None
            axes = tuple(axes[list(order).index(place)] for place in range(4))
        elif node.op_type not in KEEP_AXES:
            return None
        name = next((read for read in node.input if read and index.constant(read) is None), "")
    return None


def _told_by(index: GraphIndex, node: NodeProto, read: str) -> tuple[int, int | None] | None:
    """(place of the channels among the axes of what a node reads, their number or None); None: it tells nothing."""
    if node.input[0] != read:
        return None
    if node.op_type in WEIGHT and len(node.input) > WEIGHT[node.op_type]:
        shape = _shape(index, node.input[WEIGHT[node.op_type]])
        if shape is None or len(shape) != 4:
            return 1, None
        return 1, shape[0] if node.op_type == "ConvTranspose" else shape[1] * attributes(node).get("group", 1)
    if node.op_type in PER_CHANNEL:
        shape = _shape(index, node.input[PER_CHANNEL[node.op_type]])
        return 1, shape[0] if shape else None
    if node.op_type == "MatMul" and (shape := _shape(index, node.input[1])):
        return -1, shape[-2] if len(shape) == 2 else None
    return None


def _shape(index: GraphIndex, name: str) -> tuple[int, ...] | None:
    """Shape of a weight, also of one that is cast or dequantized first."""
    while (value := index.constant(name)) is None:
        node = index.producer(name)
        if node is None or node.op_type not in ("Cast", "DequantizeLinear", "QuantizeLinear", "Identity"):
            return None
        name = node.input[0]
    return value.shape

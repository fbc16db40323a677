"""Whether a network is quantised already: by Q/DQ around its operators, or by operators of integers."""

from fcn_deploy.export.graph.edit import label
from fcn_deploy.export.graph.index import GraphIndex
from onnx import ModelProto

INTEGERS = frozenset(("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"))


def quantised_by(model: ModelProto) -> str:
    """The first node that quantises what is computed of an image, as notes name it; "": none does.

    Weights alone that are kept as integers, and become floats again, are no quantised network.
    """
    index = GraphIndex(model)
    for node in model.graph.node:
        if node.op_type in INTEGERS:
            return label(node)
        if (
            node.op_type == "QuantizeLinear"
            and index.constant(node.input[0]) is None
            and _goes_on(index, node.output[0])
        ):
            return label(node)
    return ""


def _goes_on(index: GraphIndex, name: str) -> bool:
    """Whether what was quantised is computed with; scores that are rounded last are not."""
    return any(
        reader.op_type != "DequantizeLinear" or index.consumers(reader.output[0]) for reader in index.consumers(name)
    )

"""Opset, operators, parameters and precision of ONNX graphs, for `inspect-model`."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from fcn_deploy.export.graph.edit import opset
from onnx import ModelProto, NodeProto, TensorProto

INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
PARAMETER_TYPES = (
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8,
    TensorProto.UINT8, TensorProto.FLOAT8E4M3FN,
)  # fmt: skip


def type_name(kind: int) -> str:
    """A type of ONNX as NumPy names it."""
    name = TensorProto.DataType.Name(kind).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


def operator_entries(*models: ModelProto) -> dict[str, Any]:
    """What a network, in one part or more, is made of."""
    nodes = [node for model in models for node in _with_subgraphs(model.graph.node)]
    operators = Counter(f"{node.domain}:{node.op_type}" if node.domain else node.op_type for node in nodes)
    tensors = [tensor for model in models for tensor in model.graph.initializer]
    tensors += [
        item.t for node in nodes if node.op_type == "Constant" for item in node.attribute if item.name == "value"
    ]
    elements: Counter[int] = Counter()
    for tensor in tensors:
        if tensor.data_type in PARAMETER_TYPES:
            elements[tensor.data_type] += int(np.prod(tensor.dims, dtype=np.int64))
    precision = type_name(elements.most_common(1)[0][0]) if elements else "float32"
    if "QuantizeLinear" in operators or "DequantizeLinear" in operators:
        precision = "int8 (Q/DQ)"
    elif any(operator in operators for operator in INTEGER_OPERATORS):
        precision = "int8 (integer operators)"
    return {
        "opset": opset(models[0]),
        "operators": dict(operators.most_common()),
        "parameters": sum(elements.values()),
        "precision": precision,
    }


def _with_subgraphs(nodes: Iterable[NodeProto]) -> list[NodeProto]:
    """Nodes, and those of their subgraphs."""
    found = list(nodes)
    for node in list(found):
        for item in node.attribute:
            for graph in (*item.graphs, *([item.g] if item.HasField("g") else [])):
                found += _with_subgraphs(graph.node)
    return found

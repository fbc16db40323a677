"""The types of floating point that a model is written in."""

import math

import onnx
from onnx import ModelProto, TensorProto

OTHERS = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "double"}
ONE_ALONE = 16  # elements: constants of shape arithmetic are of double at times, in models of float32


def other_floats(model: ModelProto) -> list[str]:
    """The kinds of floating point other than float32 in which a model takes images or keeps weights.

    And bfloat16, in which float32 networks compute in parts that were traced under autocast: libraries for CPUs have
    next to no operators for it, and NumPy no type.
    """
    kinds = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    kinds |= {tensor.data_type for tensor in tensors_of(model) if math.prod(tensor.dims) > ONE_ALONE}
    kinds |= {item.i for node in model.graph.node if node.op_type == "Cast" for item in node.attribute} & {
        TensorProto.BFLOAT16
    }
    return [name for kind, name in OTHERS.items() if kind in kinds]


def tensors_of(model: ModelProto) -> list[TensorProto]:
    """All constants of a model: its initialisers, and those that are attributes of nodes."""
    inside = [item.t for node in model.graph.node for item in node.attribute if item.type == onnx.AttributeProto.TENSOR]
    return [*model.graph.initializer, *inside]

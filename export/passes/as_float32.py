"""A model of float16 or double weights as one of float32."""

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import clone
from onnx import ModelProto, TensorProto, numpy_helper

OTHERS = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "double"}
ONE_ALONE = 16  # elements: constants of shape arithmetic are of double at times, in models of float32


def other_floats(model: ModelProto) -> list[str]:
    """The kinds of floating point other than float32 in which a model takes images or keeps weights."""
    kinds = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    kinds |= {tensor.data_type for tensor in _tensors(model) if np.prod(tensor.dims) > ONE_ALONE}
    return [name for kind, name in OTHERS.items() if kind in kinds]


def as_float32(model: ModelProto) -> ModelProto:
    """An equal model in which all that is float16, bfloat16 or double is float32."""
    if not other_floats(model):
        return model
    model = clone(model)
    for tensor in _tensors(model):
        if tensor.data_type in OTHERS:
            value = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    for node in model.graph.node:
        for item in node.attribute:
            if item.name in ("to", "dtype", "output_dtype") and item.i in OTHERS:
                item.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in OTHERS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    return model


def _tensors(model: ModelProto) -> list[TensorProto]:
    inside = [item.t for node in model.graph.node for item in node.attribute if item.type == onnx.AttributeProto.TENSOR]
    return [*model.graph.initializer, *inside]

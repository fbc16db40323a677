"""A model of float16 or double weights as one of float32."""

import numpy as np
from fcn_deploy.export.analysis.float_types import OTHERS, other_floats, tensors_of
from fcn_deploy.export.graph.edit import clone
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, TensorProto, numpy_helper


def as_float32(model: ModelProto) -> PassResult:
    """An equal model in which all that is float16, bfloat16 or double is float32."""
    found = other_floats(model)
    if not found:
        return PassResult(model, why_not="it is of float32")
    model = clone(model)
    for tensor in tensors_of(model):
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
    return PassResult(
        model, (f"is of {' and '.join(found)}; it is run in float32 (--fp16 makes an engine of float16)",)
    )

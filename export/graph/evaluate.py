"""One node's results, computed by ONNX's reference implementation."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper
from onnx.reference import ReferenceEvaluator

RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


def evaluate(model: ModelProto, node: NodeProto, known: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What a node of a model gives, from the values of all that it reads. Raises where the evaluator lacks it."""
    reads = dict.fromkeys(name for name in node.input if name)
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(known[name].dtype), known[name].shape)
        for name in reads
    ]
    graph = helper.make_graph([node], "node", inputs, [onnx.ValueInfoProto(name=name) for name in node.output if name])
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    results = ReferenceEvaluator(single).run(None, {name: known[name] for name in reads})
    return list(results)

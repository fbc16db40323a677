"""Compute once what depends on constants alone, and keep constants as initialisers."""

from collections.abc import Container

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import add_constants, clone, constant, initializers, prune
from onnx import ModelProto, helper
from onnx.reference import ReferenceEvaluator

LARGEST = 1 << 20  # elements: beyond it, folding would only make the file larger
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


def fold_constants(model: ModelProto, keep: Container[str] = ()) -> ModelProto:
    """An equal model without Constant nodes and without arithmetic on constants, but for the operators `keep`.

    The TorchScript exporter writes the padding of a convolution as a dozen such nodes; TensorRT and shape
    inference want numbers.
    """
    model = clone(model)
    known = initializers(model)
    kept = []
    for node in model.graph.node:
        reads = [name for name in node.input if name]
        if (
            node.op_type in RANDOM
            or node.op_type in keep
            or node.domain not in ("", "ai.onnx")
            or any(item.HasField("g") or item.graphs for item in node.attribute)
            or not all(name in known for name in reads)
        ):
            kept.append(node)
            continue
        try:
            values = [constant(model, node.output[0])] if node.op_type == "Constant" else evaluate(model, node, known)
        except Exception:  # an operator the reference evaluator lacks stays in the graph
            kept.append(node)
            continue
        if any(not isinstance(value, np.ndarray) or value.size > LARGEST for value in values):
            kept.append(node)
            continue
        made = dict(zip(node.output, values, strict=False))
        known |= made
        add_constants(model, made)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    prune(model)
    return model


def evaluate(model: ModelProto, node: onnx.NodeProto, known: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What a node gives, by ONNX's reference implementation."""
    reads = dict.fromkeys(name for name in node.input if name)
    graph = helper.make_graph(
        [node],
        "constants",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(known[name].dtype), known[name].shape)
            for name in reads
        ],
        [onnx.ValueInfoProto(name=name) for name in node.output if name],
    )
    single = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return ReferenceEvaluator(single).run(None, {name: known[name] for name in reads})

"""Compute once what depends on constants alone, and keep constants as initialisers."""

from collections.abc import Container, Mapping

import numpy as np
from fcn_deploy.export.graph.edit import add_constants, clone, initializers, prune
from fcn_deploy.export.graph.evaluate import RANDOM, evaluate
from fcn_deploy.export.graph.index import constant_of
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, NodeProto

LARGEST = 1 << 20  # elements: beyond it, folding would only make the file larger


def fold_constants(model: ModelProto, keep: Container[str] = ()) -> PassResult:
    """An equal model without Constant nodes and without arithmetic on constants, but for the operators `keep`.

    The TorchScript exporter writes the padding of a convolution as a dozen such nodes; TensorRT and shape
    inference want numbers.
    """
    model = clone(model)
    known = initializers(model)
    folded: dict[str, np.ndarray] = {}
    kept = []
    # Weights of a quantised network stay integers: of floats, runtimes make others by themselves.
    quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    for node in model.graph.node:
        stays = node.op_type in keep or (quantised and node.op_type == "DequantizeLinear")
        values = None if stays else _values(model, node, known)
        if values is None:
            kept.append(node)
        else:
            made = dict(zip(node.output, values, strict=False))
            known |= made
            folded |= made
    add_constants(model, folded)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    prune(model)
    return PassResult(model, why_not="" if folded else "nothing is computed of constants alone")


def _values(model: ModelProto, node: NodeProto, known: Mapping[str, np.ndarray]) -> list[np.ndarray] | None:
    """What a node gives, where that is known before any image is; None where it is not, or where it stays a node."""
    if (
        node.op_type in RANDOM
        or node.domain not in ("", "ai.onnx")
        or any(item.HasField("g") or item.graphs for item in node.attribute)
        or not all(name in known for name in node.input if name)
    ):
        return None
    try:
        values = [constant_of(node)] if node.op_type == "Constant" else evaluate(model, node, known)
    except Exception:  # an operator the reference evaluator lacks stays in the graph
        return None
    arrays = [value for value in values if isinstance(value, np.ndarray) and value.size <= LARGEST]
    return arrays if len(arrays) == len(values) else None

"""The memory that a core works with, estimated from its graph: what the runtime plans tiles by."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import clone, initializers
from fcn_deploy.runtime.backends.onnxruntime import session
from onnx import ModelProto, NodeProto

IN_PLACE = frozenset((
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Identity", "Dropout",
    "BatchNormalization", "Add", "Mul", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast", "QuantizeLinear",
))  # fmt: skip
ON_8_BITS = frozenset((
    "Conv", "MatMul", "Gemm", "Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool",
    "Resize", "MaxPool", "Relu", "Clip", "Reshape", "Transpose", "Split", "Slice", "Pad",
))  # fmt: skip  # that ONNX Runtime runs so between Q and DQ
OVERHEAD = 1.6  # measured over the live tensors (EfficientNet-Lite0 at 2048×2048): copies in other layouts, the arena


def measure_tensors(core: ModelProto, size: int = 256) -> dict[str, np.ndarray]:
    """Every tensor of a core: constants, and what it computes for an image of size×size zeros."""
    image = core.graph.input[0]
    model = clone(core)
    del model.graph.output[:]
    names = [name for node in core.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    zeros = np.zeros((1, image.type.tensor_type.shape.dim[1].dim_value, size, size), np.float32)
    results = session(model.SerializeToString(), optimise=False).run(names, {image.name: zeros})
    return {**initializers(core), image.name: zeros, **dict(zip(names, map(np.asarray, results), strict=True))}


def working_memory(core: ModelProto, tensors: Mapping[str, np.ndarray]) -> float:
    """Estimated bytes that a core, or a part of one, works with: the largest sum of tensors that are alive at once.

    Args:
        core: its graph.
        tensors: by name, at the size to estimate for.
    """
    nodes = core.graph.node
    sizes = _bytes_as_run(nodes, tensors)
    start = core.graph.input[0].name
    last_use = {name: index for index, node in enumerate(nodes) for name in node.input}
    alive = {start: tensors[start].nbytes}
    peak = 0
    for index, node in enumerate(nodes):
        dying = [name for name in set(node.input) if last_use[name] == index and name in alive]
        made = sum(sizes[name] for name in node.output if name)
        if node.op_type in IN_PLACE and any(alive[name] >= made for name in dying):
            made = 0
        peak = max(peak, sum(alive.values()) + made)
        for name in dying:
            del alive[name]
        alive |= {name: sizes[name] for name in node.output if name in last_use}
    return peak * OVERHEAD


def _bytes_as_run(nodes: Sequence[NodeProto], tensors: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Bytes of what each node gives, as kernels run it: 8 bits between Q and DQ, where the graph has floats."""
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    sizes = {name: tensors[name].nbytes for node in nodes for name in node.output if name}
    for node in nodes:
        result, read = node.output[0], readers.get(node.output[0], [])
        if node.op_type == "DequantizeLinear" and read and all(other.op_type in ON_8_BITS for other in read):
            sizes[result] = 0
        elif node.op_type in ON_8_BITS and [other.op_type for other in read] == ["QuantizeLinear"]:
            sizes[result] = tensors[read[0].output[0]].nbytes
    return sizes

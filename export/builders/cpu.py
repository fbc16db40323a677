"""Engines for CPUs, run by ONNX Runtime."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper

from runtime.backends.onnxruntime import ERRORS_ONLY, one_line
from runtime.errors import DeployError


def build(core: ModelProto) -> bytes:
    """The core network, optimised offline as far as that holds on every machine.

    BASIC folds constants and batch norms. The levels above lay tensors out for the machine that runs them:
    ONNX Runtime does that when the engine is opened.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "core.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(core.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return path.read_bytes()
        except Exception as error:
            raise DeployError(f"ONNX Runtime cannot optimise the network: {one_line(error)}") from error


IN_PLACE = frozenset((
    "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Identity", "Dropout",
    "BatchNormalization", "Add", "Mul", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast",
))  # fmt: skip
OVERHEAD = 1.6  # measured over the live tensors (EfficientNet-Lite0 at 2048×2048): copies in other layouts, the arena


def bytes_per_pixel(core: ModelProto, size: int = 512) -> float:
    """Estimated working memory of the core for one pixel of input.

    The largest sum of tensors that are alive at once, for a size×size image: an upper bound where shapes
    are known, 0.0 where they cannot be inferred.
    """
    model = ModelProto()
    model.CopyFrom(core)
    for axis, value in ((0, 1), (2, size), (3, size)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = value
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception:
        return 0.0
    sizes = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        kind = value.type.tensor_type
        extent = [dim.dim_value for dim in kind.shape.dim]
        if extent and all(extent):
            sizes[value.name] = int(np.prod(extent)) * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    last_use = {name: index for index, node in enumerate(model.graph.node) for name in node.input}
    alive = {model.graph.input[0].name: sizes.get(model.graph.input[0].name, 0)}
    peak = 0
    for index, node in enumerate(model.graph.node):
        dying = [name for name in set(node.input) if last_use.get(name) == index and name in alive]
        made = sum(sizes.get(name, 0) for name in node.output)
        if node.op_type in IN_PLACE and any(alive[name] >= made for name in dying):
            made = 0
        peak = max(peak, sum(alive.values()) + made)
        for name in dying:
            del alive[name]
        alive |= {name: sizes.get(name, 0) for name in node.output if name in last_use}
    return peak * OVERHEAD / size**2

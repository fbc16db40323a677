"""Engines for CPUs, run by ONNX Runtime."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto

from runtime.backends.onnxruntime import ERRORS_ONLY, one_line, session
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


def bytes_per_pixel(core: ModelProto, size: int = 256) -> float:
    """Estimated working memory of the core for one pixel of input.

    The largest sum of tensors that are alive at once for a size×size image, by their sizes in a real run.
    """
    image = core.graph.input[0]
    model = ModelProto()
    model.CopyFrom(core)
    del model.graph.output[:]
    names = [name for node in core.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    zeros = np.zeros((1, image.type.tensor_type.shape.dim[1].dim_value, size, size), np.float32)
    results = session(model.SerializeToString(), optimise=False).run(names, {image.name: zeros})
    sizes = {name: np.asarray(result).nbytes for name, result in zip(names, results, strict=True)}
    last_use = {name: index for index, node in enumerate(core.graph.node) for name in node.input}
    alive = {image.name: zeros.nbytes}
    peak = 0
    for index, node in enumerate(core.graph.node):
        dying = [name for name in set(node.input) if last_use[name] == index and name in alive]
        made = sum(sizes[name] for name in node.output if name)
        if node.op_type in IN_PLACE and any(alive[name] >= made for name in dying):
            made = 0
        peak = max(peak, sum(alive.values()) + made)
        for name in dying:
            del alive[name]
        alive |= {name: sizes[name] for name in node.output if name in last_use}
    return peak * OVERHEAD / size**2

"""Engines for NVIDIA GPUs, built by TensorRT for RTX, which needs no GPU to build."""

import math

from onnx import ModelProto

from runtime.command import need
from runtime.errors import DeployError, MisuseError

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
SMALLEST, USUAL, LARGEST = (1, 1), (512, 1024), (2176, 3840)  # (height, width) of the one profile, in pixels
BATCH = 4


def parse_targets(text: str) -> list[str]:
    """`sm86,sm89` as a list. Raises MisuseError."""
    targets = [name.strip().lower() for name in text.split(",")]
    for name in targets:
        if name not in TARGETS:
            raise MisuseError(f"target {name!r}; choose cpu, or one or more of {', '.join(TARGETS)}")
    return targets


def build(core: ModelProto, targets: list[str], multiple: int) -> bytes:
    """A strongly typed plan for all of `targets`, with free N, H and W.

    Args:
        core: precision is in its graph: casts and Q/DQ.
        targets: compute capabilities.
        multiple: H and W are multiples of it.

    Raises:
        DeployError: tensorrt_rtx is missing, or it refuses the network; names the node.
    """
    trt = need("tensorrt_rtx", "rtx")
    messages: list[str] = []

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(" ".join(message.split()))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(core.SerializeToString()):
        error = parser.get_error(0)
        node = core.graph.node[error.node()] if 0 <= error.node() < len(core.graph.node) else None
        where = f"node {node.name or node.output[0]} ({node.op_type})" if node is not None else "the network"
        raise DeployError(f"TensorRT refuses {where}: {' '.join(error.desc().split())[:300]}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    profile = builder.create_optimization_profile()
    channels = network.get_input(0).shape[1]
    shapes = [
        (batch, channels, *(math.ceil(side / multiple) * multiple for side in size))
        for batch, size in ((1, SMALLEST), (1, USUAL), (BATCH, LARGEST))
    ]
    profile.set_shape(network.get_input(0).name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise DeployError(f"TensorRT cannot build the network: {messages[-1] if messages else 'no reason given'}")
    return bytes(plan)

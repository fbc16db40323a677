"""Names the node of a graph that most likely has a size baked in, and the usual cause in PyTorch."""

import numpy as np
from fcn_deploy.export.graph.edit import attributes
from fcn_deploy.export.graph.index import GraphIndex
from onnx import ModelProto, NodeProto

CAUSES = {
    "Resize": "interpolate(size=<int>): pass scale_factor, or size=x.shape[-2:] without int()",
    "Reshape": "view or reshape with numbers taken from the traced image: use flatten, -1, or x.shape",
    "Expand": "expand or repeat to the traced image's size: use x.shape without int()",
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div"), "a tensor of the traced image's size: a positional embedding or a grid"
    ),
    **dict.fromkeys(
        ("Gemm", "MatMul"),
        "a dense layer after Flatten: turn it into a convolution (fcn_deploy.fcn.convolutionalize)",
    ),
    "AveragePool": "adaptive pooling traced at one size: use a mean over H and W",
}
OURS = "any_size/"  # what names begin with of nodes that fit images to a network
LARGE_WINDOW = 7  # a mean over more than these is of adaptive pooling, most likely


def describe_cause(graph: ModelProto, message: str) -> str:
    """Which node has a size baked in, and the usual cause, in a sentence or two.

    Args:
        graph: that fails, or gives other scores, at some sizes.
        message: what ONNX Runtime said, which may name a node; "": it ran.
    """
    named = next((node for node in graph.graph.node if node.name and f"'{node.name}'" in message), None)
    suspect = find_baked_node(graph) or named
    if suspect is None:
        return f"ONNX Runtime says: {message}" if message else "No single node could be named"
    cause = CAUSES.get(suspect.op_type, "a number taken from the traced image")
    text = f"Node {suspect.name or suspect.output[0]} ({suspect.op_type}); usual cause: {cause}"
    return text if not message else f"{text}. ONNX Runtime says: {message[:200]}"


def find_baked_node(graph: ModelProto) -> NodeProto | None:
    """The first node whose output size is a constant though the image's is not; None: none is seen."""
    tests = {"Resize": _resizes_to_constant, "Reshape": _reshapes_to_constant, "Expand": _reshapes_to_constant}
    tests |= dict.fromkeys(("Add", "Sub", "Mul", "Div"), _joins_a_map) | {"AveragePool": _pools_widely}
    index = GraphIndex(graph)
    return next((node for node in graph.graph.node if node.op_type in tests and tests[node.op_type](index, node)), None)


def _resizes_to_constant(graph: GraphIndex, node: NodeProto) -> bool:
    if len(node.input) < 4 or not node.input[3] or node.name.startswith(OURS):
        return False
    # N and K may be computed while H and W are numbers: Concat(Shape(x)[:2], [64, 96]).
    source = graph.producer(node.input[3])
    last = source.input[-1] if source is not None and source.op_type == "Concat" else node.input[3]
    sizes = graph.constant(last)
    return sizes is not None and sizes.size > 0 and sizes.flat[-1] > 1


def _reshapes_to_constant(graph: GraphIndex, node: NodeProto) -> bool:
    shape = graph.constant(node.input[1])
    # Weights are reshaped as well; they come from constants.
    return shape is not None and (np.asarray(shape) > 1).sum() >= 2 and graph.constant(node.input[0]) is None


def _joins_a_map(graph: GraphIndex, node: NodeProto) -> bool:
    # Per-channel constants are [C, 1, 1]; one that differs along W or H belongs to one size.
    values = [value for name in node.input if (value := graph.constant(name)) is not None]
    return any(value.ndim and max(value.shape[-2:]) > 1 for value in values)


def _pools_widely(graph: GraphIndex, node: NodeProto) -> bool:
    return min(attributes(node).get("kernel_shape", [0])) > LARGE_WINDOW

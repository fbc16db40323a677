"""Means over whole maps in two steps, along rows and then over these: libraries for CPUs lose the sums of large maps.

They add a map's values one by one in float32, in a few sums. Of a plain map of 2048×2048 the mean is 1 % off in ONNX
Runtime and 0.2 % in OpenVINO, and from some ten thousand a side on a sum no longer grows. Sums of a row are short.
"""

import numpy as np
from fcn_deploy.export.graph.edit import Names, add_constants, attributes, clone, label
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, NodeProto, TensorProto, helper, shape_inference

BOUND = np.finfo(np.float32).max
# Taken apart into such means they cost 5 to 16 % of a call (MONAI's UNet and DynUNet at 224×224 and 1024×1024).
NORMALISATIONS = ("InstanceNormalization", "GroupNormalization", "MeanVarianceNormalization")


def mean_in_steps(model: ModelProto) -> PassResult:
    """An equal network whose means over the height and width of float32 maps are taken in two steps.

    Those of quantised values, whose sums are of integers, stay.
    """
    index = GraphIndex(model)
    asked = [node for node in model.graph.node if _is_mean(node, index)]
    maps = _float_maps(model) if asked else frozenset()
    found = {node.output[0] for node in asked if node.input[0] in maps}
    if not found:
        return PassResult(model, why_not="it takes no mean over the height and width of a map")
    model, names = clone(model), Names(model)
    values = {"columns": np.array([3]), "lowest": np.array(-BOUND), "highest": np.array(BOUND)}
    given = {what: names(f"mean/{what}") for what in values}
    add_constants(model, {given[what]: value for what, value in values.items()})
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.output[0] in found:
            nodes += _in_steps(node, given, names)
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return PassResult(model)


def sums_at_once(model: ModelProto) -> str:
    """The first normalisation whose sums over whole maps are the library's own, and what that costs; "": there is none.

    Shares are of one in ONNX Runtime, for maps whose lower half is 3.3 and whose upper half is noise of variance 1.
    """
    node = next((node for node in model.graph.node if node.op_type in NORMALISATIONS), None)
    if node is None:
        return ""
    return (
        f"{label(node)} sums whole maps in float32, as libraries for CPUs do: of half plain ones its values are 0.1 % "
        "of their range off at 2048×2048 cells, 1 % at 4096×4096"
    )


def _is_mean(node: NodeProto, index: GraphIndex) -> bool:
    """Whether a node is a mean over the last two of four axes, which stay."""
    if node.op_type == "ReduceMean":
        axes = attributes(node).get("axes", index.input_constant(node, 1))
        over = axes is not None and sorted(int(axis) % 4 for axis in np.ravel(axes)) == [2, 3]
        if not over or not attributes(node).get("keepdims", 1):
            return False
    elif node.op_type != "GlobalAveragePool":
        return False
    made = index.producer(node.input[0])
    return made is None or made.op_type != "DequantizeLinear"


def _float_maps(model: ModelProto) -> frozenset[str]:
    """The names of float32 tensors of four axes."""
    typed = shape_inference.infer_shapes(model).graph
    known = (value for value in (*typed.input, *typed.value_info) if value.type.tensor_type.HasField("shape"))
    return frozenset(
        value.name
        for value in known
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and len(value.type.tensor_type.shape.dim) == 4
    )


def _in_steps(node: NodeProto, given: dict[str, str], names: Names) -> list[NodeProto]:
    result = node.output[0]
    rows, kept = names(f"{result}/of_rows"), names(f"{result}/kept_apart")
    return [
        helper.make_node("ReduceMean", [node.input[0], given["columns"]], [rows], name=rows),
        # Between them, or OpenVINO makes one of both again.
        helper.make_node("Clip", [rows, given["lowest"], given["highest"]], [kept], name=kept),
        # ReduceMean along the rows of a small map, as of squeeze-and-excitation, takes longer in ONNX Runtime.
        helper.make_node("GlobalAveragePool", [kept], [result], name=node.name or result),
    ]

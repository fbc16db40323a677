"""Write averages that count padding as depthwise convolutions, whose padding all kernels of integers take for zero."""

import math

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.edit import dims
from fcn_deploy.export.graph.rewrite import Rewrite, needed_input, reroute
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, shape_inference


def pooling_as_convolution(model: ModelProto) -> PassResult:
    """An equal model without AveragePools that count the zeros around a map, also those that a Pad puts there.

    Around quantised pools OpenVINO pads with the number 0 instead of the zero point, so that borders are far off. A
    convolution of equal weights is the same average, and is quantised as convolutions are.
    """
    sides = {value.name: dims(value) for value in shape_inference.infer_shapes(model).graph.value_info}
    edit, found = Rewrite(model), 0
    for node in [each for each in edit.graph if _counts_zeros(each)]:
        shape = sides.get(str(needed_input(node).name), [])
        if len(shape) != 4 or not isinstance(shape[1], int):
            continue
        kernel = list(node.attributes.get_ints("kernel_shape", []))
        weight = np.full((shape[1], 1, *kernel), 1 / math.prod(kernel), np.float32)
        result = node.outputs[0]
        name = str(result.name)
        made = edit.node(
            "Conv",
            [needed_input(node), edit.constant(f"{name}/mean", weight)],
            f"{name}/as_convolution",
            before=node,
            group=shape[1],
            kernel_shape=kernel,
            strides=list(node.attributes.get_ints("strides", [1, 1])),
            pads=list(node.attributes.get_ints("pads", [0] * 4)),
            dilations=list(node.attributes.get_ints("dilations", [1, 1])),
        )
        reroute(result.uses(), made)
        found += 1
    if not found:
        return PassResult(model, why_not="no AveragePool counts zeros around a map")
    edit.prune()
    return PassResult(edit.model())


def _counts_zeros(node: ir.Node) -> bool:
    """Whether a node averages over windows that reach into zeros, its own or those of a Pad before it."""
    attributes = node.attributes
    if node.op_type != "AveragePool" or node.outputs[0].is_graph_output():
        return False
    if attributes.get_int("ceil_mode", 0) == 1:
        return False
    if attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    if any(attributes.get_ints("pads", [])):
        return attributes.get_int("count_include_pad", 0) == 1
    pad = needed_input(node).producer()
    return pad is not None and pad.op_type == "Pad" and pad.attributes.get_string("mode", "constant") == "constant"

"""Padding that follows from `auto_pad`, as numbers."""

import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

POOLINGS = frozenset(("AveragePool", "LpPool", "MaxPool"))
SAME = ("SAME_UPPER", "SAME_LOWER")


def explicit_padding(model: ModelProto) -> PassResult:
    """An equal model in which `auto_pad` became `pads` wherever these are the same at every size of an image.

    They are for VALID, for SAME at a stride of 1, and for a SAME transposed convolution, which gives input times
    stride. OpenVINO forgets the latter once H and W are free. SAME at a larger stride depends on the image's size, and
    stays.
    """
    edit = Rewrite(model)
    changed = [_write_out(node) for node in edit.graph]
    if not any(changed):
        return PassResult(model, why_not="no padding is left to be worked out that is the same at every size")
    return PassResult(edit.model())


def _write_out(node: ir.Node) -> bool:
    """Write out one node's padding, where that can be done; whether it was."""
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if node.domain or node.op_type not in ("Conv", "ConvTranspose", *POOLINGS) or auto == "NOTSET":
        return False
    kernel = effective_kernel(node)
    if kernel is None or "output_shape" in node.attributes:
        return False
    zeros = [0] * len(kernel)
    strides = list(node.attributes.get_ints("strides") or [1] * len(kernel))
    totals = zeros
    if auto in SAME and node.op_type == "ConvTranspose":
        extra = list(node.attributes.get_ints("output_padding") or zeros)
        # ONNX Runtime lets a kernel smaller than its stride give less than input times stride.
        totals = [max(0, side + more - stride) for side, more, stride in zip(kernel, extra, strides, strict=True)]
    elif auto in SAME:
        if any(stride != 1 for stride in strides):
            return False
        totals = [side - 1 for side in kernel]
    smaller = [total // 2 for total in totals]
    larger = [total - half for total, half in zip(totals, smaller, strict=True)]
    first, last = (larger, smaller) if auto == "SAME_LOWER" else (smaller, larger)
    del node.attributes["auto_pad"]
    node.attributes["pads"] = ir.AttrInt64s("pads", [*first, *last])
    return True


def effective_kernel(node: ir.Node) -> list[int] | None:
    """How far a convolution or pooling reaches in each direction, dilation included; None where it cannot be told."""
    kernel = node.attributes.get_ints("kernel_shape")
    if kernel is None and node.op_type not in POOLINGS:
        weight = constant(input_of(node, 1))
        kernel = None if weight is None else weight.shape[2:]
    if kernel is None:
        return None
    dilations = node.attributes.get_ints("dilations") or [1] * len(kernel)
    return [int(step * (side - 1) + 1) for side, step in zip(kernel, dilations, strict=True)]

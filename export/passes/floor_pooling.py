"""Pooling that rounds sizes up, as pooling that rounds them down."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, needed_input
from fcn_deploy.export.passes.explicit_padding import POOLINGS, SAME, effective_kernel
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

LOWEST = np.finfo(np.float32).min  # what padding of a MaxPool counts as


def floor_pooling(model: ModelProto) -> PassResult:
    """An equal model without `ceil_mode`, as ONNX defines it: a last window that starts in the end's padding is none.

    OpenVINO and TensorRT for RTX count that window, so that maps have a row and a column more. With kernel k (dilation
    included), stride s, and padding b at the begin and e at the end of n cells, ONNX gives
    min(⌈(n+b+e-k)/s⌉, ⌊(n+b-1)/s⌋) + 1 cells, which is ⌊(n+b+min(e+s-1, k-1)-k)/s⌋ + 1: as if rounded down with more
    padding at the end, the same at every size.

    A dilated AveragePool that would need more padding than its kernel has cells stays as it is.
    """
    edit = Rewrite(model)
    changed = [_round_down(edit, node) for node in tuple(edit.graph)]
    if not any(changed):
        return PassResult(model, why_not="no pooling rounds its size up")
    return PassResult(edit.model())


def _round_down(edit: Rewrite, node: ir.Node) -> bool:
    """Rewrite one pooling, where it rounds up; whether it was."""
    if node.domain or node.op_type not in POOLINGS or not node.attributes.get_int("ceil_mode", 0):
        return False
    reach = effective_kernel(node)
    assert reach is not None  # of a pooling it is always given
    kernel, axes = list(node.attributes.get_ints("kernel_shape") or ()), len(reach)
    strides = list(node.attributes.get_ints("strides") or [1] * axes)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    if auto in SAME:  # ⌈n/s⌉ either way
        if any(stride > side for stride, side in zip(strides, reach, strict=True)):
            return False
        del node.attributes["ceil_mode"]
        return True
    pads = list(node.attributes.get_ints("pads") or []) if auto == "NOTSET" else []
    begin, end = (pads[:axes], pads[axes:]) if pads else ([0] * axes, [0] * axes)
    wanted = [
        min(pad + stride - 1, side - 1) for pad, stride, side in zip(end, strides, reach, strict=True)
    ]  # never less than the end's own padding, as that is less than a kernel
    own = [min(pad, side - 1) for pad, side in zip(wanted, kernel, strict=True)]
    counts = bool(node.attributes.get_int("count_include_pad", 0))
    counted = node.op_type == "AveragePool" and counts and wanted != end
    if node.op_type == "AveragePool" and own != wanted:
        return False
    if counted:
        # Zeros that count in the mean are put there, since what is added must not count.
        if any((*begin, *end)):
            _pad(edit, node, begin, end, 0.0)
        begin, own = [0] * axes, [pad - already for pad, already in zip(wanted, end, strict=True)]
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    elif own != wanted:  # only a dilated kernel reaches further than its own padding may
        more = [pad - part for pad, part in zip(wanted, own, strict=True)]
        _pad(edit, node, [0] * axes, more, float(LOWEST) if node.op_type == "MaxPool" else 0.0)
    for name in ("ceil_mode", "auto_pad"):
        node.attributes.pop(name, None)
    node.attributes["pads"] = ir.AttrInt64s("pads", [int(pad) for pad in (*begin, *own)])
    return True


def _pad(edit: Rewrite, node: ir.Node, begin: list[int], end: list[int], value: float) -> None:
    """Put constant padding of the last axes before a node."""
    result = node.outputs[0].name
    amounts = edit.constant(f"{result}/pads", np.array([0, 0, *begin, 0, 0, *end], np.int64))
    filling = edit.constant(f"{result}/filling", np.float32(value))
    node.replace_input_with(
        0, edit.node("Pad", [needed_input(node), amounts, filling], f"{result}/padded", before=node)
    )

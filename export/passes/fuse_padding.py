"""Padding of a convolution's input as an attribute of the convolution."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto


def fuse_padding(model: ModelProto) -> PassResult:
    """An equal model in which constant zero padding of H and W before a convolution is part of it.

    TensorFlow's "same" padding comes as a Pad of its own, which costs a copy, and Q/DQ on both sides.
    """
    edit = Rewrite(model)
    found = [(node, pads) for node in edit.graph if (pads := _pads_before(node)) is not None]
    if not found:
        return PassResult(model, why_not="no convolution reads what a Pad of zeros gives to it alone")
    for node, pads in found:
        (pad,) = node.predecessors()[:1]
        own = node.attributes.get_ints("pads", [0, 0, 0, 0])
        node.attributes["pads"] = ir.AttrInt64s("pads", [int(a + b) for a, b in zip(own, pads, strict=True)])
        node.replace_input_with(0, pad.inputs[0])
    edit.prune()
    return PassResult(edit.model())


def _pads_before(node: ir.Node) -> np.ndarray | None:
    """[top, left, bottom, right] of the zeros that a Pad puts around what a convolution alone reads; else None."""
    if node.op_type != "Conv" or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return None
    value = needed_input(node)
    pad = value.producer()
    if pad is None or pad.op_type != "Pad" or pad.attributes.get_string("mode", "constant") != "constant":
        return None
    if input_of(pad, 3) is not None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    filling = constant(pad.inputs[2]) if input_of(pad, 2) is not None else np.zeros(1)
    if filling is None or filling.any():
        return None
    amounts = constant(input_of(pad, 1))
    if amounts is None or amounts.size != 8 or amounts[[0, 1, 4, 5]].any() or amounts.min() < 0:
        return None
    return amounts[[2, 3, 6, 7]]

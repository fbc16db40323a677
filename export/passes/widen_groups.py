"""Convolutions of few channels a group as equal ones of more, for libraries without kernels for the former."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, array, constant, input_of, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

WIDTH = 8  # channels that a group has at least: 16 bytes of float16, which tensor cores take at once
MOST_GROUPS = 64  # that become one: more weights are never made up for


def widen_groups(model: ModelProto, rounded_alone: bool = False) -> PassResult:
    """An equal model whose grouped convolutions have groups of `WIDTH` channels or more, where their number allows it.

    Neighbouring groups become one, with zeros for weights between what was apart. TensorRT for RTX does so by itself,
    much wider, and copies the map before each such convolution: for sm75 (RTX 20, T4), and of INT8 for every GPU.

    Args:
        rounded_alone: widen only those whose weights are rounded.
    """
    edit, found = Rewrite(model), 0
    for conv in [node for node in edit.graph if node.op_type == "Conv"]:
        reader, groups = _reader_of_weights(conv), conv.attributes.get_int("group", 1)
        if reader is None or (rounded_alone and reader[0] is conv):
            continue
        weight = array(needed_input(*reader))
        together = _together(groups, weight.shape[1])
        if together == 1:
            continue
        node, place = reader
        wide = edit.constant(f"{name_of(needed_input(node, place))}/wide", _wide(weight, groups, together))
        node.replace_input_with(place, wide)
        conv.attributes["group"] = ir.AttrInt64("group", groups // together)
        found += 1
    if not found:
        return PassResult(model, why_not=f"no convolution has groups of fewer than {WIDTH} channels")
    edit.prune()
    edit.forget_shapes()
    return PassResult(edit.model())


def _reader_of_weights(conv: ir.Node) -> tuple[ir.Node, int] | None:
    """The node that reads a convolution's weights, and at which place: itself, or what dequantizes them for it alone.

    None where they are no constants, or zeros of theirs are not 0.
    """
    if constant(conv.inputs[1]) is not None:
        return conv, 1
    dequantized = needed_input(conv, 1)
    node = dequantized.producer()
    if node is None or node.op_type != "DequantizeLinear" or len(dequantized.uses()) != 1:
        return None
    scale, shift = constant(node.inputs[1]), input_of(node, 2)
    offset = 0 if shift is None else constant(shift)
    by_filter = node.attributes.get_int("axis", 1) == 0 and not node.attributes.get_int("block_size", 0)
    if scale is None or offset is None or np.any(offset) or constant(node.inputs[0]) is None:
        return None
    return (node, 0) if scale.size == 1 or by_filter else None


def _together(groups: int, channels: int) -> int:
    """How many groups of so many channels become one: as few as make a multiple of `WIDTH`, else as few as reach it."""
    if groups == 1 or channels >= WIDTH:
        return 1
    found = [n for n in range(2, MOST_GROUPS + 1) if groups % n == 0 and n * channels >= WIDTH]
    return min(found, key=lambda n: (n * channels % WIDTH != 0, n), default=1)


def _wide(weight: np.ndarray, groups: int, together: int) -> np.ndarray:
    """Weights [K, C, h, w] of a convolution in `groups`, for so many of them `together`: [K, together · C, h, w]."""
    filters, channels, *window = weight.shape
    wide = np.zeros((groups // together, together, filters // groups, together, channels, *window), weight.dtype)
    apart = weight.reshape(groups // together, together, filters // groups, channels, *window)
    for place in range(together):
        wide[:, place, :, place] = apart[:, place]
    return wide.reshape(filters, together * channels, *window)

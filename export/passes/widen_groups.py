"""Convolutions of few channels a group as equal ones of more, for libraries without kernels for the former."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, constant, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

WIDTH = 8  # channels that a group has at least: 16 bytes of float16, which tensor cores take at once
MOST_GROUPS = 64  # that become one: more weights are never made up for


def widen_groups(model: ModelProto) -> PassResult:
    """An equal model whose grouped convolutions have groups of `WIDTH` channels or more, where their number allows it.

    Neighbouring groups become one, with zeros for weights between what was apart. TensorRT for RTX does so by itself
    for sm75 (RTX 20, T4), much wider, and copies the map before each such convolution.
    """
    edit, found = Rewrite(model), 0
    for conv in [node for node in edit.graph if node.op_type == "Conv"]:
        groups, weight = conv.attributes.get_int("group", 1), constant(conv.inputs[1])
        together = 1 if weight is None else _together(groups, weight.shape[1])
        if weight is None or together == 1:
            continue
        name = f"{name_of(needed_input(conv, 1))}/wide"
        conv.replace_input_with(1, edit.constant(name, _wide(weight, groups, together)))
        conv.attributes["group"] = ir.AttrInt64("group", groups // together)
        found += 1
    if not found:
        return PassResult(model, why_not=f"no convolution has groups of fewer than {WIDTH} channels")
    edit.prune()
    return PassResult(edit.model())


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

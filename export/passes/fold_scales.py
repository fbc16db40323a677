"""What a map is multiplied by and what is added to it, before or behind a convolution, as part of the convolution."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

Floats = npt.NDArray[np.floating[Any]]


def fold_scales(model: ModelProto) -> PassResult:
    """An equal model, up to rounding, in which a Mul or Add of constants beside a convolution is part of it.

    ONNX Runtime folds those behind one that are [C, 1, 1], and not the single numbers by which PaddlePaddle scales and
    shifts whole maps (its learnable affine blocks): each costs a pass over the map, and a Q and DQ in INT8.
    """
    edit, found = Rewrite(model), 0
    for conv in [node for node in edit.graph if node.op_type == "Conv"]:
        while (follower := _folded(edit, conv)) is not None:
            edit.replace(follower.outputs[0], conv.outputs[0])
            edit.remove(follower)
            found += 1
        while _folded_before(edit, conv):
            found += 1
    if not found:
        return PassResult(model, why_not="no map beside a convolution alone is multiplied by, or added to, constants")
    edit.prune()
    return PassResult(edit.model())


def _folded(edit: Rewrite, conv: ir.Node) -> ir.Node | None:
    """The Mul or Add that alone reads a convolution, after the convolution was made to do it; None: there is none."""
    result, filters = conv.outputs[0], _filters(conv)
    uses = tuple(result.uses())
    if len(uses) != 1 or result.is_graph_output() or filters is None:
        return None
    weight, bias = filters
    ((follower, place),) = uses
    if follower.graph is not conv.graph:  # of a branch, which may not be run
        return None
    given = constant(follower.inputs[1 - place]) if follower.op_type in ("Mul", "Add") else None
    numbers = _per_channel(given, len(weight))
    if numbers is None:
        return None
    if follower.op_type == "Mul":
        _give(edit, conv, weight * numbers.reshape(-1, 1, 1, 1), bias * numbers)
    else:
        _give(edit, conv, weight, bias + numbers)
    return follower


def _folded_before(edit: Rewrite, conv: ir.Node) -> bool:
    """Whether a convolution was made to do the Mul or Add by one number whose result it alone reads."""
    value, filters = needed_input(conv), _filters(conv)
    before = value.producer()
    if filters is None or before is None or before.op_type not in ("Mul", "Add"):
        return False
    if len(value.uses()) != 1 or value.is_graph_output():
        return False
    place = next((at for at in (0, 1) if constant(before.inputs[at]) is not None), None)
    number = None if place is None else _per_channel(constant(before.inputs[place]), 1)
    if place is None or number is None or _ends_gelu(before.inputs[1 - place]):
        return False
    weight, bias = filters
    if before.op_type == "Mul":
        _give(edit, conv, weight * number[0], bias)
    elif any(conv.attributes.get_ints("pads", [])) or conv.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return False  # zeros around the map are not shifted
    else:
        _give(edit, conv, weight, bias + number[0] * weight.sum((1, 2, 3)))
    conv.replace_input_with(0, before.inputs[1 - place])
    edit.remove(before)
    return True


def _ends_gelu(value: ir.Value | None) -> bool:
    """Whether a value is x · (1 + Erf(…)), or with Tanh: libraries run that and a half as one operator."""
    product = None if value is None else value.producer()
    if product is None or product.op_type != "Mul":
        return False
    sums = (node for node in product.predecessors() if node.op_type == "Add")
    return any(node.op_type in ("Erf", "Tanh") for each in sums for node in each.predecessors())


def _filters(conv: ir.Node) -> tuple[Floats, Floats] | None:
    """(weight [K, C, h, w], bias [K]) of a convolution of maps, in float64; None where they are not constants."""
    weight, given = constant(conv.inputs[1]), input_of(conv, 2)
    if weight is None or (weight.dtype, weight.ndim) != (np.float32, 4):
        return None
    bias = np.zeros(len(weight)) if given is None else constant(given)
    return None if bias is None else (weight.astype(np.float64), bias.astype(np.float64))


def _give(edit: Rewrite, conv: ir.Node, weight: Floats, bias: Floats) -> None:
    """Give a convolution other filters."""
    name, given = name_of(needed_input(conv, 1)), input_of(conv, 2)
    conv.replace_input_with(1, edit.constant(f"{name}/scaled", weight.astype(np.float32)))
    if given is None and not bias.any():
        return
    value = edit.constant(f"{name}/bias", bias.astype(np.float32))
    if given is None:
        conv.resize_inputs(3)
    conv.replace_input_with(2, value)


def _per_channel(given: np.ndarray | None, channels: int) -> Floats | None:
    """Numbers of a constant, one for each channel of a map [N, C, H, W], in float64; None where it has others."""
    if given is None or given.dtype != np.float32 or given.ndim > 4:
        return None
    shape = (1,) * (4 - given.ndim) + given.shape
    if shape[0] != 1 or shape[1] not in (1, channels) or shape[2:] != (1, 1):
        return None
    return np.broadcast_to(given.astype(np.float64).reshape(-1), (channels,))

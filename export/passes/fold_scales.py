"""What a convolution's result is multiplied by, and what is added to it, as part of the convolution."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

Floats = npt.NDArray[np.floating[Any]]


def fold_scales(model: ModelProto) -> PassResult:
    """An equal model, up to rounding, in which a Mul or Add of constants behind a convolution is part of it.

    ONNX Runtime folds those that are [C, 1, 1], and not the single numbers by which PaddlePaddle scales and shifts
    whole maps (its learnable affine blocks): each costs a pass over the map, and a Q and DQ in INT8.
    """
    edit, found = Rewrite(model), 0
    for conv in [node for node in edit.graph if node.op_type == "Conv"]:
        while (follower := _folded(edit, conv)) is not None:
            edit.replace(follower.outputs[0], conv.outputs[0])
            edit.remove(follower)
            found += 1
    if not found:
        return PassResult(model, why_not="no convolution's result alone is multiplied by, or added to, constants")
    edit.prune()
    return PassResult(edit.model())


def _folded(edit: Rewrite, conv: ir.Node) -> ir.Node | None:
    """The Mul or Add that alone reads a convolution, after the convolution was made to do it; None: there is none."""
    result, weight = conv.outputs[0], constant(conv.inputs[1])
    uses = tuple(result.uses())
    if len(uses) != 1 or result.is_graph_output() or weight is None or (weight.dtype, weight.ndim) != (np.float32, 4):
        return None
    ((follower, place),) = uses
    if follower.graph is not conv.graph:  # of a branch, which may not be run
        return None
    given = constant(follower.inputs[1 - place]) if follower.op_type in ("Mul", "Add") else None
    numbers = None if given is None else _per_channel(given, len(weight))
    given_bias = input_of(conv, 2)
    bias = np.zeros(len(weight)) if given_bias is None else constant(given_bias)
    if numbers is None or bias is None:
        return None
    name = name_of(needed_input(conv, 1))
    if follower.op_type == "Mul":
        scaled = weight * numbers.reshape(-1, 1, 1, 1)
        conv.replace_input_with(1, edit.constant(f"{name}/scaled", scaled.astype(np.float32)))
        bias = bias * numbers
    else:
        bias = bias + numbers
    if given_bias is None and follower.op_type == "Mul":
        return follower
    value = edit.constant(f"{name}/bias", bias.astype(np.float32))
    if given_bias is None:
        conv.resize_inputs(3)
    conv.replace_input_with(2, value)
    return follower


def _per_channel(given: np.ndarray, channels: int) -> Floats | None:
    """Numbers of a constant, one for each channel of a map [N, C, H, W], in float64; None where it has others."""
    if given.dtype != np.float32 or given.ndim > 4:
        return None
    shape = (1,) * (4 - given.ndim) + given.shape
    if shape[0] != 1 or shape[1] not in (1, channels) or shape[2:] != (1, 1):
        return None
    return np.broadcast_to(given.astype(np.float64).reshape(-1), (channels,))

"""Pads and Slices to the size of another map, taken out where they change nothing."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.analysis.map_shapes import MapShapes
from fcn_deploy.export.graph.edit import dims, extract
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.runtime.backends.onnxruntime import session
from onnx import ModelProto

# For each operator, the places of its inputs that say how much, any of which may be computed.
COMPUTED_BY = {"Pad": (1,), "Slice": (1, 2)}
# What is computed by these alone repeats with the remainders of sizes, which are all tried. A Min would show its other
# side at large sizes alone.
PERIODIC = frozenset(
    ("Add", "Cast", "Concat", "ConstantOfShape", "Div", "Expand", "Floor", "Gather", "Identity", "Mod", "Mul", "Neg")
) | {"Reshape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze"}


def drop_idle(core: ModelProto, multiple: int = 1, smallest: int = 1) -> PassResult:
    """An equal network without the Pads and Slices by computed numbers that change nothing at the sizes of its images.

    U-Nets pad what a transposed convolution gives, which is a row or a column short of its skip where sides are odd,
    and networks that pad their image by themselves crop the scores. At multiples of their strides there is nothing to
    pad or crop, and they can be run in tiles.

    Args:
        core: float32 [N,C,H,W] → scores.
        multiple: H and W are multiples of it.
        smallest: and so large at least.
    """
    edit = Rewrite(core)
    found = [node for node in edit.graph if _by_computed_numbers(node)]
    if not found:
        return PassResult(core, why_not="no Pad and no Slice is by numbers that are computed")
    idle = _idle(core, found, MapShapes(core, multiple, smallest).sizes)
    if not idle:
        return PassResult(core, why_not="every Pad and Slice by computed numbers changes something at some size")
    for node in idle:
        edit.replace(node.outputs[0], needed_input(node))
    edit.prune()
    return PassResult(edit.model())


def computed_pads(model: ModelProto) -> list[str]:
    """The names of what Pads give that this pass may take out."""
    nodes = (node for node in Rewrite(model).graph if node.op_type == "Pad" and _by_computed_numbers(node))
    return [name_of(node.outputs[0]) for node in nodes]


def _by_computed_numbers(node: ir.Node) -> bool:
    if node.domain or node.op_type not in COMPUTED_BY:
        return False
    if node.op_type == "Slice" and (steps := input_of(node, 4)) is not None:
        taken = constant(steps)
        if taken is None or not np.all(taken == 1):  # one that is reversed keeps its size too
            return False
    given = (input_of(node, place) for place in COMPUTED_BY[node.op_type])
    computed = [value for value in given if value is not None and constant(value) is None]
    return bool(computed) and all(map(_is_periodic, computed))


def _is_periodic(number: ir.Value) -> bool:
    """Whether it is computed of the sizes of maps, by operators whose results repeat with the remainders of these."""
    waiting, seen = [number], set()
    while waiting:
        value = waiting.pop()
        if value in seen or constant(value) is not None:
            continue
        seen.add(value)
        node = value.producer()
        if node is None or node.domain or node.op_type not in (*PERIODIC, "Shape"):
            return False
        if node.op_type != "Shape":
            waiting += [given for given in node.inputs if given is not None]
    return True


def _idle(core: ModelProto, found: Sequence[ir.Node], sizes: Sequence[tuple[int, int]]) -> list[ir.Node]:
    """Those that change nothing at any size; none where a size fails, as nothing is known of it."""
    image, left = core.graph.input[0], list(found)
    wanted = sorted({name for node in found for name in _told_by(node)} - {image.name})
    run = session(extract(core, wanted).SerializeToString(), optimise=False)
    channels, dtype = dims(image)[1], onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type)
    for size in sizes:
        pixels = np.zeros((1, int(channels or 1), *size), dtype)
        try:
            results = dict(zip(wanted, run_quietly(run, pixels), strict=True))
        except Exception:  # of ONNX Runtime
            return []
        results[image.name] = pixels
        left = [node for node in left if _changes_nothing(node, results.__getitem__)]
        if not left:
            break
    return left


def _told_by(node: ir.Node) -> list[str]:
    """The tensors that tell whether a node changes something."""
    if node.op_type == "Pad":
        return [name_of(needed_input(node, 1))]
    return [name_of(needed_input(node)), name_of(node.outputs[0])]


def _changes_nothing(node: ir.Node, result: Callable[[str], np.ndarray]) -> bool:
    told = [result(name) for name in _told_by(node)]
    return not np.any(told[0]) if node.op_type == "Pad" else told[0].shape == told[1].shape

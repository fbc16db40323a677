"""A batch for a model that takes one image without it, [C,H,W] or [H,W,C]."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, array, constant, declare, dims, input_of, name_of, reroute
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

UNARY = frozenset(("Cast", "Identity", "Neg", "Abs", "Sqrt", "Relu", "Clip"))
BINARY = frozenset(("Add", "Sub", "Mul", "Div"))


def add_batch(model: ModelProto) -> PassResult:
    """A model of a batch of 1, from one whose only input has three axes, to which it adds a batch itself.

    What it does to the image before that (arithmetic, transposes, channels reversed) is done with the batch.
    """
    three = [value for value in model.graph.input if len(value.type.tensor_type.shape.dim) == 3]
    if len(model.graph.input) != 1 or not three:
        return PassResult(model, why_not="it has not one input of three axes")
    edit = Rewrite(model)
    image, shape = edit.image, dims(edit.image)
    uses = tuple(image.uses())
    zero = edit.constant("add_batch/axes", np.array([0], np.int64))
    one = edit.node("Squeeze", [image, zero], "add_batch/image", before=edit.first())
    reroute(uses, one)
    declare(image, [1, *shape], int(image.dtype or ir.DataType.FLOAT))
    if not _pushed(edit, one, image, zero):
        return PassResult(model, why_not="it adds no batch to what it takes")
    edit.prune()
    edit.forget_shapes()
    sides = ",".join(str(side or "?") for side in shape)
    return PassResult(edit.model(), (f"takes one image [{sides}] without a batch; a batch is added",))


def _pushed(edit: Rewrite, one: ir.Value, batch: ir.Value, zero: ir.Value) -> bool:
    """Let those who read `one`, `batch` without its first axis, read the batch, as far as they can; whether any adds
    that axis.
    """
    found = False
    for node, place in tuple(one.uses()):
        if node.op_type == "Unsqueeze" and (axes := constant(input_of(node, 1))) is not None and list(axes) == [0]:
            edit.replace(node.outputs[0], batch)
            found = True
        elif _adds_by_broadcast(node, place):
            node.replace_input_with(place, batch)
            found = True
        elif not node.outputs[0].is_graph_output() and _raised(edit, node, place):
            node.replace_input_with(place, batch)
            result = node.outputs[0]
            without = edit.follow_with(result, "Squeeze", f"{name_of(result)}/one", zero)
            found |= _pushed(edit, without, result, zero)
    return found


def _adds_by_broadcast(node: ir.Node, place: int) -> bool:
    """Whether a node's other input is a constant of four axes."""
    other = constant(node.inputs[1 - place]) if node.op_type in BINARY else None
    return other is not None and other.ndim == 4 and len(other) == 1


def _raised(edit: Rewrite, node: ir.Node, place: int) -> bool:
    """Make a node of three axes one of four, where that is possible."""
    if node.op_type in UNARY:
        return place == 0
    if node.op_type in BINARY:
        other = constant(node.inputs[1 - place])
        return other is not None and other.ndim <= 3
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", (2, 1, 0))
        node.attributes["perm"] = ir.AttrInt64s("perm", [0, *(axis + 1 for axis in order)])
        return True
    if node.op_type == "Gather" and place == 0:
        which, axis = constant(node.inputs[1]), node.attributes.get_int("axis", 0)
        if which is None or which.ndim != 1:
            return False
        node.attributes["axis"] = ir.AttrInt64("axis", axis + (axis >= 0))
        return True
    if node.op_type == "Slice" and place == 0 and (axes := input_of(node, 3)) is not None:
        if constant(axes) is None:
            return False
        new = np.array([axis + (axis >= 0) for axis in array(axes)], np.int64)
        node.replace_input_with(3, edit.constant(f"{name_of(axes)}/of_batch", new))
        return True
    return False

"""Take out Transposes that undo each other, as models of [N,H,W,C] have them around each part."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.operators import ELEMENTWISE
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

WITH_AXIS = frozenset(("Concat", "Softmax", "LogSoftmax", "Hardmax", "Split"))
SAME = [0, 1, 2, 3]  # the order that changes nothing


def cancel_transposes(model: ModelProto) -> PassResult:
    """An equal model, of opset 13 or newer, in which Transposes were moved on until they met their inverse.

    A model in which that takes none away is given back as it was.
    """
    edit = Rewrite(model)
    before = _count(edit)
    # Each node is seen after all that it reads was, and Transposes are put behind it, so that once is enough.
    for node in tuple(edit.graph):
        if (order := _order(node)) is not None:
            _join(edit, node, order)
        else:
            _move_behind(edit, node)
    edit.prune()
    if _count(edit) >= before:
        return PassResult(model, why_not="no two Transposes undo each other")
    return PassResult(edit.model())


def _count(edit: Rewrite) -> int:
    return sum(node.op_type == "Transpose" for node in edit.graph)


def _order(node: ir.Node | None) -> list[int] | None:
    """How a Transpose orders four axes; None of any other node."""
    order = node.attributes.get_ints("perm") if node is not None and node.op_type == "Transpose" else None
    return list(order) if order is not None and len(order) == len(SAME) else None


def _order_of(value: ir.Value | None) -> list[int] | None:
    """As _order, of the node that gives a value."""
    return None if value is None else _order(value.producer())


def _before(value: ir.Value) -> ir.Value:
    """What the Transpose reads that gives a value."""
    transpose = value.producer()
    assert transpose is not None
    return needed_input(transpose)


def _join(edit: Rewrite, node: ir.Node, order: list[int]) -> None:
    """Join a Transpose with the one it reads, and take it out where it changes nothing."""
    source, (result,) = needed_input(node), node.outputs
    if (first := _order_of(source)) is not None:
        order = [first[place] for place in order]
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
        source = _before(source)
        node.replace_input_with(0, source)
    if order != SAME:
        return
    if result.is_graph_output():
        node.op_type = "Identity"
        node.attributes.clear()
    else:
        result.replace_all_uses_with(source)
        edit.remove(node)


@dataclass
class _Untransposed:
    """How a node is written that reads what its Transposes read.

    Attributes:
        inputs: place → value.
        constants: place → (what it is called, its value).
        attributes: that change.
    """

    inputs: dict[int, ir.Value] = field(default_factory=dict)
    constants: dict[int, tuple[str, np.ndarray]] = field(default_factory=dict)
    attributes: list[ir.Attr] = field(default_factory=list)


def _move_behind(edit: Rewrite, node: ir.Node) -> None:
    """Move the Transposes before a node behind it, where it can work on the axes as they are before them."""
    order = next((found for value in node.inputs if (found := _order_of(value)) is not None), None)
    if order is None:
        return
    if node.op_type == "Shape":
        _move_behind_shape(edit, node, order)
        return
    changed = _untransposed(node, order)
    if changed is None:
        return
    node.name = node.name or node.outputs[0].name
    for place, (name, array) in changed.constants.items():
        changed.inputs[place] = edit.constant(f"{node.outputs[0].name}/{name}", array)
    for place, value in sorted(changed.inputs.items()):
        if len(node.inputs) <= place:
            node.resize_inputs(place + 1)
        node.replace_input_with(place, value)
    for attribute in changed.attributes:
        node.attributes.add(attribute)
    for result in node.outputs:
        if result.name:
            edit.follow_with(result, "Transpose", f"{result.name}/after", perm=order)


def _move_behind_shape(edit: Rewrite, node: ir.Node, order: list[int]) -> None:
    """The Shape of what was transposed is that of the original, its numbers transposed."""
    result = node.outputs[0]
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(SAME))
    numbers = edit.constant(f"{result.name}/order", np.array(order[start:end], np.int64))
    node.attributes.clear()
    node.replace_input_with(0, _before(needed_input(node)))
    edit.follow_with(result, "Gather", f"{result.name}/gather", numbers)


def _untransposed(node: ir.Node, order: list[int]) -> _Untransposed | None:
    """How a node works on the axes as they are before Transposes of this order; None where it cannot."""
    operator, data = node.op_type, 1  # inputs, from the first, that are transposed
    if operator in (*ELEMENTWISE, "Concat") and operator not in ("Clip", "Dropout"):
        data = len(node.inputs)
    if node.domain or (operator not in ELEMENTWISE and operator not in _WITH_AXES):
        return None
    if _order_of(node.inputs[0]) is None and data == 1:
        return None
    changed = _Untransposed()
    for place, value in enumerate(node.inputs[:data]):
        if value is not None and _order_of(value) == order:
            changed.inputs[place] = _before(value)
        elif _order_of(value) is not None or (array := constant(value)) is None or array.ndim > len(SAME):
            return None
        elif array.size > 1 or operator == "Concat":
            whole = array.reshape((1,) * (len(SAME) - array.ndim) + array.shape).transpose(np.argsort(order))
            changed.constants[place] = f"constant_{place}", np.ascontiguousarray(whole)
        elif array.ndim:
            changed.constants[place] = f"scalar_{place}", array.reshape(())
    if operator in _WITH_AXES and not _WITH_AXES[operator](node, order, changed):
        return None
    return changed


def _one_axis(node: ir.Node, order: Sequence[int], changed: _Untransposed) -> bool:
    axis = node.attributes.get_int("axis", 0 if node.op_type == "Split" else -1)
    changed.attributes.append(ir.AttrInt64("axis", order[axis]))
    return True


def _slice(node: ir.Node, order: Sequence[int], changed: _Untransposed) -> bool:
    if input_of(node, 3) is None:
        starts = constant(node.inputs[1])
        axes = None if starts is None else np.arange(starts.size)
    else:
        axes = constant(node.inputs[3])
    if axes is None:
        return False
    changed.constants[3] = "axes", np.array([order[int(axis)] for axis in axes], np.int64)
    return True


def _pad(node: ir.Node, order: Sequence[int], changed: _Untransposed) -> bool:
    if input_of(node, 3) is not None:
        if (axes := constant(node.inputs[3])) is None:
            return False
        changed.constants[3] = "axes", np.array([order[axis] for axis in axes], np.int64)
        return True
    if (amounts := constant(node.inputs[1])) is None:
        return False
    inverse = np.argsort(order)
    changed.constants[1] = "pads", amounts[[*inverse, *(len(SAME) + inverse)]].astype(np.int64)
    return True


def _resize(node: ir.Node, order: Sequence[int], changed: _Untransposed) -> bool:
    if (axes := node.attributes.get_ints("axes")) is not None:
        changed.attributes.append(ir.AttrInt64s("axes", [order[axis] for axis in axes]))
        return True
    cropping = node.attributes.get_string("coordinate_transformation_mode") == "tf_crop_and_resize"
    if cropping and input_of(node, 1) is not None:
        return False
    place = 2 if input_of(node, 2) is not None else 3
    if (target := constant(input_of(node, place))) is None:
        return False  # to a size that is computed: what is before it is moved by other means
    changed.constants[place] = "target", target[np.argsort(order)]
    return True


_WITH_AXES = {**dict.fromkeys(WITH_AXIS, _one_axis), "Slice": _slice, "Pad": _pad, "Resize": _resize}

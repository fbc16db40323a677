"""Take out Transposes that undo each other, as models of [N,H,W,C] have them around each part."""

import numpy as np
from fcn_deploy.export.graph.edit import Names, add_constants, attributes, clone, constant, prune
from onnx import ModelProto, NodeProto, helper

ELEMENTWISE = frozenset((
    "Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor",
    "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "ThresholdedRelu", "Where",
))  # fmt: skip
WITH_AXIS = frozenset(("Concat", "Softmax", "LogSoftmax", "Hardmax", "Split"))


def cancel_transposes(model: ModelProto) -> ModelProto:
    """An equal model, of opset 13 or newer, in which Transposes were moved on until they met their inverse.

    A model in which that takes none away is given back as it was.
    """
    before = _count(model)
    if not before:
        return model
    moved = clone(model)
    while _cancel_one(moved) or _move_one(moved):
        pass
    prune(moved)
    return moved if _count(moved) < before else model


def _count(model: ModelProto) -> int:
    return sum(node.op_type == "Transpose" for node in model.graph.node)


def _perm(node: NodeProto) -> list[int] | None:
    perm = attributes(node).get("perm")
    return list(perm) if perm is not None and len(perm) == 4 else None


def _cancel_one(model: ModelProto) -> bool:
    """Join a Transpose with the one it reads, or take it out where it changes nothing."""
    made = {name: node for node in model.graph.node for name in node.output}
    results = {value.name for value in model.graph.output}
    for index, node in enumerate(model.graph.node):
        if node.op_type != "Transpose" or (perm := _perm(node)) is None:
            continue
        before = made.get(node.input[0])
        if perm == [0, 1, 2, 3]:
            if node.output[0] in results:
                node.CopyFrom(helper.make_node("Identity", [node.input[0]], [node.output[0]], name=node.name))
                return True
            _reroute(model, node.output[0], node.input[0])
            del model.graph.node[index]
            return True
        if before is not None and before.op_type == "Transpose" and (first := _perm(before)) is not None:
            joined = helper.make_attribute("perm", [first[place] for place in perm])
            del node.attribute[:]
            node.attribute.append(joined)
            node.input[0] = before.input[0]
            prune(model)
            return True
    return False


def _reroute(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def _move_one(model: ModelProto) -> bool:
    """Move the Transposes before one node behind it."""
    made = {name: node for node in model.graph.node for name in node.output}
    for index, node in enumerate(model.graph.node):
        sources = [made.get(name) for name in node.input]
        perms = [_perm(each) if each is not None and each.op_type == "Transpose" else None for each in sources]
        perm = next((each for each in perms if each is not None), None)
        if perm is None:
            continue
        if node.op_type == "Shape":
            _move_behind_shape(model, index, sources[0].input[0], perm)
            return True
        changed = clone(node)
        changed.name = node.name or node.output[0]
        if not _permuted(model, changed, perms, sources, perm):
            continue
        names = Names(model)
        after = []
        for place, result in enumerate(node.output):
            if result:
                changed.output[place] = names(f"{result}/moved")
                after.append(
                    helper.make_node("Transpose", [changed.output[place]], [result], name=f"{result}/after", perm=perm)
                )
        node.CopyFrom(changed)
        for step, transpose in enumerate(after):
            model.graph.node.insert(index + 1 + step, transpose)
        prune(model)
        return True
    return False


def _move_behind_shape(model: ModelProto, index: int, image: str, perm: list[int]) -> None:
    """The Shape of what was transposed is that of the original, its numbers transposed."""
    names, node = Names(model), model.graph.node[index]
    result, order, found = node.output[0], names(f"{node.output[0]}/order"), attributes(node)
    add_constants(model, {order: np.array(perm[found.get("start", 0) : found.get("end", 4)], np.int64)})
    del node.attribute[:]
    node.input[0], node.output[0] = image, names(f"{result}/moved")
    model.graph.node.insert(
        index + 1, helper.make_node("Gather", [node.output[0], order], [result], name=f"{result}/gather")
    )
    prune(model)


def _permuted(model: ModelProto, node: NodeProto, perms, sources, perm: list[int]) -> bool:
    """Let `node` read what its Transposes read, and work on the axes as they are there; False where it cannot."""
    names = Names(model)
    inverse = list(np.argsort(perm))
    found = attributes(node)
    operator = node.op_type
    data = 1  # inputs, from the first, that are transposed
    if operator in ELEMENTWISE or operator == "Concat":
        data = 1 if operator in ("Clip", "Dropout") else len(node.input)
    elif operator not in WITH_AXIS and operator not in ("Slice", "Pad", "Resize"):
        return False
    if perms[0] is None and data == 1:
        return False
    new_constants: dict[str, np.ndarray] = {}

    def give(place: int, wanted: str, value: np.ndarray) -> None:
        while len(node.input) <= place:
            node.input.append("")
        node.input[place] = names(f"{node.output[0]}/{wanted}")
        new_constants[node.input[place]] = value

    for place in range(data):
        if perms[place] == perm:
            node.input[place] = sources[place].input[0]
            continue
        value = constant(model, node.input[place])
        if perms[place] is not None or value is None or value.ndim > 4:
            return False
        if value.size == 1 and operator != "Concat":
            if value.ndim:
                give(place, f"scalar_{place}", value.reshape(()))
            continue
        whole = value.reshape((1,) * (4 - value.ndim) + value.shape)
        give(place, f"constant_{place}", np.ascontiguousarray(whole.transpose(inverse)))
    if operator in WITH_AXIS:
        axis = found.get("axis", 0 if operator == "Split" else -1)
        _set(node, "axis", perm[axis])
    elif operator == "Slice":
        axes = constant(model, node.input[3]) if len(node.input) > 3 and node.input[3] else None
        if axes is None:
            starts = constant(model, node.input[1])
            if starts is None:
                return False
            axes = np.arange(starts.size)
        give(3, "axes", np.array([perm[axis] for axis in axes], np.int64))
    elif operator == "Pad":
        if len(node.input) > 3 and node.input[3]:
            axes = constant(model, node.input[3])
            if axes is None:
                return False
            give(3, "axes", np.array([perm[axis] for axis in axes], np.int64))
        else:
            pads = constant(model, node.input[1])
            if pads is None:
                return False
            give(1, "pads", pads[[*inverse, *(4 + place for place in inverse)]].astype(np.int64))
    elif operator == "Resize":
        if "axes" in found:
            _set(node, "axes", [perm[axis] for axis in found["axes"]])
        elif any(node.input[1:2]) and attributes(node).get("coordinate_transformation_mode") == "tf_crop_and_resize":
            return False
        else:
            place = 2 if len(node.input) > 2 and node.input[2] else 3
            if (value := constant(model, node.input[place])) is None:
                return False  # to a size that is computed: what is before it is moved by other means
            give(place, "target", value[inverse])
    add_constants(model, new_constants)
    return True


def _set(node: NodeProto, name: str, value) -> None:
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])

"""Take off what makes labels of scores at the end of a model: ArgMax, a threshold, and what follows them."""

import math
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.graph.edit import Names, add_constants, attributes, clone, constant, label, producers, prune
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto, TensorProto, helper

# After the decision, these do not change which class a pixel has.
FOLLOW = frozenset(
    ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Resize", "Slice", "Mul", "Where")
)
COMPARE = {"Greater": 0, "GreaterOrEqual": 0, "Less": 1, "LessOrEqual": 1}  # → which input is the score
DECIDES = frozenset(
    (*COMPARE, "ArgMax", "ArgMin", "TopK", "Equal", "Round", "Floor", "Ceil", "Sign", "Not", "And", "Or", "Xor")
)
# What these make of labels are no scores.
POINTWISE = FOLLOW | {
    "Flatten", "Concat", "Expand", "Add", "Sub", "Div", "Neg", "Abs", "Mod", "Min", "Max", "Clip", "Sum", "Pow",
    "Gather", "ReduceMax", "ReduceMin", "Pad", "MaxPool", "AveragePool",
}  # fmt: skip


@dataclass(frozen=True)
class Decision:
    """How a model made labels of its scores.

    Attributes:
        kind: `argmax` or `threshold`.
        node: that did it, as notes name it.
        threshold: what each score was compared with.
        factor: what the number of the best class was multiplied by.
    """

    kind: str
    node: str
    threshold: float | None = None
    factor: float = 1.0


def cut_decision(model: ModelProto) -> tuple[ModelProto, Decision | None]:
    """The model with its scores as output instead of labels, and what was cut off; None where it gives scores.

    Args:
        model: of opset 13 or newer, with one output. Scores come out as they are there: of any layout, with or
            without a batch. Where labels were resized or cropped they are [N,K,H,W], and so are the scores then.

    Raises:
        DeployError: labels are resized or cropped in a way that scores cannot be.
    """
    made = producers(model)
    name, after = model.graph.output[0].name, []
    while (node := made.get(name)) is not None:
        if node.op_type == "ArgMax":
            if any(step.op_type == "Where" for step in after):  # one of two numbers for many classes
                return model, None
            factor = math.prod(float(constant(model, s.input[1]).item()) for s in after if s.op_type == "Mul")
            decision = Decision("argmax", label(node), factor=factor)
            scores = node.input[0]
            break
        if (found := _threshold(model, node)) is not None:
            scores, threshold = found
            decision = Decision("threshold", label(node), threshold)
            break
        if node.op_type not in FOLLOW or (node.op_type in ("Mul", "Where") and not _scales(model, node)):
            return model, None
        after.append(node)
        name = node.input[0]
    else:
        return model, None
    model = clone(model)
    axes = _axes_of_labels(node)
    for step in reversed(after):
        scores, axes = _on_scores(model, step, scores, axes, node)
    output = model.graph.output[0]
    output.CopyFrom(helper.make_empty_tensor_value_info(scores))
    output.type.tensor_type.elem_type = TensorProto.FLOAT
    prune(model)
    return model, decision


def label_maker(model: ModelProto) -> NodeProto | None:
    """The node that makes labels of scores, where a model's output is computed of labels alone; None: of scores.

    For what cut_decision cannot undo: a table of other labels, a sum, an ArgMin.
    """
    made, found, seen = producers(model), [], {}

    def decided(name: str) -> bool:
        if name not in seen:
            node = made.get(name)
            if node is None or constant(model, name) is not None:
                seen[name] = constant(model, name) is not None
            elif node.op_type in DECIDES and (node.op_type != "TopK" or name == node.output[1]):
                found.append(node)
                seen[name] = True
            else:
                # A table's index and the condition of a Where choose among values, and are none.
                values = {"Gather": node.input[:1], "Where": node.input[1:]}.get(node.op_type, node.input)
                known = all(constant(model, value) is not None for value in values if value)
                seen[name] = node.op_type in POINTWISE and all(decided(value) for value in values if value)
                if seen[name] and known:
                    found.append(node)
        return seen[name]

    return found[0] if decided(model.graph.output[0].name) and found else None


def _threshold(model: ModelProto, node: NodeProto) -> tuple[str, float] | None:
    """(scores, threshold) of a comparison with one number, or of rounding."""
    if node.op_type == "Round":
        return node.input[0], 0.5
    if node.op_type not in COMPARE:
        return None
    side = COMPARE[node.op_type]
    limit = constant(model, node.input[1 - side])
    if limit is None or limit.size != 1 or constant(model, node.input[side]) is not None:
        return None
    return node.input[side], float(limit.item())


def _scales(model: ModelProto, node: NodeProto) -> bool:
    """Whether labels stay labels: multiplied by a number above 0 (255, say), or written as one of two numbers."""
    values = [constant(model, name) for name in node.input[1:]]
    if any(value is None or value.size != 1 for value in values):
        return False
    if node.op_type == "Mul":
        return float(values[0].item()) > 0
    return float(values[0].item()) > float(values[1].item())


def _axes_of_labels(node: NodeProto) -> str | None:
    """The axes of an ArgMax's or threshold's result, as letters; None where the rank is not known from its axis."""
    if node.op_type != "ArgMax":
        return None
    found = attributes(node)
    axes = {1: "NCHW", -3: "NCHW", 3: "NHWC", -1: "NHWC", 0: "CHW", 2: "HWC"}.get(found.get("axis", 0))
    if axes is None or found.get("keepdims", 1):
        return axes
    return axes.replace("C", "")


def _on_scores(
    model: ModelProto, step: NodeProto, scores: str, axes: str | None, decision: NodeProto
) -> tuple[str, str | None]:
    """Do to scores what `step` does to labels of these axes: the scores' new name, and the labels' new axes."""
    found = attributes(step)
    if step.op_type in ("Identity", "Cast", "Mul", "Where"):
        return scores, axes
    if step.op_type == "Reshape":
        return scores, None
    if step.op_type in ("Squeeze", "Unsqueeze", "Transpose"):
        return scores, _moved(model, step, axes) if axes is not None else None
    if step.op_type == "Resize" and found.get("mode", "nearest") != "nearest":
        raise DeployError(f"node {label(step)} interpolates labels, which have no values between them")
    if decision.op_type != "ArgMax":
        # A threshold's scores have the labels' own axes.
        return _copied(model, step, scores), None
    if axes is None or not {"H", "W"} <= set(axes):
        raise DeployError(
            f"node {label(step)} changes labels whose axes cannot be told; name an output of scores by --output"
        )
    names = Names(model)
    if attributes(decision).get("axis", 0) in (3, -1) and scores == decision.input[0]:
        planes = names(f"{scores}/planes")
        _insert(model, helper.make_node("Transpose", [scores], [planes], name=planes, perm=[0, 3, 1, 2]))
        scores = planes
    build = _resized if step.op_type == "Resize" else _sliced
    return build(model, step, scores, axes, names), axes


def _moved(model: ModelProto, step: NodeProto, axes: str) -> str | None:
    """Axes after a Squeeze, Unsqueeze or Transpose; a lower-case letter is an axis of one."""
    if step.op_type == "Transpose":
        perm = attributes(step).get("perm", list(range(len(axes)))[::-1])
        return "".join(axes[place] for place in perm) if len(perm) == len(axes) else None
    which = constant(model, step.input[1]) if len(step.input) > 1 and step.input[1] else None
    if which is None:
        return None
    which = [int(axis) for axis in which.reshape(-1)]
    if step.op_type == "Squeeze":
        gone = {axis % len(axes) for axis in which}
        return "".join(letter for place, letter in enumerate(axes) if place not in gone)
    length = len(axes) + len(which)
    new, old = {axis % length for axis in which}, iter(axes)
    return "".join("C" if place in new else next(old) for place in range(length))


def _insert(model: ModelProto, node: NodeProto) -> None:
    """Put a node last: what it reads is there by then, and what reads it is put behind it."""
    model.graph.node.append(node)


def _copied(model: ModelProto, step: NodeProto, scores: str) -> str:
    names = Names(model)
    result = names(f"{step.output[0]}/scores")
    copy = clone(step)
    copy.input[0], copy.output[0], copy.name = scores, result, result
    _insert(model, copy)
    return result


def _resized(model: ModelProto, step: NodeProto, scores: str, axes: str, names: Names) -> str:
    """A Resize of labels as one of scores [N,K,H,W]."""
    result = names(f"{step.output[0]}/scores")
    found = attributes(step)
    # Where the numbers for H and W are in what the Resize reads.
    order = found["axes"] if "axes" in found else list(range(len(axes)))
    letters = [axes[axis] for axis in order]
    if not {"H", "W"} <= set(letters):
        raise DeployError(f"node {label(step)} resizes one side of the labels alone")
    wanted = names(f"{result}/sides")
    add_constants(model, {wanted: np.array([letters.index("H"), letters.index("W")], np.int64)})
    scaled = len(step.input) > 2 and bool(step.input[2])
    value = step.input[2] if scaled else step.input[3]
    sides, target = names(f"{result}/hw"), names(f"{result}/target")
    _insert(model, helper.make_node("Gather", [value, wanted], [sides], name=sides))
    if scaled:
        ones = names(f"{result}/ones")
        add_constants(model, {ones: np.ones(2, np.float32)})
        first = ones
    else:
        shape, first, two = names(f"{result}/shape"), names(f"{result}/nk"), names(f"{result}/two")
        add_constants(model, {two: np.array([0, 1], np.int64)})
        _insert(model, helper.make_node("Shape", [scores], [shape], name=shape))
        _insert(model, helper.make_node("Gather", [shape, two], [first], name=first))
    _insert(model, helper.make_node("Concat", [first, sides], [target], name=target, axis=0))
    reads = [scores, "", target] if scaled else [scores, "", "", target]
    kinds = {name: found[name] for name in ("coordinate_transformation_mode", "nearest_mode", "mode") if name in found}
    _insert(model, helper.make_node("Resize", reads, [result], name=result, **kinds))
    return result


def _sliced(model: ModelProto, step: NodeProto, scores: str, axes: str, names: Names) -> str:
    """A Slice of labels as one of scores [N,K,H,W]."""
    which = constant(model, step.input[3]) if len(step.input) > 3 and step.input[3] else None
    if which is None:
        starts = constant(model, step.input[1])
        if starts is None:
            raise DeployError(f"node {label(step)} crops labels by axes that are computed")
        which = np.arange(starts.size)
    letters = [axes[int(axis)] for axis in which.reshape(-1)]
    if not set(letters) <= {"H", "W"}:
        raise DeployError(f"node {label(step)} takes a part of the batch")
    result, new = names(f"{step.output[0]}/scores"), names(f"{step.output[0]}/axes")
    add_constants(model, {new: np.array(["NCHW".index(letter) for letter in letters], np.int64)})
    reads = [scores, step.input[1], step.input[2], new, *step.input[4:]]
    _insert(model, helper.make_node("Slice", reads, [result], name=result))
    return result

"""What makes labels of scores at the end of a model: an ArgMax, a threshold, and what follows them."""

import math
from dataclasses import dataclass

from fcn_deploy.export.graph.edit import label
from fcn_deploy.export.graph.index import GraphIndex
from onnx import ModelProto, NodeProto

# After the decision, these do not change which class a pixel has.
FOLLOW = frozenset(
    ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Resize", "Slice", "Mul", "Where", "OneHot")
)
COMPARE = {"Greater": 0, "GreaterOrEqual": 0, "Less": 1, "LessOrEqual": 1}  # → which input is the score
DECIDES = frozenset(
    (*COMPARE, "ArgMax", "ArgMin", "TopK", "Equal", "Round", "Floor", "Ceil", "Sign", "Not", "And", "Or", "Xor")
)
NUMBERED = frozenset(("ArgMax", "ArgMin", "TopK"))
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
        one_hot: whether it gives a plane for each class, of which the best has the largest number.
        below: whether the mask is where scores are below the threshold.
    """

    kind: str
    node: str
    threshold: float | None = None
    factor: float = 1.0
    one_hot: bool = False
    below: bool = False


@dataclass(frozen=True)
class DecisionAt:
    """Where a model decides.

    Attributes:
        decision: what it does.
        node: that does it.
        scores: name of what it decides on.
        after: what follows it, from the first on.
    """

    decision: Decision
    node: NodeProto
    scores: str
    after: tuple[NodeProto, ...]


def find_decision(model: ModelProto) -> DecisionAt | None:
    """Where a model makes labels of its scores by one ArgMax or threshold; None where it does not."""
    index = GraphIndex(model)
    name, inverted = index.result, False
    after: list[NodeProto] = []
    while (node := index.producer(name)) is not None:
        if node.op_type == "ArgMax":
            if inverted or any(step.op_type == "Where" for step in after):  # one of two numbers for many classes
                return None
            factor = math.prod([float(index.array(step.input[1]).item()) for step in after if step.op_type == "Mul"])
            one_hot = any(step.op_type == "OneHot" for step in after)
            decision = Decision("argmax", label(node), factor=factor, one_hot=one_hot)
            return DecisionAt(decision, node, node.input[0], tuple(after[::-1]))
        if (found := _threshold(index, node)) is not None:
            scores, threshold, below = found
            made = label_maker(model, scores)
            if made is not None and made.op_type in NUMBERED:  # the numbers of classes are no scores
                return None
            decision = Decision("threshold", label(node), threshold, below=below != inverted)
            return DecisionAt(decision, node, scores, tuple(after[::-1]))
        if node.op_type == "Hardmax" and not inverted:
            return DecisionAt(Decision("argmax", label(node), one_hot=True), node, node.input[0], tuple(after[::-1]))
        if (turns := _inverts(index, node)) is None:
            return None
        inverted ^= turns
        if node.op_type == "OneHot" and not _sets_one(index, node):
            return None
        after.append(node)
        name = node.input[0]
    return None


def label_maker(model: ModelProto, of: str | None = None) -> NodeProto | None:
    """The node that makes labels of scores, where a tensor is computed of labels alone; None: of scores.

    For what cut_decision cannot undo: a table of other labels, a sum, a TopK of several. `of`: the tensor; None: the
    model's output.
    """
    index = GraphIndex(model)
    found: list[NodeProto] = []
    seen: set[str] = set()
    open_ = [of or index.result]
    while open_:
        name = open_.pop()
        if name in seen or index.constant(name) is not None:
            continue
        seen.add(name)
        node = index.producer(name)
        if node is None:
            return None
        values = _chosen(node)
        if node.op_type in DECIDES and (node.op_type != "TopK" or name == node.output[1]):
            found.append(node)
        elif node.op_type not in POINTWISE:
            return None
        elif all(index.constant(value) is not None for value in values):
            found.append(node)
        else:
            open_.extend(reversed(values))
    return found[0] if found else None


def _chosen(node: NodeProto) -> list[str]:
    """What a node's values come from: a table's index and the condition of a Where choose, and are none."""
    values = {"Gather": node.input[:1], "Where": node.input[1:]}.get(node.op_type, node.input)
    return [value for value in values if value]


def _number(index: GraphIndex, name: str) -> float | None:
    """A constant of one number; None where it is another."""
    value = index.constant(name)
    return None if value is None or value.size != 1 else float(value.item())


def _threshold(index: GraphIndex, node: NodeProto) -> tuple[str, float, bool] | None:
    """(scores, threshold, whether it is true below it) of a comparison with one number, or of rounding."""
    if node.op_type == "Round":
        return node.input[0], 0.5, False
    if node.op_type not in COMPARE:
        return None
    for side in (0, 1):
        limit = _number(index, node.input[1 - side])
        if limit is not None and index.constant(node.input[side]) is None:
            return node.input[side], limit, side != COMPARE[node.op_type]
    return None


def _sets_one(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a OneHot gives the plane of a class the larger number."""
    values = index.constant(node.input[2])
    return values is not None and values.size == 2 and bool(values.reshape(-1)[1] > values.reshape(-1)[0])


def _inverts(index: GraphIndex, node: NodeProto) -> bool | None:
    """Whether a node turns a mask into its opposite; None where labels do not stay labels.

    They stay so multiplied by a number above 0 (255, say), or written as one of two numbers.
    """
    if node.op_type == "Not":
        return True
    if node.op_type not in FOLLOW:
        return None
    if node.op_type not in ("Mul", "Where"):
        return False
    values = [value for name in node.input[1:] if (value := _number(index, name)) is not None]
    if len(values) < len(node.input) - 1:
        return None
    if node.op_type == "Mul":
        return False if values[0] > 0 else None
    return None if values[0] == values[1] else values[0] < values[1]

"""Labels by an ArgMin or a TopK of one are those of an ArgMax: write them so."""

import onnx_ir as ir
from fcn_deploy.export.analysis.decision import FOLLOW
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.graph.rewrite import Attribute, Rewrite, label, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, NodeProto

MOVES = ("Resize", "Slice", "Identity", "Transpose", "Squeeze", "Unsqueeze")


def as_argmax(model: ModelProto) -> PassResult:
    """The model with an ArgMax where its labels are made by ArgMin (of the scores, negated) or by TopK of one."""
    index = GraphIndex(model)
    last = index.before(index.result, FOLLOW)
    if last is None or not _is_like_argmax(index, last):
        return PassResult(model, why_not="no ArgMin or TopK of one is last")
    edit = Rewrite(model)
    labels = edit.value(last.output[-1])
    node = edit.producer(last.output[-1])
    given, scores = node.attributes, needed_input(node)
    smallest = node.op_type == "ArgMin" or given.get_int("largest", 1) == 0
    settings: dict[str, Attribute] = {key: given[key] for key in given}
    if node.op_type == "TopK":
        settings = {"axis": given.get_int("axis", -1), "keepdims": 1}
    if smallest:
        negate_input(edit, node)
        scores = needed_input(node)
    named = label(node)
    edit.replace(
        labels,
        edit.node("ArgMax", [scores], f"{name_of(labels)}/argmax", name=node.name or None, before=node, **settings),
    )
    edit.prune()
    return PassResult(edit.model(), (f"gives labels by node {named}, {_read_as(smallest)}",))


def negate_input(edit: Rewrite, node: ir.Node, place: int = 0) -> None:
    """Let a node read the negative of what it reads; of what was enlarged or cropped last, what was so is negated."""
    source = value = needed_input(node, place)
    reader = node
    while all(other is reader or other.op_type == "Shape" for other in source.consumers()):
        step = source.producer()
        if step is None or step.op_type not in MOVES:
            break
        source, reader = needed_input(step), step
    else:  # another reads it, which wants it as it is
        source = value if reader is node else reader.outputs[0]
    if source.producer() is not None and (source is not value or len(value.consumers()) == 1):
        edit.follow_with(source, "Neg", edit.name(f"{name_of(source)}/negated"))
    else:
        node.replace_input_with(place, edit.node("Neg", [value], f"{name_of(value)}/negated", before=node))


def _is_like_argmax(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a node, from which labels come, is an ArgMin or a TopK of one whose places they are."""
    if node.op_type != "TopK":
        return node.op_type == "ArgMin"
    count = index.input_constant(node, 1)
    values_are_read = bool(index.consumers(node.output[0])) or index.result == node.output[0]
    return not values_are_read and count is not None and count.size == 1 and int(count.item()) == 1


def _read_as(smallest: bool) -> str:
    return "read as an ArgMax of what it compares, negated" if smallest else "read as an ArgMax"

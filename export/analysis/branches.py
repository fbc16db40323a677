"""Branches (If) that the size of an image decides: a network keeps both, and is at each size what it is there."""

from collections.abc import Iterable, Iterator, Mapping

from fcn_deploy.export.graph.edit import names_read
from onnx import GraphProto, ModelProto, NodeProto

Made = Mapping[str, NodeProto]  # name of a tensor → the node that gives it


def first_branching(model: ModelProto) -> NodeProto | None:
    """The first If of a network; None: it has no branches."""
    return next((node for node in model.graph.node if node.op_type == "If"), None)


def nodes_within(nodes: Iterable[NodeProto], around: Made | None = None) -> Iterator[tuple[NodeProto, Made]]:
    """Nodes, and those of their branches, each with what gives the tensors that it can read; `around`: what gives more.

    What is inside of loops is not gone through.
    """
    nodes = list(nodes)
    made = {**(around or {}), **{name: node for node in nodes for name in node.output if name}}
    for node in nodes:
        yield node, made
        for branch in branches_of(node):
            yield from nodes_within(branch.node, made)


def branches_of(node: NodeProto) -> list[GraphProto]:
    """Both branches of an If; of other nodes none."""
    return [item.g for item in node.attribute if item.HasField("g")] if node.op_type == "If" else []


def is_of_size(node: NodeProto, made: Made, images: Iterable[str]) -> bool:
    """Whether the condition of an If is computed of the sizes of tensors alone, and of no value in `images`."""
    images, open_, seen = set(images), [node.input[0]], set()
    while open_:
        name = open_.pop()
        if name in images:
            return False
        maker = made.get(name)
        if name in seen or maker is None or maker.op_type in ("Shape", "Size"):
            continue
        seen.add(name)
        open_ += names_read(maker)
    return True

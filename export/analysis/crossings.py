"""Where a network can be cut in two: after each of its nodes, and which feature maps are read beyond."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fcn_deploy.export.graph.edit import names_read
from onnx import ModelProto, NodeProto


@dataclass(frozen=True)
class Crossing:
    """A place to cut at.

    Attributes:
        node: the last one before it.
        maps: names of what is computed from the image before it, and read after it; the scores are read by whoever
            asked for them.
    """

    node: NodeProto
    maps: tuple[str, ...]


def crossings(core: ModelProto, sizes: Mapping[str, int]) -> list[Crossing]:
    """The nodes that depend on the image, in an order in which little has to be kept at once, and what crosses.

    A side branch is run as soon as it makes what is kept smaller: of a skip connection the scores cross, not the
    features that they are made of.

    Args:
        core: `image` → `scores`; nodes that do not depend on the image are left out.
        sizes: bytes of each tensor by name.
    """
    image, scores = core.graph.input[0].name, core.graph.output[0].name
    of_image, nodes = {image}, []
    for node in core.graph.node:
        if not of_image.isdisjoint(names_read(node)):
            of_image.update(name for name in node.output if name)
            nodes.append(node)
    reads = [names_read(node) & of_image for node in nodes]
    readers: dict[str, set[int]] = {name: set() for name in of_image}
    for index, names in enumerate(reads):
        for name in names:
            readers[name].add(index)
    order = _late(_order(nodes, reads, readers, image, scores, sizes), nodes, readers)
    alive, found = {image}, []
    unread = {name: set(indices) for name, indices in readers.items()}
    for index in order:
        for name in reads[index]:
            unread[name].remove(index)
        alive.update(filter(None, nodes[index].output))
        alive = {name for name in alive if unread[name] or name == scores}
        found.append(Crossing(nodes[index], tuple(sorted(alive))))
    return found


def _order(
    nodes: Sequence[NodeProto],
    reads: Sequence[set[str]],
    readers: Mapping[str, set[int]],
    image: str,
    scores: str,
    sizes: Mapping[str, int],
) -> list[int]:
    """Indices of the nodes: of those that can be run, always that which leaves the least to be kept."""
    unread = {name: set(indices) for name, indices in readers.items()}
    missing = [names - {image} for names in reads]
    ready = {index for index, names in enumerate(missing) if not names}
    order = []

    def growth(index: int) -> int:
        last = [name for name in reads[index] if unread[name] == {index} and name != scores]
        return sum(sizes[name] for name in nodes[index].output if name) - sum(sizes[name] for name in last)

    while ready:
        index = min(ready, key=lambda each: (growth(each), each))
        ready.remove(index)
        order.append(index)
        for name in reads[index]:
            unread[name].remove(index)
        for name in filter(None, nodes[index].output):
            for reader in readers[name]:
                missing[reader].discard(name)
                if not missing[reader]:
                    ready.add(reader)
    return order


def _late(order: Sequence[int], nodes: Sequence[NodeProto], readers: Mapping[str, set[int]]) -> list[int]:
    """The order, in which 8 bits that one node reads are made floats right before it."""
    late: list[int] = []
    waiting: dict[int, list[int]] = {}  # by who reads them
    for index in order:
        node = nodes[index]
        by = tuple(readers.get(node.output[0], ()))
        if node.op_type == "DequantizeLinear" and len(by) == 1:
            waiting.setdefault(by[0], []).append(index)
        else:
            late += [*waiting.pop(index, []), index]
    return late + [index for indices in waiting.values() for index in indices]

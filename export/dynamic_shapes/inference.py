"""Output shapes as ONNX defines them: by the operator's own inference, by broadcasting, and by joining axes."""

from collections.abc import Sequence

from fcn_deploy.export.dynamic_shapes.sizes import (
    SAMPLES,
    Axis,
    Shape,
    axis_of,
    changes_with,
    is_fixed,
    multiplied,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State
from onnx import NodeProto

MIXED = "it would mix the images of a batch, of which the traced one had one"


def infer_shapes(node: NodeProto, state: State) -> dict[str, Shape]:
    """Shapes by the operator's definition. An axis that keeps its place and size keeps its factors."""
    inferred = state.graph.infer(node, state.shape, state.values_of)
    first = state.shape(node.input[0]) if node.input and node.input[0] else ()
    made = {}
    for index, name in enumerate(node.output):
        if not name:
            continue
        rank = len(inferred[0][index])
        found = [tuple(inferred[sample][index][place] for sample in range(SAMPLES)) for place in range(rank)]
        made[name] = tuple(
            first[place] if place < len(first) and multiplied(first[place]) == size else axis_of(size)
            for place, size in enumerate(found)
        )
        if any(min(size) < 1 for size in found):
            raise ConflictError(node, "nothing is left of the map")
    return made


def broadcast(node: NodeProto, shapes: Sequence[Shape]) -> Shape:
    """NumPy's broadcasting. Raises ConflictError where two sides differ."""
    rank = max(map(len, shapes))
    result = []
    for place in range(rank):
        sides = [shape[place - rank] for shape in shapes if len(shape) >= rank - place]
        result.append(joined(node, [side for side in sides if side]))
    return tuple(result)


def joined(node: NodeProto, sides: Sequence[Axis]) -> Axis:
    """What axes that must be of one size are: the one that is told in most factors."""
    found = {multiplied(side) for side in sides}
    if len(found) > 1:
        text = " and ".join(
            sorted(str(size[0]) if is_fixed(size) else f"{size[0]} (by {changes_with(size)})" for size in found)
        )
        raise ConflictError(node, f"it joins sizes that differ: {text}")
    return max(sides, key=len, default=())


def refuse_mixed_batch(node: NodeProto, axis: Axis) -> None:
    """Raise ConflictError where an axis that a node reduces or orders is the batch's."""
    if "N" in changes_with(multiplied(axis)):
        raise ConflictError(node, MIXED)

"""All that a node can be at other sizes of the image: its operator's interpretations, or the node as it stands."""

from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.ops import operator_of
from fcn_deploy.export.dynamic_shapes.propagate import propagate
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, name_of_node
from onnx import NodeProto

OF_CONSTANTS = ("Resize", "Expand")  # what is brought to the map's size although it is a constant: positions, zeros


def interpretations(node: NodeProto, state: State, freeing: bool) -> list[Interpretation]:
    """Of a node, the likeliest first; its numbers as they stand alone unless `freeing`.

    Raises:
        ConflictError: there is none.
    """
    operator = operator_of(node)
    freeing &= node.op_type in OF_CONSTANTS or any(state.is_data(name) for name in node.input if name)
    if freeing and operator.interpret is not None and (found := operator.interpret(node, state)) is not None:
        unique: dict[tuple, Interpretation] = {}
        for each in sorted(found, key=lambda each: each.cost):
            unique.setdefault((*each.shapes.values(), each.description), each)
        unique = _as_said(node, state, unique)
        if not unique:
            raise ConflictError(node, "what its numbers stand for at other sizes cannot be told")
        return list(unique.values())
    shapes, values = propagate(node, state)
    assumption, multiple = "", 1
    if freeing and state.graph.traced and operator.assume is not None:
        assumption, multiple = operator.assume(node, state)
    return [Interpretation(shapes, values=values, assumption=assumption, multiple=multiple)]


def _as_said(node: NodeProto, state: State, found: dict[tuple, Interpretation]) -> dict[tuple, Interpretation]:
    """Of a node's interpretations those that are what the user says of it. Raises ConflictError where none is."""
    said = state.graph.assumed.get(name_of_node(node))
    if said is None:
        return found
    kept = {key: each for key, each in found.items() if (each.rewrite is None) == (said == "fixed")}
    if not kept:
        raise ConflictError(node, f"it is said to be {said} (--assume), and its numbers cannot be")
    return kept

"""LSTM, GRU and RNN over rows or columns of a map: what they run along and what is beside it keep their factors."""

import numpy as np
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import Shape, axis_of, axis_sizes, changes_with, fixed, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, input_of
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto

OPERATORS = ("LSTM", "GRU", "RNN")
LENGTHS, FIRST_STATE = 4, (5, 6)  # inputs: how long each sequence is, and what is remembered before the first


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    long, beside, _ = _axes(node, state)
    settings = attributes(node)
    directions = 2 if settings.get("direction") == "bidirectional" else 1
    ways, hidden = axis_of(fixed(directions)), axis_of(fixed(settings["hidden_size"]))
    batch_first = bool(settings.get("layout"))
    whole = (beside, long, ways, hidden) if batch_first else (long, ways, beside, hidden)
    ends = (beside, ways, hidden) if batch_first else (ways, beside, hidden)
    return {name: whole if place == 0 else ends for place, name in enumerate(node.output) if name}


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    """What is remembered before the first may be zeros, as many as there were sequences when traced: left out."""
    long, beside, _ = _axes(node, state)
    lengths, *first = (
        state.graph.constants.get(input_of(node, place), np.empty(0)) for place in (LENGTHS, *FIRST_STATE)
    )
    moves = not is_fixed(multiplied(beside))
    if lengths.size and (moves or not is_fixed(multiplied(long))):
        raise ConflictError(node, "it runs as far as the sequences of the traced map are long")
    if moves and any(array.any() for array in first):
        raise ConflictError(node, "it starts from values for each sequence of the traced map")
    zeros = [place for place in FIRST_STATE if input_of(node, place) in state.graph.constants]
    if not zeros or not changes_with(multiplied(beside)):
        return None

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        return [writer.replaced(node, dict.fromkeys(zeros, ""))]

    return [Interpretation(propagate(node, state), 0, rewrite, "from zeros, as many as there are sequences")]


def check(node: NodeProto, state: State) -> None:
    *_, features = _axes(node, state)
    weight = axis_sizes(state.shape(node.input[1]))[2]
    if multiplied(features) != weight:
        raise ConflictError(node, "its weights are for sequences of other values: of one size alone")
    for place in FIRST_STATE:
        name = input_of(node, place)
        if name and name not in state.graph.constants:
            at = 0 if attributes(node).get("layout") else 1
            if axis_sizes(state.shape(name))[at] != multiplied(_axes(node, state)[1]):
                raise ConflictError(node, "it starts from values for other sequences than it is given")


def _axes(node: NodeProto, state: State) -> Shape:
    """Of its input: the axis that it runs along, the one beside it, and the values."""
    first, second, values = state.shape(node.input[0])
    return (second, first, values) if attributes(node).get("layout") else (first, second, values)

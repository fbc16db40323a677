"""Operators that join tensors place by place (Add, Mul, Where): a constant of the traced map's size follows the map."""

from collections.abc import Mapping

import numpy as np
from fcn_deploy.export.dynamic_shapes.inference import broadcast
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.position_constants import PositionLaw, find_law
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.size_numbers import interpret as interpret_number
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, Shape, axis_of, fixed, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import State
from onnx import NodeProto

OPERATORS = frozenset((
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
))  # fmt: skip


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    return {node.output[0]: broadcast(node, [state.shape(name) for name in node.input if name])}


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    growing = growing_constants(node, state)
    if not growing:
        return interpret_number(node, state)
    laws = {index: find_law(node, *constant) for index, constant in growing.items()}
    shapes = [list(state.shape(name)) for name in node.input]
    for index, (_, sides) in growing.items():
        for place, size in sides.items():
            shapes[index][place] = axis_of(size) if laws[index].ramps.get(place) else ()

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        inputs = {index: laws[index].write(writer, node, sides) for index, (_, sides) in growing.items()}
        return [writer.replaced(node, inputs)]

    after = broadcast(node, [tuple(shape) for shape in shapes])
    return [
        Interpretation(
            {node.output[0]: after}, 0, rewrite, describe_laws(growing, laws),
            size_dependent=any(law.ramps for law in laws.values()),
        )
    ]  # fmt: skip


Growing = dict[
    int, tuple[np.ndarray, dict[int, SampledSize]]
]  # input → (a constant, axis of it → the size that it follows)


def growing_constants(node: NodeProto, state: State, along: int | None = None) -> Growing:
    """Inputs that are constants of the traced map's size.

    Args:
        node: that joins its inputs, or puts them together.
        state: before it.
        along: the axis of its result along which it puts them together, where sizes may differ; None: it joins.
    """
    constants = state.graph.constants
    held = [place for place, name in enumerate(node.input) if name in constants]
    others = [state.shape(name) for name in node.input if name not in constants]
    rank = max(len(state.shape(name)) for name in node.input)
    growing: Growing = {}
    for index in held if others else ():
        array = constants[node.input[index]]
        if along is not None and array.ndim != rank:
            return {}
        sides: dict[int, SampledSize] = {}
        for place in range(array.ndim):
            whole = place + rank - array.ndim
            if whole == along:
                continue
            found = {multiplied(shape[whole - rank]) for shape in others if len(shape) >= rank - whole} - {fixed(1)}
            side = found.pop() if len(found) == 1 else None
            if side is None or is_fixed(side) or array.shape[place] != side[0]:
                continue
            if array.shape[place] > 1 or along is not None:
                sides[place] = side
        if sides:
            growing[index] = array, sides
    return growing


def describe_laws(growing: Growing, laws: Mapping[int, PositionLaw]) -> str:
    return "; ".join(
        f"its constant of {list(array.shape)}: {laws[index].description}" for index, (array, _) in growing.items()
    )

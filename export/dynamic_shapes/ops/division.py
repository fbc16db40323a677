"""Div and Mul by numbers: of the places of a map, or its width and height, which no shape betrays."""

from collections.abc import Iterable
from itertools import product

import numpy as np
from fcn_deploy.export.dynamic_shapes.inference import broadcast
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, map_sizes
from fcn_deploy.export.dynamic_shapes.ops.broadcasting import interpret as interpret_constants
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, axis_sizes, changes_with, fixed, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, axes_of, name_of_node
from onnx import NodeProto, helper

USUAL_DIVISORS = 100  # up to which numbers are met by chance
POWERS = [2**power for power in range(32)] + [255, 65535]  # divide by what they mean, whatever the map


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    if state.graph.traced and state.graph.assumed.get(name_of_node(node)) != "fixed":
        _refuse_sides(node, state)
        if (found := _by_places(node, state)) is not None:
            return [found]
    return interpret_constants(node, state)


def _by_places(node: NodeProto, state: State) -> Interpretation | None:
    """The node as a division by the number of places that were summed; None: it is something else."""
    graph, count = state.graph, _divisor(node, state)
    made = _unscaled(node.input[0], state)
    if made is None or count is None:
        return None
    summed, last = _summed(made, state)
    size = summed or last
    of = None if size is None or is_fixed(size) else _of_places(count, size, made, state)
    if size is None or of is None:
        if count > USUAL_DIVISORS and count not in POWERS and map_sizes(state, count, "HW"):
            raise _meant(node, f"{count}, the places of a traced map")
        return None
    if not summed:
        raise _meant(node, f"{count}, the places of its last axis")
    times, less = of

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        total = writer.size(size, node)
        for kind, number, neutral in (("Sub", less, 0), ("Mul", times, 1)):
            if number != neutral:
                total = writer.node(kind, [total, writer.constant("number", np.array([number], np.int64))])
        total = writer.node("Cast", [total], to=graph.type_of(node.input[0]))
        return [helper.make_node("Div", [node.input[0], total], node.output, name=node.name)]

    shapes = {node.output[0]: broadcast(node, [state.shape(name) for name in node.input])}
    text = "by the number of places it sums over" + " less 1" * less + f" times {times}" * (times > 1)
    return Interpretation(shapes, 0, rewrite, f"{text} instead of {count}")


def _unscaled(name: str, state: State) -> NodeProto | None:
    """The node that a tensor is made by, but for multiplications with one number."""
    graph = state.graph
    made = graph.producers.get(name)
    while made is not None and made.op_type in ("Mul", "Div"):
        others = [other for other in made.input if other not in graph.constants or graph.constants[other].size > 1]
        if len(others) != 1:
            break
        made = graph.producers.get(others[0])
    return made


def _of_places(count: int, size: SampledSize, made: NodeProto, state: State) -> tuple[int, int] | None:
    """(times, less): a divisor is the number of places, less 1 as in variances, or times channels; None: neither."""
    if count in (size[0], size[0] - 1):
        return 1, size[0] - count
    times, rest = divmod(count, size[0])
    channels = {axis for name in (*made.input[:2], made.output[0]) for axis in axis_sizes(state.shape(name))}
    return (times, 0) if rest == 0 and fixed(times) in channels else None


def _refuse_sides(node: NodeProto, state: State) -> None:
    """Raise ConflictError where flows or places are divided by the sides of the map, as grids to sample by are."""
    graph = state.graph
    array = next((graph.constants[name] for name in node.input if name in graph.constants), None)
    if array is None or array.dtype.kind != "f" or node.input[0] in graph.constants or not array.all():
        return
    pair = array.size == 2 and {"H", "W"} <= {changes_with(size) for size in axis_sizes(state.shape(node.input[0]))}
    if not pair and (array.size != 1 or all(each.op_type != "GridSample" for each in graph.nodes)):
        return
    numbers = [float(number) if node.op_type == "Div" else 1 / float(number) for number in array.flat]
    for times, less in product((1, 2), (0, 1)):  # from 0 to 1 or -1 to 1; from edge to edge, or middle to middle
        sides = [times * number + less for number in numbers]
        if not all(side > 2 and abs(side - round(side)) <= 1e-3 for side in sides):
            continue
        followed = [{changes_with(size) for size in map_sizes(state, round(side), "H W")} for side in sides]
        if all(followed) and (not pair or len(followed[0] | followed[1]) == 2):
            text = " and ".join(f"{number:g}" for number in numbers)
            raise _meant(node, f"{text}, as a traced map's sides are")


def _meant(node: NodeProto, by: str) -> ConflictError:
    return ConflictError(node, f"it divides by {by}; --assume {name_of_node(node)}=fixed if meant")


def _divisor(node: NodeProto, state: State) -> int | None:
    """The whole number that a node divides data by, 2 or larger; None: it does not."""
    constants = state.graph.constants
    number = next((constants[name] for name in node.input if name in constants), None)
    if number is None or number.size != 1 or number.dtype.kind != "f" or node.input[0] in constants:
        return None
    value = float(number.flat[0])
    count = value if node.op_type == "Div" else 1 / value if value else 0
    return round(count) if count >= 2 and abs(count - round(count)) <= 1e-3 else None


def _summed(made: NodeProto, state: State) -> tuple[SampledSize | None, SampledSize | None]:
    """(the places that a node sums over; of a product that sums over none, its last axis)."""
    if made.op_type == "ReduceSum":
        shape = state.shape(made.input[0])
        axes: Iterable[int] = axes_of(made, state, 1, len(shape)) or range(len(shape))
        return multiplied(multiplied(shape[place]) for place in axes), None
    if made.op_type == "MatMul":
        size = multiplied(state.shape(made.input[0])[-1])
        return (None, multiplied(state.shape(made.output[0])[-1])) if is_fixed(size) else (size, None)
    return None, None

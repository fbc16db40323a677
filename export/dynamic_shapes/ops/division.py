"""Div and Mul by numbers: of the places of a map, their root, or its width and height, which no shape betrays."""

import math
from itertools import product

import numpy as np
from fcn_deploy.export.dynamic_shapes.inference import broadcast
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, map_sizes
from fcn_deploy.export.dynamic_shapes.ops.broadcasting import interpret as interpret_constants
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.size_numbers import CLOSE, POWERS, USUAL_DIVISORS
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, axis_sizes, changes_with, fixed, is_fixed
from fcn_deploy.export.dynamic_shapes.sums import divisor, summed_over, unscaled
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, name_of_node
from onnx import NodeProto, helper


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    if state.graph.traced and state.graph.assumed.get(name_of_node(node)) != "fixed":
        _refuse_sides(node, state)
        if (found := _by_places(node, state)) is not None:
            return [found]
    return interpret_constants(node, state)


def _by_places(node: NodeProto, state: State) -> Interpretation | None:
    """The node as a division by the number of places that were summed, or its root; None: it is something else."""
    graph, found = state.graph, divisor(node, state)
    made = None if found is None else unscaled(found[0], state)
    if made is None or found is None:
        return None
    data, number = found
    count = round(number) if abs(number - round(number)) <= 1e-3 else 0
    summed, last = summed_over(made, state)
    size = summed or last
    of = None if size is None or is_fixed(size) else _of_places(count, size, made, state)
    side = bool(map_sizes(state, count, "H W"))  # of a square, the root of its places is a side
    root = of is None and summed is not None and not side and abs(number - math.sqrt(summed[0])) <= 3 * CLOSE * number
    if size is None or (of is None and not root):
        if count > USUAL_DIVISORS and count not in POWERS and map_sizes(state, count, "HW"):
            raise _meant(node, f"{count}, the places of a traced map")
        return None
    if not summed:
        raise _meant(node, f"{count}, the places of its last axis")
    times, less = of or (1, 0)

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        total = writer.size(size, node)
        for kind, other, neutral in (("Sub", less, 0), ("Mul", times, 1)):
            if other != neutral:
                total = writer.node(kind, [total, writer.constant("number", np.array([other], np.int64))])
        total = writer.node("Cast", [total], to=graph.type_of(data))
        total = writer.node("Sqrt", [total]) if root else total
        return [helper.make_node("Div", [data, total], node.output, name=node.name)]

    shapes = {node.output[0]: broadcast(node, [state.shape(name) for name in node.input])}
    text = "by the root of" * root + "by" * (not root) + " the number of places it sums over"
    text += " less 1" * less + f" times {times}" * (times > 1)
    return Interpretation(shapes, 0, rewrite, f"{text} instead of {number:g}")


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

"""What a network whose sizes are free still does by numbers of one size, most likely: said, as it runs as it is.

Its shapes follow every image, so that no shape betrays them, and it is compared with itself alone.
"""

import math
from collections.abc import Iterator

from fcn_deploy.export.dynamic_shapes.ops.per_channel import uneven_dilations
from fcn_deploy.export.dynamic_shapes.size_numbers import CLOSE, USUAL_DIVISORS, is_of_channels
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, axis_sizes, changes_with, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.solver import RemainsError
from fcn_deploy.export.dynamic_shapes.sums import divisor, one_number, summed_over, unscaled
from fcn_deploy.export.dynamic_shapes.traced_graph import State, axes_of, input_of, integers, name_of_node
from fcn_deploy.export.graph.edit import attributes
from fcn_deploy.export.graph.operators import BEYOND
from onnx import NodeProto

FEW = 8  # cells, places and parts: so many are meant by themselves everywhere
MANY = 4096  # places, up to which few numbers are a logarithm of some


def half_traced(state: State) -> list[str]:
    """What nodes do by a number where the map's size is meant, most likely: the first of each kind.

    Args:
        state: at the end of a network that was followed with its numbers as they stand.

    Raises:
        RemainsError: a part of a map is taken by a number; that is asked about, as scores are seldom right with it.
    """
    counted = _counted(state)
    found: dict[str, str] = {}
    for node in state.graph.nodes:
        if not node.output[0] or node.output[0] not in state.shapes:
            continue
        for what in _of_node(node, state, counted):
            found.setdefault(node.op_type, f"{node.op_type} {name_of_node(node)} {what}")
    return [f"{text} at every size: a traced size, most likely" for text in found.values()]


def _of_node(node: NodeProto, state: State, counted: set[str]) -> Iterator[str]:
    if node.op_type in ("Mul", "Div"):
        yield from _of_number(node, state, counted)
        yield from _of_pair(node, state)
    elif node.op_type == "Conv" and (dilations := uneven_dilations(node)):
        yield f"is dilated by {'×'.join(map(str, dilations))}"
    elif node.op_type == "Gather" and input_of(node, 1) in state.graph.constants and state.is_data(node.input[0]):
        places = state.graph.constants[node.input[1]]
        axis = attributes(node).get("axis", 0) % len(state.shape(node.input[0]))
        if places.size == 1 and _moves(multiplied(state.shape(node.input[0])[axis])) and int(places.flat[0]) >= FEW:
            yield f"picks place {int(places.flat[0])} of a map"
    elif node.op_type == "TopK" and _moves(axis_sizes(state.shape(node.input[0]))[attributes(node).get("axis", -1)]):
        count = integers(node, state, "k", 1)
        if count is not None and is_fixed(count[0]) and count[0][0] > USUAL_DIVISORS // 2:
            yield f"takes the first {count[0][0]} places of a map"
    elif node.op_type == "Slice" and state.is_data(node.input[0]):
        _ask_of_slice(node, state)
    elif node.op_type == "Resize" and state.is_data(node.input[0]):
        before, after = (axis_sizes(state.shape(name)) for name in (node.input[0], node.output[0]))
        for old, new in zip(before, after, strict=True):
            if is_fixed(old) and _moves(new) and old[0] > FEW:
                yield f"enlarges a map of {old[0]} cells"
                return


def _of_number(node: NodeProto, state: State, counted: set[str]) -> Iterator[str]:
    """Of a Mul or a Div by one number: it divides sums or places by it, or it is the logarithm of many places."""
    if (by := divisor(node, state)) is not None:
        data, number = by
        if _is_of_places(data, number, state):
            yield f"divides what is summed over all places by {number:g}"
        elif data in counted and _is_whole(number) and number > FEW:
            yield f"divides places that are counted by {number:g}"
    if (found := one_number(node, state)) is not None and state.is_data(found[0]):
        log = found[1]
        places = round(math.exp(log)) if 0 < log < math.log(MANY) else 0
        if places > 2 * FEW and abs(math.log(places) - log) <= 1e-7 * log:
            yield f"goes by {log:g}, the logarithm of {places}"
        for over in (10, 100, 1000):
            part = (log - 1) * over
            places = round(part**2)
            close = 3e-7 * part * over * log  # what float32 leaves of it
            if USUAL_DIVISORS < places < MANY and math.isqrt(places) ** 2 < places and abs(part**2 - places) <= close:
                yield f"goes by {log:g}, 1 + √{places}/{over}"


def _of_pair(node: NodeProto, state: State) -> Iterator[str]:
    """Of a Mul or Div by two numbers, as of the width and height that flows are divided by, where maps are sampled."""
    graph = state.graph
    array = next((graph.constants[name] for name in node.input if name in graph.constants), None)
    if array is None or array.size != 2 or array.dtype.kind != "f" or not array.all():
        return
    numbers = [float(number) if node.op_type == "Div" else 1 / float(number) for number in array.flat]
    sides = all(_is_whole(number) and number > 2 for number in numbers)
    here = graph.place[node.output[0]]
    samplers = [index for index, each in enumerate(graph.nodes) if each.op_type == "GridSample"]
    if sides and any(here in graph.ancestors[index] for index in samplers):
        yield f"divides places to sample by {numbers[0]:g} and {numbers[1]:g}"


def _is_of_places(data: str, number: float, state: State) -> bool:
    """Whether what is divided is summed over places, by their number or its root and by nothing of channels."""
    made = unscaled(data, state)
    sums = None if made is None or made.output[0] not in state.shapes else summed_over(made, state)[0]
    if made is None or sums is None or is_fixed(sums) or is_of_channels(number, state):
        return False
    if made.op_type != "MatMul":
        return number > FEW
    # Products of queries and keys have scales of their own.
    places = round(number if _is_whole(number) else number**2)
    no_power = places > USUAL_DIVISORS and places & (places - 1) != 0
    return no_power and (_is_whole(number) or _is_whole(number**2))


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) <= 2 * CLOSE * number


def _ask_of_slice(node: NodeProto, state: State) -> None:
    """Raise RemainsError where a Slice ends, by a number that nobody said to be meant, within a map that follows."""
    sizes, name = axis_sizes(state.shape(node.input[0])), name_of_node(node)
    ends = integers(node, state, "ends", 2) or []
    axes = axes_of(node, state, 3, len(sizes)) or list(range(len(ends)))
    for place, end in zip(axes, ends, strict=False):
        if (
            _moves(sizes[place])
            and is_fixed(end)
            and FEW <= end[0] < BEYOND
            and state.graph.assumed.get(name) != "fixed"
        ):
            raise RemainsError(
                f"node {name} (Slice) goes to place {end[0]} of a map at every size: a traced size, most likely; say "
                f"--assume {name}=fixed if it is meant, or export it again with dynamic axes for N, H and W"
            )


def _moves(size: SampledSize) -> bool:
    return changes_with(size) in ("H", "W", "HW")


def _counted(state: State) -> set[str]:
    """Maps that are computed of sizes alone, such as a Range along one: places, and no pixels."""
    image = state.graph.model.graph.input[0].name
    pixels, counted = {image}, set()
    for node in state.graph.nodes:
        if node.op_type not in ("Shape", "Size") and any(name in pixels for name in node.input):
            pixels.update(node.output)
        elif node.op_type == "Range" or any(name in counted for name in node.input) or node.op_type == "CumSum":
            counted.update(node.output)
    return counted

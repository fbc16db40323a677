"""AveragePool, MaxPool, LpPool: windows of the whole traced map are of the whole map.

Means over even shares of it may be of adaptive pooling, or of windows as they are; maxima over such are refused.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from fcn_deploy.export.dynamic_shapes.inference import infer_shapes
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import Shape, axis_of, axis_sizes, fixed, is_fixed
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, name_of_node
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto, helper

FIXED = 4  # windows up to this, side by side, are of a network that halves its maps
CELLS = 12  # a side of the largest grid that adaptive pooling is asked for
WIDE = 7  # a window at least so wide and as large as the map is the whole map's


def check(node: NodeProto, state: State) -> None:
    settings = attributes(node)
    kernel = settings["kernel_shape"]
    pads, dilations = settings.get("pads", [0] * 2 * len(kernel)), settings.get("dilations", [1] * len(kernel))
    for place, side in enumerate(axis_sizes(state.shape(node.input[0]))[2:]):
        reach = (kernel[place] - 1) * dilations[place] + 1
        if reach > min(side) + pads[place] + pads[place + len(kernel)] and "auto_pad" not in settings:
            raise ConflictError(node, f"its windows of {reach} are larger than the map of {min(side)}")


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    shape, settings = state.shape(node.input[0]), attributes(node)
    kernel = settings["kernel_shape"]
    first = len(shape) - len(kernel)
    if state.graph.traced and state.graph.assumed.get(name_of_node(node)) != "fixed":
        _refuse_rounded_shares(node, state)
    if not _is_unpadded(node) or settings.get("ceil_mode") or len([name for name in node.output if name]) > 1:
        return None
    windows = f"windows of {'×'.join(map(str, kernel))}"
    stays = Interpretation(infer_shapes(node, state), description=f"{windows} as they are")
    along = [
        first + place
        for place, (width, side) in enumerate(zip(kernel, axis_sizes(shape)[first:], strict=True))
        if width == side[0] > 1 and not is_fixed(side)
    ]
    if along:
        usual = node.op_type == "AveragePool" and max(kernel) >= WIDE
        return [_over_whole_map(node, shape, along, windows), replace(stays, cost=1 if usual else 0)]
    if not state.graph.traced:
        return [stays]
    if state.graph.assumed.get(name_of_node(node)) == "fixed" or not _shares_evenly(node, state):
        return [stays]
    cells = _cells(node, state)
    if cells is not None and _is_adaptive(node, state):
        # Windows of another shape than 1:1, in that of the map, are hardly meant as they are.
        return [_over_shares(node, state, cells, windows), replace(stays, cost=1 if len(set(kernel)) > 1 else 0)]
    return [replace(stays, assumption=f"{windows} are taken for fixed ones, not for shares of the map")]


def _over_shares(node: NodeProto, state: State, cells: Sequence[int], windows: str) -> Interpretation:
    """Means over shares of the map, as adaptive pooling to so many cells has them; those of uneven shares overlap."""
    shape, kind = state.shape(node.input[0]), state.graph.type_of(node.input[0])

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        rows, columns = (
            _weights(writer, writer.axis(shape[place], node), count, kind)
            for place, count in zip((2, 3), cells, strict=True)
        )
        half = writer.node("MatMul", [rows, node.input[0]])
        columns = writer.node("Transpose", [columns], perm=[1, 0])
        return [helper.make_node("MatMul", [half, columns], node.output, name=node.name)]

    after = (*shape[:2], *(axis_of(fixed(count)) for count in cells))
    text = f"over shares of the map, {'×'.join(map(str, cells))} of them, instead of {windows}"
    return Interpretation({node.output[0]: after}, 0, rewrite, text, size_dependent=True)


def _weights(writer: ShapeWriter, size: str, cells: int, kind: int) -> str:
    """The weight of each place along an axis in the mean of each cell, [cells, places]; `size`: a list of one."""
    number = {n: writer.constant("number", np.array(n, np.int64)) for n in (0, 1, cells, cells - 1)}
    cell = np.arange(cells, dtype=np.int64)[:, None]
    scalar = writer.node("Reshape", [size, writer.constant("scalar", np.zeros(0, np.int64))])
    place = writer.node("Range", [number[0], scalar, number[1]])
    first = writer.node("Div", [writer.node("Mul", [writer.constant("cell", cell), size]), number[cells]])
    behind = writer.node("Mul", [writer.constant("cell", cell + 1), size])
    behind = writer.node("Div", [writer.node("Add", [behind, number[cells - 1]]), number[cells]])
    too_early, too_late = (writer.node("Less", pair) for pair in ([place, first], [place, behind]))
    inside = writer.node("And", [writer.node("Not", [too_early]), too_late])
    inside = writer.node("Cast", [inside], to=kind)
    count = writer.node("Cast", [writer.node("Sub", [behind, first])], to=kind)
    return writer.node("Div", [inside, count])


def _over_whole_map(node: NodeProto, shape: Shape, along: Sequence[int], windows: str) -> Interpretation:
    """The mean or the maximum along axes, which the windows span."""
    settings, mean = attributes(node), node.op_type == "AveragePool"
    kernel = settings["kernel_shape"]
    strides = settings.get("strides", [1] * len(kernel))
    first = len(shape) - len(kernel)
    others = [place for place in range(len(kernel)) if first + place not in along]
    if any(kernel[place] != 1 or strides[place] != 1 for place in others):
        raise ConflictError(node, f"its {windows} span the traced map one way and share it the other")

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        if others:
            return [writer.reduce("ReduceMean" if mean else "ReduceMax", node, along)]
        kind = "GlobalAveragePool" if mean else "GlobalMaxPool"
        return [helper.make_node(kind, node.input[:1], node.output, name=node.name)]

    after = tuple(() if place in along else factors for place, factors in enumerate(shape))
    return Interpretation({node.output[0]: after}, 0, rewrite, f"over the whole map instead of {windows}")


def _shares_evenly(node: NodeProto, state: State) -> bool:
    """Whether windows side by side cover the traced map evenly."""
    return _grid(node, state) not in (None, 1)


def _is_adaptive(node: NodeProto, state: State) -> bool:
    """Whether even windows may be of adaptive pooling: as wide as a share of the map, alone or of a pyramid.

    Raises:
        ConflictError: they are, most likely, and maxima, which are not freed.
    """
    others = [
        other
        for other in state.graph.index.consumers(node.input[0])
        if other.op_type.endswith(node.op_type) and attributes(other).get("kernel_shape") != _kernel(node)
    ]
    grids = [_grid(node, state), *(_grid(other, state) for other in others)]
    few = all(cells is not None and cells <= CELLS for cells in grids)
    if not few or not (others or max(_kernel(node)) > FIXED):
        return False
    if node.op_type != "AveragePool" or len(_kernel(node)) != 2:
        raise ConflictError(
            node,
            f"its windows of {'×'.join(map(str, _kernel(node)))} share the traced map evenly: adaptive pooling, most "
            f"likely, whose windows change with the size (--assume {name_of_node(node)}=fixed: they do not)",
        )
    return True


def _refuse_rounded_shares(node: NodeProto, state: State) -> None:
    """Raise ConflictError where windows are shares of the traced map, rounded up, the last of which go beyond it."""
    kernel, settings = _kernel(node), attributes(node)
    pads = settings.get("pads", [0] * 2 * len(kernel))
    beyond = settings.get("ceil_mode") or any(pads[len(kernel) :])
    if not beyond or any(pads[: len(kernel)]) or kernel != settings.get("strides") or max(kernel) <= FIXED:
        return
    sides = axis_sizes(state.shape(node.input[0]))[-len(kernel) :]
    cells = [-(-side[0] // width) for width, side in zip(kernel, sides, strict=True)]
    shares = all(-(-side[0] // count) == width for width, side, count in zip(kernel, sides, cells, strict=True))
    if shares and 1 < max(cells) <= CELLS and not all(map(is_fixed, sides)):
        raise ConflictError(
            node,
            f"its windows of {'×'.join(map(str, kernel))} are shares of the traced map, rounded up, most likely "
            f"(--assume {name_of_node(node)}=fixed: they are not)",
        )


def _kernel(node: NodeProto) -> list[int]:
    return list(attributes(node).get("kernel_shape", ()))


def _grid(node: NodeProto, state: State) -> int | None:
    """The most cells a side that windows, as adaptive pooling writes them, make of the traced map; None: others."""
    if not _kernel(node):
        return 1  # of the whole map
    cells = _cells(node, state)
    sides = axis_sizes(state.shape(node.input[0]))[-len(_kernel(node)) :]
    return (
        None if cells is None else max(1 if is_fixed(side) else count for side, count in zip(sides, cells, strict=True))
    )


def _cells(node: NodeProto, state: State) -> list[int] | None:
    """How many cells windows, as adaptive pooling writes them, make of each side of the traced map; None: others."""
    kernel, settings = _kernel(node), attributes(node)
    if not _is_unpadded(node) or settings.get("ceil_mode"):
        return None
    sides = axis_sizes(state.shape(node.input[0]))[-len(kernel) :]
    cells = []
    for width, step, side in zip(kernel, settings.get("strides", [1] * len(kernel)), sides, strict=True):
        count = (side[0] - width) // step + 1
        if count < 1 or step != side[0] // count or width != side[0] - (count - 1) * step:
            return None
        cells.append(count)
    return cells


def _is_unpadded(node: NodeProto) -> bool:
    settings = attributes(node)
    return not any(settings.get("pads", ())) and settings.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")

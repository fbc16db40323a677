"""The size that a network was traced with, from its input, or by what its numbers fit."""

from collections.abc import Iterator

import numpy as np
from fcn_deploy.export.dynamic_shapes.ops.broadcasting import OPERATORS as BROADCASTING
from fcn_deploy.export.dynamic_shapes.solver import REMEDY, Solver
from fcn_deploy.export.dynamic_shapes.traced_graph import TracedGraph
from fcn_deploy.export.graph.edit import attributes, dims
from fcn_deploy.runtime.errors import DeployError
from onnx import NodeProto

UNLIKELY = (704, 832)  # a size that no network is made for
FACTORS = (1, 2, 4, 8, 16, 32, 64)  # of a size that is found in a graph to the image's, at most
LARGEST = 1 << 16  # of a side of an image


def find_traced_size(
    graph: TracedGraph, places: tuple[int, int], batch: int, size: tuple[int, int] | None
) -> tuple[int, int, int]:
    """(N, H, W) that a network was traced with; where none of its numbers is for a size, sets graph.traced so.

    Args:
        graph: whose input may tell, or not.
        places: the axes of H and W in its input.
        batch: N.
        size: (height, width) that it is known to run at, if any is.

    Raises:
        DeployError: its numbers fit none of the sizes that are likely.
    """
    shape = dims(graph.model.graph.input[0])
    height, width = (side if isinstance(side, int) and side > 0 else None for side in (shape[at] for at in places))
    if height is not None and width is not None:
        return batch, height, width
    tried: dict[tuple[int, int], None] = {}
    for rows, columns in (UNLIKELY, *([size] if size else []), *_likely_sizes(graph)):
        pair = height or rows, width or columns
        if pair in tried:
            continue
        tried[pair] = None
        try:
            Solver(graph, places, (batch, *pair), free="").solve()
        except DeployError:
            continue
        # What fits a size that no network is made for has no number that is for one.
        graph.traced = (height, width) != (None, None) or pair != UNLIKELY
        return batch, *pair
    raise DeployError(
        f"the model's input is {shape}, but at none of {len(tried)} likely sizes do its numbers fit it; "
        f"give its input the height and width it was traced with, or {REMEDY}"
    )


def _likely_sizes(graph: TracedGraph) -> Iterator[tuple[int, int]]:
    """Those that the graph's numbers hint at."""
    found: list[tuple] = [tuple(dims(value)[-2:]) for value in graph.model.graph.output]
    for node in graph.nodes:
        found += _hints(graph, node)
    for pair in dict.fromkeys(found):
        sides = [int(side) for side in pair if isinstance(side, int | np.integer) and 1 < side < LARGEST]
        if len(pair) == len(sides) == 2:
            for factor in FACTORS:
                yield sides[0] * factor, sides[1] * factor


def _hints(graph: TracedGraph, node: NodeProto) -> list[tuple]:
    """Pairs of numbers in a node that may be a map's height and width."""
    numbers = [graph.constants[name] for name in node.input if name in graph.constants]
    if node.op_type in ("AveragePool", "MaxPool"):
        return [tuple(attributes(node).get("kernel_shape", ())[-2:])]
    if node.op_type in ("Resize", "Reshape", "Expand", "Concat", "Slice", "MaxUnpool"):
        return [tuple(array.flat[-2:]) for array in numbers if array.dtype == np.int64 and 2 <= array.size <= 8]
    if node.op_type in BROADCASTING:
        return [array.shape[-2:] for array in numbers if array.ndim >= 3]
    return []

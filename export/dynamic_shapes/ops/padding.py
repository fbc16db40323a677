"""Padding, of Pad and of operators that pad by themselves: wider behind than before, it may fill up to a multiple."""

import math
from collections.abc import Sequence

from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, axis_sizes, changes_with, fixed, is_fixed
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, axes_of, needed_integers
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def assume(node: NodeProto, state: State) -> tuple[str, int]:
    """(what is taken for granted, what H and W must be multiples of) of padding that differs before and behind.

    "Same" padding is as wide on both sides, or by one wider on one, by where the stride falls. What is wider fills up
    to something.

    Raises:
        ConflictError: it fills the traced map up to a multiple.
    """
    sides, wider, multiple = axis_sizes(state.shape(node.input[0])), [], 1
    for place, before, behind in zip(*_pads(node, state), strict=True):
        side, gap = sides[place], abs(before[0] - behind[0])
        if len(changes_with(side)) != 1 or not (is_fixed(before) and is_fixed(behind)) or gap == 0:
            continue
        whole = state.image[changes_with(side)]
        # Divided by a higher power of 2 than before.
        filled = math.gcd(side[0] + gap, 1 << 30) > math.gcd(side[0], 1 << 30)
        if (gap > 1 and filled) or (gap == 1 and (side[0] % 2 or whole[0] % side[0])):
            raise ConflictError(
                node,
                f"it pads {side[0]} by {before[0]} and {behind[0]}: up to a multiple, most likely, and by another "
                "number at other sizes; trace it at a size that needs none",
            )
        if gap == 1:
            readers = state.graph.index.consumers(node.output[0]) if node.op_type == "Pad" else [node]
            steps = [max(attributes(reader).get("strides", [1])) for reader in readers]
            multiple = math.lcm(multiple, whole[0] // side[0] * max(2, *steps))
        else:
            wider.append(f"{before[0]} before and {behind[0]} behind")
    return f"{' and '.join(wider)} are added at every size" if wider else "", multiple


def _pads(node: NodeProto, state: State) -> tuple[Sequence[int], Sequence[SampledSize], Sequence[SampledSize]]:
    """(the axes that a node pads, by how much before them, by how much behind)."""
    rank = len(state.shape(node.input[0]))
    if node.op_type == "Pad":
        pads = needed_integers(node, state, "pads", 1)
        axes = axes_of(node, state, 3, rank) or list(range(rank))
    else:
        axes = list(range(2, rank))
        pads = [fixed(number) for number in attributes(node).get("pads", [0] * (2 * len(axes)))]
    half = len(pads) // 2
    return axes[:half], pads[:half], pads[half:]

"""Padding, of Pad and of operators that pad by themselves: wider behind than before, it may fill up to a multiple.

A Pad whose amounts are a number less the image's size pads or crops every image to the traced one: "same" padding that
was traced in half, most likely, whose amounts at the traced size are those of all sizes that its stride divides alike.
"""

import math
from collections.abc import Sequence

import numpy as np
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation, coarsest
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import (
    SampledSize,
    added,
    axis_of,
    axis_sizes,
    changes_with,
    fixed,
    is_fixed,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, axes_of, needed_integers
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    """Of a Pad; None: its amounts are no remainder of the traced size."""
    if not state.graph.traced:
        return None
    rank = len(state.shape(node.input[0]))
    sizes, after, multiple, numbers = (
        axis_sizes(state.shape(node.input[0])),
        list(state.shape(node.input[0])),
        1,
        [0] * (2 * rank),
    )
    baked = False
    for place, before, behind in zip(*_pads(node, state), strict=True):
        total = added([before, behind])
        if _shrinks(sizes[place], total):
            found = _same_padding(node, state, place, total)
            if found is None:
                return None
            baked, multiple = True, math.lcm(multiple, found)
        elif not (is_fixed(before) and is_fixed(behind)):
            return None
        numbers[place], numbers[place + rank] = before[0], behind[0]
        if total[0]:
            after[place] = axis_of(added([sizes[place], fixed(total[0])]))
    if not baked:
        return None

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        return [writer.replaced(node, {1: writer.constant("pads", np.array(numbers, np.int64))}, count=3)]

    text = f"by {numbers} at every size, where it was up to the size it was traced at"
    return [Interpretation({node.output[0]: tuple(after)}, 0, rewrite, text, multiple=multiple)]


def _shrinks(side: SampledSize, total: SampledSize) -> bool:
    """Whether an axis is padded by less, or cropped by more, wherever it is longer, as by a number less its length."""
    return len(changes_with(side)) == 1 and all(
        more < total[0] if length > side[0] else more == total[0] for length, more in zip(side, total, strict=True)
    )


def _same_padding(node: NodeProto, state: State, place: int, total: SampledSize) -> int | None:
    """What H or W must be a multiple of for "same" padding to be what it was when traced, along an axis.

    None: it pads what is smaller than some size, and nothing else.

    Raises:
        ConflictError: every image comes to the traced size, by no "same" padding; or that tells no multiple.
    """
    side = axis_sizes(state.shape(node.input[0]))[place]
    windows = [_window(reader, state, place) for reader in state.graph.index.consumers(node.output[0])]
    told = f"it pads or crops every image to {side[0] + total[0]}, by that number less the image's size"
    # TensorFlow's rule.
    same = bool(windows) and all(
        window is not None and total[0] == max((-(-side[0] // window[1]) - 1) * window[1] + window[0] - side[0], 0)
        for window in windows
    )
    if not same:
        if is_fixed(added([side, total])):
            raise ConflictError(node, told)
        return None
    step = math.lcm(*(window[1] for window in windows if window is not None))
    whole = state.image[changes_with(side)]
    if step > 1 and (side[0] % step or whole[0] % side[0]):
        raise ConflictError(node, f"{told}; what it pads at others shows at a multiple of {step} alone")
    return whole[0] // side[0] * step if step > 1 else 1


def _window(node: NodeProto, state: State, place: int) -> tuple[int, int] | None:
    """(cells that a window of a node spans along an axis, by how many it moves on); None: it has no windows."""
    settings = attributes(node)
    if node.op_type not in ("Conv", "AveragePool", "MaxPool", "LpPool", "ConvInteger") or any(settings.get("pads", ())):
        return None
    kernel = settings.get("kernel_shape") or [size[0] for size in axis_sizes(state.shape(node.input[1]))[2:]]
    if not 0 <= place - 2 < len(kernel):
        return None
    dilation, step = (settings.get(name, [1] * len(kernel))[place - 2] for name in ("dilations", "strides"))
    return (kernel[place - 2] - 1) * dilation + 1, step


def assume(node: NodeProto, state: State) -> tuple[str, int]:
    """(what is taken for granted, what H and W must be multiples of) of padding that differs before and behind.

    "Same" padding is as wide on both sides, or by one wider on one, by where the stride falls. What is wider fills up
    to something.

    Raises:
        ConflictError: it fills the traced map up to a multiple.
    """
    _refuse_square(node, state)
    sides, wider, multiple = axis_sizes(state.shape(node.input[0])), [], 1
    for place, before, behind in zip(*_pads(node, state), strict=True):
        side, gap = sides[place], abs(before[0] - behind[0])
        if _pads_nothing(node, side, before, behind):
            multiple = math.lcm(multiple, coarsest(state, changes_with(side)))
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


def _refuse_square(node: NodeProto, state: State) -> None:
    """Raise ConflictError where padding makes a square of the traced map: by other numbers elsewhere, most likely.

    Of what a convolution pads by itself, that is what is wider on one side.
    """
    sides, lengths = axis_sizes(state.shape(node.input[0])), {}
    if len(sides) != 4:
        return
    for place, before, behind in zip(*_pads(node, state), strict=True):
        if not (is_fixed(before) and is_fixed(behind)):
            return
        if changes_with(sides[place]) in ("H", "W"):
            more = before[0] + behind[0] if node.op_type == "Pad" else abs(before[0] - behind[0])
            lengths[changes_with(sides[place])] = sides[place][0], more
    (height, down), (width, right) = lengths.get("H", (0, 0)), lengths.get("W", (0, 0))
    if height != width and 0 in (down, right) and height + down == width + right:
        raise ConflictError(
            node, f"it makes a square of {height}×{width}, and would add other numbers at other sizes, most likely"
        )


def _pads_nothing(node: NodeProto, side: SampledSize, before: SampledSize, behind: SampledSize) -> bool:
    """Whether a Pad adds nothing to the traced map: at other sizes it may fill up to a multiple."""
    zero = node.op_type == "Pad" and is_fixed(before) and is_fixed(behind) and before[0] == behind[0] == 0
    return zero and changes_with(side) in ("H", "W")


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

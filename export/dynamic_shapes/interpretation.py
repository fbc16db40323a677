"""What the numbers in a node can stand for at other sizes of the image: interpretations, and sizes that they may be."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, Shape, changes_with, is_sum, multiplied, scaled
from fcn_deploy.export.dynamic_shapes.traced_graph import State, Values
from onnx import NodeProto

Rewrite = Callable[[ShapeWriter], list[NodeProto]]


@dataclass(frozen=True)
class Interpretation:
    """What a node's numbers can stand for.

    Attributes:
        shapes: of its outputs.
        cost: 0 where it is as good as others of cost 0; higher: taken only where no better one holds.
        rewrite: the nodes that replace the node; None: the node stays.
        description: of what the numbers were taken for, for the note; "": it stays.
        values: of its outputs, where they are arithmetic on shapes.
        size_dependent: whether its values depend on the image's size, as a grid's from edge to edge do.
        assumption: what was taken for granted where the node stays, for the note; "": nothing.
        multiple: what H and W must be multiples of for the node to be what it was.
    """

    shapes: dict[str, Shape]
    cost: int = 0
    rewrite: Rewrite | None = None
    description: str = ""
    values: dict[str, Values] = field(default_factory=dict)
    size_dependent: bool = False
    assumption: str = ""
    multiple: int = 1


def map_sizes(state: State, number: int, letters: str) -> list[SampledSize]:
    """Sizes of maps so far that were `number` when traced and change with one of `letters`, the latest first.

    `letters`: such as "N H W", or "H HW" for sizes of H alone, or of both. Where no number is for a size, they are of
    the batch alone.
    """
    if not state.graph.traced:
        letters = "N" if "N" in letters.split() else ""
    found = [
        multiplied(factors)
        for name in reversed(state.shapes)
        if len(state.shapes[name]) >= 3 and state.is_data(name)
        for factors in state.shapes[name]
    ]
    return list(dict.fromkeys(s for s in found if s[0] == number and changes_with(s) in letters.split()))


def candidates(state: State, size: SampledSize, number: int) -> list[SampledSize]:
    """What `number` can be where a map has `size`: a simple share of it, or the size of another map."""
    letters = changes_with(size)
    found: list[SampledSize | None] = []
    if letters and (state.graph.traced or letters == "N"):
        ratio = Fraction(number, size[0])
        if 1 in (ratio.numerator, ratio.denominator) or ratio.denominator <= 4:
            found = [scaled(size, ratio.numerator, ratio.denominator)]
    wanted = "H W HW" if is_sum(size) else letters or "H W"
    return list(dict.fromkeys(s for s in (*found, *map_sizes(state, number, wanted)) if s is not None))


def coarsest(state: State, letter: str) -> int:
    """What H or W must be a multiple of for all maps so far to be whole shares of it, as they are when traced."""
    whole = state.image[letter][0]
    strides = {
        whole // size[0]
        for name, shape in state.shapes.items()
        if len(shape) >= 3 and state.is_data(name)
        for factors in shape
        for size in factors
        if changes_with(size) == letter and size[0] > 1 and whole % size[0] == 0
    }
    return math.lcm(1, *strides)

"""Nearest neighbours where PyTorch reads, which at ties is not where a Resize does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.analysis.map_shapes import PERIOD, MapShapes
from fcn_deploy.export.analysis.model_end import AS_PYTORCH
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, TensorProto

CHECKED = 1 << 15  # pixels, up to which a ratio that is the same at all sizes is tried
MOST = 3  # sizes with ties that are given
SEARCHED = 512  # pixels of an image, up to which a tie is looked for

Pairs = Sequence[tuple[int, int]]  # cells of a map and of what it is resized to, by image


@dataclass(frozen=True)
class NearestAsPytorch(PassResult):
    """A model after this pass, and (height, width) of images at which it is not what it was: at which nodes tie."""

    ties: tuple[tuple[int, int], ...] = ()


def nearest_as_pytorch(model: ModelProto, multiple: int = 1, smallest: int = 1) -> NearestAsPytorch:
    """A network that PyTorch's exporters wrote, equal to PyTorch's where nearest neighbours tie.

    From 30 cells to 58, pixel 29 lies at 29 · 30 / 58, which is 15. PyTorch multiplies by 30 / 58 in float32, which
    gives less, and reads cell 14; a Resize divides by 58 / 30, and reads cell 15. So PyTorch's arithmetic is written
    out, and gathers the cells. A Resize stays where both read the same at every size: from one cell, by factors of two
    and most others, and from ⌈n/2⌉ to n.

    Args:
        model: float32 [N,C,H,W] → scores.
        multiple: H and W are multiples of it.
        smallest: and so large at least.
    """
    edit = Rewrite(model)
    found = [node for node in edit.graph if _reads_as_floor(node)]
    if not found:
        return NearestAsPytorch(model, why_not="no Resize takes nearest neighbours as PyTorch's exporters write them")
    shapes, changed = MapShapes(model, multiple, smallest), False
    ties: list[tuple[int, int]] = []
    for node in found:
        try:
            sides = _sides(node, shapes)
        except Exception:  # of ONNX Runtime, at a size that fails: the comparison with PyTorch says why
            return NearestAsPytorch(model, why_not="the network does not run at every size")
        scales = _scales(node)
        if any(_may_tie(pairs, scales.get(axis)) for axis, pairs in sides.items()):
            if len(sides) == 2:
                ties.append((_tie(shapes.sizes, 0, sides[2], multiple), _tie(shapes.sizes, 1, sides[3], multiple)))
            _gather(edit, node, [axis for axis, pairs in sides.items() if any(a != b for a, b in pairs)], scales)
            changed = True
    if not changed:
        return NearestAsPytorch(model, why_not="no nearest neighbours tie")
    edit.prune()
    return NearestAsPytorch(edit.model(), ties=tuple(dict.fromkeys(ties))[:MOST])


def _reads_as_floor(node: ir.Node) -> bool:
    given = node.attributes
    return (
        not node.domain
        and node.op_type == "Resize"
        and given.get_string("mode", "nearest") == "nearest"
        and given.get_string("coordinate_transformation_mode", "half_pixel") == "asymmetric"
        and given.get_string("nearest_mode", "round_prefer_floor") == "floor"
        and "axes" not in given
    )


def _scales(node: ir.Node) -> dict[int, float]:
    """The factor of each axis, where a Resize goes by constants; {} where it goes to a size."""
    if input_of(node, 3) is not None or (scales := constant(input_of(node, 2))) is None:
        return {}
    # As decimals, which are what was written before it was rounded to float32.
    return {axis: float(str(scale)) for axis, scale in enumerate(scales)}


def _sides(node: ir.Node, shapes: MapShapes) -> dict[int, list[tuple[int, int]]]:
    """How many cells there are before and after a Resize at each of the sizes, by axis."""
    before, after = shapes.of(name_of(needed_input(node))), shapes.of(name_of(node.outputs[0]))
    return {
        axis: [(old[axis], new[axis]) for old, new in zip(before, after, strict=True)]
        for axis in range(2, len(before[0]))
    }


def _may_tie(pairs: Pairs, scale: float | None) -> bool:
    """Whether PyTorch may read another cell than a Resize, at some size."""
    if all(old == 1 or old == new for old, new in pairs):
        return False
    if scale is not None:
        x = np.arange(CHECKED, dtype=np.float32)
        return not np.array_equal(np.floor(x * np.float32(1 / scale)), np.floor(x / np.float32(scale)))
    if all(old == -(-new // 2) for old, new in pairs):
        return False  # cell i is ⌊i/2⌋ by either
    ratios = {Fraction(old, new) for old, new in pairs}
    if len(ratios) > 1:
        return True
    (old, new), length = ratios.pop().as_integer_ratio(), CHECKED if len(set(pairs)) > 1 else pairs[0][1]
    return not np.array_equal(_read(old, new, length), _read_by_resize(old, new, length))


def _read(old: int, new: int, length: int) -> np.ndarray:
    """The cells that PyTorch reads, before they are kept within the map."""
    return np.floor(np.arange(length, dtype=np.float32) * (np.float32(old) / np.float32(new)))


def _read_by_resize(old: int, new: int, length: int) -> np.ndarray:
    return np.floor(np.arange(length, dtype=np.float32) / (np.float32(new) / np.float32(old)))


def _tie(sizes: Sequence[tuple[int, int]], place: int, pairs: Pairs, multiple: int) -> int:
    """The least side of an image, of those looked at, at which PyTorch reads another cell; else a usual one.

    Args:
        sizes: at which the pairs were found.
        place: of the axis in a size.
    """
    known = dict(zip((size[place] for size in sizes), pairs, strict=True))
    for side in range(min(known), SEARCHED, multiple):
        old, new = known.get(side) or _grown(known, side)
        if new > 0 and not np.array_equal(_read(old, new, new), _read_by_resize(old, new, new)):
            return side
    return sizes[len(sizes) // 2][place]


def _grown(known: Mapping[int, tuple[int, int]], side: int) -> tuple[int, int]:
    """(cells before, cells after) at a larger side, by what maps grow by after PERIOD; (0, 0) where that is unknown."""
    largest = max(known)
    low, base = largest % PERIOD, side % PERIOD
    if low not in known or base not in known or largest == low:
        return 0, 0
    share = Fraction(side - base, largest - low)
    old, new = (known[base][k] + share * (known[largest][k] - known[low][k]) for k in (0, 1))
    return int(old), int(new)


def _gather(edit: Rewrite, node: ir.Node, axes: Sequence[int], scales: Mapping[int, float]) -> None:
    """Write a Resize as what gathers the cells that PyTorch reads, axis by axis, the last first: it is the smallest."""
    value, result = needed_input(node), node.outputs[0]
    name = f"{name_of(result)}/{AS_PYTORCH}"

    def add(operator: str, inputs: Sequence[ir.Value], what: str, **attributes: Any) -> ir.Value:
        return edit.node(operator, inputs, f"{name}/{what}", before=node, **attributes)

    shape = add("Shape", [value], "shape")
    for axis in reversed(axes):
        at = edit.constant(f"{name}/{axis}/axis", np.array(axis))
        cells = add("Cast", [add("Gather", [shape, at], f"{axis}/side")], f"{axis}/cells", to=TensorProto.FLOAT)
        if scales:
            factor, step = np.float32(scales[axis]), np.float32(1 / scales[axis])
            length = add("Mul", [cells, edit.constant(f"{name}/{axis}/factor", factor)], f"{axis}/length")
            pixels = add("Cast", [add("Floor", [length], f"{axis}/whole")], f"{axis}/pixels", to=TensorProto.INT64)
            ratio = edit.constant(f"{name}/{axis}/ratio", step)
        else:
            pixels = add("Gather", [needed_input(node, 3), at], f"{axis}/pixels")
            ratio = add("Div", [cells, add("Cast", [pixels], f"{axis}/new", to=TensorProto.FLOAT)], f"{axis}/ratio")
        none, one = edit.constant(f"{name}/{axis}/from", np.array(0)), edit.constant(f"{name}/{axis}/by", np.array(1))
        places = add("Range", [none, pixels, one], f"{axis}/places")
        places = add("Mul", [add("Cast", [places], f"{axis}/x", to=TensorProto.FLOAT), ratio], f"{axis}/read")
        last = add("Sub", [cells, edit.constant(f"{name}/{axis}/one", np.float32(1))], f"{axis}/last")
        kept = add("Min", [add("Floor", [places], f"{axis}/floor"), last], f"{axis}/kept")
        indices = add("Cast", [kept], f"{axis}/indices", to=TensorProto.INT64)
        value = add("Gather", [value, indices], f"{axis}", axis=axis)
    edit.replace(result, value)
    edit.remove(node)

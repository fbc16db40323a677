"""A Resize to the size of another map, as the Resize by a factor that it is."""

from fractions import Fraction

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.analysis.map_shapes import MapShapes
from fcn_deploy.export.graph.rewrite import Rewrite, constant, input_of, name_of, needed_input
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

# Where a cell of the result looks, whatever the sizes are, once the factor is known.
BY_FACTOR = ("half_pixel", "pytorch_half_pixel", "asymmetric")
LARGEST = 64  # factor; what is larger is a pooled value that is spread over a map


def resize_by_factor(core: ModelProto, multiple: int = 1, smallest: int = 1) -> PassResult:
    """An equal network whose decoders go by factors where they went to the size of a skip, as U-Nets do.

    A Resize to a computed size is one by a factor where its result is that many times its input at every size that the
    network is run at. Where it takes every size, a map of ⌈n/2⌉ cells goes to n: by nearest neighbours, cell i reads
    ⌊i·⌈n/2⌉/n⌋, which is ⌊i/2⌋ for all i < n. So it is a Resize by two, cropped to n. By linear interpolation it is
    not, as odd sizes stretch the map.

    Args:
        core: float32 [N,C,H,W] → scores.
        multiple: H and W are multiples of it.
        smallest: and so large at least.
    """
    edit = Rewrite(core)
    found = [node for node in edit.graph if _goes_to_computed_size(node)]
    if not found:
        return PassResult(core, why_not="no Resize goes to a size that is computed")
    shapes, changed = MapShapes(core, multiple, smallest), 0
    for node in found:
        try:
            factors, crops = _factors(node, shapes)
        except Exception:  # of ONNX Runtime, at a size that fails: nothing is known of it
            continue
        if factors is not None:
            _by_factor(edit, node, factors, shapes if crops else None)
            changed += 1
    if not changed:
        return PassResult(core, why_not="no Resize to a computed size has the same factor at every size")
    edit.prune()
    return PassResult(edit.model())


def computed_resizes(model: ModelProto) -> list[str]:
    """The names of what Resizes give that this pass may rewrite."""
    return [name_of(node.outputs[0]) for node in Rewrite(model).graph if _goes_to_computed_size(node)]


def _goes_to_computed_size(node: ir.Node) -> bool:
    if node.domain or node.op_type != "Resize" or input_of(node, 3) is None or constant(input_of(node, 3)) is not None:
        return False
    given = node.attributes
    usual = given.get_string("coordinate_transformation_mode", "half_pixel") in BY_FACTOR
    plain = not given.get_int("antialias", 0) and given.get_ints("axes", [2, 3])[-2:] == [2, 3]
    return usual and plain and given.get_string("keep_aspect_ratio_policy", "stretch") == "stretch"


def _factors(node: ir.Node, shapes: MapShapes) -> tuple[tuple[Fraction, Fraction] | None, bool]:
    """(the factors of H and W, None where they are none; whether the result is cropped)."""
    given, found, crops = node.attributes, [], False
    nearest = (
        given.get_string("mode", "nearest") == "nearest"
        and given.get_string("coordinate_transformation_mode", "half_pixel") == "asymmetric"
        and given.get_string("nearest_mode", "round_prefer_floor") == "floor"
    )
    for axis in (2, 3):
        before = shapes.sides(name_of(needed_input(node)), axis)
        after = shapes.sides(name_of(node.outputs[0]), axis)
        ratios = {Fraction(new, old) for new, old in zip(after, before, strict=True)}
        factor = ratios.pop()
        # Of other denominators a float32 is no exact factor.
        if not ratios and factor <= LARGEST and factor.denominator in (1, 2, 4, 8, 16, 32):
            found.append(factor)
        elif nearest and before == [-(-new // 2) for new in after]:
            found.append(Fraction(2))
            crops = True
        else:
            return None, False
    return (found[0], found[1]), crops


def _by_factor(edit: Rewrite, node: ir.Node, factors: tuple[Fraction, Fraction], shapes: MapShapes | None) -> None:
    """Rewrite a Resize; `shapes`: where its result is cropped to what it was."""
    result, sizes = node.outputs[0], needed_input(node, 3)
    name = name_of(result)
    node.attributes.pop("axes", None)
    node.replace_input_with(2, edit.constant(f"{name}/factors", np.array([1, 1, *map(float, factors)], np.float32)))
    node.replace_input_with(3, None)
    if shapes is None:
        return
    # The size of a map nearby, rather than the image's: a network that is cut in two has it in the same part.
    like = shapes.equal_to(name, name)
    two, four = edit.constant(f"{name}/first_side", np.array([2])), edit.constant(f"{name}/after_sides", np.array([4]))
    if like is not None:
        sizes = edit.node("Shape", [edit.value(like)], f"{name}/like", before=node)
        sides = edit.node("Slice", [sizes, two, four], f"{name}/sides", before=node)
    else:
        last = edit.constant(f"{name}/last_sides", np.array([-2])), edit.constant(f"{name}/end", np.array([2**31]))
        sides = edit.node("Slice", [sizes, *last], f"{name}/sides", before=node)
    starts, axes = edit.constant(f"{name}/starts", np.array([0, 0])), edit.constant(f"{name}/axes", np.array([2, 3]))
    edit.follow_with(result, "Slice", f"{name}/cropped", starts, sides, axes)

"""Make a network that wants multiples of some size take every size: pad before it, crop after it."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.analysis.model_end import PAD_MULTIPLE, PAD_SMALLEST, PADDED
from fcn_deploy.export.graph.rewrite import Rewrite, declare, dims, reroute
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto


def pad_and_crop(model: ModelProto, multiple: int, smallest: int = 1) -> PassResult:
    """A model of float [N,C,H,W] → [N,K,H,W] for H and W ≥ 1, from one for multiples of `multiple` ≥ `smallest`.

    Zeros go right and bottom, up to `smallest` pixels and then to the multiple. The arithmetic is
    (hw + m - 1) / m · m - hw, which TensorRT-RTX builds; it refuses the shorter Mod(Neg(hw), m). It is written for
    the model's own opset, from 11 on.
    """
    edit = Rewrite(model)
    image, inner, first = edit.image, edit.result, edit.first()
    readers = tuple(image.uses())
    rounding = numbers(edit, "any_size/pad_rounding", multiple - 1)
    unit = numbers(edit, PAD_MULTIPLE, multiple)
    size = size_of(edit, image, first)
    least = size
    if smallest > 1:
        least = at_least(edit, size, numbers(edit, PAD_SMALLEST, smallest), "any_size/pad_least", first)
    raised = edit.node("Add", [least, rounding], "any_size/pad_raised", before=first)
    count = edit.node("Div", [raised, unit], "any_size/pad_count", before=first)
    wanted = edit.node("Mul", [count, unit], "any_size/pad_size", before=first)
    after = edit.node("Sub", [wanted, size], "any_size/pad_after", before=first)
    before = numbers(edit, "any_size/pad_before", *[0] * 6)
    pads = edit.node("Concat", [before, after], "any_size/pads", before=first, axis=0)
    reroute(readers, edit.node("Pad", [image, pads], PADDED, before=first, mode="constant"))
    start, axes = numbers(edit, "any_size/crop_start", 0, 0), numbers(edit, "any_size/crop_axes", 2, 3)
    cropped = edit.node("Slice", [inner, start, size, axes], "any_size/cropped")
    edit.end_with(cropped, f"{inner.name}_padded")
    declare(image, ["N", dims(image)[1], "H", "W"])
    declare(cropped, ["N", dims(inner)[1], "H", "W"])
    edit.forget_shapes()  # those of the padded image
    return PassResult(edit.model())


def numbers(edit: Rewrite, name: str, *values: int) -> ir.Value:
    """Whole numbers as a constant."""
    return edit.constant(name, np.array(values, np.int64))


def size_of(edit: Rewrite, image: ir.Value, before: ir.Node | None) -> ir.Value:
    """[H, W] of an image [N,C,H,W], for a model's own opset."""
    name = "any_size/image_size"
    if edit.opset >= 15:
        return edit.node("Shape", [image], name, before=before, start=2, end=4)
    shape = edit.node("Shape", [image], "any_size/image_shape", before=before)
    ends = [numbers(edit, "any_size/first_side", 2), numbers(edit, "any_size/after_sides", 4)]
    return edit.node("Slice", [shape, *ends], name, before=before)


def at_least(edit: Rewrite, size: ir.Value, least: ir.Value, name: str, before: ir.Node | None) -> ir.Value:
    """The larger of sizes and what they must be at least, for a model's own opset."""
    if edit.opset >= 12:
        return edit.node("Max", [size, least], name, before=before)
    small = edit.node("Less", [size, least], f"{name}/small", before=before)  # Max is of floats alone there
    return edit.node("Where", [small, least, size], name, before=before)

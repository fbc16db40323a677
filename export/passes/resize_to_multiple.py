"""Make a network that wants multiples of a size, or one size, take all: resize the image before it, scores after it."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, declare, dims, reroute
from fcn_deploy.export.passes.pad_and_crop import at_least, numbers, size_of
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto


def resize_to_multiple(model: ModelProto, multiple: int, smallest: int = 1) -> PassResult:
    """A model of float [N,C,H,W] → [N,K,H,W] for H and W ≥ 1, from one for multiples of `multiple` ≥ `smallest`.

    The image goes bilinearly (half-pixel centres, not antialiased) to the nearest multiple, halves up, and the scores,
    which may be coarse, to the image's size. For networks that look at the whole image, whose statistics zeros change.
    """

    def nearest(edit: Rewrite, size: ir.Value, first: ir.Node | None) -> ir.Value:
        half, unit = numbers(edit, "any_size/half", multiple // 2), numbers(edit, "any_size/multiple", multiple)
        raised = edit.node("Add", [size, half], "any_size/raised", before=first)
        count = edit.node("Div", [raised, unit], "any_size/count", before=first)
        rounded = edit.node("Mul", [count, unit], "any_size/nearest", before=first)
        least = numbers(edit, "any_size/least", -(-max(smallest, 1) // multiple) * multiple)
        return at_least(edit, rounded, least, "any_size/wanted", first)

    return _resized(model, nearest)


def resize_to_size(model: ModelProto, height: int, width: int) -> PassResult:
    """A model of float [N,C,H,W] → [N,K,H,W] for H and W ≥ 1, from one for images of `height` × `width` alone.

    As `resize_to_multiple`, to that one size.
    """
    return _resized(model, lambda edit, size, first: numbers(edit, "any_size/wanted", height, width))


def _resized(model: ModelProto, size_for: Callable[[Rewrite, ir.Value, ir.Node | None], ir.Value]) -> PassResult:
    """The model with a Resize before and after it; `size_for`: (edit, the image's size, before which node) → [h, w]."""
    edit = Rewrite(model)
    image, inner, first = edit.image, edit.result, edit.first()
    readers = tuple(image.uses())
    # Until 13 what is without use may not be left out.
    unused = edit.constant("any_size/unused", np.zeros(0, np.float32)) if edit.opset < 13 else None
    start, middle = numbers(edit, "any_size/first", 0), numbers(edit, "any_size/middle", 2)

    def resize(value: ir.Value, size: ir.Value, name: str, before: ir.Node | None) -> ir.Value:
        """[N, C, h, w] brought to [N, C, *size]."""
        shape = edit.node("Shape", [value], f"{name}/shape", before=before)
        kept = edit.node("Slice", [shape, start, middle], f"{name}/kept", before=before)
        whole = edit.node("Concat", [kept, size], f"{name}/wanted", before=before, axis=0)
        return edit.node(
            "Resize", [value, unused, unused, whole], name, before=before,
            mode="linear", coordinate_transformation_mode="half_pixel",
        )  # fmt: skip

    size = size_of(edit, image, first)
    reroute(readers, resize(image, size_for(edit, size, first), "any_size/image_resized", first))
    full = resize(inner, size, "any_size/scores_resized", None)
    edit.end_with(full, f"{inner.name}_resized")
    declare(image, ["N", dims(image)[1], "H", "W"])
    declare(full, ["N", dims(inner)[1], "H", "W"])
    edit.forget_shapes()  # those of the resized image
    return PassResult(edit.model())

"""Give a network whose output is coarse the bilinear upsampling to full size."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, declare, dims
from fcn_deploy.export.passes.pad_and_crop import numbers, size_of
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto


def upsample_scores(model: ModelProto, factor: int, crop: bool = False) -> PassResult:
    """A model of [N,C,H,W] → [N,K,H,W] from one whose scores are `factor` times smaller.

    `crop`: they are rounded up, so that the last row and column of cells may reach beyond the image.
    """
    edit = Rewrite(model)
    coarse = edit.result
    full = bilinear(edit, coarse, factor, "upsample_scores", "upsample_scores")
    if crop:
        start, axes = numbers(edit, "upsample_scores/start", 0, 0), numbers(edit, "upsample_scores/axes", 2, 3)
        size = size_of(edit, edit.image, edit.first())
        full = edit.node("Slice", [full, start, size, axes], "upsample_scores/cropped")
    edit.end_with(full, f"{coarse.name}_coarse")
    declare(full, ["N", dims(coarse)[1], "H", "W"])
    return PassResult(edit.model())


def bilinear(
    edit: Rewrite, value: ir.Value, factor: int, prefix: str, name: str, before: ir.Node | None = None
) -> ir.Value:
    """What a Resize by a constant factor gives, pixel centres aligned, for a model's own opset.

    Args:
        prefix: of the names of its constants.
        name: of the node.
    """
    scales = edit.constant(f"{prefix}/scales", np.array([1, 1, factor, factor], np.float32))
    # Until 13 what is without use may not be left out.
    region = edit.constant(f"{prefix}/region", np.zeros(0, np.float32)) if edit.opset < 13 else None
    return edit.node(
        "Resize", [value, region, scales], f"{prefix}/result", name=name, before=before,
        mode="linear", coordinate_transformation_mode="half_pixel",
    )  # fmt: skip

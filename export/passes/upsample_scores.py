"""Give a network whose output is coarse the bilinear upsampling to full size."""

import numpy as np
from onnx import ModelProto, helper

from export.graph import add_constants, clone, dims, rename_result, set_shape


def upsample_scores(model: ModelProto, factor: int) -> ModelProto:
    """A model of [N,C,H,W] → [N,K,H,W] from one whose scores are `factor` times smaller."""
    model = clone(model)
    output = model.graph.output[0]
    result, coarse = output.name, f"{output.name}_coarse"
    rename_result(model, result, coarse)
    add_constants(model, {"upsample_scores/scales": np.array([1, 1, factor, factor], np.float32)})
    model.graph.node.append(
        helper.make_node(
            "Resize", [coarse, "", "upsample_scores/scales"], [result], name="upsample_scores", mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    )  # fmt: skip
    set_shape(output, ["N", dims(output)[1], "H", "W"])
    return model

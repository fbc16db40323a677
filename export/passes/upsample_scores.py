"""Give a network whose output is coarse the bilinear upsampling to full size."""

import numpy as np
from onnx import ModelProto, TensorProto, helper

from export.graph import add_constants, clone, dims, rename_result


def upsample_scores(model: ModelProto, factor: int) -> ModelProto:
    """A model of [N,C,H,W] → [N,K,H,W] from one whose scores are `factor` times smaller."""
    model = clone(model)
    output = model.graph.output[0]
    result, coarse = output.name, f"{output.name}_coarse"
    rename_result(model, result, coarse)
    add_constants(model, {"upsample_scales": np.array([1, 1, factor, factor], np.float32)})
    model.graph.node.append(
        helper.make_node(
            "Resize", [coarse, "", "upsample_scales"], [result], name="upsample_scores", mode="linear",
            coordinate_transformation_mode="half_pixel",
        )
    )  # fmt: skip
    shape = ["N", dims(output)[1], "H", "W"]
    output.CopyFrom(helper.make_tensor_value_info(result, TensorProto.FLOAT, shape))
    return model

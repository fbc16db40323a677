"""Give a network whose output is coarse the bilinear upsampling to full size."""

from fcn_deploy.export.graph.edit import bilinear, clone, dims, rename_result, set_shape
from onnx import ModelProto


def upsample_scores(model: ModelProto, factor: int) -> ModelProto:
    """A model of [N,C,H,W] → [N,K,H,W] from one whose scores are `factor` times smaller."""
    model = clone(model)
    output = model.graph.output[0]
    result, coarse = output.name, f"{output.name}_coarse"
    rename_result(model, result, coarse)
    model.graph.node.append(bilinear(model, coarse, result, factor, "upsample_scores"))
    set_shape(output, ["N", dims(output)[1], "H", "W"])
    return model

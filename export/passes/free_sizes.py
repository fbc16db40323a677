"""Make a network of one size take every size."""

from onnx import ModelProto


def free_sizes(model: ModelProto) -> tuple[ModelProto, list[str]]:
    return model, []

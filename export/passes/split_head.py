"""Cut a segmentation model into its core and its head: the last upsampling, padding and cropping.

The runtime does the head's work exactly and many times cheaper, since labels at full size need
interpolation only where classes meet.
"""

import json
from dataclasses import asdict

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.graph import (
    attributes,
    clone,
    constant,
    consumers,
    dims,
    free_name,
    metadata,
    producers,
    prune,
    rename_reads,
    rename_result,
    set_metadata,
)
from export.passes.pad_and_crop import PAD_MULTIPLE, PAD_SMALLEST, PADDED
from runtime.engine_file import COORDINATES, ROUNDINGS, Head

HEAD_KEY = "fcn_deploy.head"
SIGMOID_KEY = "fcn_deploy.sigmoid"  # "1" where a Sigmoid at the end was dropped: scores are logits now
MULTIPLE_KEY = "fcn_deploy.multiple"  # of the sizes the model padded its input to, and no longer does; 1: none
SMALLEST_KEY = "fcn_deploy.smallest"  # the least size that it padded to; 1: none


def split_head(model: ModelProto) -> ModelProto:
    """The core of a model of [N,C,H,W] → [N,K,H,W]: input `image`, output `scores`, uncropped.

    What was cut off stands in the metadata: `head_of` reads it, `stripped_padding` tells whether the model
    padded its input. A Softmax or Sigmoid after the upsampling is dropped, as it does not change labels;
    one before it stays. Cubic, antialiased and learned upsampling stay; then the head is `none`.

    The cut is by structure; a builder checks the labels by running both.
    """
    model = clone(model)
    made = producers(model)
    result = model.graph.output[0].name
    image = model.graph.input[0]
    cropped = sigmoid = False
    while (node := made.get(result)) is not None:
        if node.op_type in ("Softmax", "LogSoftmax") and attributes(node).get("axis", -1) not in (1, -3):
            break
        if node.op_type in ("Identity", "Softmax", "LogSoftmax", "Sigmoid"):
            sigmoid |= node.op_type == "Sigmoid"
            result = node.input[0]
        elif not cropped and _crops_to_image(model, node, image.name):
            result, cropped = node.input[0], True
        else:
            break
    head = Head()
    if node is not None and (found := _resize_head(model, node)) is not None:
        head, result = found, node.input[0]
    padding = _strip_padding(model, image.name) if cropped else None
    if cropped and padding is None:
        # Cropped for another reason than its padding: leave all of it in the core.
        head, sigmoid, result = Head(), False, model.graph.output[0].name
    output = model.graph.output[0]
    channels = dims(output)[1]
    del model.graph.output[1:]
    if result != "scores":
        free_name(model, "scores")
        rename_result(model, result, "scores")
    output.CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", channels, "h", "w"]))
    if image.name != "image":
        free_name(model, "image")
        rename_reads(model, image.name, "image")
    shape = ["N", dims(image)[1], "H", "W"]
    image.CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))
    prune(model)
    del model.graph.value_info[:]
    set_metadata(model, HEAD_KEY, json.dumps(asdict(head)))
    multiple, smallest = padding or (1, 1)
    set_metadata(model, MULTIPLE_KEY, str(multiple))
    set_metadata(model, SMALLEST_KEY, str(smallest))
    set_metadata(model, SIGMOID_KEY, "1" if sigmoid else "0")
    return model


def head_of(model: ModelProto) -> Head:
    """The head that split_head cut off."""
    data = json.loads(metadata(model, HEAD_KEY) or "{}")
    return Head(**data)


def stripped_padding(model: ModelProto) -> tuple[int, int]:
    """(multiple, smallest) that the model padded sizes to before split_head took that off; the runtime does it now."""
    return int(metadata(model, MULTIPLE_KEY) or 1), int(metadata(model, SMALLEST_KEY) or 1)


def stripped_sigmoid(model: ModelProto) -> bool:
    """Whether split_head dropped a Sigmoid, so that scores are logits where they were probabilities."""
    return metadata(model, SIGMOID_KEY) == "1"


def ends_in_sigmoid(model: ModelProto) -> bool:
    """Whether a model gives probabilities: a Sigmoid is last, but for upsampling and cropping."""
    made = producers(model)
    node = made.get(model.graph.output[0].name)
    while node is not None and node.op_type in ("Identity", "Slice", "Resize"):
        node = made.get(node.input[0])
    return node is not None and node.op_type == "Sigmoid"


def _crops_to_image(model: ModelProto, node: NodeProto, image: str) -> bool:
    """Whether a Slice keeps the first H rows and W columns, H and W read from the image."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return False
    starts, axes = constant(model, node.input[1]), constant(model, node.input[3])
    steps = constant(model, node.input[4]) if len(node.input) > 4 and node.input[4] else np.ones(1)
    if starts is None or axes is None or steps is None or starts.any() or (steps != 1).any():
        return False
    source = producers(model).get(node.input[2])
    if list(axes) != [2, 3] or source is None:
        return False
    if source.op_type == "Slice":  # before opset 15
        ends = [constant(model, name) for name in source.input[1:]]
        source = producers(model).get(source.input[0])
        whole = len(ends) == 2 and all(value is not None for value in ends) and [*ends[0], *ends[1]] == [2, 4]
        return whole and source is not None and source.op_type == "Shape" and source.input[0] == image
    return source.op_type == "Shape" and source.input[0] == image and attributes(source).get("start") == 2


def _resize_head(model: ModelProto, node: NodeProto) -> Head | None:
    """The head that a Resize is, or None where labels cannot be had exactly from its input."""
    if node.op_type != "Resize":
        return None
    found = attributes(node)
    mode, coordinates = found.get("mode", "nearest"), found.get("coordinate_transformation_mode", "half_pixel")
    rounding = found.get("nearest_mode", "round_prefer_floor")
    if (
        mode not in ("linear", "nearest")
        or coordinates not in COORDINATES
        or rounding not in ROUNDINGS
        or found.get("antialias", 0)
        or found.get("keep_aspect_ratio_policy", "stretch") != "stretch"
    ):
        return None
    scales = constant(model, node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scales is not None and scales.size:
        spatial = scales[-2:]
        if scales.size == 4 and (scales[:2] != 1).any():
            return None
        return Head(mode, coordinates, tuple(float(value) for value in spatial), rounding)
    sizes = node.input[3] if len(node.input) > 3 else ""
    if sizes and constant(model, sizes) is not None:
        return None  # a size baked in; the checks that follow will tell
    return Head(mode, coordinates, None, rounding)


def _strip_padding(model: ModelProto, image: str) -> tuple[int, int] | None:
    """Take off the padding that pad_and_crop adds, and return its (multiple, smallest); None where there is none."""
    readers = [node for node in consumers(model, image) if node.op_type != "Shape"]
    multiple, smallest = constant(model, PAD_MULTIPLE), constant(model, PAD_SMALLEST)
    if len(readers) != 1 or readers[0].op_type != "Pad" or readers[0].output[0] != PADDED or multiple is None:
        return None
    rename_reads(model, PADDED, image)
    return int(multiple[0]), 1 if smallest is None else int(smallest[0])

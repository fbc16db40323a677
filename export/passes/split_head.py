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
    graph_input,
    metadata,
    producers,
    prune,
    rename_reads,
    rename_result,
    set_metadata,
)
from runtime.engine_file import Head

HEAD_KEY = "fcn_deploy.head"
SIGMOID_KEY = "fcn_deploy.sigmoid"  # "1" where a Sigmoid at the end was dropped: scores are logits now
PADS_KEY = "fcn_deploy.pads"  # "1" where the model padded its input itself and no longer does
COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")


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
    image = graph_input(model)
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
    pads = cropped and _strip_padding(model, image.name)
    if cropped and not pads:
        # Cropped for another reason than its padding: leave all of it in the core.
        head, pads, sigmoid, result = Head(), False, False, model.graph.output[0].name
    output = model.graph.output[0]
    channels = dims(output)[1]
    del model.graph.output[1:]
    rename_result(model, result, "scores")
    output.CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", channels, "h", "w"]))
    if image.name != "image":
        rename_reads(model, image.name, "image")
    shape = ["N", dims(image)[1], "H", "W"]
    image.CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))
    prune(model)
    del model.graph.value_info[:]
    set_metadata(model, HEAD_KEY, json.dumps(asdict(head)))
    set_metadata(model, PADS_KEY, "1" if pads else "0")
    set_metadata(model, SIGMOID_KEY, "1" if sigmoid else "0")
    return model


def head_of(model: ModelProto) -> Head:
    """The head that split_head cut off."""
    data = json.loads(metadata(model, HEAD_KEY) or "{}")
    if data.get("factor") is not None:
        data["factor"] = tuple(data["factor"])
    return Head(**data)


def stripped_padding(model: ModelProto) -> bool:
    """Whether split_head took off padding, which the runtime has to do now."""
    return metadata(model, PADS_KEY) == "1"


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
    if list(axes) != [2, 3] or source is None or source.op_type != "Shape":
        return False
    return source.input[0] == image and attributes(source).get("start") == 2


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


def _strip_padding(model: ModelProto, image: str) -> bool:
    """Take off a Pad that adds zeros right and bottom of the image; False where there is none."""
    readers = [node for node in consumers(model, image) if node.op_type != "Shape"]
    if len(readers) != 1 or readers[0].op_type != "Pad":
        return False
    pad = readers[0]
    value = constant(model, pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    before = producers(model).get(pad.input[1])
    if attributes(pad).get("mode", "constant") != "constant" or value is None or value.any():
        return False
    if before is None or before.op_type != "Concat":
        return False
    first = constant(model, before.input[0])
    if first is None or first.any() or first.size != 6:
        return False
    rename_reads(model, pad.output[0], image)
    return True

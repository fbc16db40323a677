"""Cut a segmentation model into its core and its head: the last upsampling, padding and cropping.

The runtime does the head's work exactly and many times cheaper, since labels at full size need
interpolation only where classes meet.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import (
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
from fcn_deploy.export.passes.bilinear_deconv import SCALES
from fcn_deploy.export.passes.pad_and_crop import PAD_MULTIPLE, PAD_SMALLEST, PADDED
from fcn_deploy.export.tolerances import CLIPPED_PROBABILITY
from fcn_deploy.runtime.manifest import COORDINATES, ROUNDINGS, Head
from onnx import ModelProto, NodeProto, TensorProto, helper
from onnx.reference import ReferenceEvaluator

ACTIVATIONS = ("Softmax", "LogSoftmax", "Sigmoid")
MOVES = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Clip")  # give the type that they take
HEAD_KEY = "fcn_deploy.head"
SIGMOID_KEY = "fcn_deploy.sigmoid"  # "1" where a Sigmoid at the end was dropped: scores are logits now
MULTIPLE_KEY = "fcn_deploy.multiple"  # of the sizes the model padded its input to, and no longer does; 1: none
SMALLEST_KEY = "fcn_deploy.smallest"  # the least size that it padded to; 1: none


def split_head(model: ModelProto, labels: bool = True) -> ModelProto:
    """The core of a model of [N,C,H,W] → [N,K,H,W] of the image's size: input `image`, output `scores`, uncropped.

    What was cut off stands in the metadata: `head_of` reads it, `stripped_padding` tells whether the model
    padded its input. A Softmax or Sigmoid after the upsampling is dropped, as it does not change labels or masks,
    unless the values are what is wanted (not `labels`); one before it stays, and the head says so. Cubic,
    antialiased and learned upsampling stay; then the head is `none`.

    The cut is by structure; a builder checks the labels by running both.
    """
    model = clone(model)
    image = model.graph.input[0]
    result, sigmoid, dropped, crops = _before_the_end(model, labels)
    ours = bool(crops) and _crops_to_image(model, crops[0][0], image.name)
    padding = _strip_padding(model, image.name) if ours else None
    inner = crops[1:] if padding is not None else crops
    node, head = producers(model).get(result), Head()
    if node is not None and (found := _resize_head(model, node)) is not None:
        head = found
    # A crop within the model is the head's as well, where what is cropped is known.
    whole = not inner or head.factor is not None
    if inner and padding is None and head.mode != "none":
        padding = _strip_own_padding(model, node)
        whole |= padding is not None
    if not whole:
        crop, sigmoid, dropped = inner[0]
        head, result = Head(), crop.output[0]
    elif head.mode != "none":
        result = node.input[0]
    # Of two activations the last is the card's, which the runtime takes.
    head = replace(head, activated=not dropped and _last_activation(model, result) is not None)
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


def _before_the_end(model: ModelProto, labels: bool) -> tuple[str, bool, bool, list[tuple[NodeProto, bool, bool]]]:
    """What is left when activations and crops are taken off a model's end.

    Returns:
        (its name, whether a Sigmoid was among them, whether any activation was, and the crops from the last on with
        what of these follows each).
    """
    made, result = producers(model), model.graph.output[0].name
    sigmoid, dropped, crops = False, False, []
    while (node := made.get(result)) is not None:
        if node.op_type in ACTIVATIONS:
            if not labels or (node.op_type != "Sigmoid" and attributes(node).get("axis", -1) not in (1, -3)):
                break
            sigmoid, dropped = sigmoid or node.op_type == "Sigmoid", True
        elif labels and (scores := _softmax_between(made, node)) is not None:
            result, dropped = scores, True
            continue
        elif node.op_type == "Clip":
            if not labels or not _clips_nothing(model, made, node):
                break
        elif _keeps_first_pixels(model, node):
            crops.append((node, sigmoid, dropped))
        elif node.op_type != "Identity" and not (
            node.op_type == "Cast" and attributes(node)["to"] == TensorProto.FLOAT and not _whole(made, node.input[0])
        ):
            break
        result = node.input[0]
    return result, sigmoid, dropped, crops


def _whole(made: Mapping[str, NodeProto], name: str) -> bool:
    """Whether a tensor is of whole numbers, as scores of 8 bits are: a Cast to one is last, but for what moves it."""
    node = made.get(name)
    while node is not None and node.op_type in MOVES:
        node = made.get(node.input[0])
    if node is None or node.op_type != "Cast":
        return node is not None and node.op_type == "QuantizeLinear"
    return attributes(node)["to"] not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def _clips_nothing(model: ModelProto, made: Mapping[str, NodeProto], node: NodeProto) -> bool:
    """Whether a Clip is of probabilities, so near to 0 and 1 that labels and masks are as without it."""
    before = made.get(node.input[0])
    if before is None or before.op_type not in ("Softmax", "Sigmoid"):
        return False
    limits = []
    for place, none in ((1, 0.0), (2, 1.0)):
        name = node.input[place] if len(node.input) > place else ""
        limits.append(constant(model, name) if name else none)
    return (
        all(limit is not None for limit in limits)
        and limits[0] <= CLIPPED_PROBABILITY
        and limits[1] >= 1 - CLIPPED_PROBABILITY
    )


def _last_activation(model: ModelProto, result: str) -> NodeProto | None:
    """The Softmax over the classes or the Sigmoid that a result comes from, also interpolated and cropped."""
    made = producers(model)
    node = made.get(result)
    while node is not None and node.op_type in ("Identity", "Slice", "Resize", "Cast", "Clip"):
        node = made.get(node.input[0])
    if node is not None and _softmax_between(made, node) is not None:
        softmax = made[node.input[0]]
        return softmax if softmax.op_type == "Softmax" else None
    if node is None or node.op_type not in ("Softmax", "Sigmoid"):
        return None
    return node if node.op_type == "Sigmoid" or attributes(node).get("axis", -1) in (1, -3) else None


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
    node = _last_activation(model, model.graph.output[0].name)
    return node is not None and node.op_type == "Sigmoid"


def ends_in_probability(model: ModelProto) -> bool:
    """Whether a Sigmoid or a Softmax over the classes is last, but for upsampling and cropping, also of channels."""
    return _last_activation(model, model.graph.output[0].name) is not None


def _softmax_between(made: Mapping[str, NodeProto], node: NodeProto) -> str | None:
    """What a Softmax over channels reads that stands between two Transposes, as before opset 13; else None."""
    softmax = made.get(node.input[0]) if node.op_type == "Transpose" else None
    if softmax is None or softmax.op_type not in ("Softmax", "LogSoftmax"):
        return None
    first = made.get(softmax.input[0])
    if first is None or first.op_type != "Transpose":
        return None
    there, back = (list(attributes(item).get("perm", ())) for item in (first, node))
    if sorted(there) != [0, 1, 2, 3] or [there[axis] for axis in back] != [0, 1, 2, 3]:
        return None
    return first.input[0] if there[3] == 1 and attributes(softmax).get("axis", -1) in (3, -1) else None


def _keeps_first_pixels(model: ModelProto, node: NodeProto) -> bool:
    """Whether a Slice keeps the first rows or columns, or both."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return False
    starts, axes = constant(model, node.input[1]), constant(model, node.input[3])
    steps = constant(model, node.input[4]) if len(node.input) > 4 and node.input[4] else np.ones(1)
    if starts is None or axes is None or steps is None or starts.any() or (steps != 1).any():
        return False
    return {int(axis) % 4 for axis in axes.reshape(-1)} <= {2, 3}


def _crops_to_image(model: ModelProto, node: NodeProto, image: str) -> bool:
    """Whether a crop is to H rows and W columns, both read from the image at once, as pad_and_crop does."""
    source = producers(model).get(node.input[2])
    if list(constant(model, node.input[3])) != [2, 3] or source is None:
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
        sides = dict(zip(found.get("axes", range(scales.size)), scales, strict=True))
        if any(sides.get(axis, 1) != 1 for axis in (0, 1)):
            return None
        spatial = [sides.get(axis, 1) for axis in (2, 3)]
        return Head(mode, coordinates, tuple(map(float, spatial)), rounding, fades=node.input[2] == SCALES)
    sizes = node.input[3] if len(node.input) > 3 else ""
    if sorted(found.get("axes", (2, 3)))[-2:] != [2, 3]:
        return None
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


# Of shapes and numbers alone, so that they can be computed at any size without running the network.
ARITHMETIC = frozenset((
    "Shape", "Gather", "Slice", "Concat", "Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Add", "Sub", "Mul",
    "Div", "Mod", "Neg", "Ceil", "Floor", "Max", "Min", "Where", "Equal", "Less", "Greater", "ConstantOfShape",
    "Constant", "Transpose", "Split", "Expand", "Abs", "Range", "ScatterND", "ReduceMax",
))  # fmt: skip
PADDED_SIZES = (*((height, 3 * height % 83 + 1) for height in range(1, 83)), (513, 1000), (128, 640))
MULTIPLES = range(2, 257)


def _strip_own_padding(model: ModelProto, resize: NodeProto) -> tuple[int, int] | None:
    """Take off padding that a foreign model does by itself, and return its (multiple, smallest); None: it stays.

    It is taken off where it is of zeros, right and bottom, to the next multiple of a number at every size, where
    nothing but the cropping knows the size before it, and where a `resize` to a computed size is to the padded one.
    """
    image = model.graph.input[0].name
    pads = [node for node in consumers(model, image) if node.op_type != "Shape"]
    if len(pads) != 1 or pads[0].op_type != "Pad" or attributes(pads[0]).get("mode", "constant") != "constant":
        return None
    pad = pads[0]
    value = constant(model, pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    if value is None or value.any() or (len(pad.input) > 3 and pad.input[3]):
        return None
    wanted = [pad.input[1]]
    if len(resize.input) > 3 and resize.input[3]:
        wanted += _sides(model, resize.input[3])
    elif constant(model, resize.input[2]) is None:
        return None
    found = _computed(model, wanted, image, pad)
    if found is None:
        return None
    multiple = None
    for candidate in MULTIPLES:
        if all(
            list(values[0]) == [0] * 6 + [-side % candidate for side in size]
            for size, values in zip(PADDED_SIZES, found, strict=True)
        ):
            multiple = candidate
    if multiple is None or any(
        list(np.concatenate(values[1:])[-2:]) != [-(-side // multiple) * multiple for side in size]
        for size, values in zip(PADDED_SIZES, found, strict=True)
        if len(values) > 1
    ):
        return None
    bare = clone(model)
    bare.graph.output[0].name = resize.input[0]
    rename_reads(bare, pad.output[0], "image/padded")
    bare.graph.input[0].name = "image/padded"
    prune(bare)
    if consumers(bare, image):
        return None
    rename_reads(model, pad.output[0], image)
    return multiple, 1


def _sides(model: ModelProto, sizes: str) -> list[str]:
    """What H and W are in computed sizes [N,K,H,W], apart from N and K, which may be those of the scores."""
    node = producers(model).get(sizes)
    if node is not None and node.op_type == "Concat":
        return list(node.input[-1:] if len(node.input) == 2 else node.input[-2:])
    return [sizes]


def _computed(model: ModelProto, names: list[str], image: str, pad: NodeProto) -> list[list[np.ndarray]] | None:
    """Numbers that a model computes of its image's size alone, at each of PADDED_SIZES; None where of more."""
    part = clone(model)
    del part.graph.output[:]
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    prune(part)
    if any(node.op_type not in ARITHMETIC and list(node.output) != list(pad.output) for node in part.graph.node):
        return None
    channels = dims(model.graph.input[0])[1]
    try:
        run = ReferenceEvaluator(part)
        return [run.run(None, {image: np.zeros((1, channels, *size), np.float32)}) for size in PADDED_SIZES]
    except Exception:  # what the evaluator lacks is no reason to fail: the padding stays
        return None

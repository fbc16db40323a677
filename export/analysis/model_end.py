"""The end of a segmentation model: its activation, its last upsampling, and the padding and cropping around it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from fcn_deploy.export.graph.edit import attributes, dims, extract
from fcn_deploy.export.graph.index import GraphIndex, has_input
from fcn_deploy.export.tolerances import BILINEAR_WEIGHT, CLIPPED_PROBABILITY
from fcn_deploy.runtime.engine_format.stage import COORDINATES, PYTORCH, ROUNDINGS, Upsampling
from onnx import ModelProto, NodeProto, TensorProto
from onnx.reference import ReferenceEvaluator

# Names that passes give, and by which this module knows what they wrote: the padding of pad_and_crop, and the Resize
# that bilinear_deconv put in the place of a transposed convolution, whose values fade towards the border, and what
# nearest_as_pytorch gathers in the place of a Resize.
PAD_MULTIPLE = "any_size/pad_multiple"
PAD_SMALLEST = "any_size/pad_smallest"
PADDED = "any_size/image_padded"
FADING = "bilinear_deconv"
AS_PYTORCH = "nearest_as_pytorch"

ACTIVATIONS = ("Softmax", "LogSoftmax", "Sigmoid")
MOVES = ("Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Clip")  # give the type that they take
OVER_CHANNELS = (1, -3)  # the axis of channels in [N,K,H,W]
# Of shapes and numbers alone, so that they can be computed at any size without running the network.
ARITHMETIC = frozenset((
    "Shape", "Gather", "Slice", "Concat", "Cast", "Identity", "Squeeze", "Unsqueeze", "Reshape", "Add", "Sub", "Mul",
    "Div", "Mod", "Neg", "Ceil", "Floor", "Max", "Min", "Where", "Equal", "Less", "Greater", "ConstantOfShape",
    "Constant", "Transpose", "Split", "Expand", "Abs", "Range", "ScatterND", "ReduceMax",
))  # fmt: skip
PADDED_SIZES = (*((height, 3 * height % 83 + 1) for height in range(1, 83)), (513, 1000), (128, 640))
MULTIPLES = range(2, 257)


@dataclass(frozen=True)
class Padding:
    """Zeros that a model puts right and below its image.

    Attributes:
        padded: name of the padded image.
        multiple: the sides are padded to multiples of it.
        smallest: and to this many pixels at least.
    """

    padded: str
    multiple: int
    smallest: int = 1


@dataclass(frozen=True)
class ModelEnd:
    """What follows the coarse scores of a model.

    Attributes:
        scores: name of what the core gives, once all else is cut off.
        upsampling: what the runtime does instead; of mode `none` where it stays.
        padding: that goes with it; None where there is none, or it stays.
        sigmoid: whether a Sigmoid was after it, so that scores are logits where they were probabilities.
        why_not: why no upsampling is cut off; "" where one is.
    """

    scores: str
    upsampling: Upsampling
    padding: Padding | None = None
    sigmoid: bool = False
    why_not: str = ""


@dataclass(frozen=True)
class _Crop:
    """A Slice at the end of a model that keeps the first rows and columns, and what of activations follows it."""

    node: NodeProto
    sigmoid: bool
    dropped: bool


def find_end(model: ModelProto, labels: bool = True) -> ModelEnd:
    """Where the core of a model of [N,C,H,W] → [N,K,H,W] ends.

    A Softmax or Sigmoid after the upsampling is no part of it, as it does not change labels or masks, unless the
    values are what is wanted (not `labels`); one before it is, and the upsampling says so. Cubic, antialiased and
    learned upsampling are parts of the core.

    This is told by structure; a builder checks the labels by running both.
    """
    index = GraphIndex(model)
    result, sigmoid, dropped, crops = _before_the_end(index, labels)
    padding = _our_padding(index) if crops and _crops_to_image(index, crops[0].node) else None
    inner = crops[1:] if padding is not None else crops
    node = index.producer(result)
    upsampling, why_not = resize_of(index, node)
    if node is not None and (gathered := _gathered_as_pytorch(index, node)) is not None:
        node, upsampling, why_not = gathered, Upsampling("nearest", "asymmetric", None, PYTORCH), ""
    # A crop within the model is the runtime's as well, where what is cropped is known.
    whole = not inner or upsampling.factor is not None
    if inner and padding is None and node is not None and upsampling.mode != "none":
        padding = _own_padding(index, node)
        whole |= padding is not None
    if not whole:
        crop = inner[0]
        sigmoid, dropped, result = crop.sigmoid, crop.dropped, crop.node.output[0]
        upsampling, why_not = Upsampling(), why_not or "it is cropped to a size that is not known"
    elif node is not None and upsampling.mode != "none":
        result = node.input[0]
    # Of two activations the last is the card's, which the runtime takes.
    activated = not dropped and last_activation(index, result) is not None
    return ModelEnd(result, replace(upsampling, activated=activated), padding, sigmoid, why_not)


def ends_in_sigmoid(model: ModelProto) -> bool:
    """Whether a model gives probabilities: a Sigmoid is last, but for upsampling and cropping."""
    index = GraphIndex(model)
    node = last_activation(index, index.result)
    return node is not None and node.op_type == "Sigmoid"


def ends_in_probability(model: ModelProto) -> bool:
    """Whether a Sigmoid or a Softmax over the classes is last, but for upsampling and cropping, also of channels."""
    index = GraphIndex(model)
    return last_activation(index, index.result) is not None


def last_activation(index: GraphIndex, result: str) -> NodeProto | None:
    """The Softmax over the classes or the Sigmoid that a result comes from, also interpolated and cropped."""
    between = ("Identity", "Slice", "Resize", "Cast", "Clip")
    node = index.before(result, between)
    if node is not None and (gathered := _gathered_as_pytorch(index, node)) is not None:
        node = index.before(gathered.input[0], between)
    if node is not None and _softmax_between(index, node) is not None:
        softmax = index.producer(node.input[0])
        return softmax if softmax is not None and softmax.op_type == "Softmax" else None
    if node is None or node.op_type not in ("Softmax", "Sigmoid"):
        return None
    return node if node.op_type == "Sigmoid" or attributes(node).get("axis", -1) in OVER_CHANNELS else None


def resize_of(index: GraphIndex, node: NodeProto | None) -> tuple[Upsampling, str]:
    """The upsampling that a Resize is, and ""; or none, and why labels cannot be had exactly from its input."""
    if node is None or node.op_type != "Resize":
        return Upsampling(), "no Resize is last"
    found = attributes(node)
    mode, coordinates = found.get("mode", "nearest"), found.get("coordinate_transformation_mode", "half_pixel")
    rounding = found.get("nearest_mode", "round_prefer_floor")
    if mode not in ("linear", "nearest") or coordinates not in COORDINATES or rounding not in ROUNDINGS:
        return Upsampling(), f"its last Resize is {mode}, {coordinates}, {rounding}"
    if found.get("antialias", 0) or found.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return Upsampling(), "its last Resize is antialiased, or keeps the ratio of the sides"
    scales = index.input_constant(node, 2)
    if scales is not None and scales.size:
        sides = dict(zip(found.get("axes", range(scales.size)), scales, strict=True))
        if any(sides.get(axis, 1) != 1 for axis in (0, 1)):
            return Upsampling(), "its last Resize changes channels"
        factor = (float(sides.get(2, 1)), float(sides.get(3, 1)))
        fades = node.input[2] == f"{FADING}/scales"
        return Upsampling(mode, coordinates, factor, rounding, fades=fades), ""
    if sorted(found.get("axes", (2, 3)))[-2:] != [2, 3]:
        return Upsampling(), "its last Resize is of one side"
    if index.input_constant(node, 3) is not None:
        return Upsampling(), "its last Resize goes to a size that is baked in"  # the checks that follow will tell
    return Upsampling(mode, coordinates, None, rounding), ""


def _gathered_as_pytorch(index: GraphIndex, node: NodeProto) -> NodeProto | None:
    """The first of two nodes that gather columns, then rows, as PyTorch's nearest; None: `node` is not the last."""
    if node.op_type != "Gather" or not node.input[1].endswith(f"/{AS_PYTORCH}/2/indices"):
        return None
    first = index.producer(node.input[0])
    same = first is not None and first.op_type == "Gather"
    return first if first is not None and same and first.input[1].endswith(f"/{AS_PYTORCH}/3/indices") else None


def bilinear_factor(index: GraphIndex, node: NodeProto) -> int | None:
    """The factor by which a ConvTranspose upsamples bilinearly, each channel by itself; None if it does not."""
    if len(node.input) != 2:
        return None  # a bias would shift classes against each other near the border
    weight, found = index.constant(node.input[1]), attributes(node)
    strides = found.get("strides", [1, 1])
    factor = strides[0]
    if weight is None or weight.ndim != 4 or strides != [factor, factor] or factor < 2:
        return None
    side, pad = 2 * factor - factor % 2, (factor - factor % 2) // 2
    usual = {"output_padding": [0, 0], "dilations": [1, 1], "auto_pad": "NOTSET"}
    if weight.shape[2:] != (side, side) or "output_shape" in found or found.get("pads", [0] * 4) != [pad] * 4:
        return None
    if any(found.get(name, value) != value for name, value in usual.items()):
        return None
    center = factor - (1 if factor % 2 else 0.5)
    line = 1 - np.abs(np.arange(side) - center) / factor
    kernel = np.outer(line, line)
    groups = found.get("group", 1)
    if groups == weight.shape[0] and weight.shape[1] == 1:
        wanted = np.broadcast_to(kernel, weight.shape)
    elif groups == 1 and weight.shape[0] == weight.shape[1]:
        wanted = np.eye(weight.shape[0])[:, :, None, None] * kernel
    else:
        return None
    return factor if np.allclose(weight, wanted, atol=BILINEAR_WEIGHT) else None


def _before_the_end(index: GraphIndex, labels: bool) -> tuple[str, bool, bool, list[_Crop]]:
    """What is left when activations and crops are taken off a model's end.

    Returns:
        (its name, whether a Sigmoid was among them, whether any activation was, and the crops from the last on).
    """
    result, sigmoid, dropped, crops = index.result, False, False, []
    while (node := index.producer(result)) is not None:
        if labels and (scores := _softmax_between(index, node)) is not None:
            result, dropped = scores, True
            continue
        if node.op_type in ACTIVATIONS:
            if not labels or (node.op_type != "Sigmoid" and attributes(node).get("axis", -1) not in OVER_CHANNELS):
                break
            sigmoid, dropped = sigmoid or node.op_type == "Sigmoid", True
        elif _keeps_first_pixels(index, node):
            crops.append(_Crop(node, sigmoid, dropped))
        elif not _changes_nothing(index, node, labels):
            break
        result = node.input[0]
    return result, sigmoid, dropped, crops


def _changes_nothing(index: GraphIndex, node: NodeProto, labels: bool) -> bool:
    """Whether a node gives what it takes, as far as labels go."""
    if node.op_type == "Clip":
        return labels and _clips_nothing(index, node)
    if node.op_type == "Cast":
        return attributes(node)["to"] == TensorProto.FLOAT and not _is_whole(index, node.input[0])
    return node.op_type == "Identity"


def _is_whole(index: GraphIndex, name: str) -> bool:
    """Whether a tensor is of whole numbers, as scores of 8 bits are: a Cast to one is last, but for what moves it."""
    node = index.before(name, MOVES)
    if node is None or node.op_type != "Cast":
        return node is not None and node.op_type == "QuantizeLinear"
    return attributes(node)["to"] not in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def _clips_nothing(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a Clip is of probabilities, so near to 0 and 1 that labels and masks are as without it."""
    before = index.producer(node.input[0])
    if before is None or before.op_type not in ("Softmax", "Sigmoid"):
        return False
    low, high = (
        index.constant(node.input[place]) if has_input(node, place) else none for place, none in ((1, 0.0), (2, 1.0))
    )
    return low is not None and high is not None and bool(low <= CLIPPED_PROBABILITY and high >= 1 - CLIPPED_PROBABILITY)


def _softmax_between(index: GraphIndex, node: NodeProto) -> str | None:
    """What a Softmax over channels reads that stands between two Transposes, as before opset 13; else None."""
    softmax = index.producer(node.input[0]) if node.op_type == "Transpose" else None
    if softmax is None or softmax.op_type not in ("Softmax", "LogSoftmax"):
        return None
    first = index.producer(softmax.input[0])
    if first is None or first.op_type != "Transpose":
        return None
    there, back = (list(attributes(item).get("perm", ())) for item in (first, node))
    if sorted(there) != [0, 1, 2, 3] or [there[axis] for axis in back] != [0, 1, 2, 3]:
        return None
    return first.input[0] if there[3] == 1 and attributes(softmax).get("axis", -1) in (3, -1) else None


def _keeps_first_pixels(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a Slice keeps the first rows or columns, or both."""
    if node.op_type != "Slice" or len(node.input) < 4:
        return False
    starts, axes = index.constant(node.input[1]), index.constant(node.input[3])
    steps = index.input_constant(node, 4) if has_input(node, 4) else np.ones(1)
    if starts is None or axes is None or steps is None or starts.any() or (steps != 1).any():
        return False
    return {int(axis) % 4 for axis in axes.reshape(-1)} <= {2, 3}


def _crops_to_image(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a crop is to H rows and W columns, both read from the image at once, as pad_and_crop does."""
    source = index.producer(node.input[2])
    if [int(axis) for axis in index.array(node.input[3])] != [2, 3] or source is None:
        return False
    if source.op_type == "Slice":  # before opset 15
        ends = [value for name in source.input[1:] if (value := index.constant(name)) is not None]
        source = index.producer(source.input[0])
        whole = len(ends) == 2 and [*ends[0], *ends[1]] == [2, 4]
        return whole and source is not None and source.op_type == "Shape" and source.input[0] == index.image
    return source.op_type == "Shape" and source.input[0] == index.image and attributes(source).get("start") == 2


def _pad_of_image(index: GraphIndex) -> NodeProto | None:
    """The Pad that all but the size of the image goes through; None where there is none."""
    readers = [node for node in index.consumers(index.image) if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and readers[0].op_type == "Pad" else None


def _our_padding(index: GraphIndex) -> Padding | None:
    """The padding that pad_and_crop adds; None where there is none."""
    pad, multiple, smallest = _pad_of_image(index), index.constant(PAD_MULTIPLE), index.constant(PAD_SMALLEST)
    if pad is None or pad.output[0] != PADDED or multiple is None:
        return None
    return Padding(PADDED, int(multiple[0]), 1 if smallest is None else int(smallest[0]))


def _own_padding(index: GraphIndex, resize: NodeProto) -> Padding | None:
    """Padding that a foreign model does by itself and that can be taken off; None: it stays.

    It can where it is of zeros, right and bottom, to the next multiple of a number at every size, where nothing but
    the cropping knows the size before it, and where a `resize` to a computed size is to the padded one.
    """
    pad = _pad_of_image(index)
    if pad is None or attributes(pad).get("mode", "constant") != "constant" or has_input(pad, 3):
        return None
    value = index.constant(pad.input[2]) if has_input(pad, 2) else np.zeros(1)
    if value is None or value.any():
        return None
    wanted = [pad.input[1]]
    if has_input(resize, 3):
        wanted += _sides(index, resize.input[3])
    elif index.input_constant(resize, 2) is None:
        return None
    found = _computed(index.model, wanted, pad)
    multiple = _multiple(found) if found is not None else None
    if found is None or multiple is None or not _resizes_to(found, multiple):
        return None
    if index.image in index.ancestors(resize.input[0], stop=pad.output[0]):
        return None
    return Padding(pad.output[0], multiple)


def _multiple(found: Sequence[Sequence[np.ndarray]]) -> int | None:
    """The number to whose multiples the first of `found`, amounts of padding at each of PADDED_SIZES, pads."""
    fitting = (
        candidate
        for candidate in reversed(MULTIPLES)
        if all(
            list(values[0]) == [0] * 6 + [-side % candidate for side in size]
            for size, values in zip(PADDED_SIZES, found, strict=True)
        )
    )
    return next(fitting, None)


def _resizes_to(found: Sequence[Sequence[np.ndarray]], multiple: int) -> bool:
    """Whether all but the first of `found`, where there are more, end in the padded sides."""
    return all(
        len(values) == 1 or list(np.concatenate(values[1:])[-2:]) == [-(-side // multiple) * multiple for side in size]
        for size, values in zip(PADDED_SIZES, found, strict=True)
    )


def _sides(index: GraphIndex, sizes: str) -> list[str]:
    """What H and W are in computed sizes [N,K,H,W], apart from N and K, which may be those of the scores."""
    node = index.producer(sizes)
    if node is not None and node.op_type == "Concat":
        return list(node.input[-1:] if len(node.input) == 2 else node.input[-2:])
    return [sizes]


def _computed(model: ModelProto, names: Sequence[str], pad: NodeProto) -> list[list[np.ndarray]] | None:
    """Numbers that a model computes of its image's size alone, at each of PADDED_SIZES; None where of more."""
    part, image = extract(model, names), model.graph.input[0]
    if any(node.op_type not in ARITHMETIC and list(node.output) != list(pad.output) for node in part.graph.node):
        return None
    try:
        channels = int(dims(image)[1] or "")
        run = ReferenceEvaluator(part)
        images = [np.zeros((1, channels, *size), np.float32) for size in PADDED_SIZES]
        return [[np.asarray(value) for value in run.run(None, {image.name: zeros})] for zeros in images]
    except Exception:  # what the evaluator lacks is no reason to fail: the padding stays
        return None

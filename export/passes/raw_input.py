"""Let an INT8 network for CPUs take the image as it is: 8-bit pixels, interleaved."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.index import GraphIndex, has_input
from fcn_deploy.export.graph.rewrite import Rewrite, declare
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.export.quantization.round_weights import round_weights
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.pixels.prepare import Border
from onnx import ModelProto, NodeProto, TensorProto

LARGEST_BIAS = 2.0**30  # in steps, so that sums stay within int32


@dataclass(frozen=True)
class OnPixels(PassResult):
    """A network of 8-bit pixels.

    Attributes:
        border: (top, left, bottom, right) in pixels that the caller pads with the rounded mean; None where the pass
            does not apply.
    """

    border: Border | None = None


def raw_input(model: ModelProto, core: ModelProto, card: ModelCard, mean: np.ndarray | None = None) -> OnPixels:
    """A network of `image`, uint8 [N, H, W, C], from one of `image`, float32 [N, C, H, W], normalised.

    Normalisation goes into the first convolution, whose weights are rounded anew: it reads pixels without loss, and no
    pass over the image is left to do. Its padding becomes the caller's, who pads with the rounded mean, which is what
    zero is after normalisation, to half a grey level.

    Args:
        model: with Q/DQ, or the first stage of one.
        core: the float32 network that it was made of.
        card: of the network.
        mean: of the normalised image, per channel, where it is known: corrects the bias for what rounding does.
    """
    # The convolution that alone reads the image, once that is rounded to 8 bits.
    index = GraphIndex(model)
    first = index.sole_reader(index.image, ("QuantizeLinear", "DequantizeLinear", "Conv"))
    why_not, theirs = _why_not(model, core, card, first)
    if first is None or theirs is None:
        return OnPixels(model, why_not=why_not)
    integers, scale, steps = _on_pixels(core, theirs, card, mean)
    edit = Rewrite(model)
    image, node, before = edit.image, edit.producer(first.output[0]), edit.first()
    pixel_scale = edit.constant("raw/scale", np.float32(1))
    pixel_zero = edit.constant("raw/zero", np.uint8(0))
    # In this order: where pixels are laid out before they are dequantized, OpenVINO runs the convolution in floats.
    floats = edit.node("DequantizeLinear", [image, pixel_scale, pixel_zero], "raw/dq", before=before)
    pixels = edit.node("Transpose", [floats], "raw/planes", before=before, perm=[0, 3, 1, 2])

    def dequantized(name: str, kind: str, values: np.ndarray) -> ir.Value:
        """Whole numbers, with the scale of the weights."""
        inputs = [
            edit.constant(f"raw/{name}/{kind}", values),
            edit.constant(f"raw/{name}/scale", scale),
            edit.constant(f"raw/{name}/zero", np.zeros(len(scale), values.dtype)),
        ]
        return edit.node("DequantizeLinear", inputs, f"raw/{name}", before=before, axis=0)

    weight, bias = dequantized("weight", "int8", integers), dequantized("bias", "int32", steps)
    node.resize_inputs(3)
    for place, value in enumerate((pixels, weight, bias)):
        node.replace_input_with(place, value)
    top, left, bottom, right = node.attributes.get_ints("pads", (0, 0, 0, 0))
    node.attributes.pop("pads", None)
    edit.prune()
    edit.forget_shapes()
    declare(image, ["N", "H", "W", card.channels], TensorProto.UINT8)
    return OnPixels(edit.model(), border=(int(top), int(left), int(bottom), int(right)))


def _why_not(
    model: ModelProto, core: ModelProto, card: ModelCard, node: NodeProto | None
) -> tuple[str, NodeProto | None]:
    """Why a network cannot take pixels, or "" and the first convolution of its float32 core."""
    if card.dtype != "uint8":
        return f"its images are of {card.dtype}", None
    if node is None:
        return "its first layer is no INT8 convolution", None
    index = GraphIndex(model)
    found = {item.name: item for item in node.attribute}
    if ("group" in found and found["group"].i != 1) or ("auto_pad" in found and found["auto_pad"].s != b"NOTSET"):
        return "its first convolution is in groups, or pads by itself", None
    weight = index.producer(node.input[1])
    if weight is None or index.constant(weight.input[0]) is None:
        return "its first convolution has weights that are not rounded", None
    theirs = GraphIndex(core).producer(node.output[0])
    if theirs is None or theirs.op_type != "Conv":
        return "its first convolution is none in the float32 core", None
    return "", theirs


def _on_pixels(
    core: ModelProto, node: NodeProto, card: ModelCard, mean: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a convolution that takes pixels as they are: its weights int8, their scales, and its bias int32."""
    index = GraphIndex(core)
    weight = index.array(node.input[1]).astype(np.float64)
    bias = index.array(node.input[2]) if has_input(node, 2) else np.zeros(len(weight))
    std, shift = np.array(card.std).reshape(1, -1, 1, 1), np.array(card.mean)
    integers, scale = round_weights((weight / std).astype(np.float32), pairs=True)
    rounded = integers * scale.reshape(-1, 1, 1, 1).astype(np.float64)
    # By the rounded weights, so that the mean gives exactly the bias.
    bias = bias - (rounded.sum((2, 3)) * shift).sum(1)
    if mean is not None:
        bias += ((weight - rounded * std).sum((2, 3)) * mean).sum(1)
    # Pixels have scale 1, so biases have that of the weights.
    steps = np.clip(np.round(bias / scale), -LARGEST_BIAS, LARGEST_BIAS).astype(np.int32)
    return integers, scale, steps

"""Let an INT8 network for CPUs take the image as it is: 8-bit pixels, interleaved."""

import numpy as np
from fcn_deploy.export.graph.edit import (
    Names,
    add_constants,
    attributes,
    clone,
    constant,
    consumers,
    initializers,
    producers,
    prune,
)
from fcn_deploy.export.quantization.round_weights import round_weights
from fcn_deploy.runtime.model_card import ModelCard
from onnx import ModelProto, TensorProto, helper


def raw_input(
    model: ModelProto, core: ModelProto, card: ModelCard, mean: np.ndarray | None = None
) -> tuple[ModelProto, tuple[int, int, int, int]] | None:
    """A network of `image`, uint8 [N, H, W, C], from one of `image`, float32 [N, C, H, W], normalised.

    Normalisation goes into the first convolution, whose weights are rounded anew: it reads pixels without loss, and no
    pass over the image is left to do. Its padding becomes the caller's, who pads with the rounded mean, which is what
    zero is after normalisation, to half a grey level.

    Args:
        model: with Q/DQ, or the first stage of one.
        core: the float32 network that it was made of.
        card: of the network.
        mean: of the normalised image, per channel, where it is known: corrects the bias for what rounding does.

    Returns:
        The network and its border, (top, left, bottom, right) in pixels; None where its first layer is no INT8
        convolution, or images are not of 8 bits.
    """
    model = clone(model)
    made, known = producers(model), initializers(model)
    node, chain = None, [model.graph.input[0].name]
    for kind in ("QuantizeLinear", "DequantizeLinear", "Conv"):
        readers = consumers(model, chain[-1])
        if len(readers) != 1 or readers[0].op_type != kind or readers[0].input[0] != chain[-1]:
            return None
        node = readers[0]
        chain.append(node.output[0])
    found = attributes(node)
    theirs = next((other for other in core.graph.node if node.output[0] in other.output), None)
    weight_node = made.get(node.input[1])
    if (
        card.dtype != "uint8"
        or found.get("group", 1) != 1
        or found.get("auto_pad", "NOTSET") != "NOTSET"
        or theirs is None
        or theirs.op_type != "Conv"
        or weight_node is None
        or weight_node.input[0] not in known
    ):
        return None
    weight = constant(core, theirs.input[1]).astype(np.float64)
    bias = constant(core, theirs.input[2]) if len(theirs.input) > 2 and theirs.input[2] else np.zeros(len(weight))
    std, shift = np.array(card.std).reshape(1, -1, 1, 1), np.array(card.mean)
    integers, scale = round_weights((weight / std).astype(np.float32), pairs=True)
    rounded = integers * scale.reshape(-1, 1, 1, 1).astype(np.float64)
    # By the rounded weights, so that the mean gives exactly the bias.
    bias = bias - (rounded.sum((2, 3)) * shift).sum(1)
    if mean is not None:
        bias += ((weight - rounded * std).sum((2, 3)) * mean).sum(1)
    # Pixels have scale 1, so biases have that of the weights.
    steps = np.clip(np.round(bias / scale), -(2.0**30), 2.0**30).astype(np.int32)
    names = Names(model)
    pixels = [names("raw/scale"), names("raw/zero")]
    weights = [names(f"raw/weight/{part}") for part in ("int8", "scale", "zero")]
    biases = [names(f"raw/bias/{part}") for part in ("int32", "scale", "zero")]
    zeros = np.zeros(len(scale))
    values = (np.float32(1), np.uint8(0), integers, scale, zeros.astype(np.int8), steps, scale, zeros.astype(np.int32))
    add_constants(model, dict(zip([*pixels, *weights, *biases], values, strict=True)))
    image, planes, floats = model.graph.input[0].name, names("raw/planes"), names("raw/dq")
    first = [
        helper.make_node("Transpose", [image], [planes], name=planes, perm=[0, 3, 1, 2]),
        helper.make_node("DequantizeLinear", [planes, *pixels], [floats], name=floats),
        helper.make_node("DequantizeLinear", weights, [names("raw/weight")], name="raw/weight", axis=0),
        helper.make_node("DequantizeLinear", biases, [names("raw/bias")], name="raw/bias", axis=0),
    ]
    border = tuple(int(side) for side in found.get("pads", (0, 0, 0, 0)))
    kept = [item for item in node.attribute if item.name != "pads"]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.input[:] = [floats, names("raw/weight"), names("raw/bias")]
    rest = [other for other in model.graph.node if not set(other.output) & set(chain[1:3])]
    del model.graph.node[:]
    model.graph.node.extend([*first, *rest])
    value = helper.make_tensor_value_info(image, TensorProto.UINT8, ["N", "H", "W", card.channels])
    model.graph.input[0].CopyFrom(value)
    del model.graph.value_info[:]
    prune(model)
    return model, border

"""The last layer, where it is a fixed bilinear transposed convolution, as a Resize."""

import numpy as np
from fcn_deploy.export.graph.edit import attributes, bilinear, clone, constant, producers, prune
from fcn_deploy.export.tolerances import BILINEAR_WEIGHT
from onnx import ModelProto, NodeProto

NAME = "bilinear_deconv"
SCALES = f"{NAME}/scales"  # of the Resize that stands for the ConvTranspose: split_head knows it by them


def bilinear_deconv(model: ModelProto) -> ModelProto:
    """A model of the same labels, whose last bilinear ConvTranspose without bias became a Resize.

    Inside the image the two are equal. Near the border the ConvTranspose is smaller by a factor that all
    classes share, so argmax is the same; that holds for the last layer alone, and for labels alone. The
    scores of a sigmoid are compared with 0 alike where the threshold is one half.
    """
    model = clone(model)
    made = producers(model)
    node = made.get(model.graph.output[0].name)
    # A crop may follow.
    while node is not None and node.op_type in ("Slice", "Identity"):
        node = made.get(node.input[0])
    if node is None or node.op_type != "ConvTranspose":
        return model
    factor = bilinear_factor(model, node)
    if factor is None:
        return model
    upsampling = bilinear(model, node.input[0], node.output[0], factor, NAME)
    upsampling.name = node.name or "upsample"
    node.CopyFrom(upsampling)
    prune(model)
    return model


def bilinear_factor(model: ModelProto, node: NodeProto) -> int | None:
    """The factor by which a ConvTranspose upsamples bilinearly, each channel by itself; None if it does not."""
    if len(node.input) != 2:
        return None  # a bias would shift classes against each other near the border
    weight = constant(model, node.input[1])
    found = attributes(node)
    strides = found.get("strides", [1, 1])
    factor = strides[0]
    if weight is None or weight.ndim != 4 or strides != [factor, factor] or factor < 2:
        return None
    side = 2 * factor - factor % 2
    pad = (factor - factor % 2) // 2
    if (
        weight.shape[2:] != (side, side)
        or found.get("pads", [0] * 4) != [pad] * 4
        or any(found.get("output_padding", [0]))
        or any(value != 1 for value in found.get("dilations", [1]))
        or found.get("auto_pad", "NOTSET") != "NOTSET"
        or "output_shape" in found
    ):
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

"""Fold preparation into a model: uint8 NHWC images in."""

import numpy as np
from fcn_deploy.export.graph.rewrite import Rewrite, declare, reroute
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from onnx import ModelProto, TensorProto

KINDS = {
    "uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "int16": TensorProto.INT16, "float32": TensorProto.FLOAT,
}  # fmt: skip


def fold_input(model: ModelProto, card: ModelCard) -> PassResult:
    """A model that takes `image`, [N,H,W,C] in the card's dtype, from one that takes it normalised, [N,C,H,W].

    The mean is subtracted before the padding that may follow, never folded into the first convolution: at
    borders that would be wrong.
    """
    edit = Rewrite(model)
    image, first = edit.image, edit.first()
    readers = tuple(image.uses())
    edit.rename(image, "image")
    deviation = np.asarray(card.std, np.float32)
    scale = edit.constant("input/scale", (1 / deviation).reshape(-1, 1, 1))
    shift = edit.constant("input/shift", (np.asarray(card.mean, np.float32) / deviation).reshape(-1, 1, 1))
    floats = edit.node("Cast", [image], "input/float", before=first, to=TensorProto.FLOAT)
    planes = edit.node("Transpose", [floats], "input/planes", before=first, perm=[0, 3, 1, 2])
    scaled = edit.node("Mul", [planes, scale], "input/scaled", before=first)
    reroute(readers, edit.node("Sub", [scaled, shift], "input/normalised", before=first))
    declare(image, ["N", "H", "W", card.channels], KINDS[card.dtype])
    return PassResult(edit.model())

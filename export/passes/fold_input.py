"""Fold preparation into a model: uint8 NHWC images in."""

import numpy as np
from fcn_deploy.export.graph.edit import add_constants, clone, free_name, rename_reads
from fcn_deploy.runtime.model_card import ModelCard
from onnx import ModelProto, TensorProto, helper


def fold_input(model: ModelProto, card: ModelCard) -> ModelProto:
    """A model that takes `image`, [N,H,W,C] in the card's dtype, from one that takes it normalised, [N,C,H,W].

    The mean is subtracted before the padding that may follow, never folded into the first convolution: at
    borders that would be wrong.
    """
    model = clone(model)
    kinds = {"uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "float32": TensorProto.FLOAT}
    image = model.graph.input[0]
    rename_reads(model, image.name, "input/normalised")
    free_name(model, "image")
    scale = 1 / np.asarray(card.std, np.float32)
    shift = np.asarray(card.mean, np.float32) / np.asarray(card.std, np.float32)
    add_constants(model, {"input/scale": scale.reshape(-1, 1, 1), "input/shift": shift.reshape(-1, 1, 1)})
    steps = [
        ("Cast", ["image"], "input/float", {"to": TensorProto.FLOAT}),
        ("Transpose", ["input/float"], "input/planes", {"perm": [0, 3, 1, 2]}),
        ("Mul", ["input/planes", "input/scale"], "input/scaled", {}),
        ("Sub", ["input/scaled", "input/shift"], "input/normalised", {}),
    ]
    made = [helper.make_node(kind, reads, [out], name=out, **extra) for kind, reads, out, extra in steps]
    nodes = [*made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    image.CopyFrom(helper.make_tensor_value_info("image", kinds[card.dtype], ["N", "H", "W", card.channels]))
    return model

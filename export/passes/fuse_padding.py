"""Padding of a convolution's input as an attribute of the convolution."""

import numpy as np
from fcn_deploy.export.graph.edit import attributes, clone, constant, consumers, producers, prune
from onnx import ModelProto, helper


def fuse_padding(model: ModelProto) -> ModelProto:
    """An equal model in which constant zero padding of H and W before a convolution is part of it.

    TensorFlow's "same" padding comes as a Pad of its own, which costs a copy, and Q/DQ on both sides.
    """
    model = clone(model)
    made = producers(model)
    for node in model.graph.node:
        pad = made.get(node.input[0]) if node.op_type == "Conv" else None
        if pad is None or pad.op_type != "Pad" or attributes(pad).get("mode", "constant") != "constant":
            continue
        amounts = constant(model, pad.input[1])
        value = constant(model, pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
        axes = len(pad.input) > 3 and pad.input[3]
        found = attributes(node)
        if (
            amounts is None
            or amounts.size != 8
            or amounts[[0, 1, 4, 5]].any()
            or amounts.min() < 0
            or value is None
            or value.any()
            or axes
            or found.get("auto_pad", "NOTSET") != "NOTSET"
            or len(consumers(model, pad.output[0])) != 1
        ):
            continue
        pads = np.array(found.get("pads", [0, 0, 0, 0])) + amounts[[2, 3, 6, 7]]
        kept = [item for item in node.attribute if item.name != "pads"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads.tolist())])
        node.input[0] = pad.input[0]
    prune(model)
    return model

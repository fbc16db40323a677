"""A network that was trained on BGR, for RGB."""

import numpy as np
from fcn_deploy.export.graph.edit import Names, add_constants, attributes, clone, constant, consumers, rename_reads
from onnx import ModelProto, NodeProto, helper


def reverse_channels(model: ModelProto) -> ModelProto:
    """A model of float [N,3,H,W] that takes RGB, from one that takes BGR (or the other way round).

    The first convolutions' weights are permuted; where another operator reads the channels, they are gathered instead.
    """
    model = clone(model)
    image, names = model.graph.input[0], Names(model)
    first = _first_readers(model, image.name)
    weights = {node.input[1]: constant(model, node.input[1]) for node in first if node.op_type == "Conv"}
    if all(
        node.op_type == "Conv"
        and (weight := weights[node.input[1]]) is not None
        and weight.shape[1] == 3
        and attributes(node).get("group", 1) == 1
        for node in first
    ):
        reversed_ = {name: names(f"{name}/rgb") for name in weights}
        for node in first:
            node.input[1] = reversed_[node.input[1]]
        add_constants(model, {reversed_[name]: np.ascontiguousarray(w[:, ::-1]) for name, w in weights.items()})
        return model
    result, order = names("reverse_channels/image"), names("reverse_channels/order")
    add_constants(model, {order: np.array([2, 1, 0], np.int64)})
    name, place = image.name, 0
    # After padding, which is known by being first.
    while len(readers := [node for node in consumers(model, name) if node.op_type != "Shape"]) == 1 and readers[
        0
    ].op_type in ("Identity", "Pad"):
        name, place = readers[0].output[0], list(model.graph.node).index(readers[0]) + 1
    rename_reads(model, name, result)
    model.graph.node.insert(place, helper.make_node("Gather", [name, order], [result], name=result, axis=1))
    return model


def _first_readers(model: ModelProto, image: str) -> list[NodeProto]:
    """What reads the channels of an image, beyond padding and its size."""
    readers, names = [], [image]
    while names:
        for node in consumers(model, names.pop()):
            if node.op_type in ("Identity", "Pad"):
                names.append(node.output[0])
            elif node.op_type != "Shape":
                readers.append(node)
    return readers

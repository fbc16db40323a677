"""Make a network that wants multiples of some size take every size: pad before it, crop after it."""

import numpy as np
from onnx import ModelProto, helper

from export.graph import add_constants, clone, dims, graph_input, rename_reads, rename_result, set_shape

PADDED = "image_padded"


def pad_and_crop(model: ModelProto, multiple: int) -> ModelProto:
    """A model of float [N,C,H,W] → [N,K,H,W] for H and W ≥ 1, from one for multiples of `multiple`.

    Zeros go right and bottom. The arithmetic is (hw + m - 1) / m · m - hw, which TensorRT-RTX builds; it
    refuses the shorter Mod(Neg(hw), m).
    """
    model = clone(model)
    graph = model.graph
    image, output = graph_input(model), graph.output[0]
    result = output.name
    inner = f"{result}_padded"
    rename_result(model, result, inner)
    rename_reads(model, image.name, PADDED)
    add_constants(
        model,
        {
            "pad_multiple": np.array([multiple], np.int64),
            "pad_rounding": np.array([multiple - 1], np.int64),
            "pad_before": np.zeros(6, np.int64),
            "crop_start": np.zeros(2, np.int64),
            "crop_axes": np.array([2, 3], np.int64),
        },
    )

    def node(kind: str, inputs: list[str], out: str, **extra):
        return helper.make_node(kind, inputs, [out], name=f"any_size/{out}", **extra)

    before = [
        node("Shape", [image.name], "image_size", start=2, end=4),
        node("Add", ["image_size", "pad_rounding"], "pad_raised"),
        node("Div", ["pad_raised", "pad_multiple"], "pad_count"),
        node("Mul", ["pad_count", "pad_multiple"], "pad_size"),
        node("Sub", ["pad_size", "image_size"], "pad_after"),
        node("Concat", ["pad_before", "pad_after"], "pads", axis=0),
        node("Pad", [image.name, "pads"], PADDED, mode="constant"),
    ]
    after = [node("Slice", [inner, "crop_start", "image_size", "crop_axes"], result)]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    # Sizes known before are those of the padded image.
    del graph.value_info[:]
    channels, scores = dims(image)[1], dims(output)[1]
    set_shape(image, ["N", channels, "H", "W"])
    set_shape(output, ["N", scores, "H", "W"])
    return model

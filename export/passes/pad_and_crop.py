"""Make a network that wants multiples of some size take every size: pad before it, crop after it."""

import numpy as np
from fcn_deploy.export.graph.edit import add_constants, clone, dims, opset, rename_reads, rename_result, set_shape
from onnx import ModelProto, helper

PAD_MULTIPLE = "any_size/pad_multiple"
PAD_SMALLEST = "any_size/pad_smallest"
PADDED = "any_size/image_padded"


def pad_and_crop(model: ModelProto, multiple: int, smallest: int = 1) -> ModelProto:
    """A model of float [N,C,H,W] → [N,K,H,W] for H and W ≥ 1, from one for multiples of `multiple` ≥ `smallest`.

    Zeros go right and bottom, up to `smallest` pixels and then to the multiple. The arithmetic is
    (hw + m - 1) / m · m - hw, which TensorRT-RTX builds; it refuses the shorter Mod(Neg(hw), m). It is written for
    the model's own opset, from 11 on.
    """
    model = clone(model)
    graph = model.graph
    image, output = model.graph.input[0], graph.output[0]
    version, result = opset(model), output.name
    inner = f"{result}_padded"
    rename_result(model, result, inner)
    rename_reads(model, image.name, PADDED)
    constants = {
        PAD_MULTIPLE: np.array([multiple], np.int64),
        "any_size/pad_rounding": np.array([multiple - 1], np.int64),
        "any_size/pad_before": np.zeros(6, np.int64),
        "any_size/crop_start": np.zeros(2, np.int64),
        "any_size/crop_axes": np.array([2, 3], np.int64),
    }

    def node(kind: str, inputs: list[str], out: str, **extra):
        name = out if out.startswith("any_size/") else f"any_size/{out}"
        return helper.make_node(kind, inputs, [out], name=name, **extra)

    size = least = "any_size/image_size"
    if version >= 15:
        before = [node("Shape", [image.name], size, start=2, end=4)]
    else:
        constants["any_size/first_side"], constants["any_size/after_sides"] = np.array([2]), np.array([4])
        shape = "any_size/image_shape"
        before = [node("Shape", [image.name], shape)]
        before.append(node("Slice", [shape, "any_size/first_side", "any_size/after_sides"], size))
    if smallest > 1:
        constants[PAD_SMALLEST] = np.array([smallest], np.int64)
        least = "any_size/pad_least"
        if version >= 12:
            before.append(node("Max", [size, PAD_SMALLEST], least))
        else:  # Max is of floats alone there
            before.append(node("Less", [size, PAD_SMALLEST], "any_size/pad_small"))
            before.append(node("Where", ["any_size/pad_small", PAD_SMALLEST, size], least))
    before += [
        node("Add", [least, "any_size/pad_rounding"], "any_size/pad_raised"),
        node("Div", ["any_size/pad_raised", PAD_MULTIPLE], "any_size/pad_count"),
        node("Mul", ["any_size/pad_count", PAD_MULTIPLE], "any_size/pad_size"),
        node("Sub", ["any_size/pad_size", size], "any_size/pad_after"),
        node("Concat", ["any_size/pad_before", "any_size/pad_after"], "any_size/pads", axis=0),
        node("Pad", [image.name, "any_size/pads"], PADDED, mode="constant"),
    ]
    after = [node("Slice", [inner, "any_size/crop_start", size, "any_size/crop_axes"], result)]
    add_constants(model, constants)
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    # Sizes known before are those of the padded image.
    del graph.value_info[:]
    channels, scores = dims(image)[1], dims(output)[1]
    set_shape(image, ["N", channels, "H", "W"])
    set_shape(output, ["N", scores, "H", "W"])
    return model

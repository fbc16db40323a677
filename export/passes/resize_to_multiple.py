"""Make a network that wants multiples of some size take every size: resize the image before it, the scores after it."""

import numpy as np
from fcn_deploy.export.graph.edit import add_constants, clone, dims, opset, rename_reads, rename_result, set_shape
from onnx import ModelProto, helper

RESIZED = "any_size/image_resized"


def resize_to_multiple(model: ModelProto, multiple: int, smallest: int = 1) -> ModelProto:
    """A model of float [N,C,H,W] → [N,K,H,W] for H and W ≥ 1, from one for multiples of `multiple` ≥ `smallest`.

    The image goes bilinearly (half-pixel centres, not antialiased) to the nearest multiple, halves up, and the scores,
    which may be coarse, to the image's size. For networks that look at the whole image, whose statistics zeros change.
    """
    model = clone(model)
    graph, version = model.graph, opset(model)
    image, output = graph.input[0], graph.output[0]
    result, inner = output.name, f"{output.name}_resized"
    rename_result(model, result, inner)
    rename_reads(model, image.name, RESIZED)
    constants = {
        "any_size/half": [multiple // 2],
        "any_size/multiple": [multiple],
        "any_size/least": [-(-max(smallest, 1) // multiple) * multiple],
        "any_size/first": [0],
        "any_size/middle": [2],
        "any_size/last": [4],
    }
    add_constants(model, {name: np.array(value, np.int64) for name, value in constants.items()})
    unused = ""
    if version < 13:  # where what is without use may not be left out
        unused = "any_size/unused"
        add_constants(model, {unused: np.zeros(0, np.float32)})

    def node(kind: str, inputs: list[str], out: str, **extra):
        return helper.make_node(kind, inputs, [out], name=out if "any_size/" in out else f"any_size/{out}", **extra)

    def resize(what: str, shape: str, size: str, out: str):
        """Nodes that bring [N, C, h, w], whose shape is given, to [N, C, *size]."""
        first, whole = f"{shape}/first", f"{shape}/wanted"
        return [
            node("Slice", [shape, "any_size/first", "any_size/middle"], first),
            node("Concat", [first, size], whole, axis=0),
            node("Resize", [what, unused, unused, whole], out, mode="linear",
                 coordinate_transformation_mode="half_pixel"),
        ]  # fmt: skip

    of_image, of_scores, size, nearest, wanted = (
        f"any_size/{name}" for name in ("image_shape", "scores_shape", "image_size", "nearest", "wanted")
    )
    before = [
        node("Shape", [image.name], of_image),
        node("Slice", [of_image, "any_size/middle", "any_size/last"], size),
        node("Add", [size, "any_size/half"], "any_size/raised"),
        node("Div", ["any_size/raised", "any_size/multiple"], "any_size/count"),
        node("Mul", ["any_size/count", "any_size/multiple"], nearest),
    ]
    if version >= 12:
        before.append(node("Max", [nearest, "any_size/least"], wanted))
    else:  # Max is of floats alone there
        before.append(node("Less", [nearest, "any_size/least"], "any_size/small"))
        before.append(node("Where", ["any_size/small", "any_size/least", nearest], wanted))
    before += resize(image.name, of_image, wanted, RESIZED)
    after = [node("Shape", [inner], of_scores), *resize(inner, of_scores, size, result)]
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
    # Sizes known before are those of the resized image.
    del graph.value_info[:]
    channels, scores = dims(image)[1], dims(output)[1]
    set_shape(image, ["N", channels, "H", "W"])
    set_shape(output, ["N", scores, "H", "W"])
    return model

"""The input of a model as float32 [N,C,H,W], whatever it was."""

from fcn_deploy.export.graph.rewrite import Rewrite, declare, dims, reroute
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, TensorProto


def image_input(model: ModelProto, axis: int = 1) -> PassResult:
    """A model that takes float32 [N,C,H,W], from one of any type of number with channels on `axis`, 1 or 3."""
    edit = Rewrite(model)
    image, first = edit.image, edit.first()
    channels, kind = dims(image)[axis], int(image.dtype or TensorProto.FLOAT)
    uses, readers, value = tuple(image.uses()), image.consumers(), image
    if kind != TensorProto.FLOAT:
        casts = [node for node in readers if node.op_type == "Cast"]
        if all(node.op_type in ("Cast", "Shape") for node in readers) and all(
            node.attributes.get_int("to") == TensorProto.FLOAT for node in casts
        ):
            for node in casts:
                node.op_type = "Identity"
                node.attributes.clear()
        else:
            value = edit.node("Cast", [value], "image_input/cast", before=first, to=kind)
    if axis == 3:
        value = edit.node("Transpose", [value], "image_input/channels_last", before=first, perm=[0, 2, 3, 1])
    if value is not image:
        reroute(uses, value)
    declare(image, ["N", channels if isinstance(channels, int) and channels > 0 else "C", "H", "W"])
    return PassResult(edit.model())

"""Which node of a network makes an image's scores depend on what else is in its batch."""

from fcn_deploy.export.graph.edit import attributes, label
from fcn_deploy.export.graph.index import GraphIndex
from onnx import ModelProto, NodeProto

SCALES = ("DynamicQuantizeLinear",)  # their scale is that of the whole tensor, of all images


def batch_mixer(model: ModelProto) -> str:
    """The first node that computes something of all images of a batch at once, as notes name it; "": none is known.

    That there is none does not tell that images are apart: two are run together to see that.
    """
    index = GraphIndex(model)
    of_image = {index.image}
    for node in model.graph.node:
        if node.op_type == "If":
            return f"{label(node)}, which was not tried at every size"
        if node.op_type in ("Shape", "Size") or of_image.isdisjoint(node.input):
            continue
        of_image.update(node.output)
        if node.op_type in SCALES or (node.op_type.startswith("Reduce") and _over_all(index, node)):
            return label(node)
    return ""


def _over_all(index: GraphIndex, node: NodeProto) -> bool:
    """Whether a reduction is over the first axis too."""
    axes = attributes(node).get("axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        axes = index.constant(node.input[1])
        if axes is None:
            return False
    if axes is None or not len(axes):
        return not attributes(node).get("noop_with_empty_axes")
    return 0 in [int(axis) for axis in axes]

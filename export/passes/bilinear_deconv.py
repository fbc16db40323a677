"""The last layer, where it is a fixed bilinear transposed convolution, as a Resize."""

from fcn_deploy.export.analysis.model_end import FADING, bilinear_factor
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.graph.rewrite import Rewrite, needed_input
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.export.passes.upsample_scores import bilinear
from onnx import ModelProto


def bilinear_deconv(model: ModelProto) -> PassResult:
    """A model of the same labels, whose last bilinear ConvTranspose without bias became a Resize.

    Inside the image the two are equal. Near the border the ConvTranspose is smaller by a factor that all
    classes share, so argmax is the same; that holds for the last layer alone, and for labels alone. The
    scores of a sigmoid are compared with 0 alike where the threshold is one half.
    """
    index = GraphIndex(model)
    node = index.before(index.result, ("Slice", "Identity"))  # a crop may follow
    if node is None or node.op_type != "ConvTranspose":
        return PassResult(model, why_not="its last layer is no transposed convolution")
    factor = bilinear_factor(index, node)
    if factor is None:
        return PassResult(model, why_not="its last transposed convolution is not bilinear, or has a bias")
    edit = Rewrite(model)
    old = edit.producer(node.output[0])
    resized = bilinear(edit, needed_input(old), factor, FADING, old.name or "upsample", before=old)
    edit.replace(old.outputs[0], resized)
    edit.prune()
    return PassResult(edit.model())

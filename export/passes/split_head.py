"""Cut a segmentation model into its core and its end: the last upsampling, padding and cropping.

The runtime does the work of the end exactly and many times cheaper, since labels at full size need
interpolation only where classes meet.
"""

from dataclasses import dataclass, field

from fcn_deploy.export.analysis.model_end import find_end
from fcn_deploy.export.graph.rewrite import Rewrite, declare, dims, reroute
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.runtime.engine_format.stage import Upsampling
from onnx import ModelProto


@dataclass(frozen=True)
class WithoutUpsampling(PassResult):
    """A core, and what was cut off: what the runtime does in its place. `why_not` says why no upsampling was.

    Attributes:
        upsampling: of its scores; of mode `none` where it stays in the core.
        size_multiple: the runtime pads sizes to it, as the model did by itself before; 1: none.
        smallest: the least size that it pads to; 1: none.
        sigmoid: whether a Sigmoid was dropped, so that scores are logits where they were probabilities.
    """

    upsampling: Upsampling = field(default_factory=Upsampling)
    size_multiple: int = 1
    smallest: int = 1
    sigmoid: bool = False


def split_head(model: ModelProto, labels: bool = True) -> WithoutUpsampling:
    """The core of a model of [N,C,H,W] → [N,K,H,W] of the image's size: input `image`, output `scores`, uncropped.

    Args:
        model: stays as it is.
        labels: are wanted, or masks, which an activation after the upsampling does not change: it is dropped. Not
            where values are wanted.
    """
    end, edit = find_end(model, labels), Rewrite(model)
    image, channels = edit.image, dims(edit.result)[1]
    if end.padding is not None:
        reroute(edit.value(end.padding.padded).uses(), image)
    scores = edit.value(end.scores)
    del edit.graph.outputs[1:]
    edit.graph.outputs[0] = scores
    edit.rename(scores, "scores")
    edit.rename(image, "image")
    edit.prune()
    edit.forget_shapes()
    declare(scores, ["N", channels, "h", "w"])
    declare(image, ["N", dims(image)[1], "H", "W"])
    padding = end.padding
    return WithoutUpsampling(
        edit.model(),
        why_not=end.why_not,
        upsampling=end.upsampling,
        size_multiple=padding.multiple if padding is not None else 1,
        smallest=padding.smallest if padding is not None else 1,
        sigmoid=end.sigmoid,
    )

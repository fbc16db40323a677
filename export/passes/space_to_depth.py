"""Let a first convolution that skips pixels take squares of them as channels, and skip none."""

from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.graph.edit import attributes
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.graph.rewrite import Rewrite, array, declare, needed_input
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.runtime.pixels.prepare import Border
from onnx import ModelProto, NodeProto, TensorProto

MOST_WEIGHTS = 4  # times as many as before: more is never made up for


@dataclass(frozen=True)
class OnBlocks(PassResult):
    """A network of squares of pixels.

    Attributes:
        border, block: of the stage (`Stage`) that takes its input.
    """

    border: Border | None = None
    block: int = 1


def space_to_depth(model: ModelProto, border: Border) -> OnBlocks:
    """A network of `image`, uint8 [N, h, w, s² · C], from one of 8-bit pixels, whose first stride is s.

    A convolution of few channels that skips pixels is the slowest of all for the work it does: libraries gather its
    windows a few bytes at a time. With the pixels of each s × s square as channels (Shi et al., 2016, backwards) a
    window of k × k at stride s is one of ⌈k / s⌉ × ⌈k / s⌉ at stride 1, with zeros for weights where it sees more. It
    sums the same integers, so its results are the same, at every size.

    Args:
        model: as `raw_input` gives it, or the first stage of such a network.
        border: that its caller pads with.
    """
    index = GraphIndex(model)
    node = index.sole_reader(index.image, ("DequantizeLinear", "Transpose", "Conv"))
    stride, why_not = _stride(index, node)
    if node is None or why_not:
        return OnBlocks(model, why_not=why_not, border=border)
    edit = Rewrite(model)
    image, convolution = edit.image, edit.producer(node.output[0])
    source = needed_input(convolution, 1).producer()
    assert source is not None, "it was looked for"
    weights = array(needed_input(source))
    # Squares begin at multiples of the stride from the image's first pixel, so that they are copied whole.
    above, left = (-side % stride for side in border[:2])
    blocks, (below, right) = _by_blocks(weights, (above, left), stride)
    if blocks.size > MOST_WEIGHTS * weights.size:
        why = f"its first convolution would have {blocks.size // weights.size} times the weights"
        return OnBlocks(model, why_not=why, border=border)
    source.replace_input_with(0, edit.constant("blocks/weight", blocks))
    convolution.attributes.pop("strides")
    convolution.attributes.pop("kernel_shape", None)
    edit.prune()
    edit.forget_shapes()
    declare(image, ["N", "h", "w", blocks.shape[1]], TensorProto.UINT8)
    sides = (above, left, below, right)
    top, left, bottom, right = (side + more for side, more in zip(border, sides, strict=True))
    return OnBlocks(edit.model(), border=(top, left, bottom, right), block=stride)


def _stride(index: GraphIndex, node: NodeProto | None) -> tuple[int, str]:
    """The stride of a first convolution, and why it cannot take squares of pixels, or ""."""
    if node is None or index.model.graph.input[0].type.tensor_type.elem_type != TensorProto.UINT8:
        return 1, "its first layer is no convolution of 8-bit pixels"
    found = attributes(node)
    strides = found.get("strides", [1, 1])
    if strides[0] != strides[1] or strides[0] == 1:
        return 1, f"its first convolution has strides {strides[0]} and {strides[1]}"
    padded = any(found.get("pads", [])) or found.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if padded or found.get("group", 1) != 1 or set(found.get("dilations", [1])) != {1}:
        return 1, "its first convolution pads, is dilated or in groups"
    weight = index.producer(node.input[1])
    if weight is None or weight.op_type != "DequantizeLinear" or index.constant(weight.input[0]) is None:
        return 1, "its first convolution has weights that are not rounded"
    if len(index.consumers(node.input[1])) != 1:
        return 1, "its first convolution shares its weights"
    return int(strides[0]), ""


def _by_blocks(weights: np.ndarray, before: tuple[int, int], stride: int) -> tuple[np.ndarray, tuple[int, int]]:
    """[K, C, h, w] for squares of pixels as channels: [K, stride² · C, h', w'], and the zeros put below and right.

    `before`: those above and left.
    """
    filters, channels, *sides = weights.shape
    after = tuple(-(zeros + side) % stride for zeros, side in zip(before, sides, strict=True))
    padded = np.pad(weights, ((0, 0), (0, 0), (before[0], after[0]), (before[1], after[1])))
    high, wide = (side // stride for side in padded.shape[2:])
    blocks = padded.reshape(filters, channels, high, stride, wide, stride).transpose(0, 3, 5, 1, 2, 4)
    return np.ascontiguousarray(blocks.reshape(filters, stride**2 * channels, high, wide)), (after[0], after[1])

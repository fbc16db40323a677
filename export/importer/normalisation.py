"""What images a foreign model takes, where its input's type or its first operators leave no doubt of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.graph.edit import attributes, label
from fcn_deploy.export.graph.index import GraphIndex
from onnx import ModelProto, NodeProto, TensorProto

NORMALISED = 12  # the largest magnitude of a normalised pixel: of a mean and a std per channel, it is below 3
SMALLEST_SPAN = 0.5  # a normalised black and white are further apart
INTEGERS = (TensorProto.UINT8, TensorProto.INT32, TensorProto.INT64)
BYTE = 255  # by which a network multiplies images of 0..1 that wants 8 bits inside


@dataclass(frozen=True)
class Normalisation:
    """The mean and std of a card, per channel, of images as they are, and why."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    reason: str


@dataclass
class _Affine:
    """What was done to each channel of the image so far: times slope, plus shift; by `last`, or by nothing.

    `bytes`: it was made whole numbers then, as only those of 8 bits are.
    """

    slope: np.ndarray
    shift: np.ndarray
    last: NodeProto | None = None
    bytes: bool = False

    def follow(self, node: NodeProto, value: np.ndarray, from_image: bool) -> bool:
        """Take Mul, Div, Add or Sub with a constant in; False where it is not such; `from_image`: minus the value."""
        if node.op_type == "Div" and not from_image:
            return False
        if node.op_type in ("Mul", "Div"):
            factor = value if node.op_type == "Mul" else 1 / value
            self.slope, self.shift = self.slope * factor, self.shift * factor
        elif node.op_type == "Add":
            self.shift = self.shift + value
        elif from_image:
            self.shift = self.shift - value
        else:
            self.slope, self.shift = -self.slope, value - self.shift
        self.last = node
        return True

    def follow_batch_norm(
        self, node: NodeProto, scale: np.ndarray, bias: np.ndarray, mean: np.ndarray, var: np.ndarray
    ) -> None:
        """Take a BatchNormalization in, whose numbers are as many as channels."""
        slope = scale / np.sqrt(var + attributes(node).get("epsilon", 1e-5))
        self.slope, self.shift, self.last = self.slope * slope, (self.shift - mean) * slope + bias, node


def find_normalisation(model: ModelProto, channels: int, whole_numbers: bool) -> Normalisation | None:
    """The normalisation of the images that a model takes; None where nothing tells.

    Args:
        model: float32 [N,C,H,W] in.
        channels: C.
        whole_numbers: the input was of an integer type.
    """
    zero, one = (0.0,) * channels, (1.0,) * channels
    if whole_numbers:
        return Normalisation(zero, one, "takes whole numbers: images go in as they are, mean 0 and std 1")
    first = _first_arithmetic(model, channels)
    if first.last is None:
        return None
    black, bright_byte, bright_one = first.shift, 255 * first.slope + first.shift, first.slope + first.shift
    to_unit = max(np.abs(black).max(), np.abs(bright_byte).max()) <= NORMALISED
    spread = np.abs(bright_byte - black).min() >= SMALLEST_SPAN
    as_it_is = np.all(first.slope == 1) and (first.bytes or np.abs(first.shift).min() > NORMALISED)
    if (to_unit and spread) or as_it_is:
        why = f"normalises 8-bit images by itself (node {label(first.last)}): they go in as they are, mean 0 and std 1"
        return Normalisation(zero, one, why)
    # A BatchNormalization of numbers near 1 may as well be of normalised images.
    by_statistics = first.last.op_type == "BatchNormalization"
    of_bytes = np.all(np.isclose(first.slope, BYTE)) and max(np.abs(black).max(), np.abs(bright_one).max()) <= BYTE
    normalised = np.abs(first.slope).min() > 1 and max(np.abs(black).max(), np.abs(bright_one).max()) <= NORMALISED
    if not by_statistics and (of_bytes or normalised):
        why = (
            f"normalises images in 0..1 by itself (node {label(first.last)}): they are divided by 255, mean 0 and "
            "std 255"
        )
        return Normalisation(zero, (255.0,) * channels, why)
    return None


def _first_arithmetic(model: ModelProto, channels: int) -> _Affine:
    """What a model's first operators do to each channel of the image; pixels may be put into another order first."""
    done = _Affine(np.ones(channels), np.zeros(channels))
    graph = GraphIndex(model)
    name = graph.image
    while True:
        if done.last is None and (joined := _joined(graph, name)) is not None:
            name = joined.output[0]
            continue
        if (node := _only_reader(graph, name)) is None:
            break
        if node.op_type in ("Mul", "Div", "Add", "Sub"):
            from_image = node.input[0] == name
            value = graph.constant(node.input[1 if from_image else 0])
            if value is None or not _per_channel(value.shape, channels):
                break
            if not done.follow(node, value.reshape(-1).astype(np.float64), from_image):
                break
        elif node.op_type == "BatchNormalization":
            # As Keras's networks have it first, for images of 8 bits.
            numbers = [graph.constant(each) for each in node.input[1:5]]
            if done.last is not None or any(each is None or each.shape != (channels,) for each in numbers):
                break
            done.follow_batch_norm(node, *(each.astype(np.float64) for each in numbers if each is not None))
            break
        elif node.op_type == "Cast" and attributes(node)["to"] in INTEGERS:
            done.bytes, done.last = True, done.last or node
            break
        elif node.op_type == "Clip" and _clips_to_bytes(graph, node):
            done.bytes, done.last = True, done.last or node
        elif node.op_type not in ("Identity", "Cast", "Pad", "Resize") and (
            done.last is not None or not _orders(graph, node)
        ):
            break
        name = node.output[0]
    return done


def _clips_to_bytes(graph: GraphIndex, node: NodeProto) -> bool:
    low, high = (graph.input_constant(node, place) for place in (1, 2))
    return low is not None and high is not None and bool(low == 0 and high == BYTE)


def _orders(graph: GraphIndex, node: NodeProto) -> bool:
    """Whether a node puts the channels of an image into another order, and does nothing else."""
    if node.op_type == "Gather":
        return attributes(node).get("axis", 0) == 1
    if node.op_type != "Slice" or len(node.input) < 5:
        return False
    axes, steps = graph.constant(node.input[3]), graph.constant(node.input[4])
    return axes is not None and steps is not None and [*axes, *steps] in ([1, -1], [-3, -1])


def _only_reader(graph: GraphIndex, name: str) -> NodeProto | None:
    readers = [node for node in graph.consumers(name) if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 else None


def _joined(graph: GraphIndex, name: str) -> NodeProto | None:
    """The Concat that alone reads what a Split, or Slices, or Gathers make of an image; None: none does."""
    parts = [node for node in graph.consumers(name) if node.op_type != "Shape"]
    readers = [reader for part in parts for result in part.output for reader in graph.consumers(result)]
    kinds = {part.op_type for part in parts}
    alone = bool(readers) and all(reader is readers[0] for reader in readers)
    if not alone or readers[0].op_type != "Concat" or kinds not in ({"Split"}, {"Slice"}, {"Gather"}):
        return None
    return readers[0]


def _per_channel(shape: Sequence[int], channels: int) -> bool:
    """Whether a constant of this shape is one number, or one for each channel of [N,C,H,W]."""
    size = int(np.prod(shape, dtype=np.int64))
    return size == 1 or (size == channels and tuple(shape[-3:]) == (channels, 1, 1))

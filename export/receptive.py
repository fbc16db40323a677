"""The receptive field of a network, computed on its graph: what of an image a score depends on.

Each axis is followed by itself, from the image to the scores. Cell i of a tensor depends on the pixels from
stride·i + low to stride·i + high (Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks",
2019, in exact fractions, and with upsampling: the widest of its phases).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from onnx import ModelProto, NodeProto

from export.graph import attributes, initializers

POINTWISE = frozenset((
    "Abs", "BatchNormalization", "Cast", "Ceil", "Celu", "Clip", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp",
    "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LRN", "LeakyRelu", "Log", "Mish", "Neg", "PRelu",
    "QuantizeLinear", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Tanh",
    "ThresholdedRelu",
    "Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum", "Where", "Greater", "Less", "Equal", "And", "Or", "Not",
))  # fmt: skip
OVER_CHANNELS = frozenset(("Concat", "Split", "Softmax", "LogSoftmax"))
AXES = (0, 1)  # vertical, horizontal


class WholeImageError(Exception):
    """The network cannot be tiled; the text is the operator that looks at the whole image, or may."""


@dataclass(frozen=True)
class Field:
    """What a tensor's cells depend on along one axis, in pixels of the image.

    Attributes:
        stride: pixels from one cell to the next.
        low, high: cell i depends on the pixels stride·i + low … stride·i + high. They hold the cell's own place,
            stride·i … stride·(i + 1) - 1, so that a cell outside a tile never has its field inside.
        period: the image may be moved by this many pixels, and all that is computed moves by whole cells.
    """

    stride: Fraction = Fraction(1)
    low: Fraction = Fraction(0)
    high: Fraction = Fraction(0)
    period: int = 1

    def reads(self, step: Fraction, first: Fraction, last: Fraction) -> "Field":
        """Of an operator whose output cell j reads the cells step·j + first … step·j + last of this."""
        stride = self.stride * step
        low = min(self.low + self.stride * first, Fraction(0))
        high = max(self.high + self.stride * last, stride - 1)
        # The smallest multiple of the period that is a whole number of the new cells.
        cells = self.period / stride
        return Field(stride, low, high, self.period * cells.denominator)

    def joined(self, other: "Field") -> "Field":
        low, high = min(self.low, other.low), max(self.high, other.high)
        return Field(self.stride, low, high, math.lcm(self.period, other.period))


@dataclass(frozen=True)
class Receptive:
    """Of a network's scores, vertical and horizontal.

    Attributes:
        fields: of the scores.
        halo: pixels around a tile that its scores depend on, at most, as a multiple of `period`.
        period: in pixels: a tile that begins at a multiple of it gives the scores of the whole image.
    """

    fields: tuple[Field, Field]

    @property
    def period(self) -> int:
        return math.lcm(*(field.period for field in self.fields))

    @property
    def halo(self) -> tuple[int, int]:
        return tuple(
            math.ceil(max(-field.low, field.high - field.stride + 1, 0) / self.period) * self.period
            for field in self.fields
        )


def receptive_field(core: ModelProto, start: tuple[Field, Field] = (Field(), Field())) -> Receptive:
    """The receptive field of a network's result.

    Args:
        core: the network, or a part of one.
        start: of its input, vertical and horizontal; what is given stands for the image itself.

    Raises:
        WholeImageError: it cannot be had; names the operator.
    """
    constants = initializers(core)
    fields: dict[str, tuple[Field, Field]] = {core.graph.input[0].name: start}
    for node in core.graph.node:
        if node.op_type == "Constant":
            constants |= {node.output[0]: np.asarray(next(iter(attributes(node).values()), None))}
            continue
        read = [fields[name] for name in node.input if name in fields]
        unknown = [name for name in node.input if name and name not in fields and name not in constants]
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]  # weights; their shape is what matters
            continue
        if not read:
            continue  # arithmetic on shapes, say: it matters where a feature map meets it
        if unknown:
            raise WholeImageError(f"{_named(node)} takes {unknown[0]}, which is computed from the image's size")
        found = tuple(_through(node, axis, [pair[axis] for pair in read], constants) for axis in AXES)
        fields |= dict.fromkeys((name for name in node.output if name), found)
    scores = core.graph.output[0].name
    if scores not in fields:
        raise WholeImageError(f"{scores} does not depend on the image by operators that are known")
    return Receptive(fields[scores])


def _through(node: NodeProto, axis: int, read: list[Field], constants: Mapping[str, np.ndarray]) -> Field:
    """The field of a node's output along an axis."""
    field = read[0]
    for other in read[1:]:
        if other.stride != field.stride:
            raise WholeImageError(f"{_named(node)} joins feature maps of strides {field.stride} and {other.stride}")
        field = field.joined(other)
    kind, given = node.op_type, attributes(node)
    if kind in POINTWISE:
        _refuse_maps(node, constants)
        return field
    if kind in OVER_CHANNELS:
        _refuse_maps(node, constants)
        if given.get("axis", -1 if kind.endswith("oftmax") else 0) != 1:
            raise WholeImageError(f"{_named(node)} works along axis {given.get('axis')}, not over channels")
        return field
    if kind not in _LOCAL:
        raise WholeImageError(_named(node))
    return _LOCAL[kind](node, axis, field, given, constants)


def _named(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _refuse_maps(node: NodeProto, constants: Mapping[str, np.ndarray]) -> None:
    """A constant that differs from place to place ties the network to it."""
    for name in node.input:
        shape = constants[name].shape if name in constants else ()
        if node.op_type not in ("BatchNormalization", "QuantizeLinear", "DequantizeLinear") and any(
            side > 1 for side in shape[-2:] if len(shape) >= 3
        ):
            raise WholeImageError(f"{_named(node)} has a constant of {list(shape)}, which differs from place to place")


def _window(node: NodeProto, axis: int, field: Field, given: dict, constants: Mapping[str, np.ndarray]) -> Field:
    """Conv and pooling."""
    kernel = given.get("kernel_shape")
    if kernel is None and node.op_type == "Conv" and node.input[1] in constants:
        kernel = constants[node.input[1]].shape[2:]
    if kernel is None or len(kernel) != 2:
        raise WholeImageError(f"{_named(node)} has no kernel of a known size")
    step, dilation = (given.get(name, (1, 1))[axis] for name in ("strides", "dilations"))
    reach = (kernel[axis] - 1) * dilation
    if (auto := given.get("auto_pad", "NOTSET")) in ("SAME_UPPER", "SAME_LOWER"):
        # At multiples of the stride, which tiles are.
        total = max(reach + 1 - step, 0)
        before = total // 2 if auto == "SAME_UPPER" else total - total // 2
    else:
        before = 0 if auto == "VALID" else given.get("pads", (0, 0, 0, 0))[axis]
    return field.reads(Fraction(step), Fraction(-before), Fraction(reach - before))


def _transposed(node: NodeProto, axis: int, field: Field, given: dict, constants: Mapping[str, np.ndarray]) -> Field:
    weight = constants.get(node.input[1])
    if weight is None or weight.ndim != 4 or given.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in given:
        raise WholeImageError(f"{_named(node)} has no padding or kernel of a known size")
    step, dilation = (given.get(name, (1, 1))[axis] for name in ("strides", "dilations"))
    before, reach = given.get("pads", (0, 0, 0, 0))[axis], (weight.shape[2 + axis] - 1) * dilation
    # Output j reads input i where 0 ≤ j + before - step·i ≤ reach.
    return field.reads(Fraction(1, step), Fraction(before - reach, step), Fraction(before, step))


def _resize(node: NodeProto, axis: int, field: Field, given: dict, constants: Mapping[str, np.ndarray]) -> Field:
    place = 1 if node.op_type == "Upsample" else 2
    scales = constants.get(node.input[place]) if len(node.input) > place else None
    if scales is None or scales.size != 4:
        raise WholeImageError(f"{_named(node)} goes to a size that is computed, not by a constant factor")
    factor = Fraction(float(scales[2 + axis])).limit_denominator(1024)
    coordinates = given.get("coordinate_transformation_mode", "half_pixel")
    if node.op_type == "Upsample":
        coordinates = "asymmetric"
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "asymmetric") or given.get("antialias"):
        raise WholeImageError(f"{_named(node)} has the coordinates {coordinates}, which depend on the image's size")
    shift = Fraction(0) if coordinates == "asymmetric" else Fraction(1, 2)
    mode = given.get("mode", "nearest")
    offsets = []
    for phase in range(factor.numerator):  # after which the pattern repeats
        x = (phase + shift) / factor - shift
        nearest = (math.floor(x), math.ceil(x)) if mode == "nearest" else (math.floor(x), math.floor(x) + 1)
        reach = 1 if mode == "cubic" else 0
        offsets += [cell - phase / factor for cell in (nearest[0] - reach, nearest[1] + reach)]
    return field.reads(1 / factor, min(offsets), max(offsets))


def _pad(node: NodeProto, axis: int, field: Field, given: dict, constants: Mapping[str, np.ndarray]) -> Field:
    pads = given.get("pads", constants.get(node.input[1]) if len(node.input) > 1 else None)
    if pads is None or len(pads) != 8 or len(node.input) > 3 or given.get("mode", "constant") == "wrap":
        raise WholeImageError(f"{_named(node)} pads by what is computed")
    before = int(pads[2 + axis])
    # What is mirrored at a border lies within as many cells of it.
    reach = max(int(pads[2 + axis]), int(pads[6 + axis]), 0) if given.get("mode", "constant") == "reflect" else 0
    return field.reads(Fraction(1), Fraction(-before - reach), Fraction(-before + reach))


def _depth_to_space(node: NodeProto, axis: int, field: Field, given: dict, constants) -> Field:
    block = given["blocksize"]
    return field.reads(Fraction(1, block), Fraction(1 - block, block), Fraction(0))


def _space_to_depth(node: NodeProto, axis: int, field: Field, given: dict, constants) -> Field:
    return field.reads(Fraction(given["blocksize"]), Fraction(0), Fraction(given["blocksize"] - 1))


_LOCAL: dict[str, Callable[..., Field]] = {
    "Conv": _window,
    "MaxPool": _window,
    "AveragePool": _window,
    "LpPool": _window,
    "ConvTranspose": _transposed,
    "Resize": _resize,
    "Upsample": _resize,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}

"""The receptive field of a network, computed on its graph: what of an image a score depends on.

Each axis is followed by itself, from the image to the scores. Cell i of a tensor depends on the pixels from
stride·i + low to stride·i + high (Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks",
2019, in exact fractions, and with upsampling: the widest of its phases).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.graph.edit import attributes, clone, constant, initializers, opset, prune
from fcn_deploy.runtime.backends.onnxruntime import one_line, session
from onnx import ModelProto, NodeProto

POINTWISE = frozenset((
    "Abs", "BatchNormalization", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "CastLike", "Ceil",
    "Celu", "Clip", "Cos", "DequantizeLinear", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "PRelu", "QuantizeLinear",
    "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Swish",
    "Tanh", "ThresholdedRelu",
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod",
    "Mul", "Not", "Or", "Pow", "Sub", "Sum", "Where", "Xor",
))  # fmt: skip
REDUCTIONS = frozenset((
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
))  # fmt: skip
# What is sure to look at all of its input, or to carry something from one end of it to the other.
GLOBAL = frozenset((
    "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GroupNormalization", "InstanceNormalization",
    "MeanVarianceNormalization", "CumSum", "LSTM", "GRU", "RNN", "Attention",
))  # fmt: skip
AXES = (0, 1)  # vertical, horizontal
PLACES = ("H", "W")
NCHW = ("N", "C", "H", "W")


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
class Features:
    """A feature map.

    Attributes:
        fields: vertical and horizontal.
        layout: what each of its dimensions is: N, H, W; C for channels, and for whatever has no place in the image.
    """

    fields: tuple[Field, Field]
    layout: tuple[str, ...] = NCHW

    def reads(self, place: str, step: Fraction, first: Fraction, last: Fraction) -> "Features":
        """As Field.reads, along H or W."""
        fields = list(self.fields)
        fields[PLACES.index(place)] = fields[PLACES.index(place)].reads(Fraction(step), Fraction(first), Fraction(last))
        return replace(self, fields=tuple(fields))


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
    try:
        return _receptive_field(core, start)
    except WholeImageError as error:
        # Of several reasons the one that is plain.
        raise WholeImageError(global_operator(core) or str(error)) from error


def global_operator(model: ModelProto) -> str:
    """The first operator that is sure to look at the whole image, as pooling over all of it and attention do; "": none.

    That a network has none does not tell that it looks at a neighbourhood: receptive_field does.
    """
    found = {model.graph.input[0].name}  # what is computed of the image's values, not of its size
    for node in model.graph.node:
        if node.op_type in ("Shape", "Size") or not found & set(node.input):
            continue
        found |= set(node.output)
        if node.op_type in GLOBAL or (node.op_type == "MatMul" and found >= set(node.input)):
            return _named(node)
        if node.op_type in REDUCTIONS:
            axes = attributes(node).get("axes")
            if axes is None and len(node.input) > 1:
                axes = constant(model, node.input[1])
            if axes is None or {int(axis) % 4 for axis in axes} >= {2, 3}:
                return _named(node)
    return ""


def _receptive_field(core: ModelProto, start: tuple[Field, Field]) -> Receptive:
    constants = initializers(core)
    known = {core.graph.input[0].name: Features(start)}
    for node in core.graph.node:
        if node.op_type == "Constant":
            constants |= {node.output[0]: np.asarray(constant(core, node.output[0]))}
            continue
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]  # weights; their shape is what matters
            continue
        read = [known[name] for name in node.input if name in known]
        if not read or node.op_type in ("Shape", "Size"):
            continue  # arithmetic on shapes, say: it matters where a feature map meets it
        follow = _FOLLOWED.get(node.op_type)
        if follow is None or node.domain not in ("", "ai.onnx"):
            raise WholeImageError(_named(node))
        unknown = [name for name in node.input if name and name not in known and name not in constants]
        if unknown and node.op_type not in ("Reshape", "Flatten"):
            raise WholeImageError(f"{_named(node)} takes {unknown[0]}, which is computed from the image's size")
        result = follow(_Reading(node, attributes(node), read, constants, core, start))
        # Second results are indices of places, or the same map.
        outputs = node.output[:1] if node.op_type in ("MaxPool", "TopK") else node.output
        known |= dict.fromkeys((name for name in outputs if name), result)
    scores = core.graph.output[0].name
    if scores not in known:
        raise WholeImageError(f"{scores} does not depend on the image by operators that are known")
    if known[scores].layout != NCHW:
        raise WholeImageError(f"{scores} is not laid out as [N,K,H,W]")
    return Receptive(known[scores].fields)


@dataclass(frozen=True)
class _Reading:
    """A node, its attributes, the feature maps it reads, and what else is needed to follow it."""

    node: NodeProto
    given: dict
    read: list[Features]
    constants: Mapping[str, np.ndarray]
    core: ModelProto
    start: tuple[Field, Field]

    @property
    def name(self) -> str:
        return _named(self.node)

    def input(self, place: int) -> np.ndarray | None:
        """A constant input; None where it is left out."""
        name = self.node.input[place] if len(self.node.input) > place else ""
        return self.constants.get(name)

    def first(self, layout: tuple[str, ...] | None = None) -> Features:
        """The one feature map it reads, its first input; of that layout, where one is asked for."""
        if len(self.read) > 1 or self.node.input[0] in self.constants:
            raise WholeImageError(f"{self.name} takes two feature maps, or one in another's place")
        if layout is not None and self.read[0].layout != layout:
            raise WholeImageError(f"{self.name} takes a feature map that is laid out as {self.read[0].layout}")
        return self.read[0]

    def axes(self, place: int, rank: int) -> list[int] | None:
        """Axes as an attribute, or in later opsets as an input; None where they are left out or computed."""
        axes = self.given.get("axes")
        if axes is None:
            axes = self.input(place)
        return None if axes is None else [int(axis) % rank for axis in np.ravel(axes)]


def _named(node: NodeProto) -> str:
    return f"{node.op_type} {node.name or node.output[0]}"


def _joined(reading: _Reading) -> Features:
    """Of all feature maps that a node reads, place by place."""
    first = reading.read[0]
    for other in reading.read[1:]:
        if other.layout != first.layout:
            raise WholeImageError(f"{reading.name} joins feature maps laid out as {first.layout} and {other.layout}")
        for ours, theirs in zip(first.fields, other.fields, strict=True):
            if ours.stride != theirs.stride:
                raise WholeImageError(f"{reading.name} joins feature maps of strides {ours.stride} and {theirs.stride}")
        fields = tuple(ours.joined(theirs) for ours, theirs in zip(first.fields, other.fields, strict=True))
        first = Features(fields, first.layout)
    return first


def _over_channels(reading: _Reading, axes: Sequence[int] | None, layout: tuple[str, ...]) -> None:
    """Refuse what works along other axes than channels."""
    if axes is None or any(layout[axis] != "C" for axis in axes):
        raise WholeImageError(
            f"{reading.name} works along {axes and [layout[axis] for axis in axes]}, not over channels"
        )


def _pointwise(reading: _Reading) -> Features:
    features, kind = _joined(reading), reading.node.op_type
    if kind == "BatchNormalization":
        if features.layout[1] != "C" or reading.given.get("training_mode"):
            raise WholeImageError(f"{reading.name} takes its statistics from the image")
        return features
    for name in reading.node.input:
        shape = reading.constants[name].shape if name in reading.constants else ()
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            if math.prod(shape) > 1:
                _over_channels(reading, [reading.given.get("axis", 1) % len(features.layout)], features.layout)
            continue
        # A constant that differs from place to place ties the network to it.
        if len(shape) > len(features.layout) or any(
            side > 1 and label != "C" for side, label in zip(shape[::-1], features.layout[::-1], strict=False)
        ):
            raise WholeImageError(f"{reading.name} has a constant of {list(shape)}, which differs from place to place")
    return features


def _along_channels(reading: _Reading) -> Features:
    """Concat, Split, and what is computed over all channels of a place."""
    features, kind = _joined(reading), reading.node.op_type
    rank = len(features.layout)
    axis = reading.given.get("axis", 0 if kind in ("Concat", "Split", "ArgMax", "ArgMin") else -1) % rank
    axes = [axis]
    if kind.endswith(("max", "Softmax")) and not kind.startswith("Arg") and opset(reading.core) < 13:
        # Everything from the axis on is one, there; the axis is 1 where nothing is said.
        axes = list(range(reading.given.get("axis", 1) % rank, rank))
    elif kind.endswith("Normalization"):
        axes = list(range(axis, rank))
    _over_channels(reading, axes, features.layout)
    if kind == "Concat":
        for name in reading.node.input:
            shape = reading.constants[name].shape if name in reading.constants else ()
            if any(side > 1 for side, label in zip(shape, features.layout, strict=False) if label != "C"):
                raise WholeImageError(f"{reading.name} has a constant of {list(shape)}, which is of one size")
    elif len(reading.read) > 1:
        raise WholeImageError(f"{reading.name} takes two feature maps")
    if kind.startswith("Arg") and not reading.given.get("keepdims", 1):
        return _without(features, axes)
    return features


def _without(features: Features, axes: Sequence[int]) -> Features:
    return replace(features, layout=tuple(label for i, label in enumerate(features.layout) if i not in axes))


def _reduced(reading: _Reading) -> Features:
    features = reading.first()
    axes = reading.axes(1, len(features.layout))
    if not axes and reading.given.get("noop_with_empty_axes"):
        return features
    if axes is None or any(features.layout[axis] != "C" for axis in axes):
        raise WholeImageError(reading.name)
    return features if reading.given.get("keepdims", 1) else _without(features, axes)


def _matmul(reading: _Reading) -> Features:
    """A dense layer at every place, from either side: the channels are the last dimension, or the last but one."""
    features = reading.read[0]
    on_right = reading.node.input[0] in reading.constants
    weight = reading.constants.get(reading.node.input[0 if on_right else 1])
    if len(reading.read) > 1 or weight is None or weight.ndim != 2:
        raise WholeImageError(reading.name)
    _over_channels(reading, [len(features.layout) - (2 if on_right else 1)], features.layout)
    return features


def _gathered(reading: _Reading) -> Features:
    features, indices = reading.first(), reading.input(1)
    axis = reading.given.get("axis", 0) % len(features.layout)
    if indices is None or indices.ndim > 1:
        raise WholeImageError(f"{reading.name} chooses by what is computed")
    _over_channels(reading, [axis], features.layout)
    return features if indices.ndim else _without(features, [axis])


def _squeezed(reading: _Reading) -> Features:
    features = reading.first()
    axes = reading.axes(1, len(features.layout))
    _over_channels(reading, axes, features.layout)
    return _without(features, axes)


def _unsqueezed(reading: _Reading) -> Features:
    features, given = reading.first(), reading.given.get("axes", reading.input(1))
    if given is None:
        raise WholeImageError(f"{reading.name} takes axes that are computed")
    rank = len(features.layout) + np.size(given)
    axes, labels = {int(axis) % rank for axis in np.ravel(given)}, iter(features.layout)
    return replace(features, layout=tuple("C" if place in axes else next(labels) for place in range(rank)))


def _transposed(reading: _Reading) -> Features:
    features = reading.first()
    order = reading.given.get("perm", tuple(range(len(features.layout)))[::-1])
    return replace(features, layout=tuple(features.layout[axis] for axis in order))


def _sliced(reading: _Reading) -> Features:
    features = reading.first()
    if len(reading.node.input) < 3:
        raise WholeImageError(f"{reading.name} is of an opset before 10")
    starts, ends, axes, steps = (reading.input(place) for place in (1, 2, 3, 4))
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), np.int64) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        label = features.layout[int(axis) % len(features.layout)]
        if label == "C":
            continue
        # To the end of the map, or so many cells before it: an end that is counted from the start is of one size.
        if label == "N" or start < 0 or step < 1 or 0 <= end < 2**31 - 1:
            raise WholeImageError(f"{reading.name} cuts at places that belong to one size")
        features = features.reads(label, step, start, start)
    return features


def _window(reading: _Reading) -> Features:
    """Conv and pooling."""
    node, given, features = reading.node, reading.given, reading.first(NCHW)
    kernel = given.get("kernel_shape")
    weight = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}.get(node.op_type)
    if kernel is None and weight is not None and reading.input(weight) is not None:
        kernel = reading.input(weight).shape[2:]
    if kernel is None or len(kernel) != 2:
        raise WholeImageError(f"{reading.name} has no kernel of a known size")
    for axis, place in enumerate(PLACES):
        step, dilation = (given.get(name, (1, 1))[axis] for name in ("strides", "dilations"))
        reach = (kernel[axis] - 1) * dilation
        if (auto := given.get("auto_pad", "NOTSET")) in ("SAME_UPPER", "SAME_LOWER"):
            # It differs with what is left of the map after whole steps; at multiples of them it is that of `step`.
            totals = [max(reach + 1 - left, 0) for left in range(1, step + 1)]
            before = [total // 2 if auto == "SAME_UPPER" else total - total // 2 for total in totals]
        else:
            before = [0 if auto == "VALID" else given.get("pads", (0, 0, 0, 0))[axis]]
        features = features.reads(place, step, -max(before), reach - min(before))
    return features


def _deconvolved(reading: _Reading) -> Features:
    given, features, weight = reading.given, reading.first(NCHW), reading.input(1)
    if weight is None or weight.ndim != 4 or given.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in given:
        raise WholeImageError(f"{reading.name} has no padding or kernel of a known size")
    for axis, place in enumerate(PLACES):
        step, dilation = (given.get(name, (1, 1))[axis] for name in ("strides", "dilations"))
        before, reach = given.get("pads", (0, 0, 0, 0))[axis], (weight.shape[2 + axis] - 1) * dilation
        # Output j reads input i where 0 ≤ j + before - step·i ≤ reach.
        features = features.reads(place, Fraction(1, step), Fraction(before - reach, step), Fraction(before, step))
    return features


def _resized(reading: _Reading) -> Features:
    given, features = reading.given, reading.first()
    rank = len(features.layout)
    scales = reading.input(1 if reading.node.op_type == "Upsample" else 2)
    axes = [int(axis) % rank for axis in given.get("axes", range(rank))]
    if scales is None or scales.size != len(axes):
        raise WholeImageError(f"{reading.name} goes to a size that is computed, not by a constant factor")
    coordinates = given.get("coordinate_transformation_mode", "half_pixel")
    if reading.node.op_type == "Upsample":
        coordinates = "asymmetric"
    if coordinates not in ("half_pixel", "pytorch_half_pixel", "asymmetric") or given.get("antialias"):
        raise WholeImageError(f"{reading.name} has the coordinates {coordinates}, which depend on the image's size")
    shift = Fraction(0) if coordinates == "asymmetric" else Fraction(1, 2)
    mode = given.get("mode", "nearest")
    for axis, scale in zip(axes, scales, strict=True):
        place, factor = features.layout[axis], Fraction(float(scale)).limit_denominator(1024)
        if factor == 1:
            continue
        if place not in PLACES:
            raise WholeImageError(f"{reading.name} resizes channels")
        offsets = []
        for phase in range(factor.numerator):  # after which the pattern repeats
            x = (phase + shift) / factor - shift
            nearest = (math.floor(x), math.ceil(x)) if mode == "nearest" else (math.floor(x), math.floor(x) + 1)
            reach = 1 if mode == "cubic" else 0
            offsets += [cell - phase / factor for cell in (nearest[0] - reach, nearest[1] + reach)]
        features = features.reads(place, 1 / factor, min(offsets), max(offsets))
    return features


def _padded(reading: _Reading) -> Features:
    given, features = reading.given, reading.first()
    rank = len(features.layout)
    pads = given.get("pads", reading.input(1))
    axes = range(rank)
    if len(reading.node.input) > 3 and reading.node.input[3]:
        axes = None if reading.input(3) is None else [int(axis) % rank for axis in reading.input(3)]
    if pads is None or axes is None or len(pads) != 2 * len(axes) or given.get("mode", "constant") == "wrap":
        raise WholeImageError(f"{reading.name} pads by what is computed")
    for index, axis in enumerate(axes):
        before, after, place = int(pads[index]), int(pads[len(axes) + index]), features.layout[axis]
        if place == "C" or before == after == 0:
            continue
        if place == "N":
            raise WholeImageError(f"{reading.name} pads the batch")
        # A cell beyond a border is one at it (edge), or as far inside as it is outside (reflect).
        reach = max(before, after, 0) * {"constant": 0, "edge": 1}.get(given.get("mode", "constant"), 2)
        features = features.reads(place, 1, -before - reach, -before + reach)
    return features


def _depth_to_space(reading: _Reading) -> Features:
    features, block = reading.first(NCHW), reading.given["blocksize"]
    for place in PLACES:
        features = features.reads(place, Fraction(1, block), Fraction(1 - block, block), 0)
    return features


def _space_to_depth(reading: _Reading) -> Features:
    features, block = reading.first(NCHW), reading.given["blocksize"]
    for place in PLACES:
        features = features.reads(place, block, 0, block - 1)
    return features


def _reshaped(reading: _Reading) -> Features:
    """Channels divided or joined (a shuffle), or places divided into blocks or joined from them (a pixel shuffle).

    Which dimensions go where is seen from the shapes at two sizes: what belongs to the size differs in them.
    """
    features, shapes = reading.read[0], _shapes(reading)
    refusal = WholeImageError(f"{reading.name} mixes places, or goes to a shape of one size")
    (before, after), (before_too, after_too) = shapes
    if features.layout[0] != "N" or after[0] != 1 or len(after) != len(after_too):
        raise refusal
    # Dimensions of 1 go anywhere.
    inside = [axis for axis in range(1, len(before)) if (before[axis], before_too[axis]) != (1, 1)]
    outside = [axis for axis in range(1, len(after)) if (after[axis], after_too[axis]) != (1, 1)]
    pieces = _pieces([before[axis] for axis in inside], [after[axis] for axis in outside])
    if pieces is None or pieces != _pieces(
        [before_too[axis] for axis in inside], [after_too[axis] for axis in outside]
    ):
        raise refusal
    layout = ["N"] + ["C"] * (len(after) - 1)
    for left, right in pieces:
        labels, axes = [features.layout[inside[index]] for index in left], [outside[index] for index in right]
        place, parts = labels[0], math.prod(before[inside[index]] for index in left[1:])
        blocks = [math.prod(shape[axis] for axis in axes[1:]) for shape in (after, after_too)]
        if all(label == "C" for label in labels):
            continue
        if place not in PLACES or any(label != "C" for label in labels[1:]):
            raise refusal
        if len(right) == 1:
            if parts > 1:
                features = features.reads(place, Fraction(1, parts), Fraction(1 - parts, parts), 0)
        elif len(left) == 1 and blocks[0] == blocks[1]:
            features = features.reads(place, blocks[0], 0, blocks[0] - 1)
        else:
            raise refusal
        layout[axes[0]] = place
    return Features(features.fields, tuple(layout))


def _pieces(before: Sequence[int], after: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """The least runs of dimensions that hold as many values before and after; None where they are not all in one."""
    pieces, left, right = [], 0, 0
    while left < len(before) and right < len(after):
        ours, theirs, first, second = before[left], after[right], left, right
        left, right = left + 1, right + 1
        while ours != theirs:
            if ours < theirs and left < len(before):
                ours, left = ours * before[left], left + 1
            elif theirs < ours and right < len(after):
                theirs, right = theirs * after[right], right + 1
            else:
                return None
        pieces.append((tuple(range(first, left)), tuple(range(second, right))))
    return pieces if (left, right) == (len(before), len(after)) else None


def _shapes(reading: _Reading) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(before, after) of a Reshape at two sizes, by running what comes before it."""
    model = clone(reading.core)
    names = [reading.node.input[0], reading.node.output[0]]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    prune(model)
    image = model.graph.input[0]
    channels = image.type.tensor_type.shape.dim[1].dim_value
    dtype = onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type)
    period = math.lcm(*(field.period for field in reading.read[0].fields))
    sides = [max(1, int(period / field.stride)) for field in reading.start]
    run, reason = session(model.SerializeToString(), optimise=False), ""
    # Blocks may want more than the period; primes, so that no two dimensions that belong to the size are equal.
    for unit in (1, 2, 4, 8, 3, 7):
        found = []
        try:
            for rows, columns in ((17, 23), (29, 19)):
                features = np.zeros((1, channels, sides[0] * rows * unit, sides[1] * columns * unit), dtype)
                found.append(tuple(result.shape for result in run_quietly(run, features, names)))
            return found
        except Exception as error:  # of ONNX Runtime, whose errors share no base class
            reason = reason or one_line(error)
    raise WholeImageError(f"{reading.name} goes to a shape that cannot be followed: {reason[-100:]}")


_FOLLOWED: dict[str, Callable[[_Reading], Features]] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(REDUCTIONS, _reduced),
    **dict.fromkeys(
        ("Concat", "Split", "Softmax", "LogSoftmax", "Hardmax", "ArgMax", "ArgMin", "TopK"), _along_channels
    ),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _along_channels),
    **dict.fromkeys(("Conv", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool"), _window),
    **dict.fromkeys(("Resize", "Upsample"), _resized),
    **dict.fromkeys(("Reshape", "Flatten"), _reshaped),
    "ConvTranspose": _deconvolved,
    "DepthToSpace": _depth_to_space,
    "Gather": _gathered,
    "LRN": lambda reading: reading.first(NCHW),
    "MatMul": _matmul,
    "Pad": _padded,
    "Slice": _sliced,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeezed,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}

"""The shape of every tensor of a network at several image sizes at once, so that numbers can be told from sizes.

A size is five numbers: of the image as it was traced, of a larger batch, of a taller image, of a wider one, and of
all three. Sizes that are equal at all five are one and the same function of the image's, and what a size follows is
seen by where it changes. An axis is its factors, outermost first: (h, w) where a map was flattened row by row.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import attributes, dims, initializers, names_read, opset, producers
from fcn_deploy.export.graph.evaluate import RANDOM, evaluate
from onnx import ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper, shape_inference

Size = tuple[int, ...]
Axis = tuple[Size, ...]
Shape = tuple[Axis, ...]

POINTS = 5
LETTERS = "NHW"  # the point at which each of them alone has changed is its place here plus one
SMALL = 4096  # elements of arithmetic on shapes; what is larger is data
PERIOD = 64  # images grow by multiples of this, and of what was traced: what divided evenly then does so again

BROADCASTING = frozenset((
    "Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual",
    "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor",
))  # fmt: skip
ALONG_AN_AXIS = frozenset(("ArgMax", "ArgMin", "CumSum", "Hardmax", "LogSoftmax", "Softmax", "TopK"))
MIXED = "it would mix the images of a batch, of which the traced one had one"
BY_DATA = frozenset(("NonZero", "Unique", "Compress", "NonMaxSuppression", "Loop", "Scan", "If", "SequenceAt"))


class ConflictError(Exception):
    """A network cannot be what it is taken for: at this node the sizes do not fit."""

    def __init__(self, node: NodeProto, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def fixed(number: int) -> Size:
    return (int(number),) * POINTS


def is_fixed(size: Size) -> bool:
    return len(set(size)) == 1


def follows(size: Size) -> str:
    """Which of N, H and W a size changes with."""
    return "".join(letter for index, letter in enumerate(LETTERS) if size[index + 1] != size[0])


def times(sizes: Iterable[Size]) -> Size:
    return tuple(math.prod(numbers) for numbers in zip(fixed(1), *sizes, strict=True))


def scaled(size: Size, above: int, below: int) -> Size | None:
    """size · above / below, where that is a whole number at every point."""
    if below <= 0 or any(number * above % below for number in size):
        return None
    return tuple(number * above // below for number in size)


def axis(size: Size) -> Axis:
    return () if set(size) == {1} else (size,)


def plain(shape: Iterable[int]) -> Shape:
    """Of a constant."""
    return tuple(axis(fixed(number)) for number in shape)


def sizes(shape: Shape) -> list[Size]:
    return [times(factors) for factors in shape]


def image_sizes(batch: int, height: int, width: int) -> tuple[Size, Size, Size]:
    """N, H and W at the five points."""
    down, right = math.lcm(PERIOD, height), math.lcm(PERIOD, width)
    return (
        (batch, 3 * batch, batch, batch, 2 * batch),
        (height, height, height + down, height, height + 3 * down),
        (width, width, width, width + 2 * right, width + right),
    )


class Network:
    """What is known of a graph before any size is: its nodes, constants, types, and who is made from whom.

    Attributes:
        traced: whether its numbers may come from a traced size; not where it fits one that nothing is made for.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model, self.nodes, self.opset = model, list(model.graph.node), opset(model)
        self.constants = initializers(model)
        self.producers = producers(model)
        self.place = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.traced = True
        self._inferred: dict = {}
        typed = shape_inference.infer_shapes(model).graph
        known = (*typed.input, *typed.output, *typed.value_info)
        self._kinds = {value.name: value.type.tensor_type.elem_type for value in known}
        self._kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}

    @cached_property
    def ancestors(self) -> list[frozenset[int]]:
        """Of each node: the places of those whose results it reads, directly or not."""
        found: list[frozenset[int]] = []
        for node in self.nodes:
            made = [self.place[name] for name in names_read(node) if name in self.place]
            found.append(frozenset(made).union(*(found[index] for index in made if index < len(found))))
        return found

    def kind(self, name: str) -> int:
        return self._kinds.get(name) or TensorProto.FLOAT

    def infer(self, node: NodeProto, shape_of, value_of) -> list[list[list[int]]]:
        """Output shapes by the operator's definition: point → output → numbers. Raises ConflictError."""
        reads = list(dict.fromkeys(name for name in node.input if name))
        results = []
        for point in range(POINTS):
            shapes = {name: [size[point] for size in sizes(shape_of(name))] for name in reads}
            data = {name: value[point] for name in reads if (value := value_of(name)) is not None}
            key = (id(node), *(tuple(shapes[name]) for name in reads), *(v.tobytes() for v in data.values()))
            if key not in self._inferred:
                self._inferred[key] = self._infer(node, shapes, data)
            results.append(self._inferred[key])
        return results

    def _infer(self, node: NodeProto, shapes: dict, data: dict) -> list[list[int]]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = defs.get_schema(node.op_type, self.opset, domain)
        except Exception as error:  # of no base class but Exception
            raise ConflictError(node, f"{domain or 'ONNX'} has no operator of this name that is known here") from error
        types = {name: helper.make_tensor_type_proto(self.kind(name), shape) for name, shape in shapes.items()}
        try:
            made = shape_inference.infer_node_outputs(
                schema, node, types, {name: numpy_helper.from_array(value) for name, value in data.items()},
                opset_imports=[helper.make_opsetid("", self.opset)], ir_version=self.model.ir_version,
            )  # fmt: skip
        except Exception as error:
            reason = " ".join(str(error).split()).removeprefix("[ShapeInferenceError] ")[:150]
            raise ConflictError(node, f"it does not fit its input: {reason}") from error
        found = []
        for name in node.output:
            if not name:
                found.append([])
                continue
            kind = made[name].tensor_type if name in made else None
            if kind is None or not kind.HasField("shape"):
                raise ConflictError(node, "the size of its output cannot be told")
            shape = dims(onnx.ValueInfoProto(name=name, type=made[name]))
            if not all(isinstance(number, int) for number in shape):
                raise ConflictError(node, "the size of its output cannot be told")
            self._kinds.setdefault(name, kind.elem_type)
            found.append(shape)
        return found


class State:
    """Shapes, and the values of arithmetic on shapes (an array a point), of what has been computed so far.

    Attributes:
        image: the image's N, H and W.
    """

    def __init__(self, network: Network, image: Mapping[str, Size], shapes: Mapping[str, Shape]) -> None:
        self.network, self.image = network, image
        self.shapes: dict[str, Shape] = dict(shapes)
        self.values: dict[str, tuple[np.ndarray, ...]] = {}

    def copy(self) -> "State":
        other = State(self.network, self.image, self.shapes)
        other.values = dict(self.values)
        return other

    def shape(self, name: str) -> Shape:
        if name in self.shapes:
            return self.shapes[name]
        return plain(self.network.constants[name].shape)

    def value(self, name: str) -> tuple[np.ndarray, ...] | None:
        """At each point, of a constant or of arithmetic on shapes; None for data."""
        if name in self.values:
            return self.values[name]
        array = self.network.constants.get(name)
        return None if array is None or array.size > SMALL else (array,) * POINTS

    def is_data(self, name: str) -> bool:
        """Whether it depends on the image's pixels."""
        return name in self.shapes and name not in self.values


def input_of(node: NodeProto, index: int) -> str:
    return node.input[index] if len(node.input) > index else ""


def integers(node: NodeProto, state: State, attribute: str, index: int, default=None) -> list[Size] | None:
    """Whole numbers that an operator takes as an attribute in older opsets and as an input in newer ones."""
    given = attributes(node).get(attribute)
    if given is not None:
        return [fixed(number) for number in np.atleast_1d(given)]
    name = input_of(node, index)
    if not name:
        return default
    value = state.value(name)
    if value is None:
        raise ConflictError(node, f"it takes {name}, which is computed from the image's pixels")
    if any(array.shape != value[0].shape for array in value):
        raise ConflictError(node, f"it takes {name}, whose length changes with the image")
    return [tuple(int(array.flat[place]) for array in value) for place in range(value[0].size)]


def axes_of(node: NodeProto, state: State, index: int, rank: int) -> list[int] | None:
    found = integers(node, state, "axes", index)
    return None if found is None else [size[0] % rank for size in found]


def describe(size: Size, network_sizes: Mapping[str, Size]) -> str:
    """A size in words: H/8, H·W/64, 2·N, 24."""
    if is_fixed(size):
        return str(size[0])
    letters = follows(size)
    whole = times(network_sizes[letter] for letter in letters)
    ratio = size[0] / whole[0]
    name = "·".join(letters)
    for above in range(1, 9):
        below = round(above / ratio)
        if below >= 1 and scaled(whole, above, below) == size:
            return f"{above}·{name}" * (above > 1) + name * (above == 1) + f"/{below}" * (below > 1)
    for below in range(1, 65):
        gaps = {number - side // below for number, side in zip(size, whole, strict=True)}
        if len(gaps) == 1:
            return f"{name}{f'/{below}' if below > 1 else ''}{gaps.pop():+d}"
    return f"{size[0]} (by {name})"


def carried(network: Network, node: NodeProto, state: State) -> tuple[dict[str, Shape], dict[str, tuple]]:
    """What a node gives, its numbers taken as they stand: shapes, and values where it computes with shapes alone.

    Raises:
        ConflictError: it does not fit what it is given.
    """
    reads = [name for name in node.input if name]
    if any(item.HasField("g") or item.graphs for item in node.attribute) or node.op_type in BY_DATA:
        raise ConflictError(node, "what it gives is decided while it runs")
    if node.op_type == "Shape":
        found = sizes(state.shape(node.input[0]))
        given = attributes(node)
        found = found[slice(given.get("start", 0), given.get("end", None))]
        return {node.output[0]: plain([len(found)])}, {
            node.output[0]: tuple(np.array([size[point] for size in found], np.int64) for point in range(POINTS))
        }
    if node.op_type == "Size":
        whole = times(sizes(state.shape(node.input[0])))
        return {node.output[0]: ()}, {node.output[0]: tuple(np.array(number, np.int64) for number in whole)}
    values = [state.value(name) for name in reads]
    if node.op_type == "Range" and all(value is not None for value in values):
        start, limit, step = ([float(np.squeeze(array)) for array in value] for value in values)
        length = tuple(max(math.ceil((b - a) / by), 0) for a, b, by in zip(start, limit, step, strict=True))
        if max(length) > SMALL or not is_fixed(length):
            return {node.output[0]: (axis(length),)}, {}
    if reads and all(value is not None for value in values) and node.op_type not in (*RANDOM, "Resize"):
        made = _evaluated(network, node, dict(zip(reads, values, strict=True)))
        if made is not None:
            return made
    _along_batch(node, state)
    if node.op_type in _RULES:
        made = {node.output[0]: _RULES[node.op_type](node, state)}
    elif node.op_type in BROADCASTING:
        made = {node.output[0]: broadcast(node, [state.shape(name) for name in reads])}
    else:
        _check(node, state)
        made = inferred(network, node, state)
    if any(sum("N" in follows(size) for size in sizes(shape)) > 1 for shape in made.values()):
        raise ConflictError(node, MIXED)
    return made, {}


def inferred(network: Network, node: NodeProto, state: State) -> dict[str, Shape]:
    """Shapes by the operator's definition. An axis that keeps its place and size keeps its factors."""
    points = network.infer(node, state.shape, state.value)
    first = state.shape(node.input[0]) if node.input and node.input[0] else ()
    made = {}
    for index, name in enumerate(node.output):
        if not name:
            continue
        found = [
            tuple(points[point][index][place] for point in range(POINTS)) for place in range(len(points[0][index]))
        ]
        made[name] = tuple(
            first[place] if place < len(first) and times(first[place]) == size else axis(size)
            for place, size in enumerate(found)
        )
        if any(min(size) < 1 for size in found):
            raise ConflictError(node, "nothing is left of the map")
    return made


def _evaluated(network: Network, node: NodeProto, reads: dict) -> tuple[dict, dict] | None:
    results: list[list[np.ndarray]] = []
    for point in range(POINTS):
        values = {name: value[point] for name, value in reads.items()}
        same = results and all(np.array_equal(value, reads[name][0]) for name, value in values.items())
        try:
            results.append(results[0] if same else evaluate(network.model, node, values))
        except Exception:  # an operator that the reference evaluator lacks, or values it refuses
            return None
    if any(not isinstance(array, np.ndarray) or array.size > SMALL for result in results for array in result):
        return None
    made = {name: tuple(result[index] for result in results) for index, name in enumerate(node.output) if name}
    if any(len({array.ndim for array in value}) > 1 for value in made.values()):
        return None
    return {
        name: tuple(axis(size) for size in zip(*(array.shape for array in value), strict=True))
        for name, value in made.items()
    }, made


def broadcast(node: NodeProto, shapes: Sequence[Shape]) -> Shape:
    """NumPy's broadcasting. Raises ConflictError where two sides differ."""
    rank = max(map(len, shapes))
    result = []
    for place in range(rank):
        sides = [shape[place - rank] for shape in shapes if len(shape) >= rank - place]
        result.append(joined(node, [side for side in sides if side]))
    return tuple(result)


def joined(node: NodeProto, sides: Sequence[Axis]) -> Axis:
    """What axes that must be of one size are: the one that is told in most factors."""
    found = {times(side) for side in sides}
    if len(found) > 1:
        text = " and ".join(
            sorted(str(size[0]) if is_fixed(size) else f"{size[0]} (by {follows(size)})" for size in found)
        )
        raise ConflictError(node, f"it joins sizes that differ: {text}")
    return max(sides, key=len, default=())


def _transpose(node: NodeProto, state: State) -> Shape:
    shape = state.shape(node.input[0])
    return tuple(shape[place] for place in attributes(node).get("perm", range(len(shape))[::-1]))


def _squeeze(node: NodeProto, state: State) -> Shape:
    shape = state.shape(node.input[0])
    gone = axes_of(node, state, 1, len(shape))
    if gone is None:
        gone = [place for place, size in enumerate(sizes(shape)) if size[0] == 1]
    for place in gone:
        if shape[place]:
            what = "the batch" if follows(times(shape[place])) == "N" else "an axis that is 1 at the traced size alone"
            raise ConflictError(node, f"it squeezes {what}")
    return tuple(factors for place, factors in enumerate(shape) if place not in gone)


def _unsqueeze(node: NodeProto, state: State) -> Shape:
    shape = state.shape(node.input[0])
    given = integers(node, state, "axes", 1)
    new = {size[0] % (len(shape) + len(given)) for size in given}
    rest = iter(shape)
    return tuple(() if place in new else next(rest) for place in range(len(shape) + len(new)))


def _flatten(node: NodeProto, state: State) -> Shape:
    shape = state.shape(node.input[0])
    place = attributes(node).get("axis", 1)
    return tuple(tuple(f for factors in part for f in factors) for part in (shape[:place], shape[place:]))


def _concat(node: NodeProto, state: State) -> Shape:
    shapes = [state.shape(name) for name in node.input]
    rank = len(shapes[0])
    along = attributes(node)["axis"] % rank
    result = []
    for place in range(rank):
        sides = [shape[place] for shape in shapes]
        if place == along:
            result.append(axis(tuple(map(sum, zip(*map(times, sides), strict=True)))))
        else:
            result.append(joined(node, sides))
    return tuple(result)


def _matmul(node: NodeProto, state: State) -> Shape:
    first, second = (state.shape(name) for name in node.input[:2])
    left = first if len(first) > 1 else ((), *first)
    right = second if len(second) > 1 else (*second, ())
    contracted(node, left[-1], right[-2], state)
    batch = broadcast(node, [left[:-2], right[:-2]])
    return (*batch, *left[-2:-1] * (len(first) > 1), *right[-1:] * (len(second) > 1))


def _gemm(node: NodeProto, state: State) -> Shape:
    first, second = (state.shape(name) for name in node.input[:2])
    given = attributes(node)
    left, right = first[:: -1 if given.get("transA") else 1], second[:: -1 if given.get("transB") else 1]
    contracted(node, left[1], right[0], state)
    return left[0], right[1]


def contracted(node: NodeProto, left: Axis, right: Axis, state: State) -> None:
    if "N" in follows(times(left)):
        raise ConflictError(node, MIXED)
    if times(left) != times(right):
        if any(name in state.network.constants for name in node.input[:2]):
            raise ConflictError(node, "a dense layer over the flattened map has weights for one size alone")
        joined(node, [left, right])


def _einsum(node: NodeProto, state: State) -> Shape:
    equation = attributes(node)["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        raise ConflictError(node, f"its equation {equation} is not followed here")
    left, right = equation.split("->")
    sides: dict[str, list[Axis]] = {}
    for name, letters in zip(node.input, left.split(","), strict=True):
        for letter, factors in zip(letters, state.shape(name), strict=True):
            sides.setdefault(letter, []).append(factors)
    found = {letter: joined(node, axes) for letter, axes in sides.items()}
    if any("N" in follows(times(factors)) for letter, factors in found.items() if letter not in right):
        raise ConflictError(node, MIXED)
    return tuple(found[letter] for letter in right)


_RULES = {
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Concat": _concat,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
}
PER_CHANNEL = frozenset(("BatchNormalization", "InstanceNormalization", "GroupNormalization"))


def _along_batch(node: NodeProto, state: State) -> None:
    """Raise ConflictError where a node reduces or orders the axis of the batch."""
    shape = state.shape(node.input[0]) if node.input and node.input[0] else ()
    if node.op_type.startswith("Reduce"):
        axes = axes_of(node, state, 1, len(shape))
        if axes is None and not attributes(node).get("noop_with_empty_axes"):
            axes = list(range(len(shape)))
    elif node.op_type in ALONG_AN_AXIS:
        usual = 0 if node.op_type.startswith("Arg") else -1 if state.network.opset >= 13 else 1
        axes = [attributes(node).get("axis", usual) % len(shape)] if node.op_type != "CumSum" else []
    else:
        return
    if any("N" in follows(times(shape[place])) for place in axes or ()):
        raise ConflictError(node, MIXED)


def _check(node: NodeProto, state: State) -> None:
    """What shape inference leaves to the runtime: that weights fit. Raises ConflictError."""
    if node.op_type in ("Conv", "ConvTranspose", "ConvInteger", "DeformConv") or node.op_type in PER_CHANNEL:
        weight = state.shape(node.input[1])
        channels = times(state.shape(node.input[0])[1])
        groups = attributes(node).get("group", 1)
        taken = times(weight[1]) if node.op_type.startswith(("Conv", "Deform")) else times(weight[0])
        if node.op_type in ("Conv", "ConvInteger", "DeformConv"):
            taken = times([taken, fixed(groups)])
        elif node.op_type == "ConvTranspose":
            taken = times(weight[0])
        if node.op_type == "GroupNormalization" and state.network.opset < 21:
            return
        if channels != taken:
            raise ConflictError(node, f"it has weights for {taken[0]} channels, and is given a number that changes")
    elif node.op_type == "LayerNormalization":
        shape, weight = state.shape(node.input[0]), state.shape(node.input[1])
        place = attributes(node).get("axis", -1) % len(shape)
        if broadcast(node, [shape[place:], weight]) != tuple(shape[place:]):
            raise ConflictError(node, "its weights are for one size alone")
    elif node.op_type == "Reshape":
        targets, shape = state.value(node.input[1]), state.shape(node.input[0])
        for point, target in enumerate(targets or ()):
            before = [size[point] for size in sizes(shape)]
            if (target > 0).all() and math.prod(map(int, target)) != math.prod(before):
                raise ConflictError(node, f"it makes {target.tolist()} of {before}")
    elif node.op_type in ("AveragePool", "MaxPool", "LpPool"):
        given = attributes(node)
        kernel = given["kernel_shape"]
        pads, dilations = given.get("pads", [0] * 2 * len(kernel)), given.get("dilations", [1] * len(kernel))
        for place, side in enumerate(sizes(state.shape(node.input[0]))[2:]):
            reach = (kernel[place] - 1) * dilations[place] + 1
            if reach > min(side) + pads[place] + pads[place + len(kernel)] and "auto_pad" not in given:
                raise ConflictError(node, f"its windows of {reach} are larger than the map of {min(side)}")
    elif node.op_type in ("ScatterND", "ScatterElements", "GatherElements", "GatherND", "Gather"):
        index = input_of(node, 1)
        if node.op_type.startswith("Scatter") and not state.is_data(node.input[0]) and state.is_data(index):
            raise ConflictError(node, "it writes into a constant of the traced map's size")
        if index not in state.network.constants or not state.is_data(node.input[0]):
            return
        if node.op_type == "Gather":
            shape = state.shape(node.input[0])
            size = times(shape[attributes(node).get("axis", 0) % len(shape)])
            places = state.network.constants[index]
            if is_fixed(size) or (places.size == 1 and (places.flat[0] < 0 or places.flat[0] < size[0] - 1)):
                return
        elif all(is_fixed(size) for size in sizes(state.shape(node.input[0]))[1:]):
            return
        raise ConflictError(node, "it picks places of the map by number")

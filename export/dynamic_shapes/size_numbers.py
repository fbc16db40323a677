"""Numbers in arithmetic that are functions of a traced size, as log(H·W), 1/√(H·W) or W - 1; no shape betrays them.

A number that nobody would write but for the size that it is of is asked about; one that may as well be meant as it is,
such as 16, is taken so, and said.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.dynamic_shapes.inference import broadcast, infer_shapes
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import (
    SampledSize,
    axis_sizes,
    changes_with,
    describe,
    fixed,
    is_fixed,
    multiplied,
    scaled,
)
from fcn_deploy.export.dynamic_shapes.sums import averaged_over, unscaled
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, name_of_node
from onnx import NodeProto

CLOSE = 1e-6  # share of a number by which float32 rounds what was computed of a size
LEAST = 4  # sides of fewer cells are met everywhere
USUAL_DIVISORS = 100  # up to which whole numbers are met by chance
POWERS = frozenset((*(2**power for power in range(32)), *(2**power - 1 for power in range(7, 32))))  # of bits
STRIDES = (1, 2, 4, 8, 16, 32, 64)
ROOTS = (0.5, -0.5, 0.25, -0.25)
DIGITS = 2  # of a number that is written by hand, at most
HAND_WRITTEN = (1 / 3, 2 / 3, 1 / 6, 4 / 3, 6.0)  # of hard sigmoids and means
OF_PIXELS = (127.0, 127.5, 128.0, 255.0, 256.0, 32768.0, 65535.0)  # by which images are normalised
BANDS = 4  # channels that an image has, at most, of which a map of its size is one that is being normalised


@dataclass(frozen=True)
class _Function:
    """A function of a size that programs compute.

    Attributes:
        text: of it, around the name of the size.
        of: its value.
        telling: whether its values are no numbers that anyone writes by hand.
        steps: the nodes that compute it of a size.
    """

    text: str
    of: Callable[[float], float]
    telling: bool
    steps: tuple[str, ...]


FUNCTIONS = (
    _Function("{}", lambda size: size, False, ()),
    _Function("1/({})", lambda size: 1 / size, False, ("Reciprocal",)),
    _Function("2/({})", lambda size: 2 / size, False, ("Half", "Reciprocal")),
    _Function("({})/2", lambda size: size / 2, False, ("Half",)),
    _Function("√({})", math.sqrt, True, ("Sqrt",)),
    _Function("1/√({})", lambda size: size**-0.5, True, ("Sqrt", "Reciprocal")),
    _Function("1/∜({})", lambda size: size**-0.25, True, ("Sqrt", "Sqrt", "Reciprocal")),  # of queries and of keys
    _Function("log({})", math.log, True, ("Log",)),
    _Function("log₂({})", math.log2, True, ("Log", "Of2")),
    _Function("log₁₀({})", math.log10, True, ("Log", "Of10")),
    _Function("1/log({})", lambda size: 1 / math.log(size), True, ("Log", "Reciprocal")),
)


DIVISORS = {"Half": 2.0, "Of2": math.log(2), "Of10": math.log(10)}  # steps that divide by a number


@dataclass(frozen=True)
class _Law:
    """What a number is of the image: a function of a size, less a number."""

    function: _Function
    size: SampledSize
    less: int

    def told(self, state: State) -> str:
        name = describe(self.size, state.image) + (f" - {self.less}" if self.less else "")
        return self.function.text.format(name).replace("(1)", "1")

    def write(self, writer: ShapeWriter, node: NodeProto, kind: int) -> str:
        """It as nodes before `node`, a list of one; `kind`: a number of TensorProto."""
        return writer.node("Cast", [self.write_float(writer, node)], to=kind)

    def write_float(self, writer: ShapeWriter, node: NodeProto) -> str:
        total = writer.size(self.size, node)
        if self.less:
            total = writer.node("Sub", [total, writer.constant("less", np.array([self.less], np.int64))])
        total = writer.node("Cast", [total], to=1)
        for step in self.function.steps:
            by = DIVISORS.get(step)
            reads = [total] if by is None else [total, _float(writer, by)]
            total = writer.node(step if by is None else "Div", reads)
        return total


@dataclass(frozen=True)
class _Form:
    """What programs make of a function of a size, f, and a round number, r.

    Attributes:
        text: of it, around f and r.
        inverse: f/r of its value.
        steps: operators that compute it of f/r; those of two inputs join it with 1, which comes first in capitals.
    """

    text: str
    inverse: Callable[[float], float]
    steps: tuple[str, ...]


FORMS = (
    _Form("1 + {}/{}", lambda value: value - 1, ("Add",)),
    _Form("1 - {}/{}", lambda value: 1 - value, ("SUB",)),
    _Form("{0}/({0} + {1})", lambda value: value / (1 - value), ("Reciprocal", "Add", "Reciprocal")),
)
OVER = (1, 10, 100, 1000)  # round numbers that sizes are set against
MOST_LOST = 1e-5  # share of a number, beyond which it tells no size
LEAST_IN_FORM = 16  # sizes that are met by chance less often than they are meant


@dataclass(frozen=True)
class _FormOfLaw:
    """What a number is of the image by a form: as _Law."""

    form: _Form
    law: _Law
    over: int

    @property
    def size(self) -> SampledSize:
        return self.law.size

    @property
    def function(self) -> _Function:
        return _Function("", self.law.function.of, self.law.function.telling, (*self.law.function.steps, "form"))

    def told(self, state: State) -> str:
        told = self.law.told(state)
        told = f"({told})" if "/" in told and told[0].isalnum() else told
        return self.form.text.format(told, self.over).replace("/1)", ")").removesuffix("/1")

    def write(self, writer: ShapeWriter, node: NodeProto, kind: int) -> str:
        total = writer.node("Div", [self.law.write_float(writer, node), _float(writer, self.over)])
        one = _float(writer, 1)
        for step in self.form.steps:
            reads = [total] if step == "Reciprocal" else [one, total] if step.isupper() else [total, one]
            total = writer.node(step.capitalize(), reads)
        return writer.node("Cast", [total], to=kind)


def _float(writer: ShapeWriter, number: float) -> str:
    return writer.constant("by", np.array([number], np.float32))


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    """Of a node that joins data with one number; None: it is no function of a size that is seen.

    Raises:
        ConflictError: it is one that nobody would write, or said to be one and not known which.
    """
    said = state.graph.assumed.get(name_of_node(node))
    found = _number(node, state)
    if found is None or not found[1] or not state.graph.traced or said == "fixed":
        return None
    index, number = found
    if number == 1 and node.op_type in ("Mul", "Div") and index == 1:  # a step that nobody writes
        text = "numbers as 1, by which nothing changes when traced, are taken for such of every size"
        return [Interpretation(_joined(node, state), assumption=f"{text}; one of a traced size may be in them")]
    if said != "global" and (_is_of_pixels(node, index, number, state) or _is_of_a_product(node, index, number, state)):
        return None
    if said != "global" and (_is_usual(number) or (not _is_telling(number) and is_of_channels(number, state, ROOTS))):
        return None
    laws = _likely_laws(abs(number), state)
    if not laws:
        return None
    name, texts = name_of_node(node), list(dict.fromkeys(law.told(state) for law in laws))
    if said == "global":
        if len(texts) > 1:
            raise ConflictError(node, f"its {number:g} may be {' or '.join(texts[:3])}: trace it where these differ")
        return [_followed(node, state, index, laws[0], math.copysign(1, number))]
    if (kept := _of_a_mean(node, state, index, laws)) is not None:
        return [_followed(node, state, index, kept, math.copysign(1, number))]
    telling = (
        any(law.function.telling or _is_large_in_form(law) for law in laws)
        or _is_telling(number)
        or _of_a_sum(node, state, index)
    )
    if telling and not is_of_channels(number, state):
        raise ConflictError(node, f"its {number:g} is {texts[0]} of the traced size; --assume {name}=global, or =fixed")
    shapes = infer_shapes(node, state) if node.op_type == "Clip" else _joined(node, state)
    text = f"numbers as {number:g}, {' or '.join(texts[:2])} when traced, are taken for such of every size"
    return [Interpretation(shapes, assumption=f"{text} (else --assume {name}=global)")]


def _is_large_in_form(law: _Law | _FormOfLaw) -> bool:
    """Whether a form holds a size that is hardly met by chance."""
    return isinstance(law, _FormOfLaw) and law.size[0] > USUAL_DIVISORS and law.size[0] not in POWERS


def _of_a_mean(
    node: NodeProto, state: State, index: int, laws: Sequence[_Law | _FormOfLaw]
) -> _Law | _FormOfLaw | None:
    """That a mean is multiplied with the number of its places, or divided by it less 1, as in variances; None: not."""
    if node.op_type not in ("Mul", "Div") or len(node.input) != 2:
        return None
    places = averaged_over(node.input[1 - index], state)
    return next((law for law in laws if law.size == places and not law.function.steps), None)


def _of_a_sum(node: NodeProto, state: State, index: int) -> bool:
    """Whether what a number multiplies or divides is a sum or a mean over places of a map, or sums along them."""
    if node.op_type not in ("Mul", "Div") or len(node.input) != 2:
        return False
    made = unscaled(node.input[1 - index], state)
    if made is not None and made.op_type == "CumSum" and made.output[0] in state.shapes:
        axis, shape = state.graph.constants.get(made.input[1]), axis_sizes(state.shape(made.input[0]))
        return axis is None or not is_fixed(shape[int(axis.item())])
    places = averaged_over(node.input[1 - index], state)
    return places is not None and not is_fixed(places)


def _followed(node: NodeProto, state: State, index: int, law: _Law | _FormOfLaw, sign: float) -> Interpretation:
    """The node with a number that follows the image in place of its own."""
    kind = state.graph.type_of(node.input[index])

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        total = law.write(writer, node, kind)
        if sign < 0:
            total = writer.node("Neg", [total])
        if node.op_type == "Clip":  # whose bounds have no axes
            total = writer.node("Squeeze", [total])
        return [writer.replaced(node, {index: total})]

    text = f"by {law.told(state)}, whatever the size"
    return Interpretation(_joined(node, state), 0, rewrite, text, size_dependent=True)


def _joined(node: NodeProto, state: State) -> dict:
    return {node.output[0]: broadcast(node, [state.shape(name) for name in node.input if name])}


def _number(node: NodeProto, state: State) -> tuple[int, float] | None:
    """(place, value) of the one number that a node joins with data; None: it joins something else."""
    constants, numbers = state.graph.constants, []
    if not any(state.is_data(name) for name in node.input if name):
        return None
    for index, name in enumerate(node.input):
        array = constants.get(name)
        if array is not None and array.size == 1 and array.dtype.kind in "fiu":
            numbers.append((index, float(array.flat[0])))
    return numbers[-1] if numbers and math.isfinite(numbers[-1][1]) else None


def _is_usual(number: float) -> bool:
    """Whether a number is met everywhere, whatever the size."""
    size = abs(number)
    if size == 0 or any(abs(size - other) <= CLOSE * other for other in HAND_WRITTEN):
        return True
    if abs(math.log10(size) - round(math.log10(size))) <= CLOSE:
        return True
    if abs(size - round(size)) > CLOSE * size:
        return _is_round(size)
    return size < LEAST or (size % 10 == 0 and size <= USUAL_DIVISORS)  # images are traced at 640, too


def _is_of_pixels(node: NodeProto, index: int, number: float, state: State) -> bool:
    """Whether a number is one by which images are normalised, and what it is joined with has the image's size."""
    if all(abs(abs(number) / each - 1) > CLOSE and abs(abs(number) * each - 1) > CLOSE for each in OF_PIXELS):
        return False
    image = state.graph.model.graph.input[0].name
    sides = sorted(axis_sizes(state.shape(image)))
    others = [name for place, name in enumerate(node.input) if place != index and state.is_data(name)]
    shapes = [sorted(axis_sizes(state.shape(name))) for name in others]
    return any(shape == sides and min(size[0] for size in shape if is_fixed(size)) <= BANDS for shape in shapes)


def _is_of_a_product(node: NodeProto, index: int, number: float, state: State) -> bool:
    """Whether a product that sums over channels is divided by how many they are."""
    made = unscaled(node.input[1 - index], state) if node.op_type in ("Mul", "Div") else None
    if made is None or made.op_type != "MatMul" or made.output[0] not in state.shapes:
        return False
    summed = multiplied(state.shape(made.input[0])[-1])
    return is_fixed(summed) and any(abs(size - summed[0]) <= CLOSE * size for size in (abs(number), 1 / abs(number)))


def _is_round(size: float) -> bool:
    """Whether a number has few digits, as those have that are written by hand; 0.5, 0.25 and 0.125 too."""
    return abs(float(f"{size:.{DIGITS}g}") - size) <= 6e-8 * size or size in (0.125, 0.375, 0.625)  # as float32 has it


def _is_telling(number: float) -> bool:
    """Whether a number, or one divided by it, is large and no power of 2: hardly met by chance."""
    size = abs(number)
    for value in (size, 1 / size, 2 / size):
        if abs(value - round(value)) <= 3 * CLOSE * value and round(value) > USUAL_DIVISORS:
            return round(value) not in POWERS and not _is_round(round(value))  # 1e-5 is none of 100,000
    return False


def is_of_channels(number: float, state: State, powers: Sequence[float] = (1, -1, *ROOTS)) -> bool:
    """Whether a number may be a power of how many channels there are, as attention divides by their square root."""
    size = abs(number)
    fixed_axes = {
        axis[0]
        for name in state.shapes
        if state.is_data(name)
        for axis in axis_sizes(state.shape(name))
        if is_fixed(axis)
    }
    fixed_axes |= {side for array in state.graph.constants.values() if array.dtype.kind == "f" for side in array.shape}
    return any(abs(size - axis**power) <= 3 * CLOSE * size for axis in fixed_axes if axis > 1 for power in powers)


def _likely_laws(number: float, state: State) -> Sequence[_Law | _FormOfLaw]:
    """What a number is of the sizes, plainly or else in a form; of a whole number that is a root too, the whole."""
    laws: list[_Law | _FormOfLaw] = list(_laws(number, state)) or list(_laws_in_forms(number, state))
    return [law for law in laws if not law.function.telling] or laws


def _laws_in_forms(number: float, state: State) -> Iterator[_FormOfLaw]:
    """What a number can be of the sizes of maps so far and round numbers, as 1 + √(H·W)/100 is."""
    if number in (0, 1):
        return
    for form in FORMS:
        part = form.inverse(number)
        # What float32 leaves of a number that is near 1.
        close = max(CLOSE, 1.2e-7 * max(1 / abs(number - 1), 1))
        for over in OVER if part > 0 and close < MOST_LOST else ():
            for law in _laws(part * over, state, close):
                plain = not law.function.steps and law.size[0] >= LEAST_IN_FORM
                # 1.05 is also 1 + (1/√4)/10.
                telling = law.function.telling and not _is_round(law.function.of(law.size[0]))
                if not law.less and (plain or telling):
                    yield _FormOfLaw(form, law, over)


def _laws(number: float, state: State, close: float = CLOSE) -> Iterator[_Law]:
    """What a number can be of the sizes of maps so far, the simplest first; `close`: share that it may be off by."""
    sizes = _sizes(state)
    for function in FUNCTIONS:
        for size in sizes:
            for less in (0, 1):
                side = size[0] - less
                if "Half" in function.steps and side % 2 == 0:  # it is another size
                    continue
                if side >= LEAST and abs(function.of(side) - number) <= close * number:
                    yield _Law(function, size, less)


def _sizes(state: State) -> list[SampledSize]:
    """Sides of maps so far, the places of each, and shares of the image that are usual."""
    found: dict[SampledSize, None] = {}
    for name, shape in state.shapes.items():
        if len(shape) < 3 or not state.is_data(name):
            continue
        moving = [size for size in map(multiplied, shape) if changes_with(size) in ("H", "W", "HW")]
        found |= dict.fromkeys(moving)
        if len({changes_with(size) for size in moving}) == len(moving) == 2:
            found[multiplied(moving)] = None
    for stride in STRIDES:
        found |= {size: None for letter in "HW" if (size := scaled(state.image[letter], 1, stride)) is not None}
    return [size for size in found if size != fixed(size[0])]

"""Make a network of one size take every size: numbers that came from the traced image become arithmetic on shapes.

Every tensor's shape is followed at five image sizes at once (shapes.py). Where a number does not fit the others
at all of them, what it can stand for is read off the data that flows there: a Reshape regroups the factors of its
input's axes, a Resize goes to a multiple of its input's size or to that of a tensor it is joined with, and so on. A
reading holds if the whole network fits with it and the scores follow the image. Where two readings hold and
neither is the usual one, the network is refused.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
from fcn_deploy.export.dynamic_shapes.readings import OF_CONSTANTS, Reading, readings_of
from fcn_deploy.export.dynamic_shapes.shape_writer import Writer
from fcn_deploy.export.dynamic_shapes.shapes import (
    BROADCASTING,
    LETTERS,
    ConflictError,
    Network,
    Size,
    State,
    axis,
    describe,
    fixed,
    follows,
    image_sizes,
    is_fixed,
    sizes,
)
from fcn_deploy.export.graph.edit import add_constants, attributes, clone, dims, prune, set_shape
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto

REMEDY = "export it again with dynamic axes for N, H and W, or from PyTorch with export-onnx"

TRIES = 20  # times a graph may be followed in search of a reading, and as often again for each that is doubted

UNLIKELY = (704, 832)  # a size that no network is made for
FACTORS = (1, 2, 4, 8, 16, 32, 64)  # of a size that is found in a graph to the image's, at most


@dataclass(frozen=True)
class Freed:
    """A model whose sizes are free.

    Attributes:
        model: its batch, height and width have names.
        notes: what was changed, a line each kind; none where nothing but the names of dimensions was.
        traced: (N, H, W) that its numbers were for; () where none of them was for a size.
        stretched: the first node that makes scores depend on the image's size otherwise than by what is near them,
            such as a Resize with aligned corners; "": none was seen.
        multiple: what H and W must be multiples of for its padding to be what it was.
    """

    model: ModelProto
    notes: tuple[str, ...] = ()
    traced: tuple[int, ...] = ()
    stretched: str = ""
    multiple: int = 1


def free_sizes(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """A model whose batch, height and width are free, from one in which some or all of them are numbers.

    Args:
        model: one image in, [N,C,H,W] or [N,H,W,C]; its first output follows the image, at its size or smaller.
            Its dimensions may be numbers, or names that promise more than the graph holds.

    Returns:
        (the model, what was changed, a line each kind).

    Raises:
        DeployError: a number cannot be told from a size, or what it stands for cannot be computed: names the node.
    """
    found = find_sizes(model)
    return found.model, list(found.notes)


def find_sizes(model: ModelProto, size: tuple[int, int] | None = None) -> Freed:
    """As free_sizes, with what it found. `size`: (height, width) that the model is known to run at, if any is."""
    folded = fold_constants(model, keep=OF_CONSTANTS).model
    image = folded.graph.input[0]
    given = dims(image)
    if len(folded.graph.input) != 1 or len(given) != 4:
        raise DeployError(
            f"the model takes {len(folded.graph.input)} inputs, the first {given}; sizes are freed in models of one "
            "image, [N,C,H,W]"
        )
    network = Network(folded)
    places = _image_axes(given)
    batch = given[0] if isinstance(given[0], int) and given[0] > 0 else None
    traced = _traced(network, given, places, batch or 1, size)
    if not network.traced and batch is None:
        return Freed(model)
    found = _Search(network, places, traced).solve()
    written, notes = _written(network, found, places)
    multiple = math.lcm(*(reading.multiple for reading in found.taken.values()))
    return Freed(written, tuple(notes), traced, _stretched(network, found), multiple)


def _image_axes(given: Sequence[int | str | None]) -> tuple[int, int]:
    """The axes of height and width: 2 and 3, or 1 and 2 where channels come last."""
    last_is_channels = isinstance(given[3], int) and given[3] <= 4 and not (isinstance(given[1], int) and given[1] <= 4)
    return (1, 2) if last_is_channels else (2, 3)


def _traced(
    network: Network,
    given: Sequence[int | str | None],
    places: tuple[int, int],
    batch: int,
    size: tuple[int, int] | None,
) -> tuple[int, int, int]:
    """(N, H, W) that the model was traced with; what its input does not tell is found by what fits."""
    sides = [given[place] if isinstance(given[place], int) and given[place] > 0 else None for place in places]
    if None not in sides:
        return batch, *sides
    tried = []
    for height, width in (UNLIKELY, *([size] if size else []), *_likely_sizes(network)):
        pair = sides[0] or height, sides[1] or width
        if pair in tried:
            continue
        tried.append(pair)
        try:
            _Search(network, places, (batch, *pair), "").solve()
        except DeployError:
            continue
        # What fits a size that no network is made for has no number that is for one.
        network.traced = sides != [None, None] or pair != UNLIKELY
        return batch, *pair
    raise DeployError(
        f"the model's input is {given}, but at none of {len(tried)} likely sizes do its numbers fit it; "
        f"give its input the height and width it was traced with, or {REMEDY}"
    )


def _likely_sizes(network: Network) -> Iterator[tuple[int, int]]:
    """Those that the graph's numbers hint at."""
    pairs = [tuple(dims(value)[-2:]) for value in network.model.graph.output if len(dims(value)) >= 2]
    for node in network.nodes:
        numbers = [network.constants[name] for name in node.input if name in network.constants]
        if node.op_type in ("AveragePool", "MaxPool"):
            pairs.append(tuple(attributes(node).get("kernel_shape", ())[-2:]))
        elif node.op_type in ("Resize", "Reshape", "Expand", "Concat", "Slice", "MaxUnpool"):
            pairs += [tuple(array.flat[-2:]) for array in numbers if array.dtype == np.int64 and 2 <= array.size <= 8]
        pairs += [array.shape[-2:] for array in numbers if array.ndim >= 3 and node.op_type in BROADCASTING]
    for pair in dict.fromkeys(pairs):
        if len(pair) == 2 and all(isinstance(side, int | np.integer) and 1 < side < 1 << 16 for side in pair):
            for factor in FACTORS:
                yield int(pair[0]) * factor, int(pair[1]) * factor


@dataclass
class _Choice:
    """A node where several readings are possible, and the state before it."""

    index: int
    before: State
    readings: list[Reading]
    taken: int = 0


class _Search:
    """Depth first through the nodes' readings, the likeliest first; `free`: which of N, H and W are."""

    def __init__(
        self, network: Network, places: tuple[int, int], traced: tuple[int, int, int], free: str | None = None
    ) -> None:
        self.network = network
        if free is None:
            free = LETTERS if network.traced else "N"
        self.free = free
        self.image = {
            letter: size if letter in free else fixed(size[0])
            for letter, size in zip(LETTERS, image_sizes(*traced), strict=True)
        }
        image = network.model.graph.input[0]
        channels = dims(image)[6 - sum(places)]
        shape = [self.image["N"], *[fixed(channels if isinstance(channels, int) else 3)] * 3]
        shape[places[0]], shape[places[1]] = self.image["H"], self.image["W"]
        self.start = State(network, self.image, {image.name: tuple(map(axis, shape))})
        self.steps = 0
        self.farthest: tuple[int, ConflictError] | None = None

    def solve(self) -> "_Solution":
        found = self._run(self.start.copy(), 0, {})
        if found is None:
            raise self._refusal()
        state, taken, choices = found
        self._settle(choices, taken)
        return _Solution(state, taken, self.image)

    def _run(self, state: State, index: int, taken: dict[int, Reading]):
        """(state at the end, reading by node, the choices made on the way) of the first that fits; None: none does."""
        choices: list[_Choice] = []
        limit = self.steps + TRIES * len(self.network.nodes)
        nodes = self.network.nodes
        while True:
            try:
                if index == len(nodes):
                    self._end(state)
                    return state, taken, choices
                self.steps += 1
                if self.steps > limit:
                    raise _refused(nodes[index], "what the numbers before it stand for is not found in reasonable time")
                found = self._readings(nodes[index], state)
                if len(found) > 1:
                    choices.append(_Choice(index, state.copy(), found))
                _take(state, taken, index, found[0])
                index += 1
            except ConflictError as conflict:
                if self.farthest is None or index >= self.farthest[0]:
                    self.farthest = index, conflict
                # A choice that this node does not depend on cannot help it.
                while choices and (
                    choices[-1].taken + 1 >= len(choices[-1].readings)
                    or (index < len(nodes) and choices[-1].index not in self.network.ancestors[index] | {index})
                ):
                    choices.pop()
                if not choices:
                    return None
                choice = choices[-1]
                choice.taken += 1
                state, index = choice.before.copy(), choice.index
                taken = {place: reading for place, reading in taken.items() if place < index}
                _take(state, taken, index, choice.readings[choice.taken])
                index += 1

    def _readings(self, node: NodeProto, state: State) -> list[Reading]:
        try:
            return readings_of(self.network, node, state, bool(self.free))
        except (ArithmeticError, LookupError, ValueError) as error:
            raise ConflictError(node, f"it is not as its operator is defined ({error})") from error

    def _settle(self, choices: list[_Choice], taken: dict[int, Reading]) -> None:
        """Raise where another reading, as good as the one taken, holds as well."""
        for choice in choices:
            chosen = choice.readings[choice.taken]
            for other in choice.readings[choice.taken + 1 :]:
                if other.rank > chosen.rank:
                    continue
                state = choice.before.copy()
                before = {place: reading for place, reading in taken.items() if place < choice.index}
                _take(state, before, choice.index, other)
                if self._run(state, choice.index + 1, before) is not None:
                    node = self.network.nodes[choice.index]
                    raise _refused(
                        node,
                        f"what its numbers stand for cannot be told: {chosen.said or 'as they are'}, or "
                        f"{other.said or 'as they are'}; both fit",
                    )

    def _end(self, state: State) -> None:
        """Raise ConflictError where the scores do not follow the image."""
        output = self.network.model.graph.output[0]
        node = self.network.nodes[self.network.place[output.name]]
        found = sizes(state.shape(output.name))
        batch, *image = self.image.values()
        if not any(
            all(follows(side) == follows(whole) for side, whole in zip(pair, image, strict=True))
            and _fraction_of(image, pair)
            for pair in pairwise(found)
        ):
            text = ", ".join(describe(size, self.image) for size in found)
            raise ConflictError(node, f"the scores have the size [{text}], which does not follow the image")
        if follows(batch) and batch not in found:
            raise ConflictError(node, "the batch is lost on the way to the scores")

    def _refusal(self) -> DeployError:
        _, conflict = self.farthest
        return _refused(conflict.node, conflict.reason)


def _fraction_of(image: Sequence[Size], found: Sequence[Size]) -> bool:
    """Whether a map is the image's size divided by one whole number, up to rounding."""
    factors = {
        round(whole / part)
        for whole_side, side in zip(image, found, strict=True)
        for whole, part in zip(whole_side, side, strict=True)
        if part > 2 or whole == part
    }
    if len(factors) != 1 or 0 in factors:
        return False
    factor = factors.pop()
    return all(
        abs(whole - part * factor) < factor
        for whole_side, side in zip(image, found, strict=True)
        for whole, part in zip(whole_side, side, strict=True)
    )


def _refused(node: NodeProto, reason: str) -> DeployError:
    name = node.name or node.output[0]
    return DeployError(f"the size cannot be freed: node {name} ({node.op_type}): {reason}; {REMEDY}")


def _take(state: State, taken: dict[int, Reading], index: int, reading: Reading) -> None:
    state.shapes |= reading.shapes
    state.values |= reading.values
    if reading.change is not None or reading.doubt or reading.multiple > 1:
        taken[index] = reading


@dataclass(frozen=True)
class _Solution:
    state: State
    taken: dict[int, Reading]
    image: dict[str, Size]


def _written(network: Network, solved: _Solution, places: tuple[int, int]) -> tuple[ModelProto, list[str]]:
    model = clone(network.model)
    writer = Writer(network, solved.state)
    nodes, notes = [], {}
    for index, node in enumerate(network.nodes):
        reading = solved.taken.get(index)
        if reading is None:
            nodes.append(node)
            continue
        try:
            new = reading.change(writer) if reading.change is not None else [node]
        except ConflictError as conflict:
            raise _refused(node, conflict.reason) from conflict
        nodes += [*writer.before, *new]
        writer.before.clear()
        if reading.change is not None or reading.doubt:
            notes.setdefault((node.op_type, reading.doubt or reading.said), []).append(node.name or node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    add_constants(model, writer.constants)
    prune(model)
    del model.graph.value_info[:]
    image = model.graph.input[0]
    shape = list(dims(image))
    shape[0], shape[places[0]], shape[places[1]] = "N", "H", "W"
    set_shape(image, shape, image.type.tensor_type.elem_type)
    for output in model.graph.output:
        found = sizes(solved.state.shape(output.name))
        named = [size[0] if is_fixed(size) else _named(size, solved.image, place) for place, size in enumerate(found)]
        set_shape(output, named, output.type.tensor_type.elem_type)
    return model, [
        f"{kind} {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {said}"
        for (kind, said), names in notes.items()
    ]


def _stretched(network: Network, solved: _Solution) -> str:
    """The first node that makes scores depend on the image's size otherwise than by what is near them."""
    state = solved.state
    for index, node in enumerate(network.nodes):
        found = node.op_type in ("GridSample", "AffineGrid", "Range") and state.is_data(node.output[0])
        if node.op_type == "Resize" and state.is_data(node.output[0]):
            before, after = (sizes(state.shape(name)) for name in (node.input[0], node.output[0]))
            changed = [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]
            aligned = attributes(node).get("coordinate_transformation_mode") == "align_corners"
            found = any(
                (aligned and set(old) != {1}) or len({Fraction(b, a) for a, b in zip(old, new, strict=True)}) > 1
                for old, new in changed
                if set(old) != {1}
            )
        reading = solved.taken.get(index)
        if found or (reading is not None and reading.grid):
            return f"{node.op_type} {node.name or node.output[0]}"
    return ""


def _named(size: Size, image: dict[str, Size], place: int) -> str:
    """The name of an output's dimension."""
    return next((letter for letter, whole in image.items() if whole == size), f"d{place}")

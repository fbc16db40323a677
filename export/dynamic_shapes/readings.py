"""What the numbers in a node can stand for, read off the shapes that meet there."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product

import numpy as np
from fcn_deploy.export.dynamic_shapes.position_constants import law_of
from fcn_deploy.export.dynamic_shapes.shape_writer import Writer
from fcn_deploy.export.dynamic_shapes.shapes import (
    BROADCASTING,
    POINTS,
    Axis,
    ConflictError,
    Network,
    Shape,
    Size,
    State,
    axes_of,
    axis,
    broadcast,
    carried,
    describe,
    fixed,
    follows,
    inferred,
    input_of,
    integers,
    is_fixed,
    scaled,
    sizes,
    times,
)
from fcn_deploy.export.graph.edit import attributes, consumers
from onnx import NodeProto, helper

TO_THE_END = np.iinfo(np.int64).max
FIXED = 4  # windows up to this, side by side, are of a network that halves its maps
OF_CONSTANTS = ("Resize",)  # what is brought to the map's size although it is a constant: positions, say
WIDE = 7  # a pooling window at least so wide and as large as the map is the whole map's


@dataclass(frozen=True)
class Reading:
    """What a node's numbers can stand for.

    Attributes:
        shapes: of its outputs.
        rank: 0 where it is as good as others of rank 0; higher: taken only where no better one holds.
        change: writes it: the nodes that replace the node; None: the node stays.
        said: what was read, for the note; "": it stays.
        values: of its outputs, where they are arithmetic on shapes.
        grid: whether it makes a grid of the image's size.
        doubt: what was taken for granted where the node stays, for the note; "": nothing.
        multiple: what H and W must be multiples of for the node to be what it was.
    """

    shapes: dict[str, Shape]
    rank: int = 0
    change: Callable[[Writer], list[NodeProto]] | None = None
    said: str = ""
    values: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)
    grid: bool = False
    doubt: str = ""
    multiple: int = 1


def readings_of(network: Network, node: NodeProto, state: State, freeing: bool) -> list[Reading]:
    """Of a node, the likeliest first; its numbers as they stand alone unless `freeing`.

    Raises:
        ConflictError: there is none.
    """
    touched = node.op_type in OF_CONSTANTS or any(state.is_data(name) for name in node.input if name)
    if freeing and touched and node.op_type in _NUMBERS:
        found = _NUMBERS[node.op_type](network, node, state)
        if found is not None:
            unique: dict = {}
            for reading in sorted(found, key=lambda reading: reading.rank):
                unique.setdefault((*reading.shapes.values(), reading.said), reading)
            if not unique:
                raise ConflictError(node, "what its numbers stand for at other sizes cannot be told")
            return list(unique.values())
    if freeing and touched and (grown := _grown(network, node, state)) is not None:
        return [grown]
    shapes, values = carried(network, node, state)
    doubt, multiple = "", 1
    if freeing and touched and network.traced and node.op_type in PADDING:
        doubt, multiple = _padding(network, node, state)
    return [Reading(shapes, values=values, doubt=doubt, multiple=multiple)]


def _known(state: State, number: int, letters: str) -> list[Size]:
    """Sizes of maps so far that were `number` when traced and follow one of `letters`, the latest first."""
    found = [
        times(factors)
        for name in reversed(state.shapes)
        if len(state.shapes[name]) >= 3 and state.is_data(name)
        for factors in state.shapes[name]
    ]
    single = [size for size in found if size[0] == number and follows(size) in letters.split()]
    return list(dict.fromkeys(single))


def _following(state: State, size: Size, number: int) -> list[Size]:
    """What `number` can be where a map has `size`: a simple share of it, or the size of another map."""
    letters = follows(size)
    found = []
    if letters:
        ratio = Fraction(number, size[0])
        if 1 in (ratio.numerator, ratio.denominator) or ratio.denominator <= 4:
            found = [scaled(size, ratio.numerator, ratio.denominator)]
    return list(dict.fromkeys(s for s in (*found, *_known(state, number, letters or "H W")) if s is not None))


def _reshape(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    shape = state.shape(node.input[0])
    targets = state.value(node.input[1])
    if targets is None:
        raise ConflictError(node, f"it goes to {node.input[1]}, which is computed from the image's pixels")
    traced = [size[0] for size in sizes(shape)]
    as_it_stands = _resolved(node, shape, targets, 0)
    if as_it_stands is None or math.prod(as_it_stands) != math.prod(traced):
        raise ConflictError(node, f"it makes {targets[0].tolist()} of {traced}")
    everywhere = [_resolved(node, shape, targets, point) for point in range(POINTS)]
    readings = []
    for axes, rank in _grouped(tuple(f for factors in shape for f in factors), as_it_stands, state):
        found = tuple(axes)
        numbers = [[size[point] for size in sizes(found)] for point in range(POINTS)]
        if numbers == everywhere:
            readings.append(Reading({node.output[0]: found}, rank))
            continue
        text = ", ".join(describe(size, state.image) for size in sizes(found))
        readings.append(
            Reading(
                {node.output[0]: found},
                rank,
                _write_reshape(node, shape, found),
                f"to [{text}] instead of {as_it_stands}",
            )
        )
    if not readings:
        raise ConflictError(node, f"it makes {as_it_stands} of {traced}, which is no regrouping of its axes")
    return readings


def _resolved(node: NodeProto, shape: Shape, targets, point: int) -> list[int] | None:
    """A Reshape's target at a point, its 0 and -1 filled in."""
    before = [size[point] for size in sizes(shape)]
    numbers = [int(number) for number in targets[point]]
    if not attributes(node).get("allowzero"):
        if any(number == 0 and place >= len(before) for place, number in enumerate(numbers)):
            return None
        numbers = [before[place] if number == 0 else number for place, number in enumerate(numbers)]
    if -1 in numbers:
        rest = math.prod(number for number in numbers if number != -1)
        if rest <= 0 or math.prod(before) % rest:
            return None
        numbers[numbers.index(-1)] = math.prod(before) // rest
    return numbers


def _grouped(flat: Axis, targets: Sequence[int], state: State) -> Iterator[tuple[list[Axis], int]]:
    """The ways to regroup factors, in their order, into axes that were of these numbers when traced, with a rank."""
    if not targets:
        if not flat:
            yield [], 0
        return
    for taken, rest, rank in _first_group(flat, targets[0], state, len(targets) == 1):
        for others, worse in _grouped(rest, targets[1:], state):
            yield [taken, *others], max(rank, worse)


def _first_group(flat: Axis, number: int, state: State, last: bool) -> Iterator[tuple[Axis, Axis, int]]:
    """(an axis of `number`, the factors left, a rank) by taking factors from the front."""
    if number == 1 and not last:
        if flat and flat[0][0] == 1:
            yield flat[:1], flat[1:], 0
            yield (), flat, 2
        else:
            yield (), flat, 0
        return
    taken: list[Size] = []
    rest, missing, rank = flat, number, 0
    while missing > 1:
        if not rest:
            return
        size, rest = rest[0], rest[1:]
        if missing % size[0] == 0:  # also those that were 1, such as the batch, which nothing may jump over
            taken.append(size)
            missing //= size[0]
        elif size[0] % missing:
            return
        elif is_fixed(size):
            taken.append(fixed(missing))
            rest, missing = (fixed(size[0] // missing), *rest), 1
        else:
            for outer, inner, worse in _split(size, missing, state):
                yield (*taken, outer), (inner, *rest), worse
            return
    if last or number == 1:
        while rest and rest[0][0] == 1:
            taken.append(rest[0])
            rest = rest[1:]
    merged: list[Size] = []
    for size in taken:
        if merged and is_fixed(size) and is_fixed(merged[-1]):
            merged[-1] = times([merged[-1], size])
        else:
            merged.append(size)
    yield tuple(merged), rest, rank


def _split(size: Size, number: int, state: State) -> Iterator[tuple[Size, Size, int]]:
    """One factor as two, the outer of `number` when traced: one of them a constant, or both known sizes."""
    other = size[0] // number
    pairs = []
    if len(follows(size)) > 1:
        for outer in _known(state, number, "N H W"):
            if all(whole % part == 0 for whole, part in zip(size, outer, strict=True)):
                inner = tuple(whole // part for whole, part in zip(size, outer, strict=True))
                if not is_fixed(inner):
                    yield outer, inner, 0
                    pairs.append(outer)
    worse = 1 if pairs else 0
    if (outer := scaled(size, 1, other)) is not None:
        yield outer, fixed(other), worse
    if (inner := scaled(size, 1, number)) is not None:
        yield fixed(number), inner, worse


def _write_reshape(node: NodeProto, before: Shape, after: Shape) -> Callable:
    def write(writer: Writer) -> list[NodeProto]:
        entries: list[int | Axis] = []
        for place, factors in enumerate(after):
            size = times(factors)
            if is_fixed(size):
                entries.append(size[0])
            elif place < len(before) and times(before[place]) == size:
                entries.append(0)
            else:
                entries.append(factors)
        computed = [place for place, entry in enumerate(entries) if isinstance(entry, tuple)]
        if computed:  # the one that takes most arithmetic is what is left over
            entries[max(computed, key=lambda place: len(entries[place]))] = -1
        parts = [writer.axis(entry, node) if isinstance(entry, tuple) else entry for entry in entries]
        return [writer.replaced(node, {1: writer.concat(parts, node)}, drop=("allowzero",))]

    return write


def _resize(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    """Resize, and MaxUnpool with the size of its output."""
    shape, given = state.shape(node.input[0]), attributes(node)
    unpool = node.op_type == "MaxUnpool"
    if given.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    before = sizes(shape)
    axes = [place % len(shape) for place in given.get("axes", range(len(shape)))]
    target = integers(node, state, "sizes", 2 if unpool else 3)
    factors = None
    if not target:
        if unpool:
            return None
        value = state.value(input_of(node, 2))
        if value is None:
            raise ConflictError(node, "its scales are computed from the image's pixels")
        factors = [[float(array[place]) for array in value] for place in range(len(axes))]
        target = [
            tuple(math.floor(side * factor + 1e-6) for side, factor in zip(before[place], scale, strict=True))
            for place, scale in zip(axes, factors, strict=True)
        ]
    options: list[list[tuple[Size, int]]] = []
    for index, (place, wanted) in enumerate(zip(axes, target, strict=True)):
        size, number = before[place], wanted[0]
        if not is_fixed(wanted) and (factors is None or len(set(factors[index])) > 1 or _simple(factors[index])):
            options.append([(wanted, 0)])
        elif (is_fixed(size) and number == size[0]) or (
            place < len(shape) - 2 and follows(size) == "N" and number == size[0]
        ):
            options.append([(size, 0)])
        else:
            # Numbers as they are: rarely meant where a map grows by a whole factor, as well as anything elsewhere.
            stays = 1 if follows(size) and number % size[0] == 0 else 0
            options.append([*((other, 0) for other in _following(state, size, number)), (wanted, stays)])
    readings = []
    for picked in product(*options):
        found = list(before)
        for place, (size, _) in zip(axes, picked, strict=True):
            found[place] = size
        rank = max(rank for _, rank in picked)
        letters = "".join(follows(size) for size in found if follows(size) in ("H", "W"))
        rank = max(rank, 2 if letters == "WH" else 0)
        # Of two sides that may be meant as they are, either both are or none.
        open_ = [
            pair == (wanted, pair[1]) for pair, wanted, some in zip(picked, target, options, strict=True) if some[1:]
        ]
        rank = max(rank, 2 if len(set(open_)) > 1 else 0)
        after = tuple(
            factors if times(factors) == size else axis(size) for factors, size in zip(shape, found, strict=True)
        )
        shapes = {node.output[0]: after}
        if [size for size, _ in picked] == target:
            readings.append(Reading(shapes, rank, said="to the size it names, at any size of the image"))
            continue
        change = _write_resize(node, before, found, [size for size, _ in picked], target, axes, factors is None)
        by = None if unpool else _whole_factors(before, found)
        if by is None:
            text = "to " + " by ".join(describe(found[place], state.image) for place in axes[-2:])
        else:
            text = "to " + " by ".join(str(by[place]) for place in axes[-2:]) + " times its input's size"
        readings.append(
            Reading(shapes, rank, change, f"{text} instead of {' by '.join(str(t[0]) for t in target[-2:])}")
        )
    return readings


def _whole_factors(before: Sequence[Size], after: Sequence[Size]) -> list[int] | None:
    """By which whole numbers sizes grow, at all sizes of the image; None: by others."""
    factors = [new[0] // old[0] for old, new in zip(before, after, strict=True)]
    grown = [scaled(old, factor, 1) for old, factor in zip(before, factors, strict=True)]
    return factors if grown == list(after) else None


def _simple(factors: Sequence[float]) -> bool:
    """Whether a scale is one that people write."""
    ratio = Fraction(factors[0]).limit_denominator(64)
    return abs(float(ratio) - factors[0]) < 1e-6 and (ratio.denominator <= 4 or ratio.numerator == 1)


def _write_resize(node, before, after, picked, target, axes, by_sizes: bool) -> Callable:
    unpool = node.op_type == "MaxUnpool"

    def write(writer: Writer) -> list[NodeProto]:
        by = None if unpool else _whole_factors(before, after)
        if by is not None:
            scales = writer.constant("scales", np.array(by, np.float32))
            return [writer.replaced(node, {1: writer.nothing(node), 2: scales}, drop=("axes",), count=3)]
        parts: list[int | str] = []
        for place, size in enumerate(after):
            if place in axes and by_sizes and picked[axes.index(place)] == target[axes.index(place)]:
                if is_fixed(size):
                    parts.append(size[0])
                else:  # computed already
                    parts.append(writer.element(node.input[2 if unpool else 3], axes.index(place)))
            elif is_fixed(size):
                parts.append(size[0])
            else:
                parts.append(writer.size(size, node))
        sizes_ = writer.concat(parts, node)
        if unpool:
            return [writer.replaced(node, {2: sizes_})]
        return [writer.replaced(node, {1: writer.nothing(node), 2: writer.nothing(node), 3: sizes_}, drop=("axes",))]

    return write


def _expand(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    shape = state.shape(node.input[0])
    target = integers(node, state, "shape", 1)
    rank = max(len(shape), len(target))
    before = [fixed(1)] * (rank - len(shape)) + sizes(shape)
    wanted = [fixed(1)] * (rank - len(target)) + target
    options: list[list[tuple[Size, int]]] = []
    for size, entry in zip(before, wanted, strict=True):
        options.append(_repeated(state, size, entry, entry))
    readings = []
    for picked in product(*options):
        after = [size for size, _ in picked]
        found = tuple(axis(size) for size in after)
        if len(shape) == rank:
            found = tuple(
                factors if times(factors) == size else axis(size) for factors, size in zip(shape, after, strict=True)
            )
        shapes = {node.output[0]: found}
        if all(
            new in (entry, size) and entry in (fixed(1), new)
            for new, entry, size in zip(after, wanted, before, strict=True)
        ):
            readings.append(Reading(shapes, max(rank for _, rank in picked), said="to the size it names"))
            continue
        text = ", ".join(describe(size, state.image) for size in after)

        def write(writer: Writer, after=after) -> list[NodeProto]:
            parts = [
                1 if old == new else new[0] if is_fixed(new) else writer.size(new, node)
                for old, new in zip(before, after, strict=True)
            ]
            return [writer.replaced(node, {1: writer.concat(parts, node)})]

        readings.append(Reading(shapes, max(rank for _, rank in picked), write, f"to [{text}]"))
    return readings


def _repeated(state: State, size: Size, entry: Size, result: Size) -> list[tuple[Size, int]]:
    """What an axis of `size` can become where it is repeated to `entry`, which gives `result` as it stands."""
    if not is_fixed(entry):
        return [(result, 0)]
    if entry[0] == 1:
        # The batch is 1 as well when traced.
        batch = (
            [state.image["N"]] if set(size) == {1} and state.image["N"][0] == 1 and follows(state.image["N"]) else []
        )
        return [(size, 0), *((other, 2) for other in batch)]
    if not is_fixed(size):
        return [(size, 0)] if size[0] == entry[0] else []
    if size[0] != 1:
        return [(result, 0)]
    return [*((other, 0) for other in _known(state, entry[0], "N H W NH HW NW NHW")), (result, 0)]


def _tile(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    shape = state.shape(node.input[0])
    before = sizes(shape)
    repeats = integers(node, state, "repeats", 1)
    options = []
    for size, count in zip(before, repeats, strict=True):
        result = times([size, count])
        options.append([(result, 0)] if size != fixed(1) else _repeated(state, size, count, result))
    readings = []
    for picked in product(*options):
        after = [size for size, _ in picked]
        shapes = {node.output[0]: tuple(map(axis, after))}
        rank = max(rank for _, rank in picked)
        if after == [times(pair) for pair in zip(before, repeats, strict=True)]:
            readings.append(Reading(shapes, rank, said="as often as it names"))
            continue
        text = ", ".join(describe(size, state.image) for size in after)

        def write(writer: Writer, after=after) -> list[NodeProto]:
            parts = [
                count[0] if new == times([old, count]) else writer.size(new, node)
                for old, new, count in zip(before, after, repeats, strict=True)
            ]
            return [writer.replaced(node, {1: writer.concat(parts, node)})]

        readings.append(Reading(shapes, rank, write, f"to [{text}]"))
    return readings


def _slice(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    shape = state.shape(node.input[0])
    before = sizes(shape)
    starts, ends = integers(node, state, "starts", 1), integers(node, state, "ends", 2)
    axes = axes_of(node, state, 3, len(shape)) or list(range(len(starts)))
    steps = integers(node, state, "steps", 4) or [fixed(1)] * len(starts)
    options = []
    for place, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = before[place]
        if is_fixed(size) or not (is_fixed(start) and is_fixed(end)) or step[0] < 0:
            options.append([_Cut(start, end, 0)])
        else:
            options.append(list(_cuts(state, size, start[0], end[0])))
    readings = []
    for picked in product(*options):
        after = list(shape)
        for place, cut, step in zip(axes, picked, steps, strict=True):
            size = before[place]
            if step[0] < 0:
                if cut.end[0] > -(1 << 30) or cut.start[0] != -1:
                    raise ConflictError(node, "it reads the map backwards from a place of its own")
                continue
            first = tuple(_clipped(number, side) for number, side in zip(cut.start, size, strict=True))
            behind = tuple(_clipped(number, side) for number, side in zip(cut.end, size, strict=True))
            length = tuple(-(-(b - a) // by) for a, b, by in zip(first, behind, step, strict=True))
            if min(length) < 1:
                break
            after[place] = after[place] if length == size else axis(length)
        else:
            shapes = {node.output[0]: tuple(after)}
            rank = max((cut.rank for cut in picked), default=0)
            if all(cut.start == start and cut.end == end for cut, start, end in zip(picked, starts, ends, strict=True)):
                readings.append(Reading(shapes, rank, said="from and to the places it names"))
                continue
            text = " and ".join(
                f"{describe(cut.start, state.image)} to "
                f"{'the end' if cut.end[0] >= 1 << 30 else describe(cut.end, state.image)}"
                for cut in picked
            )
            readings.append(Reading(shapes, rank, _write_slice(node, picked, axes, steps), f"from {text}"))
    return readings


@dataclass(frozen=True)
class _Cut:
    """From where to where a Slice goes along an axis."""

    start: Size
    end: Size
    rank: int


def _clipped(number: int, side: int) -> int:
    return min(max(number + side if number < 0 else number, 0), side)


def _cuts(state: State, size: Size, start: int, end: int) -> Iterator[_Cut]:
    """What a Slice's numbers can stand for along an axis that follows the image."""
    starts: list[Size] = [fixed(start)]
    if start > 0:
        starts += [other for other in _following(state, size, start) if other != fixed(start)]
    whole = fixed(TO_THE_END)
    for first in starts:
        if end >= size[0]:
            ends = [fixed(end) if end >= 1 << 30 else whole]
        elif end <= 1:
            ends = [fixed(end)]  # counted from the end, or the first of all
        else:
            ends = _following(state, size, end)
            ends.append(tuple(side - (size[0] - end) for side in size))
            if start > 0 and end > start:
                ends += [tuple(map(sum, zip(s, first, strict=True))) for s in _following(state, size, end - start)]
            # Of most of a map, a number of its own is rarely meant.
            ends.append(fixed(end))
        for behind in dict.fromkeys(ends):
            yield _Cut(first, behind, 1 if behind == fixed(end) and end > size[0] / 2 and end < size[0] else 0)


def _write_slice(node: NodeProto, picked: Sequence[_Cut], axes, steps) -> Callable:
    def write(writer: Writer) -> list[NodeProto]:
        starts, ends = (
            writer.concat([size[0] if is_fixed(size) else writer.size(size, node) for size in found], node)
            for found in ([cut.start for cut in picked], [cut.end for cut in picked])
        )
        inputs = {1: starts, 2: ends, 3: writer.constant("axes", np.array(axes, np.int64))}
        inputs[4] = writer.constant("steps", np.array([step[0] for step in steps], np.int64))
        return [writer.replaced(node, inputs)]

    return write


def _split_node(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    shape = state.shape(node.input[0])
    place = attributes(node).get("axis", 0) % len(shape)
    size = times(shape[place])
    parts = integers(node, state, "split", 1)
    if is_fixed(size) or parts is None or not all(map(is_fixed, parts)):
        return None
    options = []
    for part in parts:
        options.append([*_following(state, size, part[0]), part])
    readings = []
    for picked in product(*options):
        if tuple(map(sum, zip(*picked, strict=True))) != size:
            continue
        shapes = {
            name: (*shape[:place], axis(part), *shape[place + 1 :])
            for name, part in zip(node.output, picked, strict=True)
        }

        def write(writer: Writer, picked=picked) -> list[NodeProto]:
            if len(set(picked)) == 1 and network.opset < 13:
                return [writer.replaced(node, {}, drop=("split",))]
            if network.opset < 13:
                raise ConflictError(node, f"opset {network.opset} has no Split into computed parts")
            lengths = [part[0] if is_fixed(part) else writer.size(part, node) for part in picked]
            return [writer.replaced(node, {1: writer.concat(lengths, node)})]

        text = ", ".join(describe(part, state.image) for part in picked)
        readings.append(Reading(shapes, 0, write, f"into {text}"))
    return readings


def _pool(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    """Windows that were made for the traced size: of the whole map, or of an even share of it."""
    shape, given = state.shape(node.input[0]), attributes(node)
    kernel, mean = given["kernel_shape"], node.op_type == "AveragePool"
    first = len(shape) - len(kernel)
    sides = sizes(shape)[first:]
    strides = given.get("strides", [1] * len(kernel))
    if not _unpadded(node) or given.get("ceil_mode") or len([name for name in node.output if name]) > 1:
        return None
    windows = f"windows of {'×'.join(map(str, kernel))}"
    stays = Reading(inferred(network, node, state), said=f"{windows} as they are")
    along = [
        first + place
        for place, (width, side) in enumerate(zip(kernel, sides, strict=True))
        if width == side[0] > 1 and not is_fixed(side)
    ]
    if along:
        others = [place for place in range(len(kernel)) if first + place not in along]
        if any(kernel[place] != 1 or strides[place] != 1 for place in others):
            raise ConflictError(node, f"its {windows} span the traced map one way and share it the other")
        usual = mean and max(kernel) >= WIDE
        after = tuple(() if place in along else factors for place, factors in enumerate(shape))
        every = len(along) == len(kernel)
        kind = ("GlobalAveragePool" if mean else "GlobalMaxPool") if every else ("ReduceMean" if mean else "ReduceMax")

        def write(writer: Writer) -> list[NodeProto]:
            if every:
                return [helper.make_node(kind, node.input[:1], node.output, name=node.name)]
            return [writer.reduce(kind, node, along)]

        whole = Reading({node.output[0]: after}, 0, write, f"over the whole map instead of {windows}")
        return [whole, replace(stays, rank=1 if usual else 0)]
    if not network.traced:
        return [stays]
    beside = [
        other
        for other in consumers(network.model, node.input[0])
        if other.op_type.endswith(node.op_type)
        and _unpadded(other)
        and attributes(other).get("kernel_shape") != kernel
        and ("kernel_shape" in {item.name for item in other.attribute} or max(kernel) > 2)
    ]
    shared = any(
        width == step > 1 and side[0] % width == 0 and not is_fixed(side)
        for width, step, side in zip(kernel, strides, sides, strict=True)
    )
    if (mean and beside) or (shared and (beside or max(kernel) > FIXED)):
        raise ConflictError(
            node,
            f"its {windows} share the traced map evenly: adaptive pooling, most likely, whose windows change with the "
            "size",
        )
    return [replace(stays, doubt=f"{windows} are taken for fixed ones, not for shares of the map") if shared else stays]


def _unpadded(node: NodeProto) -> bool:
    given = attributes(node)
    return not any(given.get("pads", ())) and given.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")


PADDING = frozenset(("Pad", "Conv", "ConvInteger", "QLinearConv", "AveragePool", "LpPool", "MaxPool"))


def _padding(network: Network, node: NodeProto, state: State) -> tuple[str, int]:
    """(what is doubtful, what H and W must be multiples of) for padding that differs before and behind.

    "Same" padding is as wide on both sides, or by one wider on one, by where the stride falls. What is wider fills up
    to something.

    Raises:
        ConflictError: it fills the traced map up to a multiple.
    """
    shape, given = state.shape(node.input[0]), attributes(node)
    if node.op_type == "Pad":
        pads = integers(node, state, "pads", 1)
        axes = axes_of(node, state, 3, len(shape)) or list(range(len(shape)))
    else:
        axes = list(range(2, len(shape)))
        pads = [fixed(number) for number in given.get("pads", [0] * (2 * len(axes)))]
    sides, doubts, multiple = sizes(shape), [], 1
    half = len(pads) // 2
    axes = axes[:half]
    for place, before, behind in zip(axes, pads[:half], pads[half:], strict=True):
        side, gap = sides[place], abs(before[0] - behind[0])
        if len(follows(side)) != 1 or not (is_fixed(before) and is_fixed(behind)) or gap == 0:
            continue
        whole = state.image[follows(side)]
        # Divided by a higher power of 2 than before.
        filled = math.gcd(side[0] + gap, 1 << 30) > math.gcd(side[0], 1 << 30)
        if (gap > 1 and filled) or (gap == 1 and (side[0] % 2 or whole[0] % side[0])):
            raise ConflictError(
                node,
                f"it pads {side[0]} by {before[0]} and {behind[0]}: up to a multiple, most likely, and by another "
                "number at other sizes; trace it at a size that needs none",
            )
        if gap == 1:
            readers = consumers(network.model, node.output[0]) if node.op_type == "Pad" else [node]
            steps = [max(attributes(reader).get("strides", [1])) for reader in readers]
            multiple = math.lcm(multiple, whole[0] // side[0] * max(2, *steps))
        else:
            doubts.append(f"{before[0]} before and {behind[0]} behind")
    return f"{' and '.join(doubts)} are added at every size" if doubts else "", multiple


def _top(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    count = integers(node, state, "k", 1)
    size = times(state.shape(node.input[0])[attributes(node).get("axis", -1)])
    if not follows(size) or count is None or not is_fixed(count[0]):
        return None
    shapes, _ = carried(network, node, state)
    return [Reading(shapes, doubt=f"the first {count[0][0]} of {describe(size, state.image)} are taken at every size")]


def _transposed(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    """ConvTranspose that names its output's size: how much it pads is what that stands for."""
    given = attributes(node)
    if "output_shape" not in given:
        return None
    shape = state.shape(node.input[0])
    weight = [size[0] for size in sizes(state.shape(node.input[1]))]
    wanted = list(given["output_shape"])[-(len(shape) - 2) :]
    count = len(wanted)
    strides, dilations = given.get("strides", [1] * count), given.get("dilations", [1] * count)
    extra = given.get("output_padding", [0] * count)
    begins, ends, after = [], [], []
    for place in range(count):
        side = times(shape[2 + place])
        free = tuple(
            strides[place] * (number - 1) + extra[place] + (weight[2 + place] - 1) * dilations[place] + 1
            for number in side
        )
        total = free[0] - wanted[place]
        if total < 0:
            return None
        first = total // 2 if given.get("auto_pad") == "SAME_UPPER" else total - total // 2
        begins.append(first)
        ends.append(total - first)
        after.append(axis(tuple(number - total for number in free)))

    def write(writer: Writer) -> list[NodeProto]:
        made = writer.replaced(node, {}, drop=("output_shape", "pads", "auto_pad"))
        made.attribute.append(helper.make_attribute("pads", [*begins, *ends]))
        return [made]

    channels = fixed(weight[1] * given.get("group", 1))
    text = f"padding {[*begins, *ends]} instead of a size of {wanted}"
    return [Reading({node.output[0]: (shape[0], axis(channels), *after)}, 0, write, text)]


def _scalar(network: Network, node: NodeProto, state: State) -> list[Reading] | None:
    """A sum over the map divided by the number of its places: a number that no shape betrays."""
    number = next((network.constants[name] for name in node.input if name in network.constants), None)
    if number is None or number.size != 1 or number.dtype.kind != "f" or node.input[0] in network.constants:
        return None
    value = float(number.flat[0])
    count = value if node.op_type == "Div" else 1 / value if value else 0
    made = network.producers.get(node.input[0])
    if made is None or count < 2 or abs(count - round(count)) > 1e-3:
        return None
    summed, last = _summed(made, state)
    where = "places it sums over" if summed else "places of its last axis"
    size = summed or last
    if size is None or is_fixed(size) or size[0] != round(count):
        return None
    if not summed:
        raise ConflictError(
            node, f"it divides by {round(count)}, which is the number of {where} at the traced size, and may be another"
        )

    shapes = {node.output[0]: broadcast(node, [state.shape(name) for name in node.input])}

    def write(writer: Writer) -> list[NodeProto]:
        total = writer.node("Cast", [writer.size(size, node)], to=network.kind(node.input[0]))
        return [helper.make_node("Div", [node.input[0], total], node.output, name=node.name)]

    return [Reading(shapes, 0, write, f"by the number of {where} instead of {round(count)}")]


def _summed(made: NodeProto, state: State) -> tuple[Size | None, Size | None]:
    """(the places that a node sums over; of a product, its last axis)."""
    if made.op_type == "ReduceSum":
        shape = state.shape(made.input[0])
        axes = axes_of(made, state, 1, len(shape))
        return times(times(shape[place]) for place in axes or range(len(shape))), None
    if made.op_type == "MatMul":
        size = times(state.shape(made.input[0])[-1])
        return (None, times(state.shape(made.output[0])[-1])) if is_fixed(size) else (size, None)
    return None, None


_NUMBERS = {
    "Reshape": _reshape,
    "Resize": _resize,
    "MaxUnpool": _resize,
    "Expand": _expand,
    "Tile": _tile,
    "Slice": _slice,
    "Split": _split_node,
    "AveragePool": _pool,
    "MaxPool": _pool,
    "TopK": _top,
    "ConvTranspose": _transposed,
    "Div": _scalar,
    "Mul": _scalar,
}


def _grown(network: Network, node: NodeProto, state: State) -> Reading | None:
    """Where a constant of the traced map's size meets the map: the constant at every size, if its law is seen."""
    joins = node.op_type in BROADCASTING
    if not joins and node.op_type != "Concat":
        return None
    held = [place for place, name in enumerate(node.input) if name in network.constants]
    others = [state.shape(name) for name in node.input if name not in network.constants]
    if not held or not others:
        return None
    rank = max(len(state.shape(name)) for name in node.input)
    along = attributes(node)["axis"] % rank if not joins else None
    changes = {}
    for index in held:
        array = network.constants[node.input[index]]
        if not joins and array.ndim != rank:
            return None
        needed: dict[int, Size] = {}
        for place in range(array.ndim):
            whole = place + rank - array.ndim
            if whole == along:
                continue
            sides = {times(shape[whole - rank]) for shape in others if len(shape) >= rank - whole} - {fixed(1)}
            side = sides.pop() if len(sides) == 1 else None
            if side is None or is_fixed(side) or array.shape[place] != side[0]:
                continue
            if array.shape[place] > 1 or not joins:
                needed[place] = side
        if needed:
            changes[index] = (array, needed)
    if not changes:
        return None
    made = {index: law_of(node, *change) for index, change in changes.items()}
    shapes = [list(state.shape(name)) for name in node.input]
    for index, (_, needed) in changes.items():
        for place, size in needed.items():
            shapes[index][place] = axis(size) if not joins or made[index].ramps.get(place) else ()
    if joins:
        after = broadcast(node, shapes)
    else:
        after = list(others[0])
        after[along] = axis(tuple(map(sum, zip(*(times(shape[along]) for shape in shapes), strict=True))))

    def write(writer: Writer) -> list[NodeProto]:
        inputs = {}
        for index, (array, needed) in changes.items():
            name = made[index].written(writer, node, needed)
            if not joins:
                target = [writer.size(needed[place], node) if place in needed else 1 for place in range(array.ndim)]
                name = writer.node("Expand", [name, writer.concat(target, node)])
            inputs[index] = name
        return [writer.replaced(node, inputs)]

    text = "; ".join(
        f"its constant of {list(array.shape)}: {made[index].said}" for index, (array, _) in changes.items()
    )
    return Reading({node.output[0]: tuple(after)}, 0, write, text, grid=any(law.ramps for law in made.values()))

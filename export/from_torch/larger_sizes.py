"""What a module does at other sizes than it is compared at: another path, or other numbers, and it is compared there.

A module is followed (`followed.py`) at some sizes. At a larger one, and at those that its code asks about, operators
and weights are to be the same, and each number what it was or what its growth by H, W and H·W makes of it.
Where something else is seen, as of `if h > 512`, the exported graph is run beside the module at that size.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, run_quietly
from fcn_deploy.export.from_torch.followed import Known, Law, Size, Trace, ValuesReadError, tracer
from fcn_deploy.export.from_torch.network import Network
from fcn_deploy.export.from_torch.numbers_in_code import code_of, numbers_in_code, scripted
from fcn_deploy.export.from_torch.sizes_asked import (
    LARGEST_SIDE,
    constant,
    numbers_noted,
    where_it_turns,
    where_rests_are,
)
from fcn_deploy.export.from_torch.verify import VERIFIED_SIZES, ExpectedScores
from fcn_deploy.export.tolerances import EXPORTED_MODEL
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError, one_line

UNIT = 32  # pixels, or the network's multiple, that sizes are counted in: maps of most strides are whole
USUAL = ((2, 3), (3, 2), (2, 5), (4, 3), (5, 4), (3, 7))  # units
ASPECTS = ((2, 2), (6, 8), (9, 16), (10, 16), (8, 10), (2, 4), (9, 21))  # units: usual ones, where shares are asked for
LARGER = 4224  # pixels of a side, with the other short or equal: beyond the numbers that code asks for
LARGER_UNFOLLOWED = 1056  # the same of a module that cannot be followed, and is computed there
SHORT = 2  # units
# Units of sides that most patches and windows divide, which may be what code tells by an error: of 3, 5 and 7.
DIVISIBLE = ((105, SHORT), (SHORT, 105), (15, 15), (21, 21))
MOST_FOLLOWED, MOST_KINDS = 300, 8  # sizes that are looked at because code asks about them, and that are compared
SAID = 60  # characters of why a module cannot be followed
MOST_PIXELS = 1_500_000  # of an image that is run to be compared
MOST_BYTES = 400e6  # of its largest tensor, of which several are held at once
# Sides that images have, and those beside powers of two, for what cannot be known of a module's questions.
SIDES = (
    299, 360, 480, 500, 513, 600, 640, 720, 769, 800, 960, 1000, 1080, 1200, 1280, 1920, 2000, 2160, 3000, 4000,
    *(side + beside for side in (128, 256, 512, 1024, 2048, 4096) for beside in (-1, 1)),
)  # fmt: skip
GRID = 8  # units, between sizes that are looked at where a module's questions are not noted
SECANTS = 12  # steps to where a comparison turns
STRIDES = (1, 4, 8, 16, 32)  # of maps, whose sides code may ask about
TIMES_LONGER = 50  # a module that calls so many times the operators loops over places; that is seen elsewhere
TINTS = 8  # colours of images, for the same
STRENGTHS = (0.03, 0.3, 30.0, 1000.0)  # of noise, for what looks at the values of the image


def compare_at_larger_sizes(
    network: Network, graph: onnx.ModelProto, expected: ExpectedScores, sizes: AcceptedSizes
) -> list[str]:
    """Run a graph beside its module at larger sizes where that does otherwise than at those that were compared.

    Args:
        network: the module, on the CPU.
        graph: that takes every size, as it was compared.
        expected: of the module, at every size.
        sizes: that the graph runs the module at.

    Returns:
        What could not be compared, a line each.

    Raises:
        DeployError: they differ: names the size.
    """
    if network.ours or sizes.only is not None:
        return []
    why_not = ""
    for noting in (numbers_noted(network.module), numbers_noted(network.module, types=False), nullcontext()):
        with noting:
            try:
                followed = _Followed(network, sizes)
            except ValuesReadError:
                return [_compare_other_values(network, graph, expected)]
            except Exception as error:  # such as PyTorch's of `dtype=float`, which takes no other `float` for it
                why_not = one_line(error, SAID)
            else:
                return _compared(network, graph, expected, followed)
    return [_compare_unfollowed(network, graph, expected, sizes, why_not)]


def _compared(network: Network, graph: onnx.ModelProto, expected: ExpectedScores, followed: "_Followed") -> list[str]:
    """As compare_at_larger_sizes, of a module from elsewhere that takes several sizes."""
    for first, size in followed.larger():
        if not followed.can_be_run(first):
            return [f"{network.name} does otherwise from {_text(first)} on; it was not compared there"]
        run = session(graph.SerializeToString())
        for each in dict.fromkeys(other for other in (first, size) if followed.can_be_run(other)):
            _compare_at(each, network, run, expected, "smaller sizes")
    apart = followed.where_asked()
    beyond = _larger(followed.unit) if apart else ()  # a range may end in the module alone
    compared = [each for each in (*followed.unsure, *apart, *beyond) if followed.can_be_run(each)]
    run = session(graph.SerializeToString()) if compared else None
    for each in compared:
        _compare_at(each, network, run, expected, "other sizes")
    left = [
        f"{network.name} does otherwise at {_text(each)}; it was not compared there"
        for each in apart
        if not followed.can_be_run(each)
    ][:1]
    return [*left, *followed.not_noted()]


def _compare_at(size: Size, network: Network, run, expected: ExpectedScores, others: str) -> None:
    """Raise DeployError where a graph differs from its module at a size at which that does otherwise than at others."""
    apart = _apart(run, expected, network.image(*size).numpy())
    if not apart <= EXPORTED_MODEL:
        raise DeployError(
            f"{network.name} does otherwise at {_text(size)} than at {others}, as an `if` on them makes it, and its "
            f"ONNX does not ({apart:.1e} of the scores' range): leave that out, or let every image be resized to one "
            "smaller size, inexactly (--fit HxW)"
        )


def _compare_unfollowed(
    network: Network, graph: onnx.ModelProto, expected: ExpectedScores, sizes: AcceptedSizes, why: str
) -> str:
    """Of a module that cannot be followed: compare at some larger sizes; says that no others were looked at."""
    run, unit = session(graph.SerializeToString()), _unit(sizes)
    short, side = SHORT * unit, unit * -(-LARGER_UNFOLLOWED // unit)
    for size in ((short, side), (side, short), (side // 2, side // 2)):
        if math.prod(size) <= MOST_PIXELS:
            _compare_at(size, network, run, expected, "smaller sizes")
    return (
        f"{network.name} cannot be followed without computing it ({why}); it was compared up to {side} pixels a side, "
        "and not looked through for code that does otherwise at some sizes"
    )


class _Followed:
    """A module that is followed at any size, without computing it.

    Raises (at creation):
        ValuesReadError: it makes numbers of its image's values.
        Exception: whatever it does without values.
    """

    def __init__(self, network: Network, sizes: AcceptedSizes) -> None:
        self._network, self._trace, self._sizes = network, tracer(network), sizes
        self.unit = _unit(sizes)
        self._failed: dict[tuple[str, str], str] = {}
        sizes_followed = [(rows * self.unit, columns * self.unit) for rows, columns in USUAL]
        # Apart: while calls are noted, Python tells other places of what is compared in C, as `max` and `bisect` do.
        self._code = code_of(lambda: self._trace(sizes_followed[0], math.inf))
        self._usual = [self._trace(size, math.inf) for size in sizes_followed]
        self._scripted = bool(scripted(network.module, self._code))
        self._law = Law(self._usual)

    def _at(self, size: Size) -> Trace | None:
        """What the module does at a size; None: it refuses that by itself, or cannot be followed there."""
        try:
            return self._trace(size, TIMES_LONGER * self._law.longest)
        except Exception as error:  # of whatever it is
            kind = type(error).__name__, re.sub(r"\d+", "", str(error))
            if kind not in self._failed and math.prod(size) <= MOST_PIXELS and self._expected_bytes(size) <= MOST_BYTES:
                self._failed[kind] = ""
                with suppress(Exception):
                    self._network.scores(*size)
                    self._failed[kind] = f"{_text(size)}, where it runs ({one_line(error, SAID)})"
            return None

    def _expected_bytes(self, size: Size) -> float:
        """Of the largest tensor at a size that was not followed, which may grow as pixels squared."""
        small, large = min(self._usual, key=_pixels), max(self._usual, key=_pixels)
        grows = math.log(large.largest / small.largest) / math.log(_pixels(large) / _pixels(small))
        return large.largest * (math.prod(size) / _pixels(large)) ** max(grows, 1)

    def _differs(self, size: Size) -> bool:
        trace = self._at(size)
        return trace is not None and not self._law.holds(trace)

    def can_be_run(self, size: Size) -> bool:
        """Whether an image of this size may be computed."""
        return math.prod(size) <= MOST_PIXELS and self._trace(size, math.inf).largest <= MOST_BYTES

    def larger(self) -> Iterator[tuple[Size, Size]]:
        """Larger sizes at which the module does otherwise: the least on the way to each, and that."""
        for size in _larger(self.unit):
            if self._differs(size):
                yield _first_on_the_way(size, self.unit, self._differs), size

    def where_asked(self) -> list[Size]:
        """Sizes at which the module does otherwise because of what its code asks about sizes, one of each kind."""
        first = self._usual[0]
        waiting, asked = [first], constant([trace.asked for trace in self._usual])
        found: dict[tuple[Any, ...], Size] = {}
        seen = {trace.size: trace for trace in self._usual}
        new = {place: numbers for place, numbers in first.asked.items() if place not in asked}
        of_all, rests = self._rests()
        looked_for = new or rests or first.asked.chose or self._lost
        known = Known([*self._usual, *filter(None, map(self._at, self._verified()))] if looked_for else self._usual)

        def look(size: Size) -> Trace | None:
            if size in seen:
                return seen[size]
            if min(size) < self._sizes.smallest or len(seen) >= MOST_FOLLOWED or (other := self._at(size)) is None:
                return None
            seen[size] = other
            waiting.append(other)
            whole = not any(side % self.unit for side in size)
            if not known.holds(other) or (whole and not self._law.holds(other)):
                found.setdefault((other.operators, *known.constants(other)), size)
            return other

        for size in where_rests_are(first.size, rests.values(), self._sizes.multiple):
            look(size)
        questions, waiting_for = dict(new), [(first, new)]
        while waiting_for or waiting:
            if waiting_for:
                trace, places = waiting_for.pop(0)
                for size in where_it_turns(trace.size, places.values(), self._sizes.multiple, self.unit):
                    look(size)
                continue
            trace = waiting.pop(0)
            places = {place: numbers for place, numbers in trace.asked.items() if place not in asked | questions.keys()}
            questions |= places
            waiting_for += [(trace, places)] if places else []
            more = {place: rest for place, rest in trace.asked.rests.items() if place not in of_all | rests.keys()}
            rests |= more
            for size in where_rests_are(trace.size, more.values(), self._sizes.multiple):
                look(size)
        for place in new:
            self._bracket(place, seen, look)
            self._follow_secants(place, look)
        for size in self._usual_shapes(new):
            look(size)
        for size in self._near_numbers(bool(first.asked.chose)):
            look(size)
        return list(found.values())[:MOST_KINDS]

    def _rests(self) -> tuple[set[Any], dict[Any, Any]]:
        """(places where numbers are divided that are the same at all sizes, what was divided elsewhere)."""
        of_all = constant([{k: v[:2] for k, v in trace.asked.rests.items()} for trace in self._usual])
        return of_all, {k: v for k, v in self._usual[0].asked.rests.items() if k not in of_all}

    def _usual_shapes(self, asked: Mapping[Any, tuple[float, float]]) -> Iterator[Size]:
        """Sizes that patches divide; and of the shapes that images have, where code asks about shares of sides."""
        shares = any(number % 1 for numbers in asked.values() for number in numbers)
        for rows, columns in (*DIVISIBLE, *(shape[::turn] for shape in ASPECTS if shares for turn in (1, -1))):
            yield rows * self.unit, columns * self.unit

    def _bracket(self, place: Any, seen: Mapping[Size, Trace], look: Callable[[Size], Trace | None]) -> None:
        """Look where a comparison turns that goes by no plain share of a side, as one of a root, by halving the way."""
        start = self._usual[0]

        def side_of(trace: Trace | None) -> bool | None:
            if trace is None or place not in trace.asked:
                return None
            value, other = trace.asked[place]
            return value >= other

        if any(side_of(trace) not in (None, side_of(start)) for trace in seen.values()):
            return
        for end in _larger(self.unit):
            if side_of(self._at(end)) in (None, side_of(start)):
                continue
            low, high = start.size, end
            step = self._sizes.multiple
            while max(b - a for a, b in zip(low, high, strict=True)) > step:
                middle = tuple(
                    (a + b) // 2 // step * step if b - a > step else b for a, b in zip(low, high, strict=True)
                )
                turned = side_of(look((middle[0], middle[1]))) not in (None, side_of(start))
                low, high = (low, middle) if turned else (middle, high)  # type: ignore[assignment]
            look(high)

    def _follow_secants(self, place: Any, look: Callable[[Size], Trace | None]) -> None:
        """Look where a comparison turns, and turns back before the largest sizes, as `abs(h - 350) < 10` does."""
        first, multiple = self._usual[0], self._sizes.multiple
        for axis, second in ((0, self._usual[3]), (1, self._usual[2])):
            one, other = first, second
            for _ in range(SECANTS):
                if not all(place in trace.asked for trace in (one, other)):
                    break
                sides = one.size[axis], other.size[axis]
                ends = [value - compared for value, compared in (one.asked[place], other.asked[place])]
                if sides[0] == sides[1] or ends[0] == ends[1] or not all(map(math.isfinite, ends)):
                    break
                slope = (ends[1] - ends[0]) / (sides[1] - sides[0])
                turn, stride = sides[1] - ends[1] / slope, min(max(round(abs(1 / slope)), 1), STRIDES[-1])
                if not 0 < turn <= LARGEST_SIDE:
                    break
                ways = (0, -stride, stride, -STRIDES[1], STRIDES[1])
                near = dict.fromkeys(multiple * max(round((turn + way) / multiple), 1) for way in ways)
                traces = [look((side, first.size[1]) if axis == 0 else (first.size[0], side)) for side in near]
                if traces[0] is None:
                    break
                one, other = other, traces[0]

    def _near_numbers(self, chose: bool) -> Iterator[Size]:
        """Sizes near the numbers in a module's code, and on a grid, where its questions about sizes are not noted."""
        if not (self._lost or chose):
            return
        height, width = self._usual[0].size
        for side in SIDES if self._lost else ():
            yield from ((self._rounded(side), width), (height, self._rounded(side)))
        numbers = numbers_in_code(self._network.module, self._code)
        for number, stride in itertools.product(numbers[::-1], STRIDES if self._lost else STRIDES[:1]):
            for side in dict.fromkeys(self._rounded(number * stride + more) for more in (0, stride, -stride)):
                if side <= LARGEST_SIDE:
                    yield from ((side, width), (height, side))
        sides = [self._rounded(number) for number in numbers]
        yield from itertools.product(sides[-GRID:], sides[-GRID:])
        if self._lost:
            for side in range(GRID * self.unit, LARGER, GRID * self.unit):
                yield from ((side, width), (height, side), (side, side))

    def _rounded(self, side: int) -> int:
        multiple = self._sizes.multiple
        return max(-(-side // multiple) * multiple, self._sizes.smallest)

    @property
    def unsure(self) -> list[Size]:
        """The sizes that all others are held against, where what is done at them may depend on these themselves."""
        return [trace.size for trace in self._usual] if self._lost else []

    @property
    def _lost(self) -> dict[Any, str]:
        """What was made of sizes of which no comparison can be noted."""
        lost = {place: what for trace in self._usual[:1] for place, what in trace.asked.lost.items()}
        return lost | ({("scripted",): "a choice of scripted code"} if self._scripted else {})

    def not_noted(self) -> list[str]:
        """A line of what could not be, if anything."""
        for where in filter(None, self._failed.values()):
            return [f"{self._network.name} cannot be followed at {where}; it was not looked through there"]
        for place, what in self._lost.items():
            where = f" ({Path(place[0].co_filename).name}, {place[0].co_name})" if len(place) > 1 else ""
            return [
                f"{self._network.name} makes {what} of a size{where}, by which it may do otherwise at some; it was "
                "followed at sizes near the numbers in its code, and not at all others"
            ]
        return []

    def _verified(self) -> Iterator[Size]:
        """The sizes that a graph was compared at, as the module was run there."""
        multiple, smallest = self._sizes.multiple, self._sizes.smallest
        for size in VERIFIED_SIZES:
            height, width = (-(-max(side, smallest) // multiple) * multiple for side in size)
            yield height, width


def _compare_other_values(network: Network, graph: onnx.ModelProto, expected: ExpectedScores) -> str:
    """Compare other images, of a module that looks at their values; says that all others were not.

    Raises DeployError where they have other scores in ONNX.
    """
    run, noise = session(graph.SerializeToString()), network.image(SHORT * UNIT, SHORT * UNIT + 1).numpy()
    images = [np.float32(strength) * part for part in (noise, np.abs(noise)) for strength in STRENGTHS]
    tints = np.random.default_rng(0).uniform(-2, 2, (TINTS, 1, network.channels, 1, 1)).astype(np.float32)
    images += [tint + share * noise for tint in tints for share in (np.float32(0.05), np.float32(0.5))]
    for image in images:
        apart = _apart(run, expected, image)
        if not apart <= EXPORTED_MODEL:
            raise DeployError(
                f"{network.name} looks at the values of its image, as `if x.max() > 1` does, and its ONNX does what "
                f"that came to for one ({apart:.1e} of the scores' range apart for another): use torch.where, or "
                "leave it out and say --input-mean and --input-std"
            )
    return (
        f"{network.name} makes a number, or a choice, of its image's values; its ONNX does what that came to for "
        f"noise, and was compared for {len(images)} other images alone"
    )


def _apart(run, expected: ExpectedScores, image: np.ndarray) -> float:
    """As a share of the scores' range; 0 of an image that the module does not take, or that overflows in it."""
    try:
        scores = expected.of(image)
    except DeployError:
        return 0.0
    if not np.isfinite(scores).all():
        return 0.0
    try:
        ours = run_quietly(run, image)[0]
    except Exception:  # of maps whose sizes do not go together
        return math.inf
    return float(np.abs(ours - scores).max() / max(np.ptp(scores), 1e-6)) if ours.shape == scores.shape else math.inf


def _pixels(trace: Trace) -> int:
    return math.prod(trace.size)


def _unit(sizes: AcceptedSizes) -> int:
    """Pixels that sides are counted in."""
    return sizes.multiple * -(-max(UNIT, sizes.smallest) // sizes.multiple)


def _larger(unit: int) -> tuple[Size, Size, Size]:
    """Larger sizes, those of few pixels first."""
    short, side = SHORT * unit, unit * -(-LARGER // unit)
    return (short, side), (side, short), (side, side)


def _first_on_the_way(size: Size, unit: int, differs: Callable[[Size], bool]) -> Size:
    """The least size, on the way to one at which a module does otherwise, at which it does."""

    def at(count: int) -> Size:
        return min(size[0], count * unit), min(size[1], count * unit)

    low, high = SHORT, max(size) // unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(at(middle)) else (middle, high)
    return at(high)


def _text(size: Size) -> str:
    return "×".join(map(str, size))

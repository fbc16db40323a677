"""Searches for what each node's numbers stand for, such that the whole network fits and its scores follow the image.

Depth first through the nodes, the likeliest interpretation first, and back to the last choice that a conflict depends
on. Where another interpretation, as likely as the one that was chosen, holds as well, the network is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from fcn_deploy.export.dynamic_shapes.interpret import interpretations
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.sizes import (
    LETTERS,
    SampledSize,
    axis_of,
    axis_sizes,
    changes_with,
    describe,
    fixed,
    is_fixed,
    sample_sizes,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, TracedGraph, name_of_node
from fcn_deploy.export.graph.edit import dims
from fcn_deploy.runtime.errors import DeployError
from onnx import NodeProto

REMEDY = "export it again with dynamic axes for N, H and W, or from PyTorch with export-onnx"
CROPS = "it crops a map of every size to {} cells, which are enlarged to the image: a number of a traced size"
REMAINS = 2  # cells that a map may have beyond a whole share of what it is enlarged to
TRIES = 20  # times a graph may be followed in search of a solution, and as often again for each that is doubted


class RemainsError(DeployError):
    """A network may run at all sizes as it is, and a map in it holds a part of one."""


Taken = dict[int, Interpretation]  # place of a node → what it was taken for, where that is worth a word


@dataclass(frozen=True)
class Solution:
    """A network at every size: the shapes of its tensors, what its nodes were taken for, and the image's N, H, W."""

    state: State
    taken: Taken
    image: dict[str, SampledSize]


@dataclass
class _Choice:
    """A node that has several interpretations, the state before it, and which of them is tried."""

    index: int
    before: State
    options: list[Interpretation]
    tried: int = 0

    @property
    def chosen(self) -> Interpretation:
        return self.options[self.tried]


class _Found(NamedTuple):
    """The state at the end, what the nodes were taken for, and the choices that were made on the way."""

    state: State
    taken: Taken
    choices: list[_Choice]


class Solver:
    """The search in one network, for a size that it was traced with.

    Args (at creation):
        graph: to solve.
        places: the axes of H and W in its image.
        traced: (N, H, W) that it was traced with.
        free: the letters of N, H, W that are to be free. Where no number of the network is for a size (its `traced`),
            H and W change all the same, but numbers are taken for the batch alone.
    """

    def __init__(
        self, graph: TracedGraph, places: tuple[int, int], traced: tuple[int, int, int], free: str = LETTERS
    ) -> None:
        self.graph = graph
        self.freeing = bool(free)
        self.image = {
            letter: size if letter in free else fixed(size[0])
            for letter, size in zip(LETTERS, sample_sizes(*traced), strict=True)
        }
        image = graph.model.graph.input[0]
        channels = dims(image)[6 - sum(places)]
        shape = [self.image["N"], *[fixed(channels if isinstance(channels, int) else 3)] * 3]
        shape[places[0]], shape[places[1]] = self.image["H"], self.image["W"]
        self.start = State(graph, self.image, {image.name: tuple(map(axis_of, shape))})
        self.steps = 0
        self.farthest: tuple[int, ConflictError] | None = None

    def solve(self) -> Solution:
        """Raises DeployError: nothing fits, or more than one does; names the node."""
        found = self._search(self.start.copy(), 0, {})
        if found is None:
            assert self.farthest is not None
            _, conflict = self.farthest
            raise refusal(conflict.node, conflict.reason)
        self._refuse_ambiguity(found)
        return Solution(found.state, found.taken, self.image)

    def _search(self, state: State, index: int, taken: Taken) -> _Found | None:
        """The first way to the end that fits, from the node at `index` on; None: there is none."""
        choices: list[_Choice] = []
        nodes = self.graph.nodes
        limit = self.steps + TRIES * len(nodes)
        while True:
            try:
                if index == len(nodes):
                    self._check_end(state)
                    return _Found(state, taken, choices)
                self.steps += 1
                if self.steps > limit:
                    raise refusal(nodes[index], "what the numbers before it stand for is not found in reasonable time")
                options = self._options(nodes[index], state)
                if len(options) > 1:
                    choices.append(_Choice(index, state.copy(), options))
                _take(state, taken, index, options[0])
                index += 1
            except ConflictError as conflict:
                if self.farthest is None or index >= self.farthest[0]:
                    self.farthest = index, conflict
                choice = self._last_that_may_help(choices, index)
                if choice is None:
                    return None
                choice.tried += 1
                state, index = choice.before.copy(), choice.index
                taken = {place: each for place, each in taken.items() if place < index}
                _take(state, taken, index, choice.chosen)
                index += 1

    def _last_that_may_help(self, choices: list[_Choice], index: int) -> _Choice | None:
        """Drop choices that are exhausted, or that the node at `index` does not depend on; the last that is left."""
        while choices:
            choice = choices[-1]
            exhausted = choice.tried + 1 >= len(choice.options)
            at_end = index == len(self.graph.nodes)
            if not exhausted and (at_end or choice.index in self.graph.ancestors[index] | {index}):
                return choice
            choices.pop()
        return None

    def _options(self, node: NodeProto, state: State) -> list[Interpretation]:
        try:
            return interpretations(node, state, self.freeing)
        except (ArithmeticError, LookupError, ValueError) as error:
            raise ConflictError(node, f"it is not as its operator is defined ({error})") from error

    def _refuse_ambiguity(self, found: _Found) -> None:
        """Raise DeployError where another interpretation, as likely as the one that was chosen, holds as well."""
        for choice in found.choices:
            for other in choice.options[choice.tried + 1 :]:
                if other.cost > choice.chosen.cost:
                    continue
                state = choice.before.copy()
                before = {place: each for place, each in found.taken.items() if place < choice.index}
                _take(state, before, choice.index, other)
                if self._search(state, choice.index + 1, before) is not None:
                    node = self.graph.nodes[choice.index]
                    raise refusal(
                        node,
                        f"what its numbers stand for cannot be told: {choice.chosen.description or 'as they are'}, or "
                        f"{other.description or 'as they are'}",
                        f"both fit: say --assume {name_of_node(node)}=fixed or =global, or export it again, axes free",
                    )

    def _check_end(self, state: State) -> None:
        """Raise ConflictError where the scores do not follow the image."""
        output = self.graph.model.graph.output[0]
        node = self.graph.nodes[self.graph.place[output.name]]
        scores = axis_sizes(state.shape(output.name))
        batch, *image = self.image.values()
        if not any(
            all(changes_with(side) == changes_with(whole) for side, whole in zip(pair, image, strict=True))
            and _is_whole_fraction(image, pair)
            for pair in pairwise(scores)
        ):
            text = ", ".join(describe(size, self.image) for size in scores)
            raise ConflictError(node, f"the scores have the size [{text}], which does not follow the image")
        if self.graph.traced:
            self._check_drift(state)
        if changes_with(batch) and batch not in scores:
            raise ConflictError(node, "the batch is lost on the way to the scores")

    def refuse_remains(self) -> State | None:
        """Raise DeployError where a network whose numbers all stand enlarges a map that holds a part of some size.

        Such a map grows with the image, and has some cells more at every size. What cannot be followed is no proof.
        Gives the state at the end; None: it cannot be followed.
        """
        try:
            found = self._search(self.start.copy(), 0, {})
        except DeployError:
            return None
        for node in self.graph.nodes if found is not None else ():
            assert found is not None
            if node.op_type != "Resize" or not found.state.is_data(node.output[0]):
                continue
            before, after = (axis_sizes(found.state.shape(name)) for name in (node.input[0], node.output[0]))
            for old, new in zip(before, after, strict=True):
                if (crop := self._crop_to_number(found.state, node, old, new)) is not None:
                    raise RemainsError(str(refusal(crop, CROPS.format(old[0]))))
                if len(changes_with(new)) != 1 or changes_with(old) != changes_with(new):
                    continue
                factor = Fraction(max(new) - min(new), max(old) - min(old))
                too_many = factor * old[0] - new[0]
                whole = 1 in (factor.numerator, factor.denominator)
                if (too_many if whole else abs(too_many)) > REMAINS * factor:  # too few are lost by unpadded windows
                    text = f"{describe(old, self.image)} cells to {describe(new, self.image)}"
                    error = refusal(node, f"it brings {text}, no share of it: a number before it is of a traced size")
                    raise RemainsError(str(error))
        return None if found is None else found.state

    def _crop_to_number(self, state: State, node: NodeProto, old: SampledSize, new: SampledSize) -> NodeProto | None:
        """Of a Resize of `old` cells to `new`: the Slice or Pad before it that brings maps of all sizes to one."""
        if not is_fixed(old) or old[0] == 1 or is_fixed(new):
            return None
        for index in sorted(self.graph.ancestors[self.graph.place[node.output[0]]]):
            other = self.graph.nodes[index]
            if other.op_type not in ("Slice", "Pad") or not state.is_data(other.output[0]):
                continue
            sides = zip(*(axis_sizes(state.shape(name)) for name in (other.input[0], other.output[0])), strict=True)
            if any(not is_fixed(before) and is_fixed(after) and after[0] > 1 for before, after in sides):
                return other
        return None

    def _check_drift(self, state: State) -> None:
        """Raise ConflictError where a map is enlarged by another factor at other sizes, and by a whole one when traced.

        Something before it holds a part of the traced size.
        """
        for node in self.graph.nodes:
            if node.op_type != "Resize" or not state.is_data(node.output[0]):
                continue
            before, after = (axis_sizes(state.shape(name)) for name in (node.input[0], node.output[0]))
            for old, new in zip(before, after, strict=True):
                if (crop := self._crop_to_number(state, node, old, new)) is not None:
                    raise ConflictError(crop, CROPS.format(old[0]))
                drifts = len({Fraction(b, a) for a, b in zip(old, new, strict=True)}) > 1
                follows = len(changes_with(new)) == 1 and changes_with(old) == changes_with(new)
                if drifts and follows and new[0] % old[0] == 0 and new[0] > old[0] > 1:
                    raise ConflictError(
                        node,
                        f"it enlarges a map of {describe(old, self.image)} to {describe(new, self.image)}, by a factor "
                        "that is whole when traced alone: a number before it is of the traced size",
                    )


def _take(state: State, taken: Taken, index: int, chosen: Interpretation) -> None:
    state.shapes |= chosen.shapes
    state.values |= chosen.values
    if chosen.rewrite is not None or chosen.assumption or chosen.multiple > 1:
        taken[index] = chosen


def _is_whole_fraction(image: Sequence[SampledSize], scores: Sequence[SampledSize]) -> bool:
    """Whether a map (H, W) is the image's size divided by one whole number, up to rounding."""
    pairs = [
        (whole, part)
        for whole_side, side in zip(image, scores, strict=True)
        for whole, part in zip(whole_side, side, strict=True)
    ]
    factors = {round(whole / part) for whole, part in pairs if part > 2 or whole == part}
    if len(factors) != 1 or 0 in factors:
        return False
    factor = factors.pop()
    return all(abs(whole - part * factor) < factor for whole, part in pairs)


def refusal(node: NodeProto, reason: str, remedy: str = REMEDY) -> DeployError:
    # A crop by a number runs at every size, whatever the names of the sizes promise.
    kind = RemainsError if node.op_type in ("Slice", "Pad") else DeployError
    return kind(f"the size cannot be freed: node {name_of_node(node)} ({node.op_type}): {shortened(reason)}; {remedy}")


def shortened(reason: str, length: int = 160) -> str:
    """A reason of so many characters at most, cut at its end."""
    return reason if len(reason) <= length else f"{reason[: length - 1]}…"


def name_of(size: SampledSize, image: Mapping[str, SampledSize], place: int) -> str:
    """The name of a dimension: N, H or W where it is the image's, else one by its place."""
    return next((letter for letter, whole in image.items() if whole == size), f"d{place}")

"""Arithmetic on shapes, written as nodes: what takes the place of a number that was a size."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
from fcn_deploy.export.dynamic_shapes.sizes import (
    Axis,
    SampledSize,
    axis_sizes,
    changes_with,
    describe,
    is_fixed,
    multiplied,
    scaled,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, TracedGraph
from fcn_deploy.export.graph.edit import Names
from onnx import NodeProto, helper

OPTIONAL_INPUTS = 13  # the opset from which on an input is left out by an empty name, before by an empty list
REDUCTION_AXES = 18  # the opset from which on a reduction's axes are an input

Source = tuple[str, int, SampledSize]  # a tensor, an axis, its size


class ShapeWriter:
    """Makes nodes for whole numbers that follow the image. Lists of them are int64, as shapes are.

    Attributes:
        before: what the node that is being written needs before it.
        constants: what all of them need.
    """

    def __init__(self, graph: TracedGraph, state: State) -> None:
        self.graph, self.state = graph, state
        self.names = Names(graph.model)
        self.before: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._made: dict[tuple, str] = {}

    def constant(self, what: str, array: np.ndarray) -> str:
        key = (what, array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self.names(f"free_sizes/{what}_{len(self.constants)}")
            self.constants[self._made[key]] = array
        return self._made[key]

    def node(self, kind: str, inputs: Sequence[str], **settings: Any) -> str:
        """A node's result; the same for the same inputs."""
        key = (kind, tuple(inputs), tuple(sorted((name, str(value)) for name, value in settings.items())))
        if key not in self._made:
            name = self.names(f"free_sizes/{kind}_{len(self._made)}")
            self.before.append(helper.make_node(kind, list(inputs), [name], name=name, **settings))
            self._made[key] = name
        return self._made[key]

    def element(self, name: str, place: int) -> str:
        """One number of a list, as a list of one."""
        return self.node("Gather", [name, self.constant("place", np.array([place], np.int64))], axis=0)

    def concat(self, parts: Sequence[int | str]) -> str:
        """A list of whole numbers, some of them computed."""
        numbers = [part for part in parts if isinstance(part, int)]
        if len(numbers) == len(parts):
            return self.constant("numbers", np.array(numbers, np.int64))
        names = [part if isinstance(part, str) else self._number(part) for part in parts]
        return names[0] if len(names) == 1 else self.node("Concat", names, axis=0)

    def _number(self, number: int) -> str:
        """A list of one number."""
        return self.constant("number", np.array([number], np.int64))

    def nothing(self) -> str:
        """An input that is left out."""
        return "" if self.graph.opset >= OPTIONAL_INPUTS else self.constant("nothing", np.zeros(0, np.float32))

    def axis(self, factors: Axis, node: NodeProto) -> str:
        """The product of factors; raises ConflictError."""
        try:
            return self.size(multiplied(factors), node)
        except ConflictError:
            if len(factors) < 2:
                raise
        parts = [self._number(size[0]) if is_fixed(size) else self.size(size, node) for size in factors]
        total = parts[0]
        for part in parts[1:]:
            total = self.node("Mul", [total, part])
        return total

    def size(self, size: SampledSize, node: NodeProto) -> str:
        """A size as a list of one number, read from a tensor that the node is made from; raises ConflictError."""
        sources = []
        # Most sizes stand near, and what is farther is not looked at then.
        for name, place, found in self._sources(node):
            if found == size:
                return self._side(name, place)
            sources.append((name, place, found))
        for way in (self._as_share, self._as_sum, self._as_product):
            written = way(size, sources, node)
            if written is not None:
                return written
        raise ConflictError(node, f"no tensor before it has the size {describe(size, self.state.image)}")

    def _as_share(self, size: SampledSize, sources: Sequence[Source], node: NodeProto) -> str | None:
        """A side of a tensor times one whole number, or divided by one, or both."""
        for name, place, found in sources:
            if changes_with(found) != changes_with(size):
                continue
            ratio = Fraction(size[0], found[0])
            if scaled(found, ratio.numerator, ratio.denominator) == size:
                side = self._side(name, place)
                if ratio.numerator > 1:
                    side = self.node("Mul", [side, self._number(ratio.numerator)])
                if ratio.denominator > 1:
                    side = self.node("Div", [side, self._number(ratio.denominator)])
                return side
        return None

    def _as_sum(self, size: SampledSize, sources: Sequence[Source], node: NodeProto) -> str | None:
        """A side of a tensor and a number, the smallest that does."""
        apart = []
        for name, place, found in sources:
            gaps = {a - b for a, b in zip(size, found, strict=True)}
            if len(gaps) == 1:
                apart.append((gaps.pop(), name, place))
        if not apart:
            return None
        gap, name, place = min(apart, key=lambda each: abs(each[0]))
        return self.node("Add", [self._side(name, place), self._number(gap)])

    def _as_product(self, size: SampledSize, sources: Sequence[Source], node: NodeProto) -> str | None:
        """Two sides of tensors, each of which changes with one letter."""
        if len(changes_with(size)) < 2:
            return None
        sides = dict.fromkeys(found for _, _, found in sources if len(changes_with(found)) == 1)
        for first, second in product(sides, repeat=2):
            if first != second and multiplied([first, second]) == size:
                return self.node("Mul", [self.size(first, node), self.size(second, node)])
        return None

    def _side(self, name: str, place: int) -> str:
        return self.element(self.node("Shape", [name]), place)

    def _sources(self, node: NodeProto) -> Iterator[Source]:
        """Sides of what a node is made from, the nearest first, then of all before it."""
        for name in self._before(node):
            if self.state.is_data(name):
                for place, size in enumerate(axis_sizes(self.state.shape(name))):
                    if not is_fixed(size):
                        yield name, place, size

    def _before(self, node: NodeProto) -> Iterator[str]:
        """The names of what a node is made from, the nearest first, then of all before it."""
        seen: dict[str, None] = dict.fromkeys(name for name in node.input if name)
        queue = list(seen)
        for name in queue:
            yield name
            made = self.graph.producers.get(name)
            for other in made.input if made is not None else ():
                if other and other not in seen:
                    seen[other] = None
                    queue.append(other)
        here = self.graph.place[node.output[0]]
        yield from reversed([name for name, index in self.graph.place.items() if index < here and name not in seen])
        yield from (value.name for value in self.graph.model.graph.input)

    def replaced(
        self, node: NodeProto, inputs: dict[int, str], drop: Iterable[str] = (), count: int | None = None
    ) -> NodeProto:
        """A copy of a node with other inputs, `count` of them at most, and without some attributes."""
        made = NodeProto()
        made.CopyFrom(node)
        names = list(node.input)
        for place, name in inputs.items():
            names += [""] * (place + 1 - len(names))
            names[place] = name
        del made.input[:]
        made.input.extend(names[:count])
        del made.attribute[:]
        made.attribute.extend(item for item in node.attribute if item.name not in drop)
        return made

    def reduce(self, kind: str, node: NodeProto, axes: Sequence[int]) -> NodeProto:
        """A reduction that keeps its axes, as the opset writes it."""
        if self.graph.opset >= REDUCTION_AXES:
            inputs = [node.input[0], self.constant("axes", np.array(axes, np.int64))]
            return helper.make_node(kind, inputs, node.output, name=node.name, keepdims=1)
        return helper.make_node(kind, node.input[:1], node.output, name=node.name, keepdims=1, axes=list(axes))

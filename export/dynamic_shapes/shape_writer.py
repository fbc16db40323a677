"""Arithmetic on shapes, written as nodes: what takes the place of a number that was a size."""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import product

import numpy as np
from fcn_deploy.export.dynamic_shapes.shapes import (
    Axis,
    ConflictError,
    Network,
    Size,
    State,
    describe,
    follows,
    is_fixed,
    scaled,
    sizes,
    times,
)
from fcn_deploy.export.graph.edit import Names
from onnx import NodeProto, helper


class Writer:
    """Makes nodes for whole numbers that follow the image. Lists of them are int64, as shapes are.

    Attributes:
        before: what the node that is being written needs before it.
        constants: what all of them need.
    """

    def __init__(self, network: Network, state: State) -> None:
        self.network, self.state = network, state
        self.names = Names(network.model)
        self.before: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self._made: dict = {}

    def constant(self, what: str, array: np.ndarray) -> str:
        key = (what, array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self.names(f"free_sizes/{what}_{len(self.constants)}")
            self.constants[self._made[key]] = array
        return self._made[key]

    def node(self, kind: str, inputs: Sequence[str], **given) -> str:
        """A node's result; the same for the same inputs."""
        key = (kind, tuple(inputs), tuple(sorted((name, str(value)) for name, value in given.items())))
        if key not in self._made:
            name = self.names(f"free_sizes/{kind}_{len(self._made)}")
            self.before.append(helper.make_node(kind, list(inputs), [name], name=name, **given))
            self._made[key] = name
        return self._made[key]

    def element(self, name: str, place: int) -> str:
        """One number of a list, as a list of one."""
        return self.node("Gather", [name, self.constant("place", np.array([place], np.int64))], axis=0)

    def concat(self, parts: Sequence[int | str], node: NodeProto) -> str:
        """A list of whole numbers, some of them computed."""
        if all(isinstance(part, int) for part in parts):
            return self.constant("numbers", np.array(parts, np.int64))
        names = []
        for part in parts:
            names.append(part if isinstance(part, str) else self.constant("number", np.array([part], np.int64)))
        return names[0] if len(names) == 1 else self.node("Concat", names, axis=0)

    def nothing(self, node: NodeProto) -> str:
        """An input left out, which opsets before 13 want as an empty list."""
        return "" if self.network.opset >= 13 else self.constant("nothing", np.zeros(0, np.float32))

    def axis(self, factors: Axis, node: NodeProto) -> str:
        """The product of factors."""
        try:
            return self.size(times(factors), node)
        except ConflictError:
            if len(factors) < 2:
                raise
        parts = [
            self.constant("number", np.array([f[0]], np.int64)) if is_fixed(f) else self.size(f, node) for f in factors
        ]
        total = parts[0]
        for part in parts[1:]:
            total = self.node("Mul", [total, part])
        return total

    def size(self, size: Size, node: NodeProto) -> str:
        """A size as a list of one number, read from a tensor that the node is made from; raises ConflictError."""
        sources = []
        # Most sizes stand near, and what is farther is not looked at then.
        for name, place, found in self._sources(node):
            if found == size:
                return self._side(name, place)
            sources.append((name, place, found))
        for name, place, found in sources:
            if follows(found) != follows(size):
                continue
            ratio = Fraction(size[0], found[0])
            if scaled(found, ratio.numerator, ratio.denominator) == size:
                side = self._side(name, place)
                if ratio.numerator > 1:
                    side = self.node("Mul", [side, self.constant("number", np.array([ratio.numerator], np.int64))])
                if ratio.denominator > 1:
                    side = self.node("Div", [side, self.constant("number", np.array([ratio.denominator], np.int64))])
                return side
        apart = []
        for name, place, found in sources:
            gap = {a - b for a, b in zip(size, found, strict=True)}
            if len(gap) == 1:
                apart.append((gap.pop(), name, place))
        if apart:
            gap, name, place = min(apart, key=lambda found: abs(found[0]))
            return self.node("Add", [self._side(name, place), self.constant("number", np.array([gap], np.int64))])
        letters = follows(size)
        if len(letters) > 1:
            parts = [found for _, _, found in sources if len(follows(found)) == 1]
            for first, second in product(dict.fromkeys(parts), repeat=2):
                if first != second and times([first, second]) == size:
                    return self.node("Mul", [self.size(first, node), self.size(second, node)])
        raise ConflictError(node, f"no tensor before it has the size {describe(size, self.state.image)}")

    def _side(self, name: str, place: int) -> str:
        return self.element(self.node("Shape", [name]), place)

    def _sources(self, node: NodeProto) -> Iterator[tuple[str, int, Size]]:
        """(tensor, axis, size) of what a node is made from, the nearest first, then of all before it."""
        for name in self._before(node):
            if self.state.is_data(name):
                for place, size in enumerate(sizes(self.state.shape(name))):
                    if not is_fixed(size):
                        yield name, place, size

    def _before(self, node: NodeProto) -> Iterator[str]:
        """The names of what a node is made from, the nearest first, then of all before it."""
        seen: dict[str, None] = dict.fromkeys(name for name in node.input if name)
        queue = list(seen)
        for name in queue:
            yield name
            made = self.network.producers.get(name)
            for other in made.input if made is not None else ():
                if other and other not in seen:
                    seen[other] = None
                    queue.append(other)
        here = self.network.place[node.output[0]]
        yield from reversed([name for name, index in self.network.place.items() if index < here and name not in seen])
        yield from (value.name for value in self.network.model.graph.input)

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
        if self.network.opset >= 18:
            inputs = [node.input[0], self.constant("axes", np.array(axes, np.int64))]
            return helper.make_node(kind, inputs, node.output, name=node.name, keepdims=1)
        return helper.make_node(kind, node.input[:1], node.output, name=node.name, keepdims=1, axes=list(axes))

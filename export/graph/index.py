"""A model as analyses read it: who gives and who reads a tensor, and what is constant, all looked up once."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from fcn_deploy.export.graph.edit import attributes, names_read
from onnx import ModelProto, NodeProto, numpy_helper

CONSTANT_ATTRIBUTES = {
    "value_ints": np.int64,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_float": np.float32,
}


class GraphIndex:
    """What the nodes, tensors and constants of a model are to each other.

    The model must not be changed while it is read through an index. Each table is made when it is first asked for, in
    time that grows with the model; each look-up after that takes none.

    Attributes:
        model: that is read.
    """

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self._constants: dict[str, np.ndarray | None] = {}

    @property
    def image(self) -> str:
        """Name of the model's first input."""
        return self.model.graph.input[0].name

    @property
    def result(self) -> str:
        """Name of the model's first output."""
        return self.model.graph.output[0].name

    @cached_property
    def _producers(self) -> dict[str, NodeProto]:
        return {name: node for node in self.model.graph.node for name in node.output if name}

    @cached_property
    def _consumers(self) -> dict[str, list[NodeProto]]:
        found: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            for name in names_read(node):
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def _initializers(self) -> dict:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    def producer(self, name: str) -> NodeProto | None:
        """The node that gives a tensor; None for inputs and initialisers."""
        return self._producers.get(name)

    def consumers(self, name: str) -> list[NodeProto]:
        """The nodes that read a tensor, by their subgraphs too, in their order."""
        return self._consumers.get(name, [])

    def sole_reader(self, name: str, operators: Sequence[str]) -> NodeProto | None:
        """The last of a chain of such nodes, each of which alone reads the one before; None where it is another."""
        node = None
        for operator in operators:
            readers = self.consumers(name)
            if len(readers) != 1 or readers[0].op_type != operator or readers[0].input[0] != name:
                return None
            node = readers[0]
            name = node.output[0]
        return node

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initialiser or a Constant node, also behind Identity; None for what is computed."""
        if name not in self._constants:
            self._constants[name] = self._constant(name)
        return self._constants[name]

    def array(self, name: str) -> np.ndarray:
        """As constant, of what is known to be one."""
        value = self.constant(name)
        assert value is not None
        return value

    def _constant(self, name: str) -> np.ndarray | None:
        while name not in self._initializers:
            node = self.producer(name)
            if node is not None and node.op_type == "Constant":
                return constant_of(node)
            if node is None or node.op_type != "Identity":
                return None
            name = node.input[0]
        return numpy_helper.to_array(self._initializers[name])

    def input_constant(self, node: NodeProto, place: int) -> np.ndarray | None:
        """The value of a node's input of this place; None where that is left out or computed."""
        return self.constant(node.input[place]) if has_input(node, place) else None

    def before(self, name: str, operators: frozenset[str] | tuple[str, ...]) -> NodeProto | None:
        """The first node before a tensor that is none of these operators, by their first inputs."""
        node = self.producer(name)
        while node is not None and node.op_type in operators:
            node = self.producer(node.input[0])
        return node

    def ancestors(self, name: str, stop: str = "") -> Iterator[str]:
        """The names of what a tensor is computed of, itself first; not beyond `stop`, which is among them."""
        seen, open_ = {name}, [name]
        while open_:
            name = open_.pop()
            yield name
            node = self.producer(name)
            if node is None or name == stop:
                continue
            new = {read for read in names_read(node) if read and read not in seen}
            seen |= new
            open_.extend(new)


def has_input(node: NodeProto, place: int) -> bool:
    """Whether a node has an input of this place: optional ones are left out, or named ""."""
    return len(node.input) > place and bool(node.input[place])


def constant_of(node: NodeProto) -> np.ndarray | None:
    """What a Constant node gives; None for text and sparse tensors."""
    given = attributes(node)
    if "value" in given:
        return numpy_helper.to_array(given["value"])
    return next((np.asarray(given[name], kind) for name, kind in CONSTANT_ATTRIBUTES.items() if name in given), None)

"""A model as passes edit it: onnx_ir's graph, whose values know the node that gives them and those that read them.

An edit takes the time of what it changes, not of the whole model.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from fcn_deploy.export.graph.edit import opset
from fcn_deploy.runtime.errors import DeployError, one_line
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

# It warns of what is no error here, such as sparse initialisers.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

Dim = int | str | None
Attribute = int | float | str | Sequence[int] | Sequence[float] | ir.Attr


class Rewrite:
    """A model while a pass rewrites it. The one that it was made from stays as it is.

    What onnx_ir knows nothing of (sparse initialisers, training information) is put back at the end.

    Attributes:
        graph: to be edited.
        opset: version of the standard operators.

    Raises:
        DeployError: the model holds what onnx_ir does not take.
    """

    def __init__(self, model: ModelProto) -> None:
        self._before = model
        try:
            self._model = ir.from_proto(_dense(model))
        except Exception as error:  # onnx_ir's errors share no base class
            cause: BaseException = error
            while cause.__cause__ is not None:  # it says first what it was doing
                cause = cause.__cause__
            reason = one_line(cause, 200)
            raise DeployError(f"the model cannot be edited: {reason}") from error
        self.graph = self._model.graph
        self.opset = opset(model)
        # Branches may use a name several times; what is of the graph itself comes first.
        self._values: dict[str, dict[ir.Value, None]] = {}
        for value in _values_of(self.graph):
            self._know(value)
        self._node_names = {node.name for each in (self.graph, *self.graph.subgraphs()) for node in each}
        for tensor in model.graph.sparse_initializer:
            self._values.setdefault(tensor.values.name, {})

    @property
    def image(self) -> ir.Value:
        """The model's first input."""
        return self.graph.inputs[0]

    @property
    def result(self) -> ir.Value:
        """The model's first output."""
        return self.graph.outputs[0]

    def value(self, name: str) -> ir.Value:
        """What has this name in the graph or a subgraph. Raises KeyError where nothing has."""
        return next(iter(self._values[name]))

    def producer(self, name: str) -> ir.Node:
        """The node that gives the value of this name. Raises KeyError where none does."""
        node = self.value(name).producer()
        if node is None:
            raise KeyError(f"no node gives {name}")
        return node

    def name(self, wanted: str) -> str:
        """A name that no value has: the one asked for, or that with primes."""
        while wanted in self._values:
            wanted += "'"
        return wanted

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a value this name; another that has it gets one of its own."""
        for other in tuple(self._values.get(name, ())):
            if other is not value:
                self.rename(other, self.name(f"{name}/renamed"))
        if value.const_value is not None:  # whose tensor, which is the first model's too, has the name as well
            value.const_value = ir.Tensor(value.const_value.numpy(), name=name)
        named = self._values[name_of(value)]
        named.pop(value, None)
        if not named:
            del self._values[name_of(value)]
        ir.convenience.rename_values(value, name)
        self._know(value)

    def _know(self, value: ir.Value) -> None:
        self._values.setdefault(name_of(value), {})[value] = None

    def constant(self, wanted: str, array: np.ndarray | np.generic) -> ir.Value:
        """A new initialiser, of this name where it is free."""
        name = self.name(wanted)
        value = ir.Value(name=name, const_value=ir.Tensor(np.asarray(array), name=name))
        self.graph.register_initializer(value)
        self._know(value)
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        result: str,
        *,
        name: str | None = None,
        before: ir.Node | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """The result of a new node, of this name where it is free.

        Args:
            operator: of the standard ones.
            inputs: None where one is left out.
            name: of the node, which no other has; None: as its result.
            before: the node that it is put before; None: it is the last one.
        """
        value = self._new(result)
        node = _node(operator, inputs, attributes, value, self._node_name(value) if name is None else name)
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return value

    def _node_name(self, result: ir.Value) -> str:
        """A name of a node that gives this, which no other node has: values that were renamed left theirs behind."""
        name = name_of(result)
        while name in self._node_names:
            name += "'"
        self._node_names.add(name)
        return name

    def _new(self, wanted: str) -> ir.Value:
        """A value of this name where it is free."""
        value = ir.Value(name=self.name(wanted))
        self._know(value)
        return value

    def of_attributes(
        self, operator: str, inputs: Sequence[ir.Value | None], result: str, attributes: Mapping[str, ir.Attr]
    ) -> ir.Value:
        """As node, put last, with attributes that another node has."""
        value = self._new(result)
        self.graph.append(_node(operator, inputs, attributes, value, self._node_name(value)))
        return value

    def first(self) -> ir.Node | None:
        """The first node; None in a graph without one."""
        return next(iter(self.graph), None)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` be read in the place of `old`, and be the model's output of the same name where that was."""
        if old.is_graph_output():
            name = name_of(old)
            for place, output in enumerate(self.graph.outputs):
                if output is old:
                    new.type, new.shape = old.type, old.shape
                    self.graph.outputs[place] = new
            old.replace_all_uses_with(new)
            self.rename(new, name)
        else:
            old.replace_all_uses_with(new)

    def follow_with(
        self, value: ir.Value, operator: str, name: str, *others: ir.Value, **attributes: Attribute
    ) -> ir.Value:
        """Put a node behind what another gives, that all who read that read instead; its result gets the name of it.

        Args:
            value: given by a node of the graph.
            operator: of the new node.
            name: of the new node.
            others: what it reads beside the value.
        """
        result, uses, producer = name_of(value), tuple(value.uses()), value.producer()
        assert producer is not None
        self.rename(value, self.name(f"{result}/moved"))
        following = self._new(result)
        self.graph.insert_after(producer, _node(operator, [value, *others], attributes, following, name))
        reroute(uses, following)
        for place, output in enumerate(self.graph.outputs):
            if output is value:
                following.type, following.shape = value.type, value.shape
                self.graph.outputs[place] = following
        return following

    def end_with(self, value: ir.Value, old: str, name: str | None = None) -> None:
        """Let the model's first output be this value, and what was that until now be called `old`.

        Args:
            name: of the output; None: as it was.
        """
        before = self.result
        name = name_of(before) if name is None else name
        self.graph.outputs[0] = value
        self.rename(before, old)
        self.rename(value, name)

    def remove(self, node: ir.Node) -> None:
        """Take out a node that nothing reads any more."""
        self.graph.remove(node, safe=True)

    def prune(self) -> None:
        """Remove nodes and constants that no output needs."""
        RemoveUnusedNodesPass()(self._model)

    def forget_shapes(self) -> None:
        """Drop what is said of the shapes of tensors inside, which hold no longer."""
        ends = {*self.graph.inputs, *self.graph.outputs}
        for node in self.graph:
            for value in node.outputs:
                if value not in ends:
                    value.shape = value.type = None

    def model(self) -> ModelProto:
        """The model as it is now."""
        model = ir.to_proto(self._model)
        # onnx_ir says of initialisers what they say themselves.
        said = {value.name for graph in _graphs(self._before.graph) for value in graph.value_info}
        for graph in _graphs(model.graph):
            known = {tensor.name for tensor in graph.initializer}
            kept = [value for value in graph.value_info if value.name in said or value.name not in known]
            if len(kept) < len(graph.value_info):
                del graph.value_info[:]
                graph.value_info.extend(kept)
        read = {name for node in model.graph.node for name in node.input}
        model.graph.sparse_initializer.extend(
            tensor for tensor in self._before.graph.sparse_initializer if tensor.values.name in read
        )
        model.training_info.extend(self._before.training_info)
        return model


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and those inside it."""
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inner in (*item.graphs, *([item.g] if item.HasField("g") else [])):
                yield from _graphs(inner)


def _values_of(graph: ir.Graph) -> Iterator[ir.Value]:
    """All values that have names, those of the graph itself first."""
    for each in (graph, *graph.subgraphs()):
        nodes = (value for node in each for value in (*node.outputs, *node.inputs))
        for value in (*each.inputs, *each.initializers.values(), *nodes, *each.outputs):
            if value is not None and value.name:
                yield value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initialiser or a Constant node, also behind Identity; None for what is computed or left out."""
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.numpy()
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type == "Identity" else None
    return None


def array(value: ir.Value) -> np.ndarray:
    """As constant, of what is known to be one."""
    found = constant(value)
    assert found is not None
    return found


def name_of(value: ir.Value) -> str:
    """A value's name: all that are read have one."""
    assert value.name is not None
    return value.name


def needed_input(node: ir.Node, place: int = 0) -> ir.Value:
    """A node's input of this place, one of those that its operator never leaves out."""
    value = node.inputs[place]
    assert value is not None
    return value


def input_of(node: ir.Node, place: int) -> ir.Value | None:
    """A node's input of this place; None where it is left out."""
    return node.inputs[place] if len(node.inputs) > place else None


def label(node: ir.Node) -> str:
    """A node as errors and notes name it."""
    return f"{node.name or next((value.name for value in node.outputs), 'without a name')} ({node.op_type})"


def dims(value: ir.Value) -> list[Dim]:
    """The dimensions of a value: numbers, names, or None."""
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def declare(value: ir.Value, shape: Iterable[Dim], kind: int = TensorProto.FLOAT) -> None:
    """Give an input or output its dimensions, numbers or names, and the type of its elements."""
    value.shape, value.type = ir.Shape(list(shape)), ir.TensorType(ir.DataType(kind))


def declare_type(value: ir.Value, kind: int = TensorProto.FLOAT) -> None:
    """Say of what type the elements of an output are, and nothing of its dimensions."""
    value.shape, value.type = None, ir.TensorType(ir.DataType(kind))


def reroute(uses: Iterable[tuple[ir.Node, int]], value: ir.Value) -> None:
    """Let these uses of another value be of this one."""
    for node, place in tuple(uses):
        node.replace_input_with(place, value)


def _node(
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Attribute],
    result: ir.Value,
    name: str,
) -> ir.Node:
    """A node of one result."""
    # onnx_ir would tell the types by itself, and take most of the time of an edit for it.
    given = {key: value if isinstance(value, ir.Attr) else _attribute(key, value) for key, value in attributes.items()}
    return ir.node(operator, inputs, given or None, outputs=[result], name=name)


def _attribute(name: str, value: int | float | str | Sequence[int] | Sequence[float]) -> ir.Attr:
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    if isinstance(value, float):
        return ir.AttrFloat32(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if all(isinstance(item, int) for item in value):
        return ir.AttrInt64s(name, [int(item) for item in value])
    return ir.AttrFloat32s(name, [float(item) for item in value])


def _dense(model: ModelProto) -> ModelProto:
    """The model without constants written as sparse tensors, which onnx_ir does not take; itself where it has none."""
    if not any(item.type == AttributeProto.SPARSE_TENSOR for node in model.graph.node for item in node.attribute):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        for item in node.attribute:
            if item.type == AttributeProto.SPARSE_TENSOR and node.op_type == "Constant":
                tensor = _filled(item.sparse_tensor)
                item.Clear()
                item.CopyFrom(onnx.helper.make_attribute("value", tensor))
    return copy


def _filled(sparse: onnx.SparseTensorProto) -> TensorProto:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    if indices.ndim == 1:
        dense.reshape(-1)[indices] = values
    else:
        dense[tuple(indices.T)] = values
    return numpy_helper.from_array(dense)

"""A model as passes edit it: onnx_ir's graph, whose values know the node that gives them and those that read them.

An edit takes the time of what it changes, not of the whole model.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from fcn_deploy.export.graph.edit import opset
from fcn_deploy.runtime.errors import DeployError
from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

Dim = int | str | None


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
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise DeployError(f"the model cannot be edited: {reason}") from error
        self.graph = self._model.graph
        self.opset = opset(model)
        self._values = ir.convenience.create_value_mapping(self.graph)
        for tensor in model.graph.sparse_initializer:
            self._values.setdefault(tensor.values.name, ir.Value(name=tensor.values.name))

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
        return self._values[name]

    def name(self, wanted: str) -> str:
        """A name that no value has: the one asked for, or that with primes."""
        while wanted in self._values:
            wanted += "'"
        return wanted

    def rename(self, value: ir.Value, name: str) -> None:
        """Give a value this name; another that has it gets one of its own."""
        other = self._values.get(name)
        if other is value:
            return
        if other is not None:
            self.rename(other, self.name(f"{name}/renamed"))
        if value.const_value is not None:  # whose tensor, which is the first model's too, has the name as well
            value.const_value = ir.Tensor(value.const_value.numpy(), name=name)
        if self._values.get(value.name) is value:  # two branches may use one name
            del self._values[value.name]
        ir.convenience.rename_values(value, name)
        self._values[name] = value

    def constant(self, wanted: str, array: np.ndarray | np.generic) -> ir.Value:
        """A new initialiser, of this name where it is free."""
        name = self.name(wanted)
        value = ir.Value(name=name, const_value=ir.Tensor(np.asarray(array), name=name))
        self.graph.register_initializer(value)
        self._values[name] = value
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        result: str,
        *,
        name: str | None = None,
        before: ir.Node | None = None,
        **attributes: object,
    ) -> ir.Value:
        """The result of a new node, of this name where it is free; the node's own is the same, unless one is given.

        Args:
            operator: of the standard ones.
            inputs: None where one is left out.
            before: the node that it is put before; None: it is the last one.
        """
        value = ir.Value(name=self.name(result))
        self._values[value.name] = value
        node = ir.node(operator, inputs, attributes or None, outputs=[value], name=value.name if name is None else name)
        if before is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(before, node)
        return value

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value | None], result: str) -> ir.Value:
        """The result of a node of the same operator and attributes, put last."""
        attributes = {item.name: item for item in node.attributes.values()}
        return self.node(node.op_type, inputs, result, **attributes)

    def first(self) -> ir.Node | None:
        """The first node; None in a graph without one."""
        return next(iter(self.graph), None)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` be read in the place of `old`, and be the model's output of the same name where that was."""
        if old.is_graph_output():
            name = old.name
            for place, output in enumerate(self.graph.outputs):
                if output is old:
                    new.type, new.shape = old.type, old.shape
                    self.graph.outputs[place] = new
            old.replace_all_uses_with(new)
            self.rename(new, name)
        else:
            old.replace_all_uses_with(new)

    def follow_with(
        self, value: ir.Value, operator: str, name: str, *others: ir.Value, **attributes: object
    ) -> ir.Value:
        """Put a node behind a value, that all who read it read instead; it gets the value's name.

        Args:
            name: of the node.
            others: what it reads beside the value.
        """
        result, uses = value.name, tuple(value.uses())
        self.rename(value, self.name(f"{result}/moved"))
        following = ir.Value(name=result)
        self._values[result] = following
        node = ir.node(operator, [value, *others], attributes or None, outputs=[following], name=name)
        self.graph.insert_after(value.producer(), node)
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
        name = before.name if name is None else name
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
        said = {value.name for value in self._before.graph.value_info}
        known = {tensor.name for tensor in model.graph.initializer}
        kept = [value for value in model.graph.value_info if value.name in said or value.name not in known]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        read = {name for node in model.graph.node for name in node.input}
        model.graph.sparse_initializer.extend(
            tensor for tensor in self._before.graph.sparse_initializer if tensor.values.name in read
        )
        model.training_info.extend(self._before.training_info)
        return model


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initialiser or a Constant node, also behind Identity; None for what is computed or left out."""
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return tensor.numpy()
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type == "Identity" else None
    return None


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

"""What is read of a ModelProto and done to it at once; each function takes time that grows with the whole model."""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TypeVar

import numpy as np
import onnx
from fcn_deploy.runtime.errors import DeployError, one_line
from onnx import ModelProto, NodeProto, helper, numpy_helper

Message = TypeVar("Message", ModelProto, NodeProto, onnx.ValueInfoProto)


def opset(model: ModelProto) -> int:
    """Version of the standard operators that a model uses."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def clone(message: Message) -> Message:
    """A copy of a model, a node or a value."""
    copy = type(message)()
    copy.CopyFrom(message)
    return copy


def label(node: NodeProto) -> str:
    """A node as errors and notes name it."""
    return f"{node.name or next(iter(node.output), 'without a name')} ({node.op_type})"


def dims(value: onnx.ValueInfoProto) -> list[int | str | None]:
    """The dimensions of an input or output: numbers, names, or None."""
    return [
        dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
        for dim in value.type.tensor_type.shape.dim
    ]


def set_shape(value: onnx.ValueInfoProto, shape: list[int | str], kind: int = onnx.TensorProto.FLOAT) -> None:
    """Give an input or output its element type and dimensions, numbers or names."""
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, shape))


def producers(model: ModelProto) -> dict[str, NodeProto]:
    """Name of a tensor → the node that gives it."""
    return {name: node for node in model.graph.node for name in node.output if name}


def names_read(node: NodeProto) -> set[str]:
    """What a node reads, by its subgraphs too."""
    read = set(node.input)
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            for inner in graph.node:
                read |= names_read(inner)
            read |= {value.name for value in graph.output}
    return read


def initializers(model: ModelProto, known: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Name → value of every initialiser; those that are `known` are not read again."""
    known = known or {}
    return {
        tensor.name: numpy_helper.to_array(tensor) if (value := known.get(tensor.name)) is None else value
        for tensor in model.graph.initializer
    }


def attributes(node: NodeProto) -> dict:
    """A node's attributes by name; strings decoded."""
    values = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def add_constants(model: ModelProto, values: Mapping[str, np.ndarray]) -> None:
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in values.items())


class Names:
    """Names for new tensors of a model that none of its own has: the one asked for, or that with primes."""

    def __init__(self, model: ModelProto) -> None:
        self._taken = {tensor.name for tensor in model.graph.initializer}
        self._taken |= {name for node in model.graph.node for name in (*names_read(node), *node.output)}
        self._taken |= {value.name for value in (*model.graph.input, *model.graph.output)}
        self._given: dict[str, str] = {}

    def __call__(self, wanted: str) -> str:
        """The same name for the same wish."""
        if wanted not in self._given:
            name = wanted
            while name in self._taken:
                name += "'"
            self._taken.add(name)
            self._given[wanted] = name
        return self._given[wanted]


def rename_reads(model: ModelProto, old: str, new: str) -> None:
    """Let every node that reads `old` read `new`, in subgraphs too."""
    _rename(model.graph.node, old, new, results=False)


def rename_result(model: ModelProto, old: str, new: str) -> None:
    """Let the node that gives `old` give `new`, to all who read it."""
    _rename(model.graph.node, old, new, results=True)


def free_name(model: ModelProto, name: str) -> None:
    """Give what is called `name` inside a graph another name, so that an input or output can have it."""
    if name in producers(model):
        rename_result(model, name, f"{name}/renamed")


def _rename(nodes, old: str, new: str, results: bool) -> None:
    for node in nodes:
        for names in (node.input, node.output) if results else (node.input,):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                _rename(graph.node, old, new, results=False)


def check(model: ModelProto, what: str) -> None:
    """Raise DeployError in one line where a graph that was made is not valid ONNX."""
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # onnx's errors share no base class
        reason = one_line(error, 300)
        raise DeployError(f"{what} is not valid ONNX, which is a fault of ours; please report it: {reason}") from error


def needed_nodes(
    nodes: Sequence[NodeProto], outputs: Iterable[onnx.ValueInfoProto]
) -> tuple[list[NodeProto], set[str]]:
    """(the nodes that these outputs need, in their order; the names of all that is needed)."""
    needed, kept = {value.name for value in outputs}, []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            kept.append(node)
            needed |= names_read(node)
    return kept[::-1], needed


def prune(model: ModelProto) -> None:
    """Remove nodes, constants and shape hints that no output needs; in place."""
    kept, needed = needed_nodes(model.graph.node, model.graph.output)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    for field in (model.graph.initializer, model.graph.value_info):
        used = [item for item in field if item.name in needed]
        del field[:]
        field.extend(used)


def extract(model: ModelProto, outputs: Sequence[str], inputs: Sequence[onnx.ValueInfoProto] = ()) -> ModelProto:
    """The part of a model that gives these tensors, whose types are left open.

    Args:
        model: stays as it is.
        outputs: names of tensors.
        inputs: of the part, tensors of the model that it starts from; none: the model's own inputs.
    """
    given = {value.name for value in inputs}
    needed, nodes = set(outputs) - given, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= names_read(node) - given
    graph = onnx.GraphProto(name=model.graph.name, node=reversed(nodes), input=inputs or model.graph.input)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in needed)
    graph.sparse_initializer.extend(t for t in model.graph.sparse_initializer if t.values.name in needed)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    head = {"ir_version": model.ir_version, "opset_import": model.opset_import, "functions": model.functions}
    return ModelProto(graph=graph, **head)


def sign(model: ModelProto) -> None:
    """Name this project, in its version, as what wrote a file."""
    model.producer_name, model.producer_version = "fcn-deploy", version("fcn-deploy")


def set_metadata(model: ModelProto, key: str, value: str) -> None:
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
            return
    model.metadata_props.add(key=key, value=value)


def metadata(model: ModelProto, key: str) -> str | None:
    return next((entry.value for entry in model.metadata_props if entry.key == key), None)

"""A graph (TracedGraph), and what is known of its tensors while shapes are followed for the sample images (State)."""

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import onnx
from fcn_deploy.export.dynamic_shapes.sizes import SAMPLES, SampledSize, Shape, axis_sizes, fixed, fixed_shape
from fcn_deploy.export.graph.edit import attributes, dims, initializers, names_read, opset, producers
from fcn_deploy.export.graph.index import GraphIndex
from onnx import ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper, shape_inference

SMALL = 4096  # elements of arithmetic on shapes; what is larger is data

Values = tuple[np.ndarray, ...]  # of a tensor, for each of the samples


class ConflictError(Exception):
    """A network cannot be what it is taken for: at this node the sizes do not fit."""

    def __init__(self, node: NodeProto, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class TracedGraph:
    """What is known of a graph before any size is: its nodes, constants, types, and who is made from whom.

    Attributes:
        index: of its tensors: who reads them.
        traced: whether numbers in it may be those of the size that an exporter ran it at. False where it fits a size
            that no network is made for, as then no number in it is for a size.
        assumed: node → what the user says its numbers are: `fixed` at every size, or `global`, of the image's size.
    """

    def __init__(self, model: ModelProto, assumed: Mapping[str, str] | None = None) -> None:
        self.assumed = dict(assumed or {})
        self.model, self.nodes, self.opset = model, list(model.graph.node), opset(model)
        self.index = GraphIndex(model)
        self.constants = initializers(model)
        self.producers = producers(model)
        self.place = {name: index for index, node in enumerate(self.nodes) for name in node.output if name}
        self.traced = True
        self._inferred: dict[tuple, list[list[int]]] = {}
        typed = shape_inference.infer_shapes(model).graph
        known = (*typed.input, *typed.output, *typed.value_info)
        self._types: dict[str, int] = {value.name: value.type.tensor_type.elem_type for value in known}
        self._types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}

    @cached_property
    def ancestors(self) -> list[frozenset[int]]:
        """Of each node: the places of those whose results it reads, directly or not."""
        found: list[frozenset[int]] = []
        for node in self.nodes:
            made = [self.place[name] for name in names_read(node) if name in self.place]
            found.append(frozenset(made).union(*(found[index] for index in made if index < len(found))))
        return found

    def type_of(self, name: str) -> int:
        """The type of a tensor, a number of TensorProto; FLOAT where it is not known."""
        return self._types.get(name) or TensorProto.FLOAT

    def infer(
        self, node: NodeProto, shape_of: Callable[[str], Shape], values_of: Callable[[str], Values | None]
    ) -> list[list[list[int]]]:
        """Output shapes by the operator's definition: sample → output → numbers. Raises ConflictError."""
        reads = list(dict.fromkeys(name for name in node.input if name))
        results = []
        for sample in range(SAMPLES):
            shapes = {name: [size[sample] for size in axis_sizes(shape_of(name))] for name in reads}
            data = {name: values[sample] for name in reads if (values := values_of(name)) is not None}
            key = (id(node), *(tuple(shapes[name]) for name in reads), *(v.tobytes() for v in data.values()))
            if key not in self._inferred:
                self._inferred[key] = self._infer(node, shapes, data)
            results.append(self._inferred[key])
        return results

    def _infer(
        self, node: NodeProto, shapes: Mapping[str, list[int]], data: Mapping[str, np.ndarray]
    ) -> list[list[int]]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            schema = defs.get_schema(node.op_type, self.opset, domain)
        except Exception as error:  # of no base class but Exception
            raise ConflictError(node, f"{domain or 'ONNX'} has no operator of this name that is known here") from error
        types = {name: helper.make_tensor_type_proto(self.type_of(name), shape) for name, shape in shapes.items()}
        try:
            made = shape_inference.infer_node_outputs(
                schema, node, types, {name: numpy_helper.from_array(value) for name, value in data.items()},
                opset_imports=[helper.make_opsetid("", self.opset)], ir_version=self.model.ir_version,
            )  # fmt: skip
        except Exception as error:
            reason = " ".join(str(error).split()).removeprefix("[ShapeInferenceError] ")[:150]
            raise ConflictError(node, f"it does not fit its input: {reason}") from error
        found: list[list[int]] = []
        for name in node.output:
            if not name:
                found.append([])
                continue
            tensor = made[name].tensor_type if name in made else None
            if tensor is None or not tensor.HasField("shape"):
                raise ConflictError(node, "the size of its output cannot be told")
            shape = dims(onnx.ValueInfoProto(name=name, type=made[name]))
            numbers = [number for number in shape if isinstance(number, int)]
            if len(numbers) < len(shape):
                raise ConflictError(node, "the size of its output cannot be told")
            self._types.setdefault(name, tensor.elem_type)
            found.append(numbers)
        return found


class State:
    """Shapes, and the values of arithmetic on shapes, of the tensors that were followed so far.

    Attributes:
        image: the sizes N, H and W of the image.
    """

    def __init__(self, graph: TracedGraph, image: Mapping[str, SampledSize], shapes: Mapping[str, Shape]) -> None:
        self.graph, self.image = graph, image
        self.shapes: dict[str, Shape] = dict(shapes)
        self.values: dict[str, Values] = {}

    def copy(self) -> "State":
        other = State(self.graph, self.image, self.shapes)
        other.values = dict(self.values)
        return other

    def shape(self, name: str) -> Shape:
        if name in self.shapes:
            return self.shapes[name]
        return fixed_shape(self.graph.constants[name].shape)

    def values_of(self, name: str) -> Values | None:
        """Of a constant or of arithmetic on shapes; None for data."""
        if name in self.values:
            return self.values[name]
        array = self.graph.constants.get(name)
        return None if array is None or array.size > SMALL else (array,) * SAMPLES

    def is_data(self, name: str) -> bool:
        """Whether a tensor depends on the image's pixels."""
        return name in self.shapes and name not in self.values


def name_of_node(node: NodeProto) -> str:
    """What errors and notes call a node, and users say."""
    return node.name or node.output[0]


def input_of(node: NodeProto, index: int) -> str:
    """The name of an input; "" where it is left out."""
    return node.input[index] if len(node.input) > index else ""


def integers(node: NodeProto, state: State, attribute: str, index: int) -> list[SampledSize] | None:
    """Whole numbers that an operator takes as an attribute in older opsets and as an input in newer ones.

    Returns:
        A size for each; None where they are left out.

    Raises:
        ConflictError: they are computed from the image's pixels, or as many as the image's size says.
    """
    given = attributes(node).get(attribute)
    if given is not None:
        return [fixed(number) for number in np.atleast_1d(given)]
    name = input_of(node, index)
    if not name:
        return None
    values = state.values_of(name)
    if values is None:
        raise ConflictError(node, f"it takes {name}, which is computed from the image's pixels")
    if any(array.shape != values[0].shape for array in values):
        raise ConflictError(node, f"it takes {name}, whose length changes with the image")
    return [tuple(int(array.flat[place]) for array in values) for place in range(values[0].size)]


def needed_integers(node: NodeProto, state: State, attribute: str, index: int) -> list[SampledSize]:
    """As integers, of what no node of its kind may leave out."""
    found = integers(node, state, attribute, index)
    if found is None:
        raise ConflictError(node, f"it is not as its operator is defined (it has no {attribute})")
    return found


def axes_of(node: NodeProto, state: State, index: int, rank: int) -> list[int] | None:
    """The axes that a node names, from 0 on; None where it names none."""
    found = integers(node, state, "axes", index)
    return None if found is None else [size[0] % rank for size in found]

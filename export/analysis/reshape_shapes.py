"""The shapes before and after the Reshapes of a network at two image sizes, by ONNX's inference or by running it."""

import math
from functools import cached_property

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.analysis.receptive_fields import OF_IMAGE, STRETCH, Fields
from fcn_deploy.export.graph.edit import Names, add_constants, attributes, clone, dims, extract, initializers, set_shape
from fcn_deploy.runtime.backends.onnxruntime import session
from onnx import ModelProto, NodeProto, helper

Shape = tuple[int, ...]
BeforeAndAfter = tuple[Shape, Shape]
# Sides in units: primes, so that no two dimensions that belong to the size are equal.
SIDES = ((17, 23), (29, 19))
# What a unit is, in multiples of the period: blocks may want more than the period.
UNITS = (1, 2, 4, 8, 3, 7)
RESHAPES = ("Reshape", "Flatten")
FEW = 64  # elements of what shapes are computed of; what has more is weights


class ReshapeShapes:
    """The shapes of every Reshape and Flatten of a network, each found when it is asked for.

    ONNX's inference is asked first, as it costs no arithmetic. Where it does not know, the network is run: once for a
    size, where it runs at that size as a whole.
    """

    def __init__(self, network: ModelProto, start: Fields = OF_IMAGE) -> None:
        """`start`: of the network's first input, vertical and horizontal."""
        self._network = _of_one_input(network, start) if len(network.graph.input) > 1 else network
        self._known: dict[tuple[int, int], dict[str, Shape]] = {}  # size of the image → tensor → its shape
        self._inferences: dict[tuple[int, int], dict[str, Shape]] = {}
        self._partial: set[tuple[int, int]] = set()  # sizes at which the network does not run as a whole

    @cached_property
    def _wanted(self) -> list[str]:
        reshapes = (node for node in self._network.graph.node if node.op_type in RESHAPES)
        return list(dict.fromkeys(name for node in reshapes for name in (node.input[0], node.output[0])))

    @cached_property
    def _part(self) -> ModelProto:
        return extract(self._network, self._wanted)

    @cached_property
    def _session(self):
        return session(self._part.SerializeToString(), optimise=False)

    @cached_property
    def _weightless(self) -> ModelProto:
        """The part that is run, with inputs in place of weights, of which inference wants the shapes alone."""
        part = self._part.graph
        graph = onnx.GraphProto(name=part.name, node=part.node, input=part.input, output=part.output)
        taken = {value.name for value in part.input}
        for held in part.initializer:
            if math.prod(held.dims) <= FEW:
                graph.initializer.append(held)
            elif held.name not in taken:
                graph.input.append(onnx.helper.make_tensor_value_info(held.name, held.data_type, held.dims))
        return ModelProto(graph=graph, ir_version=self._part.ir_version, opset_import=self._part.opset_import)

    def at_two_sizes(self, node: NodeProto, unit: tuple[int, int]) -> tuple[BeforeAndAfter, BeforeAndAfter]:
        """Of one node, for images whose sides are multiples of `unit`, (height, width).

        Raises:
            ValueError: it runs at none.
        """
        failure: Exception | None = None
        for times in UNITS:
            sizes = [(unit[0] * rows * times, unit[1] * columns * times) for rows, columns in SIDES]
            try:
                first, second = (self._at(node, size, together=times == 1) for size in sizes)
                return first, second
            except Exception as error:  # of ONNX Runtime, whose errors share no base class
                failure = failure or error
        raise ValueError("it fails at every size that was tried") from failure

    def _at(self, node: NodeProto, size: tuple[int, int], together: bool) -> BeforeAndAfter:
        known, names = self._known.setdefault(size, {}), [node.input[0], node.output[0]]
        if not all(name in known for name in names):
            # Those before are known already, or of no interest any more.
            wanted = self._wanted[self._wanted.index(names[0]) :] if together and size not in self._partial else names
            try:
                known |= self._run(wanted, size)
            except Exception:
                self._partial.add(size)
                if wanted == names:
                    raise
                known |= self._run(names, size)
        return known[names[0]], known[names[1]]

    def _run(self, names: list[str], size: tuple[int, int]) -> dict[str, Shape]:
        if all(name in self._inferred(size) for name in names):
            return {name: self._inferred(size)[name] for name in names}
        image = self._network.graph.input[0].type.tensor_type
        channels, dtype = image.shape.dim[1].dim_value, onnx.helper.tensor_dtype_to_np_dtype(image.elem_type)
        results = run_quietly(self._session, np.zeros((1, channels, *size), dtype), names, in_part=True)
        return {name: result.shape for name, result in zip(names, results, strict=True)}

    def _inferred(self, size: tuple[int, int]) -> dict[str, Shape]:
        """Tensor → its shape by ONNX's inference, of Reshapes that it knows all of and that keep all elements."""
        if size not in self._inferences:
            image = self._weightless.graph.input[0]
            kind = image.type.tensor_type
            set_shape(image, [1, kind.shape.dim[1].dim_value, *size], kind.elem_type)
            try:
                found = onnx.shape_inference.infer_shapes(self._weightless, data_prop=True).graph
            except onnx.shape_inference.InferenceError:  # running it tells what is wrong, or that nothing is
                found = onnx.GraphProto()
            known: dict[str, Shape] = {}
            for value in (*found.input, *found.value_info, *found.output):
                shape = dims(value)
                sides = tuple(side for side in shape if isinstance(side, int) and side > 0)
                if sides and len(sides) == len(shape):
                    known[value.name] = sides
            pairs = [(node.input[0], node.output[0]) for node in found.node if node.op_type in RESHAPES]
            self._inferences[size] = {
                name: known[name]
                for pair in pairs
                if known.keys() >= set(pair) and math.prod(known[pair[0]]) == math.prod(known[pair[1]])
                for name in pair
            }
        return self._inferences[size]


def _of_one_input(network: ModelProto, start: Fields) -> ModelProto:
    """A network that pooled values are given to, with zeros for them, and with a Resize for each Stretch.

    Shapes are its own where the image has whole cells of every map.
    """
    model, names, held = clone(network), Names(network), initializers(network)
    image, *others = model.graph.input
    constants = {names("begin"): np.array([2]), names("end"): np.array([4]), names("lead"): np.array([0])}
    begin, end, lead = constants
    for value in others:
        if value.name not in held:
            constants[value.name] = np.zeros([int(side or 1) for side in dims(value)], np.float32)
    nodes: list[NodeProto] = []
    for node in network.graph.node:
        if node.op_type != STRETCH:
            nodes.append(node)
            continue
        x, y = node.input[0], node.output[0]
        cell, stride = names(f"{y}/cell"), names(f"{y}/stride")
        constants[cell], constants[stride] = (
            np.array([int(field.stride) for field in start]),
            np.array(attributes(node)["stride"]),
        )
        shape, sides, pixels, cells, channels, size = (
            names(f"{y}/{what}") for what in ("shape", "sides", "pixels", "cells", "channels", "size")
        )
        nodes += [
            helper.make_node("Shape", [image.name], [shape]),
            helper.make_node("Slice", [shape, begin, end], [sides]),
            helper.make_node("Mul", [sides, cell], [pixels]),
            helper.make_node("Div", [pixels, stride], [cells]),
            helper.make_node("Shape", [x], [f"{shape}/x"]),
            helper.make_node("Slice", [f"{shape}/x", lead, begin], [channels]),
            helper.make_node("Concat", [channels, cells], [size], axis=0),
            helper.make_node("Resize", [x, "", "", size], [y], mode="nearest"),
        ]
    del model.graph.node[:], model.graph.input[1:]
    model.graph.node.extend(nodes)
    add_constants(model, constants)
    return model

"""Gather, Scatter and their kind: that they pick no places of the traced map by number, but all, in some order."""

import numpy as np
from fcn_deploy.export.dynamic_shapes.interpretation import Interpretation
from fcn_deploy.export.dynamic_shapes.shape_writer import ShapeWriter
from fcn_deploy.export.dynamic_shapes.sizes import axis_of, axis_sizes, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, input_of, name_of_node
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto, helper

LEAST = 8  # places that are a map's, all of them
LARGE_SHARE = 4  # of a map: a place beyond so many parts of it is hardly meant as it is


def check(node: NodeProto, state: State) -> None:
    data, index = node.input[0], input_of(node, 1)
    if node.op_type.startswith("Scatter") and not state.is_data(data) and state.is_data(index):
        raise ConflictError(node, "it writes into a constant of the traced map's size")
    if index in state.graph.constants and state.is_data(data) and not _is_of_every_size(node, state, index):
        raise ConflictError(node, f"it picks places of the map by number; --assume {name_of_node(node)}=fixed if meant")


def interpret(node: NodeProto, state: State) -> list[Interpretation] | None:
    """Of a Gather of all places of a traced map, in order, each so many-th, or backwards; None: of others."""
    if node.op_type != "Gather" or input_of(node, 1) not in state.graph.constants or not state.graph.traced:
        return None
    shape, places = state.shape(node.input[0]), state.graph.constants[node.input[1]]
    axis = attributes(node).get("axis", 0) % len(shape)
    size = multiplied(shape[axis])
    if is_fixed(size) or not state.is_data(node.input[0]) or state.graph.assumed.get(name_of_node(node)) == "fixed":
        return None
    steps = set(np.diff(places).tolist()) if places.ndim == 1 and len(places) >= LEAST else set()
    step = steps.pop() if len(steps) == 1 else 0
    first, last = (int(places[0]), int(places[-1])) if step else (0, 0)
    backwards = step == -1 and (first, last) == (size[0] - 1, 0)
    if not backwards and not (0 <= first < step and size[0] - step <= last < size[0]):
        return None

    def rewrite(writer: ShapeWriter) -> list[NodeProto]:
        far = np.iinfo(np.int64)
        span = (-1, far.min, -1) if backwards else (first, far.max, step)
        starts, ends, steps = (writer.constant("places", np.array([number], np.int64)) for number in span)
        inputs = [node.input[0], starts, ends, writer.constant("axes", np.array([axis], np.int64)), steps]
        return [helper.make_node("Slice", inputs, node.output, name=node.name)]

    after = list(shape)
    if not backwards:
        after[axis] = axis_of(tuple(-(-(side - first) // step) for side in size))
    text = "all places backwards" if backwards else f"each {step}th place of all" if step > 1 else "all places"
    return [Interpretation({node.output[0]: tuple(after)}, 0, rewrite, f"{text} instead of {len(places)} by number")]


def _is_of_every_size(node: NodeProto, state: State, index: str) -> bool:
    """Whether constant places mean the same at other sizes."""
    shape = state.shape(node.input[0])
    if node.op_type != "Gather":
        return all(is_fixed(size) for size in axis_sizes(shape)[1:])
    size = multiplied(shape[attributes(node).get("axis", 0) % len(shape)])
    places = state.graph.constants[index]
    if is_fixed(size) or state.graph.assumed.get(name_of_node(node)) == "fixed":
        return True
    place = int(places.flat[0]) if places.size == 1 else size[0]
    return place < 2 or place < size[0] // LARGE_SHARE  # from the middle on, it is a share of the map, most likely

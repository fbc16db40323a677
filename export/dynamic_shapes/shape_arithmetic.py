"""Arithmetic on shapes, from Shape nodes on, carried out for each of the sample images."""

import math

import numpy as np
from fcn_deploy.export.dynamic_shapes.sizes import (
    SAMPLES,
    Shape,
    axis_of,
    axis_sizes,
    fixed_shape,
    is_fixed,
    multiplied,
)
from fcn_deploy.export.dynamic_shapes.traced_graph import SMALL, State, Values
from fcn_deploy.export.graph.edit import attributes
from fcn_deploy.export.graph.evaluate import RANDOM, evaluate
from onnx import NodeProto

Results = tuple[dict[str, Shape], dict[str, Values]]


def evaluate_for_samples(node: NodeProto, state: State) -> Results | None:
    """Shapes and values of a node that computes with shapes and constants alone; None: it reads data, or is data."""
    if node.op_type == "Shape":
        sizes = axis_sizes(state.shape(node.input[0]))
        ends = attributes(node)
        sizes = sizes[slice(ends.get("start", 0), ends.get("end", None))]
        numbers: Values = tuple(np.array([size[sample] for size in sizes], np.int64) for sample in range(SAMPLES))
        return {node.output[0]: fixed_shape([len(sizes)])}, {node.output[0]: numbers}
    if node.op_type == "Size":
        whole = multiplied(axis_sizes(state.shape(node.input[0])))
        return {node.output[0]: ()}, {node.output[0]: tuple(np.array(number, np.int64) for number in whole)}
    reads = {name: values for name in node.input if name and (values := state.values_of(name)) is not None}
    if not reads or any(name and name not in reads for name in node.input):
        return None
    if node.op_type == "Range" and (length := _long_range(node, reads)) is not None:
        return {node.output[0]: (axis_of(length),)}, {}
    if node.op_type in RANDOM or node.op_type == "Resize":
        return None
    return _evaluated(node, state, reads)


def _long_range(node: NodeProto, reads: dict[str, Values]) -> tuple[int, ...] | None:
    """How long a Range is that is a map's: long, or longer for larger images; None: it is arithmetic."""
    start, limit, step = ([float(np.squeeze(array)) for array in reads[name]] for name in node.input)
    length = tuple(max(math.ceil((b - a) / by), 0) for a, b, by in zip(start, limit, step, strict=True))
    return length if max(length) > SMALL or not is_fixed(length) else None


def _evaluated(node: NodeProto, state: State, reads: dict[str, Values]) -> Results | None:
    results: list[list[np.ndarray]] = []
    for sample in range(SAMPLES):
        values = {name: value[sample] for name, value in reads.items()}
        same = results and all(np.array_equal(value, reads[name][0]) for name, value in values.items())
        try:
            results.append(results[0] if same else evaluate(state.graph.model, node, values))
        except Exception:  # an operator that the reference evaluator lacks, or values it refuses
            return None
    if any(not isinstance(array, np.ndarray) or array.size > SMALL for result in results for array in result):
        return None
    made = {name: tuple(result[index] for result in results) for index, name in enumerate(node.output) if name}
    if any(len({array.ndim for array in value}) > 1 for value in made.values()):
        return None
    return {
        name: tuple(axis_of(size) for size in zip(*(array.shape for array in value), strict=True))
        for name, value in made.items()
    }, made

"""Sums over the places of a map, and the numbers that they are divided by."""

from collections.abc import Iterable

from fcn_deploy.export.dynamic_shapes.sizes import SampledSize, is_fixed, multiplied
from fcn_deploy.export.dynamic_shapes.traced_graph import State, axes_of
from onnx import NodeProto

SUMS = ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare")
KEEPING = ("Sqrt", "Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Relu")  # whose sums stay so


def unscaled(name: str, state: State) -> NodeProto | None:
    """The node that a tensor is made by, but for multiplications with one number, and what keeps a sum a sum."""
    graph = state.graph
    made = graph.producers.get(name)
    while made is not None and made.op_type in ("Mul", "Div", *KEEPING):
        others = [other for other in made.input if other not in graph.constants or graph.constants[other].size > 1]
        if made.op_type in KEEPING:
            others = list(made.input[:1])
        if len(others) != 1:
            break
        made = graph.producers.get(others[0])
    return made


def one_number(node: NodeProto, state: State) -> tuple[str, float] | None:
    """(the data that a node of two inputs joins with one number, that number); None: it does something else."""
    constants = state.graph.constants
    index = next((index for index, name in enumerate(node.input) if name in constants), None)
    if index is None or len(node.input) != 2 or (node.op_type == "Div" and index == 0):
        return None
    array, data = constants[node.input[index]], node.input[1 - index]
    if array.size != 1 or array.dtype.kind != "f" or data in constants:
        return None
    return data, float(array.flat[0])


def divisor(node: NodeProto, state: State) -> tuple[str, float] | None:
    """(what a Mul or a Div divides, the number that it divides it by), above 1; None: it does something else."""
    found = one_number(node, state)
    if found is None or found[1] == 0:
        return None
    data, value = found
    number = value if node.op_type == "Div" else 1 / value
    return (data, number) if number > 1 else None


def summed_over(made: NodeProto, state: State) -> tuple[SampledSize | None, SampledSize | None]:
    """(the places that a node sums over; of a product that sums over none, its last axis)."""
    if made.op_type in SUMS:
        shape = state.shape(made.input[0])
        axes: Iterable[int] = axes_of(made, state, 1, len(shape)) or range(len(shape))
        return multiplied(multiplied(shape[place]) for place in axes), None
    if made.op_type == "MatMul":
        size = multiplied(state.shape(made.input[0])[-1])
        return (None, multiplied(state.shape(made.output[0])[-1])) if is_fixed(size) else (size, None)
    return None, None


def averaged_over(name: str, state: State) -> SampledSize | None:
    """The places that a tensor is a mean or a sum over, whatever number it is multiplied with; None: it is none."""
    made = unscaled(name, state)
    if made is None or made.output[0] not in state.shapes:
        return None
    if made.op_type == "GlobalAveragePool":
        return multiplied(multiplied(axis) for axis in state.shape(made.input[0])[2:])
    if made.op_type != "ReduceMean":
        return summed_over(made, state)[0]
    shape = state.shape(made.input[0])
    return multiplied(multiplied(shape[place]) for place in axes_of(made, state, 1, len(shape)) or range(len(shape)))

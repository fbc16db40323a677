"""Einsum: the axes that its letters name."""

from fcn_deploy.export.dynamic_shapes.inference import joined, refuse_mixed_batch
from fcn_deploy.export.dynamic_shapes.sizes import Axis, Shape
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State
from fcn_deploy.export.graph.edit import attributes
from onnx import NodeProto


def propagate(node: NodeProto, state: State) -> dict[str, Shape]:
    equation = attributes(node)["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        raise ConflictError(node, f"its equation {equation} is not followed here")
    left, right = equation.split("->")
    sides: dict[str, list[Axis]] = {}
    for name, letters in zip(node.input, left.split(","), strict=True):
        for letter, factors in zip(letters, state.shape(name), strict=True):
            sides.setdefault(letter, []).append(factors)
    found = {letter: joined(node, axes) for letter, axes in sides.items()}
    for letter, factors in found.items():
        if letter not in right:
            refuse_mixed_batch(node, factors)
    return {node.output[0]: tuple(found[letter] for letter in right)}

"""A network that was trained on BGR, for RGB."""

import numpy as np
import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, array, constant, needed_input, reroute
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto


def reverse_channels(model: ModelProto) -> PassResult:
    """A model of float [N,3,H,W] that takes RGB, from one that takes BGR (or the other way round).

    The first convolutions' weights are permuted; where another operator reads the channels, they are gathered instead.
    """
    edit = Rewrite(model)
    first = _first_readers(edit.image)
    if all(map(_takes_three, first)):
        made: dict[ir.Value, ir.Value] = {}
        for node in first:
            weight = needed_input(node, 1)
            if weight not in made:
                made[weight] = edit.constant(f"{weight.name}/rgb", np.ascontiguousarray(array(weight)[:, ::-1]))
            node.replace_input_with(1, made[weight])
        edit.prune()
        return PassResult(edit.model())
    order = edit.constant("reverse_channels/order", np.array([2, 1, 0], np.int64))
    value, before = edit.image, edit.first()
    # After padding, which is known by being first.
    while len(readers := _readers(value)) == 1 and _passes_on(readers[0]) and readers[0].graph is edit.graph:
        value, before = readers[0].outputs[0], _next(edit, readers[0])
    uses = tuple(value.uses())
    reroute(uses, edit.node("Gather", [value, order], "reverse_channels/image", before=before, axis=1))
    return PassResult(edit.model())


def _takes_three(node: ir.Node) -> bool:
    """Whether a node is a convolution of three channels, with known weights, that reads them together."""
    if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1:
        return False
    weight = constant(node.inputs[1])
    return weight is not None and weight.shape[1] == 3


def _passes_on(node: ir.Node) -> bool:
    """Whether a node leaves the channels alone."""
    return node.op_type in ("Identity", "Pad")


def _readers(value: ir.Value) -> list[ir.Node]:
    """What reads a value, but for its size alone."""
    return [node for node in value.consumers() if node.op_type != "Shape"]


def _first_readers(image: ir.Value) -> list[ir.Node]:
    """What reads the channels of an image, beyond padding."""
    found, values = [], [image]
    while values:
        for node in _readers(values.pop()):
            if _passes_on(node):
                values.append(node.outputs[0])
            else:
                found.append(node)
    return found


def _next(edit: Rewrite, node: ir.Node) -> ir.Node | None:
    """The node after one, in the graph's order."""
    nodes = iter(edit.graph)
    return next((next(nodes, None) for other in nodes if other is node), None)

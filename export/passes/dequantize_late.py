"""Dequantize what is computed where it is read, and once for each node that reads it."""

from fcn_deploy.export.graph.edit import Names, clone, initializers, names_read
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto, NodeProto


def dequantize_late(model: ModelProto) -> PassResult:
    """An equal model, in whose order of nodes 8 bits stay 8 bits until they are read.

    What crosses between two of its nodes, as skip connections do, is then a quarter of the bytes, and lies between no
    operator and its Q or DQ, which libraries run as one.
    """
    constant, names = set(initializers(model)), Names(model)
    for node in model.graph.node:
        if names_read(node) <= constant:
            constant.update(node.output)
    kept = {value.name for value in model.graph.output}  # by their names: results, and what subgraphs read
    for node in model.graph.node:
        kept |= names_read(node) - set(node.input)
    late = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in constant and node.output[0] not in kept
    }
    if not late:
        return PassResult(model, why_not="nothing that it computes is dequantized")
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        if node.output[0] in late:
            continue
        reader = clone(node)
        for place, name in enumerate(node.input):
            if name not in late:
                continue
            own = clone(late[name])
            reader.input[place] = own.output[0] = own.name = names(f"{name}/{node.output[0]}/{place}")
            nodes.append(own)
        nodes.append(reader)
    changed = clone(model)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return PassResult(changed)

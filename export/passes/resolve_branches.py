"""Put the one branch that is ever taken in the place of an If, as PyTorch's exporter writes a squeeze."""

import onnx_ir as ir
from fcn_deploy.export.graph.rewrite import Rewrite, array, constant, name_of
from fcn_deploy.export.passes.result import PassResult
from onnx import ModelProto

# What a tensor's channels are as many as before.
KEEP_CHANNELS = frozenset((
    "BatchNormalization", "Cast", "Clip", "Dropout", "Elu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
    "LogSoftmax", "Neg", "Relu", "Resize", "Sigmoid", "Softmax", "Tanh", "Upsample",
))  # fmt: skip


def resolve_branches(model: ModelProto) -> PassResult:
    """An equal model without those Ifs that ask what is known: a constant, or whether a tensor has one channel."""
    if not any(node.op_type == "If" for node in model.graph.node):
        return PassResult(model, why_not="it has no If")
    edit = Rewrite(model)
    resolved = 0
    for node in tuple(edit.graph):
        if node.op_type == "If" and (taken := _is_taken(node)) is not None:
            _inline(edit, node, node.attributes["then_branch" if taken else "else_branch"].as_graph())
            resolved += 1
    if not resolved:
        return PassResult(model, why_not="no If asks for a constant, or whether a tensor of known channels has one")
    edit.prune()
    return PassResult(edit.model())


def _is_taken(node: ir.Node) -> bool | None:
    """Whether an If takes its first branch, always; None where that is not known."""
    known = constant(node.inputs[0]) if node.inputs[0] is not None else None
    return bool(known.item()) if known is not None and known.size == 1 else _has_one_channel(node)


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node of this operator that gives a value; None where another does."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _has_one_channel(node: ir.Node) -> bool | None:
    """The value of a condition Equal(Shape(x)[1], 1); None where it is another, or cannot be told."""
    equal = _made_by(node.inputs[0], "Equal")
    if equal is None:
        return None
    gather = next((found for value in equal.inputs if (found := _made_by(value, "Gather")) is not None), None)
    shape = _made_by(gather.inputs[0], "Shape") if gather is not None else None
    number = next((known for v in equal.inputs if (known := constant(v)) is not None and known.size == 1), None)
    if gather is None or shape is None or shape.attributes or number is None:
        return None
    place = constant(gather.inputs[1])
    if place is None or place.size != 1 or int(place.item()) not in (1, -3):
        return None
    channels = _channels(shape.inputs[0])
    return None if channels is None else channels == int(number.item())


def _channels(value: ir.Value | None) -> int | None:
    """How many channels a tensor [N,C,H,W] has, by the convolution it comes from."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in KEEP_CHANNELS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("Conv", "ConvTranspose"):
        return None
    weight = constant(node.inputs[1])
    if weight is None or weight.ndim != 4:
        return None
    return weight.shape[0] if node.op_type == "Conv" else weight.shape[1] * node.attributes.get_int("group", 1)


def _inline(edit: Rewrite, node: ir.Node, branch: ir.Graph) -> None:
    """Let the nodes of a branch give what the If gave."""
    prefix, results = node.outputs[0].name, tuple(branch.outputs)
    branch.outputs.clear()
    for name, value in tuple(branch.initializers.items()):
        del branch.initializers[name]
        outer = edit.constant(f"{prefix}/{name}", array(value))
        value.replace_all_uses_with(outer)
        results = tuple(outer if result is value else result for result in results)
    for inner in tuple(branch):
        branch.remove(inner)
        for value in inner.outputs:
            if value.name:
                edit.rename(value, edit.name(f"{prefix}/{value.name}"))
        edit.graph.insert_before(node, inner)
    for result, wanted in zip(results, tuple(node.outputs), strict=True):
        # What a branch gives that is not its own comes from the graph around it.
        given = result if result.producer() is not None else edit.value(name_of(result))
        after = edit.node("Identity", [given], f"{wanted.name}/branch", name=f"{wanted.name}/identity", before=node)
        edit.replace(wanted, after)
    edit.remove(node)

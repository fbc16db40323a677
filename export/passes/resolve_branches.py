"""Put the one branch that is ever taken in the place of an If, as PyTorch's exporter writes a squeeze."""

from fcn_deploy.export.graph.edit import attributes, clone, constant, producers, prune
from onnx import GraphProto, ModelProto, NodeProto

# What a tensor's channels are as many as before.
KEEP_CHANNELS = frozenset((
    "BatchNormalization", "Cast", "Clip", "Dropout", "Elu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
    "LogSoftmax", "Neg", "Relu", "Resize", "Sigmoid", "Softmax", "Tanh", "Upsample",
))  # fmt: skip


def resolve_branches(model: ModelProto) -> ModelProto:
    """An equal model without those Ifs that ask whether a tensor has one channel, where its weights tell that."""
    if not any(node.op_type == "If" for node in model.graph.node):
        return model
    model = clone(model)
    nodes = []
    for node in model.graph.node:
        one = _has_one_channel(model, node) if node.op_type == "If" else None
        if one is None:
            nodes.append(node)
        else:
            nodes += _inlined(model, node, attributes(node)["then_branch" if one else "else_branch"])
    nodes = [clone(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    prune(model)
    return model


def _has_one_channel(model: ModelProto, node: NodeProto) -> bool | None:
    """The value of a condition Equal(Shape(x)[1], 1); None where it is another, or cannot be told."""
    made = producers(model)
    equal = made.get(node.input[0])
    if equal is None or equal.op_type != "Equal":
        return None
    gather = next((made[name] for name in equal.input if name in made and made[name].op_type == "Gather"), None)
    shape = made.get(gather.input[0]) if gather is not None else None
    values = [constant(model, name) for name in equal.input]
    number = next((value for value in values if value is not None and value.size == 1), None)
    if shape is None or shape.op_type != "Shape" or shape.attribute or number is None:
        return None
    index = constant(model, gather.input[1])
    if index is None or index.size != 1 or int(index.item()) not in (1, -3):
        return None
    channels = _channels(model, made, shape.input[0])
    return None if channels is None else channels == int(number.item())


def _channels(model: ModelProto, made: dict[str, NodeProto], name: str) -> int | None:
    """How many channels a tensor [N,C,H,W] has, by the convolution it comes from."""
    while (node := made.get(name)) is not None and node.op_type in KEEP_CHANNELS:
        name = node.input[0]
    if node is None or node.op_type not in ("Conv", "ConvTranspose"):
        return None
    weight = constant(model, node.input[1])
    if weight is None or weight.ndim != 4:
        return None
    return weight.shape[0] if node.op_type == "Conv" else weight.shape[1] * attributes(node).get("group", 1)


def _inlined(model: ModelProto, node: NodeProto, branch: GraphProto) -> list[NodeProto]:
    """The nodes of a branch, which give what the If gave."""
    names = {name: f"{node.output[0]}/{name}" for inner in branch.node for name in inner.output if name}
    for tensor in branch.initializer:
        names[tensor.name] = f"{node.output[0]}/{tensor.name}"
        kept = model.graph.initializer.add()
        kept.CopyFrom(tensor)
        kept.name = names[tensor.name]
    results = {value.name: wanted for value, wanted in zip(branch.output, node.output, strict=True)}
    nodes = []
    for inner in branch.node:
        copy = clone(inner)
        for place, name in enumerate(copy.input):
            copy.input[place] = names.get(name, name)
        for place, name in enumerate(copy.output):
            copy.output[place] = names.get(name, name)
        nodes.append(copy)
    for inner, wanted in results.items():
        given = NodeProto(
            op_type="Identity", name=f"{wanted}/identity", input=[names.get(inner, inner)], output=[wanted]
        )
        nodes.append(given)
    return nodes

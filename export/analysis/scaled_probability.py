"""One score that is a probability times 255, as masks of 8 bits are, or times 100: found by the model's end."""

import math
from dataclasses import dataclass

from fcn_deploy.export.analysis.model_end import last_activation
from fcn_deploy.export.graph.edit import attributes, label
from fcn_deploy.export.graph.index import GraphIndex
from onnx import ModelProto, NodeProto, TensorProto

AFTER = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Clip", "Cast", "Round", "Floor")
BEFORE = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Gather")
FACTORS = (255, 100)  # by others, such as the largest depth, what is between 0 and 1 becomes something else
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class ScaledProbability:
    """A probability that a model multiplies last.

    Attributes:
        name: of the probability.
        factor: that it is multiplied by: one of FACTORS.
        whole: whether the product becomes a whole number.
        node: that multiplies it, as notes name it.
    """

    name: str
    factor: float
    whole: bool
    node: str


def scaled_probability(model: ModelProto) -> ScaledProbability | None:
    """The probability whose multiple is a model's output; None where it is none, as far as operators tell."""
    index, whole = GraphIndex(model), False
    name = index.result
    while (node := index.producer(name)) is not None and node.op_type in AFTER:
        whole |= node.op_type in ("Round", "Floor")
        whole |= node.op_type == "Cast" and attributes(node)["to"] not in FLOATS
        name = node.input[0]
    if node is None or (found := _product(index, node)) is None:
        return None
    probability, factor = found
    if not any(math.isclose(factor, each, rel_tol=1e-5) for each in FACTORS) or not _is_probability(index, probability):
        return None
    return ScaledProbability(probability, factor, whole, label(node))


def _product(index: GraphIndex, node: NodeProto) -> tuple[str, float] | None:
    """(what a node multiplies, the number that it multiplies it by); None where it does something else."""
    if node.op_type not in ("Mul", "Div"):
        return None
    for place in (0, 1) if node.op_type == "Mul" else (1,):
        value = index.constant(node.input[place])
        if value is not None and value.size == 1 and (number := float(value.item())) > 0:
            return node.input[1 - place], number if node.op_type == "Mul" else 1 / number
    return None


def _is_probability(index: GraphIndex, name: str) -> bool:
    """Whether a tensor is a Sigmoid or a channel of a Softmax, or kept between 0 and 1, but for what moves it."""
    while True:
        node = index.producer(name)
        if last_activation(index, name) is not None or (node is not None and node.op_type == "HardSigmoid"):
            return True
        if node is not None and node.op_type == "Clip":
            limits = [index.input_constant(node, place) for place in (1, 2)]
            return all(limit is not None and limit == wanted for limit, wanted in zip(limits, (0, 1), strict=True))
        if node is None or node.op_type not in BEFORE:
            return False
        name = node.input[0]

"""INT8 as explicit QuantizeLinear and DequantizeLinear, inserted as one target wants it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.graph.edit import (
    Names,
    add_constants,
    attributes,
    clone,
    consumers,
    initializers,
    producers,
    prune,
)
from onnx import ModelProto, NodeProto, TensorProto, helper

ACTIVATIONS = ("Relu", "Clip")
SMALLEST_SCALE = 6.2e-5  # the smallest normal float16, so that scales survive FP16


PAIR_LIMIT = 128  # 255 · 128 < 2¹⁵


@dataclass(frozen=True)
class Scheme:
    """How a target wants its Q/DQ.

    Attributes:
        name: `cpu` or `tensorrt`.
        symmetric: activations are s8 around zero; otherwise u8 with a zero point.
        pairs: whether neighbouring weights must sum to at most PAIR_LIMIT. CPUs without VNNI add two products
            of u8 and s8 in 16 bits, which saturate beyond, and an engine travels to CPUs its builder never saw.
        outputs: whether outputs of convolutions and sums get Q/DQ as well, which ONNX Runtime needs to run
            them as integers; TensorRT fuses better without.
        int32_bias: whether biases become int32 (ONNX Runtime), or stay float (TensorRT refuses int32 ones).
        least_scale: of weights and symmetric activations; scales that become float16 must not leave its range.
    """

    name: str
    symmetric: bool
    pairs: bool
    outputs: bool
    int32_bias: bool
    least_scale: float


SCHEMES = {
    "cpu": Scheme("cpu", symmetric=False, pairs=True, outputs=True, int32_bias=True, least_scale=1e-12),
    "tensorrt": Scheme(
        "tensorrt", symmetric=True, pairs=False, outputs=False, int32_bias=False, least_scale=SMALLEST_SCALE
    ),
}


def convolutions(model: ModelProto) -> list[NodeProto]:
    """The nodes that can be quantised: convolutions with constant weights. Transposed ones never are."""
    known = initializers(model)
    return [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in known]


def result_of(model: ModelProto, node: NodeProto) -> str:
    """The tensor a convolution gives once its activation is applied, which targets fuse with it."""
    outputs = {value.name for value in model.graph.output}
    readers = [other for other in model.graph.node if node.output[0] in other.input]
    if len(readers) == 1 and readers[0].op_type in ACTIVATIONS and node.output[0] not in outputs:
        return readers[0].output[0]
    return node.output[0]


def measured_tensors(model: ModelProto) -> list[str]:
    """The tensors whose ranges any scheme may need: what convolutions read and give, and sums."""
    names: dict[str, None] = {}
    for node in convolutions(model):
        names[node.input[0]] = None
        names[result_of(model, node)] = None
    for node in model.graph.node:
        if node.op_type == "Add" and not any(name in initializers(model) for name in node.input):
            names.update(dict.fromkeys([*node.input, node.output[0]]))
    return list(names)


def quantize(
    model: ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    scheme: Scheme,
    kept: Collection[str] = (),
    means: Mapping[str, np.ndarray] | None = None,
    rounded: dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]] | None = None,
) -> ModelProto:
    """The model with Q/DQ around its convolutions.

    Args:
        model: a float32 core without batch norms.
        ranges: (low, high) of each of `measured_tensors`.
        scheme: of the target.
        kept: names of convolutions (by their output) that stay float.
        means: of each convolution's input, per channel: biases are corrected by what rounding the weights
            does to the mean of the output (Nagel et al., 2019, section 4.2).
        rounded: kept between calls for the same model and scheme, so that weights are rounded once.

    Weights are s8 per output channel.
    """
    model = clone(model)
    weights, names = initializers(model), Names(model)
    rounded = {} if rounded is None else rounded
    quantised = [node for node in convolutions(model) if node.output[0] not in kept]
    wanted: dict[str, None] = {}
    for node in quantised:
        wanted[node.input[0]] = None
        if scheme.outputs:
            wanted[result_of(model, node)] = None
    sums = [node for node in model.graph.node if node.op_type == "Add" and all(n in ranges for n in node.input)]
    for node in sums:
        # On CPUs a sum runs as integers where both its inputs come as integers already. TensorRT fuses a
        # convolution with the sum after it where the other branch is quantised, as it is where it feeds a
        # convolution too; the convolution's own result must not be.
        if scheme.outputs and all(name in wanted for name in node.input):
            wanted[node.output[0]] = None

    before: dict[str, list[NodeProto]] = {}  # output of a producer → nodes that follow it
    scales: dict[str, float] = {}
    for name in wanted:
        scales[name], zero = _activation(ranges[name], scheme)
        constants = {names(f"{name}/scale"): np.float32(scales[name]), names(f"{name}/zero"): zero}
        add_constants(model, constants)
        integers, floats = names(f"{name}/q"), names(f"{name}/dq")
        before[name] = [
            helper.make_node("QuantizeLinear", [name, *constants], [integers], name=f"{name}/quantize"),
            helper.make_node("DequantizeLinear", [integers, *constants], [floats], name=f"{name}/dequantize"),
        ]
    nodes = []
    for name in (value.name for value in model.graph.input if value.name in before):
        nodes += before[name]
    made: set[str] = set()
    readers = {id(node) for node in quantised} | {id(node) for node in sums}
    for node in model.graph.node:
        reads_quantised = id(node) in readers or scheme.outputs
        if id(node) in readers and node.op_type == "Conv":
            name = node.input[1]
            pairs = scheme.pairs and not depthwise(node, weights[name])
            if (name, pairs) not in rounded:
                rounded[name, pairs] = round_weights(weights[name].astype(np.float32), pairs, scheme.least_scale)
            scale = scales[node.input[0]]
            nodes += _weights(model, node, weights, rounded[name, pairs], scale, scheme, pairs, names, made, means)
        results = list(node.output)
        if reads_quantised:
            for index, name in enumerate(node.input):
                if name in before:
                    node.input[index] = names(f"{name}/dq")
        nodes.append(node)
        for name in results:
            nodes += before.get(name, [])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    prune(model)
    if scheme.outputs:
        _sum_integers(model)
    return model


def _sum_integers(model: ModelProto) -> None:
    """Give integers, as floats, to a convolution with Q/DQ before it alone: it gives scores, which nothing rounds.

    It runs in floats, whose sums depend on how many pixels there are: tiles would differ from the whole image in the
    last bits. Sums of integers below 2²⁴ are exact in any order; the scale is multiplied in afterwards.
    """
    made, known, names, nodes = producers(model), initializers(model), Names(model), []
    for node in model.graph.node:
        nodes.append(node)
        sources = [made.get(name) for name in node.input]
        if node.op_type != "Conv" or any(each is None or each.op_type != "DequantizeLinear" for each in sources):
            continue
        if any(reader.op_type == "QuantizeLinear" for reader in consumers(model, result_of(model, node))):
            continue
        (image, _, zero), (weight, _, zeros), (bias, scale, _) = (source.input for source in sources)
        low, high = -int(known[zero]), 255 - int(known[zero])
        flat = known[weight].reshape(len(known[weight]), -1).astype(np.int64)
        highest = np.maximum(flat * low, flat * high).sum(1)  # of any part of a sum; the least, with the other sign
        lowest = np.minimum(flat * low, flat * high).sum(1)
        if max(highest.max(), -lowest.min()) + np.abs(known[bias].astype(np.int64)).max() >= 2**24:
            continue
        result = node.output[0]
        one, ones, offset, unit, integers, taken, sums = (
            names(f"{result}/{name}") for name in ("one", "ones", "offset", "unit", "integers", "weight", "sums")
        )
        constants = {one: np.float32(1), ones: np.ones(len(flat), np.float32), offset: known[bias].astype(np.float32)}
        constants[unit] = known[scale].reshape(1, -1, *[1] * (known[weight].ndim - 2))
        add_constants(model, constants)
        node.input[:], node.output[:] = [integers, taken, offset], [sums]
        nodes[-1:] = [
            helper.make_node("DequantizeLinear", [image, one, zero], [integers], name=f"{result}/integers"),
            helper.make_node("DequantizeLinear", [weight, ones, zeros], [taken], name=f"{result}/weight", axis=0),
            node,
            helper.make_node("Mul", [sums, unit], [result], name=f"{result}/scale"),
        ]
    nodes = [clone(node) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    prune(model)


def depthwise(node: NodeProto, weight: np.ndarray) -> bool:
    """Whether each channel is filtered alone: those kernels multiply one by one in wider integers."""
    groups = attributes(node).get("group", 1)
    return groups > 1 and groups == len(weight) and weight.shape[1] == 1


def round_weights(weight: np.ndarray, pairs: bool, least_scale: float = 1e-12) -> tuple[np.ndarray, np.ndarray]:
    """Weights [K, C, h, w] as int8 and a scale per output channel, float32 [K].

    With `pairs`, any two weights that are neighbours in the order (C, h, w) or (h, w, C), in which kernels walk
    them, have magnitudes that sum to at most PAIR_LIMIT: the range is reduced where it must be, not everywhere.
    Each channel takes the number of steps, 64 to 127, of least squared error.
    """
    rows = weight.reshape(len(weight), -1)
    peak = np.abs(rows).max(1, keepdims=True)
    safe = np.where(peak > 0, peak, 1.0)
    if not pairs:
        scale = np.maximum(safe / 127, least_scale)
        integers = np.clip(np.round(rows / scale), -127, 127)
    else:
        best = np.full(rows.shape[:1], np.inf)
        integers, scale = np.zeros_like(rows), safe.copy()
        for steps in range(PAIR_LIMIT // 2, 128, 3):
            step = np.maximum(safe / steps, least_scale)
            tried = _limit_pairs(np.round(rows / step), weight.shape)
            error = ((tried * step - rows) ** 2).sum(1)
            better = error < best
            best[better], integers[better], scale[better] = error[better], tried[better], step[better]
    # A channel of zeros: a scale fine enough for its bias.
    scale = np.where(peak > 0, scale, 1e-3).astype(np.float32)[:, 0]
    return integers.reshape(weight.shape).astype(np.int8), scale


def _limit_pairs(integers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Pull neighbours whose magnitudes sum to more than PAIR_LIMIT towards zero, half of the excess each."""
    for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
        values = integers.reshape(shape).transpose(order)
        line = values.reshape(len(integers), -1).copy()
        size = np.abs(line)
        rows, places = np.nonzero(size[:, :-1] + size[:, 1:] > PAIR_LIMIT)
        # Few pairs are too large. Even ones first, then odd ones: within each, no weight is in two.
        for parity in (0, 1):
            chosen = places % 2 == parity
            row, left = rows[chosen], places[chosen]
            a, b = size[row, left], size[row, left + 1]
            excess = np.maximum(a + b - PAIR_LIMIT, 0)
            from_smaller = np.minimum(np.ceil(excess / 2), np.minimum(a, b))
            from_larger = excess - from_smaller
            size[row, left] = a - np.where(a <= b, from_smaller, from_larger)
            size[row, left + 1] = b - np.where(a <= b, from_larger, from_smaller)
        line = np.copysign(size, line)
        integers = line.reshape(values.shape).transpose(np.argsort(order)).reshape(len(integers), -1)
        if shape[2] == shape[3] == 1:
            break  # both orders are the same
    return integers


def _activation(low_high: tuple[float, float], scheme: Scheme) -> tuple[float, np.generic]:
    """Scale and zero point of an activation."""
    low, high = min(low_high[0], 0.0), max(low_high[1], 0.0)
    if scheme.symmetric:
        return max(max(-low, high) / 127, scheme.least_scale), np.int8(0)
    scale = max((high - low) / 255, 1e-9)
    return scale, np.uint8(np.clip(round(-low / scale), 0, 255))


def _weights(
    model: ModelProto,
    node: NodeProto,
    weights: Mapping[str, np.ndarray],
    rounded: tuple[np.ndarray, np.ndarray],
    input_scale: float,
    scheme: Scheme,
    pairs: bool,
    names: Names,
    made: set[str],
    means: Mapping[str, np.ndarray] | None,
) -> list[NodeProto]:
    """Rewrite a convolution's weight and bias; the DequantizeLinear nodes they need."""
    name = node.input[1]
    weight = weights[name].astype(np.float32)
    integers, scale = rounded
    per_channel = scale.reshape(-1, *[1] * (weight.ndim - 1))
    nodes = []
    base = f"{name}/pairs" if pairs else name  # two convolutions may share a weight and round it differently
    floats = names(f"{base}/dq")
    if floats not in made:
        made.add(floats)
        zeros = np.zeros(len(scale), np.int8)
        constants = {names(f"{base}/int8"): integers, names(f"{base}/scale"): scale, names(f"{base}/zero"): zeros}
        add_constants(model, constants)
        nodes.append(helper.make_node("DequantizeLinear", [*constants], [floats], name=f"{base}/dequantize", axis=0))
    node.input[1] = floats
    bias = weights[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(len(weight), np.float32)
    if means is not None:
        lost = (weight - integers * per_channel).reshape(len(weight), weight.shape[1], -1).sum(2)
        groups = attributes(node).get("group", 1)
        seen = means[node.input[0]].reshape(groups, -1)  # [groups, inputs of a group]
        per_output = np.repeat(seen, len(weight) // groups, axis=0)
        bias = bias + (lost * per_output).sum(1)
    bias_name = names(f"{node.output[0]}/bias")
    if scheme.int32_bias:
        bias_scale = (scale * np.float32(input_scale)).astype(np.float32)
        integers = np.clip(np.round(bias.astype(np.float64) / bias_scale), -(2.0**30), 2.0**30).astype(np.int32)
        constants = {
            names(f"{bias_name}/int32"): integers,
            names(f"{bias_name}/scale"): bias_scale,
            names(f"{bias_name}/zero"): np.zeros(len(bias), np.int32),
        }
        add_constants(model, constants)
        nodes.append(
            helper.make_node("DequantizeLinear", [*constants], [bias_name], name=f"{bias_name}/dequantize", axis=0)
        )
    else:
        add_constants(model, {bias_name: bias.astype(np.float32)})
    node.input[:] = [node.input[0], node.input[1], bias_name]
    return nodes


def quantised_convolutions(model: ModelProto) -> int:
    """How many convolutions read INT8 weights."""
    int8 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    made = {out for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in int8
            for out in node.output}  # fmt: skip
    return sum(node.op_type == "Conv" and node.input[1] in made for node in model.graph.node)

"""INT8 and FP8 as explicit QuantizeLinear and DequantizeLinear (Q/DQ), inserted as one target wants them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from fcn_deploy.export.graph.edit import Names, add_constants, attributes, clone, initializers, prune
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.quantization.half import with_opset_19
from fcn_deploy.export.quantization.round_weights import NO_LIMIT, depthwise, round_to_fp8, round_weights
from onnx import ModelProto, NodeProto, TensorProto, helper

LOW_TYPES = (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
FUSED_ACTIVATIONS = ("Relu", "Clip")  # that targets compute together with the convolution before them
SMALLEST_FLOAT16 = 6.2e-5  # the smallest normal one: scales that become float16 stay above it
Range = tuple[float, float]
RoundedWeights = tuple[np.ndarray, np.ndarray]  # int8 or E4M3 [K, C, h, w]; a scale per output channel, float32 [K]
INT8, FP8 = np.dtype(np.int8), np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = {INT8: 127.0, FP8: float(ml_dtypes.finfo(FP8).max)}  # 448
# TensorRT has FP8 kernels for dense convolutions of more than 16 channels in and out, and filters of at most 32 places
# (its release notes, and what its Model Optimizer leaves out); others would be cast there and back.
LEAST_FP8_CHANNELS, LARGEST_FP8_FILTER = 17, 32


@dataclass(frozen=True)
class Scheme:
    """How a target wants its Q/DQ.

    Attributes:
        name: its key in SCHEMES.
        symmetric: activations are s8 around zero; otherwise u8 with a zero point.
        pairs: whether neighbouring weights must sum to at most PAIR_LIMIT. CPUs without VNNI add two products
            of u8 and s8 in 16 bits, which saturate beyond, and an engine travels to CPUs its builder never saw.
        outputs: whether outputs of convolutions and sums get Q/DQ as well, which ONNX Runtime needs to run
            them as integers; TensorRT fuses better without.
        int32_bias: whether biases become int32 (ONNX Runtime), or stay float (TensorRT refuses int32 ones).
        least_scale: of weights and symmetric activations; scales that become float16 must not leave its range.
        dtype: what is stored: INT8 or FP8.
    """

    name: str
    symmetric: bool
    pairs: bool
    outputs: bool
    int32_bias: bool
    least_scale: float
    dtype: np.dtype = INT8

    def quantized(self, model: ModelProto) -> list[NodeProto]:
        """The convolutions of a model that get Q/DQ."""
        found = convolutions(model)
        if self.dtype == INT8:
            return found
        known = initializers(model)
        return [node for node in found if _has_fp8_kernel(node, known[node.input[1]])]


def _has_fp8_kernel(node: NodeProto, weight: np.ndarray) -> bool:
    channels = min(weight.shape[:2])
    return (
        attributes(node).get("group", 1) == 1
        and channels >= LEAST_FP8_CHANNELS
        and int(np.prod(weight.shape[2:])) <= LARGEST_FP8_FILTER
    )


SCHEMES = {
    "cpu": Scheme("cpu", symmetric=False, pairs=True, outputs=True, int32_bias=True, least_scale=NO_LIMIT),
    "tensorrt": Scheme(
        "tensorrt", symmetric=True, pairs=False, outputs=False, int32_bias=False, least_scale=SMALLEST_FLOAT16
    ),
}
SCHEMES["tensorrt-fp8"] = replace(SCHEMES["tensorrt"], name="tensorrt-fp8", dtype=FP8)


def convolutions(model: ModelProto) -> list[NodeProto]:
    """The nodes that can be quantized: convolutions with constant weights. Transposed ones never are."""
    known = initializers(model)
    return [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in known]


def result_of(graph: GraphIndex, node: NodeProto) -> str:
    """The tensor a convolution gives once its activation is applied, which targets fuse with it."""
    readers = graph.consumers(node.output[0])
    is_output = any(value.name == node.output[0] for value in graph.model.graph.output)
    if len(readers) == 1 and readers[0].op_type in FUSED_ACTIVATIONS and not is_output:
        return readers[0].output[0]
    return node.output[0]


def measured_tensors(model: ModelProto) -> list[str]:
    """The tensors whose ranges any scheme may need: what convolutions read and give, and sums."""
    graph, constants = GraphIndex(model), {tensor.name for tensor in model.graph.initializer}
    names: dict[str, None] = {}
    for node in convolutions(model):
        names[node.input[0]] = None
        names[result_of(graph, node)] = None
    for node in model.graph.node:
        if node.op_type == "Add" and not constants & set(node.input):
            names.update(dict.fromkeys([*node.input, node.output[0]]))
    return list(names)


def quantize(
    model: ModelProto,
    ranges: Mapping[str, Range],
    scheme: Scheme,
    kept: Collection[str] = (),
    means: Mapping[str, np.ndarray] | None = None,
    rounded: dict[tuple[str, bool], RoundedWeights] | None = None,
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

    Weights are s8, or E4M3, per output channel.
    """
    model = with_opset_19(model) if scheme.dtype == FP8 else clone(model)
    quantizer = _Quantizer(model, ranges, scheme, means, {} if rounded is None else rounded)
    model = quantizer.run(kept)
    if scheme.outputs:
        _sum_integers(model)
    return model


class _Quantizer:
    """Inserts Q/DQ into a model, which is changed."""

    def __init__(
        self,
        model: ModelProto,
        ranges: Mapping[str, Range],
        scheme: Scheme,
        means: Mapping[str, np.ndarray] | None,
        rounded: dict[tuple[str, bool], RoundedWeights],
    ) -> None:
        self.model, self.ranges, self.scheme, self.means, self.rounded = model, ranges, scheme, means, rounded
        self.weights, self.names = initializers(model), Names(model)
        self.scales: dict[str, float] = {}  # of the activations that are quantized
        self.dequantized: set[str] = set()  # weights that have their DequantizeLinear already

    def run(self, kept: Collection[str]) -> ModelProto:
        model = self.model
        quantized = [node for node in self.scheme.quantized(model) if node.output[0] not in kept]
        sums = [node for node in model.graph.node if self._is_sum(node)]
        pairs = {name: self._activation(name) for name in self._wanted(quantized, sums)}
        readers = {id(node) for node in (*quantized, *sums)}
        nodes = [node for value in model.graph.input for node in pairs.get(value.name, ())]
        for node in model.graph.node:
            reads_quantized = id(node) in readers
            if reads_quantized and node.op_type == "Conv":
                nodes += self._weights(node)
            if reads_quantized or self.scheme.outputs:
                for index, name in enumerate(node.input):
                    if name in pairs:
                        node.input[index] = self.names(f"{name}/dq")
            nodes.append(node)
            nodes += [follower for name in node.output for follower in pairs.get(name, ())]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        del model.graph.value_info[:]
        prune(model)
        return model

    def _is_sum(self, node: NodeProto) -> bool:
        """Whether a node adds two tensors of known range."""
        return node.op_type == "Add" and all(name in self.ranges for name in node.input)

    def _wanted(self, quantized: Collection[NodeProto], sums: Collection[NodeProto]) -> dict[str, None]:
        """The activations that get Q/DQ, in order."""
        graph, wanted = GraphIndex(self.model), dict[str, None]()
        for node in quantized:
            wanted[node.input[0]] = None
            if self.scheme.outputs:
                wanted[result_of(graph, node)] = None
        for node in sums:
            # On CPUs a sum runs as integers where both its inputs come as integers already. TensorRT fuses a
            # convolution with the sum after it where the other branch is quantized, as it is where it feeds a
            # convolution too; the convolution's own result must not be.
            if self.scheme.outputs and all(name in wanted for name in node.input):
                wanted[node.output[0]] = None
        return wanted

    def _activation(self, name: str) -> list[NodeProto]:
        """The Q and DQ that follow an activation."""
        self.scales[name], zero = _activation_scale(self.ranges[name], self.scheme)
        constants = {
            self.names(f"{name}/scale"): np.array(self.scales[name], np.float32),
            self.names(f"{name}/zero"): zero,
        }
        add_constants(self.model, constants)
        integers, floats = self.names(f"{name}/q"), self.names(f"{name}/dq")
        return [
            helper.make_node("QuantizeLinear", [name, *constants], [integers], name=f"{name}/quantize"),
            helper.make_node("DequantizeLinear", [integers, *constants], [floats], name=f"{name}/dequantize"),
        ]

    def _weights(self, node: NodeProto) -> list[NodeProto]:
        """Rewrite a convolution's weight and bias; the DequantizeLinear nodes they need."""
        name = node.input[1]
        weight = self.weights[name].astype(np.float32)
        pairs = self.scheme.pairs and not depthwise(node, weight)
        if (name, pairs) not in self.rounded:
            least = self.scheme.least_scale
            self.rounded[name, pairs] = (
                round_to_fp8(weight, least) if self.scheme.dtype == FP8 else round_weights(weight, pairs, least)
            )
        stored, scale = self.rounded[name, pairs]
        base = f"{name}/pairs" if pairs else name  # two convolutions may share a weight and round it differently
        floats, nodes = self.names(f"{base}/dq"), []
        if floats not in self.dequantized:
            self.dequantized.add(floats)
            nodes.append(self._dequantize(base, "fp8" if stored.dtype == FP8 else "int8", stored, scale, floats))
        bias, bias_name = self._bias(node, weight, stored, scale), self.names(f"{node.output[0]}/bias")
        if self.scheme.int32_bias:
            scale = (scale * np.float32(self.scales[node.input[0]])).astype(np.float32)
            rounded = np.clip(np.round(bias.astype(np.float64) / scale), -(2.0**30), 2.0**30).astype(np.int32)
            nodes.append(self._dequantize(bias_name, "int32", rounded, scale, bias_name))
        else:
            add_constants(self.model, {bias_name: bias.astype(np.float32)})
        node.input[:] = [node.input[0], floats, bias_name]
        return nodes

    def _dequantize(self, base: str, kind: str, stored: np.ndarray, scale: np.ndarray, result: str) -> NodeProto:
        """What is stored with a scale per output channel, as a node that gives floats."""
        constants = {
            self.names(f"{base}/{kind}"): stored,
            self.names(f"{base}/scale"): scale,
            self.names(f"{base}/zero"): np.zeros(len(scale), stored.dtype),
        }
        add_constants(self.model, constants)
        return helper.make_node("DequantizeLinear", [*constants], [result], name=f"{base}/dequantize", axis=0)

    def _bias(self, node: NodeProto, weight: np.ndarray, stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """A convolution's bias, corrected for what rounding its weights does to the mean of its output."""
        has_bias = len(node.input) > 2 and node.input[2]
        bias = self.weights[node.input[2]] if has_bias else np.zeros(len(weight), np.float32)
        if self.means is None:
            return bias
        lost = weight - stored.astype(np.float32) * scale.reshape(-1, *[1] * (weight.ndim - 1))
        lost = lost.reshape(len(weight), weight.shape[1], -1).sum(2)
        groups = attributes(node).get("group", 1)
        seen = self.means[node.input[0]].reshape(groups, -1)  # [groups, inputs of a group]
        return bias + (lost * np.repeat(seen, len(weight) // groups, axis=0)).sum(1)


def _activation_scale(low_high: Range, scheme: Scheme) -> tuple[float, np.ndarray]:
    """Scale and zero point of an activation."""
    low, high = min(low_high[0], 0.0), max(low_high[1], 0.0)
    if scheme.symmetric:
        return max(max(-low, high) / LARGEST[scheme.dtype], scheme.least_scale), np.array(0, scheme.dtype)
    scale = max((high - low) / 255, 1e-9)
    return scale, np.array(np.clip(round(-low / scale), 0, 255), np.uint8)


def _sum_integers(model: ModelProto) -> None:
    """Give integers, as floats, to a convolution with Q/DQ before it alone: it gives scores, which nothing rounds.

    It runs in floats, whose sums depend on how many pixels there are: tiles would differ from the whole image in the
    last bits. Sums of integers below 2²⁴ are exact in any order; the scale is multiplied in afterwards.
    """
    graph, known, names, nodes = GraphIndex(model), initializers(model), Names(model), []
    for node in model.graph.node:
        dequantized = _dequantized_inputs(node, graph) if node.op_type == "Conv" else None
        if dequantized is None or any(
            reader.op_type == "QuantizeLinear" for reader in graph.consumers(result_of(graph, node))
        ):
            nodes.append(clone(node))
            continue
        nodes += _on_integers(model, node, dequantized, known, names) or [clone(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    prune(model)


def _dequantized_inputs(node: NodeProto, graph: GraphIndex) -> list[NodeProto] | None:
    """The nodes that give what a node reads; None unless all are DequantizeLinear."""
    sources = [graph.producer(name) for name in node.input]
    dequantized = [source for source in sources if source is not None and source.op_type == "DequantizeLinear"]
    return dequantized if len(dequantized) == len(node.input) else None


def _on_integers(
    model: ModelProto, node: NodeProto, dequantized: Sequence[NodeProto], known: Mapping[str, np.ndarray], names: Names
) -> list[NodeProto]:
    """A convolution on the integers of its image, weight and bias, scaled after it; [] where sums are not exact."""
    (image, _, zero), (weight, _, zeros), (bias, scale, _) = (source.input for source in dequantized)
    low, high = -int(known[zero]), 255 - int(known[zero])
    flat = known[weight].reshape(len(known[weight]), -1).astype(np.int64)
    highest = np.maximum(flat * low, flat * high).sum(1)  # of any part of a sum; the least, with the other sign
    lowest = np.minimum(flat * low, flat * high).sum(1)
    if max(highest.max(), -lowest.min()) + np.abs(known[bias].astype(np.int64)).max() >= 2**24:
        return []
    result = node.output[0]
    one, ones, offset, unit, integers, taken, sums = (
        names(f"{result}/{name}") for name in ("one", "ones", "offset", "unit", "integers", "weight", "sums")
    )
    constants = {
        one: np.array(1, np.float32),
        ones: np.ones(len(flat), np.float32),
        offset: known[bias].astype(np.float32),
        unit: known[scale].reshape(1, -1, *[1] * (known[weight].ndim - 2)),
    }
    add_constants(model, constants)
    summed = clone(node)
    summed.input[:], summed.output[:] = [integers, taken, offset], [sums]
    return [
        helper.make_node("DequantizeLinear", [image, one, zero], [integers], name=f"{result}/integers"),
        helper.make_node("DequantizeLinear", [weight, ones, zeros], [taken], name=f"{result}/weight", axis=0),
        summed,
        helper.make_node("Mul", [sums, unit], [result], name=f"{result}/scale"),
    ]


def quantized_convolutions(model: ModelProto) -> int:
    """How many convolutions read INT8 or FP8 weights."""
    low = {tensor.name for tensor in model.graph.initializer if tensor.data_type in LOW_TYPES}
    made = {out for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in low
            for out in node.output}  # fmt: skip
    return sum(node.op_type == "Conv" and node.input[1] in made for node in model.graph.node)

"""FP16 and BF16 as casts in the graph, and their emulation in float32 for machines that cannot run them."""

from collections.abc import Collection

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import Names, add_constants, clone, initializers, prune
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT16_MAX = 65504.0
MAGNITUDE_OF = "largest of "  # before a tensor's name: an output of its largest magnitude
# Inputs that are float32 whatever the data is.
ALWAYS_FLOAT = {("Resize", 1), ("Resize", 2)}
# Operators whose result has the type that they name, not that of what they read, or that know no float16.
FLOAT_ONLY = ("Cast", "ConstantOfShape", "EyeLike", "Range", "RandomNormal", "RandomNormalLike", "RandomUniform",
              "RandomUniformLike", "Multinomial", "Bernoulli")  # fmt: skip


def half(
    model: ModelProto, kept: Collection[str] = (), interface: bool = False, kind: int = TensorProto.FLOAT16
) -> ModelProto:
    """The model in float16 or bfloat16, its input and output still float32.

    Args:
        model: a float32 core, perhaps with Q/DQ, whose scales become of the type too (opset 19 or newer).
        kept: nodes, by their first output, that stay float32; casts are put around them.
        interface: the input is of the type too, and the output where a half node gives it.
        kind: TensorProto.FLOAT16 or BFLOAT16.
    """
    narrow = helper.tensor_dtype_to_np_dtype(kind)
    model = with_opset_19(model)
    floats, constants, names = float_tensors(model), initializers(model), Names(model)
    kept = {*kept, *never_half(model, kind)}
    is_half = {model.graph.input[0].name: interface}
    nodes: list[NodeProto] = []
    made: set[str] = set()

    def as_type(name: str, wanted: bool) -> str:
        """The name under which a float tensor is had in the wanted type."""
        if name in constants:
            if not wanted:
                return name
            if (rounded := names(f"{name}/half")) not in made:
                made.add(rounded)
                add_constants(model, {rounded: constants[name].astype(narrow)})
            return rounded
        if is_half.get(name, False) == wanted:
            return name
        cast = names(f"{name}/to_{'half' if wanted else 'float'}")
        if cast not in made:
            made.add(cast)
            to = kind if wanted else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=to))
        return cast

    results = {value.name for value in model.graph.output}
    for node in model.graph.node:
        wanted = node.output[0] not in kept
        for index, name in enumerate(node.input):
            if name in floats and node.op_type != "Cast":  # which takes either
                node.input[index] = as_type(name, wanted and (node.op_type, index) not in ALWAYS_FLOAT)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in floats:
                continue
            is_half[name] = wanted
            if name in results and wanted and not interface:
                node.output[index] = plain = names(f"{name}/result")
                is_half[plain] = True
                nodes.append(helper.make_node("Cast", [plain], [name], name=f"{name}/to_float", to=TensorProto.FLOAT))
                is_half[name] = False
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    for value in (model.graph.input[0], *model.graph.output):
        if is_half[value.name]:
            value.type.tensor_type.elem_type = kind
    prune(model)
    return model


def emulate_half(model: ModelProto, kept: Collection[str] = (), kind: int = TensorProto.FLOAT16) -> ModelProto:
    """A float32 model that rounds as `half` would: run it with optimisation off.

    ONNX Runtime's CPU runs FP16 and BF16 graphs in float32, and casts around whole nodes are removed, so they cannot be
    judged there. Pairs of casts between nodes of a float32 graph it keeps: each half tensor is rounded by one.
    """
    return _HalfEmulator(clone(model), kept, kind).run()


class _HalfEmulator:
    """Writes the rounding of a type into a model, which is changed."""

    def __init__(self, model: ModelProto, kept: Collection[str], kind: int) -> None:
        self.model, self.kept, self.kind = model, {*kept, *never_half(model, kind)}, kind
        self.floats, self.names = float_tensors(model), Names(model)
        self.rounded: dict[str, str] = {}  # tensor → what it is as half
        self.wide: set[str] = set()  # float32 tensors, rounded where a half node reads them

    def run(self) -> ModelProto:
        model = self.model
        self._round_constants()
        results, image = [value.name for value in model.graph.output], model.graph.input[0].name
        self.wide.add(image)
        nodes = self._rounding(image)
        for node in list(model.graph.node):
            is_kept = node.output[0] in self.kept
            for index, name in enumerate(node.input):
                # What is half is so for all its readers; what is not is cast for those that are.
                if name in self.rounded and not (is_kept and name in self.wide):
                    node.input[index] = self.rounded[name]
            nodes.append(node)
            for name in node.output:
                # TensorRT fuses DequantizeLinear with what reads it, so its result is never rounded.
                if name in self.floats and node.op_type != "DequantizeLinear":
                    nodes += self._rounding(name)
                    if is_kept:
                        self.wide.add(name)
        self._round_results(nodes, results)
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        del model.graph.value_info[:]
        return model

    def _round_constants(self) -> None:
        constants, narrow = initializers(self.model), helper.tensor_dtype_to_np_dtype(self.kind)
        for node in self.model.graph.node:
            if node.output[0] in self.kept:
                continue
            for index, name in enumerate(node.input):
                if name not in constants or name not in self.floats or (node.op_type, index) in ALWAYS_FLOAT:
                    continue
                if (new := self.names(f"{name}/rounded")) not in constants:
                    with np.errstate(over="ignore"):
                        constants[new] = constants[name].astype(narrow).astype(np.float32)
                    add_constants(self.model, {new: constants[new]})
                node.input[index] = new

    def _rounding(self, name: str) -> list[NodeProto]:
        """The nodes that round a tensor."""
        narrow, self.rounded[name] = self.names(f"{name}/narrow"), self.names(f"{name}/emulated")
        return [
            helper.make_node("Cast", [name], [narrow], name=narrow, to=self.kind),
            helper.make_node("Cast", [narrow], [self.rounded[name]], name=self.rounded[name], to=TensorProto.FLOAT),
        ]

    def _round_results(self, nodes: Collection[NodeProto], results: Collection[str]) -> None:
        """Let the model's outputs, `results`, be what is rounded."""
        for old in results:
            if old not in self.rounded or old in self.wide:
                continue
            renamed = {old: self.names(f"{old}/plain"), self.rounded[old]: old}
            for node in nodes:
                node.output[:] = [renamed.get(name, name) for name in node.output]
                node.input[:] = [renamed.get(name, name) for name in node.input]


def with_magnitudes(model: ModelProto) -> ModelProto:
    """A float32 model with further outputs, `MAGNITUDE_OF + tensor`: the largest magnitude of each float tensor."""
    model, floats, nodes = clone(model), float_tensors(model), []
    names, sizes = Names(model), never_half(model)
    found = [model.graph.input[0].name]
    found += [
        name for node in model.graph.node if node.output[0] not in sizes for name in node.output if name in floats
    ]
    for name in found:
        magnitude, largest = names(f"{name}/abs"), MAGNITUDE_OF + name
        nodes.append(helper.make_node("Abs", [name], [magnitude], name=magnitude))
        nodes.append(helper.make_node("ReduceMax", [magnitude], [largest], name=f"{name}/max", keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    model.graph.node.extend(nodes)
    return model


def overflowing(largest: dict[str, float], model: ModelProto, margin: float = 0.5) -> set[str]:
    """Nodes, by first output, that cannot be float16: they give or read a tensor beyond `margin` of float16's range.

    Args:
        largest: magnitude by tensor, measured on real images.
        model: the float32 core.
    """
    large = {name for name, value in largest.items() if not value <= FLOAT16_MAX * margin}
    heavy = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and np.abs(numpy_helper.to_array(tensor)).max(initial=0) > FLOAT16_MAX
    }
    return {
        node.output[0] for node in model.graph.node if (large | heavy) & {*node.input, *node.output}
    }  # fmt: skip


def never_half(model: ModelProto, kind: int = TensorProto.FLOAT16) -> set[str]:
    """Nodes, by first output, that stay float32 in any case: those of FLOAT_ONLY, and arithmetic on sizes.

    Transposed convolutions too where the type is BF16, of which TensorRT for RTX 1.7 has none in it.
    float16 holds whole numbers up to 2048 only, bfloat16 up to 256, so a size computed in them would be wrong.
    """
    constants, sizes, found = set(initializers(model)), set(), set()
    for node in model.graph.node:
        if any(item.HasField("g") or item.graphs for item in node.attribute):
            raise DeployError(
                f"node {node.name or node.output[0]} ({node.op_type}) has a graph inside; FP16 and BF16 cannot be "
                "written into networks with control flow: build without them"
            )
        read = [name for name in node.input if name and name not in constants]
        if node.op_type in ("Shape", "Size") or (read and all(name in sizes for name in read)):
            sizes.update(node.output)
            found.add(node.output[0])
        elif node.op_type in FLOAT_ONLY or (kind == TensorProto.BFLOAT16 and node.op_type == "ConvTranspose"):
            found.add(node.output[0])
        elif node.op_type == "Constant":
            constants.update(node.output)
            found.add(node.output[0])
    return found


def float_tensors(model: ModelProto) -> set[str]:
    """Names of the float32 tensors of a model."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info)
    names = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}


def with_opset_19(model: ModelProto) -> ModelProto:
    """A copy of opset 19 at least, where Q/DQ may be of FP8 and scales float16 or bfloat16.

    No operator of 18 means another thing in 19, which adds types and options: the number alone is raised.
    """
    model = clone(model)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, 19)
    return model

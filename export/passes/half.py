"""FP16 as casts in the graph, and its emulation in float32 for machines that cannot run it."""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from export.graph import add_constants, clone, initializers, prune

LARGEST = 65504.0  # of float16
# Inputs that are float32 whatever the data is.
ALWAYS_FLOAT = {("Resize", 1), ("Resize", 2)}


def half(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """The model in float16, its input and output still float32.

    Args:
        model: a float32 core, perhaps with Q/DQ, whose scales become float16 too (opset 19 or newer).
        kept: nodes, by their first output, that stay float32; casts are put around them.
    """
    model = with_opset_19(model)
    floats, constants = float_tensors(model), initializers(model)
    is_half: dict[str, bool] = {}
    nodes: list[NodeProto] = []
    made: set[str] = set()

    def as_type(name: str, wanted: bool) -> str:
        """The name under which a float tensor is had in the wanted type."""
        if name in constants:
            if not wanted:
                return name
            if f"{name}/half" not in made:
                made.add(f"{name}/half")
                add_constants(model, {f"{name}/half": constants[name].astype(np.float16)})
            return f"{name}/half"
        if is_half.get(name, False) == wanted:
            return name
        cast = f"{name}/to_{'half' if wanted else 'float'}"
        if cast not in made:
            made.add(cast)
            kind = TensorProto.FLOAT16 if wanted else TensorProto.FLOAT
            nodes.append(helper.make_node("Cast", [name], [cast], name=cast, to=kind))
        return cast

    results = {value.name for value in model.graph.output}
    for node in model.graph.node:
        wanted = node.output[0] not in kept
        for index, name in enumerate(node.input):
            if name in floats and (node.op_type, index) not in ALWAYS_FLOAT:
                node.input[index] = as_type(name, wanted)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name not in floats:
                continue
            is_half[name] = wanted
            if name in results and wanted:
                node.output[index] = f"{name}/half"
                is_half[f"{name}/half"] = True
                nodes.append(
                    helper.make_node("Cast", [f"{name}/half"], [name], name=f"{name}/to_float", to=TensorProto.FLOAT)
                )
                is_half[name] = False
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    prune(model)
    return model


def emulate_half(model: ModelProto, kept: Collection[str] = ()) -> ModelProto:
    """A float32 model that rounds as `half` would: run it with optimisation off.

    ONNX Runtime's CPU removes casts and runs FP16 graphs in float32, so they cannot be judged there. After
    each half tensor x, c = 8193·x and c - (c - x) has float16's 11 bits in its normal range (Dekker, 1971).
    Further outputs, `LARGEST_OF + tensor`, give the largest magnitude of each, to be held against LARGEST.
    """
    model = clone(model)
    floats, constants = float_tensors(model), initializers(model)
    for node in model.graph.node:
        if node.output[0] in kept:
            continue
        for index, name in enumerate(node.input):
            if name in constants and name in floats and (node.op_type, index) not in ALWAYS_FLOAT:
                with np.errstate(over="ignore"):
                    rounded = constants[name].astype(np.float16).astype(np.float32)
                if f"{name}/rounded" not in constants:
                    constants[f"{name}/rounded"] = rounded
                    add_constants(model, {f"{name}/rounded": rounded})
                node.input[index] = f"{name}/rounded"
    add_constants(model, {"half/factor": np.float32(8193)})
    results = {value.name for value in model.graph.output}
    nodes: list[NodeProto] = []
    rounded_names: dict[str, str] = {}

    def follow(name: str) -> None:
        steps = [
            ("Mul", [name, "half/factor"], f"{name}/c"),
            ("Sub", [f"{name}/c", name], f"{name}/rest"),
            ("Sub", [f"{name}/c", f"{name}/rest"], f"{name}/emulated"),
            ("Abs", [name], f"{name}/abs"),
        ]
        nodes.extend(helper.make_node(kind, reads, [out], name=out) for kind, reads, out in steps)
        largest = LARGEST_OF + name
        nodes.append(helper.make_node("ReduceMax", [f"{name}/abs"], [largest], name=f"{name}/max", keepdims=0))
        model.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
        rounded_names[name] = f"{name}/emulated"

    image = model.graph.input[0].name
    follow(image)
    for node in list(model.graph.node):
        for index, name in enumerate(node.input):
            if name in rounded_names and node.output[0] not in kept:
                node.input[index] = rounded_names[name]
        nodes.append(node)
        for name in node.output:
            if name in floats and node.output[0] not in kept and node.op_type != "DequantizeLinear":
                follow(name)
    for value in model.graph.output[:]:
        if value.name in results and value.name in rounded_names:
            old, new = value.name, rounded_names[value.name]
            for node in nodes:
                node.output[:] = [f"{old}/plain" if n == old else (old if n == new else n) for n in node.output]
                node.input[:] = [f"{old}/plain" if n == old else (old if n == new else n) for n in node.input]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    return model


LARGEST_OF = "largest of "


def overflowing(largest: dict[str, float], model: ModelProto, margin: float = 0.5) -> set[str]:
    """Nodes, by first output, that cannot be half: they give or read a tensor beyond `margin` of float16's range.

    Args:
        largest: magnitude by tensor, measured on real images.
        model: the float32 core.
    """
    large = {name for name, value in largest.items() if not value <= LARGEST * margin}
    heavy = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and np.abs(numpy_helper.to_array(tensor)).max(initial=0) > LARGEST
    }
    return {
        node.output[0] for node in model.graph.node if (large | heavy) & {*node.input, *node.output}
    }  # fmt: skip


def float_tensors(model: ModelProto) -> set[str]:
    """Names of the float32 tensors of a model."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info)
    names = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    return names | {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}


def with_opset_19(model: ModelProto) -> ModelProto:
    """A copy of opset 19 at least, where Q/DQ scales may be float16.

    The operators of a core mean the same in 18 and 19, so the number alone is raised; the caller compares.
    """
    model = clone(model)
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = max(entry.version, 19)
    return model

"""Refuses, before anything is run, what no engine can be built of: foreign operators, tensors far too large."""

import math
from pathlib import Path

import numpy as np
import onnx
from fcn_deploy.export.analysis.branches import is_of_size, nodes_within
from fcn_deploy.export.graph.edit import add_constants, attributes, clone, dims, label, producers
from fcn_deploy.export.graph.evaluate import RANDOM, evaluate
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, NodeProto, helper, numpy_helper, shape_inference

LARGEST = 1 << 28  # elements of a tensor, beyond what the image's size explains
PER_PIXEL = 4096  # elements per pixel of an image, which explain a tensor
SMALL = 64  # elements: of shape arithmetic, which is followed
USUAL_SIZE = (64, 64)  # (height, width) for which shapes are inferred, where a model declares none

# That give no more elements than they read.
ARITHMETIC = frozenset((
    "Add", "Cast", "Ceil", "Concat", "Constant", "Div", "Equal", "Floor", "Gather", "Greater", "Identity", "Less",
    "Max", "Min", "Mod", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
))  # fmt: skip
LOOPS = frozenset(("Loop", "Scan"))
SEQUENCES = frozenset((
    "SequenceConstruct", "SequenceEmpty", "SequenceAt", "SequenceInsert", "SequenceErase", "SequenceLength",
    "SequenceMap", "SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement",
))  # fmt: skip


def refuse_operators(model: ModelProto, path: Path) -> None:
    """Raise DeployError where a node, also one of a branch, is of a kind that no engine can be made of."""
    images = [value.name for value in model.graph.input]
    for node, made in nodes_within(model.graph.node):
        if node.domain not in ("", "ai.onnx"):
            remedy = (
                "quantise it without UseQDQContribOps (16 bits are of opset 21)"
                if node.op_type in ("QuantizeLinear", "DequantizeLinear")
                else "take the model from before ONNX Runtime optimised it"
                if node.domain.startswith("com.microsoft")
                else "export it with standard operators alone"
            )
            raise DeployError(f"{path}: node {label(node)} is a custom operator of the domain {node.domain}; {remedy}")
        if node.op_type == "If" and not is_of_size(node, made, images):
            raise DeployError(
                f"{path}: node {label(node)} chooses a branch by the values of the image, which no engine is built of; "
                "export the model with Where (torch.where) in its place, or traced"
            )
        if node.op_type in LOOPS:
            raise DeployError(
                f"{path}: node {label(node)} is a loop, which no engine is built of; export the model traced, or with "
                "its loops written out"
            )
        if node.op_type in SEQUENCES:
            raise DeployError(
                f"{path}: node {label(node)} works on sequences or optional values, and engines hold tensors alone; "
                "export the model with Split and Concat in their place"
            )
    refuse_changing(model, path)


def refuse_changing(model: ModelProto, path: Path | str) -> None:
    """Raise DeployError where a node, also one of a branch, makes an image's scores others each time or in a batch."""
    for node, _ in nodes_within(model.graph.node):
        if node.op_type in RANDOM:
            raise DeployError(
                f"{path}: node {label(node)} draws random numbers, so that no two runs of an image give the same "
                "scores; export the model without it"
            )
        if node.op_type in ("BatchNormalization", "Dropout") and _trains(model, node):
            raise DeployError(
                f"{path}: node {label(node)} is in training mode, so that scores change with what else is in a batch; "
                "export the model after eval()"
            )


def _trains(model: ModelProto, node: NodeProto) -> bool:
    if node.op_type == "Dropout":
        mode = GraphIndex(model).input_constant(node, 2)
        return mode is not None and bool(np.any(mode))
    return attributes(node).get("training_mode", 0) == 1


def refuse_huge_tensors(model: ModelProto, path: Path) -> None:
    """Raise DeployError where a tensor would be far larger than an image explains, before anything is run.

    Shapes are inferred for one image, and what is computed of shapes is computed here: onnx's own propagation of data
    and the runtimes would make the very tensors that are looked for.
    """
    for tensor in model.graph.sparse_initializer:
        _refuse_larger(math.prod(tensor.dims), LARGEST, f"weight {tensor.values.name}", path)
    if len(model.graph.input) != 1 or model.graph.input[0].type.WhichOneof("value") != "tensor_type":
        return
    sized, known = _without_weights(model)
    image = sized.graph.input[0]
    most, nodes = LARGEST + PER_PIXEL * _declare_numbers(image, path), list(sized.graph.node)
    made = producers(model)
    while True:
        try:
            inferred = shape_inference.infer_shapes(sized)
        except Exception:  # it is a help, not the judge: what cannot run is told by running it
            return
        shapes = {value.name: dims(value) for value in (*inferred.graph.input, *inferred.graph.value_info)}
        for name, shape in shapes.items():
            if name in made:
                elements = math.prod(side for side in shape if isinstance(side, int))
                _refuse_larger(elements, most, f"node {label(made[name])}", path)
        new: dict[str, np.ndarray] = {}
        left = []
        for node in nodes:
            values = _small_values(sized, node, known | new, shapes, path)
            new |= values
            if not values:
                left.append(node)
        if not new:
            return
        nodes, known = left, known | new
        del sized.graph.node[:]
        sized.graph.node.extend(nodes)
        add_constants(sized, new)


def _without_weights(model: ModelProto) -> tuple[ModelProto, dict[str, np.ndarray]]:
    """A model whose larger weights are inputs of their shapes alone, and the values of the smaller ones."""
    graph = onnx.GraphProto(name="shapes", node=model.graph.node, input=model.graph.input)
    known = {}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL:
            graph.initializer.append(tensor)
            known[tensor.name] = numpy_helper.to_array(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for value in model.graph.output:
        bare = clone(value)
        bare.type.tensor_type.ClearField("shape")
        graph.output.append(bare)
    return onnx.ModelProto(graph=graph, opset_import=model.opset_import, ir_version=model.ir_version), known


def _declare_numbers(image: onnx.ValueInfoProto, path: Path) -> int:
    """Give an image of four dimensions numbers where it has none; its pixels."""
    declared = [dim if isinstance(dim, int) and dim > 0 else None for dim in dims(image)]
    if len(declared) != 4:
        return math.prod(USUAL_SIZE)
    if math.prod(side or 1 for side in declared) > LARGEST:
        raise DeployError(f"{path} takes images of {dims(image)}, which is more than a machine can be asked for")
    usual = (1, 3, *USUAL_SIZE) if declared[1] or not declared[3] else (1, *USUAL_SIZE, 3)
    sides = [side or other for side, other in zip(declared, usual, strict=True)]
    for dim, side in zip(image.type.tensor_type.shape.dim, sides, strict=True):
        dim.dim_value = side
    return max(math.prod(USUAL_SIZE), math.prod(sides))


def _small_values(
    model: ModelProto,
    node: NodeProto,
    known: dict[str, np.ndarray],
    shapes: dict[str, list[int | str | None]],
    path: Path,
) -> dict[str, np.ndarray]:
    """What a node of shape arithmetic gives, where what it reads is known and small; else nothing."""
    if node.op_type == "Shape":
        shape = shapes.get(node.input[0])
        if shape is None or not all(isinstance(side, int) for side in shape):
            return {}
        ends = attributes(node)
        return {node.output[0]: np.array(shape[ends.get("start", 0) : ends.get("end", len(shape))], np.int64)}
    reads = [name for name in node.input if name]
    if not all(name in known for name in reads):
        return {}
    if node.op_type == "Range":
        start, limit, step = (float(known[name].item()) for name in reads)
        _refuse_larger((limit - start) / step if step else math.inf, LARGEST, f"node {label(node)}", path)
    if node.op_type not in ARITHMETIC:
        return {}
    try:
        values = dict(zip(node.output, evaluate(model, node, known), strict=True))
    except Exception:  # what the evaluator lacks is not followed
        return {}
    return values if all(isinstance(v, np.ndarray) and v.size <= SMALL for v in values.values()) else {}


def _refuse_larger(elements: float, most: int, what: str, path: Path) -> None:
    if not elements <= most:
        raise DeployError(f"{path}: {what} makes a tensor of {elements:,.0f} elements, which no network needs")

"""Read an ONNX file from anywhere, or say in one line why it cannot be taken."""

import heapq
import math
import os
from pathlib import Path

import numpy as np
import onnx
from fcn_deploy.export.graph.edit import (
    add_constants,
    attributes,
    clone,
    constant,
    dims,
    label,
    names_read,
    opset,
    producers,
    prune,
)
from fcn_deploy.export.graph.evaluate import evaluate
from fcn_deploy.export.passes.resolve_branches import resolve_branches
from fcn_deploy.runtime.errors import DeployError, MisuseError
from onnx import (
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    helper,
    inliner,
    numpy_helper,
    shape_inference,
)

OLDEST_OPSET = 7  # onnx's version converter knows what changed since then
LARGEST = 1 << 28  # elements of a tensor, beyond what the image's size explains
PER_PIXEL = 4096  # elements per pixel of an image, which explain a tensor
SMALL = 64  # elements: of shape arithmetic, which is followed
PROBED = (64, 64)  # (height, width) where a model declares none

# That give no more elements than they read.
ARITHMETIC = frozenset((
    "Add", "Cast", "Ceil", "Concat", "Constant", "Div", "Equal", "Floor", "Gather", "Greater", "Identity", "Less",
    "Max", "Min", "Mod", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
))  # fmt: skip
CONTROL_FLOW = frozenset(("If", "Loop", "Scan"))
SEQUENCES = frozenset((
    "SequenceConstruct", "SequenceEmpty", "SequenceAt", "SequenceInsert", "SequenceErase", "SequenceLength",
    "SequenceMap", "SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement",
))  # fmt: skip


def load_model(path: str | os.PathLike, output: str | None = None) -> ModelProto:
    """Read, repair and check an ONNX file.

    Weights that are listed as inputs are so no longer, local functions are inlined, and nodes are in order.

    Args:
        path: the file; weights beside it are read too.
        output: keep this output alone, and what it needs; None: all.

    Raises:
        MisuseError: no such file or output.
        DeployError: what it holds cannot be taken: the node and the reason, in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name an .onnx model")
    try:
        model = onnx.load(path, load_external_data=False)
        # An empty or foreign file may parse as a model without a graph.
        if not model.graph.node or not model.graph.output:
            raise ValueError("it has no nodes or no output")
    except Exception as error:  # protobuf's and onnx's errors share no base class
        raise _invalid(path, error) from error
    version, newest = opset(model), onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise DeployError(f"{path} is of opset {version}; {OLDEST_OPSET} to {newest} are taken: export it again")
    if output is not None:
        names = [value.name for value in model.graph.output]
        if output not in names:
            raise MisuseError(f"{path} has no output {output!r}; it has {', '.join(names)}")
        kept = next(value for value in model.graph.output if value.name == output)
        model.graph.output.insert(0, kept)
        del model.graph.output[1:]
    _load_weights(model, path)
    # What older rules say of inputs is mended below.
    model.ir_version = max(model.ir_version, 8)
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if not inputs:
        raise _invalid(path, "it has no input")
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for value in inputs:
        if value.type.WhichOneof("value") == "tensor_type" and not value.type.tensor_type.HasField("shape"):
            raise DeployError(
                f"{path}: input {value.name} has no rank, so that nobody can tell whether it is an image; give it the "
                "shape [N,C,H,W] and export it again"
            )
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
    except Exception as error:
        raise _invalid(path, error) from error
    sort(model, str(path))
    model = resolve_branches(model).model
    prune(model)
    _refuse_operators(model, path)
    # Shapes that an exporter left out, or that are wrong, are no error of the graph.
    del model.graph.value_info[:]
    shapes = [(value, clone(value)) for value in model.graph.output]
    for value, _ in shapes:
        kind = value.type.tensor_type.elem_type or TensorProto.FLOAT
        if value.type.WhichOneof("value") in (None, "tensor_type"):
            value.type.tensor_type.elem_type = kind
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise _invalid(path, error) from error
    for value, before in shapes:
        value.CopyFrom(before)
    _refuse_huge(model, path)
    return model


def _invalid(path: Path, reason: object) -> DeployError:
    return DeployError(f"{path} is not a valid ONNX model: {' '.join(str(reason).split())[:300]}")


def _load_weights(model: ModelProto, path: Path) -> None:
    """Read weights that are kept in other files."""
    for tensor in external_data_helper._get_all_tensors(model):
        if tensor.data_type not in TensorProto.DataType.values():
            raise _invalid(path, f"weight {tensor.name} is of an unknown type, {tensor.data_type}")
        if not external_data_helper.uses_external_data(tensor):
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = path.parent / entries.get("location", "")
        if not file.is_file():
            raise DeployError(
                f"{path} keeps weights ({tensor.name}) in {entries.get('location') or 'a file without a name'}, which "
                "is not beside it; copy that file there too"
            )
        try:
            offset = int(entries.get("offset", 0))
            wanted = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            found = int(entries.get("length", file.stat().st_size - offset))
        except (ValueError, KeyError, TypeError) as error:
            raise _invalid(path, f"where {tensor.name} lies in {file.name}: {error}") from error
        packed = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4)
        if not packed and (min(found, file.stat().st_size - offset) < wanted or min(offset, wanted) < 0):
            raise DeployError(
                f"{path} wants {wanted} bytes at {offset} of {file.name} for {tensor.name}, and the file has "
                f"{file.stat().st_size}; it is truncated, or belongs to another model: copy it again"
            )
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise DeployError(f"{path}: its weights cannot be read: {' '.join(str(error).split())[:300]}") from error


def sort(model: ModelProto, name: str) -> None:
    """Put the nodes of a graph in an order in which each reads what earlier ones gave; in place.

    Raises:
        DeployError: a cycle, or a tensor that nothing gives.
    """
    nodes, made = list(model.graph.node), producers(model)
    names = [name for node in nodes for name in node.output if name]
    if len(names) > len(made):
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise DeployError(f"{name} gives {twice} by two nodes, the second {label(made[twice])}; export it again")
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    known |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    index = {id(node): place for place, node in enumerate(nodes)}
    waits: list[set[int]] = []
    readers: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        for read in node.input:
            if read not in known and read not in made:
                raise DeployError(f"{name}: node {label(node)} reads {read}, which nothing gives; export it again")
        waits.append({index[id(made[read])] for read in names_read(node) if read in made})
        for before in waits[-1]:
            readers.setdefault(before, []).append(place)
    left = [len(before) for before in waits]
    ready = [place for place, count in enumerate(left) if not count]
    order = []
    while ready:
        place = heapq.heappop(ready)
        order.append(place)
        for reader in readers.get(place, ()):
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        ordered = set(order)
        place = next(place for place in range(len(nodes)) if place not in ordered)
        seen: list[int] = []
        while place not in seen:
            seen.append(place)
            place = min(before for before in waits[place] if before not in ordered)
        cycle = [label(nodes[place]) for place in reversed(seen[seen.index(place) :])]
        raise DeployError(f"{name} has a cycle, and a network has none: {' → '.join([*cycle, cycle[0]][:6])}")
    if order != list(range(len(nodes))):
        nodes = [clone(nodes[place]) for place in order]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _refuse_operators(model: ModelProto, path: Path) -> None:
    """Raise DeployError where a node is of a kind that no engine can be made of."""
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            remedy = (
                "take the model from before ONNX Runtime optimised it"
                if node.domain.startswith("com.microsoft")
                else "export it with standard operators alone"
            )
            raise DeployError(f"{path}: node {label(node)} is a custom operator of the domain {node.domain}; {remedy}")
        if node.op_type in CONTROL_FLOW:
            raise DeployError(
                f"{path}: node {label(node)} is control flow, which no engine is built of; export the model with its "
                "sizes fixed or its branches resolved"
            )
        if node.op_type in SEQUENCES:
            raise DeployError(
                f"{path}: node {label(node)} works on sequences or optional values, and engines hold tensors alone; "
                "export the model with Split and Concat in their place"
            )
        if node.op_type in ("BatchNormalization", "Dropout") and _trains(model, node):
            raise DeployError(
                f"{path}: node {label(node)} is in training mode, so that scores change with what else is in a batch; "
                "export the model after eval()"
            )


def _trains(model: ModelProto, node: NodeProto) -> bool:
    if node.op_type == "Dropout":
        mode = constant(model, node.input[2]) if len(node.input) > 2 and node.input[2] else None
        return mode is not None and bool(np.any(mode))
    return attributes(node).get("training_mode", 0) == 1


def _refuse_huge(model: ModelProto, path: Path) -> None:
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
    pixels = _size_for_inference(image, path)
    most, nodes = LARGEST + PER_PIXEL * pixels, list(sized.graph.node)
    made = producers(model)
    while True:
        try:
            inferred = shape_inference.infer_shapes(sized)
        except Exception:  # it is a help, not the judge: what cannot run is told by running it
            return
        shapes = {value.name: dims(value) for value in (*inferred.graph.input, *inferred.graph.value_info)}
        for name, shape in shapes.items():
            if name in made:
                sides = math.prod(side for side in shape if isinstance(side, int))
                _refuse_larger(sides, most, f"node {label(made[name])}", path)
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


def _size_for_inference(image: onnx.ValueInfoProto, path: Path) -> int:
    """Give an image of four dimensions numbers where it has none; its pixels."""
    given = [dim if isinstance(dim, int) and dim > 0 else None for dim in dims(image)]
    if len(given) != 4:
        return math.prod(PROBED)
    if math.prod(side or 1 for side in given) > LARGEST:
        raise DeployError(f"{path} takes images of {dims(image)}, which is more than a machine can be asked for")
    usual = (1, 3, *PROBED) if given[1] or not given[3] else (1, *PROBED, 3)
    sides = [side or other for side, other in zip(given, usual, strict=True)]
    for dim, side in zip(image.type.tensor_type.shape.dim, sides, strict=True):
        dim.dim_value = side
    return max(math.prod(PROBED), math.prod(sides))


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
        found = attributes(node)
        return {node.output[0]: np.array(shape[found.get("start", 0) : found.get("end", len(shape))], np.int64)}
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

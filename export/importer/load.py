"""Read an ONNX file from anywhere, and mend it; or say in one line why it cannot be taken."""

import heapq
import math
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import onnx
from fcn_deploy.export.graph.edit import clone, dims, label, names_read, opset, producers, prune
from fcn_deploy.export.importer.limits import refuse_huge_tensors, refuse_operators
from fcn_deploy.export.passes.resolve_branches import resolve_branches
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from onnx import ModelProto, NodeProto, TensorProto, external_data_helper, helper, inliner

OLDEST_OPSET = 7  # onnx's version converter knows what changed since then
PACKED = (TensorProto.INT4, TensorProto.UINT4)  # more than one element a byte


def load_model(path: str | os.PathLike, output: str | None = None) -> ModelProto:
    """Read, repair and check an ONNX file.

    Weights that are listed as inputs are so no longer, nor is what no node reads; local functions are inlined, and
    nodes are in order.

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
    model = _parse(path)
    if output is not None:
        _keep_output(model, output, path)
    _load_weights(model, path)
    # What older rules say of inputs is mended below.
    model.ir_version = max(model.ir_version, 8)
    _drop_weights_from_inputs(model, path)
    try:
        if model.functions:
            model = inliner.inline_local_functions(model)
    except Exception as error:
        raise _invalid(path, error) from error
    _name_apart(model)
    sort(model, str(path))
    model = resolve_branches(model).model
    prune(model)
    _drop_unread_inputs(model)
    refuse_operators(model, path)
    _check(model, path)
    refuse_huge_tensors(model, path)
    return model


def declared_outputs(path: str | os.PathLike) -> dict[str, list[int | str | None]]:
    """Names and declared shapes of all outputs of an ONNX file that load_model takes; () where it declares none."""
    return {value.name: dims(value) for value in _parse(Path(path)).graph.output}


def _invalid(path: Path, reason: object) -> DeployError:
    return DeployError(f"{path} is not a valid ONNX model: {' '.join(str(reason).split())[:300]}")


def _parse(path: Path) -> ModelProto:
    """The file's graph, without weights that are kept in other files."""
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
    return model


def _keep_output(model: ModelProto, output: str, path: Path) -> None:
    names = [value.name for value in model.graph.output]
    if output not in names:
        raise MisuseError(f"{path} has no output {output!r}; it has {', '.join(names)}")
    kept = clone(model.graph.output[names.index(output)])
    del model.graph.output[:]
    model.graph.output.append(kept)


def _drop_weights_from_inputs(model: ModelProto, path: Path) -> None:
    """Take weights off the inputs, where old files list them. Raises DeployError where no input of a rank is left."""
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


def _name_apart(model: ModelProto) -> None:
    """Give nodes of one name names of their own, as ONNX Runtime wants them; in place."""
    taken = {node.name for node in model.graph.node}
    seen: set[str] = set()
    for node in model.graph.node:
        if node.name and node.name in seen:
            node.name = next(name for place in count(2) if (name := f"{node.name}_{place}") not in taken)
        seen.add(node.name)
        taken.add(node.name)


def _drop_unread_inputs(model: ModelProto) -> None:
    """Take off inputs that no node reads, but for one: what they are given changes nothing."""
    read = {name for node in model.graph.node for name in names_read(node)}
    inputs = [value for value in model.graph.input if value.name in read]
    if inputs and len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)


def _check(model: ModelProto, path: Path) -> None:
    """onnx's own check; shapes that an exporter left out, or that are wrong, are no error of the graph."""
    del model.graph.value_info[:]
    model.graph.name = model.graph.name or "graph"  # onnx asks for one, which no runtime reads
    outputs = [(value, clone(value)) for value in model.graph.output]
    for value, _ in outputs:
        kind = value.type.tensor_type.elem_type or TensorProto.FLOAT
        if value.type.WhichOneof("value") in (None, "tensor_type"):
            value.type.tensor_type.elem_type = kind
            value.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise _invalid(path, error) from error
    for value, before in outputs:
        value.CopyFrom(before)


def _load_weights(model: ModelProto, path: Path) -> None:
    """Read weights that are kept in other files."""
    for tensor in external_data_helper._get_all_tensors(model):
        if tensor.data_type not in TensorProto.DataType.values():
            raise _invalid(path, f"weight {tensor.name} is of an unknown type, {tensor.data_type}")
        if external_data_helper.uses_external_data(tensor):
            _check_external(tensor, path)
    try:
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise DeployError(f"{path}: its weights cannot be read: {one_line(error, 300)}") from error


def _check_external(tensor: TensorProto, path: Path) -> None:
    """Raise DeployError where the file that keeps a weight is absent, or too short."""
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
    if tensor.data_type in PACKED:
        return
    if min(found, file.stat().st_size - offset) < wanted or min(offset, wanted) < 0:
        raise DeployError(
            f"{path} wants {wanted} bytes at {offset} of {file.name} for {tensor.name}, and the file has "
            f"{file.stat().st_size}; it is truncated, or belongs to another model: copy it again"
        )


def sort(model: ModelProto, name: str) -> None:
    """Put the nodes of a graph in an order in which each reads what earlier ones gave; in place.

    Raises:
        DeployError: a cycle, or a tensor that nothing gives.
    """
    nodes, made = list(model.graph.node), producers(model)
    _check_names(model, nodes, made, name)
    index = {id(node): place for place, node in enumerate(nodes)}
    waits = [{index[id(made[read])] for read in names_read(node) if read in made} for node in nodes]
    order = _in_order(waits)
    if len(order) < len(nodes):
        cycle = [label(nodes[place]) for place in _cycle(waits, set(order))]
        raise DeployError(f"{name} has a cycle, and a network has none: {' → '.join([*cycle, cycle[0]][:6])}")
    if order != list(range(len(nodes))):
        nodes = [clone(nodes[place]) for place in order]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _check_names(model: ModelProto, nodes: Sequence[NodeProto], made: Mapping[str, NodeProto], name: str) -> None:
    """Raise DeployError where two nodes give one tensor, or none gives one that is read."""
    seen: set[str] = set()
    for node in nodes:
        for result in filter(None, node.output):
            if result in seen:
                raise DeployError(
                    f"{name} gives {result} by two nodes, the second {label(made[result])}; export it again"
                )
            seen.add(result)
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)} | {""}
    known |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    for node in nodes:
        for read in node.input:
            if read not in known and read not in made:
                raise DeployError(f"{name}: node {label(node)} reads {read}, which nothing gives; export it again")


def _in_order(waits: Sequence[set[int]]) -> list[int]:
    """Places such that each comes after those it waits for, and else as they were; those of a cycle are left out."""
    readers: dict[int, list[int]] = {}
    for place, before in enumerate(waits):
        for other in before:
            readers.setdefault(other, []).append(place)
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
    return order


def _cycle(waits: Sequence[set[int]], ordered: set[int]) -> list[int]:
    """The places of one cycle among those that are not ordered."""
    place = next(place for place in range(len(waits)) if place not in ordered)
    seen: list[int] = []
    while place not in seen:
        seen.append(place)
        place = min(before for before in waits[place] if before not in ordered)
    return seen[seen.index(place) :][::-1]

"""inspect-model: what a segmentation ONNX or an engine is, what of it runs where, and whether any size really works."""

import json
import shutil
import textwrap
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fcn_deploy.calibration.report.engine_report import report_of
from fcn_deploy.export.analysis.accepted_sizes import run_quietly, try_size
from fcn_deploy.export.analysis.fields import WholeImageError
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.build.config import TensorRTOptions, parse_targets
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.partition import cut_core
from fcn_deploy.export.build.profiles import default_profiles
from fcn_deploy.export.build.targets.tensorrt_plan import build_plan, parser_refusals
from fcn_deploy.export.graph.edit import dims, metadata, opset
from fcn_deploy.export.importer.card import SourceOptions
from fcn_deploy.export.importer.load import load_model
from fcn_deploy.export.importer.standard_form import Source, read_source
from fcn_deploy.runtime.backends import ORT_TARGETS, openvino
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_file import EngineFile
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.manifest import Stage, Upsampling
from fcn_deploy.runtime.model_card import CARD_KEY, ModelCard
from fcn_deploy.runtime.plan import available_memory
from fcn_deploy.runtime.segmenter import Segmenter
from fcn_deploy.runtime.verify import natural_noise
from onnx import ModelProto, NodeProto, TensorProto

# One pixel, one row, primes, a side eight times the other, sizes next to powers of two.
SIZES = ((1, 1), (1, 37), (7, 13), (31, 33), (61, 127), (64, 509), (257, 251))
LARGE = ((2160, 3840), (1080, 1920), (720, 1280), (480, 640))  # the first that memory allows is run too
MEMORY = 1 << 30  # bytes
GIVEN_SIZES = ((64, 64), (64, 96), (65, 97), (128, 192))  # where a model cannot be taken: what it does as it is
INTEGER_OPERATORS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
WIDTH = 120  # columns of text, at most


def inspect_model(
    path: Path,
    targets: Sequence[str] = (),
    memory: int | None = None,
    options: SourceOptions | None = None,
) -> dict[str, Any]:
    """What is known of a model, and found by running it.

    Args:
        path: of an .onnx model or an .engine.
        targets: what an ONNX is tried for: `cpu`, and GPUs as in parse_targets; (): the CPU, and the parser of
            TensorRT where one is installed.
        memory: bytes that the largest image may take; None: MEMORY, or half of what is free.
        options: what the user says of an ONNX that carries no card.

    Returns:
        A record, as `inspect-model --json` prints it; `ok`: every size that was tried works, and what was asked for by
        `targets` can be built.

    Raises:
        MisuseError: no such file.
        DeployError: a file that is broken, or neither.
    """
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name an .onnx model or an .engine")
    memory = memory or min(MEMORY, available_memory() // 2)
    with path.open("rb") as file:
        engine = file.read(4) == b"PK\x03\x04" or path.suffix.lower() == ".engine"
    about = {"file": str(path), "kind": "engine" if engine else "onnx", "bytes": path.stat().st_size}
    return about | (_engine(path, memory) if engine else _onnx(path, targets, memory, options or SourceOptions()))


def _onnx(path: Path, targets: Sequence[str], memory: int, options: SourceOptions) -> dict[str, Any]:
    given = load_model(path, options.output)
    about: dict[str, Any] = _graph(given) | {
        "producer": " ".join(filter(None, (given.producer_name, given.producer_version))),
        "inputs": [_value(value) for value in given.graph.input],
        "outputs": [_value(value) for value in given.graph.output],
        "card_is_its_own": metadata(given, CARD_KEY) is not None,
        "problem": None,
    }
    try:
        source = read_source(path, options)
        core = core_of(source)
        built = optimise_offline(core.model)
        stage = cut_core(built, core.card, cut=False)[0].stage
    except MisuseError:
        raise
    except DeployError as error:
        about |= {"problem": str(error), "as_given": _as_given(given), "targets": _targets(given, targets, None)}
        return about | {"notes": [], "runs": [], "ok": False}
    about |= _described(source.card, core.upsampling, source) | _reach(stage, built)
    about["targets"] = _targets(core.model, targets, core.card)
    about["notes"] = list(source.notes)
    about["runs"] = _runs_of_model(source, stage, memory)
    failed = any(run["problem"] for run in about["runs"])
    return about | {"ok": not failed and not (targets and any(each["problem"] for each in about["targets"].values()))}


def _engine(path: Path, memory: int) -> dict[str, Any]:
    with EngineFile(path) as file:
        file.verify()
        manifest = file.manifest
        report = report_of(file)
        graphs = [
            onnx.load_from_string(file.read(stage.file)) for stage in manifest.stages if stage.file.endswith(".onnx")
        ]
    about: dict[str, Any] = {
        "created_by": manifest.created_by,
        "target": manifest.target,
        "precision": manifest.precision,
        "backend": manifest.backend if manifest.gpu is None else manifest.gpu.library,
        "members": {name: entry["bytes"] for name, entry in manifest.members.items()},
        "card_is_its_own": True,
        "problem": None,
        "stages": [
            {
                "file": stage.file,
                "bytes": manifest.members[stage.file]["bytes"],
                "halo": stage.halo,
                "period": stage.period,
                "whole": stage.whole if stage.halo is None else "",
                "bytes_per_pixel": round(stage.bytes_per_pixel, 1),
            }
            for stage in manifest.stages
        ],
        "gpu": None,
        "agreement": asdict(report.agreement) if report is not None and report.agreement is not None else None,
        "notes": list(report.notes) if report is not None else [],
    }
    if graphs:
        about |= _graph(*graphs) | {"precision": manifest.precision}
    if manifest.gpu is not None:
        about["gpu"] = {
            "library": f"{manifest.gpu.library} {manifest.gpu.version}",
            "targets": manifest.gpu.targets,
            "profiles": [
                {"min": profile.min, "opt": profile.opt, "max": profile.max, "batch": profile.batch}
                for profile in manifest.gpu.profiles
            ],
        }
    about |= _described(manifest.card, manifest.upsampling)
    about["runs"], about["not_run"] = _runs_of_engine(path, memory)
    return about | {"ok": not any(run["problem"] for run in about["runs"])}


def _graph(*models: ModelProto) -> dict[str, Any]:
    """Opset, operators, parameters and precision of a network, in one part or more."""
    nodes = [node for model in models for node in _nodes(model.graph.node)]
    operators = Counter(f"{node.domain}:{node.op_type}" if node.domain else node.op_type for node in nodes)
    tensors = [tensor for model in models for tensor in model.graph.initializer]
    tensors += [
        item.t for node in nodes if node.op_type == "Constant" for item in node.attribute if item.name == "value"
    ]
    numbers = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE, TensorProto.INT8,
               TensorProto.UINT8, TensorProto.FLOAT8E4M3FN)  # fmt: skip
    kinds: Counter[int] = Counter()
    for tensor in tensors:
        if tensor.data_type in numbers:
            kinds[tensor.data_type] += int(np.prod(tensor.dims, dtype=np.int64))
    name = TensorProto.DataType.Name(kinds.most_common(1)[0][0]).lower() if kinds else "float32"
    precision = {"float": "float32", "double": "float64"}.get(name, name)
    if "QuantizeLinear" in operators or "DequantizeLinear" in operators:
        precision = "int8 (Q/DQ)"
    elif any(operator in operators for operator in INTEGER_OPERATORS):
        precision = "int8 (integer operators)"
    return {
        "opset": opset(models[0]),
        "operators": dict(operators.most_common()),
        "parameters": sum(kinds.values()),
        "precision": precision,
    }


def _nodes(nodes: Sequence[NodeProto]) -> list[NodeProto]:
    """Nodes, and those of their subgraphs."""
    found = list(nodes)
    for node in nodes:
        for item in node.attribute:
            for graph in (*item.graphs, *([item.g] if item.HasField("g") else [])):
                found += _nodes(graph.node)
    return found


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    shape = dims(value) if value.type.tensor_type.HasField("shape") else None
    return {"name": value.name, "type": {"float": "float32", "double": "float64"}.get(kind, kind), "shape": shape}


def _described(card: ModelCard, head: Upsampling, source: Source | None = None) -> dict[str, Any]:
    """The card, the head and the sizes."""
    if source is None:
        sizes = {"multiple": card.size_multiple, "smallest": card.smallest, "fit": "pad"}
    else:
        sizes = {"multiple": source.sizes.multiple, "smallest": source.sizes.smallest, "fit": source.fit}
    if (sizes["multiple"], sizes["smallest"]) == (1, 1):
        sizes["fit"] = ""
    found = {"mode": head.mode, "coordinates": head.coordinates, "factor": head.factor}
    return {"card": json.loads(card.to_json()), "head": found, "sizes": sizes}


def _reach(stage: Stage, core: ModelProto) -> dict[str, Any]:
    """What of an image a score depends on."""
    if stage.halo is None:
        return {"reach": {"whole": stage.whole}}
    try:
        fields = receptive_field(core).fields
    except WholeImageError as error:
        return {"reach": {"whole": str(error)}}
    return {
        "reach": {
            "whole": "",
            "field": [float(field.high - field.low + 1) for field in fields],
            "halo": stage.halo,
            "period": stage.period,
        }
    }


def _targets(core: ModelProto, targets: Sequence[str], card: ModelCard | None) -> dict[str, dict[str, Any]]:
    """For each target: what takes the network, what refuses it, and why, {"by", "problem", "refused": nodes}."""
    found: dict[str, dict[str, Any]] = {}
    for target in targets or ("cpu", "tensorrt"):
        if target == "cpu":
            found["cpu (onnxruntime)"] = _tried("onnxruntime", lambda: session(core.SerializeToString()))
            if openvino.installed():
                found["cpu (openvino)"] = _tried("openvino", lambda: openvino.OpenVinoSession(core.SerializeToString()))
        elif target in ORT_TARGETS:
            # Which nodes fall back to the CPU is told there alone.
            found[target] = _tried("onnxruntime", lambda: session(core.SerializeToString()))
        else:
            found[target] = _of_tensorrt(core, target, card)
    return found


def _tried(by: str, take) -> dict[str, Any]:
    """Whether something takes the network; `by`: its module, or what it is called."""
    with suppress(PackageNotFoundError):
        by = f"{by} {version(by)}"
    try:
        take()
        return {"by": by, "problem": "", "refused": []}
    except DeployError as error:
        return {"by": by, "problem": str(error), "refused": []}
    except Exception as error:  # of other libraries
        return {"by": by, "problem": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "refused": []}


def _of_tensorrt(core: ModelProto, target: str, card: ModelCard | None) -> dict[str, Any]:
    """What TensorRT's parser refuses; for GPUs that were named also whether it builds."""
    try:
        module, refused = parser_refusals(core)
    except DeployError as error:
        return {"by": "", "problem": str(error), "refused": []}
    found = {
        "by": module,
        "problem": f"its parser refuses {len(refused)} nodes" if refused else "",
        "refused": [{"node": node, "operator": operator, "reason": reason} for node, operator, reason in refused],
    }
    if not refused and card is not None and target != "tensorrt":
        options = TensorRTOptions(tuple(parse_targets(target)))
        built = _tried(module, lambda: build_plan(core, options, default_profiles(card)))
        return found | {"problem": built["problem"]}
    return found


def _runs_of_model(source: Source, stage: Stage, memory: int) -> list[dict[str, Any]]:
    """What the model gives for images of several sizes, one of them large."""
    run = session(source.model.SerializeToString())
    channels = source.card.channels

    def at(height: int, width: int) -> np.ndarray:
        image = np.random.default_rng(0).standard_normal((1, channels, height, width), np.float32)
        return run_quietly(run, image)[0]

    runs = []
    for size in _sizes(memory, stage.bytes_per_pixel):
        found, problem = try_size(at, *size), ""
        if found.failure:
            problem = found.failure
        elif found.nan:
            problem = "it gives NaN"
        elif found.shape != (1, source.sizes.scores, *size):
            problem = f"it gives {list(found.shape)}"
        runs.append({"size": size, "problem": problem})
    return runs


def _runs_of_engine(path: Path, memory: int) -> tuple[list[dict[str, Any]], str]:
    """The same of an engine, and why it is not run here where it is not."""
    runs: list[dict[str, Any]] = []
    try:
        net = Segmenter(path, memory=memory)
    except MisuseError:
        raise
    except DeployError as error:
        if path.suffix and _for_cpu(path):
            return [{"size": (0, 0), "problem": str(error)}], ""
        return [], str(error)
    with net:
        for size in _sizes(memory, net.network.bytes_per_pixel):
            image = natural_noise(*size, net.card, 0)
            try:
                result = net.values(image) if net.card.activation in ("multilabel", "none") else net(image)
                shape = result.shape[-2:]
                problem = "" if shape == size else f"it gives {list(result.shape)}"
                if result.dtype.kind == "f" and not np.isfinite(result).all():
                    problem = "it gives what is no number"
            except DeployError as error:
                problem = str(error)
            runs.append({"size": size, "problem": problem})
    return runs, ""


def _for_cpu(path: Path) -> bool:
    with EngineFile(path) as file:
        return file.manifest.target == "cpu"


def _sizes(memory: int, bytes_per_pixel: float) -> list[tuple[int, int]]:
    large = next((size for size in LARGE if size[0] * size[1] * bytes_per_pixel <= memory), None)
    return [*SIZES, *([large] if large else [])]


def _as_given(model: ModelProto) -> list[dict[str, Any]]:
    """What a model that cannot be taken does with images, at the sizes it declares or some small ones."""
    image = model.graph.input[0]
    kind, shape = image.type.tensor_type.elem_type, dims(image)
    if image.type.WhichOneof("value") != "tensor_type" or len(shape) != 4 or kind not in _NUMPY:
        return []
    last = isinstance(shape[3], int) and not isinstance(shape[1], int)
    sides = (1, 2) if last else (2, 3)
    channels = shape[3] if last else shape[1]
    if not isinstance(channels, int) or channels < 1:
        return []
    declared = [shape[side] if isinstance(shape[side], int) and shape[side] > 0 else 0 for side in sides]
    batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else 1
    try:
        run = session(model.SerializeToString(), optimise=False)
    except DeployError:
        return []

    def at(height: int, width: int) -> np.ndarray:
        size = (batch, height, width, channels) if last else (batch, channels, height, width)
        return run_quietly(run, np.random.default_rng(0).random(size).astype(_NUMPY[kind]))[0]

    found = []
    for height, width in dict.fromkeys((declared[0] or rows, declared[1] or wide) for rows, wide in GIVEN_SIZES):
        result = try_size(at, height, width)
        found.append({"size": (height, width), "shape": result.shape or None, "problem": result.failure})
    return found


_NUMPY = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
}


def show(about: dict[str, Any]) -> str:
    """The record as text."""
    rows: list[tuple[str, str]] = []

    def row(name: str, *parts: str) -> None:
        if text := ", ".join(part for part in parts if part):
            rows.append((name, text))

    engine = about["kind"] == "engine"
    opset_ = f"opset {about['opset']}" if "opset" in about else ""
    parameters = f"{_count(about['parameters'])} parameters" if "parameters" in about else ""
    kind = f"engine for {about['target']}" if engine else "ONNX"
    by = (
        f"by {about.get('created_by') or about.get('producer')}"
        if about.get("created_by") or about.get("producer")
        else ""
    )
    row("file", kind, _bytes(about["bytes"]), parameters, about["precision"], opset_, by)
    for name in ("input", "output"):
        for value in about.get(f"{name}s", ()):
            row(name, f"{value['name']}: {value['type']} {_shape(value['shape'])}")
    if engine:
        row("run by", about["backend"])
    if "card" in about:
        _show_card(about, row)
    if "stages" in about:
        for stage in about["stages"]:
            tiles = (
                f"tiles with a halo of {stage['halo'][0]}×{stage['halo'][1]} pixels"
                if stage["halo"]
                else stage["whole"]
            )
            row("stage", f"{stage['file']} ({_bytes(stage['bytes'])})", tiles)
    if about.get("gpu"):
        row("plan", f"by {about['gpu']['library']} for {', '.join(about['gpu']['targets'])}")
        for profile in about["gpu"]["profiles"]:
            ends = ":".join(f"{profile[corner][0]}x{profile[corner][1]}" for corner in ("min", "opt", "max"))
            row("profile", ends, f"batches of up to {profile['batch']}")
    if "operators" in about:
        row("operators", *(f"{name} {count}" for name, count in about["operators"].items()))
    for target, found in about.get("targets", {}).items():
        row(target, f"refused: {found['problem']}" if found["problem"] else f"taken by {found['by']}")
        for each in found["refused"]:
            row("", f"{each['node'] or 'a node'} ({each['operator']}): {each['reason']}")
    if agreement := about.get("agreement"):
        what, equal = agreement.get("kind", "labels"), agreement.get("labels_equal")
        apart = f"{what} differ from the model's by {agreement.get('difference', 0):.1e} of their range at most"
        row("built", apart if equal is None else f"{what} equal to the model's: {equal:.4%}")
    for given in about.get("as_given", ()):
        row("as given", f"{_size(given['size'])}: {given['problem'] or 'gives ' + _shape(given['shape'])}")
    good = [_size(run["size"]) for run in about["runs"] if not run["problem"]]
    row("runs at", *good)
    for run in about["runs"]:
        if run["problem"]:
            row("FAILS at", f"{_size(run['size'])}: {run['problem']}")
    if about.get("not_run"):
        row("not run", about["not_run"])
    if about["problem"]:
        row("REFUSED", about["problem"])
    for note in about["notes"]:
        row("note", note.removeprefix(f"{about['file']} ").removeprefix(f"{about['file']}: "))
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    margin = max(len(name) for name, _ in rows) + 2
    lines = [about["file"]]
    for name, text in rows:
        indent = " " * margin
        lines += textwrap.wrap(
            text, max(width, margin + 40), initial_indent=f"{name:<{margin}}", subsequent_indent=indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _show_card(about: dict[str, Any], row) -> None:
    card, head, sizes = about["card"], about["head"], about["sizes"]
    own = "" if about["card_is_its_own"] else "assumed"
    mean, std = (" ".join(f"{value:g}" for value in np.round(card[name], 2)) for name in ("mean", "std"))
    rgb = " (RGB)" if card["channels"] == 3 else ""
    row("images", f"{card['channels']} channels of {card['dtype']}{rgb}", f"mean {mean}", f"std {std}", own)
    names = card["classes"][:12] + (["…"] if len(card["classes"]) > 12 else [])
    row("classes", f"{len(card['classes'])}: {', '.join(names)}", f"by {card['activation']}", own)
    factor = "to the image's size" if head["factor"] is None else f"×{head['factor'][0]:g} by ×{head['factor'][1]:g}"
    where = f"{head['mode']}, {head['coordinates']}, {factor}, outside the network"
    row("head", "none is split off; scores are full-size" if head["mode"] == "none" else where)
    row("stride", f"scores at 1/{card['stride']} of the image's size" if card["stride"] > 1 else "scores at full size")
    how = {"pad": "padded with zeros", "resize": "resized to the nearest"}.get(sizes["fit"], "")
    takes = f"multiples of {sizes['multiple']}" if sizes["multiple"] > 1 else "every height and width"
    least = f"from {sizes['smallest']} on" if sizes["smallest"] > 1 else ""
    row("takes", takes, least, f"others are {how}" if how else "")
    if "reach" in about:
        reach = about["reach"]
        if reach["whole"]:
            row("reach", f"the whole image ({reach['whole']})", "so that it is never run in tiles")
        else:
            field = "×".join(f"{side:g}" for side in reach["field"])
            halo = "×".join(map(str, reach["halo"]))
            row(
                "reach",
                f"{field} pixels around each score",
                f"tiles with a halo of {halo}",
                f"period {reach['period']}",
            )


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _shape(shape: Sequence[int | str | None] | None) -> str:
    return "of unknown rank" if shape is None else f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _count(number: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"

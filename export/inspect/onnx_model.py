"""What an ONNX model is, what takes it, and whether every size really works, for `inspect-model`."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fcn_deploy.export.analysis.accepted_sizes import run_quietly, try_size
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.analysis.receptive_fields import WholeImageError
from fcn_deploy.export.build.config import TensorRTOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.cut_stages import cut_core
from fcn_deploy.export.build.gpus import CPU, parse_targets
from fcn_deploy.export.build.targets.tensorrt.plan import build_plan, parser_refusals
from fcn_deploy.export.build.targets.tensorrt.profiles import default_profiles
from fcn_deploy.export.graph.edit import dims, metadata
from fcn_deploy.export.importer.import_model import ImportedModel, import_model
from fcn_deploy.export.importer.load import load_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.inspect.operators import operator_entries, type_name
from fcn_deploy.export.inspect.record import SECONDS, card_entries, tried_sizes
from fcn_deploy.runtime.backends import ORT_TARGETS, openvino
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY, ModelCard
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from onnx import ModelProto, TensorProto

# Where a model cannot be imported: at these sizes it is run as it is, unless it declares one.
FOREIGN_SIZES = ((64, 64), (64, 96), (65, 97), (128, 192))
NUMPY_TYPES: dict[int, type[np.generic]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
}


def inspect_onnx_model(
    path: Path,
    target: str | None,
    memory: int,
    options: ImportOptions | None = None,
    thorough: bool = False,
    tell: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """What is known of an ONNX model, and found by importing and running it; see inspect_file."""
    targets, options = _targets(target), options or ImportOptions()
    foreign = load_model(path, options.output)
    record: dict[str, Any] = operator_entries(foreign) | {
        "producer": " ".join(filter(None, (foreign.producer_name, foreign.producer_version))),
        "inputs": [_value_entry(value) for value in foreign.graph.input],
        "outputs": [_value_entry(value) for value in foreign.graph.output],
        "card_is_its_own": metadata(foreign, CARD_KEY) is not None,
        "problem": None,
    }
    tell(record)
    try:
        imported = import_model(path, options, math.inf if thorough else SECONDS)
        core = core_of(imported)
        float_core = optimise_offline(core.model)
        stage = cut_core(float_core, core.card, most=1)[0].stage
    except MisuseError:
        raise
    except DeployError as error:
        record |= {"problem": str(error), "as_given": _runs_as_it_is(foreign), "targets": _verdicts(foreign, targets)}
        return record | {"notes": [], "runs": [], "ok": False}
    sizes = imported.sizes
    record |= card_entries(imported.card, core.upsampling, sizes.multiple, sizes.smallest, imported.fit)
    record |= {"reach": _reach(stage, float_core), "targets": _verdicts(core.model, targets, core.card)}
    record |= {
        "notes": list(imported.notes),
        "runs": _runs(imported, tried_sizes(memory, stage.working_memory, thorough)),
    }
    refused = targets and any(verdict["problem"] for verdict in record["targets"].values())
    return record | {"ok": not refused and not any(run["problem"] for run in record["runs"])}


def _targets(target: str | None) -> tuple[str, ...]:
    """What a model is tried for; (): the usual. Raises MisuseError."""
    if target is None:
        return ()
    return (target,) if target == CPU or target in ORT_TARGETS else (",".join(parse_targets(target)),)


def _value_entry(value: onnx.ValueInfoProto) -> dict[str, Any]:
    shape = dims(value) if value.type.tensor_type.HasField("shape") else None
    return {"name": value.name, "type": type_name(value.type.tensor_type.elem_type), "shape": shape}


def _reach(stage: Stage, core: ModelProto) -> dict[str, Any]:
    """What of an image a score depends on."""
    if stage.halo is None:
        return {"whole": stage.whole}
    try:
        fields = receptive_field(core).fields
    except WholeImageError as error:
        return {"whole": str(error)}
    return {
        "whole": "",
        "field": [float(field.high - field.low + 1) for field in fields],
        "halo": stage.halo,
        "period": stage.period,
    }


def _verdicts(model: ModelProto, targets: Sequence[str], card: ModelCard | None = None) -> dict[str, dict[str, Any]]:
    """For each target: what takes the network, what refuses it, and why, {"by", "problem", "refused": nodes}.

    `card`: of a model that could be imported; an engine is built of no other.
    """
    found: dict[str, dict[str, Any]] = {}
    for target in targets or (CPU, "tensorrt"):
        if target == CPU:
            found["cpu (onnxruntime)"] = _tried("onnxruntime", lambda: session(model.SerializeToString()))
            if openvino.installed():
                found["cpu (openvino)"] = _tried(
                    "openvino", lambda: openvino.OpenVinoSession(model.SerializeToString())
                )
        elif target in ORT_TARGETS:
            # Which nodes fall back to the CPU is told there alone.
            found[target] = _tried("onnxruntime", lambda: session(model.SerializeToString()))
        else:
            found[target] = _verdict_of_tensorrt(model, target, card)
    return found


def _tried(by: str, take: Callable[[], object]) -> dict[str, Any]:
    """Whether something takes the network; `by`: its module, or what it is called."""
    with suppress(PackageNotFoundError):
        by = f"{by} {version(by)}"
    try:
        take()
        return {"by": by, "problem": "", "refused": []}
    except DeployError as error:
        return {"by": by, "problem": str(error), "refused": []}
    except Exception as error:  # of other libraries
        return {"by": by, "problem": f"{type(error).__name__}: {one_line(error, 300)}", "refused": []}


def _verdict_of_tensorrt(model: ModelProto, target: str, card: ModelCard | None) -> dict[str, Any]:
    """What TensorRT's parser refuses; for GPUs that were named also whether it builds."""
    try:
        module, refused = parser_refusals(model)
    except DeployError as error:
        return {"by": "", "problem": str(error), "refused": []}
    found = {
        "by": module,
        "problem": f"its parser refuses {len(refused)} nodes" if refused else "",
        "refused": [{"node": node, "operator": operator, "reason": reason} for node, operator, reason in refused],
    }
    if not refused and card is not None and target != "tensorrt":
        options = TensorRTOptions(tuple(parse_targets(target)))
        built = _tried(module, lambda: build_plan(model, options, default_profiles(card)))
        return found | {"problem": built["problem"]}
    return found


def _runs(imported: ImportedModel, sizes: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """What the imported model gives for images of several sizes, one of them large."""
    run = session(imported.model.SerializeToString())
    channels = imported.card.channels

    def scores_at(height: int, width: int) -> np.ndarray:
        image = np.random.default_rng(0).standard_normal((1, channels, height, width), np.float32)
        return run_quietly(run, image)[0]

    runs = []
    for size in sizes:
        found, problem = try_size(scores_at, *size), ""
        if found.failure:
            problem = found.failure
        elif found.nan:
            problem = "it gives NaN"
        elif found.shape != (1, imported.sizes.scores, *size):
            problem = f"it gives {list(found.shape)}"
        runs.append({"size": size, "problem": problem})
    return runs


def _runs_as_it_is(foreign: ModelProto) -> list[dict[str, Any]]:
    """What a model that cannot be imported does with images, at the sizes it declares or some small ones."""
    image = foreign.graph.input[0]
    kind, shape = image.type.tensor_type.elem_type, dims(image)
    if image.type.WhichOneof("value") != "tensor_type" or len(shape) != 4 or kind not in NUMPY_TYPES:
        return []
    channels_last = isinstance(shape[3], int) and not isinstance(shape[1], int)
    channels = shape[3] if channels_last else shape[1]
    if not isinstance(channels, int) or channels < 1:
        return []
    batch, height, width = (
        side if isinstance(side, int) and side > 0 else 0
        for side in (shape[0], *(shape[1:3] if channels_last else shape[2:]))
    )
    try:
        run = session(foreign.SerializeToString(), optimise=False)
    except DeployError:
        return []

    def result_at(rows: int, columns: int) -> np.ndarray:
        size = (rows, columns, channels) if channels_last else (channels, rows, columns)
        images = np.random.default_rng(0).random((batch or 1, *size))
        return run_quietly(run, images.astype(NUMPY_TYPES[kind]))[0]

    found = []
    for size in dict.fromkeys((height or rows, width or columns) for rows, columns in FOREIGN_SIZES):
        result = try_size(result_at, *size)
        found.append({"size": size, "shape": result.shape or None, "problem": result.failure})
    return found

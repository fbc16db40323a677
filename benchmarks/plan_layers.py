"""What TensorRT for RTX makes of our networks, from its builder's own list of layers: no GPU is needed.

    python -m benchmarks.plan_layers [--only resnet50] [--targets sm89,sm120] [--json]

FCN-8s of each backbone at full width, for images of 480×640, random weights: which layers there are and of which types
does not depend on values, so ranges for INT8 are invented.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from fcn_deploy.export.build.config import TensorRTOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.gpus import LEAST_GPU, check_type
from fcn_deploy.export.build.targets.tensorrt.layers import convolutions_by_type, is_convolution, is_reformat
from fcn_deploy.export.build.targets.tensorrt.plan import build_plan
from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.half import half
from fcn_deploy.export.quantization.quantize import SCHEMES, measured_tensors, quantize
from fcn_deploy.runtime.command import run
from fcn_deploy.runtime.errors import DeployError, MisuseError
from onnx import ModelProto, TensorProto

from benchmarks.engine_matrix import network

BACKBONES = ("efficientnet-lite0", "mobilenet-v2", "resnet50")
PRECISIONS = ("float16", "bf16", "int8", "fp8")
TARGETS = ("sm75", "sm86", "sm89", "sm120")
SIZE = (480, 640)
RANGE = (-6.0, 6.0)

Row = dict[str, Any]


def cores(backbone: str, precisions: Sequence[str] = PRECISIONS) -> dict[str, ModelProto]:
    """Precision → the core as build-engine hands it to TensorRT."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        model, card = network(0, 1.0, backbone=backbone, stride=8, upsampling="fixed")
        export_module(model, card, path)
        core = optimise_offline(core_of(import_model(path)).model)
    ranges = dict.fromkeys(measured_tensors(core), RANGE)
    ways = {
        "float16": lambda: half(core, set(), True),
        "bf16": lambda: half(core, kind=TensorProto.BFLOAT16),
        "int8": lambda: half(quantize(core, ranges, SCHEMES["tensorrt"]), set(), True),
        "fp8": lambda: half(quantize(core, ranges, SCHEMES["tensorrt-fp8"]), set(), True),
    }
    return {precision: ways[precision]() for precision in precisions}


def row_of(backbone: str, precision: str, target: str, core: ModelProto) -> Row:
    """The figures of one plan."""
    row: Row = {"network": backbone, "precision": precision, "target": target}
    try:
        if precision in LEAST_GPU:
            check_type(precision, target)
        built = build_plan(core, TensorRTOptions((target,)), [PlannedProfile(SIZE, SIZE, SIZE, 1)])
    except MisuseError:
        return row | {"error": f"none: {precision.upper()} is from {LEAST_GPU[precision]} on"}
    except DeployError as error:
        return row | {"error": str(error)}
    convolutions = convolutions_by_type(built.layers)
    reformats = sum(is_reformat(layer) for layer in built.layers)
    others = len(built.layers) - reformats - sum(is_convolution(layer) for layer in built.layers)
    return row | {
        "convolutions": convolutions,
        "reformats": reformats,
        "others": others,
        "activation_mib": round((built.activation_bytes[0] or 0) / 2**20, 1),
        "plan_mb": round(len(built.plan) / 1e6, 1),
    }


def line(row: Row) -> str:
    head = f"| {row['network']} | {row['precision']} | {row['target']} |"
    if "error" in row:
        return f"{head} {row['error']} | | | | |"
    convolutions = ", ".join(f"{count} {types}" for types, count in row["convolutions"].items())
    return (
        f"{head} {convolutions} | {row['others']} | {row['reformats']} | {row['activation_mib']} | {row['plan_mb']} |"
    )


def main(
    only: Annotated[str | None, typer.Option(help="Backbones, comma-separated; none: three.")] = None,
    targets: Annotated[str, typer.Option(help="Compute capabilities, comma-separated.")] = ",".join(TARGETS),
    json_: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Print a row for each network, precision and GPU."""
    rows = []
    if not json_:
        print(
            "| network | precision | GPU | convolutions, type in → out | other kernels | reformats | MiB | plan, MB |"
        )
        print("|---|---|---|---|---|---|---|---|")
    for backbone in only.split(",") if only else BACKBONES:
        for precision, core in cores(backbone).items():
            for target in targets.split(","):
                rows.append(row_of(backbone, precision, target, core))
                if not json_:
                    print(line(rows[-1]), flush=True)
    if json_:
        print(json.dumps(rows))


if __name__ == "__main__":
    run(main, "benchmarks.plan_layers")

"""Every network of ours in every precision, built for GPUs by build-engine's own path: no GPU is needed.

    python -m benchmarks.engine_matrix [--only vgg16-8-learned,alexnet] [--precisions int8] [--full] [--json]

Networks have random weights (seeded), calibration sees real handwritten digits at several sizes. N, H and W are free.
FP8 and BF16 are built for those of the GPUs that have them.
Exits with 1 where a combination fails, or TensorRT itself takes longer than --limit seconds for one.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fcn_deploy.calibration.digits import canvas
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.gpus import LEAST_GPU
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.fcn import backbones
from fcn_deploy.fcn.architecture import Architecture
from fcn_deploy.fcn.checkpoint import card_for
from fcn_deploy.fcn.model import build_network
from PIL import Image

NETWORKS = {
    f"{backbone}-{stride}-{upsampling}": {"backbone": backbone, "stride": stride, "upsampling": upsampling}
    for backbone in backbones.NAMES
    for stride in ((32,) if backbone == "alexnet" else (32, 16, 8))
    for upsampling in ("fixed", "learned")
} | {"resnet50-dilated8": {"arch": "dilated8", "backbone": "resnet50"}}
PRECISIONS = {
    "float32": {}, "float16": {"fp16": True}, "bf16": {"bf16": True}, "int8": {"int8": True, "fp16": True},
    "fp8": {"fp8": True, "fp16": True},
}  # fmt: skip
SIZES = ((96, 128), (160, 96), (224, 224), (120, 200), (64, 90), (192, 320))  # of the images calibration sees


def network(seed: int, width: float, **architecture):
    """A network with random weights and statistics that fit them, and its card."""
    torch.manual_seed(seed)
    model = build_network(Architecture(classes=11, width=width, **architecture))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # a true mean over what follows
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 96, 96))
    return model.eval(), card_for(model.architecture, tuple(f"class {index}" for index in range(11)))


def images(folder: Path) -> Path:
    """Write a few canvases of digits into `folder`, at several sizes."""
    folder.mkdir()
    for index, (height, width) in enumerate(SIZES):
        Image.fromarray(canvas(height, width, 0, "train", index)[0]).save(folder / f"{index}.png")
    return folder


def build_all(
    name: str, width: float, target: str, calib: str, folder: Path, precisions: Sequence[str] = tuple(PRECISIONS)
) -> list[dict[str, Any]]:
    """A row of the table for each precision of one network."""
    rows: list[dict[str, Any]] = []
    model_file, source = folder / f"{name}.onnx", None
    for precision, words in ((each, PRECISIONS[each]) for each in precisions):
        row: dict[str, Any] = {"network": name, "precision": precision, "error": None}
        start = time.perf_counter()
        try:
            if source is None:
                model, card = network(0, width, **NETWORKS[name])
                export_module(model, card, model_file)
                source = import_model(model_file)
            # Weights are random: what is asked is whether the graph builds, not what INT8 costs in accuracy.
            low = {**words, "calib": calib, "count": len(SIZES), "max_drop": 100} if words else {}
            config = BuildConfig(target=with_type(target, precision), quantization=QuantizationOptions(**low))
            report = build_engine(source, folder / f"{name}.engine", config)
            row |= {
                "tensorrt_seconds": report.builder.seconds,
                "plan_bytes": report.core_bytes[precision],
                "activation_bytes": [profile.activation_bytes for profile in report.builder.profiles],
            }
        except Exception as error:  # a benchmark of what works tells everything that does not
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())
        rows.append(row | {"seconds": round(time.perf_counter() - start, 2)})
    return rows


def with_type(targets: str, precision: str) -> str:
    """Those of the GPUs that have a precision; all, where none has it or it is of all."""
    least = int(LEAST_GPU.get(precision, "sm0")[2:])
    having = [each for each in targets.split(",") if each[:2] == "sm" and int(each[2:]) >= least]
    return ",".join(having) or targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="networks whose names begin so, comma-separated")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma-separated; default: all")
    parser.add_argument("--target", default="sm86,sm89,sm120")
    parser.add_argument("--calib", default="digits", help="as of build-engine; digits: a few canvases of several sizes")
    parser.add_argument("--width", type=float, default=0.25, help="multiplies the backbones' channels")
    parser.add_argument(
        "--full", action="store_true", help="the published widths: slow, as labels are compared on the CPU"
    )
    parser.add_argument("--limit", type=float, default=10, help="seconds that TensorRT may take for one engine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [""]
    names = [name for name in NETWORKS if any(name.startswith(prefix) for prefix in wanted)]
    if not names:
        parser.error(f"--only {options.only} names none of {', '.join(NETWORKS)}")
    precisions = options.precisions.split(",")
    if wrong := [each for each in precisions if each not in PRECISIONS]:
        parser.error(f"--precisions {wrong[0]} is none of {', '.join(PRECISIONS)}")
    rows: list[dict[str, Any]] = []
    if not options.json:
        print(f"{'network':<34} {'precision':<9} {'TensorRT':>9} {'whole':>8} {'plan':>9} {'activations':>12}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        calib = str(images(folder / "digits")) if options.calib == "digits" else options.calib
        for name in names:
            for row in build_all(
                name, 1.0 if options.full else options.width, options.target, calib, folder, precisions
            ):
                if not row["error"] and row["tensorrt_seconds"] > options.limit:
                    row["error"] = f"TensorRT took {row['tensorrt_seconds']} s, over {options.limit:g} s"
                rows.append(row)
                if not options.json:
                    print(line(row), flush=True)
    failed = [row for row in rows if row["error"]]
    if options.json:
        print(json.dumps(rows))
    else:
        slowest = max((row["tensorrt_seconds"] for row in rows if "tensorrt_seconds" in row), default=0)
        print(f"{len(rows) - len(failed)} of {len(rows)} built; TensorRT took {slowest:.2f} s at most")
    sys.exit(1 if failed else 0)


def line(row: dict[str, Any]) -> str:
    head = f"{row['network']:<34} {row['precision']:<9}"
    if row["error"]:
        return f"{head} FAILED: {row['error']}"
    activations = "/".join("-" if size is None else f"{size / 2**20:,.0f}" for size in row["activation_bytes"])
    return (
        f"{head} {row['tensorrt_seconds']:>7.2f} s {row['seconds']:>6.1f} s {row['plan_bytes'] / 1e6:>6.1f} MB "
        f"{activations:>8} MiB"
    )


if __name__ == "__main__":
    main()

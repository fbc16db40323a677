"""What `make silicon` looks at: a network that it trains on drawn digits, and engines of it in every precision."""

import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fcn_deploy.calibration.digits import CLASSES, canvas
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.gpus import LEAST_GPU, check_type
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.fcn.checkpoint import load_checkpoint
from fcn_deploy.runtime.backends import ORT_TARGETS
from fcn_deploy.runtime.backends.tensorrt.device import name_of
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.sizes import parse_sizes
from onnx import TensorProto, helper, numpy_helper

from benchmarks.engine_matrix import PRECISIONS
from benchmarks.silicon.engine import Record, gpu
from fcn_deploy import ModelCard, Segmenter

TIMED = ((480, 640), (1080, 1920))
PROFILES = "1x1:480x640:1088x1920,480x640:1080x1920:1088x1920"
SMALL = "8x8:64x64:160x160"  # of networks of nearest neighbours
MOST = (1088, 1500)  # pixels a side of the images whose labels are compared
CALIBRATED_ON = 24  # canvases
TRAINING = ("--epochs", "3")  # val mIoU 0.85 (docs/quickstart.md), three minutes on two cores, less on more
# Ways to take nearest neighbours: PyTorch's, ONNX's usual one, and others that networks have.
NEAREST = (
    "asymmetric floor", "asymmetric round_prefer_floor", "half_pixel round_prefer_floor",
    "half_pixel round_prefer_ceil", "half_pixel floor", "align_corners round_prefer_floor",
)  # fmt: skip


@dataclass
class Built:
    """What there is to look at.

    Attributes:
        engines: name → engine for this GPU.
        cpu: the same network for the CPU.
        model, card: the network in PyTorch.
        others: name → why there is no such engine, as a record.
    """

    cpu: Path
    model: Any
    card: ModelCard
    engines: dict[str, Path] = field(default_factory=dict)
    others: dict[str, Record] = field(default_factory=dict)


def libraries() -> dict[str, str]:
    """The libraries that are here, and what each builds for: TensorRT for this machine, that for RTX by name."""
    with gpu() as (_, device):
        found = {"tensorrt": "cuda", "tensorrt_rtx": name_of(device)}
    return {name: target for name, target in found.items() if find_spec(name)}


def providers() -> dict[str, str]:
    """The targets that providers of this ONNX Runtime serve, by the provider's name."""
    if find_spec("onnxruntime") is None:
        return {}
    import onnxruntime

    here = onnxruntime.get_available_providers()
    return {provider: target for target, provider in ORT_TARGETS.items() if provider in here}


def build(folder: Path) -> Built:
    """Train, export, and build for this GPU, in each precision and by each library, and for the CPU."""
    trained = folder / "digits.safetensors"
    code = "from fcn_deploy.fcn.cli.train_fcn import main; main()"
    command = [sys.executable, "-c", code, "--data", "digits", *TRAINING, "--out", str(trained)]
    if subprocess.run(command).returncode:
        raise DeployError("no network could be trained; train-fcn says why above")
    checkpoint = load_checkpoint(trained)
    export_module(checkpoint.model, checkpoint.card, folder / "m.onnx")
    source = import_model(folder / "m.onnx")
    found = Built(folder / "cpu.engine", checkpoint.model, checkpoint.card)
    build_engine(source, found.cpu, BuildConfig(latency_sizes=((64, 64),)))
    here = libraries()
    if not here:
        why = "neither tensorrt nor tensorrt_rtx is installed; run: pip install 'fcn-deploy[tensorrt]' (or [rtx])"
        found.others["engines by TensorRT"] = {"skipped": why, "ok": True}
    for library, target in here.items():
        for precision in PRECISIONS:
            path = folder / f"{precision}-{library}.engine"
            _tried(found, f"{precision} by {library}", source, path, target, precision, PROFILES)
    for provider, target in providers().items():
        for precision in ("float32", "float16"):
            path = folder / f"{precision}-{target}.engine"
            _tried(found, f"{precision} by {provider}", source, path, target, precision, None)
    return found


def _tried(
    found: Built,
    name: str,
    source: Any,
    path: Path,
    target: str,
    precision: str,
    sizes: str | None,
) -> None:
    """Build one engine, or say why there is none: a type that this GPU has not is no fault."""
    words = PRECISIONS[precision]
    low = (
        {**words, "calib": "digits", "count": CALIBRATED_ON, "max_drop": 100.0, "max_class_drop": 100.0}
        if words
        else {}
    )
    try:
        if precision in LEAST_GPU:
            with gpu() as (_, device):
                check_type(precision, name_of(device))
        config = BuildConfig(
            target=target,
            quantization=QuantizationOptions(**low),
            sizes=None if sizes is None else parse_sizes(sizes),
            latency_sizes=((64, 64),),
        )
        report = build_engine(source, path, config)
        used = report.builder.module if report.builder is not None else target
        if target == "cuda" and used != "tensorrt":
            raise DeployError(f"tensorrt cannot be imported, and {used} was taken in its place")
    except MisuseError as error:
        found.others[f"build, {name}"] = {"skipped": f"not built: {error}", "ok": True}
    except Exception as error:  # told beside the others
        found.others[f"build, {name}"] = {"error": f"{type(error).__name__}: {error}"[:400], "ok": False}
    else:
        found.engines[name] = path
        return
    print(f"build, {name}: {next(iter(found.others[f'build, {name}'].values()))}", flush=True)


def references(cpu: Path, folder: Path, count: int) -> Path:
    """Write canvases of many sizes into `folder`, with what was drawn and the labels that the CPU gives."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with Segmenter(cpu) as net:
        known = tuple(net.card.classes) == CLASSES
        for index in range(count):
            size = tuple(int(random.integers(1, side + 1)) for side in MOST)
            image, truth = canvas(*size, 0, "val", 20_000 + index)  # far from what training validates on
            arrays = {"image": image, "labels": net(image)} | ({"truth": truth} if known else {})
            np.savez(folder / f"{index:04}.npz", **arrays)
    return folder


def nearest(folder: Path, target: str) -> Record:
    """Which ways to take nearest neighbours a library takes as ONNX Runtime does: what the build finds on this GPU.

    No way is wrong here: an engine that has one which differs is refused when it is built, or by verify-engine.
    """
    ways = {}
    for way in NEAREST:
        path = folder / f"{way.replace(' ', '-')}-{target}.onnx"
        onnx.save(nearest_network(*way.split()), path)
        config = BuildConfig(target=target, sizes=parse_sizes(SMALL), latency_sizes=((64, 64),))
        try:
            report = build_engine(import_model(path), path.with_suffix(".engine"), config)
        except DeployError as error:
            ways[way] = str(error)
        else:
            ways[way] = report.latency_reason or "equal"
    return {"ways": ways, "ok": True}


def nearest_network(centres: str, rounding: str) -> onnx.ModelProto:
    """float32 [N, 3, H, W] → [N, 3, H, W]: maxima of 3 × 3 pixels, brought to the image's size."""
    how = {"coordinate_transformation_mode": centres, "nearest_mode": rounding}
    weights = np.eye(3, dtype=np.float32)[:, :, None, None]
    nodes = [
        helper.make_node("MaxPool", ["image"], ["third"], kernel_shape=[3, 3], strides=[3, 3]),
        helper.make_node("Shape", ["image"], ["size"]),
        helper.make_node("Resize", ["third", "", "", "size"], ["large"], name="up", mode="nearest", **how),
        helper.make_node("Conv", ["large", "weights"], ["scores"]),  # so that the Resize is the network's own
    ]
    graph = helper.make_graph(
        nodes,
        "nearest",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

"""What only a GPU can tell, in one command and about ten minutes, without a network: `make silicon`.

    python -m benchmarks.silicon [--out silicon.json] [--seconds 60] [--sizes 200] [--largest 20000]

It checks driver and wheels, the kernels against NumPy, engines that it builds for this GPU (every precision, by both
libraries where both are here) by their golden samples, their labels against those of the CPU at many sizes, eight
threads for a minute with the memory before and after, and times calls against the bare network and against PyTorch.
What is not here is skipped, with the reason. All of it is in one JSON, and for people on one page beside it. Exit code
1: something is wrong; please send both.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from fcn_deploy.runtime.backends.device import driver_module, name_of
from fcn_deploy.runtime.backends.lane import Batch, Lane
from fcn_deploy.runtime.command import run
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import padded_size
from fcn_deploy.runtime.verify import verify
from PIL import Image

from benchmarks.silicon_kernels import kernel_rows
from benchmarks.silicon_page import page
from benchmarks.silicon_torch import rows as torch_rows
from fcn_deploy import ModelCard, Segmenter

PACKAGES = (
    "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "pycuda", "onnxruntime", "onnxruntime-gpu", "nvidia-cuda-nvrtc",
    "torch",
)  # fmt: skip
THREADS = 8
LARGEST = 20000  # pixels a side
# Share of labels that may differ from the CPU's float32: this, and twice what emulation found to be so. The network's
# weights are random, so that its labels are far closer to ties than those of a trained one.
ALLOWED = {"float32": 1e-3, "bf16": 0.02, "float16": 0.02, "fp8": 0.02, "int8": 0.02}
# Labels drawn at random of the network's 11 classes differ by 0.91. INT8 and FP8 of random weights come to half of that
# by emulation: here they are only told from garbage, and golden samples, of scores, are what judges them.
ALL_WRONG = 0.8

Record = dict[str, Any]


class SkippedError(Exception):
    """Why a part was not run."""


def machine() -> Record:
    """The driver, the GPU and the packages."""
    with gpu() as (cuda, device):
        version = cuda.get_driver_version()
        free, total = cuda.mem_get_info()
        found = {name: _version(name) for name in PACKAGES}
        return {
            "gpu": device.name(),
            "target": name_of(device),
            "driver": f"CUDA {version // 1000}.{version % 1000 // 10}",
            "memory_gb": [round(free / 1e9, 2), round(total / 1e9, 2)],
            "packages": {name: version for name, version in found.items() if version},
            "ok": True,
        }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@contextmanager
def gpu() -> Iterator[tuple[Any, Any]]:
    """The driver and the first GPU, whose context is current."""
    try:
        cuda = driver_module()
        cuda.init()
    except Exception as error:  # no driver, no GPU, or neither package
        raise SkippedError(f"no GPU: {error}") from error
    device = cuda.Device(0)
    context = device.retain_primary_context()
    context.push()
    try:
        yield cuda, device
    finally:
        cuda.Context.pop()
        context.detach()


def kernels(largest: int) -> Record:
    """The kernels against NumPy, for each type, at sizes up to `largest`: equal bit for bit."""
    with gpu() as (cuda, device):
        rows = list(kernel_rows(cuda, device, largest))  # what it holds is given back while the context is current
    return {"rows": rows, "ok": all(row["equal"] is not False for row in rows)}


def golden(engine: Path) -> Record:
    """verify-engine."""
    report = verify(engine)
    return {key: report[key] for key in ("difference", "tolerance", "sizes", "latency")} | {"ok": report["passed"]}


def labels(engine: Path, cpu: Path, count: int) -> Record:
    """Share of labels that differ from the CPU's float32 engine at many sizes."""
    random, rows = np.random.default_rng(0), []
    with Segmenter(engine) as net, Segmenter(cpu) as reference:
        gpu_plan = net.network.manifest.gpu
        most = np.max([profile.max for profile in gpu_plan.profiles], axis=0)
        while len(rows) < count:
            size = tuple(int(random.integers(1, side + 1)) for side in np.minimum(most, 1500))
            if not any(profile.holds(padded_size(*size, net.card)) for profile in gpu_plan.profiles):
                continue
            image = natural_noise(*size, net.card, len(rows))
            rows.append({"size": list(size), "differing": float((net(image) != reference(image)).mean())})
        allowed = min(ALLOWED[net.network.precision] + 2 * _expected(engine), ALL_WRONG)
    pixels = [row["size"][0] * row["size"][1] for row in rows]
    share = float(np.average([row["differing"] for row in rows], weights=pixels))
    worst = max(row["differing"] for row in rows)
    return {"images": len(rows), "share": share, "worst": worst, "allowed": allowed, "ok": share <= allowed}


def _expected(engine: Path) -> float:
    """Share of labels that low precision changes, as the build found by emulation; 0 of float32."""
    from fcn_deploy.calibration.report.engine_report import read_report

    report = read_report(engine)
    return 0.0 if report is None or report.accuracy is None else 1 - report.accuracy.value


def stress(engine: Path, seconds: float) -> Record:
    """Eight threads that call one Segmenter with changing sizes, and the GPU's memory before and after."""
    errors: list[str] = []
    calls = [0] * THREADS
    with gpu() as (cuda, _), Segmenter(engine) as net:
        profile = net.network.manifest.gpu.profiles[0]
        sizes = (profile.min, profile.opt, profile.max)
        images = [natural_noise(*np.minimum(size, 1500), net.card, index) for index, size in enumerate(sizes)]
        expected = [net(image) for image in images]
        net.warmup([image.shape[:2] for image in images])  # both lanes have what they will hold
        end = time.monotonic() + seconds

        def work(index: int) -> None:
            random = np.random.default_rng(index)
            try:
                while time.monotonic() < end:
                    chosen = int(random.integers(len(images)))
                    if not np.array_equal(net(images[chosen]), expected[chosen]):
                        errors.append(f"labels of image {chosen} changed")
                    calls[index] += 1
            except Exception as error:  # told in the record
                errors.append(f"{type(error).__name__}: {error}")

        before = cuda.mem_get_info()[0]
        threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        lost = before - cuda.mem_get_info()[0]
    return {"seconds": seconds, "calls": sum(calls), "errors": sorted(set(errors))[:10],
            "free_before_mb": round(before / 1e6, 1), "lost_mb": round(lost / 1e6, 1),
            "ok": not errors and lost < 64e6}  # fmt: skip


def latency(engine: Path, runs: int = 50) -> Record:
    """A call beside the bare network, at the OPT of each profile: medians in milliseconds."""
    rows = []
    with Segmenter(engine) as net:
        backend, profiles = net.network.backend, net.network.manifest.gpu.profiles
        for index, profile in enumerate(profiles):
            image = natural_noise(*profile.opt, net.card, 0)
            whole = _median(lambda image=image: net(image), runs)
            batch, lane = Batch(index, 1, padded_size(*profile.opt, net.card)), backend.lanes[0]

            def bare(lane: Lane = lane, batch: Batch = batch) -> None:
                lane.execute(batch)
                lane.stream.synchronize()

            with backend._current():
                lane.reserve(batch)
                rows.append({"size": list(profile.opt), "call_ms": whole, "network_ms": _median(bare, runs)})
    return {"rows": rows, "ok": True}


def pytorch(model: Any, card: ModelCard, sizes: Sequence[tuple[int, int]], runs: int = 50) -> Record:
    """The same network by PyTorch on the same GPU."""
    try:
        import torch
    except ImportError as error:
        raise SkippedError("PyTorch is not installed; run: pip install torch") from error
    if not torch.cuda.is_available():
        raise SkippedError(f"PyTorch {torch.__version__} finds no GPU")
    return {"rows": torch_rows(model, card, sizes, lambda work: _median(work, runs)), "ok": True}


def _median(work: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs + 5):  # the first ones compile, and capture graphs
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return round(float(np.median(times[5:])), 3)


def sanitizer(engine: Path) -> Record:
    """verify-engine under compute-sanitizer: no access out of bounds, in our kernels or the library's."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise SkippedError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    command = [program, "--error-exitcode", "9", sys.executable, "-m", "fcn_deploy.runtime.verify", str(engine)]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"said": done.stdout.strip().splitlines()[-3:], "ok": done.returncode == 0}


def measure(
    engines: dict[str, tuple[Path, Path]],
    seconds: float = 60,
    sizes: int = 200,
    largest: int = LARGEST,
    runs: int = 50,
    model: tuple[Any, ModelCard, Sequence[tuple[int, int]]] | None = None,
) -> Record:
    """Everything, as a record.

    Args:
        engines: name → (engine for this GPU, engine for the CPU of the same model).
        model: the network in PyTorch, its card, and the sizes to time it at; None: it is not timed.
    """
    parts: dict[str, Callable[[], Record]] = {"machine": machine, "kernels": lambda: kernels(largest)}
    for name, (engine, cpu) in engines.items():
        parts |= {
            f"golden sample, {name}": lambda engine=engine: golden(engine),
            f"labels, {name}": lambda engine=engine, cpu=cpu: labels(engine, cpu, sizes),
            f"{THREADS} threads, {name}": lambda engine=engine: stress(engine, seconds / len(engines)),
            f"latency, {name}": lambda engine=engine: latency(engine, runs),
            f"sanitizer, {name}": lambda engine=engine: sanitizer(engine),
        }
    if model is not None:
        parts["PyTorch"] = lambda: pytorch(*model, runs)
    record: Record = {}
    for name, part in parts.items():
        try:
            record[name] = part()
        except SkippedError as error:
            record[name] = {"skipped": str(error), "ok": True}
        except DeployError as error:
            record[name] = {"error": str(error), "ok": False}
        said = record[name].get("skipped") or record[name].get("error") or ("ok" if record[name]["ok"] else "WRONG")
        print(f"{name}: {said}", flush=True)
    return record


TIMED = ((480, 640), (1080, 1920))


def libraries() -> dict[str, str]:
    """The libraries that are here, and what each builds for: TensorRT for this machine, that for RTX by name."""
    with gpu() as (_, device):
        found = {"tensorrt": "cuda", "tensorrt_rtx": name_of(device)}
    return {name: target for name, target in found.items() if find_spec(name)} or {"tensorrt": "cuda"}


def noise_images(folder: Path, card: ModelCard) -> Path:
    """Write a few images of the kind that labels are compared on into `folder`, for calibration."""
    from benchmarks.engine_matrix import SIZES

    folder.mkdir()
    for index, (height, width) in enumerate(SIZES):
        Image.fromarray(natural_noise(height, width, card, 1000 + index)).save(folder / f"{index}.png")
    return folder


def build(
    folder: Path,
) -> tuple[dict[str, tuple[Path, Path]], tuple[Any, ModelCard, Sequence[tuple[int, int]]], dict[str, str]]:
    """Engines of a small network for this GPU and for the CPU, in each precision; the network; why others are none."""
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.from_torch import export_module
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.export.quantization.options import QuantizationOptions
    from fcn_deploy.runtime.sizes import parse_sizes

    from benchmarks.engine_matrix import PRECISIONS, network

    model, card = network(0, 0.5, backbone="efficientnet-lite0", stride=8, upsampling="fixed")
    export_module(model, card, folder / "m.onnx")
    source, calib = import_model(folder / "m.onnx"), str(noise_images(folder / "noise", card))
    build_engine(source, folder / "cpu.engine", BuildConfig(latency_sizes=[(64, 64)]))
    found, refused = {}, {}
    for (library, target), (precision, words) in product(libraries().items(), PRECISIONS.items()):
        low = QuantizationOptions(**({**words, "calib": calib, "max_drop": 100.0} if words else {}))
        sizes = parse_sizes("1x1:480x640:1088x1920,480x640:1080x1920:1088x1920")
        try:
            config = BuildConfig(target=target, quantization=low, sizes=sizes)
            build_engine(source, folder / f"{precision}-{target}.engine", config)
        except DeployError as error:
            refused[f"{precision} by {library}"] = str(error)
            continue
        found[f"{precision} by {library}"] = (folder / f"{precision}-{target}.engine", folder / "cpu.engine")
    return found, (model, card, TIMED), refused


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("silicon.json"),
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of eight threads, shared by the engines.")] = 60,
    sizes: Annotated[int, typer.Option(min=1, help="Sizes at which labels are compared.")] = 200,
    largest: Annotated[int, typer.Option(min=1, help="Largest side that the kernels are tried at.")] = LARGEST,
) -> int:
    """Run everything that wants a GPU, and write one JSON, and one page beside it."""
    try:
        machine()
    except SkippedError as error:
        raise DeployError(f"{error}; run this on a machine with an NVIDIA GPU") from error
    with tempfile.TemporaryDirectory() as folder:
        engines, model, refused = build(Path(folder))
        record = measure(engines, seconds, sizes, largest, model=model)
    for name, why in refused.items():  # a precision that this GPU has none of
        print(f"{name}: not built: {why}")
        record[f"build, {name}"] = {"skipped": f"not built: {why}", "ok": True}
    written(record, out)
    return int(not all(part["ok"] for part in record.values()))


def written(record: Record, out: Path) -> None:
    """Write a record as JSON, and as a page beside it."""
    out.write_text(json.dumps(record, indent=1))
    beside = out.with_suffix(".html")
    beside.write_text(page(record))
    print(f"{out}, {beside}")


if __name__ == "__main__":
    run(main, "benchmarks.silicon")

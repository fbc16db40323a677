"""What only a GPU can tell, in one command and about ten minutes, without a network: `make silicon`.

    python -m benchmarks.silicon [--out silicon.json] [--seconds 60] [--sizes 200] [--largest 4000]

It checks driver and wheels, the kernels against NumPy, engines that it builds for this GPU (float32, FP16, INT8) by
their golden samples, their labels against those of the CPU at many sizes, eight threads for a minute with the memory
before and after, and times calls against the bare network. What is not here is skipped, with the reason. Exit code 1:
something is wrong; please send the JSON.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from fcn_deploy.export.build.targets.kernels import compile_kernels
from fcn_deploy.runtime.backends.device import driver_module, load_kernels, name_of
from fcn_deploy.runtime.command import run
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.noise_image import natural_noise
from fcn_deploy.runtime.prepare import padded_size, prepare
from fcn_deploy.runtime.verify import verify

from fcn_deploy import ModelCard, Segmenter

PACKAGES = (
    "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "pycuda", "onnxruntime", "onnxruntime-gpu", "nvidia-cuda-nvrtc",
    "torch",
)  # fmt: skip
THREADS = 8
# Share of labels that may differ from the CPU's float32.
ALLOWED = {"float32": 1e-3, "bf16": 0.1, "float16": 0.02, "fp8": 0.2, "int8": 0.2}

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
    """The kernel that prepares images against NumPy, for each type, at sizes up to `largest`: equal bit for bit."""
    with gpu() as (cuda, device):
        rows = list(_kernel_rows(cuda, device, largest))  # what it holds is given back while the context is current
    return {"rows": rows, "ok": all(row["equal"] for row in rows)}


def _kernel_rows(cuda: Any, device: Any, largest: int) -> Iterator[Record]:
    module = load_kernels(cuda, compile_kernels([name_of(device)]), device, "the kernels")
    stream = cuda.Stream(1)
    for dtype in ("uint8", "uint16", "int16", "float32"):
        for kind in ("float32", "float16"):
            for side in (1, 37, 500, largest):
                card = ModelCard(("a", "b"), dtype=dtype, size_multiple=32)
                image = natural_noise(side, max(1, side * 3 // 4), card, 0)
                expected = prepare(image, card)[0].astype(kind)
                found = _prepared(cuda, module, stream, image, card, kind)
                equal = bool(np.array_equal(found, expected))
                yield {"kernel": f"prepare_{dtype}_{kind}", "size": list(image.shape[:2]), "equal": equal}


def _prepared(cuda: Any, module: Any, stream: Any, image: np.ndarray, card: ModelCard, kind: str) -> np.ndarray:
    height, width, channels = image.shape
    padded = padded_size(height, width, card)
    std, mean = np.asarray(card.std, np.float64), np.asarray(card.mean, np.float64)
    factors = np.concatenate([1 / std, mean / std]).astype(np.float32)
    found = np.empty((channels, *padded), kind)
    held = [cuda.mem_alloc(array.nbytes) for array in (image, factors, found)]
    for memory, array in zip(held, (image, factors), strict=False):
        cuda.memcpy_htod_async(memory, array, stream)
    function = module.get_function(f"prepare_{card.dtype}_{kind}")
    function.prepare("PPPPiiiii")
    grid = (-(-padded[1] // 32), -(-padded[0] // 8))
    place = int(held[1])
    function.prepared_async_call(
        grid,
        (32, 8, 1),
        stream,
        int(held[0]),
        int(held[2]),
        place,
        place + 4 * channels,
        channels,
        height,
        width,
        *padded,
    )
    cuda.memcpy_dtoh_async(found, held[2], stream)
    stream.synchronize()
    for memory in held:
        memory.free()
    return found


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
        for index in range(count):
            size = tuple(int(random.integers(1, side + 1)) for side in np.minimum(most, 1500))
            if not any(profile.holds(padded_size(*size, net.card)) for profile in gpu_plan.profiles):
                continue
            image = natural_noise(*size, net.card, index)
            rows.append({"size": list(size), "differing": float((net(image) != reference(image)).mean())})
        allowed = ALLOWED[net.network.precision]
    worst = max(row["differing"] for row in rows)
    return {"images": len(rows), "worst": worst, "allowed": allowed, "ok": worst <= allowed}


def stress(engine: Path, seconds: float) -> Record:
    """Eight threads that call one Segmenter with changing sizes, and the GPU's memory before and after."""
    errors: list[str] = []
    calls = [0] * THREADS
    with gpu() as (cuda, _), Segmenter(engine) as net:
        profile = net.network.manifest.gpu.profiles[0]
        sizes = (profile.min, profile.opt, profile.max)
        images = [natural_noise(*np.minimum(size, 1500), net.card, index) for index, size in enumerate(sizes)]
        expected = [net(image) for image in images]
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
    return {"calls": sum(calls), "errors": sorted(set(errors))[:10], "lost_mb": round(lost / 1e6, 1),
            "ok": not errors and lost < 64e6}  # fmt: skip


def latency(engine: Path, runs: int = 50) -> Record:
    """A call beside the bare network, at the OPT of each profile: medians in milliseconds."""
    rows = []
    with Segmenter(engine) as net:
        backend = net.network.backend
        for profile in net.network.manifest.gpu.profiles:
            image = natural_noise(*profile.opt, net.card, 0)
            whole = _median(lambda image=image: net(image), runs)
            padded = padded_size(*profile.opt, net.card)
            index = net.network.manifest.gpu.profiles.index(profile)

            def bare(index: int = index, padded: tuple[int, int] = padded) -> None:
                backend.network.enqueue(index, padded)
                backend.network.stream.synchronize()

            with backend._current():
                backend.network.reserve(index, padded)
                rows.append({"size": list(profile.opt), "call_ms": whole, "network_ms": _median(bare, runs)})
    return {"rows": rows, "ok": True}


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
    engines: dict[str, tuple[Path, Path]], seconds: float = 60, sizes: int = 200, largest: int = 4000, runs: int = 50
) -> Record:
    """Everything, as a record. `engines`: name → (engine for this GPU, engine for the CPU of the same model)."""
    parts: dict[str, Callable[[], Record]] = {"machine": machine, "kernels": lambda: kernels(largest)}
    for name, (engine, cpu) in engines.items():
        parts |= {
            f"golden sample, {name}": lambda engine=engine: golden(engine),
            f"labels, {name}": lambda engine=engine, cpu=cpu: labels(engine, cpu, sizes),
            f"{THREADS} threads, {name}": lambda engine=engine: stress(engine, seconds),
            f"latency, {name}": lambda engine=engine: latency(engine, runs),
            f"sanitizer, {name}": lambda engine=engine: sanitizer(engine),
        }
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


def build(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Engines of a small network for this GPU and for the CPU, in each precision that can be built."""
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.from_torch import export_module
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.export.quantization.options import QuantizationOptions
    from fcn_deploy.runtime.sizes import parse_sizes

    from benchmarks.engine_matrix import PRECISIONS, images, network

    model, card = network(0, 0.5, backbone="efficientnet-lite0", stride=8, upsampling="fixed")
    export_module(model, card, folder / "m.onnx")
    source, calib = import_model(folder / "m.onnx"), str(images(folder / "digits"))
    build_engine(source, folder / "cpu.engine", BuildConfig(latency_sizes=[(64, 64)]))
    found = {}
    for precision, words in PRECISIONS.items():
        low = QuantizationOptions(**({**words, "calib": calib, "max_drop": 100.0} if words else {}))
        sizes = parse_sizes("1x1:480x640:1088x1920")
        try:
            config = BuildConfig(target="cuda", quantization=low, sizes=sizes)
            build_engine(source, folder / f"{precision}.engine", config)
        except DeployError as error:
            print(f"{precision}: not built: {error}", flush=True)
            continue
        found[precision] = (folder / f"{precision}.engine", folder / "cpu.engine")
    return found


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("silicon.json"),
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of eight threads, of each engine.")] = 60,
    sizes: Annotated[int, typer.Option(min=1, help="Sizes at which labels are compared.")] = 200,
    largest: Annotated[int, typer.Option(min=1, help="Largest side that the kernels are tried at.")] = 4000,
) -> int:
    """Run everything that wants a GPU, and write one JSON."""
    try:
        machine()
    except SkippedError as error:
        raise DeployError(f"{error}; run this on a machine with an NVIDIA GPU") from error
    with tempfile.TemporaryDirectory() as folder:
        record = measure(build(Path(folder)), seconds, sizes, largest)
    out.write_text(json.dumps(record, indent=1))
    print(out)
    return int(not all(part["ok"] for part in record.values()))


if __name__ == "__main__":
    run(main, "benchmarks.silicon")

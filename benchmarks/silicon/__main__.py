"""What only a GPU can tell, in one command and about ten minutes, without a network: `make silicon`.

    python -m benchmarks.silicon [--out silicon.json] [--seconds 60] [--sizes 200] [--largest 20000]

It checks driver and wheels, trains a network on drawn digits, and builds engines of it for this GPU (every
precision, by both libraries where both are here, and by ONNX Runtime's providers where it has them). It runs their
golden samples, compares their labels with those of the CPU and with what was drawn, at many sizes, lets eight threads
call them for a minute with the memory before and after, and times calls against the bare network and against PyTorch;
it compares the kernels with NumPy, and tells which nearest neighbours each library takes.

What is not here is skipped, with the reason. All of it is in one JSON, written after every part, and for people on one
page beside it. Exit code 1: something is wrong; please send both.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from fcn_deploy.runtime.backends.tensorrt.device import name_of
from fcn_deploy.runtime.command import run
from fcn_deploy.runtime.errors import DeployError

from benchmarks.silicon import build as silicon_build
from benchmarks.silicon.build import TIMED, Built
from benchmarks.silicon.engine import Job, Parts, Record, SkippedError, apart, gpu, median, run_parts
from benchmarks.silicon.kernels import kernel_rows
from benchmarks.silicon.page import page
from benchmarks.silicon.pytorch import rows as torch_rows
from fcn_deploy import ModelCard

PACKAGES = (
    "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "pycuda", "onnxruntime", "onnxruntime-gpu", "nvidia-cuda-nvrtc",
    "torch",
)  # fmt: skip
LARGEST = 20000  # pixels a side
SANITIZING = 180.0  # seconds that an engine may take under compute-sanitizer, which is slow


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


def kernels(largest: int) -> Record:
    """The kernels against NumPy, for each type, at sizes up to `largest`: equal bit for bit."""
    with gpu() as (cuda, device):
        rows = list(kernel_rows(cuda, device, largest))  # what it holds is given back while the context is current
    return {"rows": rows, "ok": all(row["equal"] is not False for row in rows)}


def pytorch(model: Any, card: ModelCard, sizes: Sequence[tuple[int, int]], runs: int) -> Record:
    """The same network by PyTorch on the same GPU."""
    import torch

    if not torch.cuda.is_available():
        raise SkippedError(
            f"PyTorch {torch.__version__} finds no GPU; install one that is built for CUDA (pytorch.org)"
        )
    return {"rows": torch_rows(model, card, sizes, lambda work: median(work, runs)), "ok": True}


def sanitizer(engine: Path) -> Record:
    """verify-engine under compute-sanitizer: no access out of bounds, in our kernels or the library's."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise SkippedError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    command = [program, "--error-exitcode", "9", sys.executable, "-m", "fcn_deploy.runtime.verify", str(engine)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZING)
    except subprocess.TimeoutExpired as error:
        raise SkippedError(f"it was not through after {SANITIZING:g} s") from error
    return {"said": (done.stdout + done.stderr).strip().splitlines()[-3:], "ok": done.returncode == 0}


def measure(built: Built, folder: Path, record: Record, out: Path, seconds: float, sizes: int, largest: int) -> Record:
    """Everything of what was built, added to a record, which is written after every part.

    Args:
        built: the engines, and why others are none.
        folder: for files.
        out: the record's file.
        seconds: of eight threads, shared by the engines.
        sizes: at which labels are compared.
        largest: side of an image in pixels that kernels are tried at.
    """

    def keep(record: Record) -> None:
        written(record, out)

    record |= built.others
    keep(record)
    known = silicon_build.references(built.cpu, folder / "references", sizes)
    for name, engine in built.engines.items():
        record |= apart(Job(name, str(engine), str(known), seconds / len(built.engines)))
        keep(record)
    # What may break this process comes last, and PyTorch before our kernels.
    parts: Parts = {
        f"nearest neighbours, {library}": lambda target=target: silicon_build.nearest(folder, target)
        for library, target in silicon_build.libraries().items()
    }
    firsts = {name.partition(" by ")[2]: name for name in reversed(built.engines)}  # one of each library
    parts |= {f"sanitizer, {name}": lambda name=name: sanitizer(built.engines[name]) for name in firsts.values()}
    parts |= {
        "PyTorch": lambda: pytorch(built.model, built.card, TIMED, 50),
        "kernels": lambda: kernels(largest),
    }
    return run_parts(parts, record, keep)


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("silicon.json"),
    seconds: Annotated[float, typer.Option(min=0, help="Seconds of eight threads, shared by the engines.")] = 60,
    sizes: Annotated[int, typer.Option(min=1, help="Sizes at which labels are compared.")] = 200,
    largest: Annotated[int, typer.Option(min=1, help="Largest side that the kernels are tried at.")] = LARGEST,
) -> int:
    """Run everything that wants a GPU, and write one JSON, and one page beside it."""
    try:
        record: Record = {"machine": machine()}
    except SkippedError as error:
        raise DeployError(f"{error}; run this on a machine with an NVIDIA GPU") from error
    with tempfile.TemporaryDirectory() as folder:
        built = silicon_build.build(Path(folder))
        measure(built, Path(folder), record, out, seconds, sizes, largest)
    print(f"{out}, {out.with_suffix('.html')}")
    return int(not all(part["ok"] for part in record.values()))


def written(record: Record, out: Path) -> None:
    """Write a record as JSON, and as a page beside it."""
    out.write_text(json.dumps(record, indent=1))
    out.with_suffix(".html").write_text(page(record))


if __name__ == "__main__":
    run(main, "benchmarks.silicon")

"""Is memory= kept? Peak memory of calls over networks, budgets and sizes of image, each in a process of its own.

    python -m benchmarks.budgets [--networks unet,deeplabv3plus] [--budgets 200,600,1500] [--megapixels 1,4,12]
        [--callers 1,4] [--int8 DIR] [--backend onnxruntime] [--folder engines] [--json budgets.json]

Networks are those at full width (`full_width`), the zoo of the tests, which is written out small, and paths of
.engine files. Their engines are built first, each in a process of its own, and kept in --folder.

A row is an engine, a budget and a number of callers, each of which labels an image of each size, the smallest first.
Its figures are parts of the budget, of which 1.0 may be taken: `calls`, the peak of anonymous memory meanwhile over
that of the process with the engine open; `engine too`, over that before it was opened. Images and labels, which the
caller holds, are not counted. `kept`: what the process holds after thirty usual images (480×640) that follow, over what
it holds where they are all there was; 1.1 is allowed. A size that does not fit is refused by its plan, and left out.
"""

import argparse
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.runtime.errors import OverBudgetError

from benchmarks.common import memory
from fcn_deploy import ModelCard, Segmenter

USUAL, USUAL_IMAGES = (480, 640), 30
ASPECT = 3 / 4  # height over width
EVERY = 0.002  # seconds between looks at what is held
MOST_KEPT = 1.1
CARD = ModelCard(tuple(map(str, range(19))), stride=8, size_multiple=32)  # of the FCN-8s, which pads by itself
FULL_WIDTH = ("unet", "deeplabv3plus", "segformer", "fcn8s")
STYLES = (
    "unet-transposed", "unet-bilinear", "deeplabv3", "pspnet", "lraspp", "bisenet", "segnet", "dbnet", "channels-last",
    "attention",
)  # fmt: skip  # of the zoo


class Peak:
    """The most anonymous memory that this process holds while it is open."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")
        self.most, self._ended = memory()["anonymous"], threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(EVERY):
            self.most = max(self.most, memory()["anonymous"])

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        now = memory()
        self.most = max(
            self.most, now["peak"] - now["files"]
        )  # what no look has met; files are only mapped, never left


def measure(engine: str, budget: int, callers: int, megapixels: list[float], threads: int | None) -> dict:
    """What this process takes, in bytes over what it held before the engine was opened, beside images and labels.

    Returns:
        `opened`: the open engine. `opening`: the most while it was opened. `sizes`: the most while images of so many
        megapixels were labelled. `refused`: sizes that do not fit. `after`: after usual images; None: these do not fit.
    """
    before, random = memory()["anonymous"], np.random.default_rng(0)
    Path("/proc/self/clear_refs").write_text("5")
    net = Segmenter(engine, threads=threads, memory=budget)  # before any thread: each may have a heap of its own
    now = memory()
    opened, opening = now["anonymous"] - before, max(now["anonymous"], now["peak"] - now["files"]) - before
    result: dict = {"opened": opened, "opening": opening, "sizes": {}, "refused": [], "seconds": {}}
    with net:

        def noise(height: int, width: int) -> np.ndarray:
            return random.integers(0, 256, (height, width, net.card.channels), dtype=np.uint8).astype(net.card.dtype)

        for area in megapixels:
            width = round((area * 1e6 / ASPECT) ** 0.5)
            image = noise(round(width * ASPECT), width)
            callers_own = image.nbytes + callers * math.prod(image.shape[:2]) * net.network.result_bytes("labels")
            started = time.perf_counter()
            try:
                with Peak() as peak, ThreadPoolExecutor(callers) as pool:
                    list(pool.map(net, [image] * callers))
            except OverBudgetError:
                result["refused"].append(area)
                del image  # or it would count as kept
                continue
            result["seconds"][area] = round(time.perf_counter() - started, 1)
            result["sizes"][area] = peak.most - before - callers_own
            del image
        result["after"] = _after_usual(net, noise(*USUAL), before)
    return result


def _after_usual(net: Segmenter, image: np.ndarray, before: int) -> int | None:
    """Bytes held after USUAL_IMAGES calls, over what was held `before`; None where even such an image does not fit."""
    try:
        for _ in range(USUAL_IMAGES):
            net(image)
    except OverBudgetError:
        return None
    return memory()["anonymous"] - before - image.nbytes


def in_process(function: str, *arguments: object) -> Any:
    """What a function of this file gives in a process of its own. Raises RuntimeError with its last line."""
    code = f"import json, benchmarks.budgets as b; print(json.dumps(b.{function}(*json.loads(input()))))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, input=json.dumps(arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"ended by {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def build(name: str, out: str, backend: str, calibration: str | None) -> None:
    """Write the engine of one network, and its .onnx beside it where that is not there."""
    from fcn_deploy.export.build.config import BuildConfig, TuningOptions, backends_of
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.from_torch.export import export_module
    from fcn_deploy.export.importer.import_model import ImportOptions, import_model
    from fcn_deploy.export.quantization.options import QuantizationOptions

    from benchmarks.full_width import full_width
    from tests.zoo import ZOO, network

    onnx = Path(out).with_name(f"{name}.onnx")
    options = ImportOptions() if name in FULL_WIDTH else ImportOptions(**ZOO[name].options)
    if not onnx.exists():
        module = full_width(name) if name in FULL_WIDTH else network(name)
        export_module(module, CARD if name == "fcn8s" else None, onnx, options=None if name == "fcn8s" else options)
    # Weights are random: no accuracy is to be kept.
    quantization = QuantizationOptions(int8=True, calib=calibration, count=10, max_drop=100) if calibration else None
    tuning = TuningOptions(backends_of(backend), seconds=5)
    config = BuildConfig(tuning=tuning, quantization=quantization or QuantizationOptions(), latency_sizes=((64, 64),))
    build_engine(import_model(onnx, options), out, config)


def rows_of(engine: Path, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of the table of one engine."""
    areas = options.megapixels or ([1, 4] if engine.name.split("-")[0] in FULL_WIDTH else [1, 4, 12, 25])
    for budget in options.budgets:
        alone = in_process("measure", str(engine), budget * 1_000_000, 1, [], options.threads)
        for callers in options.callers:
            found = in_process("measure", str(engine), budget * 1_000_000, callers, areas, options.threads)
            most = max(found["sizes"].values(), default=None)
            yield {
                "engine": engine.stem,
                "budget": budget,
                "callers": callers,
                "calls": None if most is None else (most - found["opened"]) / budget / 1e6,
                "with_engine": None if most is None else max(most, found["opening"]) / budget / 1e6,
                "kept": found["after"] / alone["after"] if found["after"] and alone["after"] else None,
                "opened": found["opened"],
                "usual": alone["after"],
            } | {key: found[key] for key in ("sizes", "refused", "seconds")}


def line_of(row: dict) -> str:
    figures = ["–" if row[key] is None else f"{row[key]:.2f}" for key in ("calls", "with_engine", "kept")]
    sizes = ", ".join(map(str, row["sizes"])) or "none"
    refused = f"; not {', '.join(map(str, row['refused']))}" if row["refused"] else ""
    return (
        f"| {row['engine']} | {row['budget']} | {row['callers']} | {' | '.join(figures)} "
        f"| {row['opened'] / 1e6:.0f} | {sizes}{refused} | {sum(row['seconds'].values()):.0f} |"
    )


def numbers(text: str) -> list[float]:
    return [float(word) if "." in word else int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join((*FULL_WIDTH, *STYLES)), help="names, or paths of .engine files")
    parser.add_argument("--budgets", type=numbers, default=[200, 600, 1500], help="MB, of memory=")
    parser.add_argument(
        "--megapixels", type=numbers, help="of the images; otherwise 1 to 4 of slow networks and 1 to 25 of others"
    )
    parser.add_argument("--callers", type=numbers, default=[1, 4], help="threads that call at once")
    parser.add_argument("--backend", default="auto", help="of the engines, as of build-engine")
    parser.add_argument("--int8", metavar="DIR", help="of photographs to calibrate on: engines are INT8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, default=Path("build/budgets"), help="engines, kept from run to run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    print("| engine | memory= MB | callers | calls | engine too | kept | engine MB | megapixels | s |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.networks.split(","):
        try:
            engine = Path(name)
            if engine.suffix != ".engine":
                engine = options.folder / f"{name}-{options.backend}-{'int8' if options.int8 else 'float32'}.engine"
            if not engine.exists():
                in_process("build", name, str(engine), options.backend, options.int8)
            for row in rows_of(engine, options):
                rows.append(row)
                print(line_of(row), flush=True)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    over = [row for row in rows if (row["calls"] or 0) > 1 or (row["kept"] or 0) > MOST_KEPT]
    print(f"{len(rows) - len(over)} of {len(rows)} rows are within what is allowed")


if __name__ == "__main__":
    main()

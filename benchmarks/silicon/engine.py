"""What `make silicon` finds of one engine, in a process of its own: what breaks there costs the others nothing.

python -m benchmarks.silicon.engine JOB RECORD     (the job as JSON; the record grows by each part)
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.metrics import Metrics, confusion_matrix
from fcn_deploy.calibration.report.engine_report import read_report
from fcn_deploy.runtime.backends.tensorrt.device import driver_module
from fcn_deploy.runtime.backends.tensorrt.lane import Batch, Lane
from fcn_deploy.runtime.errors import DeployError, one_line
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import padded_size
from fcn_deploy.runtime.verify import verify

from fcn_deploy import Segmenter

THREADS = 8
LARGEST = 1500  # pixels a side of the images that threads label
SIZES = ((1, 1), (480, 640), (1088, 1920))  # of an engine without profiles
# Share of labels that may differ from the CPU's float32: this, and twice what emulation found to be so.
ALLOWED = {"float32": 1e-3, "bf16": 0.02, "float16": 0.02, "fp8": 0.02, "int8": 0.02}
# Labels drawn at random of 11 classes differ by 0.91. Those of a network that is no better are only told from garbage,
# and golden samples, of scores, are what judges it.
ALL_WRONG = 0.8
LIMIT = 600.0  # seconds beside the threads' that an engine may take
PYTHON = (sys.executable, "-m")  # which runs a part
ROOT = Path(__file__).resolve().parents[2]

Record = dict[str, Any]
Parts = Mapping[str, Callable[[], Record]]


class SkippedError(Exception):
    """Why a part was not run."""


@dataclass(frozen=True)
class Job:
    """An engine to look at.

    Attributes:
        name: of it.
        engine: its file.
        references: folder of images with the labels that the CPU gives them.
        seconds: of eight threads.
        runs: that times are medians of.
    """

    name: str
    engine: str
    references: str
    seconds: float = 5.0
    runs: int = 50


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


def run_parts(parts: Parts, record: Record, keep: Callable[[Record], None] = lambda record: None) -> Record:
    """Add what each part finds to a record, whatever becomes of it; `keep` is called after each."""
    for name, part in parts.items():
        start = time.perf_counter()
        try:
            found = part()
        except SkippedError as error:
            found = {"skipped": str(error), "ok": True}
        except DeployError as error:
            found = {"error": str(error), "ok": False}
        except Exception as error:  # of a library, or ours: the others are run all the same
            found = {"error": f"{type(error).__name__}: {one_line(error, 300)}", "ok": False,
                     "traceback": traceback.format_exc()[-4000:]}  # fmt: skip
        record[name] = found | {"seconds": round(time.perf_counter() - start, 1)}
        said = found.get("skipped") or found.get("error") or ("ok" if found["ok"] else "WRONG")
        print(f"{name}: {said}", flush=True)
        keep(record)
    return record


def apart(job: Job) -> Record:
    """The parts of an engine, run in a process of its own; of what that did not come to, why."""
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "job.json", Path(folder) / "record.json"
        given.write_text(json.dumps(asdict(job)))
        command, ended = [*PYTHON, "benchmarks.silicon.engine", str(given), str(out)], None
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, timeout=LIMIT + job.seconds, cwd=ROOT)
            said = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1][:300]
            ended = done.returncode
            how = f"signal {-ended}" if ended < 0 else f"exit code {ended}"
            why = f"its process broke off ({how}){': ' if said else ''}{said}"
        except subprocess.TimeoutExpired:
            why = f"its process was ended after {LIMIT + job.seconds:g} s"
        found = json.loads(out.read_text()) if out.exists() else {}
    missing = [name for name in parts_of(job) if name not in found]
    if not missing and ended != 0:
        missing = [f"end, {job.name}"]  # as where a library breaks off while it gives things back
    for name in missing:
        print(f"{name}: {why}", flush=True)
    return found | {name: {"error": why, "ok": False} for name in missing}


def parts_of(job: Job) -> Parts:
    """What is looked at, by name."""
    engine = Path(job.engine)
    return {
        f"golden sample, {job.name}": lambda: golden(engine),
        f"labels, {job.name}": lambda: labels(engine, Path(job.references)),
        f"latency, {job.name}": lambda: latency(engine, job.runs),
        f"{THREADS} threads, {job.name}": lambda: stress(engine, job.seconds),
    }


def golden(engine: Path) -> Record:
    """verify-engine."""
    report = verify(engine)
    kept = ("difference", "tolerance", "sizes", "calls_equal", "latency")
    return {key: report[key] for key in kept} | {"ok": report["passed"]}


def labels(engine: Path, references: Path) -> Record:
    """Share of labels that differ from the CPU's float32, at many sizes; and mIoU of both, where the truth is known."""
    rows: list[tuple[int, float]] = []
    with Segmenter(engine) as net:
        classes, precision = len(net.card.classes), net.network.precision
        counts = np.zeros((2, classes, classes), np.int64)
        judged = False
        for file in sorted(references.glob("*.npz")):
            known = np.load(file)
            found = net(known["image"])
            rows.append((found.size, float((found != known["labels"]).mean())))
            if "truth" in known:
                judged = True
                counts += [confusion_matrix(known["truth"], each, classes) for each in (found, known["labels"])]
    allowed = min(ALLOWED[precision] + 2 * _expected(engine), ALL_WRONG)
    pixels, shares = zip(*rows, strict=True)
    share = float(np.average(shares, weights=pixels))
    miou = [round(Metrics.of(each).mean_iou, 4) for each in counts] if judged else None
    return {"images": len(rows), "share": share, "worst": max(shares), "allowed": allowed, "miou": miou,
            "ok": share <= allowed}  # fmt: skip


def _expected(engine: Path) -> float:
    """Share of labels that low precision changes, as the build found by emulation; 0 of float32."""
    report = read_report(engine)
    return 0.0 if report is None or report.accuracy is None else 1 - report.accuracy.value


def _sizes(net: Network) -> tuple[tuple[int, int], ...]:
    """Ends of the first profile."""
    plan = net.manifest.gpu if net.manifest is not None else None
    return SIZES if plan is None else tuple(getattr(plan.profiles[0], name) for name in ("min", "opt", "max"))


def stress(engine: Path, seconds: float) -> Record:
    """Eight threads that call one Segmenter with changing sizes, and the GPU's memory before and after."""
    errors: list[str] = []
    calls = [0] * THREADS
    with gpu() as (cuda, _), Segmenter(engine) as net:
        sizes = _sizes(net.network)
        images = [natural_noise(*np.minimum(size, LARGEST), net.card, index) for index, size in enumerate(sizes)]
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
    return {"of_threads": seconds, "calls": sum(calls), "errors": sorted(set(errors))[:10],
            "free_before_mb": round(before / 1e6, 1), "lost_mb": round(lost / 1e6, 1),
            "ok": not errors and lost < 64e6}  # fmt: skip


def latency(engine: Path, runs: int = 50) -> Record:
    """A call beside the bare network, at the OPT of each profile: medians in milliseconds."""
    rows: list[Record] = []
    with Segmenter(engine) as net:
        plan, backend = net.network.manifest.gpu, net.network.backend
        for size in SIZES[1:] if plan is None else ():
            image = natural_noise(*size, net.card, 0)
            rows.append({"size": list(size), "call_ms": median(lambda image=image: net(image), runs)})
        for index, profile in enumerate(() if plan is None else plan.profiles):
            image = natural_noise(*profile.opt, net.card, 0)
            whole = median(lambda image=image: net(image), runs)
            batch, lane = Batch(index, 1, padded_size(*profile.opt, net.card)), backend.lanes[0]

            def bare(lane: Lane = lane, batch: Batch = batch) -> None:
                lane.execute(batch)
                lane.stream.synchronize()

            with backend._current():
                lane.reserve(batch)
                rows.append({"size": list(profile.opt), "call_ms": whole, "network_ms": median(bare, runs)})
    return {"rows": rows, "ok": True}


def median(work: Callable[[], Any], runs: int) -> float:
    """Milliseconds of a call."""
    times = []
    for _ in range(runs + 5):  # the first ones compile, and capture graphs
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1e3)
    return round(float(np.median(times[5:])), 3)


def main() -> None:
    given, out = map(Path, sys.argv[1:])
    job = Job(**json.loads(given.read_text()))
    run_parts(parts_of(job), {}, lambda record: _written(out, record))
    sys.stdout.flush()


def _written(out: Path, record: Record) -> None:
    """Put a record in the place of the one before, whole."""
    beside = out.with_suffix(".part")
    beside.write_text(json.dumps(record))
    beside.replace(out)


if __name__ == "__main__":
    main()

"""Ours against what a user would pick instead: one table and one plot.

    python -m benchmarks.peers cam.safetensors cam.onnx --data ../shared/camvid --plot peers.png [--json peers.json]
    python -m benchmarks.peers … --earlier CHECKOUT --only ours,ours-int8

Every candidate takes a uint8 [H, W, 3] array and gives a uint8 [H, W] label map, and is told the same number of
threads. Mixed: 24 seeded sizes from 97×61 to 1500×1125, one image after the other; fixed: 512×1024.

Each candidate is a process of its own, in its own stock settings, and only one works at a time: the others wait at
a pipe. In one process they would have to share settings that a user leaves alone (ONNX Runtime's and OpenMP's
threads spin between calls, and slow whatever runs beside them), and their allocators would meet. That an idle
candidate uses no processor is checked before the first round: the largest share is printed.

In every round every candidate that takes part runs every image once, candidates and images in random order, after one
run that is not timed. Ratios are taken within a round, from the sum over the images, so that a change of the machine's
speed hits both sides; what is shown is their median and the 10 % to 90 % range over rounds. PyTorch takes part in
a third of the rounds (at least three), being slow. mIoU is measured through the very call that is timed, on the data's
val split at its own sizes. INT8 candidates are given the same photographs of the train split; ours sets a fifth of them
apart for its accuracy gate.

With --earlier an earlier checkout, in an environment of its own, takes part by its own build-engine and engines.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.runtime.errors import one_line

from benchmarks.candidates import CANDIDATES, MADE, Call, Job, accuracy, has_vnni
from benchmarks.common import mixed_sizes, pyplot, spread
from benchmarks.earlier import Earlier

LEAST, MOST = (97, 61), (1500, 1125)
FIXED_RUNS = 4  # of the fixed size, a round
SMALL = 100_000  # pixels, below which sizes of the mixed stream are summed by themselves too
KINDS = {"mixed": "mixed", "small": "mixed below 0.1 megapixels", "fixed": "fixed"}
OURS = {"ours": "float32", "ours-bf16": "BF16", "ours-int8": "INT8"}


# One process a candidate.


def serve(key: str, job: Job, pipe) -> None:
    """Load a candidate, say what it is like, then answer orders of image numbers with milliseconds, until None."""
    try:
        started = time.perf_counter()
        candidate = CANDIDATES[key]
        call = candidate.load(job, **candidate.arguments)
        mixed, fixed = job.images()
        mixed = [] if candidate.fixed_only else mixed
        loaded = time.perf_counter()
        labels = [call(image) for image in (*mixed, fixed)]
        about = {"load_s": loaded - started, "first_s": time.perf_counter() - loaded}
        for image, found in zip((*mixed, fixed), labels, strict=True):
            if found.shape != image.shape[:2] or found.dtype != np.uint8:
                raise RuntimeError(f"{found.dtype} labels of {found.shape} for an image of {image.shape}")
        data = load_dataset(job.data, "val", count=job.count, card=job.card())
        about["miou"] = accuracy(call, (data[index] for index in range(len(data))), len(job.card().classes))
        time.sleep(0.2)
        used = time.process_time()
        time.sleep(0.5)
        about["idle"] = (time.process_time() - used) / 0.5
        about["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        pipe.send(about | {"labels": labels})
        while (order := pipe.recv()) is not None:
            pipe.send({"mixed": timed(call, mixed, order), "fixed": timed(call, [fixed], [0] * FIXED_RUNS)})
    except EOFError:
        pass  # whoever asked has gone
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {one_line(error, 300)}"})


def timed(call: Call, images: list[np.ndarray], order: list[int]) -> list[float]:
    """Milliseconds of each image, by its number; one more run before them is not counted."""
    if not images:
        return []
    call(images[order[0]])
    times: list[list[float]] = [[] for _ in images]
    for index in order:
        started = time.perf_counter()
        call(images[index])
        times[index].append((time.perf_counter() - started) * 1e3)
    return [float(np.median(values)) for values in times]


class Worker:
    """A process of this machine's own that runs `target(*arguments, pipe)`."""

    def __init__(self, target: Callable, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(*arguments, theirs))
        self.process.start()
        theirs.close()

    def ask(self, question: Any = None) -> None:
        self.pipe.send(question)

    def answer(self, limit: float) -> dict[str, Any]:
        """What it sends next, or {"error"} where it ends or takes longer than `limit` seconds."""
        try:
            if self.pipe.poll(limit):
                return self.pipe.recv()
            said = f"took over {limit:.0f} s, and was stopped"
        except (EOFError, OSError):
            self.process.join(10)
            said = f"its process ended with {self.process.exitcode}"
        self.process.kill()
        return {"error": said}

    def close(self) -> None:
        self.pipe.close()
        self.process.join(10)
        self.process.kill()


def made(name: str, job: Job, pipe) -> None:
    """Prepare one file of MADE; what libraries print meanwhile goes to a .log beside it."""
    function, arguments = MADE[name]
    with job.file(f"{name}.log").open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    started = time.perf_counter()
    try:
        function(job, job.file(name), **arguments)
        pipe.send({"seconds": time.perf_counter() - started})
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {one_line(error, 300)}"})


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what PyTorch runs")
    parser.add_argument("model", type=Path, help="what export-onnx made of it")
    parser.add_argument("--data", required=True, help="labelled images with the splits train and val")
    parser.add_argument("--only", default=",".join(CANDIDATES), help="candidates, comma-separated [default: all]")
    parser.add_argument("--earlier", type=Path, metavar="CHECKOUT", help="whose own engines take part beside ours")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sizes", type=int, default=24, help="in the mixed stream")
    parser.add_argument("--fixed", default="512x1024", help="the image of one size, HEIGHTxWIDTH")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes and of the order")
    parser.add_argument("--count", type=int, help="images of val to measure mIoU on [default: all]")
    parser.add_argument("--calibration", type=int, default=100, help="photographs for INT8")
    parser.add_argument("--limit", type=float, default=1800, help="seconds a candidate may take to get ready")
    parser.add_argument("--work", type=Path, help="folder to keep what is prepared in, and to find it [default: none]")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    keys = options.only.split(",")
    if unknown := [key for key in keys if key not in CANDIDATES]:
        parser.error(f"--only {unknown[0]} is none of {', '.join(CANDIDATES)}")
    try:
        earlier = Earlier.at(options.earlier) if options.earlier else None
    except ValueError as error:
        parser.error(f"--earlier: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sizes = tuple(mixed_sizes(options.sizes, LEAST, MOST, options.seed))
        paths = (str(options.checkpoint), str(options.model), options.data, str(work))
        height, width = map(int, options.fixed.split("x"))
        job = Job(*paths, sizes, (height, width), options.threads, options.count, options.calibration)
        made_for = json.dumps(
            [fingerprint(options.model), options.data, sizes, job.fixed, job.threads, job.calibration]
        )
        if job.file("job.json").exists() and job.file("job.json").read_text() != made_for:
            parser.error(f"--work {work} holds what was prepared for another model, data or settings; name another")
        job.file("job.json").write_text(made_for)
        result = compare(job, keys, options.rounds, options.seed, options.limit, earlier)
    print(f"{result['machine']}; {options.threads} threads; {options.rounds} rounds; {options.model}")
    print(f"largest share of a processor that a waiting candidate used: {result['idle']:.2f}\n")
    print(table(result))
    print()
    print("\n".join(verdicts(result)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        plot(result, options.plot)


def compare(
    job: Job, keys: list[str], rounds: int, seed: int, limit: float, earlier: Earlier | None = None
) -> dict[str, Any]:
    """Prepare, check and time the candidates: what --json writes."""
    candidates = {key: CANDIDATES[key] for key in keys}
    if earlier:
        candidates |= earlier.candidates({key: candidates[key] for key in OURS if key in keys})
    rows = {key: {"name": found.name, "kind": found.kind, "error": None} for key, found in candidates.items()}

    def worker_of(function: Callable, key: str) -> Worker:
        if earlier and key.startswith(f"{earlier.commit}/"):
            return Worker(earlier.become, function.__name__, key, job)
        return Worker(function, key, job)

    prepared: dict[str, dict] = {}
    for name in dict.fromkeys(name for candidate in candidates.values() for name in candidate.needs):
        if not job.file(name).exists():
            say(f"preparing {name}")
            worker = worker_of(made, name)
            prepared[name] = worker.answer(4 * limit)
            worker.close()
    workers, labels = {}, {}
    for key, row in rows.items():
        if failed := [name for name in candidates[key].needs if prepared.get(name, {}).get("error")]:
            row["error"] = prepared[failed[0]]["error"]
            continue
        say(f"starting {row['name']}")
        worker = worker_of(serve, key)
        about = worker.answer(limit)
        labels[key] = about.pop("labels", [])
        row |= about
        if row["error"]:
            worker.close()
        else:
            workers[key] = worker
    # Sums over the sizes, a round each; None where a candidate had no part in it.
    times: dict[str, list[dict | None]] = {key: [] for key in workers}
    random = np.random.default_rng(seed)
    try:
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            order = [int(index) for index in random.permutation(len(job.sizes))]
            turn = [list(workers)[index] for index in random.permutation(len(workers))]
            for key in turn:
                slow = rows[key]["kind"] == "pytorch" and number >= max(3, rounds // 3)
                if slow:
                    times[key].append(None)
                    continue
                workers[key].ask(order)
                found = workers[key].answer(limit)
                sized = zip(found.get("mixed", []), job.sizes, strict=False)
                times[key].append(found | {"small": [ms for ms, size in sized if math.prod(size) < SMALL]})
    finally:
        for worker in workers.values():
            worker.close()
    say("")
    for key in workers:
        failed = [found["error"] for found in times[key] if found and "error" in found]
        if failed:
            rows[key]["error"] = failed[0]
    good = [key for key in workers if not rows[key]["error"]]
    for key in good:
        rows[key] |= figures(times, key, [other for other in OURS if other in good])
        reference = labels.get("torch")
        if reference:
            known = list(zip(reference[-len(labels[key]) :], labels[key], strict=True))
            rows[key]["equal"] = sum(int((a == b).sum()) for a, b in known) / sum(a.size for a, _ in known)
    return {
        "machine": f"{processor()}, {os.cpu_count()} processors",
        "versions": versions(),
        "job": asdict(job),
        "rounds": rounds,
        "prepared": prepared,
        "idle": max((rows[key]["idle"] for key in good), default=0.0),
        "rows": list(rows.values()),
    }


def figures(times: dict[str, list], key: str, ours: list[str]) -> dict[str, Any]:
    """Medians of one candidate, and how many times as fast as it each of ours is, (median, 10 %, 90 %)."""
    own: dict[str, Any] = {"rounds": sum(found is not None for found in times[key]), "ratios": {}}
    for kind in KINDS:
        found = [row[kind] for row in times[key] if row and row[kind]]
        own[f"{kind}_ms"] = spread([sum(row) for row in found]) if found else None
        if kind == "mixed":
            own["size_ms"] = np.median(found, axis=0).tolist() if found else None
        for other in ours:
            pairs = zip(times[key], times[other], strict=True)
            ratios = [sum(a[kind]) / sum(b[kind]) for a, b in pairs if a and b and a[kind] and b[kind]]
            own["ratios"].setdefault(other, {})[kind] = spread(ratios) if ratios else None
    return own


def say(text: str) -> None:
    """Progress, on a terminal alone."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'} ({'VNNI' if has_vnni() else 'no VNNI'})"


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "onnxruntime", "openvino", "nncf", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown. Times are medians over rounds; × is how many times as fast ours is (10 % to 90 % of the rounds)."""

    def times(row: dict, other: str, kind: str) -> str:
        found = row["ratios"].get(other, {}).get(kind)
        return "–" if found is None or other == row["kind"] else f"{found[0]:.2f} ({found[1]:.2f}–{found[2]:.2f})"

    count = len(result["job"]["sizes"])
    height, width = result["job"]["fixed"]
    lines = [
        f"| candidate | mIoU | labels as PyTorch's | {count} mixed sizes, ms | our float32 × | our INT8 × "
        f"| {height}×{width}, ms | our float32 × | our INT8 × | first pass, s | peak, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    failed = []
    for row in result["rows"]:
        if row["error"]:
            failed.append(f"{row['name']}: not measured ({row['error']})")
            continue
        cells = [row["name"], f"{row['miou']:.4f}", f"{row['equal']:.2%}" if "equal" in row else "–"]
        for kind in ("mixed", "fixed"):
            cells.append(f"{row[f'{kind}_ms'][0]:.1f}" if row[f"{kind}_ms"] else "–")
            cells += [times(row, other, kind) for other in ("ours", "ours-int8")]
        cells += [f"{row['first_s']:.1f}", f"{row['peak_mb']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *([""] if failed else []), *failed])


def verdicts(result: dict[str, Any]) -> list[str]:
    """Ours against stock ONNX Runtime, the best of each kind and earlier ones, a line each."""
    rows = [row for row in result["rows"] if not row["error"]]
    lines = []
    for other, label in OURS.items():
        groups = {
            "ONNX Runtime float32, NumPy before and after": [r for r in rows if r["name"] == CANDIDATES["ort"].name],
            "the best float32 peer": [row for row in rows if row["kind"] == "float32"],
            "the best PyTorch": [row for row in rows if row["kind"] == "pytorch"],
        }
        if other == "ours-bf16":
            groups["OpenVINO in the precision of its choice"] = [row for row in rows if row["kind"] == "own"]
        if other == "ours-int8":
            groups["the best INT8 peer"] = [row for row in rows if row["kind"] == "int8"]
            peers = [row for row in rows if not row["kind"].startswith("ours") and row["kind"] != "earlier"]
            groups["the best of all peers"] = peers
        earlier = [row for row in rows if row["name"].startswith(f"{CANDIDATES[other].name} of ")]
        groups |= {row["name"]: [row] for row in earlier}
        for name, group in groups.items():
            for kind, size in KINDS.items():
                known = [(row["ratios"][other][kind], row) for row in group if row["ratios"].get(other, {}).get(kind)]
                if known:
                    ratio, row = min(known, key=lambda pair: pair[0][0])
                    which = f" ({row['name']})" if name.startswith("the best") else ""
                    lines.append(
                        f"our {label} against {name}{which}, {size}: {ratio[0]:.2f} × ({ratio[1]:.2f}–{ratio[2]:.2f})"
                    )
    return lines


def plot(result: dict[str, Any], out: Path) -> None:
    """Time of the mixed stream by candidate, and time per megapixel against size."""
    rows = [row for row in result["rows"] if not row["error"] and row["mixed_ms"]]
    if not rows:
        return
    plt = pyplot()
    colours = {
        "pytorch": "#b0b0b0",
        "float32": "#7fa7d6",
        "own": "#8fc29a",
        "int8": "#e3b26b",
        "ours": "#1f5fa8",
        "ours-bf16": "#2f8a45",
        "ours-int8": "#c9631b",
        "earlier": "#8c6bb1",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 5.6), width_ratios=(1, 1.1), layout="constrained")
    ranked = sorted(rows, key=lambda row: -row["mixed_ms"][0])
    for place, row in enumerate(ranked):
        middle, low, high = row["mixed_ms"]
        left.barh(place, middle, color=colours[row["kind"]], xerr=[[middle - low], [high - middle]], ecolor="#444444")
        left.text(high, place, f"  {middle:.0f} ms · mIoU {row['miou']:.3f}", va="center", fontsize=8)
    left.set_yticks(range(len(ranked)), [row["name"] for row in ranked], fontsize=8)
    # Logarithmic: PyTorch would press the others into a corner.
    ends = [row["mixed_ms"] for row in ranked]
    left.set(xscale="log", xlim=(0.6 * min(low for _, low, _ in ends), 12 * max(high for *_, high in ends)))
    left.set_xlabel(f"ms for {len(result['job']['sizes'])} images of mixed sizes")
    pixels = np.array([height * width / 1e6 for height, width in result["job"]["sizes"]])
    order = np.argsort(pixels)
    marks = iter("osv^<>DPX*hdp8+" * 2)
    for row in rows:
        per_pixel = np.array(row["size_ms"])[order] / pixels[order]
        thick = 2.2 if row["kind"].startswith("ours") else 1
        mark = {"marker": next(marks), "markersize": 4, "linewidth": thick}
        right.plot(pixels[order], per_pixel, label=row["name"], color=colours[row["kind"]], **mark)
    right.set(xscale="log", yscale="log", xlabel="megapixels of the image", ylabel="ms per megapixel")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    right.grid(alpha=0.3, which="both")
    figure.suptitle(f"{result['machine']}, {result['job']['threads']} threads", fontsize=10)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

"""bench-engine: latency, throughput, memory and layers of an engine, at the sizes of its user's images."""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from .backends import Layer
from .backends.host import HostBackend
from .command import InputRange, Json, Threads, log_to_stderr, print_record, run
from .engine_format.engine_file import EngineFile
from .errors import MisuseError, OverBudgetError
from .head.score_window import ScoreWindow
from .head.upsampling import result_from_scores
from .images.header import read_header
from .images.numbers import ReadOptions
from .images.read import decode
from .latency import TIMED_SIZES, timed_sizes
from .network import Network
from .pixels.no_data import filled
from .pixels.noise_image import natural_noise
from .pixels.value_range import Range
from .process_memory import forget_highest, highest, resident
from .sizes import Size, Sizes, parse_sizes

LEAST_RUNS, MOST_RUNS = 3, 200  # of a size
MOST_SIZES = 6  # of a folder's
SECONDS = 20.0
SHOWN_LAYERS = 15
PART_WIDTHS = {"input": 6, "core": 6, "head": 10}  # columns of the shares, whose names are keys of the record


def bench(
    path: Path,
    sizes: Sizes | None = None,
    threads: int | None = None,
    seconds: float = SECONDS,
    layers: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    input_range: Range | str | None = None,
) -> dict[str, Any]:
    """Measure an engine, or a plain ONNX, one call after the other.

    First each size by itself, from the smallest to the largest, then all of them mixed in random order, each as often
    as its share of the images. Images are read before anything is timed.

    Args:
        path: of the model.
        sizes: those to measure; of many, MOST_SIZES from the smallest to the largest; None: those verify-engine times.
            Where they come from images, these are measured; otherwise noise with detail at many scales.
        threads: as for Segmenter.
        seconds: half for the sizes by themselves, half mixed; a size takes LEAST_RUNS at least.
        layers: time each layer, at the middle one of the sizes.
        clock: in seconds.
        input_range: as for Segmenter, of images in files.

    Returns:
        {"file", "target", "precision", "backend", "threads", "sizes": a row each (see `_by_itself`), "mixed":
        {"images", "images_per_s", "megapixels_per_s", "median_ms", "p90_ms"} or null, "memory_mb": {"opened",
        "peak", "after"} or null, and with `layers` "layers": {"size", "rows"} or {"reason"}}.
        Memory is resident memory beyond that of the process before the model was opened, without the images: after
        opening (the library's own code included), at its highest, and at the end.

    Raises:
        DeployError: a model that cannot be opened or run, or an image that cannot be read.
    """
    before = resident()
    forget_highest()
    with Network(path, threads=threads) as net:
        opened = resident()
        if sizes is None:
            usual = TIMED_SIZES if net.manifest is None else timed_sizes(net.manifest)
            sizes = Sizes(Counter(usual))
        chosen = sizes.examples(MOST_SIZES)
        reading = ReadOptions(input_range=input_range)
        images = {size: _image(size, sizes, net, reading) for size in chosen}
        base = before and before + sum(image.nbytes for image in images.values())
        rows = []
        peak = None
        for size, image in images.items():
            rows.append(_by_itself(net, image, seconds / 2 / len(images), clock))
            rows[-1]["images"] = sum(count for _, count in _nearest(sizes, chosen)[size]) if sizes.counts else None
            rows[-1]["source"] = str(sizes.files[size]) if size in sizes.files else "noise"
            peak = highest(peak)
            rows[-1]["peak_mb"] = _megabytes(peak, base)
        runnable = [size for size, row in zip(images, rows, strict=True) if row["median_ms"] is not None]
        weights = _weights(sizes, chosen, runnable)
        report = {
            "file": str(path),
            "target": net.manifest.target if net.manifest else "cpu",
            "precision": net.precision,
            "backend": net.backend.name,
            "threads": threads or "one per core",
            "sizes": rows,
            "mixed": _mixed(net.result, images, weights, seconds / 2, clock) if runnable else None,
            "memory_mb": None,
        }
        if before is not None:
            after = resident()
            report["memory_mb"] = {
                "opened": _megabytes(opened, before),
                "peak": _megabytes(highest(peak, after), base),
                "after": _megabytes(after, base),
            }
        if layers:
            report["layers"] = _layers(net, images, threads)
    return report


def _image(size: Size, sizes: Sizes, net: Network, reading: ReadOptions) -> NDArray[Any]:
    if size in sizes.files:
        return filled(decode(read_header(sizes.files[size]), net.card, reading), net.card)[0]
    return natural_noise(*size, net.card, seed=0)


def _nearest(sizes: Sizes, chosen: Sequence[Size]) -> Mapping[Size, list[tuple[Size, int]]]:
    """For each measured size, those (with their number of images) that are nearer to it by area than to others."""
    groups: dict[Size, list[tuple[Size, int]]] = {size: [] for size in chosen}
    for size, count in sizes.counts.items():
        groups[min(chosen, key=partial(_distance, size))].append((size, count))
    return groups


def _distance(size: Size, measured: Size) -> tuple[bool, float]:
    """By area; but a measured size stands for itself, whatever others have its area."""
    return measured != size, abs(math.log(measured[0] * measured[1] / (size[0] * size[1])))


def _weights(sizes: Sizes, chosen: Sequence[Size], runnable: Sequence[Size]) -> dict[Size, int]:
    """How often each size comes in the mixed run."""
    groups = _nearest(sizes, chosen)
    return {size: sum(count for _, count in groups[size]) or 1 for size in runnable}


def _by_itself(net: Network, image: NDArray[Any], seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """One size: {"size", "runs", "median_ms", "p90_ms", "images_per_s", "megapixels_per_s", "tiles", "share"}.

    `share` is that of the input (normalise, pad), of the core network with what surrounds it, and of the exact
    upsampling (`head`); null where they are one: on a GPU, or in tiles. The times are null where the memory is too
    small for the size.
    """
    height, width = image.shape[:2]
    row: dict[str, Any] = {"size": [height, width], "runs": 0, "median_ms": None, "p90_ms": None}
    row |= {"images_per_s": None, "megapixels_per_s": None, "tiles": None, "share": None}
    try:
        plan = net.plan(height, width, kinds=(net.kind,))
        net.result(image)  # not counted
    except OverBudgetError as error:
        return row | {"reason": str(error)}
    host = net.backend if isinstance(net.backend, HostBackend) and not plan.grids else None
    window = None if host is None else net.own(ScoreWindow.whole(net.scores(image), plan.padded, plan.size))
    whole: list[float] = []
    inputs: list[float] = []
    heads: list[float] = []
    start = clock()
    while len(whole) < MOST_RUNS and (len(whole) < LEAST_RUNS or clock() - start < seconds):
        before = clock()
        net.result(image)
        after = clock()
        whole.append(after - before)
        if host is not None and window is not None:
            with host.prepared(image):
                prepared = clock()
            result_from_scores(net.kind, window, net.upsampling, net.card)
            inputs.append(prepared - after)
            heads.append(clock() - prepared)
    median = float(np.median(whole))
    if host is not None:
        first, last = (min(1.0, float(np.median(times)) / median) for times in (inputs, heads))
        row["share"] = {"input": round(first, 4), "core": round(max(0.0, 1 - first - last), 4), "head": round(last, 4)}
    return row | {
        "runs": len(whole),
        "median_ms": round(median * 1e3, 3),
        "p90_ms": round(float(np.percentile(whole, 90)) * 1e3, 3),
        "images_per_s": round(1 / median, 2),
        "megapixels_per_s": round(height * width / median / 1e6, 3),
        "tiles": sum(grid.count for grid in plan.grids),
    }


def _mixed(
    call: Callable[[NDArray[Any]], Any],
    images: Mapping[Size, NDArray[Any]],
    weights: Mapping[Size, int],
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Sizes in random order, drawn by their weights; each at least once."""
    draw = random.Random(0)
    order = draw.sample(list(weights), len(weights))
    times: list[float] = []
    pixels, start = 0, clock()
    while len(times) < len(order) or clock() - start < seconds:
        size = order[len(times)] if len(times) < len(order) else draw.choices(list(weights), list(weights.values()))[0]
        before = clock()
        call(images[size])
        times.append(clock() - before)
        pixels += size[0] * size[1]
    total = sum(times)
    return {
        "images": len(times),
        "images_per_s": round(len(times) / total, 2),
        "megapixels_per_s": round(pixels / total / 1e6, 3),
        "median_ms": round(float(np.median(times)) * 1e3, 3),
        "p90_ms": round(float(np.percentile(times, 90)) * 1e3, 3),
    }


def _layers(net: Network, images: Mapping[Size, NDArray[Any]], threads: int | None) -> dict[str, Any]:
    """Time of each layer at the middle of the sizes that are run whole, or why it cannot be had."""
    backend, target = net.backend, "cpu" if net.manifest is None else net.manifest.target
    if target != "cpu" or not isinstance(backend, HostBackend):
        return {"reason": f"layers of engines for {target} are timed by NVIDIA's tools only (Nsight Systems)"}
    if backend.name == "openvino":
        from .backends.openvino import profile
    else:
        from .backends.onnxruntime import profile
    sizes = []
    for size in images:
        try:
            if not net.plan(*size).grids:
                sizes.append(size)
        except OverBudgetError:
            continue
    if not sizes:
        return {"reason": "none of the sizes is run whole; name a smaller one with --sizes, or give more memory"}
    size = sizes[len(sizes) // 2]
    with backend.prepared(images[size]) as prepared:
        x = prepared.copy()
    layers: list[Layer] = []
    if net.manifest is None:
        layers, _ = profile(net.path, x, threads=threads)
    else:
        with EngineFile(net.path) as engine:
            for stage in engine.manifest.stages:
                more, x = profile(engine.read(stage.file), x, stage.input, stage.output, threads)
                layers += more
    return {
        "size": list(size),
        "rows": [
            {"name": layer.name, "operator": layer.operator, "ms": round(layer.milliseconds, 4), "kernel": layer.kernel}
            for layer in layers
        ],
    }


def _megabytes(amount: int | None, base: int | None) -> float | None:
    return None if amount is None or base is None else round(max(0, amount - base) / 1e6, 1)


def show(report: dict[str, Any]) -> str:
    """A report as text."""
    lines = [
        f"{report['file']}: {report['precision']} for {report['target']}, run by {report['backend']}, "
        f"threads: {report['threads']}",
        f"{'size':>11} {'images':>7} {'median':>11} {'p90':>11} {'images/s':>9} {'MP/s':>7} "
        f"{'input':>6} {'core':>6} {'upsampling':>10} {'memory':>9}",
    ]
    for row in report["sizes"]:
        images = "" if row["images"] is None else row["images"]
        line = f"{_sides(row['size']):>11} {images:>7} "
        if row["median_ms"] is None:
            lines.append(f"{line}not run: {row['reason']}")
            continue
        shares = row["share"] or {}
        parts = " ".join(
            f"{shares[part]:{width}.1%}" if part in shares else f"{'-':>{width}}" for part, width in PART_WIDTHS.items()
        )
        memory = "-" if row["peak_mb"] is None else f"{row['peak_mb']:,.0f} MB"
        lines.append(
            f"{line}{row['median_ms']:8.2f} ms {row['p90_ms']:8.2f} ms {row['images_per_s']:9.1f} "
            f"{row['megapixels_per_s']:7.2f} {parts} {memory:>9}" + (f"  {row['tiles']} tiles" if row["tiles"] else "")
        )
    if mixed := report["mixed"]:
        lines.append(
            f"mixed, in random order: {mixed['images']} images, {mixed['images_per_s']:.1f} images/s, "
            f"{mixed['megapixels_per_s']:.2f} MP/s; median {mixed['median_ms']:.2f} ms, p90 {mixed['p90_ms']:.2f} ms"
        )
    if memory := report["memory_mb"]:
        lines.append(
            f"memory: {memory['opened']:,.0f} MB to open it, {memory['peak']:,.0f} MB at most, "
            f"{memory['after']:,.0f} MB at the end (beyond the process before it, and the images)"
        )
    else:
        lines.append("memory: not measured; it is read from Linux's /proc")
    if timed := report.get("layers"):
        lines += _show_layers(timed)
    return "\n".join(lines)


def _sides(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def _show_layers(timed: dict[str, Any]) -> list[str]:
    if "reason" in timed:
        return [f"layers: not timed: {timed['reason']}"]
    total = sum(layer["ms"] for layer in timed["rows"]) or 1.0
    operators: Counter[str] = Counter()
    number = Counter(layer["operator"] for layer in timed["rows"])
    for layer in timed["rows"]:
        operators[layer["operator"]] += layer["ms"]
    lines = [f"layers at {_sides(timed['size'])}: {total:.2f} ms in {len(timed['rows'])} of them"]
    lines += [f"{ms:9.3f} ms {ms / total:6.1%}  {name} ×{number[name]}" for name, ms in operators.most_common()]
    lines.append(f"the {min(SHOWN_LAYERS, len(timed['rows']))} longest:")
    for layer in sorted(timed["rows"], key=lambda layer: -layer["ms"])[:SHOWN_LAYERS]:
        kernel = f"  {layer['kernel']}" if layer["kernel"] else ""
        lines.append(f"{layer['ms']:9.3f} ms {layer['ms'] / total:6.1%}  {layer['operator']}  {layer['name']}{kernel}")
    return lines


def bench_engine(
    engine: Annotated[Path, typer.Argument(help="An .engine (or a plain .onnx).", metavar="ENGINE")],
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Sizes of the images to measure: a folder, glob or list of images, or HxW,HxW [default: four sizes].",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Measure for about so long.")] = SECONDS,
    layers: Annotated[bool, typer.Option("--layers", help="Time each layer too.")] = False,
    input_range: InputRange = None,
    json_: Json = False,
    threads: Threads = None,
) -> None:
    """Measure latency by size, throughput, memory, the shares of input, core and upsampling, and the layers."""
    log_to_stderr()
    found = None if sizes is None else parse_sizes(sizes)
    if found is not None and found.ranges:
        raise MisuseError(f"--sizes {sizes} is a range of profiles; bench-engine takes sizes: 480x640,1080x1920")
    report = bench(engine, found, threads, seconds, layers, input_range=input_range)
    if json_:
        print_record("benchmark", report)
    else:
        print(show(report))


def main() -> None:
    run(bench_engine, "bench-engine", renamed={"--profile": "--layers"})


if __name__ == "__main__":
    main()

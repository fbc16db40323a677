"""verify-engine: does this engine give on this machine what its builder's reference gave?"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .arrays import Image
from .command import FAILURE, Json, Threads, log_to_stderr, print_record, run
from .engine_format.engine_file import EngineFile
from .golden_sample import GOLDEN, golden_difference, repeated
from .head.score_window import ScoreWindow
from .head.upsampling import labels_from_scores
from .latency import latency, latency_rows, show_latency, timed_sizes
from .network import Network
from .sizes import Size

RUNS = 4  # the third captures a CUDA graph, and the fourth is its launch
CALLS_EQUAL = 0.9999  # of labels: scores that differ by their last bit are ties


def verify(path: Path, threads: int | None = None, sizes: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
    """Check an engine's members, run its golden sample, and time it.

    Args:
        path: of an engine.
        threads: as for Segmenter.
        sizes: (height, width) in pixels to time; None: TIMED_SIZES, or those that an engine for GPUs was tuned for.

    Returns:
        {"file", "target", "precision", "backend", "difference" (largest, as a share of the scores'
        range), "tolerance", "labels_equal" (share of pixels, of masks too; null where the network gives values),
        "sizes": [{"size": [H, W], "difference": or null where the memory here does not hold it}],
        "calls_equal" (on GPUs, of labels: the least share of pixels at these sizes that a call gives as NumPy makes
        them of the scores, alone, by its CUDA graph and in a batch; else null),
        "passed", "latency": [{"size": [H, W], "ms": median or null}]}.

    Raises:
        MisuseError: there is no such file.
        DeployError: the file is damaged, or cannot be run here.
    """
    with EngineFile(path) as engine:
        engine.verify()
        sample = engine.read(GOLDEN)
    with Network(path, threads=threads) as net:
        assert net.manifest is not None, "it is an engine: it has been opened as one"
        golden = golden_difference(net, sample)
        equal = _calls_equal(net, np.load(io.BytesIO(sample), allow_pickle=False)["image"], golden.by_size)
        return {
            "file": str(path),
            "target": net.manifest.target,
            "precision": net.precision,
            "backend": net.backend.name,
            "difference": golden.difference,
            "tolerance": golden.tolerance,
            "labels_equal": golden.labels_equal,
            "sizes": [{"size": [*size], "difference": apart} for size, apart in golden.by_size.items()],
            "calls_equal": equal,
            "passed": golden.passed and (equal is None or equal >= CALLS_EQUAL),
            "latency": latency_rows(latency(net, sizes or timed_sizes(net.manifest))),
        }


def _calls_equal(net: Network, image: Image, sizes: Mapping[Size, float | None]) -> float | None:
    """`calls_equal` of `verify`, on an image repeated to each of the sizes that memory held."""
    if not net.on_gpu or net.kind != "labels":
        return None
    shares = [1.0]
    for size in (size for size, difference in sizes.items() if difference is not None):
        each = repeated(image, size)
        plan = net.plan(*size)
        if plan.grids:
            continue
        window = ScoreWindow.whole(net.backend.scores([each])[0], plan.padded, size)
        expected = labels_from_scores(window, net.upsampling, net.card)
        # Until a graph is captured, and once by it; and as often for as many as the profile takes at once.
        for count in sorted({1, net.largest_batch(plan)}):
            found = [labels for _ in range(RUNS) for labels in net.backend.labels([each] * count)]
            shares += [float((labels == expected).mean()) for labels in found]
    return min(shares)


def verify_engine(
    engine: Annotated[Path, typer.Argument(help="Engine to verify.", metavar="ENGINE")],
    json_: Json = False,
    threads: Threads = None,
) -> int:
    """Run an engine's golden sample on this machine, compare with the scores it shall give, and time it."""
    log_to_stderr()
    report = verify(engine, threads)
    if json_:
        print_record("verification", report)
    else:
        verdict = "ok" if report["passed"] else "FAILED"
        print(f"{engine}: {report['precision']} for {report['target']}, run by {report['backend']}")
        equal = "" if report["labels_equal"] is None else f", {report['labels_equal']:.2%} of labels equal"
        print(
            f"golden sample: {verdict}; scores differ by {report['difference']:.1e} of their range "
            f"(limit {report['tolerance']:.0e}){equal}"
        )
        if report["calls_equal"] is not None:
            print(f"calls, alone and in batches: at least {report['calls_equal']:.2%} of labels as NumPy makes them")
        if len(report["sizes"]) > 1:
            print(_by_size(report["sizes"], report["tolerance"]))
        print(show_latency(report["latency"]))
        if not report["passed"]:
            device = "CPU" if report["target"] == "cpu" else "GPU and driver"
            print(f"its results cannot be trusted here; report this with --json, report.json and the {device}")
    return 0 if report["passed"] else FAILURE


def _by_size(rows: Sequence[dict[str, Any]], tolerance: float) -> str:
    """A line of the sizes at which the sample was run, and of those at which it is wrong."""
    run = [row for row in rows if row["difference"] is not None]
    wrong = ["×".join(map(str, row["size"])) for row in run if not row["difference"] <= tolerance]
    sizes = ", ".join("×".join(map(str, row["size"])) for row in run)
    parts = [f"at MIN, OPT, MAX and odd sizes of the profiles: {sizes}"]
    if len(run) < len(rows):
        parts.append(f"not run for lack of memory: {len(rows) - len(run)}")
    if wrong:
        parts.append(f"WRONG at {', '.join(wrong)}")
    return "; ".join(parts)


def main() -> None:
    run(verify_engine, "verify-engine")


if __name__ == "__main__":
    main()

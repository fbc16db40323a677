"""verify-engine: does this engine give on this machine what its builder's reference gave?"""

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from .command import FAILURE, Json, Threads, log_to_stderr, print_record, run
from .engine_file import EngineFile
from .errors import DeployError, OverBudgetError
from .manifest import Manifest
from .model_card import ModelCard
from .network import Network
from .upsampling import ScoreWindow, result_from_scores

GOLDEN = (
    "golden.npz"  # image uint8|uint16|int16|float32 [H,W,C]; scores float32 [K,h,w]; tolerance, of the scores' range
)
TIMED_SIZES = ((256, 256), (480, 640), (512, 1024), (1080, 1920))


def verify(path: Path, threads: int | None = None, sizes: Sequence[tuple[int, int]] | None = None) -> dict[str, Any]:
    """Check an engine's members, run its golden sample, and time it.

    Args:
        path: of an engine.
        threads: as for Segmenter.
        sizes: (height, width) in pixels to time; None: TIMED_SIZES, or those that an engine for GPUs was tuned for.

    Returns:
        {"file", "target", "precision", "backend", "difference" (largest, as a share of the scores'
        range), "tolerance", "labels_equal" (share of pixels, of masks too; null where the network gives values),
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
        return {
            "file": str(path),
            "target": net.manifest.target,
            "precision": net.precision,
            "backend": net.backend.name,
            "difference": golden.difference,
            "tolerance": golden.tolerance,
            "labels_equal": golden.labels_equal,
            "passed": golden.passed,
            "latency": latency_rows(latency(net, sizes or timed_sizes(net.manifest))),
        }


@dataclass(frozen=True)
class GoldenDifference:
    """How far an engine is from its golden sample.

    Attributes:
        difference: largest of the scores, as a share of their range.
        tolerance: of it.
        labels_equal: share of pixels, of masks too; None where the network gives values.
    """

    difference: float
    tolerance: float
    labels_equal: float | None

    @property
    def passed(self) -> bool:
        # Not "difference > tolerance": a NaN must fail.
        return self.difference <= self.tolerance


def golden_difference(net: Network, sample: bytes) -> GoldenDifference:
    """Run a golden sample, the content of its member, on an open engine. Raises DeployError where the shapes differ."""
    golden = np.load(io.BytesIO(sample), allow_pickle=False)
    image, expected, tolerance = golden["image"], golden["scores"], float(golden["tolerance"])
    scores = net.scores(image)
    if scores.shape != expected.shape:
        raise DeployError(
            f"{net.path} gives scores of {list(scores.shape)} for its golden sample, not {list(expected.shape)}; "
            "build it again with build-engine"
        )
    plan = net.plan(*image.shape[:2])
    difference = float(np.abs(scores - expected).max() / max(np.ptp(expected), 1e-12))
    equal = None
    if net.kind != "values":
        found, reference = (
            result_from_scores(net.kind, ScoreWindow.whole(values, plan.padded, plan.size), net.upsampling, net.card)
            for values in (scores, expected)
        )
        equal = float((found == reference).mean())
    return GoldenDifference(difference, tolerance, equal)


def timed_sizes(manifest: Manifest) -> Sequence[tuple[int, int]]:
    """TIMED_SIZES, or the OPT of each profile where the sizes are bound to these."""
    if manifest.gpu is None:
        return TIMED_SIZES
    return sorted({profile.opt for profile in manifest.gpu.profiles})


def latency(net: Network, sizes: Sequence[tuple[int, int]] = TIMED_SIZES, runs: int = 5) -> dict[str, float | None]:
    """{"HxW": median milliseconds of one call on a random image}; None for a size that cannot be run."""
    random = np.random.default_rng(0)
    result: dict[str, float | None] = {}
    for height, width in sizes:
        image = random.integers(0, 256, (height, width, net.card.channels)).astype(net.card.dtype)
        times = []
        try:
            for _ in range(runs + 1):  # the first is not counted
                start = time.perf_counter()
                net.result(image)
                times.append((time.perf_counter() - start) * 1e3)
            result[f"{height}x{width}"] = round(float(np.median(times[1:])), 2)
        except OverBudgetError:
            result[f"{height}x{width}"] = None
    return result


def natural_noise(height: int, width: int, card: ModelCard, seed: int) -> NDArray[Any]:
    """An image with detail at many scales, [H, W, C] in the card's dtype, spread around the card's mean."""
    random = np.random.default_rng(seed)
    image: NDArray[Any] = np.zeros((height, width, card.channels), np.float32)
    for cell in (64, 16, 4, 1):
        rows, columns = -(-height // cell), -(-width // cell)
        values = random.standard_normal((rows, columns, card.channels), dtype=np.float32)
        image += np.repeat(np.repeat(values, cell, 0), cell, 1)[:height, :width] * 0.6
    image = image * np.asarray(card.std, np.float32) + np.asarray(card.mean, np.float32)
    if card.dtype == "float32":
        return image
    image = np.clip(image, np.iinfo(card.dtype).min, np.iinfo(card.dtype).max)
    return image.astype(card.dtype)


def latency_rows(milliseconds: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """What `latency` gives, as records have it: [{"size": [H, W], "ms"}]."""
    return [{"size": [*map(int, size.split("x"))], "ms": ms} for size, ms in milliseconds.items()]


def show_latency(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each size of `latency_rows`."""
    return "\n".join(
        f"  {'x'.join(map(str, row['size'])):>10}  "
        + (
            f"{row['ms']:8.1f} ms"
            if row["ms"] is not None
            else "too large for the memory here, or outside the profiles"
        )
        for row in rows
    )


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
        print(show_latency(report["latency"]))
        if not report["passed"]:
            device = "CPU" if report["target"] == "cpu" else "GPU and driver"
            print(f"its results cannot be trusted here; report this with --json, report.json and the {device}")
    return 0 if report["passed"] else FAILURE


def main() -> None:
    run(verify_engine, "verify-engine")


if __name__ == "__main__":
    main()

"""How long one call takes, by size of the image."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .engine_format.manifest import Manifest
from .errors import OverBudgetError
from .network import Network

TIMED_SIZES = ((256, 256), (480, 640), (512, 1024), (1080, 1920))


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

"""From an image's size to how it is run, under a memory budget."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from runtime.engine_file import ModelCard, Stage
from runtime.errors import OverBudgetError
from runtime.prepare import padded_size


@dataclass(frozen=True)
class Tile:
    """A part of the padded image that is run by itself.

    Attributes:
        inner: (top, left, bottom, right) in padded pixels: where its scores are kept.
        outer: the same with the halo around it, which the core is given. It ends where the padded image ends, so
            that borders are what they are in the whole image.
    """

    inner: tuple[int, int, int, int]
    outer: tuple[int, int, int, int]

    @property
    def pixels(self) -> int:
        """Of the core's input."""
        top, left, bottom, right = self.outer
        return (bottom - top) * (right - left)


@dataclass(frozen=True)
class Plan:
    """How an image is run: by one run of the core, or in tiles.

    Attributes:
        size: of the image, (height, width) in pixels.
        padded: what the core would see, whole.
        bytes: estimated working memory of the largest run; 0 where it is not known (a plain ONNX).
        profile: index of the TensorRT profile that runs it, on a GPU.
        tiles: row by row; empty where the image is run whole.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    bytes: int
    profile: int | None = None
    tiles: tuple[Tile, ...] = ()

    @property
    def overhead(self) -> float:
        """Pixels that are computed over those of the padded image."""
        return sum(tile.pixels for tile in self.tiles) / math.prod(self.padded) if self.tiles else 1.0


def plan_run(size: tuple[int, int], card: ModelCard, bytes_per_pixel: float, memory: int, stage: Stage) -> Plan:
    """Plan one image of `size` (height, width) within `memory` bytes: whole where that suffices, else in tiles.

    Raises:
        OverBudgetError: not even one tile fits, or the network cannot be tiled.
    """
    padded = padded_size(*size, card.size_multiple)
    needed = int(padded[0] * padded[1] * bytes_per_pixel)
    if needed <= memory:
        return Plan(size, padded, needed)
    need = (
        f"an image of {size[0]}×{size[1]} pixels needs about {needed / 1e9:.1f} GB, over the memory budget of "
        f"{memory / 1e9:.2f} GB"
    )
    if stage.halo is None:
        raise OverBudgetError(
            f"{need}, and this network cannot be cut into tiles ({stage.whole}); raise it with memory= (--memory), or "
            "label a smaller image"
        )
    unit = math.lcm(stage.period, card.size_multiple)
    tiles = cut(padded, stage.halo, unit, int(memory / bytes_per_pixel))
    if not tiles:
        least = math.prod(min(side, unit + 2 * halo) for side, halo in zip(padded, stage.halo, strict=True))
        raise OverBudgetError(
            f"{need}, and one tile with its halo takes {least * bytes_per_pixel / 1e9:.2f} GB; raise it with memory= "
            "(--memory)"
        )
    return Plan(size, padded, int(max(tile.pixels for tile in tiles) * bytes_per_pixel), tiles=tiles)


def cut(padded: tuple[int, int], halo: tuple[int, int], unit: int, pixels: int) -> tuple[Tile, ...]:
    """The tiles of least total cost whose runs have at most `pixels` each; empty where there are none.

    Args:
        padded: (height, width) of the padded image, in pixels.
        halo: (vertical, horizontal) in pixels, multiples of `unit`.
        unit: tiles begin at its multiples, and `padded` is one.
        pixels: of a run's input, at most.
    """
    best: tuple[int, list, list] | None = None
    for rows in _divisions(padded[0], unit):
        spans = _spans(padded[0], rows, halo[0])
        tallest = max(bottom - top for _, _, top, bottom in spans)
        for columns in _divisions(padded[1], unit):
            across = _spans(padded[1], columns, halo[1])
            if tallest * max(right - left for _, _, left, right in across) <= pixels:
                # The widest that fit are the cheapest of this height.
                cost = sum(b - a for *_, a, b in spans) * sum(b - a for *_, a, b in across)
                if best is None or cost < best[0]:
                    best = cost, spans, across
                break
    if best is None:
        return ()
    _, spans, across = best
    return tuple(
        Tile((top, left, bottom, right), (above, before, below, after))
        for top, bottom, above, below in spans
        for left, right, before, after in across
    )


def _divisions(side: int, unit: int) -> list[int]:
    """Lengths of tiles along a side, the longest first: what 1, 2, 3… even parts come to, in units."""
    units = side // unit
    return list(dict.fromkeys(-(-units // parts) * unit for parts in range(1, units + 1)))


def _spans(side: int, length: int, halo: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, begin with halo, end with halo) of tiles along a side."""
    starts = range(0, side, length)
    return [
        (start, min(start + length, side), max(start - halo, 0), min(start + length + halo, side)) for start in starts
    ]


def available_memory() -> int:
    """Bytes that can be allocated now without swapping, also inside a container whose limit is set by cgroup v2."""
    limits = [int(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            # What was read from files is counted as used, and given back when it is needed.
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            limits.append(int(limit) - used)
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup: physical memory is the bound
    return max(0, min(limits))

"""Tiles: where each begins and ends, what it is computed from, and which shapes a side divides into evenly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Stage


@dataclass(frozen=True)
class Span:
    """A tile along one axis, in padded pixels: where its result is kept, and what it is computed from."""

    start: int
    stop: int
    outer_start: int
    outer_stop: int


@dataclass(frozen=True)
class Grid:
    """The tiles that one stage is run in.

    Attributes:
        padded: (height, width) of the padded image, in pixels.
        tile: (height, width) of the part of a tile whose result is kept; the last of a row or column may be smaller.
        halo: (vertical, horizontal): what a tile is computed from reaches so much further, but ends where the padded
            image ends, so that borders are what they are in the whole image.
        least: what a tile is computed from has so many pixels a side at least, or all that the image has.
        unit: tiles begin at its multiples.
    """

    padded: tuple[int, int]
    tile: tuple[int, int]
    halo: tuple[int, int]
    least: int = 1
    unit: int = 1

    def spans(self, axis: int) -> list[Span]:
        """The tiles along an axis, in order; none begins or ends its halo before one that precedes it."""
        side, length = self.padded[axis], self.tile[axis]
        return [self.span(axis, start, min(start + length, side)) for start in range(0, side, length)]

    def span(self, axis: int, start: int, stop: int) -> Span:
        """A tile of any length, that begins at a multiple of the unit."""
        side, halo = self.padded[axis], self.halo[axis]
        first, last = max(start - halo, 0), min(stop + halo, side)
        if last - first < self.least:  # a wider halo changes no scores
            last = min(first + -(-self.least // self.unit) * self.unit, side)
            first = min(first, max(last - self.least, 0) // self.unit * self.unit)
        return Span(start, stop, first, last)

    def after(self, rows: Span, columns: Span) -> tuple[Span, Span] | None:
        """The tile that follows one, row after row; None: it is the last."""
        (high, wide), (height, width) = self.tile, self.padded
        if columns.stop < width:
            return rows, self.span(1, columns.stop, min(columns.stop + wide, width))
        if rows.stop < height:
            return self.span(0, rows.stop, min(rows.stop + high, height)), self.span(1, 0, min(wide, width))
        return None

    @property
    def largest(self) -> tuple[int, int]:
        """(height, width) of the largest part that a tile is computed from."""
        tall, wide = (max(span.outer_stop - span.outer_start for span in self.spans(axis)) for axis in (0, 1))
        return tall, wide

    @property
    def count(self) -> int:
        return math.prod(-(-side // length) for side, length in zip(self.padded, self.tile, strict=True))

    @property
    def overhead(self) -> float:
        """Pixels that are computed over those of the padded image."""
        computed = (sum(span.outer_stop - span.outer_start for span in self.spans(axis)) for axis in (0, 1))
        return math.prod(computed) / math.prod(self.padded)


def cells_of(pixels: int, stride: int, short: int = 0) -> int:
    """Cells of a map of an image of so many pixels, which may end within a cell; `short` as of Stage."""
    return -(-(pixels - short) // stride)


def unit_of(stage: Stage, card: ModelCard) -> int:
    """Pixels at whose multiples tiles begin."""
    return math.lcm(stage.period, card.size_multiple)


def grid_of(padded: tuple[int, int], tile: tuple[int, int], stage: Stage, card: ModelCard) -> Grid:
    """The tiles of this shape that a stage is run in."""
    return Grid(padded, tile, stage.halo or (0, 0), card.smallest, unit_of(stage, card))


def lengths_of(side: int, stage: Stage, axis: int, card: ModelCard) -> Sequence[tuple[int, int, int, int]]:
    """(length, pixels of all runs, shortest run, longest run) of the even divisions of a side, the longest first."""
    if stage.halo is None:
        return [(side, side, side, side)]
    return _divisions(side, unit_of(stage, card), stage.halo[axis], card.smallest, stage.tile)


@lru_cache(maxsize=256)  # the same for all stages, passes and budgets of an image
def _divisions(
    side: int, unit: int, halo: int, smallest: int, most: int | None
) -> tuple[tuple[int, int, int, int], ...]:
    """As lengths_of says, of tiles that begin at multiples of `unit` and are `most` pixels long at most."""
    units = -(-side // unit)
    found = []
    # The lengths that 1, 2, 3… even parts come to.
    lengths = dict.fromkeys(-(-units // parts) * unit for parts in range(1, units + 1))
    allowed = [length for length in lengths if most is None or length <= most] or [unit]
    for length in allowed:
        spans = Grid((side, side), (length, length), (halo, halo), smallest, unit).spans(0)
        runs = [span.outer_stop - span.outer_start for span in spans]
        found.append((length, sum(runs), min(runs), max(runs)))
    return tuple(found)

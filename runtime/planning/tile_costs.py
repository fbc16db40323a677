"""What tiles of each shape cost, in work and in memory, and which of them are worth a look."""

import math

import numpy as np
import numpy.typing as npt

from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Stage
from ..head.argmax import PIXELS_AT_A_TIME
from .grid import Grid, grid_of, lengths_of
from .kept_rows import KeptRows

Numbers = npt.NDArray[np.float64]

PIXELS_PER_RUN = 3000  # pixels that the fixed cost of one run of a network comes to, roughly
ABOUT_THE_SAME = 0.002  # of two plans' work: with five stages, all that differ by less are a million


def tile_options(
    stage: Stage,
    padded: tuple[int, int],
    card: ModelCard,
    pixel: float,
    kept: KeptRows,
    making: float | None,
    arena: float | None = None,
) -> tuple[Numbers, Numbers, list[Grid]]:
    """Costs, bytes and grids, of those that no other beats in both.

    Args:
        pixel: bytes of the stage's input per pixel.
        kept: of its input, beside its tile.
        making: bytes of each pixel that results are made in, some rows at a time; None: none are made of what it gives.
        arena: bytes that a run may take, which are counted already.
    """
    rows, columns = (np.array(lengths_of(padded[axis], stage, axis, card), float) for axis in (0, 1))
    lengths, work_y, _, tallest = rows.T[:, :, None]
    _, work_x, _, widest = columns.T[:, None, :]
    count = np.ceil(padded[0] / lengths) * np.ceil(padded[1] / columns[:, 0])
    cost = stage.cost * (work_y * work_x + PIXELS_PER_RUN * count)
    # A tile's input is a copy. Whole rows are kept between stages: those of a row of tiles, and what its halo reads of
    # the stage before. Scores are there three times: new, joined to what is kept of those before, and those that
    # results are made of meanwhile.
    given = tallest * widest * pixel + kept.taken(tallest, widest, padded[0])
    between = padded[1] * lengths * stage.output_bytes * (1 if making is None else 3)
    between = between + made_at_once(padded[1] * lengths, making or 0)
    running = stage.working_memory(tallest * widest)
    taken = given + between + (running if arena is None else np.where(running <= arena, 0, math.inf))
    best = cheapest(cost.ravel(), taken.ravel())
    best = best[np.isfinite(taken.ravel()[best])]
    tiles = [(int(rows[index // len(columns), 0]), int(columns[index % len(columns), 0])) for index in best]
    return cost.ravel()[best], taken.ravel()[best], [grid_of(padded, tile, stage, card) for tile in tiles]


def made_at_once(pixels: Numbers | float, making: float) -> Numbers | float:
    """Bytes that results of so many pixels are made in, of `making` bytes each."""
    return np.minimum(pixels, PIXELS_AT_A_TIME) * making


def cheapest(cost: Numbers, taken: Numbers) -> npt.NDArray[np.intp]:
    """Indices of the options that no other beats in both, by memory; of those of about one cost, the smallest."""
    order = np.lexsort((cost, taken))
    least = np.minimum.accumulate(cost[order])
    steps = np.floor(np.log(np.maximum(least, np.finfo(float).tiny)) / ABOUT_THE_SAME)
    return order[np.flatnonzero(np.diff(steps, prepend=np.inf))]

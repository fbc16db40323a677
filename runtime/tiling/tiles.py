"""A network's stages run in tiles, from the top of an image to its bottom; each keeps the rows it still needs."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ..arrays import AnyArray, Floats, ImageSource
from ..engine_format.stage import Upsampling
from ..head.score_window import ScoreWindow, last_cells
from ..planning.grid import Grid, Span, cells_of

T = TypeVar("T")
# First row and row after the last, in padded pixels, and what a stage makes of them: [K, h, w].
Band = tuple[int, int, AnyArray]
# A tile of the image, or of the features before: rows and columns in padded pixels → [K, h, w].
Compute = Callable[[Span, Span], AnyArray]
# The same of a stage after the first, which is given its input: float or uint8 [1, C, h, w] → [K, h', w'].
ComputeLater = Callable[[AnyArray, Span, Span], AnyArray]


class Rows:
    """The rows of a stage's result that are still needed, from bands that are made when they are asked for."""

    def __init__(self, bands: Iterator[Band], stride: tuple[int, int]) -> None:
        self._bands, self._stride = bands, stride
        self._kept: list[Band] = []
        self._buffer: AnyArray = np.empty(0, np.uint8)

    def part(self, rows: Span, columns: Span) -> AnyArray:
        """[1, C, h, w] of what a tile is computed from, until the next is asked for.

        Rows above it are forgotten: tiles come from top to bottom.
        """
        self._forget(rows.outer_start)
        while not self._kept or self._kept[-1][1] < rows.outer_stop:
            self._kept.append(next(self._bands))
            self._forget(rows.outer_start)
        parts = []
        for top, bottom, band in self._kept:
            start, stop = max(top, rows.outer_start), min(bottom, rows.outer_stop)
            if start < stop:
                high, wide = self._stride
                across = slice(columns.outer_start // wide, cells_of(columns.outer_stop, wide))
                parts.append(band[:, (start - top) // high : cells_of(stop - top, high), across])
        shape = len(parts[0]), sum(part.shape[1] for part in parts), parts[0].shape[2]
        count, dtype = math.prod(shape), parts[0].dtype
        if len(self._buffer) < count or self._buffer.dtype != dtype:
            self._buffer = np.empty(count, dtype)  # kept: a fresh one costs page faults for every tile
        return np.concatenate(parts, axis=1, out=self._buffer[:count].reshape(shape))[None]

    def _forget(self, above: int) -> None:
        while self._kept and self._kept[0][1] <= above:
            del self._kept[0]


def part_of(image: ImageSource, grid: Grid, rows: Span, columns: Span) -> AnyArray:
    """The part of an image that a tile is computed from; one that reads ahead is told which comes next.

    Beyond the image lies its padding, to which a tile at the edge comes by itself.
    """
    part = image[rows.outer_start : rows.outer_stop, columns.outer_start : columns.outer_stop]
    expect = getattr(image, "expect", None)
    if expect is not None and (coming := grid.after(rows, columns)) is not None:
        expect(tuple(slice(span.outer_start, span.outer_stop) for span in coming))
    return np.asarray(part)


def score_bands(
    grids: Sequence[Grid],
    strides: Sequence[tuple[int, int]],
    first: Compute,
    others: Sequence[ComputeLater],
    start: int = 0,
    shorts: Sequence[tuple[int, int]] = (),
) -> Iterator[Band]:
    """The scores of an image, a row of tiles at a time.

    Args:
        grids: of each stage.
        strides: pixels of a cell of each stage's result, (vertical, horizontal).
        first: gives the first stage's features of a tile of the image.
        others: the stages after it.
        start: a row of the padded image, in pixels: what comes before its row of tiles is left out.
        shorts: what each stage's result is short of, as of Stage; none: of nothing.

    Yields:
        (first row, row after the last) in padded pixels, and the scores between them, [K, h, w].
    """
    begins: list[int] = []
    for grid in reversed(grids):
        span = grid.spans(0)[start // grid.tile[0]]
        begins.insert(0, span.start)
        start = span.outer_start
    shorts = shorts or [(0, 0)] * len(grids)
    bands = _bands(grids[0], strides[0], shorts[0], first, begins[0])
    for index, (grid, run, begin) in enumerate(zip(grids[1:], others, begins[1:], strict=True)):
        rows = Rows(bands, strides[index])
        bands = _bands(grid, strides[index + 1], shorts[index + 1], _on(rows, run), begin)
    return bands


def joined(bands: Iterator[Band], rows: int, short: int = 0) -> AnyArray:
    """The scores of an image of so many padded rows, [K, h, w], from all of its bands; `short` as of Stage."""
    whole: AnyArray | None = None
    for top, bottom, band in bands:
        if (top, bottom) == (0, rows):
            return band
        if whole is None:
            stride = -(-bottom // band.shape[1])
            whole = np.empty((len(band), cells_of(rows, stride, short), band.shape[2]), band.dtype)
        whole[:, top // stride : top // stride + band.shape[1]] = band
        del band  # or it would be in memory beside the next one
    assert whole is not None, "an image has rows"
    return whole


def _on(rows: Rows, run: ComputeLater) -> Compute:
    """A stage on the rows that the one before makes."""
    return lambda y, x: run(rows.part(y, x), y, x)


def _bands(grid: Grid, stride: tuple[int, int], short: tuple[int, int], compute: Compute, start: int) -> Iterator[Band]:
    columns, (high, wide) = grid.spans(1), stride
    cells = [cells_of(*each) for each in zip(grid.padded, stride, short, strict=True)]
    if grid.count == 1:  # also of a stage that is run whole, whose stride may not be known
        (rows,), (across,) = grid.spans(0), columns
        yield rows.start, rows.stop, compute(rows, across)
        return
    for rows in grid.spans(0)[start // grid.tile[0] :]:
        band: AnyArray | None = None
        for across in columns:
            result = compute(rows, across)
            # Tiles begin at whole cells; the last may have none, of a map whose sides are rounded down.
            y, x = (rows.start - rows.outer_start) // high, (across.start - across.outer_start) // wide
            top, left = rows.start // high, across.start // wide
            height = min(cells_of(rows.stop, high), cells[0]) - top
            width = min(cells_of(across.stop, wide), cells[1]) - left
            if band is None:
                band = np.empty((len(result), height, cells[1]), result.dtype)
            band[:, :, left : left + width] = result[:, y : y + height, x : x + width]
        assert band is not None, "an image has columns"
        made = [band]
        del band, result  # while it waits here it holds nothing
        yield rows.start, rows.stop, made.pop()


def one_ahead(items: Iterator[T], stop: threading.Event) -> Iterator[T]:
    """Items, of which the next is made in a thread of its own while the caller is at work with one.

    Where the caller stops before the end `stop` is set, which `items` should heed, and what runs is waited for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="fcn-deploy") as pool:
        try:
            coming = pool.submit(next, items, None)
            while True:
                made: list[T] = [item for item in (coming.result(),) if item is not None]
                if not made:
                    return
                coming = pool.submit(next, items, None)
                yield made.pop()  # not held here while the caller has it
        finally:
            stop.set()


def ready_windows(
    bands: Iterator[Band],
    stride: int,
    upsampling: Upsampling,
    padded: tuple[int, int],
    size: tuple[int, int],
    start: int = 0,
    reach: int = 0,
    seen: int | None = None,
    short: int = 0,
) -> Iterator[ScoreWindow]:
    """Rows of pixels from row `start` to the last, as soon as all scores that they are made of are there.

    Args:
        bands: as from `score_bands`; the first holds the scores that row `start` is made of.
        stride: rows of pixels of a row of scores.
        upsampling: the network's last Resize.
        padded, size: (height, width) of the core's input and of the image, in pixels.
        start: first row of pixels.
        reach: so many rows of scores above and below those that a row of pixels lies between are kept with it.
        seen: rows of what the network looks at, where that is a resized image; bands and `stride` are in those.
        short: rows of pixels that the scores are short of, as of Stage.
    """
    kept: Floats | None = None
    seen = seen or padded[0]
    first, cells, done = 0, cells_of(seen, stride, short), start
    for top, bottom, band in bands:
        if (top, bottom) == (0, seen):
            kept, cells = band, band.shape[1]
        elif kept is None:
            kept, first = band, top // stride
        else:
            kept = np.concatenate([kept, band], axis=1)
        del band  # or it would be in memory beside the next one
        # Rows whose last cell is here; the others wait for the next band.
        lasts = np.minimum(last_cells(upsampling, cells, padded[0], size[0]) + reach, cells - 1)
        stop = int(np.searchsorted(lasts, first + kept.shape[1], "left"))
        if stop <= done:
            continue
        yield ScoreWindow(kept, padded, size, (done, stop), first, cells)
        done = stop
        if done < size[0]:
            # One more than the next row's last cell needs: interpolation reads the cell before it.
            unneeded = max(int(lasts[done]) - 1 - 2 * reach - first, 0)
            # A copy, as a view of few rows would keep all of them in memory.
            kept, first = kept[:, unneeded:].copy(), first + unneeded

"""Tiles of a network that pools over the whole image: passes for the pooled values, then the scores.

What a network takes of a whole map (the mean of each channel, of a grid, a variance) is summed in float64 over the
inner parts of tiles, in the order of the tiles; its own operator sums in float32, in another order. So scores are equal
to those of the whole image but for float32's rounding: not bit for bit, as tiles of a network are that does not pool.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..arrays import AnyArray, ImageSource
from ..backends.onnxruntime import session
from ..engine_format.model_card import ModelCard
from ..engine_format.pooled import Interpolation, Pooled, Statistic
from ..engine_format.stage import Stage
from ..errors import DeployError, MisuseError, one_line
from ..head.resize_axis import axis_of
from ..pixels.prepare import prepare
from ..planning.grid import Grid, Span, cells_of
from ..planning.plan import Plan
from ..process_memory import give_back_freed
from .resized import resized_part
from .tiles import Band, part_of, score_bands

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

KEPT = 16_000_000  # bytes that the process may keep after each tile

Values = Mapping[str, AnyArray]


class PooledTiles:
    """Networks whose pooled values are inputs, run in tiles; opened when they are first needed.

    They are ONNX Runtime's, whatever library runs whole images, and keep no memory between runs.

    Args:
        pooled: of the engine.
        card: of the model.
        read: gives a member of the engine by its name.
        threads: of one run; None: one per physical core.
    """

    def __init__(self, pooled: Pooled, card: ModelCard, read: Callable[[str], bytes], threads: int | None) -> None:
        self._pooled, self._card, self._read, self._threads = pooled, card, read, threads
        self._sessions: dict[str, InferenceSession] | None = {}
        self._opening = threading.Lock()

    def bands(
        self, image: ImageSource, plan: Plan, start: int = 0, wanted: Callable[[], None] = lambda: None
    ) -> Iterator[Band]:
        """The scores of an image, as score_bands gives them, by a plan of passes; `wanted` raises once they are not."""
        values: dict[str, AnyArray] = {}
        for each, grids in zip(self._pooled.passes, plan.passes, strict=True):
            last, seen = each.stages[-1], grids[-1].padded
            stride = last.stride
            high, wide = (cells_of(*sides) for sides in zip(seen, stride, last.short, strict=True))
            totals = Totals(each.statistics, (high, wide))
            for top, _, band in self._chain(image, each.stages, grids, values, 0, wanted):
                totals.add(top // stride[0], band)
            values |= totals.values()
        yield from self._chain(image, self._pooled.stages, plan.grids, values, start, wanted)

    def run_whole(self, stage: Stage, before: Stage | None, size: tuple[int, int]) -> AnyArray:
        """What one stage gives for zeros, as for an image of `size` in one tile; `before`: the stage before it."""
        taken = next(given for given in self._session(stage.file).get_inputs() if given.name == stage.input)
        strides, shorts = ((1, 1), (0, 0)) if before is None else (before.stride, before.short)
        sides = [cells_of(*each) for each in zip(size, strides, shorts, strict=True)]
        dtype = {"tensor(uint8)": np.uint8, "tensor(int8)": np.int8}.get(taken.type, np.float32)
        rows, columns = (Span(0, side, 0, side) for side in size)
        return self._run(stage, np.zeros((1, taken.shape[1], *sides), dtype), rows, columns, size, {})

    def forget(self) -> None:
        """Close the networks, until they are needed again."""
        with self._opening:
            self._sessions = self._sessions and {}

    def close(self) -> None:
        """Release the networks. Using them afterwards raises MisuseError."""
        self._sessions = None

    def _chain(
        self,
        image: ImageSource,
        stages: tuple[Stage, ...],
        grids: tuple[Grid, ...],
        values: Values,
        start: int,
        wanted: Callable[[], None],
    ) -> Iterator[Band]:
        padded = grids[0].padded

        def first(rows: Span, columns: Span) -> AnyArray:
            wanted()
            if self._pooled.resized is None:
                part = prepare(part_of(image, grids[0], rows, columns), self._card)
            else:
                part = resized_part(image, grids[0], rows, columns, self._card)
            return self._run(stages[0], part, rows, columns, padded, values)

        def later(stage: Stage) -> Callable[[AnyArray, Span, Span], AnyArray]:
            return lambda part, rows, columns: self._run(stage, part, rows, columns, padded, values)

        strides, shorts = [stage.stride for stage in stages], [stage.short for stage in stages]
        return score_bands(grids, strides, first, list(map(later, stages[1:])), start, shorts)

    def _run(
        self, stage: Stage, part: AnyArray, rows: Span, columns: Span, padded: tuple[int, int], values: Values
    ) -> AnyArray:
        """One stage on a tile → [K, h', w']."""
        from onnxruntime import RunOptions

        run, options = self._session(stage.file), RunOptions()
        options.only_execute_path_to_fetches = True  # a pass needs a part of the network alone
        places = interpolation_inputs(self._pooled.interpolations, (rows, columns), padded)
        feeds = {stage.input: part}
        for given in run.get_inputs():
            if given.name not in feeds:
                # What is pooled in later passes does not matter yet, and is wanted all the same.
                known = places.get(given.name, values.get(given.name))
                feeds[given.name] = np.zeros(given.shape, np.float32) if known is None else known
        try:
            result: AnyArray = run.run([stage.output], feeds, options)[0][0]
        except Exception as error:
            raise DeployError(f"the network failed on a tile of {list(part.shape)}: {one_line(error)}") from error
        if (
            stage.working_memory((rows.outer_stop - rows.outer_start) * (columns.outer_stop - columns.outer_start))
            > KEPT
        ):
            give_back_freed()  # tiles of several shapes would each leave holes that the next finds no room in
        return result

    def _session(self, file: str) -> "InferenceSession":
        with self._opening:
            if self._sessions is None:
                raise MisuseError("the Segmenter was closed; open another one")
            if file not in self._sessions:
                self._sessions[file] = session(self._read(file), self._threads, arena=False)
            return self._sessions[file]


def interpolation_inputs(
    interpolations: tuple[Interpolation, ...], tile: tuple[Span, Span], padded: tuple[int, int]
) -> dict[str, AnyArray]:
    """The inputs that say where Resizes read, for a tile (rows, columns) of an image of (height, width) `padded`."""
    inputs: dict[str, AnyArray] = {}
    for each in interpolations:
        span, side = tile[each.axis], padded[each.axis]
        begin, length = span.outer_start // each.stride, span.outer_stop - span.outer_start
        stop = begin + cells_of(length, each.stride, each.short)
        cells = each.cells or cells_of(side, each.source, each.source_short)
        read = axis_of(each.how, each.axis, cells, cells_of(side, each.stride, each.short), begin, stop)
        # Of a map there are the cells of the tile alone: what lies beyond is read by what its halo discards.
        before = span.outer_start // each.source if each.source else 0
        last = (cells_of(length, each.source, each.source_short) if each.source else cells) - 1
        inputs[f"{each.name}/first"] = np.clip(read.first - before, 0, last).astype(np.int64)
        if each.how.mode == "linear":
            inputs[f"{each.name}/second"] = np.clip(read.second - before, 0, last).astype(np.int64)
            inputs[f"{each.name}/weight"] = read.weight.reshape((-1, 1) if each.axis == 0 else (1, -1))
    return inputs


class Totals:
    """Statistics of a map, from bands of its rows.

    Args:
        statistics: that are wanted.
        size: (height, width) of the map in cells.
    """

    def __init__(self, statistics: tuple[Statistic, ...], size: tuple[int, int]) -> None:
        self._statistics, self._size = statistics, size
        self._sums: dict[str, AnyArray] = {}
        self._spread: _Spread | None = None

    def add(self, first: int, band: AnyArray) -> None:
        """Rows from row `first` on: [C, rows, w]; none of a last tile without a whole cell."""
        if not band.shape[1]:
            return
        for each in self._statistics:
            if each.kind == "variance":
                self._spread = self._spread or _Spread(len(band))
                self._spread.add(band)
                continue
            sums = self._sums.setdefault(each.name, np.zeros((len(band), *each.cells), np.float64))
            for i, (top, bottom) in enumerate(_shares(self._size[0], each.cells[0])):
                rows = band[:, max(top - first, 0) : max(bottom - first, 0)]
                if rows.shape[1] == 0:
                    continue
                for j, (left, right) in enumerate(_shares(self._size[1], each.cells[1])):
                    sums[:, i, j] += rows[:, :, left:right].sum((1, 2), dtype=np.float64)

    def values(self) -> dict[str, AnyArray]:
        """Name → the statistic, float32 [1, C, rows, columns]."""
        found: dict[str, AnyArray] = {}
        for each in self._statistics:
            if each.kind == "variance":
                assert self._spread is not None, "a map has rows"
                result = self._spread.variance[:, None, None]
            else:
                high, wide = (
                    np.array([stop - start for start, stop in _shares(self._size[axis], each.cells[axis])])
                    for axis in (0, 1)
                )
                result = self._sums[each.name] / (high[:, None] * wide)
            found[each.name] = result.astype(np.float32)[None]
        return found


class _Spread:
    """The variance of each channel, from parts (Chan, Golub, LeVeque, "Updating formulae …", 1979)."""

    def __init__(self, channels: int) -> None:
        self._count = 0
        self._mean, self._squares = np.zeros(channels), np.zeros(channels)

    def add(self, band: AnyArray) -> None:
        count, mean = band[0].size, band.mean((1, 2), dtype=np.float64)
        # A channel at a time, as the differences are float64.
        squares = np.array([np.square(each - middle).sum() for each, middle in zip(band, mean, strict=True)])
        apart, together = mean - self._mean, self._count + count
        self._squares += squares + apart**2 * (self._count * count / together)
        self._mean += apart * (count / together)
        self._count = together

    @property
    def variance(self) -> AnyArray:
        return self._squares / self._count


def _shares(side: int, parts: int) -> list[tuple[int, int]]:
    """Where each part of a side begins and ends, as adaptive pooling divides it; they overlap where it is uneven."""
    return [(part * side // parts, -(-(part + 1) * side // parts)) for part in range(parts)]

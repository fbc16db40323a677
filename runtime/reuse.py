"""What repeats from frame to frame is not computed twice: the stream of a fixed camera.

Where a part of a frame equals the frame before, pixel for pixel and within the halo, the first stage's result there is
what it was. So only what may differ is run, in rectangles with their halo. The result is compared with what it was: the
next stage is run only where that differs, which after rounding to 8 bits is less than the halo says; and so on to the
scores and the labels. Nothing is estimated: labels are those of whole frames, as tiles' labels are.
"""

import logging
import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .arrays import AnyArray, ImageSource, Labels, size_of
from .errors import MisuseError, OverBudgetError
from .head.refine import refined_labels
from .head.score_window import ScoreWindow
from .head.upsampling import labels_from_scores
from .network import Network
from .pixels.no_data import Invalid, filled, marked
from .pixels.prepare import padded_size
from .planning.grid import Grid, Span, grid_of, unit_of
from .planning.plan import Plan
from .planning.tile_costs import PIXELS_PER_RUN

log = logging.getLogger(__name__)

Changed: TypeAlias = npt.NDArray[np.bool_]  # [rows, columns] of blocks of the padded image
Part: TypeAlias = tuple[Span, Span]  # rows and columns of a rectangle, in padded pixels
Box: TypeAlias = tuple[int, int, int, int]  # top, bottom, left, right, in blocks
WORTH = 0.85  # of the work of a whole run; where the rectangles come to more, it is run whole
LABELS = ("labels",)
# A stream of which nothing is equal, as with a camera's noise, is not compared with itself for ever: after so many such
# frames in a row so many go by unseen, and twice as many whenever the next look finds nothing either.
PATIENCE, LEAST_UNSEEN, MOST_UNSEEN = 2, 4, 32


def refusal(network: Network) -> str | None:
    """Why frames of this network cannot be reused, or None."""
    if network.manifest is None:
        return "a plain ONNX does not tell its receptive field; make an engine: build-engine"
    if network.manifest.gpu is not None:
        return "it runs on a GPU; build one with --target cpu"
    if network.kind != "labels":
        return f"it gives {network.kind}, and labels are reused"
    if network.card.whole:
        return f"each label depends on the whole image ({network.card.whole})"
    whole = [stage.whole for stage in network.stages if stage.halo is None]
    return f"each label depends on the whole image ({whole[0]})" if whole else None


@dataclass
class Frame:
    """A frame on its way.

    Attributes:
        image: checked; a copy without holes, but where it is unseen.
        invalid: where it has no data.
        plan: of a whole run.
        before: the frame before it, where they are of one size and this one is not changed all over.
        changed: blocks that are not equal to those of the frame before.
        maps: what each stage gave, [K, h, w]; None until it is done, or where it failed, or the next frame has them.
        labels: likewise, [H, W].
        done: set when it is, also where it failed.
        unseen: it is run as if by itself.
    """

    image: ImageSource
    invalid: Invalid | None
    plan: Plan
    before: "Frame | None" = None
    changed: Changed | None = None
    maps: list[AnyArray] | None = None
    labels: Labels | None = None
    done: threading.Event = field(default_factory=threading.Event)
    unseen: bool = False


class Reuse:
    """A stream of frames of one camera through an open network.

    Raises:
        MisuseError: the network is not local, or not run on the CPU in stages.
    """

    def __init__(self, network: Network) -> None:
        if (reason := refusal(network)) is not None:
            raise MisuseError(f"{network.path} cannot reuse what repeats (--reuse): {reason}")
        self._network = network
        self._unit = math.lcm(*(unit_of(stage, network.card) for stage in network.stages))
        self._last: Frame | None = None
        self._fruitless, self._unseen, self._left = 0, LEAST_UNSEEN, 0
        self._told = False

    def follow(self, image: object) -> Frame:
        """The next frame, as for a call. Called for each in its order; raises what a call raises before it runs."""
        before, self._last = self._last, None
        given = self._network.checked(image)
        if self._left:
            self._left -= 1
            return self._alone(given)
        plan = self._plan(size_of(given))
        if plan is None:
            return self._alone(given)
        whole, invalid = filled(given[:, :], self._network.card)
        whole = np.ascontiguousarray(whole)
        changed: Changed | None = None
        if before is not None and before.image.shape == whole.shape:
            changed = changed_blocks(np.asarray(before.image), whole, self._unit, plan.padded)
            if self._parts(0, plan, changed) is None:
                changed, self._fruitless = None, self._fruitless + 1
            else:
                self._fruitless, self._unseen = 0, LEAST_UNSEEN
        if self._fruitless >= PATIENCE and changed is None and before is not None:
            self._left, self._unseen = self._unseen, min(2 * self._unseen, MOST_UNSEEN)
            return self._alone(given)
        # A copy: the caller may change it once its labels are there, and the next frame is compared with it.
        frame = Frame(np.array(whole), invalid, plan, None if changed is None else before, changed)
        self._last = frame
        return frame

    def _plan(self, size: tuple[int, int]) -> Plan | None:
        """Of a frame that keeps what its stages give; None: the memory budget does not hold that."""
        network = self._network
        pixel = network.card.channels * np.dtype(network.card.dtype).itemsize  # of its copy
        held = sum(stage.output_bytes for stage in network.stages)
        kept = math.prod(size) * (pixel + network.result_bytes("labels"))
        kept += math.ceil(math.prod(padded_size(*size, network.card)) * held)
        try:
            return network.plan(*size, fine=False, beside=kept)
        except OverBudgetError:
            network.plan(*size)  # raises where it cannot be run by itself either
            if not self._told:
                log.warning(
                    "frames of %d×%d are labelled one by one: what --reuse keeps of them, %.0f MB, and a run are over "
                    "the memory budget", *size, kept / 1e6,
                )  # fmt: skip
            self._told = True
            return None

    def _alone(self, image: ImageSource) -> Frame:
        plan = self._network.plan(*size_of(image), source=image)
        return Frame(image, None, plan, unseen=True)

    def wait(self, frame: Frame) -> None:
        """Until the frame that it goes on from is done."""
        if frame.before is not None:
            frame.before.done.wait()

    def label(self, frame: Frame) -> tuple[Labels]:
        """Labels of a frame, [H, W]. Called by many threads, for frames in their order; raises what a call raises."""
        if frame.unseen:
            (labels,) = self._network.run(frame.image, frame.plan)
            return (labels,)
        self.wait(frame)
        before, frame.before = frame.before, None
        try:
            with self._network.taking(frame.plan):
                if before is None or before.maps is None or before.labels is None or frame.changed is None:
                    self._run_whole(frame)
                else:
                    frame.maps, before.maps = before.maps, None
                    frame.labels, before.labels = before.labels, None
                    self._run_parts(frame, frame.changed)
            assert frame.labels is not None, "both runs set it"
            labels = frame.labels.copy()
        except BaseException:
            frame.maps = frame.labels = None
            raise
        finally:
            frame.done.set()
        (labels,) = marked((labels,), LABELS, frame.invalid, self._network.card)
        return (labels,)

    def _run_whole(self, frame: Frame) -> None:
        maps: list[AnyArray] = []
        for index in range(len(self._network.stages)):
            maps.append(self._whole(index, frame, maps))
        window = ScoreWindow.whole(maps[-1], frame.plan.padded, frame.plan.size)
        frame.maps, frame.labels = maps, self._labels(window, frame)

    def _run_parts(self, frame: Frame, changed: Changed) -> None:
        """Bring the maps and labels of the frame before up to date."""
        assert frame.maps is not None and frame.labels is not None
        # Refined labels follow the image itself, also where the scores stay.
        refined = self._network.refine and bool(changed.any())
        for index in range(len(self._network.stages)):
            if not changed.any():
                break
            parts = self._parts(index, frame.plan, changed)
            if parts is None:
                fresh = self._whole(index, frame, frame.maps)
                changed = self._compare(index, frame, [(_whole_part(frame.plan.padded), fresh)])
                continue
            changed = self._compare(
                index, frame, ((part, self._run(index, frame, frame.maps, *part)) for part in parts)
            )
        if refined or changed.any():
            self._relabel(frame, frame.maps[-1], frame.labels, changed)

    def _compare(self, index: int, frame: Frame, results: Iterable[tuple[Part, AnyArray]]) -> Changed:
        """Put results of a stage in the place of what was there; the blocks in which they differ from it."""
        assert frame.maps is not None
        height, width = (-(-side // self._unit) for side in frame.plan.padded)
        changed, (high, wide) = np.zeros((height, width), bool), self._network.stages[index].stride
        for (rows, columns), fresh in results:
            y, x = rows.start // high, columns.start // wide
            there = frame.maps[index][:, y : y + fresh.shape[1], x : x + fresh.shape[2]]
            differs = (there != fresh).any(axis=0)
            found = _blocks(differs, self._unit // high, self._unit // wide)
            top, left = rows.start // self._unit, columns.start // self._unit
            changed[top : top + found.shape[0], left : left + found.shape[1]] |= found
            if found.any():
                there[:] = fresh
        return changed

    def _parts(self, index: int, plan: Plan, changed: Changed) -> list[Part] | None:
        """Rectangles of a stage's result that may change where its input has; None: it is run whole."""
        stage = self._network.stages[index]
        grid = grid_of(plan.padded, plan.padded, stage, self._network.card)
        dirty = grown(changed, [-(-halo // self._unit) for halo in grid.halo])
        if dirty.mean() > WORTH:
            return None
        boxes = cover(dirty, self._unit, grid)
        if cost_of(boxes, self._unit, grid) > WORTH * (math.prod(plan.padded) + PIXELS_PER_RUN):
            return None
        return [self._part(grid, box) for box in boxes]

    def _part(self, grid: Grid, box: Box) -> Part:
        spans = [
            grid.span(axis, start * self._unit, min(stop * self._unit, grid.padded[axis]))
            for axis, (start, stop) in enumerate((box[:2], box[2:]))
        ]
        return spans[0], spans[1]

    def _run(self, index: int, frame: Frame, maps: Sequence[AnyArray], rows: Span, columns: Span) -> AnyArray:
        """A stage's result of a rectangle, [K, h, w], from the image or what the stage before gave."""
        stages, backend = self._network.stages, self._network.backend
        outer = slice(rows.outer_start, rows.outer_stop), slice(columns.outer_start, columns.outer_stop)
        if index == 0:
            # Beyond the image lies its padding, to which a part at the edge comes by itself.
            result = backend.run_stage(0, frame.image[outer])
        else:
            high, wide = stages[index - 1].stride
            part = maps[index - 1][:, _cells(outer[0], high), _cells(outer[1], wide)]
            result = backend.run_stage(index, np.ascontiguousarray(part)[None])
        high, wide = stages[index].stride
        kept = (
            slice(rows.start - rows.outer_start, rows.stop - rows.outer_start),
            slice(columns.start - columns.outer_start, columns.stop - columns.outer_start),
        )
        return result[:, _cells(kept[0], high), _cells(kept[1], wide)]

    def _whole(self, index: int, frame: Frame, maps: Sequence[AnyArray]) -> AnyArray:
        """A stage's whole result, [K, h, w], ours to change: by one run, or in the plan's tiles."""
        grids, padded = frame.plan.grids, frame.plan.padded
        if not grids or grids[index].count == 1:
            return np.require(self._run(index, frame, maps, *_whole_part(padded)), requirements=("C", "W"))
        grid, (high, wide) = grids[index], self._network.stages[index].stride
        whole: AnyArray | None = None
        for rows in grid.spans(0):
            for columns in grid.spans(1):
                part = self._run(index, frame, maps, rows, columns)
                if whole is None:
                    whole = np.empty((len(part), -(-padded[0] // high), -(-padded[1] // wide)), part.dtype)
                y, x = rows.start // high, columns.start // wide
                whole[:, y : y + part.shape[1], x : x + part.shape[2]] = part
        assert whole is not None, "a grid has tiles"
        return whole

    def _labels(self, window: ScoreWindow, frame: Frame) -> Labels:
        network = self._network
        window = network.own(window)
        if network.refine:
            return refined_labels(window, network.upsampling, network.card, network.cell, frame.image)
        return labels_from_scores(window, network.upsampling, network.card)

    def _relabel(self, frame: Frame, scores: AnyArray, labels: Labels, changed: Changed) -> None:
        """Write the labels where scores have changed."""
        network, size = self._network, frame.plan.size
        window = ScoreWindow.whole(scores, frame.plan.padded, size)
        stride, factor = network.stages[-1].stride, network.upsampling.factor
        # Otherwise cells do not stand over the pixels that they are computed from.
        in_place = factor is None or factor == tuple(stride) or network.upsampling.mode == "none"
        if network.refine or not in_place:
            labels[:] = self._labels(window, frame)
            return
        # Interpolation reads the cells on either side.
        dirty = grown(changed, [-(-2 * side // self._unit) for side in stride])
        grid = Grid(frame.plan.padded, frame.plan.padded, (0, 0))
        for top, bottom, left, right in cover(dirty, self._unit, grid):
            rows = top * self._unit, min(bottom * self._unit, size[0])
            columns = left * self._unit, min(right * self._unit, size[1])
            if rows[0] < rows[1] and columns[0] < columns[1]:
                part = window.part(network.upsampling, rows, columns)
                labels[slice(*rows), slice(*columns)] = self._labels(part, frame)


def changed_blocks(before: AnyArray, after: AnyArray, unit: int, padded: tuple[int, int]) -> Changed:
    """Blocks of `unit` pixels a side in which two images, [H, W, C] of one shape and in one piece, differ."""
    height, width, channels = after.shape
    block = unit * channels * after.dtype.itemsize  # bytes across
    row = width * channels * after.dtype.itemsize
    word = math.gcd(math.gcd(block, row), 8)  # as few comparisons as bytes allow
    kind = np.dtype(f"u{word}")
    one, other = (image.reshape(height, -1).view(np.uint8).view(kind) for image in (before, after))
    changed = np.zeros([-(-side // unit) for side in padded], bool)
    found = _blocks(one != other, unit, block // word)
    changed[: found.shape[0], : found.shape[1]] = found
    return changed


def _blocks(differs: Changed, high: int, wide: int) -> Changed:
    """Whether any value of each block is True; the last of a row or column may be smaller."""
    rows = np.logical_or.reduceat(differs, np.arange(0, differs.shape[0], high), axis=0)
    blocks: Changed = np.logical_or.reduceat(rows, np.arange(0, rows.shape[1], wide), axis=1)
    return blocks


def grown(changed: Changed, by: Sequence[int]) -> Changed:
    """True within so many blocks, (vertical, horizontal), of what is."""
    for axis, reach in enumerate(by):
        found = changed.copy()
        for step in range(1, min(reach, changed.shape[axis] - 1) + 1):
            ahead, behind = [slice(None)] * 2, [slice(None)] * 2
            ahead[axis], behind[axis] = slice(step, None), slice(None, -step)
            found[tuple(ahead)] |= changed[tuple(behind)]
            found[tuple(behind)] |= changed[tuple(ahead)]
        changed = found
    return changed


def cost_of(boxes: Sequence[Box], unit: int, grid: Grid) -> float:
    """Pixels that they are computed from, and what runs cost."""
    if not boxes:
        return 0.0
    top, bottom, left, right = np.array(boxes, np.float64).T
    return float(_costs(top, bottom, left, right, unit, grid).sum())


Numbers: TypeAlias = npt.NDArray[np.float64] | npt.NDArray[np.intp]


def _costs(top: Numbers, bottom: Numbers, left: Numbers, right: Numbers, unit: int, grid: Grid) -> Numbers:
    sides = []
    for axis, (start, stop) in enumerate(((top, bottom), (left, right))):
        halo, side = grid.halo[axis], grid.padded[axis]
        sides.append(np.minimum(stop * unit + halo, side) - np.maximum(start * unit - halo, 0))
    costs: Numbers = sides[0] * sides[1] + PIXELS_PER_RUN
    return costs


def cover(dirty: Changed, unit: int, grid: Grid) -> list[Box]:
    """Boxes that hold every True block and share none, cut where that saves work: each is run with its halo."""
    rows, columns = np.flatnonzero(dirty.any(1)), np.flatnonzero(dirty.any(0))
    if not len(rows):
        return []
    found: list[Box] = []
    waiting: list[Box] = [(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)]
    while waiting:
        box = waiting.pop()
        if (halves := _cut(dirty, box, unit, grid)) is None:
            found.append(box)
        else:
            waiting += halves
    return found


def _cut(dirty: Changed, box: Box, unit: int, grid: Grid) -> list[Box] | None:
    """The two boxes, each as small as may be, that a box is best cut into; None where none is cheaper."""
    top, bottom, left, right = box
    inside, least, best = dirty[top:bottom, left:right], cost_of([box], unit, grid), None
    for axis in (0, 1):
        if inside.shape[axis] < 2:
            continue
        across = inside if axis == 0 else inside.T  # its rows are cut apart
        count, length = across.shape
        used = across.any(1)
        place = np.arange(count)
        start = np.where(used, across.argmax(1), length)  # along a row
        stop = np.where(used, length - across[:, ::-1].argmax(1), 0)
        before = [
            np.zeros(count - 1, int), np.maximum.accumulate(np.where(used, place + 1, 0))[:-1],
            np.minimum.accumulate(start)[:-1], np.maximum.accumulate(stop)[:-1],
        ]  # fmt: skip
        behind = [
            np.minimum.accumulate(np.where(used, place, count)[::-1])[::-1][1:], np.full(count - 1, count),
            np.minimum.accumulate(start[::-1])[::-1][1:], np.maximum.accumulate(stop[::-1])[::-1][1:],
        ]  # fmt: skip
        halves = [
            (a + top, b + top, c + left, d + left) if axis == 0 else (c + top, d + top, a + left, b + left)
            for a, b, c, d in (before, behind)
        ]
        costs = _costs(*halves[0], unit, grid) + _costs(*halves[1], unit, grid)
        at = int(np.argmin(costs))
        if costs[at] < least:
            least = float(costs[at])
            best = [(int(h[0][at]), int(h[1][at]), int(h[2][at]), int(h[3][at])) for h in halves]
    return best


def _whole_part(padded: tuple[int, int]) -> Part:
    rows, columns = (Span(0, side, 0, side) for side in padded)
    return rows, columns


def _cells(pixels: slice, stride: int) -> slice:
    """Of cells, also where the image ends within one."""
    return slice(pixels.start // stride, -(-pixels.stop // stride))

"""Instances: connected components of chosen classes in a label file, counted and measured, whatever its size.

A strip of rows is labelled at a time (scipy.ndimage); components that meet at a seam are one (union-find, as
scipy.sparse.csgraph has it). The strips are labelled again to write them, so that nothing of the image's size is held.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import DeployError
from ..extras import need
from ..files import replacing
from ..images.results import STRIP_PIXELS, ResultFile
from ..images.write import TILE
from .ground import Ground, significant

Ints = NDArray[np.int64]
COLUMNS = (
    "image", "instance", "class", "name", "pixels", "area_m2", "row", "column", "x", "y", "top", "left", "bottom",
    "right",
)  # fmt: skip


@dataclass(frozen=True)
class Components:
    """Components of a class, or the parts of them that lie in one strip: an entry each.

    Attributes:
        first: index of the first pixel, counted by rows.
        pixels: of each.
        area: in square metres; 0 where that is not known.
        row, column: sums over the pixels.
        top, left, bottom, right: bounds in pixels; the last two are beyond it.
    """

    first: Ints
    pixels: Ints
    area: NDArray[np.float64]
    row: Ints
    column: Ints
    top: Ints
    left: Ints
    bottom: Ints
    right: Ints

    def merged(self, into: Ints, count: int) -> "Components":
        """Those that are one, put together: `into`, [n], says of which of `count` components each is a part."""
        found: dict[str, NDArray[Any]] = {}
        for each in fields(self):
            values = getattr(self, each.name)
            if each.name in ("first", "top", "left"):
                found[each.name] = np.full(count, np.iinfo(np.int64).max)
                np.minimum.at(found[each.name], into, values)
            elif each.name in ("bottom", "right"):
                found[each.name] = np.zeros(count, np.int64)
                np.maximum.at(found[each.name], into, values)
            else:
                found[each.name] = np.zeros(count, values.dtype)
                np.add.at(found[each.name], into, values)
        return Components(**found)


class Instances:
    """The instances of chosen classes in an open file of labels or masks: numbers from 1 on, class by class, each
    class by first pixel, as scipy.ndimage.label counts them in the whole image.

    As an array it is uint32 [1, H, W], read by rows of TILE, from top to bottom; 0 is none.

    Args:
        result: labels, or masks.
        ground: where it lies.
        card: of the network.
        classes: indices.
        connectivity: 4, by sides, or 8, by corners too.

    Attributes:
        components: of each class.
    """

    dtype = np.dtype(np.uint32)

    def __init__(
        self, result: ResultFile, ground: Ground, card: ModelCard, classes: Sequence[int], connectivity: int
    ) -> None:
        self.shape = (1, *result.size)
        self.nbytes = 4 * result.size[0] * result.size[1]
        self._ndimage = need("scipy.ndimage", "instances")
        self._result, self._masks = result, card.kind == "masks"
        self._classes, self._connectivity = classes, connectivity
        self._structure = np.ones((3, 3), int) if connectivity == 8 else None
        self._step = TILE
        while self._step > 1 and self._step * result.size[1] > STRIP_PIXELS:
            self._step //= 2
        rows = np.zeros(result.size[0]) if ground.areas is None else np.diff(ground.areas)
        self.components: list[Components] = []
        self._numbers: list[NDArray[np.uint32]] = []  # of each class: part → instance
        self._starts: list[list[int]] = []  # of each class: parts before each strip
        self._held: tuple[int, NDArray[np.uint32]] | None = None  # top, and rows from there on
        count = 0
        for place in range(len(classes)):
            parts, seams, starts = self._parts(place, rows)
            components, numbers = _joined(parts, seams)
            self.components.append(components)
            self._numbers.append(np.where(numbers, numbers + count, 0).astype(np.uint32))
            self._starts.append(starts)
            count += len(components.first)
        if count > np.iinfo(np.uint32).max:
            raise DeployError(f"{result.path} has {count} instances, more than a file can number; choose fewer classes")

    def __iter__(self) -> Iterator["Instances"]:
        yield self  # the one band

    def __getitem__(self, part: tuple[slice, slice]) -> NDArray[np.uint32]:
        rows, columns = part
        if self._held is None or self._held[0] != rows.start:
            bottom = min(rows.stop, self._result.size[0])
            strips = [self._numbered(top, bottom) for top in range(rows.start, bottom, self._step)]
            self._held = rows.start, np.concatenate(strips)
        return self._held[1][:, columns]

    def _labelled(self, place: int, rows: NDArray[Any]) -> tuple[NDArray[np.int32], int]:
        """Parts of components in some rows: their numbers from 1 on, and how many they are."""
        wanted = self._classes[place]
        found, count = self._ndimage.label(rows[wanted] if self._masks else rows[0] == wanted, self._structure)
        return found, count

    def _numbered(self, top: int, bottom: int) -> NDArray[np.uint32]:
        """Instances of a strip, which ends before `bottom`."""
        rows = self._result.rows(top, min(top + self._step, bottom))
        out = np.zeros(rows.shape[1:], np.uint32)
        for place, numbers in enumerate(self._numbers):
            found, count = self._labelled(place, rows)
            start = self._starts[place][top // self._step]
            here = np.concatenate([np.zeros(1, np.uint32), numbers[start : start + count]])
            # Masks overlap: the class that was named last is seen.
            np.copyto(out, here[found], where=found > 0)
        return out

    def _parts(self, place: int, areas: NDArray[np.float64]) -> tuple[Components, Ints, list[int]]:
        """Parts of a class's components, strip after strip; pairs of them that touch, [n, 2]; parts before each."""
        parts, pairs, starts, count = [], [np.zeros((0, 2), np.int64)], [], 0
        above: NDArray[Any] | None = None
        height = self._result.size[0]
        for top in range(0, height, self._step):
            found, here = self._labelled(place, self._result.rows(top, min(top + self._step, height)))
            starts.append(count)
            parts.append(_measured(found, here, top, areas))
            if above is not None:
                pairs.append(_touching(above, np.where(found[0], found[0] + count, 0), self._connectivity))
            above = np.where(found[-1], found[-1].astype(np.int64) + count, 0)
            count += here
        joined = {
            each.name: np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Components)
        }
        return Components(**joined), np.concatenate(pairs) - 1, starts


def _measured(found: NDArray[np.int32], count: int, top: int, areas: NDArray[np.float64]) -> Components:
    """Of a strip that begins at row `top`, labelled 1 to `count`: by runs of pixels in a row, which are far fewer."""
    height, width = found.shape
    inside = np.zeros((height * (width + 1)) + 1, bool)  # a column of nothing before each row
    inside[:-1].reshape(height, width + 1)[:, 1:] = found
    start, end = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2).T  # of each run, one less than in `inside`
    row, left = np.divmod(start, width + 1)
    right = end - row * (width + 1)
    part = found[row, left] - 1
    row, length = row + top, right - left
    firsts, bottom, most, least = (np.full(count, value, np.int64) for value in (0, 0, 0, width))
    firsts[part[::-1]] = (row * width + left)[::-1]  # of several the last one stays
    bottom[part] = row + 1
    np.maximum.at(most, part, right)
    np.minimum.at(least, part, left)

    def total(values: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(part, weights=values, minlength=count).astype(np.float64)

    # The sums are whole numbers below 2⁵³.
    pixels, rows, columns = (
        total(values).astype(np.int64) for values in (length, row * length, (left + right - 1) * length)
    )
    return Components(
        first=firsts, pixels=pixels, area=total(areas[row] * length), row=rows, column=columns // 2,
        top=firsts // width, left=least, bottom=bottom, right=most,
    )  # fmt: skip


def _touching(above: NDArray[Any], below: NDArray[Any], connectivity: int) -> Ints:
    """Pairs of parts that touch across a seam, [n, 2], from 1 on."""
    shifts = [(above, below)]
    if connectivity == 8:
        shifts += [(above[1:], below[:-1]), (above[:-1], below[1:])]
    pairs = np.concatenate([np.stack([a, b], 1)[(a > 0) & (b > 0)] for a, b in shifts])
    return np.unique(pairs, axis=0).astype(np.int64)


def _joined(parts: Components, pairs: Ints) -> tuple[Components, Ints]:
    """Components, by first pixel, and of each part the number of its component, from 1 on."""
    count = len(parts.first)
    if not count:
        return parts, np.zeros(0, np.int64)
    sparse, search = need("scipy.sparse", "instances"), need("scipy.sparse.csgraph", "instances")
    graph = sparse.coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    total, into = search.connected_components(graph, directed=False)
    merged = parts.merged(into.astype(np.int64), total)
    order = np.argsort(merged.first)
    numbers = np.empty(total, np.int64)
    numbers[order] = np.arange(1, total + 1)
    sorted_ = {each.name: getattr(merged, each.name)[order] for each in fields(Components)}
    return Components(**sorted_), numbers[into]


def write_table(
    path: Path, image: str, instances: Instances, classes: Sequence[int], ground: Ground, card: ModelCard
) -> None:
    """Write a row of each instance as CSV: see COLUMNS. `row` and `column` are the mean of the pixels' indices."""
    number = 0
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        table = csv.writer(text)
        table.writerow(COLUMNS)
        for index, found in zip(classes, instances.components, strict=True):
            row, column = found.row / found.pixels, found.column / found.pixels
            places = ground.coordinates(np.stack([column, row], 1) + 0.5)
            for i in range(len(found.first)):
                number += 1
                area = "" if ground.areas is None else significant(found.area[i])
                x, y = ("", "") if ground.transform is None else places[i].round(9).tolist()
                table.writerow([
                    image, number, index, card.classes[index], found.pixels[i], area, round(float(row[i]), 3),
                    round(float(column[i]), 3), x, y, found.top[i], found.left[i], found.bottom[i], found.right[i],
                ])  # fmt: skip

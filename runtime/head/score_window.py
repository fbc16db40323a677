"""A window: rows of an image's pixels, and the part of its score map that they are made of."""

from dataclasses import dataclass, replace

import numpy as np

from ..arrays import AnyArray, Cells
from ..engine_format.stage import Upsampling
from .resize_axis import axis_of


@dataclass(frozen=True)
class ScoreWindow:
    """Rows of an image's pixels, and the part of its score map that they are made of.

    Attributes:
        scores: uncropped, [K, h, w] float. Cells beyond the image take part in its last pixels.
        padded: (height, width) of the core's input, in pixels.
        size: (height, width) of the image, in pixels; at most `padded`.
        rows: (first, after the last) of the pixels wanted.
        first: `scores` begin with this row of the score map.
        cells: rows of the whole score map.
        columns: (first, after the last) of the pixels wanted; None: all of the image. Of labels and masks alone.
        left: `scores` begin with this column of the score map.
        across: columns of the whole score map; None: those of `scores`.
    """

    scores: AnyArray
    padded: tuple[int, int]
    size: tuple[int, int]
    rows: tuple[int, int]
    first: int
    cells: int
    columns: tuple[int, int] | None = None
    left: int = 0
    across: int | None = None

    @classmethod
    def whole(cls, scores: AnyArray, padded: tuple[int, int], size: tuple[int, int]) -> "ScoreWindow":
        """All of an image, from its whole score map."""
        return cls(scores, padded, size, (0, size[0]), 0, scores.shape[1])

    def of_rows(self, start: int, stop: int) -> "ScoreWindow":
        """The same scores for other rows of pixels."""
        return replace(self, rows=(start, stop))

    def holding(self, scores: AnyArray) -> "ScoreWindow":
        """Other scores of the same cells."""
        return replace(self, scores=scores)

    @property
    def height(self) -> int:
        """Rows of pixels wanted."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Columns of pixels wanted."""
        return self.size[1] if self.columns is None else self.columns[1] - self.columns[0]

    @property
    def is_whole(self) -> bool:
        """Whether it is all of an image: but for the padding, all of its scores are needed."""
        return self.rows == (0, self.size[0]) and self.scores.shape[1] == self.cells and self.columns is None

    def needed(self, upsampling: Upsampling) -> "ScoreWindow":
        """The same without the rows of scores that its rows of pixels are not made of."""
        first, stop = _cells_read(upsampling, 0, self.cells, self.padded[0], *self.rows)
        first = max(first, self.first)
        return replace(self, scores=self.scores[:, first - self.first : stop - self.first], first=first)

    def part(self, upsampling: Upsampling, rows: tuple[int, int], columns: tuple[int, int]) -> "ScoreWindow":
        """Of a whole image: a rectangle of its pixels, with the scores that these are made of."""
        read = [
            _cells_read(upsampling, axis, self.scores.shape[1 + axis], self.padded[axis], *span)
            for axis, span in enumerate((rows, columns))
        ]
        scores = self.scores[:, slice(*read[0]), slice(*read[1])]
        return replace(
            self, scores=scores, rows=rows, first=read[0][0], columns=columns, left=read[1][0],
            across=self.scores.shape[2],
        )  # fmt: skip


def gives_its_cells(window: ScoreWindow, upsampling: Upsampling) -> bool:
    """Whether pixels are cells: where nothing is upsampled, or to the size that scores have already.

    Interpolated, each pixel would be compared with its neighbours, and take ten times as long.
    """
    if upsampling.mode == "none":
        return True
    cells = (window.cells, window.across or window.scores.shape[2])
    return cells == window.padded if upsampling.factor is None else upsampling.factor == (1, 1)


def last_cells(upsampling: Upsampling, cells: int, padded: int, pixels: int) -> Cells:
    """The last row of the score map, of `cells` rows, that each of the image's `pixels` rows is made of."""
    if upsampling.mode == "none":
        return np.arange(pixels)
    found = axis_of(upsampling, 0, cells, padded, 0, pixels)
    return found.first if upsampling.mode == "nearest" else found.second


def _cells_read(upsampling: Upsampling, axis: int, cells: int, padded: int, start: int, stop: int) -> tuple[int, int]:
    """(first, after the last) of the scores that pixels along an axis are made of."""
    if upsampling.mode == "none":
        return start, stop
    found = axis_of(upsampling, axis, cells, padded, start, stop)
    # One more on either side: where cells hold equal numbers of pixels, whole cells are looked at.
    return max(int(found.first.min()) - 1, 0), min(int(found.second.max()) + 2, cells)

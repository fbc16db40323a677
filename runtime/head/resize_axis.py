"""Where the pixels of an upsampling read, along one axis, as ONNX Runtime's Resize does."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..arrays import Cells, Floats
from ..engine_format.stage import PYTORCH, Upsampling


@dataclass(frozen=True)
class Axis:
    """Where output pixels read, along one axis.

    Attributes:
        first, second: the cells that a pixel lies between; of `nearest` both are the one that it reads.
        weight: of the second, float32.
        uniform: where every cell holds the same `factor` pixels, (factor, offset) and `pixels`, else None. The pixel
            `offset` is the first right of cell 0's centre.
    """

    first: Cells
    second: Cells
    weight: Floats
    uniform: "Uniform | None" = None

    def moved(self, by: int) -> "Axis":
        """The same with so much added to the cells."""
        return replace(self, first=self.first + by, second=self.second + by)


@dataclass(frozen=True)
class Uniform:
    """Pixels `start` to before `stop` of an axis on which every cell holds `factor` pixels.

    The pixel `offset` is the first right of cell 0's centre.
    """

    factor: int
    offset: int
    start: int
    stop: int

    @property
    def begin(self) -> int:
        """The cell that the first pixel is in: from one score to the next; −1 is what lies before the first score."""
        return (self.start - self.offset) // self.factor

    @property
    def unwanted(self) -> int:
        """Pixels of that cell before the first."""
        return self.start - self.offset - self.begin * self.factor

    def corners(self, total: int) -> Cells:
        """The scores, of `total`, at the corners of the cells. The edge is repeated, which is what clamping does."""
        end = -((self.offset - self.stop) // self.factor)
        cells: Cells = np.arange(self.begin, end + 1).clip(0, total - 1)
        return cells

    @property
    def weights(self) -> Floats:
        return cell_weights(self.factor, self.offset)


def axis_of(upsampling: Upsampling, axis: int, cells: int, padded: int, start: int, stop: int) -> Axis:
    """Where each output pixel from `start` to before `stop` reads, along one axis, as ONNX Runtime's Resize does."""
    if upsampling.mode == "nearest":
        nearest = _nearest(upsampling, axis, cells, padded, start, stop)
        return Axis(nearest, nearest, np.zeros(len(nearest), np.float32))
    factor = None if upsampling.factor is None else upsampling.factor[axis]
    full = padded if factor is None else math.floor(cells * factor)
    x = np.arange(start, stop, dtype=np.float64)
    if upsampling.coordinates == "align_corners":
        x = x * (cells - 1) / (full - 1) if full > 1 else x * 0
    elif upsampling.coordinates == "asymmetric":
        x = _shrunk(x, factor, cells, padded)
    elif upsampling.coordinates == "pytorch_half_pixel" and full == 1:
        x = x * 0
    else:  # half_pixel
        x = _shrunk(x + 0.5, factor, cells, padded) - 0.5
    x = np.clip(x, 0, cells - 1)
    first = np.floor(x).astype(np.intp)
    uniform = uniform_of(upsampling, axis, cells, padded, start, stop)
    return Axis(first, np.minimum(first + 1, cells - 1), (x - first).astype(np.float32), uniform)


def _shrunk(pixels: npt.NDArray[np.float64], factor: float | None, cells: int, padded: int) -> npt.NDArray[np.float64]:
    # Multiplied before it is divided: ties between cells come out as such.
    return pixels * cells / padded if factor is None else pixels / factor


def uniform_of(upsampling: Upsampling, axis: int, cells: int, padded: int, start: int, stop: int) -> Uniform | None:
    """What `axis_of` has as `uniform`, without an array of the pixels."""
    factor = None if upsampling.factor is None else upsampling.factor[axis]
    full, scale = (padded, padded / cells) if factor is None else (math.floor(cells * factor), factor)
    at_one_pixel = upsampling.coordinates == "pytorch_half_pixel" and full == 1
    if upsampling.mode != "linear" or upsampling.coordinates == "align_corners" or at_one_pixel or scale != int(scale):
        return None
    offset = 0 if upsampling.coordinates == "asymmetric" else int(scale) // 2
    return Uniform(int(scale), offset, start, stop)


def _nearest(upsampling: Upsampling, axis: int, cells: int, padded: int, start: int, stop: int) -> Cells:
    """Where pixels read by nearest neighbours: in float32 throughout, which says where those go that tie."""
    x: Floats = np.arange(start, stop, dtype=np.float32)
    half = np.float32(0.5)
    factor = None if upsampling.factor is None else upsampling.factor[axis]
    full, scale = (padded, np.float32(padded) / np.float32(cells)) if factor is None else (0, np.float32(factor))
    full = full or math.floor(np.float32(cells) * scale)
    if upsampling.rounding == PYTORCH:
        read: Cells = np.minimum(np.floor(x * (np.float32(cells) / np.float32(padded))), cells - 1).astype(np.intp)
        return read
    if upsampling.coordinates == "align_corners":
        x = x * np.float32(cells - 1) / np.float32(full - 1) if full > 1 else x * 0
    elif upsampling.coordinates == "asymmetric":
        x = x / scale
    elif upsampling.coordinates == "pytorch_half_pixel" and full == 1:
        x = x * 0
    else:
        x = (x + half) / scale - half
    return np.clip(_ROUNDED[upsampling.rounding](x), 0, cells - 1).astype(np.intp)


TIE = 1e-6  # of a cell: so near to the middle ONNX Runtime takes a pixel to be in it


def _prefer_floor(x: Floats) -> Floats:
    return np.where(np.abs(x - np.floor(x) - np.float32(0.5)) < TIE, np.floor(x), np.floor(x + np.float32(0.5)))


def _prefer_ceil(x: Floats) -> Floats:
    return np.where(np.abs(x - np.floor(x) - np.float32(0.5)) < TIE, np.ceil(x), np.floor(x + np.float32(0.5)))


_ROUNDED: Mapping[str, Callable[[Floats], Floats]] = {
    "round_prefer_floor": _prefer_floor,
    "round_prefer_ceil": _prefer_ceil,
    "floor": np.floor,
    "ceil": np.ceil,
}


@lru_cache(64)
def cell_weights(factor: int, offset: int) -> Floats:
    """Weights of a cell's first and second corner along one axis, for each of its pixels: [2, factor] float32, to read.

    Every image of a network has the same.
    """
    half = 0.5 if offset or factor == 1 else 0.0  # half_pixel; asymmetric starts at the score itself
    second = (np.arange(factor) + offset + half) / factor - half
    weights: Floats = np.stack([1 - second, second]).astype(np.float32)
    weights.flags.writeable = False
    return weights

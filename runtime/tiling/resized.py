"""A part of an image as a network sees it that looks at the image resized: bilinearly, as ONNX's Resize does."""

import numpy as np

from ..arrays import AnyArray, Floats, ImageSource, size_of
from ..engine_format.model_card import ModelCard
from ..head.resize_axis import Axis
from ..pixels.prepare import normalise
from ..planning.grid import Grid, Span


def resized_part(image: ImageSource, grid: Grid, rows: Span, columns: Span, card: ModelCard) -> Floats:
    """What a tile is computed from, float32 [1, C, h, w], normalised; one that reads ahead is told which comes next.

    Args:
        image: as it is, [H, W, C].
        grid: of the resized image.
        rows, columns: of the tile, in pixels of that.
        card: of the model.
    """
    down, across = (_places(image, grid, axis, span) for axis, span in enumerate((rows, columns)))
    part = np.asarray(image[_read(down), _read(across)])
    expect = getattr(image, "expect", None)
    if expect is not None and (coming := grid.after(rows, columns)) is not None:
        expect(tuple(_read(_places(image, grid, axis, span)) for axis, span in enumerate(coming)))
    values = np.empty((card.channels, *part.shape[:2]), np.float32)
    normalise(part, card, values)
    narrow = _interpolated(values, across, 2)
    return _interpolated(narrow, down, 1)[None]


def _places(image: ImageSource, grid: Grid, axis: int, span: Span) -> Axis:
    """Where the rows, or columns, of a tile read: in float32 throughout, as ONNX Runtime does, to get what it gets."""
    pixels, half = size_of(image)[axis], np.float32(0.5)
    scale = np.float32(grid.padded[axis]) / np.float32(pixels)
    place: Floats = np.arange(span.outer_start, span.outer_stop, dtype=np.float32)
    place = np.clip((place + half) / scale - half, 0, pixels - 1)
    first = np.floor(place).astype(np.intp)
    return Axis(first, np.minimum(first + 1, pixels - 1), place - first.astype(np.float32))


def _read(places: Axis) -> slice:
    return slice(int(places.first[0]), int(places.second[-1]) + 1)


def _interpolated(values: Floats, places: Axis, axis: int) -> Floats:
    first = values.take(places.first - places.first[0], axis)
    second: AnyArray = values.take(places.second - places.first[0], axis)
    second -= first
    second *= places.weight[:, None] if axis == 1 else places.weight
    result: Floats = np.add(first, second, out=second)
    return result

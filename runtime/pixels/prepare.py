"""From an image to the core network's input: check, normalise, pad."""

from functools import lru_cache
from typing import Any

import numpy as np

from ..arrays import AnyArray, Floats, Image, ImageSource
from ..engine_format.model_card import ModelCard
from ..errors import MisuseError


def check_image(image: object, card: ModelCard) -> Image:
    """Return an array as [H, W, C], or raise MisuseError where the card does not allow it.

    [H, W] is taken for [H, W, 1] where the card has one channel.
    """
    if not isinstance(image, np.ndarray):
        raise _no_array(image)
    checked: Image = _checked(image, card)
    return checked


def check_source(source: ImageSource, card: ModelCard) -> ImageSource:
    """`check_image` of what need not be an array, but has the `shape`, `dtype` and `ndim` of one."""
    if not hasattr(source, "ndim"):
        raise _no_array(source)
    checked: ImageSource = _checked(source, card)
    return checked


def _no_array(image: object) -> MisuseError:
    return MisuseError(f"an image is a NumPy array, not {type(image).__name__}; use numpy.asarray(image)")


def _checked(image: Any, card: ModelCard) -> Any:
    if image.ndim == 2 and card.channels == 1:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] != card.channels:
        raise MisuseError(
            f"image of shape {list(image.shape)}; this model takes [height, width, {card.channels}]"
            + (" in RGB order" if card.channels == 3 else "")
        )
    if image.dtype != card.dtype:
        raise MisuseError(f"image of dtype {image.dtype}; this model takes {card.dtype}: convert it first")
    if image.shape[0] < 1 or image.shape[1] < 1:
        raise MisuseError(f"image of shape {list(image.shape)} has no pixels; both sides must be at least 1")
    return image


def padded_size(height: int, width: int, card: ModelCard) -> tuple[int, int]:
    """What an image of this height and width is padded to: at least the card's `smallest`, then its `size_multiple`."""
    high, wide = (-(-max(side, card.smallest) // card.size_multiple) for side in (height, width))
    return high * card.size_multiple, wide * card.size_multiple


def normalise(image: AnyArray, card: ModelCard, out: Floats) -> None:
    """Write (image - mean) / std of [H, W, C] into `out`, float32 [C, H, W].

    A channel at a time, as image * (1 / std) - mean / std: two passes without a temporary. Training,
    evaluation and calibration use this same function, so they see what the runtime will see.
    """
    for channel in range(card.channels):
        scale = np.float32(1.0 / card.std[channel])
        shift = np.float32(card.mean[channel] / card.std[channel])
        np.multiply(image[:, :, channel], scale, out=out[channel], dtype=np.float32, casting="unsafe")
        out[channel] -= shift


Border = tuple[int, int, int, int]  # top, left, bottom, right, in pixels


def input_shape(
    size: tuple[int, int], card: ModelCard, border: Border | None = None, block: int = 1
) -> tuple[int, int, int]:
    """Shape of one image of `size`, (height, width), as `prepare` gives it."""
    height, width = padded_size(*size, card)
    if border is None:
        return card.channels, height, width
    rows, columns = (border[0] + height + border[2]) // block, (border[1] + width + border[3]) // block
    return rows, columns, card.channels * block**2


def prepare(
    image: AnyArray, card: ModelCard, out: AnyArray | None = None, border: Border | None = None, block: int = 1
) -> AnyArray:
    """An image, [H, W, C] as the card says, as the core's input: float32 [1, C, H', W'], normalised.

    H' and W' are what `padded_size` gives; the padding, right and bottom, is zero after normalisation. `out` is a flat
    buffer to write into, of the input's type and at least as many elements.

    With `border`, for a stage that normalises by itself: uint8 [1, H', W', C], padded by so many pixels more on each
    side. Padding is the rounded mean then, which is zero after normalisation to half a grey level. With a `block`, the
    pixels of each such square come as channels, row by row: [1, H' / block, W' / block, block² · C]; what is left at
    the right and the bottom is cut off.
    """
    height, width = image.shape[:2]
    shape = input_shape((height, width), card, border, block)
    count = shape[0] * shape[1] * shape[2]
    buffer: AnyArray = np.empty(count, np.float32 if border is None else np.uint8) if out is None else out[:count]
    data = buffer.reshape(shape)
    if border is None:
        data[:, height:] = 0
        data[:, :height, width:] = 0
        normalise(image, card, data[:, :height, :width])
    else:
        top, left = border[0] // block, border[1] // block
        # What holds no pixel of the image, or some that are not of it, and then those that are.
        bottom, right = top + height // block, left + width // block
        pad = _padding(card.mean, block)
        data[:top] = data[bottom:] = pad
        data[top:bottom, :left] = data[top:bottom, right:] = pad
        _write_blocks(image, data[top:, left:], block)
    return data[None]


@lru_cache(64)
def _padding(mean: tuple[float, ...], block: int) -> AnyArray:
    """A square of rounded means, [block² · C], to read."""
    padding: AnyArray = np.tile(np.clip(np.rint(mean), 0, 255).astype(np.uint8), block**2)
    padding.flags.writeable = False
    return padding


def _write_blocks(image: AnyArray, data: AnyArray, block: int) -> None:
    """Write the pixels of [H, W, C] into [h, w, block² · C], as far as they fit: uint8."""
    if block == 1:
        data[: image.shape[0], : image.shape[1]] = image
        return
    rows, columns, values = data.shape
    image = image[: rows * block, : columns * block]
    run = values // block  # of one row of a block
    whole, rest = divmod(image.shape[1], block)
    by_two = block % 2 == 0 and image.strides[1:] == (image.shape[2], 1)
    for row in range(block):
        lines = image[row::block]
        into = data[: len(lines), :, row * run : (row + 1) * run]
        pixels = lines[:, : whole * block].reshape(len(lines), whole, run)
        if by_two:  # NumPy copies numbers that are far apart one by one: the fewer, the faster
            _copy_by_two(pixels, into[:, :whole])
        else:
            into[:, :whole] = pixels
        if rest:
            into[:, whole, : rest * image.shape[2]] = lines[:, whole * block :].reshape(
                len(lines), rest * image.shape[2]
            )


def _copy_by_two(values: AnyArray, out: AnyArray) -> None:
    """Copy uint8 of shape [..., n], n even, whose last axis is contiguous."""
    pairs, into = values.view(np.uint16), out.view(np.uint16)
    for place in range(pairs.shape[-1]):
        into[..., place] = pairs[..., place]

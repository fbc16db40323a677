"""Pictures of results: the image under the colours of its labels, and a legend."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard

if TYPE_CHECKING:
    from PIL import Image as Pictures

ROWS = 256  # drawn at a time: floats of the whole picture would take many times its memory


def overlay(image: NDArray[Any], labels: NDArray[Any], card: ModelCard, opacity: float = 0.55) -> NDArray[Any]:
    """The image under the colours of its labels: [H, W, 3] uint8.

    A class named background stays clear, and what is no data.

    Args:
        image: [H, W, C] as the card says; what is not 8-bit RGB is shown stretched to it.
        labels: [H, W]; or masks, [K, H, W] bool, whose colours are mixed where they overlap.
        opacity: of the colours, 0..1.
    """
    picture = displayable(image)
    colors = np.asarray(card.colors, np.float32)
    alpha = np.full((len(colors), 1), opacity, np.float32)
    for index, name in enumerate(card.classes):
        if name.lower() == "background":
            alpha[index] = 0
    result = np.empty(picture.shape, np.uint8)
    # One more, which is clear, for the label of no data.
    colors, alpha = np.vstack([colors, np.zeros((1, 3), np.float32)]), np.vstack([alpha, np.zeros((1, 1), np.float32)])
    for top in range(0, len(picture), ROWS):
        rows = slice(top, top + ROWS)
        if labels.ndim == 2:
            shown = np.minimum(labels[rows].astype(np.intp), len(card.classes))
            strength, color = alpha[shown], colors[shown]
        else:
            weights = labels[:, rows] * alpha[:-1, :, None]
            strength = weights.max(0)[:, :, None]
            color = np.tensordot(weights, colors[:-1], (0, 0)) / np.maximum(weights.sum(0), 1e-6)[:, :, None]
        result[rows] = picture[rows] * (1 - strength) + color * strength + 0.5
    return result


def displayable(image: NDArray[Any]) -> NDArray[Any]:
    """[H, W, C] of any dtype as [H, W, 3] uint8: the first three bands (or the first), stretched to 0..255."""
    image = np.asarray(image)  # what a mask hides is shown
    image = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    if image.dtype == np.uint8:
        return image
    values = image.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0, 1)
    shares: NDArray[Any] = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12), 0, 1)
    return (shares * 255 + 0.5).astype(np.uint8)


def overlay_sheet(image: NDArray[Any], labels: NDArray[Any], card: ModelCard) -> "Pictures.Image":
    """The overlay with a legend below it, a Pillow image: the classes present, largest first, and their share.

    Of labels, the share of the pixels that are data.
    """
    from PIL import Image

    picture = Image.fromarray(overlay(image, labels, card))
    if labels.ndim == 2:
        counts = np.zeros(len(card.classes), np.int64)
        for top in range(0, len(labels), ROWS):
            counts += np.bincount(labels[top : top + ROWS].ravel(), minlength=len(counts))[: len(counts)]
        pixels = int(counts.sum()) or 1  # of data
    else:
        counts, pixels = np.array([np.count_nonzero(mask) for mask in labels]), math.prod(labels.shape[-2:])
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    key = _legend(picture.width, [(card.classes[i], card.colors[i], counts[i] / pixels) for i in present])
    sheet = Image.new("RGB", (max(picture.width, key.width), picture.height + key.height), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(key, (0, picture.height))
    return sheet


def picture_of(kind: str, image: NDArray[Any], result: NDArray[Any], card: ModelCard) -> "Pictures.Image":
    """What `--overlay` writes, a Pillow image: an overlay sheet of labels or masks; values are stretched to
    0..255, and grey, or red, green and blue where there are three maps or more.
    """
    if kind != "values":
        return overlay_sheet(image, result, card)
    from PIL import Image

    return Image.fromarray(displayable(result.transpose(1, 2, 0)))


def _legend(width: int, entries: Iterable[tuple[str, tuple[int, int, int], float]]) -> "Pictures.Image":
    """A strip of colour swatches with names and shares, wrapped to `width` pixels (160 at least)."""
    from PIL import Image, ImageDraw, ImageFont

    width = max(width, 160)
    size = int(np.clip(width // 60, 12, 40))
    font = ImageFont.load_default(size)
    line, gap = size + size // 2, size // 2
    x = y = gap
    placed = []
    for name, color, share in entries:
        text = f"{name} {share:.1%}"
        length = size + gap // 2 + int(font.getlength(text)) + 2 * gap
        if x > gap and x + length > width:
            x, y = gap, y + line
        placed.append((x, y, text, color))
        x += length
    widest = max((px + size + gap + int(font.getlength(text)) + gap for px, _, text, _ in placed), default=0)
    strip = Image.new("RGB", (max(width, widest), y + line + gap // 2), "white")
    draw = ImageDraw.Draw(strip)
    for px, py, text, color in placed:
        draw.rectangle((px, py, px + size, py + size), fill=tuple(color), outline="black")
        draw.text((px + size + gap // 2, py + size / 2), text, fill="black", font=font, anchor="lm")
    return strip

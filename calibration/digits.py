"""`digits`: scikit-learn's real handwritten digits, enlarged and pasted on textured canvases of any size.

11 classes: background and the digits 0 to 9. A canvas is made from its seed, split and index alone, so the
same numbers always give the same pixels; train and val use different handwriting.
"""

from functools import cache

import numpy as np
from PIL import Image

CLASSES = ("background", *(f"digit {digit}" for digit in range(10)))
COLORS = (
    (0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
    (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
)  # fmt: skip
HEIGHTS = (88, 144)  # of a digit's 8×8 grid in pixels: its strokes are 2 to 4 strides of 8 wide
TRAIN_SHARE = 0.8  # of the handwriting; the rest is for val
SPLITS = ("train", "val")


@cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: [1797, 8, 8] uint8 in 0..255, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images * (255 / 16)).astype(np.uint8), data.target


def canvas(height: int, width: int, seed: int, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One canvas with its labels.

    Args:
        height, width: in pixels, at least 1. Digits keep their size: a small canvas shows a part of one.
        seed: of the collection.
        split: `train` or `val`: which handwriting.
        index: of the canvas in its collection.

    Returns:
        (image [height, width, 3] uint8 RGB, labels [height, width] uint8).
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    glyphs, classes = _handwriting()
    cut = int(len(glyphs) * TRAIN_SHARE)
    first, last = (0, cut) if split == "train" else (cut, len(glyphs))

    image = _texture(rng, height, width)
    labels = np.zeros((height, width), np.uint8)
    size = int(np.mean(HEIGHTS))
    # A jittered grid: digits stand apart, and most of each is seen.
    rows, columns = max(1, round(height / (size * 1.15))), max(1, round(width / (size * 1.15)))
    for row in range(rows):
        for column in range(columns):
            if rows * columns > 1 and rng.random() < 0.2:
                continue
            glyph = rng.integers(first, last)
            side = int(rng.integers(HEIGHTS[0], HEIGHTS[1] + 1))
            if min(height, width) < side:  # a digit that a small canvas can show
                side = max(min(side, int(min(height, width) * 1.1)), min(HEIGHTS[0], 64))
            ink = _enlarge(glyphs[glyph], side, rng.uniform(-12, 12))
            center_y = (row + 0.5) * height / rows + rng.uniform(-0.06, 0.06) * side
            center_x = (column + 0.5) * width / columns + rng.uniform(-0.06, 0.06) * side
            _paste(image, labels, ink, int(center_y), int(center_x), int(classes[glyph]) + 1, rng)
    noise = rng.integers(-6, 7, image.shape, dtype=np.int16)
    return np.clip(image + noise, 0, 255).astype(np.uint8), labels


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth noise of several scales in two random colours: [height, width, 3] float32."""
    weight = np.zeros((height, width), np.float32)
    for scale, strength in ((128, 1.0), (32, 0.6), (9, 0.35)):
        cells = (max(2, width // scale + 2), max(2, height // scale + 2))
        grid = Image.fromarray(rng.random((cells[1], cells[0]), np.float32))
        weight += strength * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
    weight = np.clip(weight / 1.95, 0, 1)[:, :, None]
    dark, light = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    # Two colours near each other, so that the digit's ink can stand out from both.
    light = dark + (light - dark) * 0.35
    mixed: np.ndarray = dark * (1 - weight) + light * weight
    return mixed


def _enlarge(glyph: np.ndarray, side: int, angle: float) -> np.ndarray:
    """An 8×8 digit at `side` pixels, rotated by `angle` degrees: float32 in 0..1."""
    picture = Image.fromarray(np.pad(glyph, 1)).resize((side, side), Image.Resampling.BICUBIC)
    picture = picture.rotate(angle, Image.Resampling.BILINEAR)
    return np.asarray(picture, np.float32) / 255


def _paste(
    image: np.ndarray,
    labels: np.ndarray,
    ink: np.ndarray,
    center_y: int,
    center_x: int,
    label: int,
    rng: np.random.Generator,
) -> None:
    """Draw a digit around a centre, in a colour that stands out; what lies outside is cut off."""
    side = len(ink)
    top, left = center_y - side // 2, center_x - side // 2
    y = slice(max(top, 0), min(top + side, image.shape[0]))
    x = slice(max(left, 0), min(left + side, image.shape[1]))
    if y.start >= y.stop or x.start >= x.stop:
        return
    ink = ink[y.start - top : y.stop - top, x.start - left : x.stop - left]
    under = image[y, x].mean((0, 1))
    # Grey ink, so that the colours of an overlay are the labels' alone.
    color = rng.uniform(0, 255) + rng.uniform(-12, 12, 3)
    while abs(color.mean() - under.mean()) < 80:
        color = rng.uniform(0, 255) + rng.uniform(-12, 12, 3)
    stroke = np.clip((ink - 0.35) / 0.2, 0, 1)[:, :, None]  # a firm edge around the labelled part
    image[y, x] += (color - image[y, x]) * stroke
    labels[y, x][ink > 0.45] = label


class Digits:
    """A labelled collection of canvases (see `calibration.datasets.LabelledImages` for the interface).

    Args:
        split: `train` or `val`.
        seed: of the collection.
        count: of canvases.
        sizes: (height, width) of canvas i is sizes[i % len(sizes)]; None: 96 to 320 pixels a side, mixed.
    """

    classes = CLASSES
    colors = COLORS

    def __init__(
        self,
        split: str,
        seed: int = 0,
        count: int | None = None,
        sizes: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        self.split, self.seed, self.sizes = split, seed, sizes
        self.count = count if count is not None else {"train": 960, "val": 64}[split]

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"digits-{self.split}-{self.seed}-{index}"

    def size(self, index: int) -> tuple[int, int]:
        if self.sizes:
            return self.sizes[index % len(self.sizes)]
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index, 1))
        height, width = rng.integers(96, 321, 2)
        return int(height), int(width)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return canvas(*self.size(index), self.seed, self.split, index)

"""What `--sizes` says: the sizes of the images that will come."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import DeployError, MisuseError
from .images.find import find_or_read_list
from .images.header import DEFAULT_MAX_PIXELS, read_header

log = logging.getLogger(__name__)

Size = tuple[int, int]  # (height, width) in pixels
EXAMPLE = "photos/, 480x640,1080x1920 (height×width) or 256x256:512x1024:2176x3840 (min:opt:max)"


@dataclass(frozen=True)
class Sizes:
    """What `--sizes` says.

    Attributes:
        counts: how many images there are of each size.
        ranges: (min, opt, max) of each profile, where the user gave them instead.
        skipped: images whose size could not be read, with the reason.
        files: an image of each size, where they are those of images.
    """

    counts: Mapping[Size, int] = field(default_factory=dict)
    ranges: tuple[tuple[Size, Size, Size], ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Size, Path] = field(default_factory=dict)

    def examples(self, most: int = 4) -> list[Size]:
        """A few of them, from the smallest to the largest by area, to be timed."""
        sizes = sorted(
            self.counts or {size for sizes in self.ranges for size in sizes}, key=lambda size: size[0] * size[1]
        )
        places = np.unique(np.linspace(0, len(sizes) - 1, most).round().astype(int))
        return [sizes[place] for place in places]


def parse_sizes(text: str) -> Sizes:
    """Read `--sizes`: a folder, glob, image or list of images (.txt); `HxW,HxW`; or `min:opt:max`.

    Of images only the headers are read. Those that cannot be read are skipped, counted and logged.

    Raises:
        MisuseError: an empty folder, a side of zero, min > max, or text that is none of these.
        DeployError: none of the images can be read.
    """
    spelled = re.sub(r"\s", "", text).lower().replace("×", "x")
    if not spelled:
        raise MisuseError(f"--sizes is empty; give {EXAMPLE}")
    if re.fullmatch(r"[-\d.x:,]+", spelled) and not Path(text).exists():
        return _typed(spelled)
    return _of_images(text)


def _typed(text: str) -> Sizes:
    items = [item for item in text.split(",") if item]
    ranged = [":" in item for item in items]
    if any(ranged) and not all(ranged):
        raise MisuseError(f"--sizes {text} mixes sizes and min:opt:max ranges; give either")
    if not any(ranged):
        return Sizes(Counter(_size(item) for item in items))
    ranges = []
    for item in items:
        sizes = tuple(_size(part) for part in item.split(":"))
        if len(sizes) != 3:
            raise MisuseError(f"--sizes {item} has {len(sizes)} sizes; a range is min:opt:max")
        for axis, name in enumerate(("height", "width")):
            low, best, high = (size[axis] for size in sizes)
            if not low <= best <= high:
                raise MisuseError(f"--sizes {item}: {name}s {low}, {best}, {high} are not in order min ≤ opt ≤ max")
        ranges.append(sizes)
    return Sizes(ranges=tuple(ranges))


def _size(text: str) -> Size:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise MisuseError(f"--sizes: {text!r} is no size; give {EXAMPLE}")
    height, width = int(match[1]), int(match[2])
    if not height or not width:
        raise MisuseError(f"--sizes {text}: both sides must be at least 1")
    if height * width > DEFAULT_MAX_PIXELS:
        raise MisuseError(f"--sizes {text} has {height * width:,} pixels, over the limit of {DEFAULT_MAX_PIXELS:,}")
    return height, width


def _of_images(text: str) -> Sizes:
    try:
        files = find_or_read_list(text)
    except MisuseError as error:
        raise MisuseError(f"--sizes: {error}; or give sizes, as {EXAMPLE}") from error
    counts: Counter[Size] = Counter()
    skipped: dict[str, str] = {}
    first: dict[Size, Path] = {}
    for file in files:
        try:
            counts[size := read_header(file).size] += 1
            first.setdefault(size, file)
        except DeployError as error:
            skipped[str(file)] = str(error)
    if not counts:
        raise DeployError(
            f"--sizes: none of {len(files)} images can be read; the first: {next(iter(skipped.values()))}"
        )
    if skipped:
        log.warning("%d of %d images skipped; the first: %s", len(skipped), len(files), next(iter(skipped.values())))
    return Sizes(counts, skipped=skipped, files=first)

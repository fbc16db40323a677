"""Whether a network's scores of a picture at twice its size are like those of the picture.

They need not be: networks learn at a scale. But one that crops, pads or samples every image to a size of its own gives
something else altogether. So this is evidence of something baked in, and no proof: a note, never a refusal.
"""

import math
from collections.abc import Callable

import numpy as np
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.analysis.trial_memory import TrialMemory

PATCHES = 4  # a side of the picture: of colours, no two alike, so that no part of it is like all of it
SIDE = 256  # pixels of the picture, about
# Correlation over the middles of patches. Of networks as torch initialises them, the most global had 0.71 (DeepLabv3),
# most 1.00; of such that saw the first or the middle quarter of the larger picture, most had -0.5 to 0.6.
ALIKE = 0.65
# Bytes that the larger picture may take. What attends from each pixel to each has a cost by the square of the pixels:
# above this the picture is compared with half of itself, which is the same patches, for a sixteenth of the cost.
MOST_MEMORY = 600e6

Run = Callable[[np.ndarray], np.ndarray]


def note_on_twice_the_size(run: Run, sizes: AcceptedSizes, channels: int, whole_numbers: bool, name: str) -> str:
    """A line for the user where a picture at twice its size has other scores; "": they are alike, or it is not known.

    Args:
        run: images float32 [1,C,H,W] → scores [1,K,h,w]; raises where it does not take them.
        sizes: that it takes.
        channels: C.
        whole_numbers: whether its images are of 0 to 255.
        name: of the network.
    """
    least = max(-(-SIDE // sizes.multiple), -(-sizes.smallest // sizes.multiple))
    memory = TrialMemory(MOST_MEMORY)

    def scores(count: int) -> np.ndarray:
        side = count * sizes.multiple
        with memory.run(side * side):
            return run(patches(channels, side, whole_numbers))[0]

    try:
        usual = scores(least)
        if memory.allows((2 * least * sizes.multiple) ** 2):
            likeness = likeness_of(usual, scores(2 * least))
        elif least % 2 == 0 and least // 2 * sizes.multiple >= sizes.smallest:
            likeness = likeness_of(scores(least // 2), usual)
        else:
            return ""
    except Exception:  # a size that it does not take after all: nothing is known
        return ""
    if likeness is None or likeness >= ALIKE:
        return ""
    return (
        f"{name}: its scores of a picture at twice its size are not those of the picture (correlation {likeness:.2f}; "
        f"{ALIKE} or more is usual): a size may be baked in; compare its labels with the original's on large images"
    )


def likeness_of(scores: np.ndarray, enlarged: np.ndarray) -> float | None:
    """The correlation of scores [K,h,w] of a picture and of the same at twice its size; None: they have no spread."""
    before, after = _by_patch(scores), _by_patch(enlarged)
    ours, theirs = (each - each.mean((1, 2), keepdims=True) for each in (before, after))
    if not math.sqrt((ours**2).sum()) > 1e-4 * math.sqrt((before**2).sum()):
        return None
    spread = math.sqrt((ours**2).sum() * (theirs**2).sum())
    return float((ours * theirs).sum()) / spread if spread > 0 else 0.0


def _by_patch(scores: np.ndarray) -> np.ndarray:
    """The mean of the middle of each patch, of scores [K, h, w]: float64 [K, PATCHES, PATCHES]."""
    rows, columns = (_middles(side) for side in scores.shape[1:])
    parts = [[scores[:, slice(*row), slice(*column)] for column in columns] for row in rows]
    return np.array([[part.mean((1, 2), dtype=np.float64) for part in row] for row in parts]).transpose(2, 0, 1)


def _middles(side: int) -> list[tuple[int, int]]:
    """The middle third of each patch along an axis of so many cells."""
    starts = [(3 * patch + 1) * side // (3 * PATCHES) for patch in range(PATCHES)]
    return [(start, max(start + 1, (3 * patch + 2) * side // (3 * PATCHES))) for patch, start in enumerate(starts)]


def patches(channels: int, side: int, whole_numbers: bool = False) -> np.ndarray:
    """A picture of flat patches, float32 [1,C,side,side]: of unit spread, or of whole numbers from 0 to 255."""
    colours = np.random.default_rng(0).standard_normal((channels, PATCHES, PATCHES))
    if whole_numbers:
        colours = np.clip(np.rint(128 + 60 * colours), 0, 255)
    place = np.arange(side) * PATCHES // side
    return colours[:, place[:, None], place][None].astype(np.float32)

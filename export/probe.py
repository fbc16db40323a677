"""What sizes a network takes, found by running it; and an image to run it on."""

from collections.abc import Callable, Sequence

import numpy as np

from runtime.backends.onnxruntime import one_line
from runtime.engine_file import ModelCard
from runtime.errors import DeployError

MARGIN = 1e-4  # of the scores' range: below it, the order of two classes is rounding
MULTIPLES = (1, 2, 4, 8, 16, 32, 64)
SHAPES = ((1, 1), (3, 5), (5, 4), (11, 7))  # in multiples; odd and even, square and not


def probe(run: Callable[[int, int], Sequence[int]], name: str) -> tuple[int, int]:
    """The sizes that a segmentation network takes, and how much smaller its output is.

    Args:
        run: (height, width) of an image → shape of the scores; raises where the network does not take it.
        name: of the network, for errors.

    Returns:
        (multiple, factor): H and W must be multiples of `multiple`; the scores are [N, K, H/factor, W/factor].

    Raises:
        DeployError: it gives no scores [N, K, h, w], or takes no changing sizes.
    """
    reason = "its output does not follow the size of the image"
    for multiple in MULTIPLES:
        factors = set()
        try:
            for rows, columns in SHAPES:
                height, width = multiple * rows, multiple * columns
                shape = tuple(run(height, width))
                if len(shape) != 4:
                    raise DeployError(
                        f"{name} gives {list(shape)}; a segmentation network gives scores [N,K,H,W] (a classifier's "
                        "dense layer after Flatten becomes a convolution by fcn.convolutionalize)"
                    )
                down = height // max(shape[2], 1)
                factors.add(down if (shape[2] * down, shape[3] * down) == (height, width) else 0)
        except DeployError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)[:300]}"
            continue
        if len(factors) == 1 and 0 not in factors:
            return multiple, factors.pop()
    raise DeployError(
        f"{name} labels no images of changing size (multiples of 1 to {MULTIPLES[-1]} were tried): {reason}. "
        "Usual causes: a dense layer after Flatten (see fcn.convolutionalize), or interpolate(size=<int>)"
    )


def natural_noise(height: int, width: int, card: ModelCard, seed: int) -> np.ndarray:
    """An image with detail at many scales, [H, W, C] in the card's dtype, spread around the card's mean."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, card.channels), np.float32)
    for cell in (64, 16, 4, 1):
        rows, columns = -(-height // cell), -(-width // cell)
        values = random.standard_normal((rows, columns, card.channels), dtype=np.float32)
        image += np.repeat(np.repeat(values, cell, 0), cell, 1)[:height, :width] * 0.6
    image = image * np.float32(card.std) + np.float32(card.mean)
    if card.dtype == "float32":
        return image
    return np.clip(image, 0, np.iinfo(card.dtype).max).astype(card.dtype)

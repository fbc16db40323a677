"""What sizes a network takes, found by running it."""

from collections.abc import Callable, Sequence

from runtime.backends.onnxruntime import one_line
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

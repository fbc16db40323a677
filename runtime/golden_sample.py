"""The golden sample of an engine: a small image and the scores that it shall give, compared on any machine."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .arrays import AnyArray, Floats, Image, size_of
from .errors import DeployError, OverBudgetError
from .head.score_window import ScoreWindow
from .head.upsampling import result_from_scores
from .network import Network
from .sizes import Size

# The member's name: image uint8|uint16|int16|float32 [H,W,C]; scores float32 [K,h,w]; tolerance, of the scores' range.
# Of a plan also sizes int [n,2], ends and odd ones of its profiles, to which the image is repeated, and for each
# steps int [n] and scores_0… float32, of which every step-th row and column is kept.
GOLDEN = "golden.npz"


@dataclass(frozen=True)
class GoldenDifference:
    """How far an engine is from its golden sample.

    Attributes:
        difference: largest of the scores, as a share of their range.
        tolerance: of it.
        labels_equal: share of pixels, of masks too; None where the network gives values.
        range: between the least and the largest of the scores that are expected.
        by_size: (height, width) in pixels → difference at it; None where the memory here does not hold it.
    """

    difference: float
    tolerance: float
    labels_equal: float | None
    range: float
    by_size: dict[Size, float | None] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        # Not "difference > tolerance": a NaN must fail.
        return self.difference <= self.tolerance


def golden_difference(net: Network, sample: bytes) -> GoldenDifference:
    """Run a golden sample, the content of its member, on an open engine. Raises DeployError where the shapes differ."""
    golden = np.load(io.BytesIO(sample), allow_pickle=False)
    image, expected, tolerance = golden["image"], golden["scores"], float(golden["tolerance"])
    scores = net.scores(image)
    if scores.shape != expected.shape:
        raise DeployError(
            f"{net.path} gives scores of {list(scores.shape)} for its golden sample, not {list(expected.shape)}; "
            "build it again with build-engine"
        )
    plan = net.plan(*image.shape[:2])
    by_size: dict[Size, float | None] = {size_of(image): _apart(scores, expected)}
    by_size |= _at_other_sizes(net, golden, image)
    # A NaN is the largest of all.
    difference = float(np.max([value for value in by_size.values() if value is not None]))
    equal = None
    if net.kind != "values":
        found, reference = (
            result_from_scores(
                net.kind, net.own(ScoreWindow.whole(values, plan.padded, plan.size)), net.upsampling, net.card
            )
            for values in (scores, expected)
        )
        equal = float((found == reference).mean())
    return GoldenDifference(difference, tolerance, equal, float(np.ptp(expected)), by_size)


def repeated(image: Image, size: Size) -> Image:
    """An image, again and again to the right and below, until it is of (height, width)."""
    height, width = size
    rows, columns = (np.arange(side) % least for side, least in zip(size, image.shape[:2], strict=True))
    found: Image = np.ascontiguousarray(image[rows][:, columns])
    assert found.shape[:2] == (height, width)
    return found


def _at_other_sizes(net: Network, golden: Mapping[str, AnyArray], image: Image) -> dict[Size, float | None]:
    """(height, width) → difference at it, of the sizes that the sample names."""
    found: dict[Size, float | None] = {}
    if "sizes" not in golden:
        return found
    for index, (size, step) in enumerate(zip(golden["sizes"], golden["steps"], strict=True)):
        height, width = int(size[0]), int(size[1])
        try:
            scores = net.scores(repeated(image, (height, width)))[:, ::step, ::step]
            found[height, width] = _apart(scores, golden[f"scores_{index}"])
        except OverBudgetError:
            found[height, width] = None
    return found


def _apart(scores: Floats, expected: Floats) -> float:
    """The largest difference, as a share of the range of what is expected; infinite of scores of another shape."""
    if scores.shape != expected.shape:
        return float("inf")
    return float(np.abs(scores - expected).max() / max(np.ptp(expected), 1e-12))

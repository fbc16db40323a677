"""The golden sample of an engine: a small image and the scores that it shall give, compared on any machine."""

import io
from dataclasses import dataclass

import numpy as np

from .errors import DeployError
from .network import Network
from .upsampling import ScoreWindow, result_from_scores

# The member's name: image uint8|uint16|int16|float32 [H,W,C]; scores float32 [K,h,w]; tolerance, of the scores' range.
GOLDEN = "golden.npz"


@dataclass(frozen=True)
class GoldenDifference:
    """How far an engine is from its golden sample.

    Attributes:
        difference: largest of the scores, as a share of their range.
        tolerance: of it.
        labels_equal: share of pixels, of masks too; None where the network gives values.
    """

    difference: float
    tolerance: float
    labels_equal: float | None

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
    difference = float(np.abs(scores - expected).max() / max(np.ptp(expected), 1e-12))
    equal = None
    if net.kind != "values":
        found, reference = (
            result_from_scores(net.kind, ScoreWindow.whole(values, plan.padded, plan.size), net.upsampling, net.card)
            for values in (scores, expected)
        )
        equal = float((found == reference).mean())
    return GoldenDifference(difference, tolerance, equal)

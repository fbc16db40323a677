"""What a report is drawn from: models, and what was counted and timed of them on labelled images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from fcn_deploy.calibration.metrics import Metrics
from fcn_deploy.calibration.report.engine_report import EngineReport
from fcn_deploy.runtime.engine_format.model_card import ModelCard

OWN = "1"  # the name of the scale at which images have their own sizes
MIXED = "mixed"


@dataclass(frozen=True)
class ImageResult:
    """One labelled image: its pixels by class, and the time.

    Attributes:
        name: of the file.
        size: (height, width) in pixels, as the network saw it.
        hits, total, predicted: int64 [K]: labelled right, in the reference labels, predicted; ignored pixels left out.
        seconds: of one call.
    """

    name: str
    size: tuple[int, int]
    hits: np.ndarray
    total: np.ndarray
    predicted: np.ndarray
    seconds: float

    @property
    def metrics(self) -> Metrics:
        return metrics_of([self])


@dataclass(frozen=True)
class Example:
    """An image to look at, reduced to a thumbnail.

    Attributes:
        result: of the whole image.
        photo: [h, w, 3] uint8.
        reference, predicted: labels, [h, w]; 255 in the reference is not counted.
    """

    result: ImageResult
    photo: np.ndarray
    reference: np.ndarray
    predicted: np.ndarray


@dataclass(frozen=True)
class Evaluated:
    """A model on labelled images.

    Attributes:
        confusion: int64 [K, K], by (reference, predicted), at the images' own sizes.
        results: scale → a result per image; OWN is always there.
        worst: images with the lowest mIoU, the worst first.
        equal: share of pixels labelled as by the first model of the page; None for the first.
    """

    confusion: np.ndarray
    results: Mapping[str, Sequence[ImageResult]]
    worst: Sequence[Example] = ()
    equal: float | None = None

    @property
    def metrics(self) -> Metrics:
        return Metrics.of(self.confusion)

    def milliseconds(self, scale: str = OWN) -> float:
        """Median time of one image."""
        return float(np.median([result.seconds for result in self.results[scale]])) * 1e3


@dataclass(frozen=True)
class Entry:
    """A model on the page.

    Attributes:
        name: of its file.
        kind: what it is and what runs it: `PyTorch checkpoint`, `engine for cpu, int8, onnxruntime`.
        bytes: of its file.
        card: its own, or assumed.
        report: of an engine.
        evaluated: on the data of the page; None where it was not.
    """

    name: str
    kind: str
    bytes: int
    card: ModelCard
    report: EngineReport | None = None
    evaluated: Evaluated | None = None

    @property
    def evaluation(self) -> Evaluated:
        """What it did, of an entry that was evaluated. Raises ValueError for others."""
        if self.evaluated is None:
            raise ValueError(f"{self.name} was not evaluated")
        return self.evaluated


@dataclass(frozen=True)
class About:
    """What holds for the whole page.

    Attributes:
        title: of the page.
        data: the images evaluated on, in words; "" where none were.
        created: when, in words.
        machine: name → value, of this machine and its versions: see `machine`.
        notes: what the reader must know, a line each.
        command: the command line that made it; "" where there is none.
    """

    title: str
    data: str = ""
    created: str = ""
    machine: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    command: str = ""


def metrics_of(results: Iterable[ImageResult]) -> Metrics:
    """The metrics of several images together."""
    counts = [(result.hits, result.total, result.predicted) for result in results]
    return Metrics.of_counts(*np.sum(counts, axis=0))

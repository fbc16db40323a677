"""The accuracy gate: what low precision costs, against float32, on images that calibration did not see."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.census import Census, one_class
from fcn_deploy.calibration.label_files import find_label_files
from fcn_deploy.calibration.label_map import LabelMap, label_map_for
from fcn_deploy.calibration.mask_options import MaskOptions
from fcn_deploy.calibration.metrics import Metrics, confusion_matrix
from fcn_deploy.calibration.ranges import cells_with_data
from fcn_deploy.calibration.stream import ImageStream
from fcn_deploy.export.quantization.class_drops import Judgement, against_labels, against_results
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.manifest import Head
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.head.heads import View, views_of
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import result_from_scores
from fcn_deploy.runtime.pixels.no_data import filled
from fcn_deploy.runtime.pixels.prepare import padded_size, prepare
from onnx import ModelProto

log = logging.getLogger(__name__)

GATE_IMAGES = 40  # at most
SENSITIVITY_IMAGES = 3
BORDER = 4  # of a cell of the scores: so much may the border of a class move, as rounding moves it


class AccuracyGate:
    """Compares cores of low precision with the float core.

    Args:
        core: float32.
        upsampling, card: of the model.
        images: to compare on.
        labels: their label files; None: float32's are the measure. For networks of one output.
        heads: of several outputs, each of which is judged.
        max_drop: points that may be lost, and that each class may lose.
        kernels_exact: whether ONNX Runtime's kernels run the cores exactly. They do the CPU's Q/DQ, whose weights never
            saturate them. s8·s8 and emulated FP16 they do not: these run as written, Q/DQ as float arithmetic.

    Attributes:
        images: [H, W, C] as the card says, with its mean where there is no data.
        data: bool [H, W] of each, where there is data: what is compared.
        metric: `mIoU` where labels are given, else `agreement`: the share of pixels labelled, or masked, as by float32;
            of values 1 less their mean difference from float32's, as a share of their range; of several outputs, that
            of the one that loses most.
        baseline: of float32, in 0..1.
        count: of images.
        max_class_drop: points of IoU that each class may lose.
        classes: their names, of all outputs; behind that of their output where there are several.

    Raises:
        DeployError: no image can be read, or labels do not fit them.
    """

    def __init__(
        self,
        core: ModelProto,
        upsampling: Upsampling,
        card: ModelCard,
        images: ImageStream,
        labels: "LabelFolder | None",
        *,
        max_drop: float,
        max_class_drop: float = 100.0,
        kernels_exact: bool,
        heads: Sequence[Head] = (),
    ) -> None:
        self.card, views = card, list(views_of(card, upsampling, heads))
        self._views = [view for _, view in views]
        self.classes = [f"{name}/{each}" if name else each for name, view in views for each in view.card.classes]
        self.max_drop, self.max_class_drop, self.kernels_exact = max_drop, max_class_drop, kernels_exact
        self.images: list[np.ndarray] = []
        self.data: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []
        run = session(core.SerializeToString())
        own: list[list[np.ndarray]] = []
        expected: list[np.ndarray] = []
        for name, given in images:
            image, invalid = filled(given, card)
            size = image.shape[:2]
            scores = run.run(["scores"], {"image": prepare(image, card)})[0][0]
            self.images.append(image)
            self.data.append(np.ones(size, bool) if invalid is None else ~invalid)
            if len(self.scores) < SENSITIVITY_IMAGES:
                self.scores.append(scores)
            own.append(self._results(scores, self.data[-1]))
            if labels is not None:
                expected.append(labels.of(name, size, self.data[-1]))
        if not own:
            raise DeployError("none of the images to judge by could be read; give more with --calib")
        self.metric = "mIoU" if labels is not None else "agreement"
        self.count = len(own)
        if labels is None:
            self.expected, self.baseline = own, 1.0
        else:
            self.expected = [[each] for each in expected]
            labels.check()
            self.confusion = self._confusion(own)
            self.baseline = Metrics.of(self.confusion).mean_iou
            if not self.baseline > 0:
                raise DeployError(
                    f"float32 has an mIoU of {self.baseline} against the labels, so nothing can be judged by them; are "
                    "they of these images and classes?"
                )

    def _results(self, scores: np.ndarray, data: np.ndarray) -> list[np.ndarray]:
        """What is compared of an image: the labels, masks or values of each output."""
        return [_result(scores if view.channels is None else scores[view.channels], view, data) for view in self._views]

    def _compare(self, results: list[list[np.ndarray]]) -> Judgement:
        """What is lost, by results of each output of each image."""
        if self.metric == "mIoU":
            confusion = self._confusion(results)
            drops = against_labels(self.confusion, confusion)
            return Judgement(Metrics.of(confusion).mean_iou, drops, drops)
        found, first = Judgement(1.0, {}, {}), 0
        for index, view in enumerate(self._views):
            before, after = ([each[index] for each in images] for images in (self.expected, results))
            judged = _agreement(before, after, self.data, view.card)
            lost, beyond = (
                {first + key: points for key, points in drops.items()} for drops in (judged.lost, judged.beyond)
            )
            value = min(found.value, judged.value) if judged.value == judged.value else judged.value
            found = Judgement(value, found.lost | lost, found.beyond | beyond)
            first += len(view.card.classes)
        return found

    def _confusion(self, results: list[list[np.ndarray]]) -> np.ndarray:
        """Pixels by (label, result), int64 [classes, classes], of the one output."""
        classes = len(self.classes)
        confusion = np.zeros((classes, classes), np.int64)
        for (expected,), (labels,), data in zip(self.expected, results, self.data, strict=True):
            confusion += confusion_matrix(expected, labels if data.all() else labels[data], classes)
        return confusion

    def measure(self, core: ModelProto) -> Judgement:
        """What a core in low precision gives."""
        run = self._session(core)
        return self.measure_run(lambda image: run.run(["scores"], {"image": prepare(image, self.card)})[0][0])

    def measure_run(self, run: Callable[[np.ndarray], np.ndarray]) -> Judgement:
        """What comes of whatever gives an image's uncropped scores: [H, W, C] as the card says → [K, h, w]."""
        return self._compare(
            [self._results(run(image), data) for image, data in zip(self.images, self.data, strict=True)]
        )

    def sensitivity(self, core: ModelProto) -> float:
        """Squared error of the scores over their power, on a few images; of the output where that is most."""
        run = self._session(core)
        error, power = np.zeros(len(self._views)), np.full(len(self._views), 1e-30)
        for image, expected in zip(self.images, self.scores, strict=False):
            scores = run.run(["scores"], {"image": prepare(image, self.card)})[0][0]
            for index, view in enumerate(self._views):
                own = slice(None) if view.channels is None else view.channels
                error[index] += float(((scores[own] - expected[own]) ** 2).sum())
                power[index] += float((expected[own] ** 2).sum())
        return float((error / power).max())

    def drop(self, value: float) -> float:
        """Points of the metric that are lost. NaN, which a broken core gives, counts as all."""
        lost = (self.baseline - value) * 100
        return lost if lost == lost else 100.0

    def holds(self, found: Judgement) -> bool:
        """Whether a core that gives this loses no more than is allowed, and none of its classes does."""
        return self.drop(found.value) <= self.max_drop and found.worst <= self.max_class_drop

    def lost(self, found: Judgement) -> str:
        """What is lost, in words, and what is allowed."""
        text = f"{self.drop(found.value):.2f} points of {self.metric} lost, {self.max_drop:g} allowed"
        if found.worst <= self.max_class_drop:
            return text
        worst = self.classes[max(found.beyond, key=found.beyond.__getitem__)].removeprefix("class ")
        return f"class {worst} loses {found.worst:.1f} points of IoU, {self.max_class_drop:g} allowed ({text})"

    def class_drops(self, found: Judgement) -> dict[str, float]:
        """Class → points of IoU that it lost, of those that lost more than one may, the largest first."""
        drops = sorted(found.lost.items(), key=lambda item: -item[1])
        return {self.classes[index]: round(lost, 2) for index, lost in drops if lost > self.max_class_drop}

    def _session(self, core: ModelProto):
        return session(core.SerializeToString(), optimise=self.kernels_exact)


def _result(scores: np.ndarray, view: View, data: np.ndarray) -> np.ndarray:
    """An output's labels, masks or values; of values [K, n] of the cells that have data."""
    card = view.card
    height, width = size = (data.shape[0], data.shape[1])
    padded = padded_size(height, width, card)
    if card.kind != "values":
        return result_from_scores(card.kind, ScoreWindow.whole(scores, padded, size), view.upsampling, card)
    # Interpolated they are convex combinations of these, and many times their memory.
    if data.all():
        return scores
    whole = np.pad(data, [(0, more - side) for more, side in zip(padded, size, strict=True)])
    return scores[..., cells_with_data(whole, scores.shape[1:])]


def _agreement(
    expected: Sequence[np.ndarray], found: Sequence[np.ndarray], data: Sequence[np.ndarray], card: ModelCard
) -> Judgement:
    """How far an output's results are float32's, of each image."""
    if card.kind == "values":
        lost = sum(float(np.abs(a - b).mean(dtype=np.float64)) for a, b in zip(found, expected, strict=True))
        spread = max(float(b.max()) for b in expected) - min(float(b.min()) for b in expected)
        return Judgement(1 - lost / len(found) / max(spread, 1e-12), {}, {})
    same = [a == b for a, b in zip(found, expected, strict=True)]
    counted = [each[..., valid] for each, valid in zip(same, data, strict=True)]
    drops, beyond = against_results(expected, found, data, len(card.classes), max(1, card.stride // BORDER))
    equal = sum(int(each.sum()) for each in counted) / sum(each.size for each in counted)
    return Judgement(equal, drops, beyond)


class LabelFolder:
    """Label files of any kind, found by the names of their images.

    Args:
        folder: of the files.
        card: of the model.
        masks: what the user says of them.

    Raises:
        DeployError: two labels of one image.
        MisuseError: `masks` that do not fit the classes.
    """

    def __init__(self, folder: Path, card: ModelCard, masks: MaskOptions) -> None:
        self.folder, self.files = folder, find_label_files(folder)
        self.label_map: LabelMap = label_map_for(card, masks)
        self.census = Census(np.zeros(len(card.classes), np.int64))

    def of(self, name: str, size: tuple[int, int], data: np.ndarray | None = None) -> np.ndarray:
        """The labels of an image, uint8 [H, W]; where only some of it is `data`, bool [H, W], theirs alone: [n].

        Raises DeployError: none, of another size, or of unknown classes.
        """
        stem = Path(name).stem
        path = self.files.get(stem, self.folder / f"{stem}.png")
        read = self.label_map.read(path)
        if (found := read.labels.shape) != size:
            raise DeployError(f"{path} is {found[0]}×{found[1]}, and its image is {size[0]}×{size[1]}")
        labels = read.labels if data is None or data.all() else read.labels[data]
        self.census.add(replace(read, labels=labels), path)
        return labels

    def check(self) -> None:
        """Ask, or say, where the labels read so far are of one class. Raises MisuseError."""
        self.census.check(self.label_map, str(self.folder))
        if alone := one_class(self.census.pixels, self.label_map.classes, str(self.folder)):
            log.warning(alone)

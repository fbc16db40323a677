"""INT8 and FP16 that keep their accuracy: calibrate, write precision into the graph, measure, and revert what hurts."""

import csv
import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fcn_deploy.calibration.datasets import read_labels
from fcn_deploy.calibration.metrics import IGNORE, Metrics, confusion_matrix
from fcn_deploy.calibration.ranges import METHODS, Ranges, collect
from fcn_deploy.calibration.stream import ImageStream, divide, open_stream
from fcn_deploy.export.quantization.half import LARGEST_OF, emulate_half, half, overflowing
from fcn_deploy.export.quantization.quantize import (
    SCHEMES,
    convolutions,
    measured_tensors,
    quantised_convolutions,
    quantize,
)
from fcn_deploy.runtime.backends.onnxruntime import one_line, session
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing
from fcn_deploy.runtime.manifest import Upsampling
from fcn_deploy.runtime.model_card import ModelCard
from fcn_deploy.runtime.prepare import padded_size, prepare
from fcn_deploy.runtime.upsampling import ScoreWindow, result_from_scores
from onnx import ModelProto

JUDGED = 40  # images at most that the gate looks at
SENSITIVITY_IMAGES = 3


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        int8, fp16: which precisions the graph may use; float32 where neither.
        calib: source of images (see calibration.stream.open_stream), or None.
        count: of images to calibrate on.
        method: of ranges: minmax, percentile, entropy or mse.
        labels: folder of labels named as the images; None: the gate compares with float32's labels.
        max_drop: points of mIoU (or of agreement) that may be lost.
        ranges: file to read, or to write where it does not exist.
        seed: of the sample.
        half_interface: with FP16, the core takes and gives float16 (where its last node is).
    """

    int8: bool = False
    fp16: bool = False
    calib: str | None = None
    count: int = 100
    method: str = "mse"
    labels: Path | None = None
    max_drop: float = 0.5
    ranges: Path | None = None
    seed: int = 0
    half_interface: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise MisuseError(f"method {self.method!r}; choose one of {', '.join(METHODS)}")
        if self.int8 and self.calib is None:
            raise MisuseError("--int8 needs real images to calibrate on: pass --calib FOLDER")
        if self.fp16 and self.calib is None:
            raise MisuseError("--fp16 needs real images to find what overflows: pass --calib FOLDER")

    @property
    def precision(self) -> str:
        return "int8" if self.int8 else "float16" if self.fp16 else "float32"


@dataclass
class Layer:
    """One layer in the precision report.

    Attributes:
        name: its output.
        operator: of the node.
        sensitivity: error of the scores, relative to their power, with this layer alone in low precision.
        kept: why it stays in higher precision; "" where it does not.
    """

    name: str
    operator: str
    sensitivity: float | None = None
    kept: str = ""


class BudgetError(DeployError):
    """The accuracy budget cannot be held. `layers` says what each layer costs."""

    def __init__(self, message: str, layers: list[Layer]) -> None:
        super().__init__(message)
        self.layers = layers


@dataclass
class Result:
    """A core with its precision, and what that cost.

    Attributes:
        core: what the engine holds.
        reference: a float32 graph of the same arithmetic, run with optimisation off.
        layers: of the report.
        report: for report.json.
        judge: what the gate compared with, for those who run the core by other kernels.
        image_mean: of the normalised images that INT8 was calibrated on, per channel.
    """

    core: ModelProto
    reference: ModelProto
    layers: list[Layer]
    report: dict[str, Any] = field(default_factory=dict)
    judge: "Judge | None" = None
    image_mean: np.ndarray | None = None


def lower(
    core: ModelProto,
    head: Upsampling,
    card: ModelCard,
    target: str,
    options: Options,
    *,
    rank: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Result:
    """A core in the precision asked for, kept inside the accuracy budget.

    Args:
        core: float32, without batch norms (optimised offline).
        head, card: of the model.
        target: `cpu` or `tensorrt`.
        options: what to do.
        rank: measure every layer's sensitivity, also where nothing is reverted.
        say: called with a line when a phase begins.

    Raises:
        MisuseError: ranges of another network, or no such images.
        BudgetError: the accuracy budget cannot be held.
        DeployError: no image can be read, or tensors are not finite.
    """
    if options.labels is not None and card.kind != "labels":
        raise MisuseError(f"--labels has a label for each pixel, and this network gives {card.kind}: leave it away")
    images = open_stream(options.calib, card)
    key = hashlib.sha256(core.SerializeToString() + card.to_json().encode()).hexdigest()
    ranges = None
    if options.int8 and options.ranges is not None and options.ranges.exists():
        ranges = Ranges.load(options.ranges, key)
    seen = set(ranges.images) if ranges else set()
    calibration, held_out = divide(images, options.count, JUDGED, options.seed, seen)
    judge = Judge(core, head, card, held_out, options.labels, exact=target == "cpu")
    layers = {node.output[0]: Layer(node.output[0], node.op_type) for node in core.graph.node}
    build = _Candidates(core, target, options)
    if options.int8:
        if ranges is None:
            say(f"calibrating on {len(calibration)} images")
            ranges = collect(tapped(core), calibration, key, lambda image: prepare(image, card))
            if options.ranges is not None:
                ranges.save(options.ranges)
        build.calibrate(ranges)
        layers = {node.output[0]: layers[node.output[0]] for node in convolutions(core)}
    if target == "tensorrt" and options.fp16:
        say("looking for what overflows in FP16")
        for name in build.find_overflow(card, calibration):
            layers.setdefault(name, Layer(name, "")).kept = "beyond float16's range"
    used = ranges.images if ranges else [name for name in calibration.names if name not in calibration.skipped]
    report: dict[str, Any] = {
        "calibration_images": len(used),
        "images_judged": judge.count,
        "judged_unseen": not set(used) & set(held_out.names),
        "skipped": {**calibration.skipped, **held_out.skipped},
    }
    if options.int8:
        report["method"] = options.method
    forced = {name for name, layer in layers.items() if layer.kept}
    say(f"comparing with float32 on {judge.count} images")
    reverted: set[str] = set()
    value = judge.measure(build.reference(reverted))
    ranked: list[str] = []
    if rank or judge.drop(value) > options.max_drop:
        say(f"measuring the sensitivity of {len(layers)} layers")
        for name in layers:
            if name not in forced:
                layers[name].sensitivity = judge.error(build.reference({*layers} - {name}))
        ranked = sorted((n for n in layers if n not in forced), key=lambda n: -layers[n].sensitivity)
    step = 1
    while judge.drop(value) > options.max_drop and len(reverted) < len(ranked):
        for name in ranked[len(reverted) : len(reverted) + step]:
            reverted.add(name)
            layers[name].kept = "reverted: the accuracy budget was exceeded"
        step *= 2
        say(f"{judge.drop(value):.2f} points lost; reverted {len(reverted)} of {len(ranked)} layers")
        value = judge.measure(build.reference(reverted))
    if judge.drop(value) > options.max_drop:
        raise BudgetError(
            f"{options.precision} loses {judge.drop(value):.2f} points of {judge.metric} with every layer reverted, "
            f"over --max-drop {options.max_drop}; raise it, or give more images to judge by",
            list(layers.values()),
        )
    if options.int8 and not quantised_convolutions(build.core(reverted)):
        raise BudgetError(
            f"no layer can be INT8 within --max-drop {options.max_drop}: build without --int8, fine-tune with "
            "train-fcn --qat, or allow more",
            list(layers.values()),
        )
    report |= {
        "metric": judge.metric,
        "float32": judge.baseline,
        options.precision: value,
        "drop_points": round(judge.drop(value), 4),
        "max_drop": options.max_drop,
        "layers": len(layers),
        "kept": {layer.name: layer.kept for layer in layers.values() if layer.kept},
    }
    core, reference = build.core(reverted), build.reference(reverted)
    return Result(core, reference, list(layers.values()), report, judge, build.means.get("image"))


class _Candidates:
    """Graphs with some layers in higher precision: what the engine would hold, and what its arithmetic is."""

    def __init__(self, core: ModelProto, target: str, options: Options) -> None:
        self.float_core, self.target, self.options = core, target, options
        self.scheme = SCHEMES[target]
        if not options.fp16:  # scales stay float32
            self.scheme = replace(self.scheme, least_scale=1e-12)
        self.overflow: set[str] = set()
        self.ranges: dict[str, tuple[float, float]] = {}
        self.means: dict[str, np.ndarray] = {}
        self.rounded: dict[tuple[str, bool], tuple[np.ndarray, np.ndarray]] = {}

    def calibrate(self, ranges: Ranges) -> None:
        self.ranges = {
            name: histogram.range(self.options.method, self.scheme.symmetric)
            for name, histogram in ranges.histograms.items()
        }
        self.means = {name: ranges.channel_mean(name) for name in ranges.means}

    def find_overflow(self, card: ModelCard, images: ImageStream) -> set[str]:
        """Nodes that cannot be half, by the magnitudes of real images."""
        run = session(emulate_half(self.float_core).SerializeToString(), optimise=False)
        names = [value.name for value in run.get_outputs() if value.name.startswith(LARGEST_OF)]
        largest: dict[str, float] = {}
        seen = 0
        for _, image in images:
            seen += 1
            for name, value in zip(names, run.run(names, {"image": prepare(image, card)}), strict=True):
                name = name.removeprefix(LARGEST_OF)
                # max() would drop a NaN.
                largest[name] = float(np.maximum(largest.get(name, 0.0), value))
        if not seen:
            raise DeployError("no calibration image could be read; FP16 is never judged on invented data")
        self.overflow = overflowing(largest, self.float_core)
        return self.overflow

    def _quantised(self, kept: Collection[str]) -> ModelProto:
        if not self.options.int8:
            return self.float_core
        return quantize(self.float_core, self.ranges, self.scheme, kept, self.means, self.rounded)

    def _float_nodes(self, reverted: Collection[str]) -> set[str]:
        # Layers that INT8 gave up become FP16 on a GPU; what FP16 gave up becomes float32.
        return self.overflow | (set() if self.options.int8 else set(reverted))

    def core(self, reverted: Collection[str]) -> ModelProto:
        graph = self._quantised({*reverted, *self.overflow})
        if not self.options.fp16:
            return graph
        return half(graph, self._float_nodes(reverted), self.options.half_interface)

    def reference(self, reverted: Collection[str]):
        """A session of the same arithmetic in float32. For CPUs it is the engine's own graph, as it will run."""
        graph = self._quantised({*reverted, *self.overflow})
        if self.target == "cpu":
            return graph
        return emulate_half(graph, self._float_nodes(reverted)) if self.options.fp16 else graph


def tapped(core: ModelProto) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function that runs a float32 core on an input, [1, C, H, W], and gives the tensors to be measured."""
    model = ModelProto()
    model.CopyFrom(core)
    names = [name for name in measured_tensors(core) if name != "image"]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    data = model.SerializeToString()
    run, largest = None, 0

    def tensors(x: np.ndarray) -> dict[str, np.ndarray]:
        nonlocal run, largest
        try:
            # The arena keeps pages from one image to the next, without which half of the time goes into faults. It
            # never gives back what became too small, so it starts anew with each image larger than all before.
            if x.size > largest:
                run, largest = None, x.size
                run = session(data)
            found = {"image": x} | dict(zip(names, run.run(names, {"image": x}), strict=True))
            # Sums of shapes and of token sequences are no feature maps; they stay float.
            return {name: t for name, t in found.items() if t.ndim == 4 and t.dtype == np.float32}
        except Exception as error:
            raise DeployError(f"the network failed on a calibration image: {one_line(error)}") from error

    return tensors


class Judge:
    """Compares candidates with float32 on images that calibration did not see.

    Args:
        exact: whether ONNX Runtime's kernels run the candidates exactly. It does the CPU's Q/DQ, whose weights never
            saturate them. s8·s8 and emulated FP16 it does not: these run as written, Q/DQ as float arithmetic.

    Attributes:
        images: what it judges by.
        metric: `mIoU` where labels are given, else `agreement`: the share of pixels labelled, or masked, as by float32;
            of values 1 less their mean difference from float32's, as a share of their range.
        baseline: of float32, in 0..1.
        count: of images.
    """

    def __init__(
        self, core: ModelProto, head: Upsampling, card: ModelCard, images: ImageStream, labels: Path | None, exact: bool
    ) -> None:
        self.head, self.card, self.exact = head, card, exact
        self.images: list[np.ndarray] = []
        self.expected: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []
        run = session(core.SerializeToString())
        own: list[np.ndarray] = []
        for name, image in images:
            size = image.shape[:2]
            scores = run.run(["scores"], {"image": prepare(image, card)})[0][0]
            self.images.append(image)
            if len(self.scores) < SENSITIVITY_IMAGES:
                self.scores.append(scores)
            own.append(self._result(scores, size))
            if labels is not None:
                self.expected.append(_label_of(name, labels, size, len(card.classes)))
        if not own:
            raise DeployError("none of the images to judge by could be read; give more with --calib")
        self.metric = "mIoU" if labels is not None else "agreement"
        self.count = len(own)
        if labels is None:
            self.expected, self.baseline = own, 1.0
        else:
            self.baseline = self._compare(own)
            if not self.baseline > 0:
                raise DeployError(
                    f"float32 has an mIoU of {self.baseline} against the labels, so nothing can be judged by them; are "
                    "they of these images and classes?"
                )

    def _result(self, scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        if self.card.kind == "values":
            return scores  # interpolated they are convex combinations of these, and many times their memory
        return result_from_scores(
            self.card.kind, ScoreWindow.whole(scores, padded_size(*size, self.card), size), self.head, self.card
        )

    def _compare(self, labels: list[np.ndarray]) -> float:
        if self.card.kind == "values":
            lost = sum(float(np.abs(a - b).mean(dtype=np.float64)) for a, b in zip(labels, self.expected, strict=True))
            spread = max(float(b.max()) for b in self.expected) - min(float(b.min()) for b in self.expected)
            return 1 - lost / len(labels) / max(spread, 1e-12)
        if self.metric == "agreement":
            equal = sum(int((a == b).sum()) for a, b in zip(labels, self.expected, strict=True))
            return equal / sum(a.size for a in labels)
        classes = len(self.card.classes)
        confusion = sum(confusion_matrix(e, found, classes) for e, found in zip(self.expected, labels, strict=True))
        return Metrics.of(confusion).mean_iou

    def measure(self, candidate: ModelProto) -> float:
        """The metric of a candidate, in 0..1."""
        run = self._session(candidate)
        return self.measure_run(lambda image: run.run(["scores"], {"image": prepare(image, self.card)})[0][0])

    def measure_run(self, run: Callable[[np.ndarray], np.ndarray]) -> float:
        """The metric of whatever gives an image's uncropped scores: [H, W, C] as the card says → [K, h, w]."""
        return self._compare([self._result(run(image), image.shape[:2]) for image in self.images])

    def error(self, candidate: ModelProto) -> float:
        """Squared error of the scores over their power, on a few images."""
        run = self._session(candidate)
        error = power = 0.0
        for image, expected in zip(self.images, self.scores, strict=False):
            scores = run.run(["scores"], {"image": prepare(image, self.card)})[0][0]
            error += float(((scores - expected) ** 2).sum())
            power += float((expected**2).sum())
        return error / max(power, 1e-30)

    def drop(self, value: float) -> float:
        """Points lost. NaN, which a broken candidate gives, counts as all."""
        lost = (self.baseline - value) * 100
        return lost if lost == lost else 100.0

    def _session(self, candidate: ModelProto):
        return session(candidate.SerializeToString(), optimise=self.exact)


def _label_of(name: str, folder: Path, size: tuple[int, int], classes: int) -> np.ndarray:
    path = folder / (Path(name).stem + ".png")
    labels = read_labels(path).copy()
    if labels.shape != size:
        raise DeployError(f"{path} is {labels.shape[0]}×{labels.shape[1]}, and its image is {size[0]}×{size[1]}")
    labels[labels == classes] = IGNORE  # the void class after the last
    if (wrong := labels[(labels > classes) & (labels != IGNORE)]).size:
        raise DeployError(f"{path} holds class {wrong.max()}, and there are {classes} classes")
    return labels


def write_layers(path: Path, layers: list[Layer]) -> None:
    """The precision report: a CSV of the layers, the most sensitive first."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "operator", "sensitivity", "kept in higher precision"])
        for layer in sorted(layers, key=lambda layer: -(layer.sensitivity or 0)):
            writer.writerow([layer.name, layer.operator, layer.sensitivity, layer.kept])

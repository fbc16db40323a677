"""Which layers are in low precision: all that can be; then the most sensitive go back, until the budget holds."""

import csv
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.ranges import Ranges
from fcn_deploy.calibration.report.engine_report import Accuracy, LayerPrecision
from fcn_deploy.calibration.stream import ImageStream, divide, open_stream
from fcn_deploy.export.quantization.calibrate import (
    Activations,
    collect_ranges,
    kept_ranges,
    key_of,
    largest_magnitudes,
)
from fcn_deploy.export.quantization.class_drops import Judgement
from fcn_deploy.export.quantization.gate import GATE_IMAGES, AccuracyGate, LabelFolder
from fcn_deploy.export.quantization.half import emulate_half, half, overflowing
from fcn_deploy.export.quantization.options import GOLDEN_ALONE, QuantizationOptions, Say
from fcn_deploy.export.quantization.quantize import (
    LARGEST_FP8_FILTER,
    LEAST_FP8_CHANNELS,
    SCHEMES,
    RoundedWeights,
    quantize,
    quantized_convolutions,
)
from fcn_deploy.export.quantization.round_weights import NO_LIMIT
from fcn_deploy.runtime.engine_format.manifest import Head
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import replacing
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from onnx import ModelProto, TensorProto

NOISE_SIZE, NOISE_IMAGES = (61, 83), 8  # in pixels; where there are no photographs
NO_LABELS = "--labels has a label for each pixel, and this network gives {}: omit it"
SEVERAL_LABELS = "--labels are of one output, and this engine has {}; omit it: each is held against float32's results"
BEYOND_FLOAT16 = "beyond float16's range"
REVERTED = "reverted: the accuracy budget was exceeded"


class BudgetError(DeployError):
    """The accuracy budget cannot be held. `layers` says what each layer costs."""

    def __init__(self, message: str, layers: list[LayerPrecision]) -> None:
        super().__init__(message)
        self.layers = layers


@dataclass
class MixedPrecision:
    """A core in low precision, and what that cost.

    Attributes:
        core: the quantized core, which the engine holds.
        emulated: a float32 graph of the same arithmetic, run with optimisation off.
        layers: of the report.
        accuracy: what it cost.
        gate: that measured it, for those who run the core by other kernels.
        image_mean: of the normalised images that INT8 was calibrated on, per channel.
        notes: what the user should know, a line each.
    """

    core: ModelProto
    emulated: ModelProto
    layers: list[LayerPrecision]
    accuracy: Accuracy
    gate: AccuracyGate
    image_mean: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def mix_precision(
    core: ModelProto,
    upsampling: Upsampling,
    card: ModelCard,
    scheme: str,
    options: QuantizationOptions,
    *,
    half_interface: bool = False,
    rank: bool = False,
    heads: Sequence[Head] = (),
    say: Say = lambda line: None,
) -> MixedPrecision:
    """A core in the precision asked for, kept inside the accuracy budget.

    Args:
        core: float32, without batch norms (optimised offline).
        upsampling, card: of the model.
        scheme: a key of SCHEMES.
        options: what is asked for.
        half_interface: with FP16, the core takes and gives float16 (where its last node is).
        rank: measure every layer's sensitivity, also where nothing is reverted.
        heads: of several outputs.
        say: called with a line when a phase begins.

    Raises:
        MisuseError: ranges of another network, or no such images.
        BudgetError: the accuracy budget cannot be held.
        DeployError: no image can be read, or tensors are not finite.
    """
    _check(core, card, options, heads)
    images, key = _images(options, card), key_of(core, card)
    ranges = kept_ranges(options, key)
    calibration, held_out = divide(
        images, options.count, GATE_IMAGES, options.seed, set(ranges.images) if ranges else set()
    )
    gate = _gate_on(held_out, core, upsampling, card, options, heads, kernels_exact=scheme == "cpu")
    graphs = _Graphs(core, scheme, options, half_interface)
    if options.quantized:
        if ranges is None:
            say(f"calibrating on {len(calibration)} images")
            ranges = collect_ranges(core, card, calibration, options, key)
        graphs.calibrate(ranges)
    if scheme == "tensorrt" and options.fp16:
        say("looking for what overflows in FP16")
        graphs.overflow = overflowing(largest_magnitudes(core, card, calibration), core)
    search = _Search(graphs, gate, options, say)
    found = search.run(rank)
    value: dict[str, Any] = {options.precision: found.value}
    used = ranges.images if ranges else [name for name in calibration.names if name not in calibration.skipped]
    accuracy = Accuracy(
        metric=gate.metric,
        float32=gate.baseline,
        drop_points=round(gate.drop(found.value), 4),
        max_drop=options.max_drop,
        calibration_images=len(used),
        images_judged=gate.count,
        judged_unseen=not set(used) & set(held_out.names),
        layers=len(search.layers),
        kept={layer.name: layer.kept for layer in search.layers.values() if layer.kept},
        skipped={**calibration.skipped, **held_out.skipped},
        method=options.range_method if options.quantized else None,
        max_class_drop=options.class_drop,
        class_drops=gate.class_drops(found),
        **value,
    )
    layers = list(search.layers.values())
    quantized, emulated = graphs.core(search.reverted), graphs.emulated(search.reverted)
    notes = _notes(options, len(graphs.overflow))
    return MixedPrecision(quantized, emulated, layers, accuracy, gate, graphs.activations.means.get("image"), notes)


def _check(core: ModelProto, card: ModelCard, options: QuantizationOptions, heads: Sequence[Head]) -> None:
    """Refuse what does not go with the network."""
    if options.labels is not None and heads:
        raise MisuseError(SEVERAL_LABELS.format(", ".join(head.name for head in heads)))
    if options.labels is not None and card.kind != "labels":
        raise MisuseError(NO_LABELS.format(card.kind))
    if options.fp8 and not SCHEMES["tensorrt-fp8"].quantized(core):
        raise MisuseError(
            f"the network has no convolution for FP8 (dense, of {LEAST_FP8_CHANNELS} channels in and out or more, and "
            f"{LARGEST_FP8_FILTER} places of the filter or fewer); omit --fp8"
        )


def to_be_judged(
    core: ModelProto, upsampling: Upsampling, card: ModelCard, options: QuantizationOptions, heads: Sequence[Head] = ()
) -> MixedPrecision:
    """A float32 core that a library will run in low precision by itself, and the gate that is to judge what comes.

    Arguments and errors are those of `mix_precision`. Its accuracy is that of float32 until then.
    """
    gate, held_out = _gate_of(core, upsampling, card, options, heads)
    value: dict[str, Any] = {options.precision: gate.baseline}
    accuracy = Accuracy(
        metric=gate.metric,
        float32=gate.baseline,
        drop_points=0.0,
        max_drop=options.max_drop,
        calibration_images=0,
        images_judged=gate.count,
        judged_unseen=True,
        layers=len(core.graph.node),
        skipped=dict(held_out.skipped),
        max_class_drop=options.class_drop,
        **value,
    )
    return MixedPrecision(core, core, [], accuracy, gate)


def _gate_on(
    images: ImageStream,
    core: ModelProto,
    upsampling: Upsampling,
    card: ModelCard,
    options: QuantizationOptions,
    heads: Sequence[Head],
    kernels_exact: bool,
) -> AccuracyGate:
    labels = None if options.labels is None else LabelFolder(options.labels, card, options.masks)
    return AccuracyGate(
        core,
        upsampling,
        card,
        images,
        labels,
        max_drop=options.max_drop,
        max_class_drop=options.class_drop,
        kernels_exact=kernels_exact,
        heads=heads,
    )


def _gate_of(
    core: ModelProto, upsampling: Upsampling, card: ModelCard, options: QuantizationOptions, heads: Sequence[Head]
) -> tuple[AccuracyGate, ImageStream]:
    """A gate of images that nothing is calibrated on, and they."""
    _check(core, card, options, heads)
    images = _images(options, card)
    held_out = images.subset(np.random.default_rng(options.seed).permutation(len(images))[:GATE_IMAGES])
    return _gate_on(held_out, core, upsampling, card, options, heads, kernels_exact=True), held_out


def _notes(options: QuantizationOptions, overflowing: int) -> tuple[str, ...]:
    """What the user should know of layers that cannot be float16."""
    if not overflowing:
        return ()
    layers = "1 layer" if overflowing == 1 else f"{overflowing} layers"
    verb = "stays" if overflowing == 1 else "stay"
    return (
        f"FP16: {layers} beyond float16's range {verb} float32; --bf16, which has float32's range, needs none to be",
    )


def _images(options: QuantizationOptions, card: ModelCard) -> ImageStream:
    """What `calib` names; of the golden sample alone: noise as that is of."""
    assert options.calib is not None  # as QuantizationOptions checks
    if options.calib != GOLDEN_ALONE:
        return open_stream(options.calib, card, options.reading)
    names = [f"noise {seed}" for seed in range(NOISE_IMAGES)]
    return ImageStream(names, lambda index: natural_noise(*NOISE_SIZE, card, seed=index))


class _Search:
    """Reverts layers, the most sensitive first, until the budget holds.

    Attributes:
        layers: by name; what was found of each.
        reverted: names of those that went back.
        lost: what was lost by the last trial that did not hold, in words.
    """

    def __init__(self, graphs: "_Graphs", gate: AccuracyGate, options: QuantizationOptions, say: Say) -> None:
        self.graphs, self.gate, self.options, self.say = graphs, gate, options, say
        core = graphs.float_core
        nodes = graphs.scheme.quantized(core) if options.quantized else core.graph.node
        self.layers = {node.output[0]: LayerPrecision(node.output[0], node.op_type) for node in nodes}
        for name in graphs.overflow:
            self.layers.setdefault(name, LayerPrecision(name, "")).kept = BEYOND_FLOAT16
        self.reverted: set[str] = set()
        self.lost = ""

    def run(self, rank: bool) -> Judgement:
        """What is left, as the gate judges it. Raises BudgetError."""
        self.say(f"comparing with float32 on {self.gate.count} images")
        found = self.gate.measure(self.graphs.emulated(self.reverted))
        if (holds := self.gate.holds(found)) and not rank:
            self._check(found)
            return found
        ranked = self._ranked()
        low, high, step = 0, 0 if holds else len(ranked), 1  # layers: too few go back; so many may do
        while not holds and low < len(ranked):
            self.lost = self.gate.lost(found)
            high = min(low + step, len(ranked))
            found = self._with_reverted(ranked[:high], self.lost, len(ranked))
            if holds := self.gate.holds(found):
                break
            low, step = high, 2 * step
        while holds and high - low > 1:  # fewer may do
            middle = (low + high) // 2
            tried = self._with_reverted(ranked[:middle], self.gate.lost(found), len(ranked))
            if self.gate.holds(tried):
                high, found = middle, tried
            else:
                low = middle
        self.reverted = set(ranked[:high])
        for name in self.reverted:
            self.layers[name].kept = REVERTED
        self._check(found)
        return found

    def _with_reverted(self, names: Sequence[str], lost: str, of: int) -> Judgement:
        """What is left where these layers go back, as the gate judges it."""
        self.say(f"{lost}; reverting {len(names)} of {of} layers")
        return self.gate.measure(self.graphs.emulated(set(names)))

    def _ranked(self) -> list[str]:
        """The layers that may go back, the most sensitive first."""
        self.say(f"measuring the sensitivity of {len(self.layers)} layers")
        sensitivities = {}
        for name, layer in self.layers.items():
            if not layer.kept:
                layer.sensitivity = self.gate.sensitivity(self.graphs.emulated({*self.layers} - {name}))
                sensitivities[name] = layer.sensitivity
        return sorted(sensitivities, key=lambda name: -sensitivities[name])

    def _check(self, found: Judgement) -> None:
        options, layers = self.options, list(self.layers.values())
        if not self.gate.holds(found):
            over = "--max-class-drop" if self.gate.drop(found.value) <= options.max_drop else "--max-drop"
            raise BudgetError(
                f"{options.precision}, with every layer reverted: {self.gate.lost(found)}; raise {over}, or give more "
                "images to judge by",
                layers,
            )
        if options.quantized and not quantized_convolutions(self.graphs.core(self.reverted)):
            name = options.precision
            raise BudgetError(
                f"no layer can be {name.upper()} within --max-drop {options.max_drop:g} and --max-class-drop "
                f"{options.class_drop:g} ({self.lost or 'none is quantized'}): build without --{name}, fine-tune with "
                "train-fcn --qat, or allow more",
                layers,
            )


class _Graphs:
    """Graphs with some layers in higher precision: what the engine would hold, and what its arithmetic is.

    Attributes:
        overflow: nodes that cannot be half.
        activations: what was calibrated; nothing without INT8.
    """

    def __init__(self, core: ModelProto, scheme: str, options: QuantizationOptions, half_interface: bool) -> None:
        self.float_core, self.options, self.half_interface = core, options, half_interface
        self.scheme = SCHEMES["tensorrt-fp8" if options.fp8 else scheme]
        if not options.fp16:  # scales stay float32, or have its range
            self.scheme = replace(self.scheme, least_scale=NO_LIMIT)
        self.kind = TensorProto.BFLOAT16 if options.bf16 else TensorProto.FLOAT16 if options.fp16 else None
        self.overflow: set[str] = set()
        self.activations = Activations({}, {})
        self._rounded: dict[tuple[str, bool], RoundedWeights] = {}

    def calibrate(self, ranges: Ranges) -> None:
        self.activations = Activations.of(ranges, self.options.range_method, self.scheme.symmetric)

    def _quantized(self, reverted: Collection[str]) -> ModelProto:
        if not self.options.quantized:
            return self.float_core
        kept, found = {*reverted, *self.overflow}, self.activations
        return quantize(self.float_core, found.ranges, self.scheme, kept, found.means, self._rounded)

    def _never_half(self, reverted: Collection[str]) -> set[str]:
        # Layers that INT8 or FP8 gave up become FP16 on a GPU; what FP16 gave up becomes float32.
        return self.overflow | (set() if self.options.quantized else set(reverted))

    def core(self, reverted: Collection[str]) -> ModelProto:
        """The quantized core."""
        graph = self._quantized(reverted)
        if self.kind is None:
            return graph
        # The runtime's kernels write float16 and float32.
        interface = self.half_interface and self.kind == TensorProto.FLOAT16
        return half(graph, self._never_half(reverted), interface, self.kind)

    def emulated(self, reverted: Collection[str]) -> ModelProto:
        """A float32 graph of the same arithmetic. For CPUs it is the engine's own graph, as it will run."""
        graph = self._quantized(reverted)
        if self.scheme.name == "cpu" or self.kind is None:
            return graph
        return emulate_half(graph, self._never_half(reverted), self.kind)


def write_precision_report(path: Path, layers: Collection[LayerPrecision]) -> None:
    """A CSV of the layers, the most sensitive first."""
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "operator", "sensitivity", "kept in higher precision"])
        for layer in sorted(layers, key=lambda layer: -(layer.sensitivity or 0)):
            writer.writerow([layer.name, layer.operator, layer.sensitivity, layer.kept])

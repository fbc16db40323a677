"""Any segmentation ONNX in the form that engines are built from: float32 [N,C,H,W] in, scores [N,K,H,W] out, a card.

What is guessed or changed on the way is a note. What comes out is compared with the model as it was given, run by
ONNX Runtime at its own conventions, before anything is built.
"""

import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from export.fit import FITS, choose_fit, fit_sizes
from export.graph import (
    Names,
    add_constants,
    attributes,
    clone,
    constant,
    consumers,
    dims,
    label,
    metadata,
    opset,
    producers,
    prune,
    set_shape,
)
from export.load import load_model
from export.passes.as_float32 import as_float32, other_floats
from export.passes.cancel_transposes import cancel_transposes
from export.passes.cut_decision import Decision, cut_decision
from export.passes.fold_constants import fold_constants
from export.passes.free_sizes import free_sizes
from export.passes.image_input import Channels, channels_of_input, image_input
from export.passes.raise_opset import raise_opset
from export.passes.reverse_channels import reverse_channels
from export.passes.split_head import ends_in_sigmoid
from export.probe import MARGIN, SizeBehaviour, probe, run_quietly
from runtime.backends.onnxruntime import one_line, session
from runtime.engine_file import ACTIVATIONS, CARD_KEY, ModelCard
from runtime.errors import DeployError, MisuseError
from runtime.segmenter import assumed_card, check_card

# What a card file may say; the rest of a card is found by running the model.
CARD_FIELDS = ("classes", "colors", "channels", "dtype", "mean", "std", "activation", "threshold")
IMAGE_TYPES = {
    TensorProto.FLOAT: "uint8", TensorProto.UINT8: "uint8", TensorProto.UINT16: "uint16", TensorProto.INT32: "uint8",
    TensorProto.INT64: "uint8",
}  # fmt: skip  # type of the input → dtype of the images that are assumed
WHOLE = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT32, TensorProto.INT64)
NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
}  # fmt: skip  # ONNX Runtime's names of types
# Tried where a model declares no size: those that networks are made for, the small ones first.
TRIED_SIZES = (
    (64, 96), (64, 64), (128, 192), (224, 224), (256, 256), (256, 512), (320, 320), (384, 384), (416, 416), (480, 640),
    (512, 512), (513, 513), (473, 473), (640, 640), (512, 1024), (1024, 1024),
)  # fmt: skip
SAME = 1e-3  # of the scores' range: float32 rounds otherwise after a conversion
SAME_HALF = 3e-2  # of a model that ran in float16 before


NO_SIZES = SizeBehaviour()


@dataclass(frozen=True)
class Source:
    """A model to build from.

    Attributes:
        model: float32 [N,C,H,W] → scores [N,K,H,W] at every H, W ≥ 1.
        card: its own, or what was said and assumed of it.
        notes: what was assumed of it or changed in it, a line each.
        sizes: that the model takes by itself.
        fit: how it was made to take the others: one of export.fit.FITS; "": it takes them all.
    """

    model: ModelProto
    card: ModelCard
    notes: tuple[str, ...]
    sizes: SizeBehaviour = NO_SIZES
    fit: str = ""


@dataclass(frozen=True)
class SourceOptions:
    """What a user says of a model that carries no card.

    Attributes:
        mean, std: per channel in the order of the model's channels, or one for all, of the image times `scale`.
        scale: by which the image is multiplied first: 1/255, say.
        bgr: the model was trained on BGR; the engine takes RGB as all do.
        classes: names, in label order.
        output: name of the output to use.
        activation: as the card's.
        threshold: as the card's.
        card: fields of a card file: see CARD_FIELDS.
        fit: how it is made to take every size: one of export.fit.FITS; None: as choose_fit says.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    bgr: bool = False
    classes: tuple[str, ...] | None = None
    output: str | None = None
    activation: str | None = None
    threshold: float | tuple[float, ...] | None = None
    card: Mapping[str, Any] | None = None
    fit: str | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise MisuseError(f"--scale {self.scale}; it must be a number above 0, such as 0.00392157 for 1/255")
        if self.fit is not None and self.fit not in FITS:
            raise MisuseError(f"--fit {self.fit}; choose one of {', '.join(FITS)}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise MisuseError(f"--activation {self.activation}; choose one of {', '.join(ACTIVATIONS)}")
        if twice := [name for name in self.given() if name.removeprefix("input-") in (self.card or {})]:
            raise MisuseError(f"--{twice[0]} is in the card file too; say it once")
        if self.scale is not None and {"mean", "std"} & set(self.card or {}):
            raise MisuseError("--scale goes with --input-mean and --input-std; a card file's are of the image as it is")

    def given(self) -> list[str]:
        """The options that say what a card says, as they are written."""
        names = {"mean": "input-mean", "std": "input-std"}
        kept = ("mean", "std", "scale", "bgr", "classes", "activation", "threshold")
        return [names.get(name, name) for name in kept if getattr(self, name) not in (None, False)]


def read_card_file(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of a TOML card file. Raises MisuseError."""
    try:
        with Path(path).open("rb") as file:
            data = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise MisuseError(f"--card {path}: {' '.join(str(error).split())}; write TOML: docs/formats.md") from error
    if unknown := [key for key in data if key not in CARD_FIELDS]:
        raise MisuseError(f"--card {path} has {unknown[0]!r}; a card file may have {', '.join(CARD_FIELDS)}")
    return data


def read_source(path: str | os.PathLike, options: SourceOptions | None = None) -> Source:
    """Read an ONNX model, bring it into the standard form, and find or make its card.

    Args:
        path: of a segmentation model: any opset from 7 on, [N,C,H,W] or [N,H,W,C] in and out, of any type of number,
            with scores, probabilities or labels as outputs, of the image's size or smaller.
        options: what the user says of it; None: nothing.

    Raises:
        MisuseError: no such file or output, or options that contradict the model or its own card.
        DeployError: a model that cannot be taken: its node and the reason.
    """
    options, name = options or SourceOptions(), str(path)
    given = load_model(path, options.output)
    text = metadata(given, CARD_KEY)
    if text is not None and (said := [*options.given(), *(["card"] if options.card else [])]):
        raise MisuseError(f"{name} has a model card; --{said[0]} is for models without one")
    notes: list[str] = []
    original = _Original(given, name, notes)
    model, cut = _standard(original, options, notes)
    if options.bgr:
        if original.channels != 3:
            raise MisuseError(f"--bgr is for images of 3 channels, and {name} takes {original.channels}")
        model = reverse_channels(model)
        notes.append(f"{name} wants BGR, as --bgr says: its channels are reversed, and the engine takes RGB")
    model, sizes, fit = _any_size(model, original, cut, options, notes)
    scores = sizes.scores
    if text is not None:
        card = ModelCard.from_json(text, name)
        check_card(card, original.channels, scores, name)
    else:
        model, card = _card(model, scores, original, cut, options, notes)
    return Source(model, card, tuple(notes), sizes, fit)


class _Original:
    """A model as it was given, run at its own conventions, at a size that it takes.

    Attributes:
        model: as read.
        name: of it, in errors.
        output: name of the output that is used.
        axis: of the channels in its input, 1 or 3.
        channels: of its input.
        kind: the input's type.
        size: (height, width) of an image that it takes.
    """

    def __init__(self, model: ModelProto, name: str, notes: list[str]) -> None:
        self.model, self.name = model, name
        self._read_input(notes)
        try:
            self._run = session(model.SerializeToString(), optimise=False)
            native = self._run.get_inputs()[0].type in NUMPY
        except DeployError:
            if not other_floats(model):
                raise
            native = False
        if not native:  # ONNX Runtime has no convolutions of double, and NumPy no bfloat16
            self._run = session(as_float32(model).SerializeToString(), optimise=False)
        self._random = np.random.default_rng(0)
        self.size, results = self._size_and_results()
        self.output, self.result = self._choose(results, notes)
        self.half = bool({"float16", "bfloat16"} & set(other_floats(model)))

    def _read_input(self, notes: list[str]) -> None:
        inputs, name = self.model.graph.input, self.name
        if len(inputs) > 1:
            names = ", ".join(value.name for value in inputs)
            raise DeployError(f"{name} has {len(inputs)} inputs ({names}); a segmentation model has one, the image")
        image = inputs[0]
        if image.type.WhichOneof("value") != "tensor_type":
            raise DeployError(
                f"{name}: input {image.name} is a {image.type.WhichOneof('value')}, and an image is a tensor"
            )
        self.kind = image.type.tensor_type.elem_type
        found = TensorProto.DataType.Name(self.kind).lower()
        shape = [dim if not isinstance(dim, int) or dim > 0 else None for dim in dims(image)]
        if len(shape) != 4:
            raise DeployError(
                f"{name}: input {image.name} is {found} {dims(image)}, which is no image; a segmentation model takes "
                "[N,C,H,W] or [N,H,W,C]"
            )
        if self.kind not in IMAGE_TYPES and self.kind not in (
            TensorProto.FLOAT16,
            TensorProto.DOUBLE,
            TensorProto.BFLOAT16,
        ):
            raise DeployError(f"{name}: input {image.name} is {found}; images are float, uint8, uint16 or int32")
        seen = channels_of_input(self.model)
        self.axis, self.channels = _layout(shape, seen, image.name, name, notes)
        sides = (2, 3) if self.axis == 1 else (1, 2)
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.declared = tuple(shape[side] if isinstance(shape[side], int) else None for side in sides)
        if self.axis == 3:
            notes.append(f"{name} takes [N,H,W,{self.channels}]; its input and output are brought into [N,C,H,W]")
        if self.kind != TensorProto.FLOAT:
            notes.append(f"{name} takes {found}; the engine gives it the image's numbers, from float32")

    @property
    def static(self) -> bool:
        """Whether a side of the image, or their number, is declared as one number."""
        return self.declared != (None, None) or self.batch is not None

    @property
    def normalises(self) -> bool:
        """Whether it takes the image's own whole numbers."""
        return self.kind in WHOLE

    def images(self, size: tuple[int, int] | None = None, count: int | None = None) -> np.ndarray:
        """Random images in the standard form, float32 [count,C,H,W]; as many as it takes at once."""
        shape = (count or self.batch or 1, self.channels, *(size or self.size))
        if self.normalises:
            return self._random.integers(0, 256, shape).astype(np.float32)
        return self._random.standard_normal(shape, dtype=np.float32)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output that is a tensor, by name, for images in the standard form; of the first of them."""
        if self.axis == 3:
            images = images.transpose(0, 2, 3, 1)
        images = images.astype(NUMPY[self._run.get_inputs()[0].type])
        names = [
            value.name for value in self.model.graph.output if value.type.WhichOneof("value") in (None, "tensor_type")
        ]
        if not names:
            value = self.model.graph.output[0]
            raise DeployError(f"{self.name}: output {value.name} is a {value.type.WhichOneof('value')}, not a tensor")
        results = self._run.run(names, {self.model.graph.input[0].name: images})
        return {
            name: result[:1] if len(images) > 1 and result.ndim and len(result) == len(images) else result
            for name, result in zip(names, results, strict=True)
        }

    def _size_and_results(self) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
        """A size at which some output follows the image, and what the model gives there."""
        height, width = self.declared
        tried = [(height or rows, width or columns) for rows, columns in TRIED_SIZES]
        if height is None and width is None:
            tried = list(TRIED_SIZES)
        reason, last = None, {}
        for size in dict.fromkeys(tried):
            try:
                results = self.run(self.images(size))
            except DeployError:
                raise
            except Exception as error:
                reason = reason or one_line(error)[:300]
                continue
            if any(_follows(result.shape, size) for result in results.values()):
                return size, results
            last = last or results
            # A size that is baked in is that of the output.
            for result in results.values():
                if result.ndim == 4 and self.declared == (None, None):
                    for own in (result.shape[2:], result.shape[1:3]):
                        if own not in tried and min(own) >= 8 and max(own) <= 2048:
                            tried.append(own)
        if last:
            raise DeployError(f"{self.name} {_no_scores(self.model, last)}")
        raise DeployError(
            f"{self.name} runs at none of the sizes that were tried ({len(dict.fromkeys(tried))}, from "
            f"{'×'.join(map(str, tried[0]))} on): {reason}"
        )

    def _choose(self, results: Mapping[str, np.ndarray], notes: list[str]) -> tuple[str, np.ndarray]:
        """The output that is used: the largest in H and W, scores before labels before a single map, the first."""

        def rank(item: tuple[int, str]) -> tuple:
            index, name = item
            result = results[name]
            rows, columns, factor = _follows(result.shape, self.size)
            channels = result.size // (result.shape[rows] * result.shape[columns])
            whole = result.dtype.kind in "iub"
            kind = 1 if whole else (0 if channels > 1 else 2)
            return factor, "aux" in name.lower(), kind, index

        following = [name for name, result in results.items() if _follows(result.shape, self.size)]
        chosen = min(enumerate(following), key=rank)[1]
        others = [value.name for value in self.model.graph.output if value.name != chosen]
        if others:
            notes.append(
                f"{self.name} has several outputs; {chosen} is used, and {', '.join(others)} left out (the largest, "
                "scores before labels, the first; --output names another)"
            )
        return chosen, results[chosen]

    def compare(self, model: ModelProto, cut: "_Cut", bgr: bool) -> None:
        """Raise DeployError where the standard form does not give what the model gives, at the size that it takes."""
        image = self.images()
        expected = self.run(image)[self.output]
        run = session(model.SerializeToString(), optimise=False)
        fed = np.ascontiguousarray(image[:, ::-1]) if bgr else image
        try:
            scores = run.run(None, {model.graph.input[0].name: fed})[0]
        except Exception as error:
            raise DeployError(f"{self.name}, brought into [N,C,H,W], does not run: {one_line(error)[:300]}") from error
        tolerance = SAME_HALF if self.half else SAME
        if not cut.agrees(expected, scores[:1], tolerance, self.size):
            raise DeployError(
                f"{self.name}, brought into [N,C,H,W], does not give what it gave at {self.size[0]}×{self.size[1]}; "
                "please report the model"
            )


def _layout(
    shape: Sequence[int | str | None], seen: Channels | None, image: str, name: str, notes: list[str]
) -> tuple[int, int]:
    """(axis of the channels, how many) of an input of this shape, whose first operators were `seen`."""
    if seen is not None and seen.axis in (1, 3):
        declared = shape[seen.axis]
        count = declared if isinstance(declared, int) else seen.count
        if seen.count is not None and count != seen.count:
            raise DeployError(
                f"{name}: input {image} is declared as {list(shape)}, and node {label(seen.node)} reads {seen.count} "
                f"channels on axis {seen.axis}"
            )
        if count is None:
            raise DeployError(f"{name} takes images of {declared} channels, which is no fixed number; export it again")
        return seen.axis, count
    if seen is not None:
        raise DeployError(f"{name}: node {label(seen.node)} reads axis {seen.axis} of input {image} as its channels")
    first, last = shape[1], shape[3]
    if isinstance(first, int) and (not isinstance(last, int) or last > 4 or first <= 4):
        return 1, first
    if isinstance(last, int):
        notes.append(f"{name}: no operator tells where its {last} channels are; they are taken for the last axis")
        return 3, last
    raise DeployError(f"{name} takes images of {first} channels, which is no fixed number; export it again")


def _follows(shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int, float] | None:
    """(axis of H, axis of W, factor) of an output of this shape, whose cells are `factor` pixels; None: it has none."""
    places = {4: ((2, 3), (1, 2)), 3: ((1, 2), (0, 1)), 2: ((0, 1),)}.get(len(shape), ())
    for rows, columns in places:
        height, width = shape[rows], shape[columns]
        if min(height, width) < 1:
            continue
        factor = max(1, round(size[0] / height))
        if all(
            side in (-(-whole // factor), whole // factor) for side, whole in zip((height, width), size, strict=True)
        ):
            return rows, columns, factor
    return None


def _no_scores(model: ModelProto, results: Mapping[str, np.ndarray]) -> str:
    """Why none of these outputs can be scores of an image's pixels."""
    shapes = ", ".join(f"{name} {list(result.shape)}" for name, result in results.items())
    detector = next((node for node in model.graph.node if node.op_type == "NonMaxSuppression"), None)
    if detector is not None:
        return f"gives {shapes}, found by node {label(detector)}: boxes, not a score per pixel"
    if all(result.ndim <= 2 for result in results.values()):
        return (
            f"gives {shapes}: a classifier's scores, not one per pixel; a segmentation network gives scores [N,K,H,W] "
            "(a classifier's dense layer after Flatten becomes a convolution by fcn.convolutionalize)"
        )
    return (
        f"labels no images of changing size: it gives {shapes} whatever the size. A segmentation network gives scores "
        "[N,K,H,W]; usual causes are boxes instead of scores, or interpolate(size=<int>)"
    )


@dataclass(frozen=True)
class _Cut:
    """What the original's output was, and how it is told from the standard form's scores.

    Attributes:
        decision: that was cut off; None where it gave scores.
        background: it gave the second of two channels alone.
        argmax: labels alone are the same.
    """

    decision: Decision | None = None
    background: bool = False
    argmax: bool = False

    def agrees(self, expected: np.ndarray, scores: np.ndarray, tolerance: float, size: tuple[int, int]) -> bool:
        """Whether what the original gave is what these scores, [1,K,h,w], say."""
        rows, columns, _ = _follows(expected.shape, size)
        if (expected.shape[rows], expected.shape[columns]) != scores.shape[2:]:
            return False
        # [K, h, w]: K axes are before or behind, and of one but for one.
        planes = np.moveaxis(expected, (rows, columns), (-2, -1)).reshape(-1, *scores.shape[2:])
        spread = float(np.ptp(scores)) or 1.0
        close = MARGIN if tolerance == SAME else tolerance
        if self.decision is not None and self.decision.kind == "threshold":
            clear = np.abs(scores[0] - self.decision.threshold) > close * spread
            return (
                planes.shape == scores[0].shape
                and not ((planes > 0) != (scores[0] > self.decision.threshold))[clear].any()
            )
        if self.decision is not None or self.argmax:
            best = np.sort(scores[0], axis=0)[-2:]
            clear = best[1] - best[0] > close * spread if len(best) > 1 else np.ones(scores.shape[2:], bool)
            labels = planes[0] if self.decision is not None else planes.argmax(0)
            return not (labels != scores[0].argmax(0))[clear].any()
        wanted = scores[0][1:2] if self.background else scores[0]
        if planes.shape != wanted.shape or not np.isfinite(planes).all():
            return False
        spread = float(np.ptp(planes)) or 1.0
        # A Sigmoid rounds values near 0 as coarsely as those near 1.
        return float(np.abs(planes - wanted).max()) <= tolerance * spread + 4 * np.finfo(np.float32).eps


def _standard(original: _Original, options: SourceOptions, notes: list[str]) -> tuple[ModelProto, _Cut]:
    """The model as float32 [N,C,H,W] → scores [N,K,h,w], and what its output was before."""
    name = original.name
    model = clone(original.model)
    kept = next(value for value in model.graph.output if value.name == original.output)
    model.graph.output.insert(0, kept)
    del model.graph.output[1:]
    prune(model)
    if found := other_floats(model):
        notes.append(f"{name} is of {' and '.join(found)}; it is run in float32 (--fp16 makes an engine of float16)")
    try:
        model = raise_opset(as_float32(model))
    except DeployError as error:
        raise DeployError(f"{name}: {error}") from error
    if opset(original.model) < opset(model):
        notes.append(f"{name} is of opset {opset(original.model)}; it is converted to {opset(model)}")
    model = image_input(fold_constants(model), original.axis)
    try:
        model, decision = cut_decision(model)
    except DeployError as error:
        raise DeployError(f"{name}: {error}") from error
    if decision is None and original.result.dtype.kind in "iub" and original.result.ndim < 4:
        node = producers(model)[model.graph.output[0].name]
        raise DeployError(
            f"{name} gives labels of {original.result.dtype} by node {label(node)}, from which no scores can be told; "
            "export it without what makes labels of scores"
        )
    if decision is not None:
        notes.append(f"{name} gives labels; they are taken off with node {decision.node}, and its scores are used")
    image = original.images()
    model, coarse = _channelwise_softmax(model, image)
    if coarse:
        notes.append(
            f"{name}: the Softmax at its end is over the whole image, as its opset says; it is taken over the "
            "channels, which changes no label"
        )
    background = False
    if options.activation in (None, "softmax") and options.threshold is None:
        threshold = 0.5 if decision is None else decision.threshold
        if threshold == 0.5:
            model, background = _with_background(model, image)
    if background:
        notes.append(f"{name} gives the second of two channels after its Softmax; both are used, as two classes")
        decision = None if decision is None else replace(decision, threshold=0.5)
    model = cancel_transposes(_four_axes(model, original, image))
    _declare(model, original)
    if background and decision is not None:
        return model, _Cut(Decision("argmax", decision.node))
    return model, _Cut(decision, background, coarse)


def _shapes(model: ModelProto, names: Sequence[str], image: np.ndarray) -> dict[str, np.ndarray]:
    """What some tensors of a model are for an image."""
    probed = clone(model)
    del probed.graph.output[:]
    probed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names))
    # ONNX Runtime finds the types of outputs by itself.
    run = session(probed.SerializeToString(), optimise=False)
    return dict(zip(dict.fromkeys(names), run.run(None, {model.graph.input[0].name: image}), strict=True))


def _set_output(model: ModelProto, name: str) -> None:
    output = model.graph.output[0]
    output.CopyFrom(onnx.ValueInfoProto(name=name))
    output.type.tensor_type.elem_type = TensorProto.FLOAT
    prune(model)


ORDER_KEEPING = ("Identity", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Cast")


def _channelwise_softmax(model: ModelProto, image: np.ndarray) -> tuple[ModelProto, bool]:
    """A Softmax at the end over C·H·W, as opset 12 and older have it by default, over C instead."""
    made, name = producers(model), model.graph.output[0].name
    while (node := made.get(name)) is not None and node.op_type in ("Identity", "Transpose", "Cast"):
        name = node.input[0]
    softmax = made.get(node.input[0]) if node is not None and node.op_type == "Reshape" else None
    flatten = made.get(softmax.input[0]) if softmax is not None and softmax.op_type == "Softmax" else None
    if flatten is None or flatten.op_type != "Flatten" or attributes(flatten).get("axis", 1) != 1:
        return model, False
    values = _shapes(model, [flatten.input[0], node.output[0]], image)
    before, after = values[flatten.input[0]], values[node.output[0]]
    if before.ndim != 4 or before.shape != after.shape or before.shape[1] < 2:
        return model, False
    model = clone(model)
    node = producers(model)[node.output[0]]
    node.CopyFrom(helper.make_node("Softmax", [flatten.input[0]], [node.output[0]], name=softmax.name, axis=1))
    prune(model)
    return model, True


def _with_background(model: ModelProto, image: np.ndarray) -> tuple[ModelProto, bool]:
    """The Softmax of two channels as output, where a model gives its second channel alone."""
    made, name = producers(model), model.graph.output[0].name
    while (node := made.get(name)) is not None and node.op_type in (*ORDER_KEEPING, "Transpose"):
        name = node.input[0]
    if node is None or (axis := _takes_second(model, node, name)) is None:
        return model, False
    softmax = made.get(node.input[0])
    if softmax is None or softmax.op_type != "Softmax":
        return model, False
    value = _shapes(model, [softmax.output[0]], image)[softmax.output[0]]
    if value.ndim != 4 or value.shape[axis] != 2 or attributes(softmax).get("axis", -1) % 4 != axis % 4:
        return model, False
    model = clone(model)
    _set_output(model, softmax.output[0])
    return model, True


def _takes_second(model: ModelProto, node: NodeProto, result: str) -> int | None:
    """The axis along which a node takes index 1 alone; None where it does something else."""
    found = attributes(node)
    if node.op_type == "Gather":
        index = constant(model, node.input[1])
        return found.get("axis", 0) if index is not None and index.size == 1 and int(index.item()) in (1, -1) else None
    if node.op_type == "Slice" and len(node.input) > 3:
        values = [constant(model, name) for name in node.input[1:] if name]
        if all(value is not None and value.size == 1 for value in values):
            start, end, axis, *step = (int(value.item()) for value in values)
            return axis if start in (1, -1) and (end >= 2) and step in ([], [1]) else None
    if node.op_type == "Split" and list(node.output).index(result) == 1:
        return found.get("axis", 0)
    return None


def _four_axes(model: ModelProto, original: _Original, image: np.ndarray) -> ModelProto:
    """The model with scores [N,K,h,w], where they lack an axis or have the channels last."""
    made, names = producers(model), [model.graph.output[0].name]
    while (node := made.get(names[-1])) is not None and node.op_type in ORDER_KEEPING:
        names.append(node.input[0])
    values = _shapes(model, names, image)
    result = values[names[0]]
    follows = _follows(result.shape, original.size)
    if follows is None:
        raise DeployError(f"{original.name}: scores are {list(result.shape)}, which does not follow the image's size")
    model = clone(model)
    if result.ndim == 4 and follows[:2] == (2, 3):
        return model
    # Before axes were taken away, or one channel was put elsewhere, there was a tensor of four.
    for name in names[1:]:
        before = values[name]
        if (
            before.ndim == 4
            and (found := _follows(before.shape, original.size)) is not None
            and found[:2] == (2, 3)
            and before.dtype.kind == "f"
            and np.array_equal(before.ravel(), result.ravel())
        ):
            _set_output(model, name)
            return model
    steps: list[tuple[str, dict]] = []
    if result.ndim == 2:
        steps = [("Unsqueeze", {"axes": [0, 1]})]
    elif result.ndim == 3 and follows[:2] == (1, 2):
        steps = [("Unsqueeze", {"axes": [1 if len(result) == len(image) else 0]})]
    elif result.ndim == 3:
        steps = [("Unsqueeze", {"axes": [0]}), ("Transpose", {"perm": [0, 3, 1, 2]})]
    else:
        steps = [("Transpose", {"perm": [0, 3, 1, 2]})]
    new, name = Names(model), names[0]
    for operator, extra in steps:
        out, reads = new(f"{name}/{operator.lower()}"), [name]
        if "axes" in extra:
            reads.append(new(f"{out}/axes"))
            add_constants(model, {reads[1]: np.array(extra.pop("axes"), np.int64)})
        model.graph.node.append(helper.make_node(operator, reads, [out], name=out, **extra))
        name = out
    _set_output(model, name)
    return model


def _declare(model: ModelProto, original: _Original) -> None:
    """Name the dimensions of a model's input and output, and make its scores float32."""
    image, output = model.graph.input[0], model.graph.output[0]
    scores = _shapes(model, [output.name], original.images())[output.name]
    if scores.dtype != np.float32:
        name = Names(model)(f"{output.name}/float32")
        model.graph.node.append(helper.make_node("Cast", [output.name], [name], name=name, to=TensorProto.FLOAT))
        output.name = name
    set_shape(image, ["N", original.channels, "H", "W"])
    cells = ["H", "W"] if scores.shape[2:] == original.size else ["h", "w"]
    set_shape(output, ["N", scores.shape[1], *cells])
    del model.graph.value_info[:]


def _any_size(
    model: ModelProto, original: _Original, cut: _Cut, options: SourceOptions, notes: list[str]
) -> tuple[ModelProto, SizeBehaviour, str]:
    """The model made to take every size, the sizes that it takes by itself, and how it was made to."""
    name = original.name
    if original.static:
        model = _freed(model, original, notes)
    original.compare(model, cut, options.bgr)
    try:
        sizes = _probed(model, original)
    except DeployError:
        if original.static:
            raise
        # Its dimensions promised more than it holds.
        model = _freed(model, original, notes)
        original.compare(model, cut, options.bgr)
        sizes = _probed(model, original)
    if not _takes_batches(model, original):
        notes.append(f"{name} gives other scores to images in a batch than alone, so they are run one at a time")
    fit = choose_fit(model, sizes, options.fit)
    model, said = fit_sizes(model, sizes, name, options.fit)
    notes += said
    return model, sizes, fit


def _takes_batches(model: ModelProto, original: _Original) -> bool:
    """Whether two images at once have the scores that they have alone."""
    run, name = session(model.SerializeToString()), model.graph.input[0].name
    images = original.images(count=2)
    alone = np.concatenate([run.run(None, {name: images[i : i + 1]})[0] for i in range(2)])
    try:
        together = run.run(None, {name: images})[0]
    except Exception:  # a batch of one that is baked in
        return False
    return together.shape == alone.shape and np.abs(together - alone).max() <= SAME * max(float(np.ptp(alone)), 1e-6)


def _freed(model: ModelProto, original: _Original, notes: list[str]) -> ModelProto:
    """The model with its batch, height and width free, from one that may have them as numbers."""
    model, image = clone(model), model.graph.input[0]
    sides = [side or letter for side, letter in zip(original.declared, "HW", strict=True)]
    set_shape(model.graph.input[0], [original.batch or "N", original.channels, *sides])
    try:
        model, changes = free_sizes(model)
    except DeployError as error:
        raise DeployError(f"{original.name}: {error}") from error
    notes += [f"{original.name}: {change}" for change in changes]
    set_shape(model.graph.input[0], dims(image))
    set_shape(model.graph.output[0], ["N", dims(model.graph.output[0])[1], "H", "W"])
    return model


def _probed(model: ModelProto, original: _Original) -> SizeBehaviour:
    """What sizes a model takes, by running it."""
    run = session(model.SerializeToString())
    return probe(lambda height, width: run_quietly(run, original.images((height, width)))[0], original.name)


def _card(
    model: ModelProto, scores: int, original: _Original, cut: _Cut, options: SourceOptions, notes: list[str]
) -> tuple[ModelProto, ModelCard]:
    threshold = cut.decision.threshold if cut.decision is not None and cut.decision.kind == "threshold" else None
    return card_of(model, original.channels, scores, options, original.name, notes, original.kind, threshold)


def card_of(
    model: ModelProto,
    channels: int,
    scores: int,
    options: SourceOptions,
    name: str,
    notes: list[str],
    kind: int = TensorProto.FLOAT,
    threshold: float | None = None,
) -> tuple[ModelProto, ModelCard]:
    """The card of a model that carries none, from what the user said, what its graph tells and what is usual.

    Args:
        model: float32 [N,C,H,W] → scores [N,K,H,W].
        channels, scores: C and K.
        options: what the user said; its `bgr` was done already.
        name: of the model.
        notes: gets what was found and assumed.
        kind: type of the input as the model was given.
        threshold: that it compared its scores with; None: with none.

    Returns:
        (the model, with logits where its masks need them; the card).
    """
    said = dict(options.card or {})
    probability = ends_in_sigmoid(model)
    card = assumed_card(channels, scores, name, "probability" if probability else "sigmoid")
    known = {"dtype": IMAGE_TYPES.get(kind, "uint8")}
    if (found := _normalisation(model, channels, kind in WHOLE)) is not None:
        known["mean"], known["std"], reason = found
        if not {"mean", "std"} & set(said) and not {"input-mean", "input-std", "scale"} & set(options.given()):
            notes.append(f"{name} {reason}")
    for field in ("mean", "std"):
        if isinstance(said.get(field), int | float):
            said[field] = [said[field]] * channels
    if options.mean is not None or options.std is not None or options.scale is not None:
        said |= _stated_normalisation(options, channels)
    # Who says one of the two means the other to change nothing.
    if "mean" in said or "std" in said:
        said = {"mean": [0.0] * channels, "std": [1.0] * channels} | said
    for field in ("classes", "activation", "threshold"):
        if (value := getattr(options, field)) is not None:
            said[field] = value
    activation = said.get(
        "activation", card.activation if scores == 1 else "softmax" if threshold is None else "multilabel"
    )
    _check_activation(activation, scores, probability, name)
    if threshold is not None and "threshold" not in said:
        logits = activation in ("sigmoid", "multilabel") and not probability
        known["threshold"] = 1 / (1 + math.exp(-threshold)) if logits else threshold
        notes.append(
            f"{name} compares its scores with {threshold:g}, which is the card's threshold: {known['threshold']:g}"
        )
    if activation == "multilabel" and probability:
        model = _logits(model)
    elif "activation" not in said and probability and scores > 1:
        notes.append(
            f"{name}: each of its {scores} scores ends in a Sigmoid; labels are by argmax all the same (--activation "
            "multilabel gives a mask per class)"
        )
    if "threshold" in said and activation == "softmax":
        raise MisuseError(
            f"a threshold is for one score or for masks, and {name} has {scores} scores, labelled by argmax"
        )
    count = 2 if activation in ("sigmoid", "probability") else scores
    if len(said.get("classes", range(count))) != count:
        raise MisuseError(f"{len(said['classes'])} classes are named, and {name} has {count}")
    known["classes"] = tuple(f"class {index}" for index in range(count))
    if "channels" in said and said["channels"] != channels:
        raise MisuseError(f"the card file says {said['channels']} channels, and {name} takes {channels}")
    try:
        made = {item.name: getattr(card, item.name) for item in fields(card) if item.name != "colors"}
        card = ModelCard(**(made | {"activation": activation} | known | said))
    except (ValueError, TypeError) as error:
        raise MisuseError(f"the model card would have {error}") from error
    if assumed := _assumed(card, said, known):
        notes.append(f"{name} carries no model card; assuming {', '.join(assumed)}")
    return model, card


def _stated_normalisation(options: SourceOptions, channels: int) -> dict[str, list[float]]:
    """The card's mean and std, of the image as it is, from those of the image times the scale."""
    scale, result = options.scale or 1.0, {}
    for field, neutral in (("mean", 0.0), ("std", 1.0)):
        values = getattr(options, field) or (neutral,)
        values = values * channels if len(values) == 1 else values
        if len(values) != channels:
            raise MisuseError(f"--input-{field} has {len(values)} numbers, and the model takes {channels} channels")
        # In the order of the model's channels, and the card's is that of the image's.
        result[field] = [value / scale for value in (reversed(values) if options.bgr else values)]
    return result


def _check_activation(activation: str, scores: int, probability: bool, name: str) -> None:
    """Raise MisuseError where an activation that was said does not fit the model."""
    if activation not in ACTIVATIONS:
        raise MisuseError(f"activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if activation in ("sigmoid", "probability") and scores != 1:
        raise MisuseError(
            f"activation {activation} is for one score, and {name} has {scores}; say softmax or multilabel"
        )
    if activation == "softmax" and scores == 1:
        raise MisuseError(
            f"activation softmax needs two scores or more, and {name} has one; say sigmoid or probability"
        )
    if activation == "sigmoid" and probability:
        raise MisuseError(f"activation sigmoid takes logits, and {name} ends in a Sigmoid; say probability")


def _assumed(card: ModelCard, said: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """What of a card was neither said nor found in the graph, in words."""
    parts = []
    if "dtype" not in said:
        parts.append(f"{card.channels}-channel {card.dtype} images{' (RGB)' if card.channels == 3 else ''}")
    if "mean" not in said and "mean" not in known:
        mean, std = ([round(value, 2) for value in values] for values in (card.mean, card.std))
        parts.append(f"mean {mean}, std {std}")
    if "classes" not in said:
        parts.append(f"{len(card.classes)} unnamed classes")
    if "activation" not in said:
        parts.append(_DECISIONS[card.activation])
    return parts


_DECISIONS = {
    "softmax": "labels by argmax",
    "sigmoid": "labels by its one score, a logit",
    "probability": "labels by its one score, a probability",
    "multilabel": "a mask for each of its scores",
    "none": "values",
}


def _logits(model: ModelProto) -> ModelProto:
    """The model with logits as scores instead of their sigmoids."""
    model = clone(model)
    made, output = producers(model), model.graph.output[0]
    shape, node = dims(output), made[output.name]
    if node.op_type == "Sigmoid":
        name = node.input[0]
    else:  # the Sigmoid is before the upsampling: what was interpolated is turned back
        names = Names(model)
        steps = (("Clip", ["least", "most"]), ("Sub", None), ("Div", None), ("Log", None))
        one, least, most = (names(f"logits/{each}") for each in ("one", "least", "most"))
        eps = np.float32(1e-7)
        add_constants(model, {one: np.float32(1), least: eps, most: np.float32(1) - eps})
        kept, rest, odds, name = (names(f"logits/{operator.lower()}") for operator, _ in steps)
        for operator, reads, result in (
            ("Clip", [output.name, least, most], kept),
            ("Sub", [one, kept], rest),
            ("Div", [kept, rest], odds),
            ("Log", [odds], name),
        ):
            model.graph.node.append(helper.make_node(operator, reads, [result], name=result))
    output.name = name
    set_shape(output, shape)
    prune(model)
    return model


def _normalisation(
    model: ModelProto, channels: int, whole: bool
) -> tuple[tuple[float, ...], tuple[float, ...], str] | None:
    """(mean, std, why) of the images a model takes, where `whole` numbers or its first operators leave no doubt."""
    if whole:
        return (0.0,) * channels, (1.0,) * channels, "takes whole numbers: images go in as they are, mean 0 and std 1"
    slope, shift, last = _first_arithmetic(model, channels)
    if last is None:
        return None
    ends = np.array([shift, 255 * slope + shift, slope + shift])
    whole = np.abs(ends[:2]).max() <= 12 and np.abs(ends[1] - ends[0]).min() >= 0.5
    if whole or (np.all(slope == 1) and np.abs(shift).min() > 12):
        why = f"normalises 8-bit images by itself (node {label(last)}): they go in as they are, mean 0 and std 1"
        return (0.0,) * channels, (1.0,) * channels, why
    if np.abs(slope).min() > 1 and np.abs(ends[[0, 2]]).max() <= 12:
        why = f"normalises images in 0..1 by itself (node {label(last)}): they are divided by 255, mean 0 and std 255"
        return (0.0,) * channels, (255.0,) * channels, why
    return None


def _first_arithmetic(model: ModelProto, channels: int) -> tuple[np.ndarray, np.ndarray, NodeProto | None]:
    """slope, shift of the image per channel in a model's first operators, and the last of them; None: it has none."""
    slope, shift = np.ones(channels), np.zeros(channels)
    name, last = model.graph.input[0].name, None
    while True:
        readers = [node for node in consumers(model, name) if node.op_type != "Shape"]
        if len(readers) != 1:
            break
        node = readers[0]
        if node.op_type not in ("Identity", "Cast", "Mul", "Div", "Add", "Sub"):
            break
        if node.op_type not in ("Identity", "Cast"):
            value = constant(model, node.input[1 if node.input[0] == name else 0])
            if (
                value is None
                or value.size not in (1, channels)
                or (value.size > 1 and value.shape[-3:] != (channels, 1, 1))
            ):
                break
            value, reverse = value.reshape(-1).astype(np.float64), node.input[0] != name
            if reverse and node.op_type == "Div":
                break
            if node.op_type in ("Mul", "Div"):
                factor = value if node.op_type == "Mul" else 1 / value
                slope, shift = slope * factor, shift * factor
            elif node.op_type == "Add":
                shift = shift + value
            else:
                slope, shift = (-slope, value - shift) if reverse else (slope, shift - value)
            last = node
        name = node.output[0]
    return slope, shift, last

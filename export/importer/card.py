"""The model card of a foreign ONNX: what the user says, what the graph tells, and what is assumed and said aloud."""

import math
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.export.analysis.upsampling import ends_in_probability, ends_in_sigmoid
from fcn_deploy.export.graph.edit import attributes, constant, consumers, label
from fcn_deploy.export.importer.fit import FITS
from fcn_deploy.export.importer.foreign_model import IMAGE_TYPES, WHOLE
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.model_card import ACTIVATIONS, ModelCard, assumed_card
from onnx import ModelProto, NodeProto, TensorProto

# What a card file may say; the rest of a card is found by running the model.
CARD_FIELDS = ("classes", "colors", "channels", "dtype", "mean", "std", "activation", "threshold")


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
            raise MisuseError(f"--input-scale {self.scale}; it must be a number above 0, such as 0.00392157 for 1/255")
        if self.fit is not None and self.fit not in FITS:
            raise MisuseError(f"--fit {self.fit}; choose one of {', '.join(FITS)}")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise MisuseError(f"--activation {self.activation}; choose one of {', '.join(ACTIVATIONS)}")
        if twice := [name for name in self.given() if name.removeprefix("input-") in (self.card or {})]:
            raise MisuseError(f"--{twice[0]} is in the card file too; say it once")
        if self.scale is not None and {"mean", "std"} & set(self.card or {}):
            raise MisuseError(
                "--input-scale goes with --input-mean and --input-std; a card file's are of the image as it is"
            )

    def given(self) -> list[str]:
        """The options that say what a card says, as they are written."""
        names = {"mean": "input-mean", "std": "input-std", "scale": "input-scale"}
        kept = ("mean", "std", "scale", "bgr", "classes", "activation", "threshold")
        return [names.get(name, name) for name in kept if getattr(self, name) not in (None, False)]


def read_card_file(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of a TOML card file. Raises MisuseError."""
    try:
        with Path(path).open("rb") as file:
            data = tomllib.load(file)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        raise MisuseError(f"--card {path}: {said}; write TOML: docs/reference/formats.md") from error
    if unknown := [key for key in data if key not in CARD_FIELDS]:
        raise MisuseError(f"--card {path} has {unknown[0]!r}; a card file may have {', '.join(CARD_FIELDS)}")
    return data


def card_of(
    model: ModelProto,
    channels: int,
    scores: int,
    options: SourceOptions,
    name: str,
    notes: list[str],
    kind: int = TensorProto.FLOAT,
    threshold: float | None = None,
    span: tuple[float, float] | None = None,
) -> ModelCard:
    """The card of a model that carries none, from what the user said, what its graph tells and what is usual.

    Args:
        model: float32 [N,C,H,W] → scores [N,K,H,W].
        channels, scores: C and K.
        options: what the user said; its `bgr` was done already.
        name: of the model.
        notes: gets what was found and assumed.
        kind: type of the input as the model was given.
        threshold: that it compared its scores with; None: with none.
        span: the least and the largest of its scores for an image of noise; None: not known.

    Raises:
        MisuseError: what was said does not fit the model.
    """
    said = dict(options.card or {})
    probability = ends_in_sigmoid(model) or (scores == 1 and ends_in_probability(model))
    bounded = not probability and scores == 1 and threshold is None and span is not None and 0 <= span[0] < span[1] <= 1
    card = assumed_card(channels, scores, name, "probability" if probability or bounded else "sigmoid")
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
    if activation == "multilabel" and scores > 1 and not probability and ends_in_probability(model):
        raise MisuseError(
            f"activation multilabel takes each class by its own sigmoid, and {name} ends in a Softmax over all of "
            "them; say softmax"
        )
    if "activation" not in said and bounded:
        notes.append(
            f"{name} gave scores from {span[0]:.2g} to {span[1]:.2g} for noise: its one score is taken for a "
            "probability (--activation sigmoid: a logit)"
        )
    elif "activation" not in said and activation == "sigmoid" and threshold is None and span and span[0] >= 0:
        notes.append(
            f"{name} gave scores from {span[0]:.2g} to {span[1]:.2g} for noise, which a logit, cut at 0, would call "
            "class 1 everywhere; say what its one score is by --activation (none: values)"
        )
    if threshold is not None and "threshold" not in said:
        logits = activation in ("sigmoid", "multilabel") and not probability
        known["threshold"] = 1 / (1 + math.exp(-threshold)) if logits else threshold
        notes.append(
            f"{name} compares its scores with {threshold:g}, which is the card's threshold: {known['threshold']:g}"
        )
    if "activation" not in said and probability and scores > 1 and activation == "softmax":
        notes.append(
            f"{name}: each of its {scores} scores ends in a Sigmoid; labels are by argmax all the same, and "
            "probabilities are a softmax's (--activation multilabel gives each class its own, and masks)"
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
    return card


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
        if node.op_type == "Gather" and last is None and attributes(node).get("axis", 0) == 1:
            name = node.output[0]  # of channels that are reversed before anything else
            continue
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

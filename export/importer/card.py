"""The model card of a foreign model: what the user says, what the model tells, and what is assumed and said aloud."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fcn_deploy.export.analysis.model_end import ends_in_probability, ends_in_sigmoid, last_activation
from fcn_deploy.export.graph.edit import set_metadata
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.importer.exporter_metadata import told_by_exporter
from fcn_deploy.export.importer.foreign_model import IMAGE_TYPES, WHOLE_NUMBERS
from fcn_deploy.export.importer.normalisation import find_normalisation
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.runtime.engine_format.model_card import ACTIVATED_KEY, ACTIVATIONS, CARD_KEY, ModelCard, assumed_card
from fcn_deploy.runtime.errors import MisuseError
from onnx import ModelProto, TensorProto

DROPPING = ("onnx.utils.extract_model",)  # producers that write no metadata; onnx-graphsurgeon keeps the old name


LIKE_FLOWS = 3  # maps: of two flows and a probability, as networks of cells have them


@dataclass(frozen=True)
class CardEvidence:
    """What was seen of a model that carries no card.

    Attributes:
        channels, scores: C of its images and K of its scores.
        input_type: of its input, as the foreign model has it: a number of TensorProto.
        threshold: that it compared its scores with; None: with none.
        score_range: the least and the largest of its scores for an image of noise; None: not known.
        producer: what wrote its file, as that says.
        labels: whether it made labels of its scores itself.
        metadata: of its file; None: it has none.
    """

    channels: int
    scores: int
    input_type: int = TensorProto.FLOAT
    threshold: float | None = None
    score_range: tuple[float, float] | None = None
    producer: str = ""
    labels: bool = False
    metadata: Mapping[str, str] | None = None


def card_of(
    model: ModelProto, evidence: CardEvidence, options: ImportOptions, name: str
) -> tuple[ModelCard, list[str]]:
    """The card of a model that carries none, and what was found and assumed, a line each.

    Args:
        model: float32 [N,C,H,W] → scores [N,K,H,W].
        evidence: what was seen of it.
        options: what the user said; its `bgr` was done already.
        name: of the model.

    Raises:
        MisuseError: what was said does not fit the model.
    """
    notes: list[str] = []
    said = _said(options, evidence.channels)
    found: dict[str, Any] = {"dtype": IMAGE_TYPES.get(evidence.input_type, "uint8")}
    normalisation = find_normalisation(model, evidence.channels, evidence.input_type in WHOLE_NUMBERS)
    if normalisation is not None:
        found |= {"mean": normalisation.mean, "std": normalisation.std}
        if not {"mean", "std"} & set(said):
            notes.append(f"{name} {normalisation.reason}")
    default, activation = _choose_activation(model, evidence, said, name, notes)
    probability = _gives_probability(model, evidence.scores)
    if evidence.threshold is not None and "threshold" not in said:
        logits = activation in ("sigmoid", "multilabel") and not probability
        found["threshold"] = 1 / (1 + math.exp(-evidence.threshold)) if logits else evidence.threshold
        notes.append(
            f"{name} compares its scores with {evidence.threshold:g}, which is the card's threshold: "
            f"{found['threshold']:g}"
        )
    count = _class_count(activation, evidence.scores)
    for told, why in told_by_exporter(evidence.metadata or {}, evidence.channels, count):
        if not set(told) & {*found, *said}:  # the graph knows better, and so does the user
            found |= told
            notes.append(f"{name} {why}")
    unnamed = tuple(f"class {index}" for index in range(count))
    _check_said(said, activation, evidence, name)
    try:
        assumed = {item.name: getattr(default, item.name) for item in fields(default) if item.name != "colors"}
        card = ModelCard(**(assumed | {"activation": activation, "classes": unnamed} | found | said))
    except (ValueError, TypeError) as error:
        raise MisuseError(f"the model card would have {error}") from error
    if guesses := _assumptions(card, said, found):
        dropped = ""
        if evidence.producer in DROPPING:
            dropped = f"; {evidence.producer}, which wrote it, drops metadata: look at the model before it"
        notes.append(f"{name} carries no model card; assuming {', '.join(guesses)}{dropped}")
    unsaid = not {"activation", "classes"} & set(said) and card.activation == "softmax" and not evidence.labels
    if unsaid and (like := _like_values(model, evidence.scores)):
        notes.append(
            f"{name} gives {like}, which are taken for scores of classes; flows with a probability, or normals, look "
            "the same: --activation none gives them as values"
        )
    return card, notes


def _like_values(model: ModelProto, scores: int) -> str:
    """What scores are, in words, where values of a vector are as often so; ""."""
    index, name = GraphIndex(model), model.graph.output[0].name
    if scores == LIKE_FLOWS and last_activation(index, name) is None:
        return "3 maps without a Softmax"
    last = index.before(name, ("Identity", "Resize", "Transpose", "Cast", "Slice"))
    if scores == 2 and last is not None and last.op_type in ("Mul", "Div"):
        numbers = [value for read in last.input if (value := index.constant(read)) is not None and value.size == 1]
        if numbers and float(abs(numbers[0].item())) not in (0.0, 1.0):
            return f"2 maps that are {'multiplied' if last.op_type == 'Mul' else 'divided'} by {numbers[0].item():g}"
    return ""


def store_card(model: ModelProto, card: ModelCard) -> None:
    """Put a card into a model's metadata, and whether its masks' Sigmoid is in the graph already."""
    set_metadata(model, CARD_KEY, card.to_json())
    if card.activation == "multilabel" and ends_in_sigmoid(model):
        set_metadata(model, ACTIVATED_KEY, "1")


def _said(options: ImportOptions, channels: int) -> dict[str, Any]:
    """The card's fields that the user stated, in the card file or by options."""
    said = dict(options.card or {})
    for field in ("mean", "std"):
        if isinstance(said.get(field), int | float):
            said[field] = [said[field]] * channels
    if options.mean is not None or options.std is not None or options.scale is not None:
        said |= _said_normalisation(options, channels)
    # Who says one of the two means the other to change nothing.
    if "mean" in said or "std" in said:
        said = {"mean": [0.0] * channels, "std": [1.0] * channels} | said
    for field in ("classes", "activation", "threshold"):
        if (value := getattr(options, field)) is not None:
            said[field] = value
    return said


def _said_normalisation(options: ImportOptions, channels: int) -> dict[str, list[float]]:
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


def _gives_probability(model: ModelProto, scores: int) -> bool:
    """Whether each score is a probability by itself, as the model's end tells."""
    return ends_in_sigmoid(model) or (scores == 1 and ends_in_probability(model))


def _choose_activation(
    model: ModelProto, evidence: CardEvidence, said: Mapping[str, Any], name: str, notes: list[str]
) -> tuple[ModelCard, str]:
    """(the card that is assumed of such a model, the activation); notes gets what was concluded of it."""
    scores, threshold, found = evidence.scores, evidence.threshold, evidence.score_range
    probability = _gives_probability(model, scores)
    unknown = not probability and scores == 1 and threshold is None and found is not None
    in_unit_range = unknown and found is not None and 0 <= found[0] < found[1] <= 1
    default = assumed_card(
        evidence.channels, scores, name, "probability" if probability or in_unit_range else "sigmoid"
    )
    usual = default.activation if scores == 1 else "softmax" if threshold is None else "multilabel"
    activation = said.get("activation", usual)
    _check_activation(activation, scores, probability, name)
    if activation == "multilabel" and scores > 1 and not probability and ends_in_probability(model):
        raise MisuseError(
            f"activation multilabel takes each class by its own sigmoid, and {name} ends in a Softmax over all of "
            "them; say softmax"
        )
    if "activation" in said:
        return default, activation
    if found is not None and in_unit_range:
        notes.append(
            f"{name} gave scores from {found[0]:.2g} to {found[1]:.2g} for noise: its one score is taken for a "
            "probability (--activation sigmoid: a logit)"
        )
    elif found is not None and activation == "sigmoid" and threshold is None and not found[0] < 0 < found[1]:
        notes.append(
            f"{name} gave scores from {found[0]:.2g} to {found[1]:.2g} for noise, which a logit, cut at 0, would call "
            f"class {int(found[0] >= 0)} everywhere; say what its one score is by --activation (none: values), or "
            "where it is cut by --threshold"
        )
    if probability and scores > 1 and activation == "softmax":
        notes.append(
            f"{name}: each of its {scores} scores ends in a Sigmoid; labels are by argmax all the same, and "
            "probabilities are a softmax's (--activation multilabel gives each class its own, and masks)"
        )
    return default, activation


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


def _class_count(activation: str, scores: int) -> int:
    """One score tells two classes apart."""
    return 2 if activation in ("sigmoid", "probability") else scores


def _check_said(said: Mapping[str, Any], activation: str, evidence: CardEvidence, name: str) -> None:
    """Raise MisuseError where a threshold, classes or channels that were said do not fit the model."""
    if "threshold" in said and activation == "softmax":
        raise MisuseError(
            f"a threshold is for one score or for masks, and {name} has {evidence.scores} scores, labelled by argmax"
        )
    count = _class_count(activation, evidence.scores)
    if "classes" in said and len(said["classes"]) != count:
        raise MisuseError(f"{len(said['classes'])} classes are named, and {name} has {count}")
    if "channels" in said and said["channels"] != evidence.channels:
        raise MisuseError(f"the card file says {said['channels']} channels, and {name} takes {evidence.channels}")


def _assumptions(card: ModelCard, said: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What of a card was neither said nor found in the graph, in words."""
    parts = []
    if "dtype" not in said:
        parts.append(f"{card.channels}-channel {card.dtype} images{' (RGB)' if card.channels == 3 else ''}")
    if "mean" not in said and "mean" not in found:
        mean, std = ([round(value, 2) for value in values] for values in (card.mean, card.std))
        parts.append(f"mean {mean}, std {std}")
    if "classes" not in said and "classes" not in found:
        parts.append(f"{len(card.classes)} unnamed classes")
    if "activation" not in said:
        parts.append(_LABELLING[card.activation])
    return parts


_LABELLING = {
    "softmax": "labels by argmax",
    "sigmoid": "labels by its one score, a logit",
    "probability": "labels by its one score, a probability",
    "multilabel": "a mask for each of its scores",
    "none": "values",
}

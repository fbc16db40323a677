"""A model.onnx opened as it is, without an engine: what it lacks is assumed and said aloud, or refused."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .arrays import Floats, Image
from .backends.host import HostBackend
from .backends.onnxruntime import OnnxRuntimeSession
from .engine_format.model_card import ACTIVATED_KEY, CARD_KEY, ModelCard, assumed_card, check_card
from .engine_format.stage import Stage, Upsampling
from .errors import DeployError, MisuseError

log = logging.getLogger(__name__)

ADD_UP = 1e-3  # how far the sum of a pixel's probabilities may be from one
WHOLE = Stage("", whole="a plain ONNX is not tiled; make an engine: build-engine")
DECISIONS = {
    "softmax": "labels by argmax",
    "sigmoid": "labels by its one score, a logit, above 0",
    "probability": "labels by its one score, a probability, above 0.5",
    "multilabel": "a mask for each score, a logit, where it is above 0",
    "none": "its values given as they are",
}


class OnnxModelBackend(HostBackend):
    """A model that takes each image at its own size, and must give a score for each of its pixels.

    Args:
        path: of the model: float32 [N, C, H, W] in, [N, K, H, W] out.
        threads: of one run; None: one per physical core.

    Attributes:
        card: in the model's metadata, or one assumed; its `size_multiple` and `smallest` are dropped.
        upsampling: none, after the model's own.

    Raises:
        DeployError: another interface, or a card that does not fit or cannot be assumed.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        session = OnnxRuntimeSession(path, threads=threads)
        assert session.session is not None, "just opened"
        said = session.session.get_modelmeta().custom_metadata_map
        self.path, self.card = path, _card(session, path)
        self.upsampling = Upsampling(activated=said.get(ACTIVATED_KEY) == "1")
        super().__init__([session], self.card, self.upsampling)

    def scores(self, images: Sequence[Image]) -> Floats:
        """As `Backend` says. Raises DeployError where they are not one per pixel."""
        try:
            scores = super().scores(images)
        except MisuseError:
            raise
        except DeployError as error:  # sizes noted inside a file are believed, though its ends may say others
            raise DeployError(
                f"{error}; {self.path} may hold sizes of one image: make an engine of it with build-engine, which "
                "frees them or names what holds them"
            ) from error
        found, wanted = scores.shape[2:], images[0].shape[:2]
        if found != wanted:
            raise DeployError(
                f"{self.path} gives {found[0]}×{found[1]} scores for an image of {wanted[0]}×{wanted[1]}; a plain ONNX "
                "must give one per pixel: make an engine of it with build-engine"
            )
        return scores


def with_activation(upsampling: Upsampling, card: ModelCard, scores: Floats) -> Upsampling:
    """What tells whether a model's [K, H, W] scores are probabilities already.

    Of one that ends in its Softmax nothing else tells, but logits do not add up to one everywhere.
    """
    return replace(upsampling, activated=adds_up_to_one(scores)) if card.activation == "softmax" else upsampling


def adds_up_to_one(scores: Floats) -> bool:
    """Whether [K, h, w] scores are a distribution over K at every place."""
    return bool(scores.min() >= 0 and np.abs(scores.sum(0) - 1).max() < ADD_UP)


def _card(session: OnnxRuntimeSession, path: Path) -> ModelCard:
    """The card in a model's metadata, or one assumed and said aloud; checks the model's interface."""
    assert session.session is not None, "just opened"
    inputs, outputs = session.session.get_inputs(), session.session.get_outputs()
    shape, result = inputs[0].shape, outputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or len(result) != 4 or inputs[0].type != "tensor(float)":
        raise DeployError(
            f"{path} takes {inputs[0].type} {shape} and gives {result}; a segmentation model takes "
            "float32 [N,C,H,W] and gives [N,K,H,W]"
        )
    text = session.session.get_modelmeta().custom_metadata_map.get(CARD_KEY)
    if text is not None:
        card = ModelCard.from_json(text, str(path))
        check_card(card, shape[1], result[1], str(path))
        return replace(card, size_multiple=1, smallest=1, stride=1)
    if result[1] == 1:
        raise DeployError(
            f"{path} carries no model card, and whether its one score is a logit or a probability cannot be told "
            "from outside; make an engine of it with build-engine, which looks"
        )
    card = assumed_card(shape[1], result[1], str(path))
    log.warning("%s", _assumption(card, path))
    return card


def _assumption(card: ModelCard, path: Path) -> str:
    """One line that says aloud what was assumed."""
    mean, std = ([round(value, 2) for value in values] for values in (card.mean, card.std))
    return (
        f"{path} carries no model card; assuming {card.channels}-channel {card.dtype} images"
        f"{' (RGB)' if card.channels == 3 else ''}, mean {mean}, std {std}, {len(card.classes)} unnamed classes"
        f", {DECISIONS[card.activation]}"
    )

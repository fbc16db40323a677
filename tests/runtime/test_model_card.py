"""The model card: it survives JSON, and says what makes no sense."""

import json
import math
import re
from dataclasses import replace

import pytest
from fcn_deploy.runtime.engine_format.model_card import voc_palette
from tiny_engine import CARD

from fcn_deploy import DeployError, ModelCard


def test_a_card_survives_json_and_says_what_is_wrong():
    card = ModelCard(("a", "b", "c"), channels=4, dtype="uint16", mean=(1, 2, 3, 4), std=(1,) * 4)
    assert ModelCard.from_json(card.to_json(), "here") == card
    assert card.colors == voc_palette(3) and card.label_dtype == "uint8"
    with pytest.raises(ValueError, match="3 means"):
        ModelCard(("a", "b"), channels=4)
    with pytest.raises(ValueError, match="activation"):
        ModelCard(("a", "b"), activation="relu")
    with pytest.raises(ValueError, match="two classes"):
        ModelCard(("a", "b", "c"), activation="sigmoid")
    with pytest.raises(ValueError, match="smallest 0; it must be at least 1"):
        ModelCard(("a", "b"), smallest=0)
    with pytest.raises(ValueError, match=r"smallest 1\.5; it must be a whole number"):
        ModelCard(("a", "b"), smallest=1.5)
    for whole in (None, True, "two\nlines"):
        with pytest.raises(ValueError, match="the name of an operator"):
            ModelCard(("a", "b"), whole=whole)
    with pytest.raises(ValueError, match="finite"):
        ModelCard(("a",), mean=(float("nan"),) * 3)
    for values in ("123", (True, 1, 1), ("1", 1, 1)):
        with pytest.raises(ValueError, match="it is a list of numbers, one per channel"):
            ModelCard(("a",), mean=values)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"activation": "sigmoid", "threshold": 1}, "threshold 1; it must be a number between 0 and 1"),
        ({"activation": "probability", "threshold": "0.5"}, "threshold '0.5'; it must be a number"),
        ({"activation": "multilabel", "threshold": (0.5, 0.5, 0.5)}, "3 thresholds for 2 classes"),
        ({"activation": "multilabel", "threshold": (0.5, float("nan"))}, "threshold nan; it must be a number"),
        ({"activation": "multilabel", "threshold": ()}, "0 thresholds for 2 classes"),
        ({"activation": "sigmoid", "threshold": (0.5,)}, "only multilabel takes one per class"),
        ({"activation": "softmax", "threshold": None}, "threshold None; it must be a number"),
    ],
)
def test_a_card_of_thresholds_that_make_no_sense_is_one_line(words, said):
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        ModelCard(("a", "b"), **words)
    assert "\n" not in str(caught.value)


def test_cards_of_masks_and_of_values():
    card = ModelCard(("cat", "dog", "wet"), activation="multilabel", threshold=[0.5, 0.8, 0.2])
    assert ModelCard.from_json(card.to_json(), "here") == card
    assert card.scores == 3 and card.kind == "masks"
    assert card.score_thresholds == pytest.approx((0, math.log(4), -math.log(4)))
    assert ModelCard(("cat",), activation="multilabel", threshold=0.8).score_thresholds == pytest.approx((math.log(4),))
    depth = ModelCard(("depth",), activation="none", smallest=32, whole="GlobalAveragePool pool")
    assert ModelCard.from_json(depth.to_json(), "here") == depth and (depth.scores, depth.kind) == (1, "values")
    one = ModelCard(("no", "yes"), activation="probability", threshold=0.7)
    assert one.score_thresholds == (0.7,) and one.scores == 1 and one.kind == "labels"


def test_cards_of_earlier_versions_are_read_and_those_to_come_are_not():
    old = json.loads(CARD.to_json())
    assert old.pop("version") == 3
    for name in ("range", "alone"):
        del old[name]
    assert ModelCard.from_json(json.dumps({"version": 2} | old), "here") == CARD
    for name in ("smallest", "whole"):
        del old[name]
    assert ModelCard.from_json(json.dumps({"version": 1} | old), "here") == CARD
    for version in (4, 0, "2", True, None):
        with pytest.raises(DeployError, match=f"version {version}, and this release reads versions 1 to 3"):
            ModelCard.from_json(json.dumps({"version": version} | old), "here")


def test_the_range_of_a_card():
    for given, kept in (([0, 4095], (0, 4095)), ((-1.5, 2), (-1.5, 2)), ("percentile", "percentile"), (None, None)):
        card = replace(CARD, range=given)
        assert card.range == kept and ModelCard.from_json(card.to_json(), "here") == card
    for given in ((4095, 0), (3, 3), (0, math.inf), (math.nan, 1), (0, 1, 2), ("0", "1"), "0,1", 5, (True, 2)):
        with pytest.raises(ValueError, match="range"):
            replace(CARD, range=given)


def test_the_palette_is_pascal_vocs():
    assert voc_palette(4) == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert len(set(voc_palette(256))) == 256

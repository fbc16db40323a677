"""Masks as COCO's run lengths: what pycocotools writes and reads."""

import numpy as np
import pytest
from fcn_deploy.runtime.labelling import rle
from helpers import needs
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fcn_deploy import DeployError, MisuseError

SIDES = st.tuples(st.integers(1, 40), st.integers(1, 40))


def coco(mask):
    """As pycocotools encodes it."""
    found = needs("pycocotools.mask").encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


@settings(max_examples=60, deadline=None)
@given(arrays(bool, SIDES))
def test_masks_are_encoded_as_pycocotools_encodes_them(mask):
    encoded = rle.encode(mask)
    assert encoded == coco(mask)
    assert (rle.decode(encoded) == mask).all()
    assert rle.area(encoded) == mask.sum()


@pytest.mark.parametrize("kind", ["empty", "full", "one row", "one column", "noise", "large runs"])
def test_masks_of_every_shape(kind):
    mask = {
        "empty": np.zeros((7, 5), bool),
        "full": np.ones((7, 5), bool),
        "one row": np.arange(300)[None] % 3 == 0,
        "one column": np.arange(300)[:, None] % 7 < 3,
        "noise": np.random.default_rng(0).random((240, 321)) > 0.5,
        "large runs": np.add.outer(np.arange(3000), np.arange(2001)) > 2500,
    }[kind]
    encoded = rle.encode(mask)
    assert encoded == coco(mask)
    assert (rle.decode(encoded) == mask).all()
    assert (needs("pycocotools.mask").decode(encoded) == mask).all()


def test_a_map_is_encoded_at_once_as_class_by_class():
    labels = np.random.default_rng(1).integers(0, 4, (30, 47)).repeat(5, axis=1).astype(np.uint16) * 300
    encoded = rle.encode_labels(labels)
    assert list(encoded) == [0, 300, 600, 900]
    for label, found in encoded.items():
        assert found == rle.encode(labels, label) == coco(labels == label)
    assert rle.area(rle.encode(labels, 7)) == 0


def test_an_empty_image_has_a_mask_too():
    assert rle.decode(rle.encode(np.zeros((0, 4), bool))).shape == (0, 4)
    assert rle.encode_labels(np.zeros((0, 4), np.uint8)) == {}


def test_lengths_that_are_not_compressed_are_read():
    assert rle.decode({"size": [2, 2], "counts": [1, 2, 1]}).tolist() == [[False, True], [True, False]]
    assert rle.area({"size": [2, 2], "counts": [1, 2, 1]}) == 2


@pytest.mark.parametrize(
    "broken",
    [
        {"size": [2, 2], "counts": "3"},
        {"size": [2, 2], "counts": ""},
        {"size": [2, 2], "counts": "4~"},
        {"size": [2, 2], "counts": "4é"},
        {"size": [2, 2], "counts": "o" * 30 + "0"},
        {"size": [2, 2], "counts": "T"},
        {"size": [2, 2], "counts": None},
        {"size": [2, 2], "counts": [1, -1, 4]},
        {"size": [2, 2], "counts": [2**62, 2**62, 2**62, 2**62, 4]},
        {"size": [2, -2], "counts": [4]},
        {"size": [2], "counts": [2]},
        {"counts": [4]},
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(broken):
    with pytest.raises(DeployError, match=r"is it damaged\?") as error:
        rle.decode(broken)
    assert "\n" not in str(error.value)


def test_only_maps_are_encoded():
    with pytest.raises(MisuseError, match=r"shape \[2, 3, 4\]"):
        rle.encode(np.zeros((2, 3, 4), bool))

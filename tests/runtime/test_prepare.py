"""What the core sees is what PyTorch's normalisation and padding give."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.runtime.pixels.prepare import check_image, padded_size, prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_deploy import MisuseError, ModelCard

CARD = ModelCard(("a", "b"), stride=8, size_multiple=32)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 100), width=st.integers(1, 100))
def test_input_is_normalised_then_padded_with_zeros(height, width):
    image = np.random.default_rng(height * 101 + width).integers(0, 256, (height, width, 3), np.uint8)
    x = (torch.from_numpy(image).permute(2, 0, 1) - torch.tensor(CARD.mean)[:, None, None]) / torch.tensor(CARD.std)[
        :, None, None
    ]
    expected = F.pad(x, (0, -width % 32, 0, -height % 32))[None].numpy()
    buffer = np.full(3 * 128 * 128, np.nan, np.float32)  # what an earlier image left must not show
    result = prepare(image, CARD, buffer)
    assert result.shape == (1, 3, *padded_size(height, width, CARD)) and np.shares_memory(result, buffer)
    np.testing.assert_allclose(result, expected, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(side=st.integers(1, 300), multiple=st.integers(1, 40), smallest=st.integers(1, 100))
def test_images_are_padded_up_to_the_smallest_size_then_to_the_multiple(side, multiple, smallest):
    card = ModelCard(("a", "b"), size_multiple=multiple, smallest=smallest)
    padded, square = padded_size(side, side + 1, card), padded_size(smallest, smallest, card)[0]
    for found, real in zip(padded, (side, side + 1), strict=True):
        assert found % multiple == 0 and found >= max(real, smallest) and (found - real < multiple or found == square)


def test_what_is_below_the_smallest_size_is_padded_with_zeros():
    card = ModelCard(("a", "b"), size_multiple=8, smallest=20)
    image = np.full((5, 30, 3), 200, np.uint8)
    x = prepare(image, card, np.full(3 * 24 * 32, np.nan, np.float32))
    assert x.shape == (1, 3, 24, 32)
    assert (x[:, :, :5, :30] > 0).all() and not x[:, :, 5:].any() and not x[:, :, :, 30:].any()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_any_bands_and_dtypes_of_the_card(dtype, channels):
    card = ModelCard(("a", "b"), channels=channels, dtype=dtype, mean=range(channels), std=[3.0] * channels)
    low = -200 if dtype in ("int16", "float32") else 0
    image = np.random.default_rng(0).uniform(low, 200, (5, 7, channels)).astype(dtype)
    expected = (image.astype(np.float64) - np.arange(channels)) / 3
    np.testing.assert_allclose(prepare(image, card)[0], expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-4)


def test_grey_images_need_no_channel_axis():
    card = ModelCard(("a", "b"), channels=1, mean=(0,), std=(1,))
    assert check_image(np.zeros((4, 5), np.uint8), card).shape == (4, 5, 1)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 5, 4), np.uint8), "[height, width, 3]"),
        (np.zeros((4, 5), np.uint8), "[4, 5]"),
        (np.zeros((1, 4, 5, 3), np.uint8), "[1, 4, 5, 3]"),
        (np.zeros((4, 5, 3), np.float64), "float64"),
        (np.zeros((4, 5, 3), np.int8), "int8"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels"),
        (np.zeros((5, 0, 3), np.uint8), "no pixels"),
        ([[1, 2, 3]], "list"),
        (None, "NoneType"),
    ],
)
def test_arrays_that_the_card_does_not_allow_are_refused_by_name(image, said):
    with pytest.raises(MisuseError) as caught:
        check_image(image, CARD)
    assert said in str(caught.value) and "\n" not in str(caught.value)

"""Sizes as functions of the image's: what they change with, and how they are told."""

import pytest
from fcn_deploy.export.dynamic_shapes.sizes import (
    added,
    axis_of,
    changes_with,
    describe,
    fixed,
    is_fixed,
    multiplied,
    sample_sizes,
    scaled,
)
from hypothesis import given
from hypothesis import strategies as st

N, H, W = sample_sizes(1, 64, 96)
IMAGE = {"N": N, "H": H, "W": W}


def test_a_size_tells_what_it_changes_with():
    assert [changes_with(size) for size in (N, H, W, fixed(7))] == ["N", "H", "W", ""]
    assert changes_with(multiplied([H, W])) == "HW" and is_fixed(fixed(7)) and not is_fixed(H)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (fixed(24), "24"),
        (H, "H"),
        (scaled(H, 1, 8), "H/8"),
        (scaled(W, 3, 2), "3·W/2"),
        (multiplied([scaled(H, 1, 8), scaled(W, 1, 8)]), "H·W/64"),
        (added([H, fixed(2)]), "H+2"),
        (added([scaled(W, 1, 4), fixed(-1)]), "W/4-1"),
    ],
)
def test_a_size_in_words(size, text):
    assert describe(size, IMAGE) == text


@given(st.integers(1, 4), st.integers(1, 2048), st.integers(1, 2048))
def test_samples_tell_batch_height_and_width_apart(batch, height, width):
    sizes = sample_sizes(batch, height, width)
    assert [size[0] for size in sizes] == [batch, height, width]
    assert [changes_with(size) for size in sizes] == ["N", "H", "W"]
    assert len({multiplied(pair) for pair in zip(sizes, sizes[1:] + sizes[:1], strict=True)}) == 3


@given(st.integers(1, 12), st.integers(-2, 12))
def test_a_share_is_whole_for_every_sample_or_none(above, below):
    found = scaled(H, above, below)
    if found is None:
        assert below <= 0 or any(side * above % below for side in H)
    else:
        assert all(part * below == side * above for part, side in zip(found, H, strict=True))


def test_an_axis_of_one_has_no_factors():
    assert axis_of(fixed(1)) == () and axis_of(H) == (H,) and axis_of(N) == (N,)

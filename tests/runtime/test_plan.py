"""From sizes to runs: tiles that cover an image once, within a budget, at the least cost."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import ModelCard
from runtime.engine_file import Stage
from runtime.errors import OverBudgetError
from runtime.plan import cut, plan_run

CARD = ModelCard(("a", "b"), size_multiple=32)


@settings(max_examples=150, deadline=None)
@given(
    units=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    halo=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    unit=st.sampled_from([1, 8, 32]),
    share=st.floats(0.02, 1.2),
)
def test_tiles_cover_the_image_once_within_the_budget(units, halo, unit, share):
    padded, halo = tuple(n * unit for n in units), tuple(n * unit for n in halo)
    pixels = int(padded[0] * padded[1] * share)
    tiles = cut(padded, halo, unit, pixels)
    least = np.prod([min(side, unit + halo_) for side, halo_ in zip(padded, halo, strict=True)])
    if not tiles:
        # Only where a tile of one unit in the middle does not fit.
        assert np.prod([min(side, unit + 2 * h) for side, h in zip(padded, halo, strict=True)]) > pixels
        return
    assert pixels >= least
    seen = np.zeros(padded, np.uint8) if padded[0] * padded[1] < 4e5 else None
    for tile in tiles:
        top, left, bottom, right = tile.inner
        assert tile.pixels <= pixels and top % unit == left % unit == 0
        assert tile.outer == (
            max(top - halo[0], 0), max(left - halo[1], 0),
            min(bottom + halo[0], padded[0]), min(right + halo[1], padded[1]),
        )  # fmt: skip
        if seen is not None:
            seen[top:bottom, left:right] += 1
    assert seen is None or (seen == 1).all()


def test_no_other_even_cut_is_cheaper():
    padded, halo, unit = (640, 960), (64, 96), 32
    for pixels in (60_000, 120_000, 300_000):
        found = sum(tile.pixels for tile in cut(padded, halo, unit, pixels))
        costs = []
        for rows, columns in itertools.product(range(32, 641, 32), range(32, 961, 32)):
            outer = [
                (min(y + rows + 64, 640) - max(y - 64, 0)) * (min(x + columns + 96, 960) - max(x - 96, 0))
                for y in range(0, 640, rows)
                for x in range(0, 960, columns)
            ]
            if max(outer) <= pixels:
                costs.append(sum(outer))
        assert found <= min(costs) * 1.05


def test_an_image_that_fits_is_run_whole():
    plan = plan_run((700, 900), CARD, 100.0, 704 * 928 * 100, Stage("s", halo=(64, 64), period=32))
    assert plan.tiles == () and plan.padded == (704, 928) and plan.overhead == 1
    plan = plan_run((700, 900), CARD, 100.0, 704 * 928 * 100 - 1, Stage("s", halo=(64, 64), period=32))
    assert len(plan.tiles) > 1 and plan.overhead > 1 and plan.bytes < 704 * 928 * 100


def test_what_cannot_be_tiled_says_why():
    with pytest.raises(OverBudgetError, match=r"cannot be cut into tiles \(GlobalAveragePool\)"):
        plan_run((700, 900), CARD, 100.0, 1000, Stage("s", whole="GlobalAveragePool"))
    with pytest.raises(OverBudgetError, match=r"one tile with its halo takes 0.00 GB; raise it"):
        plan_run((700, 900), CARD, 100.0, 1000, Stage("s", halo=(64, 64), period=32))

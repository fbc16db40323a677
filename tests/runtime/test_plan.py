"""From sizes to runs: tiles that cover an image once, within a budget, at the least cost."""

import itertools

import numpy as np
import pytest
from fcn_deploy.runtime.engine_format.manifest import Profile
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.errors import OverBudgetError
from fcn_deploy.runtime.planning.grid import Grid
from fcn_deploy.runtime.planning.kept_rows import KeptRows
from fcn_deploy.runtime.planning.plan import Beside, plan_bands, plan_run
from fcn_deploy.runtime.planning.profiles import plan_profile
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fcn_deploy import ModelCard

CARD = ModelCard(("a", "b"), size_multiple=32)
HALO = {"halo": (64, 96), "period": 32}


@settings(max_examples=100, deadline=None)
@given(
    padded=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    tile=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    halo=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    least=st.sampled_from([1, 1, 7, 30, 100]),
    unit=st.integers(1, 5),
)
@example(padded=(25, 1), tile=(8, 8), halo=(8, 8), least=17, unit=8)
def test_tiles_cover_the_image_once_and_end_where_it_ends(padded, tile, halo, least, unit):
    if least > 1:  # as plans have them
        tile, halo = (tuple(-(-side // unit) * unit for side in sides) for sides in (tile, halo))
    grid = Grid(padded, tile, halo, least, unit)
    seen, computed = np.zeros(padded, int), 0
    for y, x in itertools.product(grid.spans(0), grid.spans(1)):
        seen[y.start : y.stop, x.start : x.stop] += 1
        computed += (y.outer_stop - y.outer_start) * (x.outer_stop - x.outer_start)
        for span, side, reach, len_ in zip((y, x), padded, halo, tile, strict=True):
            start, stop = max(span.start - reach, 0), min(span.start + len_ + reach, side)
            assert span.outer_start <= start and stop <= span.outer_stop <= side
            if stop - start >= least:
                assert (span.outer_start, span.outer_stop) == (start, stop)
            else:  # wider, on the grid
                assert span.outer_stop - span.outer_start >= min(least, side)
                assert span.outer_start % unit == 0 and (span.outer_stop % unit == 0 or span.outer_stop == side)
    for axis in (0, 1):  # what is above a tile's halo may be forgotten
        for before, after in itertools.pairwise(grid.spans(axis)):
            assert before.outer_start <= after.outer_start and before.outer_stop <= after.outer_stop
    assert (seen == 1).all() and grid.count == len(grid.spans(0)) * len(grid.spans(1))
    assert grid.overhead == pytest.approx(computed / seen.size)


def work(stages, grids):
    """What a plan minimises, but for the fixed cost of runs."""
    return sum(stage.cost * grid.overhead for stage, grid in zip(stages, grids, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
    share=st.floats(0.05, 1.2),
    deep=st.integers(0, 10),
    cost=st.floats(0.1, 10),
)
def test_plans_stay_within_the_budget(size, share, deep, cost):
    stages = (
        Stage("a", halo=(32, 32), period=32, bytes_per_pixel=100, output_bytes=2, cost=1),
        Stage("b", halo=(32 * deep,) * 2, period=32, bytes_per_pixel=20, output_bytes=0.5, cost=cost),
    )
    budget = int(size[0] * size[1] * 120 * share)
    try:
        plan = plan_run(size, CARD, stages, budget)
    except OverBudgetError:
        # Not where tiles of one unit would have fitted.
        least = (
            (96 * 96 * 100) + (32 + 64 * deep) ** 2 * 20 + (size[1] + 32) * (96 * 3 + 32 * 2 + (32 + 64 * deep) * 2.5)
        )
        assert budget < least * 1.1
        return
    assert plan.bytes <= budget and plan.overhead >= 1
    for stage, grid in zip(stages, plan.grids, strict=bool(plan.grids)):
        longest = [max(span.outer_stop - span.outer_start for span in grid.spans(axis)) for axis in (0, 1)]
        assert all(length % 32 == 0 for length in grid.tile) and grid.halo == stage.halo
        assert longest[0] * longest[1] * stage.bytes_per_pixel <= budget


def test_no_other_tiles_do_less_work():
    stage = Stage("s", **HALO, bytes_per_pixel=100)
    for budget in (7e6, 1.2e7, 3e7):
        plan = plan_run((640, 960), CARD, (stage,), int(budget))
        costs = []
        for tile in itertools.product(range(32, 641, 32), range(32, 961, 32)):
            grid = Grid((640, 960), tile, stage.halo)
            rows, columns = (max(s.outer_stop - s.outer_start for s in grid.spans(axis)) for axis in (0, 1))
            if rows * columns * (100 + 3) <= budget:
                costs.append(grid.overhead)
        assert plan.overhead <= min(costs) * 1.06


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 900), st.integers(1, 900)),
    smallest=st.integers(1, 400),
    halo=st.integers(0, 3),
    share=st.floats(0.02, 0.9),
)
def test_no_tile_of_any_stage_is_smaller_than_the_smallest_size(size, smallest, halo, share):
    card = ModelCard(("a", "b"), size_multiple=8, smallest=smallest)
    stages = (
        Stage("a", halo=(8 * halo, 8 * halo), period=16, bytes_per_pixel=100, output_bytes=2),
        Stage("b", halo=(0, 32), period=16, bytes_per_pixel=20, output_bytes=0.5),
    )
    try:
        plan = plan_run(size, card, stages, int(size[0] * size[1] * 120 * share))
    except OverBudgetError:
        return
    assert plan.padded == tuple(-(-max(side, smallest) // 8) * 8 for side in size)
    for grid, stage in zip(plan.grids, stages, strict=bool(plan.grids)):
        spans = [grid.spans(axis) for axis in (0, 1)]
        taken = [[span.outer_stop - span.outer_start for span in each] for each in spans]
        assert min(map(min, taken)) >= smallest
        assert max(taken[0]) * max(taken[1]) * stage.bytes_per_pixel <= plan.bytes
    profile = plan_profile(size, card, stages[0], [Profile((16, 16), (256, 256), (640, 640))])
    for axis in (0, 1):
        for span in profile.grids[0].spans(axis) if profile else ():
            assert smallest <= span.outer_stop - span.outer_start <= 640


def test_a_card_that_names_what_sees_the_whole_image_forbids_tiles_unless_a_stage_is_known_to_be_it():
    card = ModelCard(("a", "b"), size_multiple=32, whole="ReduceMean m")
    early, late = Stage("a", **HALO, bytes_per_pixel=200, output_bytes=2), Stage("b", **HALO, bytes_per_pixel=20)
    for stages in ((early,), (early, late)):
        assert not plan_run((2000, 2000), card, stages, 10**9).grids
        with pytest.raises(OverBudgetError, match=r"cannot be cut into tiles \(ReduceMean m\)"):
            plan_run((2000, 2000), card, stages, 300_000_000)
    found = Stage("b", whole="GlobalAveragePool pool", bytes_per_pixel=20)
    assert plan_run((2000, 2000), card, (early, found), 300_000_000).grids[0].count > 1
    profiles = [Profile((32, 32), (256, 256), (512, 512))]
    assert plan_profile((3000, 3000), CARD, early, profiles) and not plan_profile((3000, 3000), card, early, profiles)


def test_results_are_in_the_budget():
    stages, whole = (Stage("s", **HALO, bytes_per_pixel=100),), 704 * 928 * 100
    plan = plan_run((700, 900), CARD, stages, whole + 5000, Beside(5000))
    assert plan.grids == () and (plan.bytes, plan.result) == (whole + 5000, 5000)
    plan = plan_run((700, 900), CARD, stages, whole, Beside(5_000_000))
    assert plan.grids and plan.bytes <= whole and plan.result == 5_000_000
    tiles = plan_run((700, 900), CARD, stages, whole - 5_000_000)
    assert tiles.grids == plan.grids and tiles.bytes == plan.bytes - 5_000_000
    with pytest.raises(OverBudgetError, match=r"result of an image of 700×900 pixels takes 5\.00 MB, over the memory "):
        plan_run((700, 900), CARD, stages, 4_999_999, Beside(5_000_000))


def test_an_image_that_fits_is_run_whole():
    stage = Stage("s", **HALO, bytes_per_pixel=100.0)
    plan = plan_run((700, 900), CARD, (stage,), 704 * 928 * 100)
    assert plan.grids == () and plan.padded == (704, 928) and plan.overhead == 1
    plan = plan_run((700, 900), CARD, (stage,), 704 * 928 * 100 - 1)
    assert plan.grids[0].count > 1 and plan.overhead > 1 and plan.bytes < 704 * 928 * 100


def test_a_late_stage_that_cannot_be_tiled_is_run_whole_and_the_early_one_in_tiles():
    stages = (
        Stage("a", halo=(32, 32), period=32, bytes_per_pixel=200, output_bytes=2, cost=1),
        Stage("b", whole="GlobalAveragePool pool", bytes_per_pixel=20, output_bytes=0.5, cost=1),
    )
    plan = plan_run((2000, 2000), CARD, stages, 200_000_000)
    assert plan.grids[0].count > 1 and plan.grids[1].count == 1 and plan.grids[1].overhead == 1
    with pytest.raises(OverBudgetError, match=r"as a part of the network cannot be cut into tiles \(GlobalAverage"):
        plan_run((2000, 2000), CARD, stages, 50_000_000)


def test_what_the_reader_keeps_and_reads_ahead_and_what_results_are_made_in_is_in_the_budget():
    stage, budget = Stage("s", **HALO, bytes_per_pixel=100), int(2e7)
    plain = plan_run((640, 960), CARD, (stage,), budget)
    kept = KeptRows(bytes=3000, beside=64, ahead=20)
    for more in ({"kept": kept}, {"making": 40}):
        plan = plan_run((640, 960), CARD, (stage,), budget, Beside(**more))
        assert plan.bytes <= budget and plan.overhead > plain.overhead
        (grid,) = plan.grids
        rows, columns = (max(s.outer_stop - s.outer_start for s in grid.spans(axis)) for axis in (0, 1))
        counted = (rows + 64) * 3000 + rows * columns * 20 if "kept" in more else grid.tile[0] * 960 * 40
        assert plan.bytes == rows * columns * (100 + 3) + counted
    # All rows are kept at most, and fewer than `least` bytes where the image has fewer.
    assert KeptRows(10, 32, least=2000).taken(np.array(64.0), np.array(9.0), 500) == 2000
    assert KeptRows(10, 32, least=2000).taken(np.array(64.0), np.array(9.0), 150) == 1500
    assert KeptRows(100, 32).taken(np.array(64.0), np.array(9.0), 80) == 8000


def test_what_a_reader_keeps_costs_no_tiles_where_there_is_room_for_it_beside():
    stages, most = (Stage("s", **HALO, bytes_per_pixel=100),), 1.82e7
    kept = KeptRows(bytes=3000, beside=64, ahead=20)
    free = plan_bands((640, 960), CARD, stages, None, 1e9, most, Beside(kept=kept.without_rows))
    roomy = plan_bands((640, 960), CARD, stages, None, 1e9, most, Beside(kept=kept))
    rows, _ = roomy.grids[0].largest
    assert roomy.grids == free.grids and roomy.bytes == free.bytes + min(rows + 64, 640) * 3000
    for memory in (roomy.bytes - 1, most):
        tight = plan_bands((640, 960), CARD, stages, None, memory, most, Beside(kept=kept))
        assert tight.grids != free.grids and tight.bytes <= most
    assert plan_bands((640, 960), CARD, stages, None, roomy.bytes, most, Beside(kept=kept)) == roomy


def test_what_cannot_be_tiled_says_why():
    with pytest.raises(OverBudgetError, match=r"cannot be cut into tiles \(GlobalAveragePool\)"):
        plan_run((700, 900), CARD, (Stage("s", whole="GlobalAveragePool", bytes_per_pixel=100),), 1000)
    stages = (Stage("s", whole="GlobalAveragePool", bytes_per_pixel=100),)
    with pytest.raises(OverBudgetError, match=r"needs about 11\.14 MB, over the memory budget of 11\.00 MB"):
        plan_run((300, 300), CARD, stages, 11_000_000, Beside(making=10))
    with pytest.raises(OverBudgetError, match=r"in the smallest tiles it takes 3.69 MB; raise it"):
        plan_run((700, 900), CARD, (Stage("s", **HALO, bytes_per_pixel=100),), 1000)


def test_tiles_on_a_gpu_are_all_within_one_profile():
    stage = Stage("s", **HALO)
    small, large = Profile((32, 32), (256, 256), (512, 512)), Profile((640, 640), (960, 960), (1280, 1280))
    for profiles, size in (((small, large), (3000, 5000)), ((small,), (3000, 90)), ((large,), (1290, 1200))):
        plan = plan_profile(size, CARD, stage, profiles)
        profile, (grid,) = profiles[plan.profile], plan.grids
        for axis in (0, 1):
            for span in grid.spans(axis):
                assert profile.min[axis] <= span.outer_stop - span.outer_start <= profile.max[axis]
    assert plan_profile((100, 3000), CARD, stage, (large,)) is None  # below its minimum
    assert plan_profile((3000, 3000), CARD, Stage("s", whole="x"), (small,)) is None


def test_a_stage_that_is_faster_in_tiles_has_them_whatever_the_memory():
    first = Stage("0", halo=(32, 32), period=32, bytes_per_pixel=100, output_bytes=1, cost=1.0, tile=512)
    stages = first, Stage("1", halo=(96, 96), period=32, bytes_per_pixel=20, cost=2.0)
    plan = plan_run((1125, 1500), CARD, stages, 10**12)
    assert [grid.count for grid in plan.grids] == [9, 1]
    assert plan.grids[0].tile == (384, 512) and plan.grids[1].tile == plan.padded == (1152, 1504)
    assert plan.overhead == pytest.approx(work(stages, plan.grids) / 3.0)
    assert not plan_run((512, 500), CARD, stages, 10**12).grids
    assert not plan_run((777, 1), CARD, stages, 10**12).grids  # long, but no more pixels than a tile has
    assert max(plan_run((4000, 300), CARD, stages, 10**12).grids[0].tile) <= 512
    # Where memory is short they are smaller, never larger.
    small = plan_run((1125, 1500), CARD, stages, plan.bytes // 2)
    assert small.bytes <= plan.bytes // 2 and max(small.grids[0].tile) <= 512
    with pytest.raises(ValueError, match="tile 0"):
        Stage("0", tile=0)

"""Stages in tiles: the whole image's labels and scores, whatever the tiles, from any row on."""

import itertools
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.head.upsampling import KINDS, result_from_scores
from fcn_deploy.runtime.planning.grid import Grid, Span
from fcn_deploy.runtime.tiling.tiled_scores import TiledScores
from fcn_deploy.runtime.tiling.tiles import Rows, one_ahead, part_of, ready_windows, score_bands
from helpers import window
from hypothesis import given, settings
from hypothesis import strategies as st


def blur(features, reach, shrink):
    """A layer as networks have them, exact in integers: sums of a window, every `shrink`-th of them."""
    padded = np.pad(features, [(0, 0)] * (features.ndim - 2) + [(reach, reach)] * 2)
    height, width = features.shape[-2:]
    total = sum(
        (1 + y + 3 * x) * padded[..., y : y + height, x : x + width]
        for y in range(2 * reach + 1)
        for x in range(2 * reach + 1)
    )
    return total[..., ::shrink, ::shrink]


def rounded_down(features):
    """What two cells of a side make, without one that is left."""
    height, width = features.shape[-2:]
    return blur(features, 0, 2)[..., : height // 2, : width // 2]


class Ahead:
    """An image that remembers what was expected and what was asked for."""

    def __init__(self, image):
        self.image, self.expected, self.asked = image, [], []

    def __getitem__(self, where):
        self.asked.append(where)
        return self.image[where]

    def expect(self, where):
        self.expected.append(where)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_scores_of_stages_in_any_tiles_are_those_of_the_whole_image_from_any_row_on(data):
    unit = 8
    # Networks that take every size are given images that end within a cell.
    padded = tuple(data.draw(st.integers(1, 9 * unit)) for _ in range(2))
    image = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 9, padded)
    reach, shrink = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([1, 2]))
    again, least = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 40))
    down = data.draw(st.booleans())

    def second(features):
        features = blur(features, again, 1)
        return rounded_down(features) if down else features[..., ::2, ::2]

    whole = second(blur(image[None], reach, shrink))

    def grid(halo):
        tile = tuple(unit * data.draw(st.integers(1, 9)) for _ in range(2))
        return Grid(padded, tile, (-(-halo // unit) * unit,) * 2, least, unit)

    grids = [grid(reach), grid(again * shrink)]
    strides = [(shrink,) * 2, (2 * shrink,) * 2]
    ran = []
    source = Ahead(image)

    def first(rows, columns):
        ran.append((rows, columns))
        return blur(part_of(source, grids[0], rows, columns)[None], reach, shrink)

    start = data.draw(st.integers(0, padded[0] - 1))
    shorts = [(0, 0), (shrink, shrink)] if down else ()
    bands = list(score_bands(grids, strides, first, [lambda part, *_: second(part)[0]], start, shorts))
    top = bands[0][0]
    assert top <= start < top + grids[1].tile[0] and bands[-1][1] == padded[0]
    np.testing.assert_array_equal(
        np.concatenate([band for *_, band in bands], axis=1), whole[:, top // strides[1][0] :]
    )
    # Every tile once, and none that nothing needs; each was said before it was asked for.
    assert len(ran) == len(set(ran))
    assert source.expected == source.asked[1:]
    above = grids[1].spans(0)[top // grids[1].tile[0]].outer_start
    assert all(rows.stop > above for rows, _ in ran)


HEADS = [
    Upsampling("linear", "half_pixel", (8.0, 8.0)), Upsampling("linear", "asymmetric", (8.0, 8.0)),
    Upsampling("linear", "align_corners", (8.0, 8.0)), Upsampling("linear", "half_pixel", None),
    Upsampling("nearest", "half_pixel", (8.0, 8.0)), Upsampling("linear", "half_pixel", (8.0, 4.0)),
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_results_of_bands_are_those_of_the_whole_score_map(data):
    head = data.draw(st.sampled_from([*HEADS, Upsampling()]))
    cells, width, classes = (data.draw(st.integers(1, high)) for high in (14, 6, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 999)))
    scores = random.normal(size=(classes, cells, width)).astype(np.float32)
    factors = (1, 1) if head.mode == "none" else tuple(map(int, head.factor or (8, 8)))
    padded = cells * factors[0], width * factors[1]
    size = tuple(data.draw(st.integers(max(1, side - 15), side)) for side in padded)
    kind = data.draw(st.sampled_from(KINDS))
    activation = "multilabel" if kind == "masks" else "softmax"
    card = ModelCard(tuple(map(str, range(classes))), stride=factors[0], activation=activation)
    expected = result_from_scores(kind, window(scores, padded, size), head, card)
    start = data.draw(st.integers(0, size[0] - 1))
    edges = sorted(data.draw(st.sets(st.integers(1, cells), max_size=4)) | {0, cells})
    above = max(0, start - 2 * factors[0]) // factors[0]
    bands = [(a * factors[0], b * factors[0], scores[:, a:b]) for a, b in itertools.pairwise(edges) if b > above]
    found, row = [], start
    for part in ready_windows(iter(bands), factors[0], head, padded, size, start):
        assert part.rows[0] == row and part.rows[1] > row
        row = part.rows[1]
        found.append(result_from_scores(kind, part, head, card))
    np.testing.assert_array_equal(np.concatenate(found, axis=-2), expected[..., start:, :])


def test_the_next_window_is_made_while_the_caller_has_one_and_nothing_more_once_he_stops():
    made, stop, second = [], threading.Event(), threading.Event()

    def items():
        for number in range(5):
            if stop.is_set():
                raise DeployError("not wanted")
            made.append(number)
            if number == 1:
                second.set()
            yield number

    ahead = one_ahead(items(), stop)
    assert next(ahead) == 0
    assert second.wait(5) and made == [0, 1]
    assert next(ahead) == 1
    ahead.close()
    assert stop.is_set() and len(made) <= 3
    stop.clear()
    assert list(one_ahead(items(), stop)) == list(range(5))


def test_what_goes_wrong_in_the_other_thread_is_raised_in_its_turn():
    def items():
        yield 1
        raise DeployError("it is truncated")

    ahead = one_ahead(items(), threading.Event())
    assert next(ahead) == 1
    with pytest.raises(DeployError, match="truncated"):
        next(ahead)


def test_rows_above_a_tile_are_forgotten_before_more_are_made():
    alive = []

    def bands():
        for top in range(0, 80, 10):
            band = np.zeros((1, 10, 4), np.float32)
            alive.append(weakref.ref(band))
            yield top, top + 10, band
            del band

    rows = Rows(bands(), (1, 1))
    for start in range(0, 60, 20):
        rows.part(Span(start, start + 20, start, start + 20), Span(0, 4, 0, 4))
        assert sum(each() is not None for each in alive) <= 3


def test_bands_that_are_collected_while_networks_are_opened_do_not_wait_for_ever():
    tiled, ended = TiledScores(None, None, (), None, Path(), None), threading.Event()

    def collected_amid_opening():
        left = tiled._using()
        left.__enter__()
        with tiled._opening:
            left.__exit__(None, None, None)
        ended.set()

    threading.Thread(target=collected_amid_opening, daemon=True).start()
    assert ended.wait(5)

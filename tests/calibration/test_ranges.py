"""Histograms that are exact, in constant memory, and the ranges they give."""

import json

import numpy as np
import pytest
from fcn_deploy.calibration.ranges import BINS, METHODS, Histogram, Ranges, collect_histograms
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_deploy import DeployError, MisuseError


def histogram_of(*parts):
    histogram = Histogram()
    for part in parts:
        histogram.add(np.asarray(part, np.float32))
    return histogram


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), pieces=st.integers(1, 6))
def test_counts_do_not_depend_on_how_values_arrive(seed, pieces):
    random = np.random.default_rng(seed)
    values = (random.normal(size=3000) * 10.0 ** random.uniform(-3, 3)).astype(np.float32)
    order = np.sort(values) if seed % 2 else values  # sorted: the range doubles many times
    one, many = histogram_of(values), histogram_of(*np.array_split(order, pieces))
    np.testing.assert_array_equal(one.counts, many.counts)
    assert (one.limit, one.low, one.high) == (many.limit, many.low, many.high)
    assert one.counts.sum() == 3000


def test_counts_are_numpys():
    values = np.random.default_rng(0).uniform(-3.9, 3.9, 100_000).astype(np.float32)
    histogram = histogram_of(values)
    expected, _ = np.histogram(values, BINS, (-4, 4))
    assert histogram.limit == 4 and abs(histogram.counts - expected).max() <= 1  # a value on an edge


def test_what_is_not_finite_is_refused():
    for wrong in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            histogram_of([1, wrong, 2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_hold_zero_and_lie_inside_what_was_seen(method, symmetric):
    random = np.random.default_rng(0)
    for values in (random.normal(size=50_000), random.exponential(size=50_000), -random.exponential(size=5000)):
        histogram = histogram_of(values)
        low, high = histogram.range(method, symmetric)
        assert low <= 0 <= high and low < high
        peak = np.abs(values).max() * 1.001
        assert -peak <= low and high <= peak
        if symmetric:
            assert low == -high


def test_one_outlier_moves_minmax_and_not_the_others():
    values = np.append(np.random.default_rng(0).uniform(0, 1, 200_000), 100.0)
    histogram = histogram_of(values)
    assert histogram.range("minmax")[1] == 100
    assert histogram.range("percentile")[1] < 2


def test_mse_has_the_least_error_of_all_methods():
    values = np.random.default_rng(1).laplace(size=100_000).astype(np.float32)
    histogram = histogram_of(values)

    def error(method):
        _, high = histogram.range(method, True)
        step = high / 127
        return ((np.clip(np.round(values / step), -127, 127) * step - values) ** 2).mean()

    errors = {method: error(method) for method in METHODS}
    assert errors["mse"] <= 1.02 * min(errors.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_dead_channel_still_has_a_range(method):
    for values in (np.zeros(100), np.full(100, 3.0), np.full(100, -2.0)):
        low, high = histogram_of(values).range(method)
        assert high > low and np.isfinite([low, high]).all()


def ranges(model="abc"):
    made = Ranges(model, images=["a", "b"])
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        for _ in range(2):
            made.add(name, random.normal(size=(1, 3, 8, 9)).astype(np.float32))
    return made


def test_ranges_are_saved_and_reused(tmp_path):
    made = ranges()
    made.save(tmp_path / "ranges.json")
    loaded = Ranges.load(tmp_path / "ranges.json", "abc")
    for method in METHODS:
        assert loaded.histograms["one"].range(method) == made.histograms["one"].range(method)
    np.testing.assert_allclose(loaded.channel_mean("two"), made.channel_mean("two"))
    np.testing.assert_array_equal(loaded.histograms["one"].counts, made.histograms["one"].counts)
    assert loaded.images == made.images


def test_ranges_of_another_model_or_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "ranges.json"
    ranges().save(path)
    with pytest.raises(MisuseError, match="measured on another network"):
        Ranges.load(path, "xyz")
    with pytest.raises(MisuseError, match="does not exist"):
        Ranges.load(tmp_path / "none.json", "abc")
    whole = path.read_text()
    data = json.loads(whole)
    data["tensors"]["one"]["counts"] = "AAAA"
    for text in ("", "[]", whole[:-40], json.dumps(data), json.dumps(data | {"version": 9})):
        path.write_text(text)
        with pytest.raises(DeployError, match="no ranges that can be read"):
            Ranges.load(path, "abc")


def test_memory_does_not_grow_with_the_number_of_images():
    import tracemalloc

    image = np.random.default_rng(0).normal(size=(1, 8, 200, 200)).astype(np.float32)

    def peak(count):
        tracemalloc.start()
        collect_histograms(lambda x: {"t": x * 2}, (("n", image) for _ in range(count)), "m", lambda image: image)
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(1)  # modules are imported
    assert peak(40) <= 1.1 * peak(2)


RANDOM = np.random.default_rng(5)
LARGE = (1, 6, 300, 320)  # more than one CHUNK, and not a multiple of it
CONTENTS = {
    "noise": RANDOM.normal(size=LARGE),
    "sorted": np.sort(RANDOM.exponential(size=LARGE).ravel()).reshape(LARGE),
    "stripes of 16 columns": np.broadcast_to(np.arange(320) % 16 / 16 - 0.4, LARGE),
    "stripes of rows": np.broadcast_to((np.arange(300) % 2)[:, None] * 2.0, LARGE),
    "channels of their own": np.broadcast_to(2.0 ** np.arange(6)[:, None, None], LARGE),
    "mostly zero": (RANDOM.uniform(size=LARGE) > 0.9) * RANDOM.normal(size=LARGE),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_has_the_shares_of_all_values_within_the_bound_that_it_states(content, masked):
    """The bound holds with a probability of 95 % for one image and number; seeds are such that it does for these."""
    values = np.ascontiguousarray(CONTENTS[content], np.float32)
    counted = RANDOM.uniform(size=LARGE[2:]) > 0.1 if masked else None
    left = values if counted is None else values[:, :, counted]
    found = Ranges("m")
    for image in range(8):
        found.images = ["n"] * image
        found.next_image()
        found.add("t", values, counted)
    histogram = found.histograms["t"]
    assert histogram.counts.sum() < 8.1 * left.size and histogram.counts.sum() > 7.9 * left.size
    assert (histogram.low, histogram.high) == (left.min(), left.max())
    exact = histogram_of(left)
    shares = [each.counts.cumsum() / each.counts.sum() for each in (histogram, exact)]
    assert np.abs(shares[0] - shares[1]).max() < np.sqrt(np.log(2 / 0.05) / (2 * 8 * 4096))
    means = left.reshape(1, 6, -1).mean((0, 2), dtype=np.float64)
    np.testing.assert_allclose(found.means["t"] / 8, means, atol=1e-5 * np.abs(left).max())
    assert histogram.range("minmax") == exact.range("minmax")
    assert squared_error(left, histogram.range("mse")) <= 1.1 * squared_error(left, exact.range("mse"))
    bottom, top = histogram.range("percentile")
    assert ((left < bottom) | (left > top)).mean() < 3e-4  # 1e-4 where all are counted


def squared_error(values, ends):
    step = (ends[1] - ends[0]) / 255
    return ((np.clip(np.round(values / step), *np.round(np.divide(ends, step))) * step - values) ** 2).mean() + 1e-12


def test_what_one_value_of_a_large_tensor_is_not_is_seen():
    """An extreme is seen wherever it is, and so is a NaN."""
    values = RANDOM.normal(size=LARGE).astype(np.float32)
    found = Ranges("m")
    for place, value in enumerate((50.0, -70.0)):
        values.reshape(-1)[place * 300_001 + 7] = value
        found.add("t", values)
    assert (found.histograms["t"].low, found.histograms["t"].high) == (-70, 50)
    values.reshape(-1)[-1] = np.nan
    with pytest.raises(DeployError, match="tensor t: it has NaN or infinite values"):
        found.add("t", values)


def test_small_tensors_are_counted_whole():
    values = RANDOM.normal(size=(1, 5, 30, 50)).astype(np.float32)
    found = Ranges("m")
    found.add("t", values)
    np.testing.assert_array_equal(found.histograms["t"].counts, histogram_of(values).counts)
    found.add("nothing", values, np.zeros((30, 50), bool))
    assert not found.histograms["nothing"].counts.any() and not found.means["nothing"].any()


def test_no_image_at_all_is_an_error_and_never_random_data():
    with pytest.raises(DeployError, match="never calibrated on invented data"):
        collect_histograms(lambda x: {}, [], "m", lambda image: image)

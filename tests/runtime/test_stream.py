"""Streams: order, bounds, early ends, and labels that never depend on the company."""

import faulthandler
import gc
import threading
import time

import numpy as np
import pytest
from fcn_deploy.runtime.planning.batch_cost import ROUNDS, BatchCost
from fcn_deploy.runtime.stream import AHEAD, TOGETHER, overlapped
from helpers import photo, save_photos
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_deploy import DeployError, MisuseError, Segmenter

WAIT = 600  # seconds until something is taken to hang


def threads_of_streams():
    """Others' come and go: those of servers and clients of earlier tests."""
    return sum(thread.name.startswith("fcn-deploy") for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_hanging():
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def net(exports):
    with Segmenter(exports / "narrow.engine", threads=2) as net:
        yield net


def stream(items, work, **options):
    return overlapped(items, work, **({"workers": 2, "pixels": lambda item: 1, "most": 100} | options))


def doubled(group):
    return [2 * item for item in group]


class Watched:
    """Items that know how many of them are in flight."""

    def __init__(self, weights):
        self.weights, self.read, self.out, self.started, self.groups = weights, 0, 0, [], []
        self.lock = threading.Lock()

    def __iter__(self):
        for index in range(len(self.weights)):
            self.read += 1
            yield index

    def work(self, group):
        with self.lock:
            self.started += group
            self.groups.append(group)
            flying = [index for index in self.started if index >= self.out]
            self.heaviest = sum(self.weights[index] for index in flying), len(flying)
            assert self.heaviest[0] <= 100 or len(flying) == 1, flying
        return [index * 2 for index in group]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1, 3, 40, 99, 500]), max_size=90),
    workers=st.integers(1, 5),
    keys=st.integers(1, 4),
)
def test_order_bounds_and_groups(weights, workers, keys):
    watched = Watched(weights)
    alike = lambda index: index % keys if weights[index] < 40 else None  # noqa: E731
    results = stream(watched, watched.work, workers=workers, pixels=weights.__getitem__, alike=alike)
    for expected, result in enumerate(results):
        assert result == 2 * expected
        watched.out = expected + 1
        assert watched.read - expected <= AHEAD + 1
    assert watched.out == len(weights) and sorted(watched.started) == list(range(len(weights)))
    for group in watched.groups:
        assert len(group) <= TOGETHER and len({alike(index) for index in group}) == 1
        assert len(group) == 1 or alike(group[0]) is not None


def test_items_that_are_alike_fill_groups():
    sizes = []
    assert list(stream(range(64), lambda g: sizes.append(len(g)) or g, alike=lambda item: item % 2)) == [*range(64)]
    assert sizes == [TOGETHER] * 8


def test_two_jobs_and_the_source_run_at_once():
    together = threading.Barrier(2)  # breaks where the second job waits for the first
    assert list(stream(range(8), lambda g: (together.wait(WAIT), g)[1])) == [*range(8)]
    seen, working = threading.Event(), threading.Event()

    def items():
        yield 1
        assert working.wait(WAIT)
        seen.set()
        yield 2

    def work(group):
        working.set()
        assert seen.wait(WAIT)
        return group

    assert list(stream(items(), work)) == [1, 2]


@pytest.mark.parametrize("how", ["close", "drop", "raise"])
def test_a_consumer_that_stops_early_ends_the_threads(how):
    before, started = threads_of_streams(), []

    def slow(group):
        started.extend(group)
        time.sleep(0.01)
        return group

    results = stream(iter(range(10_000)), slow)
    assert next(results) == 0 and threads_of_streams() > before
    if how == "close":
        results.close()
    elif how == "drop":
        del results
        gc.collect()
    else:
        with pytest.raises(ZeroDivisionError):
            results.throw(ZeroDivisionError)
    assert threads_of_streams() == before
    count = len(started)
    assert count < AHEAD
    time.sleep(0.05)
    assert len(started) == count


def test_a_stream_that_nobody_reads_starts_nothing():
    before = threads_of_streams()
    stream(iter([1]), doubled)
    assert threads_of_streams() == before


@pytest.mark.parametrize("good", [0, 1, 5, 40])
def test_errors_of_the_source_and_of_the_work_come_in_order(good):
    def items():
        yield from range(good)
        raise OSError("the camera is gone")

    before, found = threads_of_streams(), []
    with pytest.raises(OSError, match="camera"):
        for result in stream(items(), doubled):
            found.append(result)
    assert found == [2 * item for item in range(good)] and threads_of_streams() == before

    found.clear()
    with pytest.raises(ZeroDivisionError):
        for result in stream(range(good + 50), lambda g: [1 // (item != good) for item in g]):
            found.append(result)
    assert len(found) == good and threads_of_streams() == before


# Segmenter.map


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_labels_are_those_of_single_calls(exports, data):
    sizes = st.sampled_from([(1, 1), (20, 31), (32, 32), (33, 60), (64, 64), (100, 90), (150, 260)])
    chosen = data.draw(st.lists(sizes, max_size=40))
    with _shared(exports) as net:
        images = [photo(*size, seed % 5) for seed, size in enumerate(chosen)]
        for labels, image in zip(net.map(iter(images)), images, strict=True):
            np.testing.assert_array_equal(labels, net(image))


_open: dict = {}


class _shared:  # noqa: N801
    """One Segmenter for all examples, so that its measured costs grow."""

    def __init__(self, exports):
        self.net = _open.setdefault(exports, None) or Segmenter(exports / "narrow.engine", threads=2)
        _open[exports] = self.net

    def __enter__(self):
        return self.net

    def __exit__(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("pays", [True, False, None])
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_batched_or_not_the_labels_and_scores_are_equal(exports, int8_engine, precision, pays):
    path = exports / "narrow.engine" if precision == "float32" else int8_engine
    with Segmenter(path, threads=2) as net:
        images = [photo(60 + seed % 4, 33 + seed % 9, seed) for seed in range(8 * (2 * ROUNDS + 1) + 3)]
        if pays is not None:
            fast, slow = [1.0] * ROUNDS, [2.0] * ROUNDS
            net.network.batch_costs[64, 64] = BatchCost(slow, fast, True) if pays else BatchCost(fast, slow, True)
        batches = []
        run_batch = net.network.run_batch
        net.network.run_batch = lambda images, *rest: batches.append(len(images)) or run_batch(images, *rest)
        for labels, image in zip(net.map(images), images, strict=True):
            np.testing.assert_array_equal(labels, net(image))
        if pays is None:
            cost = net.network.batch_costs[64, 64]
            assert cost.equal is True and cost.pays is not None and len(batches) >= ROUNDS
        else:
            assert bool(batches) is pays
        assert set(batches) <= {TOGETHER}
        for count in (2, 3, TOGETHER):
            for scores, image in zip(net.network.backend.scores(images[:count]), images[:count], strict=True):
                np.testing.assert_array_equal(scores, net.network.scores(image))


@pytest.fixture(scope="module")
def int8_engine(exports, tmp_path_factory):
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.export.quantization.options import QuantizationOptions

    folder = tmp_path_factory.mktemp("int8")
    save_photos(folder / "photos", [(70 + index, 90) for index in range(12)])
    int8 = QuantizationOptions(int8=True, calib=str(folder / "photos"), max_drop=100)
    source = import_model(exports / "narrow.onnx")
    build_engine(source, folder / "narrow8.engine", BuildConfig(quantization=int8))
    return folder / "narrow8.engine"


def test_a_backend_whose_batches_differ_is_not_given_any(net):
    backend = net.network.backend
    whole = backend.scores

    def inexact(images):
        scores = whole(images)
        return scores if len(images) == 1 else np.nextafter(scores, np.inf)

    backend.scores = inexact
    images = [photo(40, 40, seed) for seed in range(40)]
    for labels, image in zip(net.map(images), images, strict=True):
        np.testing.assert_array_equal(labels, net(image))
    assert net.network.batch_costs[64, 64].equal is False and not net.network.batch_costs[64, 64].together


def test_a_model_of_a_fixed_batch_is_run_image_by_image(exports, tmp_path):
    import onnx

    model = onnx.load(exports / "narrow.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    with Segmenter(tmp_path / "one.onnx") as net:
        images = [photo(40, 40, seed) for seed in range(20)]
        for labels, image in zip(net.map(images), images, strict=True):
            np.testing.assert_array_equal(labels, net(image))
        assert net.network.batch_costs[40, 40].equal is False


def test_one_broken_image_does_not_stop_the_rest(net):
    images = [photo(40, 40, seed) for seed in range(20)]
    images[5:7] = [np.zeros((4, 4), np.float64), "no image"]
    outcomes = list(net.map(images, return_exceptions=True))
    assert [index for index, each in enumerate(outcomes) if isinstance(each, MisuseError)] == [5, 6]
    assert "this model takes" in str(outcomes[5]) and "not str" in str(outcomes[6])
    for index in (4, 7, 19):
        np.testing.assert_array_equal(outcomes[index], net(images[index]))
    before, found = threads_of_streams(), []
    with pytest.raises(MisuseError, match="this model takes"):
        for labels in net.map(images):
            found.append(labels)
    assert len(found) == 5 and threads_of_streams() == before


def test_a_map_that_is_left_early_ends(net):
    before = threads_of_streams()
    for _ in net.map(photo(40, 40) for _ in range(1000)):
        break
    assert threads_of_streams() == before
    labels = net.map([photo(40, 40)] * 40)
    next(labels)
    net.close()
    with pytest.raises(DeployError, match="closed"):
        list(labels)
    assert threads_of_streams() == before


def test_images_that_share_the_budget_run_at_once_and_others_alone(exports):
    size = (320, 320)
    with Segmenter(exports / "narrow.engine") as net:
        need = net.plan(*size).bytes
    for memory, most in ((10 * need, 2), (int(1.5 * need), 1)):
        with Segmenter(exports / "narrow.engine", memory=memory) as net:
            running, seen, lock, both = set(), [], threading.Lock(), threading.Barrier(most)
            run = net.network.run

            def watched(image, plan, kinds, run=run, running=running, seen=seen, lock=lock, both=both):
                me = object()
                with lock:
                    running.add(me)
                    seen.append(len(running))
                both.wait(WAIT)
                labels = run(image, plan, kinds)
                with lock:
                    running.remove(me)
                return labels

            net.network.run = watched
            assert sum(1 for _ in net.map([photo(*size)] * 6)) == 6
            assert max(seen) == most


def test_what_is_in_flight_is_bounded_by_pixels(net):
    read = []

    def images():
        for index in range(12):
            read.append(index)
            yield np.zeros((3000, 4000, 3), np.uint8)

    net.network.run = lambda image, plan, kinds: (np.zeros(plan.size, np.uint8),)
    labels = net.map(images())
    next(labels)
    assert len(read) <= 7  # 5 of 12 megapixels in flight, and what was read and waits
    labels.close()

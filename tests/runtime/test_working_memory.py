"""Which runs go on together, and when a backend gives memory back."""

import itertools
import json
import os
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fcn_deploy.runtime import process_memory
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.engine_file import write_engine
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.engine_format.stage import Stage, Upsampling
from fcn_deploy.runtime.planning.working_memory import KEPT, STEADY_RUNS, WorkingMemory
from fcn_deploy.runtime.process_memory import give_back_freed, resident
from helpers import finished, onnx_model
from onnx import helper

from fcn_deploy import ModelCard, OverBudgetError, Segmenter

MB = 1_000_000
WEIGHTS = {"w": np.ones((4, 3, 1, 1), np.float32)}


def test_an_open_network_does_not_hold_the_bytes_that_it_was_opened_from():
    """They are as much as its weights, once more (findings/onnxruntime-holds-the-bytes-of-a-model.sh)."""
    data = onnx_model([helper.make_node("Conv", ["image", "w"], ["scores"])], WEIGHTS).SerializeToString()
    held = sys.getrefcount(data)
    opened = session(data)
    assert sys.getrefcount(data) == held
    assert (opened.run(None, {"image": np.ones((1, 3, 2, 2), np.float32)})[0] == 3).all()


class Releases(list):
    def __call__(self):
        self.append(1)


def run(memory, needed, shape=None, budget=10_000 * MB):
    with memory.taking(needed, shape or needed, lambda: budget):
        pass


def test_runs_that_are_within_the_budget_go_on_together_and_others_wait_in_their_order():
    memory, started, may_end = WorkingMemory(Releases()), [], threading.Event()

    def call(name, needed):
        with memory.taking(needed, name, lambda: 100 * MB):
            started.append(name)
            may_end.wait(10)

    threads = []
    for name, needed in (("a", 60 * MB), ("b", 40 * MB), ("too much", 50 * MB), ("small, after it", 1)):
        threads.append(threading.Thread(target=call, args=(name, needed)))
        threads[-1].start()
        deadline = time.monotonic() + 5
        while len(memory._waiting) + len(started) < len(threads) and time.monotonic() < deadline:
            time.sleep(0.001)
    assert started == ["a", "b"]
    may_end.set()
    for thread in threads:
        thread.join()
    assert started == ["a", "b", "too much", "small, after it"]


def test_what_is_over_the_budget_runs_alone():
    memory = WorkingMemory(Releases())
    run(memory, 500 * MB, budget=100 * MB)
    assert memory.held == 500 * MB


def test_a_run_that_fails_leaves_its_place():
    memory = WorkingMemory(Releases())
    with pytest.raises(ValueError, match="fails"), memory.taking(90 * MB, "a", lambda: 100 * MB):
        raise ValueError("it fails")
    run(memory, 90 * MB, budget=100 * MB)  # would wait for ever


def test_memory_is_given_back_before_a_run_larger_than_all_before_it():
    memory = WorkingMemory(released := Releases())
    run(memory, KEPT // 2)
    run(memory, 100 * MB)
    assert not released
    run(memory, 300 * MB)
    assert len(released) == 1 and memory.held == 300 * MB
    run(memory, 100 * MB)
    assert len(released) == 1


def test_a_network_that_begins_with_a_large_run_takes_little_first():
    memory = WorkingMemory(released := Releases())
    run(memory, 300 * MB)
    assert len(released) == 1 and memory.held == 300 * MB
    run(memory, 200 * MB)
    assert len(released) == 1


def test_images_of_mixed_sizes_do_not_have_memory_given_back_again_and_again():
    memory = WorkingMemory(released := Releases())
    sizes = np.exp(np.random.default_rng(0).uniform(np.log(5), np.log(260), 2000)).astype(int).tolist()
    for one, other in itertools.pairwise(sizes):  # two at a time, as of CamVid's network up to 720×1280
        run(memory, (one + other) * MB, one % 48)
    # Each time costs what a large image takes in fresh pages.
    assert len(released) <= 10 and memory.held <= 520 * MB


def test_shapes_that_might_come_to_more_than_the_budget_have_memory_given_back():
    memory = WorkingMemory(released := Releases())
    run(memory, 1, "the first")
    for _ in range(3):
        for shape in range(4):  # that fit together
            run(memory, 100 * MB, shape, budget=450 * MB)
    assert not released
    run(memory, 100 * MB, "a fifth", budget=450 * MB)
    assert len(released) == 1


def test_what_the_process_holds_tells_whether_shapes_found_room_in_each_other():
    holds = [1000 * MB]
    memory = WorkingMemory(released := Releases(), lambda: holds[0])
    run(memory, 1, "the first")
    for shape in range(40):
        run(memory, 100 * MB, shape, budget=450 * MB)
        holds[0] = 1150 * MB  # each finds room in what the first has left
    assert not released
    holds[0] = 1400 * MB
    run(memory, 100 * MB, "another", budget=450 * MB)
    assert len(released) == 1
    run(memory, 100 * MB, "after that", budget=450 * MB)
    assert len(released) == 1


def test_an_unusually_large_run_holds_its_memory_for_a_while_only():
    memory = WorkingMemory(released := Releases())
    run(memory, 1, "the first")
    run(memory, 1000 * MB)
    for _ in range(STEADY_RUNS):
        run(memory, 80 * MB)
    assert len(released) == 1
    run(memory, 80 * MB)
    assert memory.held == 80 * MB and len(released) == 1


def test_after_thirty_small_images_of_mixed_sizes_a_large_ones_memory_is_given_back():
    memory = WorkingMemory(released := Releases())
    run(memory, 1, "the first")
    run(memory, 1000 * MB)
    for index in range(29):
        run(memory, (20 + 5 * (index % 3)) * MB)
    assert not released
    run(memory, 20 * MB)
    assert len(released) == 1


def test_at_rest_all_is_given_back_once_but_never_under_a_run_that_goes_on():
    releases = Releases()
    memory = WorkingMemory(releases)
    memory.rest()
    run(memory, 20 * MB)
    with memory.taking(10 * MB, "b", lambda: 100 * MB):
        memory.rest()
    assert memory.held == 20 * MB and not releases
    memory.rest(), memory.rest()
    assert memory.held == 0 and len(releases) == 1


def test_small_runs_of_any_number_of_shapes_are_left_alone():
    memory = WorkingMemory(released := Releases())
    for shape in range(1000):
        run(memory, KEPT // 2000, shape)
    assert not released


def test_an_engine_gives_back_what_a_large_image_took(exports):
    with Segmenter(exports / "narrow.engine") as net:
        net(np.zeros((64, 64, 3), np.uint8))
        give_back_freed()
        before = resident()
        if before is None:
            pytest.skip("resident memory is read from Linux's /proc")
        image = np.zeros((1024, 1024, 3), np.uint8)
        net(image)
        held = resident() - before
        net.network.backend.release()
        given_back = resident() - before
        assert held > 100 * MB and given_back < held / 3, (held, given_back)
        np.testing.assert_array_equal(net(image), net(image))


def test_engines_of_version_3_are_read():
    from tiny_engine import MANIFEST

    record = json.loads(MANIFEST.to_json())
    record["version"] = 3
    for stage in record["stages"]:
        del stage["bytes_fixed"], stage["bytes_per_pixel_squared"]
        stage["bytes_per_pixel"] = 100.0
    (stage,) = Manifest.from_json(json.dumps(record), "old.engine").stages
    assert stage.working_memory(1000) == 100_000


def test_blocks_go_back_where_a_network_has_a_budget_and_are_kept_in_a_server(monkeypatch):
    given = []
    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(process_memory, "_keeps_freed", threading.Event())
    monkeypatch.setattr(process_memory, "_allocator", lambda: SimpleNamespace(mallopt=lambda *call: given.append(call)))
    block = process_memory.BLOCK
    process_memory.bound_heap()
    assert (block, 1 << 20) in given
    given.clear()
    process_memory.keep_freed()
    process_memory.bound_heap()
    assert [value for parameter, value in given if parameter == block] == [1 << 25]


@pytest.fixture(scope="module")
def small_engine(tmp_path_factory):
    """One convolution of stride 4, which takes far less than copies of an image."""
    weights = {"w": np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)}
    node = helper.make_node("Conv", ["image", "w"], ["scores"], strides=[4, 4], pads=[1] * 4)
    stage = Stage("0.onnx", halo=(8, 8), period=8, stride=(4, 4), bytes_fixed=1e6, bytes_per_pixel=40, output_bytes=1.0)
    upsampling = Upsampling("linear", "half_pixel", (4.0, 4.0))
    card = ModelCard(("a", "b", "c", "d"), stride=4, size_multiple=8)
    path = tmp_path_factory.mktemp("small") / "m.engine"
    write_engine(
        path, Manifest(card, "cpu", "float32", upsampling, (stage,), "test"),
        {"0.onnx": onnx_model([node], weights, gives=("N", 4, "h", "w")).SerializeToString()},
    )  # fmt: skip
    return path


COPIES = """
import sys, json, numpy as np
from fcn_deploy import Segmenter
from fcn_deploy.runtime.process_memory import forget_highest, highest, resident
size = 2000, 3000
valid = np.ones(size, bool)
valid[5, 5] = False
image = np.full((*size, 3), 100, np.uint8)
deep = image.astype(np.uint16)
took = {}
with Segmenter(sys.argv[1], memory=50_000_000, threads=1) as net, Segmenter(
    sys.argv[1], memory=50_000_000, threads=1, input_range=(0, 4000)
) as ranged:
    for name, call in {
        "plain": lambda: net(image), "holes": lambda: net(image, valid=valid), "range": lambda: ranged(deep),
    }.items():
        call()
        before = resident()
        if before is None:
            continue
        forget_highest()
        call()
        took[name] = highest(before) - before
print(json.dumps(took))
"""


def test_copies_that_a_call_makes_of_an_image_are_of_its_tiles_where_memory_is_short(small_engine):
    """In a process of its own. The image has 18 MB; to look it up in a table of values took 144."""
    took = json.loads(finished([sys.executable, "-c", COPIES, small_engine]).stdout)
    if not took:
        pytest.skip("resident memory is read from Linux's /proc")
    assert took["plain"] < 60 * MB and took["holes"] < took["plain"] + 15 * MB, took  # 6 MB say where the holes are
    assert took["range"] < took["plain"] + 10 * MB, took


def test_holes_and_ranges_in_tiles_have_the_labels_of_the_whole(small_engine):
    random = np.random.default_rng(1)
    image = random.integers(0, 4000, (500, 700, 3), np.uint16)
    valid = random.random((500, 700)) > 0.01
    with (
        Segmenter(small_engine, input_range=(0, 4000)) as whole,
        Segmenter(small_engine, input_range=(0, 4000), memory=3_000_000) as tiled,
    ):
        assert tiled.plan(500, 700).grids[0].count > 1
        for kwargs in ({}, {"valid": valid}):
            np.testing.assert_array_equal(tiled(image, **kwargs), whole(image, **kwargs))
            np.testing.assert_allclose(tiled.heatmap(image, **kwargs), whole.heatmap(image, **kwargs), atol=1e-3)
        assert (tiled(image, valid=valid)[~valid] == tiled.card.no_data).all()


def test_copies_of_an_image_that_is_run_whole_and_all_of_the_scores_are_planned(small_engine):
    size = 2000, 3000
    image = np.ma.MaskedArray(np.zeros((*size, 3), np.uint8), False)
    with Segmenter(small_engine, memory=2_000_000_000) as net:
        plain = net.plan(*size)
        assert net.network.plan(*size, source=image).bytes >= plain.bytes + image.nbytes
        assert net.network.plan(*size, kinds=("scores",)).bytes >= plain.bytes + 2 * 6 * MB
    with Segmenter(small_engine, memory=10 * MB) as net, pytest.raises(OverBudgetError) as caught:
        net.network.plan(*size, kinds=("scores",))  # of which twice 6 MB are held
    assert "budget of 0.00 MB" in str(caught.value) and "its labels and scores" in str(caught.value)
    needed = plain.bytes + 6 * MB + 10 * 4 * MB  # labels, and what they are made in
    with Segmenter(small_engine, memory=needed + 10 * MB) as net:
        assert not net.plan(*size).grids
        assert net.network.plan(*size, source=image).grids


def test_a_plain_onnx_says_that_it_keeps_to_no_budget(exports, caplog):
    with Segmenter(exports / "narrow.onnx", memory=100 * MB):
        (said,) = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert "100 MB is not kept by" in said and "build-engine" in said and len(said) < 300 and "\n" not in said

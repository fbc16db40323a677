"""The core in stages: tiles that give the whole image's scores, in every network and precision."""

import functools
import math

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.cut_stages import cut_core
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import OverBudgetError
from fcn_deploy.runtime.prepare import prepare
from helpers import FAMILY, checkpoint_of, needs, onnx_model, photo, random_network, save_photos
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from fcn_deploy import DeployError, Segmenter

CHOSEN = [family for family in FAMILY if family.get("stride") != 16 and family.get("upsampling") != "learned"]


@functools.cache
def narrow(index, width=0.125):
    """The core of a network of the family, and its card."""
    import tempfile
    from pathlib import Path

    model = random_network(width=width, **CHOSEN[index])
    with tempfile.TemporaryDirectory() as folder:
        export_module(model, checkpoint_of(model).card, Path(folder) / "m.onnx")
        core = core_of(import_model(Path(folder) / "m.onnx"))
    return optimise_offline(core.model), core.card


@pytest.mark.parametrize("index", range(len(CHOSEN)), ids=lambda i: "-".join(map(str, CHOSEN[i].values())))
def test_stages_one_after_the_other_are_the_core(index):
    core, card = narrow(index)
    parts = cut_core(core, card)
    assert 1 <= len(parts) <= 2 and all(part.stage.halo is not None for part in parts)
    features = prepare(photo(70, 130), card)
    expected = session(core.SerializeToString()).run(["scores"], {"image": features})[0]
    for part in parts:
        onnx.checker.check_model(part.model)
        features = session(part.model.SerializeToString()).run([part.stage.output], {part.stage.input: features})[0]
    assert np.abs(features - expected).max() <= 1e-5 * np.ptp(expected)


@functools.cache
def engine(index, int8, folder, backend="onnxruntime"):
    """An engine of the family, in a folder of this run."""
    path = folder / f"{index}-{int8}-{backend}.engine"
    model = random_network(width=0.125, **CHOSEN[index])
    export_module(model, checkpoint_of(model).card, folder / f"{index}.onnx")
    save_photos(folder, [(90 + index, 100) for index in range(3)])
    options = (
        QuantizationOptions(int8=True, calib=str(folder / "*.png"), max_drop=100) if int8 else QuantizationOptions()
    )
    config = BuildConfig(quantization=options, tuning=TuningOptions((backend,)), latency_sizes=[(32, 32)])
    build_engine(import_model(folder / f"{index}.onnx"), path, config)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiled")


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tiled_scores_are_the_whole_images(folder, int8, data):
    """Bit for bit in INT8, to 1e-5 of their range in float32; labels too, for any size, budget and backbone."""
    path = engine(data.draw(st.sampled_from(range(len(CHOSEN)))), int8, folder)
    long = data.draw(st.integers(300, 1500))
    height, width = (long, data.draw(st.integers(1, 96)))[:: data.draw(st.sampled_from([1, -1]))]
    image = photo(height, width, data.draw(st.integers(0, 3)))
    with Segmenter(path, threads=2) as whole:
        assert all(stage.halo is not None for stage in whole.network.manifest.stages)
        assert not whole.plan(height, width).grids
        needed = whole.plan(height, width).bytes
        expected, labels = whole.network.scores(image), whole(image)
    with Segmenter(path, threads=2, memory=max(1, int(needed * data.draw(st.floats(0.2, 0.95))))) as tiled:
        try:
            plan = tiled.plan(height, width)
        except OverBudgetError:
            return
        assert sum(grid.count for grid in plan.grids) > len(plan.grids) and plan.bytes <= tiled.network.memory
        scores = tiled.network.scores(image)
        if int8:
            np.testing.assert_array_equal(scores, expected)
            np.testing.assert_array_equal(tiled(image), labels)
            return
        assert np.abs(scores - expected).max() <= 1e-5 * np.ptp(expected)
        best = np.partition(expected, -2, axis=0)[-2:]
        sure = (best[1] - best[0] > 1e-4 * np.ptp(expected)).all()
        assert (tiled(image) != labels).mean() < (1e-9 if sure else 1e-3)
        start = data.draw(st.integers(0, height - 1))
        rows = dict(tiled.bands(image, start))
        assert min(rows) == start
        assert (np.concatenate([rows[top] for top in sorted(rows)]) != labels[start:]).mean() < (1e-9 if sure else 1e-3)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_tiles_by_openvino_give_the_whole_images_scores(folder, data):
    needs("openvino")
    path = engine(data.draw(st.sampled_from((0, 1))), False, folder, "openvino")
    height, width = (data.draw(st.integers(600, 1300)), data.draw(st.integers(1, 64)))[
        :: data.draw(st.sampled_from([1, -1]))
    ]
    image = photo(height, width)
    with Segmenter(path, threads=2) as whole:
        assert whole.backend == "openvino"
        expected = whole.network.scores(image)
        with Segmenter(path, threads=2, memory=int(whole.plan(height, width).bytes * 0.6)) as tiled:
            assert tiled.plan(height, width).grids
            assert np.abs(tiled.network.scores(image) - expected).max() <= 1e-5 * np.ptp(expected)


def graph_of(nodes, constants, channels=3):
    return onnx_model(nodes, constants, takes=("N", channels, "H", "W"), names=("image", "logits"))


def with_global_pool(path):
    """A wide early part at full size, and a late one that looks at the whole image."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.normal(size=(64, 3, 3, 3)).astype(np.float32),
        "v": random.normal(size=(2, 64, 1, 1)).astype(np.float32),
        "u": random.normal(size=(2, 2, 3, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["a"], pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"], name="pool"),
        helper.make_node("Add", ["c", "g"], ["d"]),
        helper.make_node("Conv", ["d", "u"], ["logits"], pads=[1] * 4),
    ]
    onnx.save(graph_of(nodes, constants), path)


def test_a_network_with_a_global_layer_late_is_tiled_up_to_it(tmp_path):
    with_global_pool(tmp_path / "m.onnx")
    report = build_engine(
        import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", BuildConfig(latency_sizes=[(32, 32)])
    )
    assert [stage.tiles for stage in report.stages] == ["exact", "none: GlobalAveragePool pool"]
    image = photo(301, 203)
    with Segmenter(tmp_path / "m.engine") as whole:
        needed, expected = whole.plan(301, 203).bytes, whole(image)
        with Segmenter(tmp_path / "m.engine", memory=needed // 3) as tiled:
            first, second = tiled.plan(301, 203).grids
            assert first.count > 1 and second.count == 1
            np.testing.assert_array_equal(tiled(image), expected)
        with (
            Segmenter(tmp_path / "m.engine", memory=needed // 100) as tiled,
            pytest.raises(DeployError, match=r"part of the network cannot be cut into tiles \(GlobalAveragePool"),
        ):
            tiled(image)


def test_a_network_that_looks_at_the_whole_image_first_says_why_it_is_not_tiled(tmp_path):
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["g"], name="pool"),
        helper.make_node("Sub", ["image", "g"], ["a"]),
        helper.make_node("Conv", ["a", "w"], ["logits"]),
    ]
    weight = np.random.default_rng(0).normal(size=(2, 3, 1, 1)).astype(np.float32)
    onnx.save(graph_of(nodes, {"w": weight}), tmp_path / "m.onnx")
    report = build_engine(
        import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", BuildConfig(latency_sizes=[(32, 32)])
    )
    assert [stage.tiles for stage in report.stages] == ["none: GlobalAveragePool pool"]
    with (
        Segmenter(tmp_path / "m.engine", memory=10_000) as net,
        pytest.raises(DeployError, match=r"cannot be cut into tiles \(GlobalAveragePool pool\)"),
    ):
        net(photo(200, 200))


def test_tiles_that_turn_out_to_differ_are_not_used(monkeypatch):
    from fcn_deploy.export.analysis import receptive_field as receptive

    core, card = narrow(0)
    # As if the graph were misread: half the halo.
    monkeypatch.setattr(receptive.ReceptiveField, "halo", property(lambda self: (32, 32)))
    (part,) = cut_core(core, card)
    assert part.stage.halo is None and "differ from the whole image" in part.stage.whole


@pytest.mark.slow
def test_the_cut_leaves_little_to_do_twice(trained):
    core = core_of(import_model(trained / "camvid.onnx"))
    card = core.card
    from fcn_deploy.runtime.plan import plan_run

    parts = cut_core(optimise_offline(core.model), card)
    early, late = (part.stage for part in parts)
    assert max(early.halo) <= 96 and max(late.halo) <= 480 and late.bytes_per_pixel < early.bytes_per_pixel / 3
    whole = cut_core(optimise_offline(core.model), card, cut=False)[0].stage
    staged, single = (plan_run((20000, 20000), card, stages, 10**9) for stages in ((early, late), (whole,)))
    assert staged.overhead < 1.6 < 3 < single.overhead
    assert math.prod(staged.padded) == 20000 * 20000

"""The core in stages: tiles that give the whole image's scores, in every network and precision."""

import functools
import math
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from fcn_deploy.export.analysis.crossings import crossings
from fcn_deploy.export.build.config import DEFAULT_STAGES, BuildConfig, TuningOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.cut_stages import cut_core
from fcn_deploy.export.build.cutting_places import CuttingPlaces
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.working_memory import measure_tensors
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import OverBudgetError
from fcn_deploy.runtime.pixels.prepare import prepare
from helpers import FAMILY, checkpoint_of, needs, onnx_model, photo, random_network, save_photos
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from fcn_deploy import DeployError, ModelCard, Segmenter

CHOSEN = [family for family in FAMILY if family.get("stride") != 16 and family.get("upsampling") != "learned"]
# Each backbone once: those of stride 32 are the same but for their ends.
FINEST = [index for index, family in enumerate(CHOSEN) if family.get("stride") != 32 or family["backbone"] == "alexnet"]


@functools.cache
def imported(index):
    """A network of the family, as build-engine takes it."""
    model = random_network(width=0.125, **CHOSEN[index])
    with tempfile.TemporaryDirectory() as folder:
        export_module(model, checkpoint_of(model).card, Path(folder) / "m.onnx")
        return import_model(Path(folder) / "m.onnx")


@functools.cache
def narrow(index):
    """The core of a network of the family, and its card."""
    core = core_of(imported(index))
    return optimise_offline(core.model), core.card


@pytest.mark.parametrize("most", [2, 5])
@pytest.mark.parametrize("index", range(len(CHOSEN)), ids=lambda i: "-".join(map(str, CHOSEN[i].values())))
def test_stages_one_after_the_other_are_the_core(index, most):
    core, card = narrow(index)
    parts = cut_core(core, card, most)
    assert 1 <= len(parts) <= most and all(part.stage.halo is not None for part in parts)
    features = prepare(photo(70, 130), card)
    expected = session(core.SerializeToString()).run(["scores"], {"image": features})[0]
    for part in parts:
        onnx.checker.check_model(part.model)
        features = session(part.model.SerializeToString()).run([part.stage.output], {part.stage.input: features})[0]
    assert np.abs(features - expected).max() <= 1e-5 * np.ptp(expected)


@functools.cache
def engine(index, int8, folder, backend="onnxruntime", stages=DEFAULT_STAGES):
    """An engine of the family, in a folder of this run; on ONNX Runtime with stages for tiles alone, as by default."""
    path = folder / f"{index}-{int8}-{backend}.engine"
    save_photos(folder, [(90 + index, 100) for index in range(3)])
    options = (
        QuantizationOptions(int8=True, calib=str(folder / "*.png"), max_drop=100) if int8 else QuantizationOptions()
    )
    tuning = TuningOptions((backend,), stages=stages)
    config = BuildConfig(quantization=options, tuning=tuning, latency_sizes=[(32, 32)])
    build_engine(imported(index), path, config)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiled")


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_tiled_scores_are_the_whole_images(folder, int8, data):
    """Bit for bit in INT8, to 1e-5 of their range in float32; labels too, for any size, budget and backbone."""
    path = engine(data.draw(st.sampled_from(FINEST)), int8, folder)
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
            tiled.network.plan(height, width, kinds=("scores",))  # which take more than labels
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
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_tiles_by_openvino_give_the_whole_images_scores(folder, data):
    needs("openvino")
    path = engine(data.draw(st.sampled_from((0, 1))), False, folder, "openvino", stages=5)
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
        with Segmenter(tmp_path / "m.engine", memory=needed // 20) as tiled:
            assert len(tiled.plan(301, 203).passes) == 1  # beyond that
            assert (tiled(image) == expected).mean() > 0.999


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
    from fcn_deploy.export.build import cut_stages

    core, card = narrow(0)
    monkeypatch.setattr(cut_stages, "_known_stages", lambda *core: {})
    # As if the graph were misread: half the halo.
    monkeypatch.setattr(receptive.ReceptiveField, "halo", property(lambda self: (32, 32)))
    (part,) = cut_core(core, card)
    assert part.stage.halo is None and "differ from the whole image" in part.stage.whole


@pytest.mark.slow
def test_cuts_leave_little_to_do_twice(trained):
    core = core_of(import_model(trained / "camvid.onnx"))
    card = core.card
    from fcn_deploy.runtime.planning.plan import plan_run

    optimised, overheads = optimise_offline(core.model), []
    for most in (1, 2, 5):
        stages = [part.stage for part in cut_core(optimised, card, most)]
        plan = plan_run((20000, 20000), card, stages, 10**9)
        assert len(stages) == most and math.prod(plan.padded) == 20000 * 20000
        overheads.append(plan.overhead)
        if most == 2:
            early, late = stages
            assert max(early.halo) <= 96 and max(late.halo) <= 480
    assert overheads[0] > 3 and overheads[1] < 1.5 and overheads[2] < 1.3


def skipped(kind="float32"):
    """image → stride 2 → stride 8, whose scores are joined with those of stride 2; `kind`: of the deep features."""
    weights = np.random.default_rng(0).normal(size=(4, 4, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["a"], strides=[2, 2], pads=[0, 0, 1, 1]),
        helper.make_node("Conv", ["a", "w"], ["b"], strides=[4, 4], pads=[1, 1, 0, 0]),
        helper.make_node("QuantizeLinear", ["b", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("Conv", ["dq" if kind == "uint8" else "b", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["c", "w"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["d", "", "scales"], ["up"], mode="linear"),
        helper.make_node("Add", ["up", "a"], ["scores"]),
    ]
    constants = {
        "first": weights[:, :3], "w": weights, "scales": np.array([1, 1, 4, 4], np.float32),
        "scale": np.float32(0.02), "zero": np.uint8(128),
    }  # fmt: skip
    return onnx_model(nodes[:2] + (nodes[2:4] if kind == "uint8" else []) + nodes[4:], constants)


@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_maps_of_several_strides_cross_a_cut_as_one(kind):
    """Those of 8 bits beside floats as whole numbers, which are exact."""
    core, card = skipped(kind), ModelCard(("a", "b", "c", "d"), size_multiple=8)
    places = CuttingPlaces(core, card, measure_tensors(core, 64), lambda node: 1)
    image = np.random.default_rng(1).normal(size=(1, 3, 40, 48)).astype(np.float32)
    expected = session(core.SerializeToString(), optimise=False).run(["scores"], {"image": image})[0]
    several = [place for place in places.candidates if place.packed]
    assert [place.stride for place in several] == [8, 8, 8, 2]
    alone = CuttingPlaces(core, card, measure_tensors(core, 64), lambda node: 1, packed=False).candidates
    assert alone and not any(place.packed for place in alone)
    for place in several:
        features, result = image, None
        for part in (places.network(None, place), places.network(place, None)):
            onnx.checker.check_model(part)
            run = session(part.SerializeToString(), optimise=False)
            features = result = run.run(None, {part.graph.input[0].name: features})[0]
        np.testing.assert_array_equal(result, expected)


def test_no_cut_parts_an_operator_from_its_rounding():
    core, card = skipped("uint8"), ModelCard(("a", "b", "c", "d"), size_multiple=8)
    found = CuttingPlaces(core, card, measure_tensors(core, 64), lambda node: 1).candidates
    crossing = {name for place in found for name, _ in place.maps}
    assert "q" in crossing and not crossing & {"b", "dq"}


def test_maps_are_packed_only_where_every_size_has_whole_cells():
    core, tensors = skipped(), measure_tensors(skipped(), 64)
    for multiple, strides in ((8, {2, 8}), (2, {2}), (1, set())):
        card = ModelCard(("a", "b", "c", "d"), size_multiple=multiple)
        found = CuttingPlaces(core, card, dict(tensors), lambda node: 1).candidates
        assert {place.stride for place in found if place.packed} == strides


def test_of_a_skip_connection_the_scores_cross(trained):
    core = core_of(import_model(trained / "camvid.onnx"))
    tensors = measure_tensors(core.model)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    found = crossings(core.model, sizes)
    both = [crossing.maps for crossing in found if len(crossing.maps) == 2]
    assert any({tensors[name].shape[1] for name in maps} == {11, 112} for maps in both)
    assert found[-1].maps == ("scores",)

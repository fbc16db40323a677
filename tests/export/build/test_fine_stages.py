"""Stages for tiles alone: at no cost for whole images, without weights of their own, with the labels of the others."""

import gc
import json
import weakref
from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build import fine_stages
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.cut_stages import cut_core
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.targets import cpu
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.errors import MisuseError, OverBudgetError
from fcn_deploy.runtime.planning.plan import plan_fine, plan_run
from fcn_deploy.runtime.planning.working_memory import STEADY_RUNS
from helpers import photo, save_photos

from fcn_deploy import Segmenter


@pytest.fixture(scope="module")
def engine(exports, tmp_path_factory):
    """An engine of the narrow network, as build-engine makes it."""
    path = tmp_path_factory.mktemp("fine") / "fine.engine"
    tuning = TuningOptions(seconds=0.1, stages=1)
    build_engine(import_model(exports / "narrow.onnx"), path, BuildConfig(latency_sizes=[(64, 64)], tuning=tuning))
    return path


SIZE = (1300, 1100)


def by_fine_stages(net):
    """Give a Segmenter a budget in which an image of SIZE is run by the stages for tiles; its plan."""
    for net.network.memory in range(10_000_000, 200_000_000, 5_000_000):
        with suppress(OverBudgetError):
            if (plan := net.plan(*SIZE)).fine:
                return plan
    raise AssertionError("no budget is for them")


def test_tiles_have_the_labels_of_the_whole_image_and_whole_images_open_nothing_more(engine):
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    with Segmenter(engine, threads=1) as net:
        expected = net(image)
        assert not net.plan(*SIZE).grids and net.network.tiled._fine is None
        plan = by_fine_stages(net)
        assert plan.bytes <= net.network.memory and len(plan.grids) == len(net.network.manifest.fine)
        assert (net(image) != expected).mean() < 1e-4 and net.network.tiled._fine is not None
        for top, labels in net.bands(image, 123):
            assert (labels != expected[top : top + len(labels)]).mean() < 1e-4
        net.network._release()
        assert (net(image) != expected).mean() < 1e-4
    with pytest.raises(MisuseError, match="is closed"):
        _ = net.network.fine_backend


def test_what_images_do_not_need_any_more_is_closed_and_nothing_of_an_image_stays(engine):
    image, small = photo(*SIZE), photo(40, 50)
    with Segmenter(engine, threads=1) as net:
        assert by_fine_stages(net).fine
        expected, gone = net(image), weakref.ref(image)
        gc.disable()  # cycles would be found some time
        try:
            net(image)
            del image
            assert gone() is None
        finally:
            gc.enable()
        for _ in range(STEADY_RUNS):
            assert net.network.tiled._fine is not None
            net(small)
        assert net.network.tiled._fine is None
        np.testing.assert_array_equal(net(photo(*SIZE)), expected)


def test_the_arena_of_stages_for_tiles_shrinks_once_the_weights_in_it_are_gone(engine, monkeypatch):
    """It is the process's: what is free in it when the last of them is closed stays for good."""
    done = []
    for name in ("release", "close"):
        real = getattr(OnnxRuntimeSession, name)

        def noted(self, *given, name=name, real=real):
            done.append((name, id(self)))
            return real(self, *given)

        monkeypatch.setattr(OnnxRuntimeSession, name, noted)
    with Segmenter(engine, threads=1) as net:
        first, *others = map(id, net.network.fine_backend._sessions)
        done.clear()
        net.network.tiled.close()
    assert others and done[: len(others) + 2] == [
        *(("close", other) for other in others),
        ("release", first),
        ("close", first),
    ]


def test_int8_labels_of_stages_for_tiles_are_those_of_the_whole_image_bit_for_bit(exports, tmp_path):
    save_photos(tmp_path, [(90, 100), (97, 101)])
    config = BuildConfig(
        quantization=QuantizationOptions(int8=True, calib=str(tmp_path / "*.png"), max_drop=100, max_class_drop=100),
        latency_sizes=[(64, 64)],
        tuning=TuningOptions(("onnxruntime",), seconds=0.1, stages=1),
    )
    assert build_engine(import_model(exports / "narrow.onnx"), tmp_path / "i.engine", config).precision == "int8"
    image = photo(*SIZE)
    with Segmenter(tmp_path / "i.engine", threads=1) as net:
        expected = net(image)
        assert by_fine_stages(net).fine
        np.testing.assert_array_equal(net(image), expected)


def test_weights_are_in_the_file_once(engine, exports):
    with EngineFile(engine) as file:
        manifest = file.manifest
        assert len(manifest.fine) > len(manifest.stages)
        models = [onnx.load_from_string(file.read(stage.file)) for stage in manifest.fine]
    for model in models:
        for tensor in model.graph.initializer:
            assert tensor.external_data or len(tensor.raw_data) < fine_stages.LEAST_BYTES, tensor.name
    ours, theirs = engine.stat().st_size, (exports / "narrow.engine").stat().st_size
    assert ours < 1.5 * theirs


def test_an_arena_that_stages_share_lets_tiles_be_larger(engine):
    with EngineFile(engine) as file:
        manifest = file.manifest
    for memory in (100_000_000, 300_000_000):
        alone = plan_run((4000, 4000), manifest.card, manifest.fine, memory)
        shared = plan_fine((4000, 4000), manifest.card, manifest.fine, memory, 0)
        assert shared is not None and shared.bytes <= memory and shared.overhead < alone.overhead
    assert plan_fine((4000, 4000), manifest.card, manifest.fine, 1000, 0) is None


def test_stages_that_give_other_scores_are_left_out(engine, exports, monkeypatch):
    monkeypatch.setattr(fine_stages, "_gives_the_same", lambda net: False)
    path = engine.with_name("without.engine")
    config = BuildConfig(latency_sizes=[(64, 64)], tuning=TuningOptions(seconds=0.1, stages=1))
    build_engine(import_model(exports / "narrow.onnx"), path, config)
    with EngineFile(path) as file:
        assert file.manifest.fine == () and not any(name.startswith("fine") for name in file.manifest.members)


def test_whole_images_pay_for_no_cut_that_tiles_alone_need(exports, tmp_path, monkeypatch):
    # As if the only cut of this network were one that packs.
    monkeypatch.setattr(
        cpu, "cut_core", lambda *given, packed=True: cut_core(*given) if packed else cut_core(*given[:2], 1)
    )
    config = BuildConfig(latency_sizes=[(64, 64)], tuning=TuningOptions(seconds=0.1))
    for same, counts in ((True, (1, 2)), (False, (2, 0))):  # stages, and those for tiles alone
        monkeypatch.setattr(fine_stages, "_gives_the_same", lambda net, same=same: same)
        build_engine(import_model(exports / "narrow.onnx"), tmp_path / "a.engine", config)
        with EngineFile(tmp_path / "a.engine") as file:
            assert (len(file.manifest.stages), len(file.manifest.fine)) == counts


def test_engines_of_version_5_are_read_and_a_stage_for_tiles_without_a_halo_is_refused(engine):
    with EngineFile(engine) as file:
        manifest = file.manifest
    record = json.loads(manifest.to_json())
    del record["fine"]
    record["version"] = 5
    assert Manifest.from_json(json.dumps(record), "old.engine") == replace(manifest, fine=())
    with pytest.raises(ValueError, match="halo"):
        replace(manifest, fine=(replace(manifest.fine[0], halo=None),))

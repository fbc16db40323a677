"""OpenVINO as a backend: the same labels as PyTorch and ONNX Runtime, at sizes that change, from many threads."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.parity import decided
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.export.tolerances import GOLDEN_SAMPLE, REORDERED_SUMS
from fcn_deploy.runtime.backends import openvino as backend
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession, session
from fcn_deploy.runtime.backends.onnxruntime import profile as profile_by_onnxruntime
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.verify import verify
from helpers import check_threads, command, finished, needs, needs_shared, one_error, photo, save_photos
from onnx import TensorProto, helper, numpy_helper

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter

needs("openvino")

SIZES = [(1, 1), (1, 131), (97, 2), (31, 33), (37, 41), (64, 96), (61, 97), (127, 65), (200, 143), (257, 263)]


@pytest.fixture(scope="module")
def engine(exports, tmp_path_factory):
    """narrow.engine, made for OpenVINO."""
    path = tmp_path_factory.mktemp("openvino") / "m.engine"
    report = build_engine(
        import_model(exports / "narrow.onnx"),
        path,
        BuildConfig(latency_sizes=[(64, 64)], tuning=TuningOptions(("openvino",), seconds=1)),
    )
    assert report.backend == "openvino"
    return path


def test_labels_are_pytorchs_at_sizes_never_traced(engine, exports):
    import torch
    from fcn_deploy.fcn.checkpoint import load_checkpoint
    from fcn_deploy.runtime.pixels.prepare import prepare

    model = load_checkpoint(exports / "narrow.safetensors").model
    sides = np.random.default_rng(3).integers(1, 300, (20, 2))
    with Segmenter(engine) as net:
        assert net.backend == "openvino"
        for index, size in enumerate([*SIZES, *map(tuple, sides)]):
            image = photo(*size, index)
            x = prepare(image, net.card)[:, :, : size[0], : size[1]]
            with torch.inference_mode():
                logits = model(torch.from_numpy(x.copy()))[0].numpy()
            labels = net(image)
            assert labels.shape == tuple(size) and labels.dtype == np.uint8
            differs = labels != logits.argmax(0)
            assert not (differs & decided(logits, net.card)).any(), size


def test_images_of_a_few_sizes_are_run_in_one_stage(engine, exports):
    with EngineFile(engine) as one, EngineFile(exports / "narrow.engine") as two:
        assert len(one.manifest.stages) == 1 and len(two.manifest.stages) == 2
        assert one.manifest.stages[0].halo is not None, "it is run in tiles where memory asks for them"


def test_float32_is_not_run_in_bfloat16(engine, exports):
    """On CPUs that have bfloat16 it is OpenVINO's default, and errs by a hundredth of the scores' range."""
    with Segmenter(engine) as net, Segmenter(exports / "narrow.engine") as plain:
        image = photo(200, 300)
        ours, theirs = net.network.scores(image), plain.network.scores(image)
        assert np.abs(ours - theirs).max() < 0.1 * REORDERED_SUMS * np.ptp(theirs)


def test_many_threads_share_one_engine(engine):
    images = [photo(20 + 13 * i, 150 - 11 * i, i) for i in range(10)]
    for threads in (None, 1):
        with Segmenter(engine, threads=threads) as net:
            check_threads(net, images)


def test_results_stay_when_the_next_image_runs(engine):
    """Nothing is copied out, so each result must have memory of its own."""
    with Segmenter(engine) as net:
        first = net.network.scores(photo(90, 70, 1))
        kept = first.copy()
        for index in range(3):
            net.network.scores(photo(90, 70, index + 2))
        np.testing.assert_array_equal(first, kept)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_sizes(engine):
    """With OpenVINO's own default each new size keeps its kernels: 150 MB here."""

    def resident():
        with Path("/proc/self/status").open() as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

    sizes = [(h * 32, w * 32) for h in range(1, 19) for w in range(1, 19)]
    np.random.default_rng(0).shuffle(sizes)
    with Segmenter(engine) as net:
        images = np.zeros((18 * 32, 18 * 32, 3), np.uint8)
        net(images)
        for height, width in sizes[:100]:
            net(images[:height, :width])
        before = resident()
        for height, width in sizes[100:]:
            net(images[:height, :width])
        assert resident() - before < 40, "MB"


def test_streams_of_a_session_share_the_budget(engine, monkeypatch):
    """Each keeps the memory of its largest run, and which of them a call meets is not known."""
    monkeypatch.setattr(backend.os, "cpu_count", lambda: 4)
    size, shares = (4000, 4000), {}
    for memory, streams in ((None, 4), (600_000_000, 1), (2_500_000_000, 2)):
        with Segmenter(engine, threads=1, memory=memory) as net:
            assert net.network.backend.streams == streams
            shares[memory] = net.network.plan(*size).bytes
    with Segmenter(engine, threads=4, memory=1_250_000_000) as net:
        assert net.network.plan(*size).bytes == shares[2_500_000_000] <= 1_250_000_000


def test_a_small_budget_does_not_have_kernels_of_many_sizes_beside_it(engine):
    """In processes of their own: what oneDNN keeps is of the process, and told before its first run."""
    code = f"""
import os, numpy as np
from fcn_deploy import Segmenter
from fcn_deploy.runtime.process_memory import give_back_freed, resident
with Segmenter({str(engine)!r}, threads=1, memory=MEMORY) as net:
    release = net.network.backend.release
    net(np.zeros((64, 64, 3), np.uint8)); release(); before = resident()
    for side in range(96, 96 + 32 * 12, 32):
        net(np.zeros((side, 96, 3), np.uint8))
    release()
    print(resident() - before, sorted(name for name in os.environ if name.endswith("CACHE_CAPACITY")))
"""
    kept = {}
    for memory in (None, 900_000_000):
        done = finished([sys.executable, "-c", code.replace("MEMORY", str(memory))])
        figure, rest = done.stdout.split(maxsplit=1)
        kept[memory] = int(figure)
        assert rest.strip() == "[]"
    assert kept[900_000_000] < 0.6 * kept[None], kept


def add_core(kind):
    """A core that adds 1 to its input, of any element type."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "one"], ["b"]), helper.make_node("Identity", ["a"], ["c"])],
        "g",
        [helper.make_tensor_value_info("a", kind, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(name, kind, ["N", 3, "H", "W"]) for name in ("b", "c")],
        [numpy_helper.from_array(np.ones((1, 1, 1, 1), helper.tensor_dtype_to_np_dtype(kind)), "one")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.UINT8])
@pytest.mark.parametrize("library", [backend.OpenVinoSession, OnnxRuntimeSession])
def test_both_backends_take_names_and_element_types(kind, library):
    run = library(add_core(kind), "a", "b", threads=1)
    for size in ((1, 1), (5, 7), (3, 2)):
        x = np.arange(3 * size[0] * size[1]).reshape(1, 3, *size).astype(helper.tensor_dtype_to_np_dtype(kind))
        result = run.run(x)
        assert result.dtype == x.dtype
        np.testing.assert_array_equal(result, x + 1)
    np.testing.assert_array_equal(library(add_core(kind), "a", "c").run(x[:, :, ::-1]), x[:, :, ::-1])
    run.close()


@pytest.mark.parametrize("library", [backend.profile, profile_by_onnxruntime])
def test_layers_are_timed(exports, library):
    with EngineFile(exports / "narrow.engine") as file:
        model = file.read("stage-0.onnx")  # the early part
    x = np.random.default_rng(0).normal(size=(1, 3, 96, 64)).astype(np.float32)
    layers, scores = library(model, x, runs=2)
    np.testing.assert_allclose(scores, OnnxRuntimeSession(model).run(x), atol=1e-4 * np.ptp(scores))
    assert sum("Conv" in layer.operator for layer in layers) > 10
    assert all(layer.milliseconds >= 0 for layer in layers) and sum(layer.milliseconds for layer in layers) > 0


def test_what_it_cannot_load_or_run_is_one_line(engine):
    for bad in (b"junk", b"", add_core(TensorProto.FLOAT)[:-20]):
        with pytest.raises(DeployError, match=r"OpenVINO cannot load the network of x\.engine") as caught:
            backend.OpenVinoSession(bad, source="x.engine")
        assert "\n" not in str(caught.value)
    with pytest.raises(DeployError, match="nope"):
        backend.OpenVinoSession(add_core(TensorProto.FLOAT), "nope")
    run = backend.OpenVinoSession(add_core(TensorProto.FLOAT))
    for wrong in (np.zeros((1, 4, 8, 8), np.float32), np.zeros((1, 3, 8, 8), np.uint8)):
        with pytest.raises(DeployError, match=r"failed on an input of \[1, \d, 8, 8\]") as caught:
            run.run(wrong)
        assert "\n" not in str(caught.value)
    assert run.run(np.zeros((1, 3, 2, 2), np.float32)).sum() == 12  # and it goes on


@pytest.fixture
def without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)


def test_without_openvino_onnxruntime_runs_the_engine_and_says_so(engine, exports, without_openvino, caplog):
    with caplog.at_level(logging.WARNING), Segmenter(engine) as net, Segmenter(exports / "narrow.engine") as plain:
        assert net.backend == "onnxruntime"
        np.testing.assert_array_equal(net(photo(61, 97)), plain(photo(61, 97)))
    (record,) = caplog.records
    assert "not installed" in record.getMessage() and "fcn-deploy[openvino]" in record.getMessage()
    assert str(engine) in record.getMessage()


def test_without_openvino_the_backend_is_one_line(without_openvino):
    with pytest.raises(DeployError, match=r"pip install 'fcn-deploy\[openvino\]'"):
        backend.OpenVinoSession(b"")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of three convolutions: its ONNX, and photographs of eight sizes beside it."""
    import torch
    from fcn_deploy.export.from_torch import export_module
    from torch import nn

    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 4, 1),
        nn.Upsample(scale_factor=4, mode="bilinear"),
    ).eval()  # fmt: skip
    folder = tmp_path_factory.mktemp("small")
    export_module(model, ModelCard(("a", "b", "c", "d"), stride=4, size_multiple=4), folder / "m.onnx")
    save_photos(folder, [(60 + 9 * index, 130 - 7 * index) for index in range(8)])
    return folder / "m.onnx"


@pytest.mark.slow
def test_build_engine_without_openvino_is_one_line(small, tmp_path):
    (tmp_path / "openvino.py").write_text("raise ImportError('none')")
    words = ["build-engine", small, "-o", tmp_path / "m.engine", "--sizes", "33x33", "--json"]
    without = {"PYTHONPATH": str(tmp_path)}
    done = command(*words, "--backend", "openvino", ok=1, env=without)
    assert "openvino is not installed; run: pip install 'fcn-deploy[openvino]'" in one_error(done)
    assert not (tmp_path / "m.engine").exists()
    report = json.loads(command(*words, env=without).stdout)
    assert {row["backend"] for row in report["candidates"]} == {"onnxruntime"}


def test_a_manifest_names_a_backend_this_release_knows(engine):
    with EngineFile(engine) as file:
        text = file.manifest.to_json()
    assert Manifest.from_json(text, "x").backend == "openvino"
    older = {name: value for name, value in json.loads(text).items() if name != "backend"}
    assert Manifest.from_json(json.dumps(older), "x").backend == "onnxruntime"
    with pytest.raises(DeployError, match="backend 'abacus'; this release knows onnxruntime, openvino"):
        Manifest.from_json(text.replace('"backend": "openvino"', '"backend": "abacus"'), "x")


@pytest.mark.slow
def test_int8_is_judged_and_verified_by_its_own_kernels(small, tmp_path):
    source = import_model(small)
    options = QuantizationOptions(int8=True, calib=str(small.parent), max_drop=5)
    for name in ("onnxruntime", "openvino"):
        report = build_engine(
            source,
            tmp_path / f"{name}.engine",
            BuildConfig(latency_sizes=[(64, 64)], quantization=options, tuning=TuningOptions((name,), seconds=1)),
        )
    by = report.accuracy.by_backend
    assert set(by) == {"onnxruntime", "openvino"} and report.accuracy.int8 == by["openvino"]
    assert all(value > 0.95 for value in by.values())
    assert verify(tmp_path / "openvino.engine")["passed"]
    with Segmenter(tmp_path / "openvino.engine") as net, Segmenter(tmp_path / "onnxruntime.engine") as other:
        assert (net.backend, net.precision) == ("openvino", "int8")
        for size in SIZES:
            scores, expected = net.network.scores(photo(*size)), other.network.scores(photo(*size))
            assert np.abs(scores - expected).max() < 0.03 * np.ptp(expected), size


def strided_core(kernel=3, stride=2, width="W", depthwise=False):
    """A u8·s8 convolution with a stride as build-engine writes it, before which the width may be fixed."""
    weights = np.random.default_rng(0).integers(-64, 64, (16, 1 if depthwise else 16, kernel, kernel)).astype(np.int8)
    one = numpy_helper.from_array(np.float32(1), "one")
    zeros = [numpy_helper.from_array(np.zeros((), kind), name) for kind, name in ((np.uint8, "zu"), (np.int8, "zs"))]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zu"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zu"], ["dq"]),
        helper.make_node("DequantizeLinear", ["w", "one", "zs"], ["wd"]),
        helper.make_node(
            "Conv", ["dq", "wd"], ["y"], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4,
            group=16 if depthwise else 1,
        ),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, "H", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16, "h", "w"])],
        [numpy_helper.from_array(weights, "w"), one, *zeros],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (4, 4), (3, 1)])
def test_int8_is_right_on_maps_one_column_wide(kernel, stride):
    """OpenVINO's kernels for AMX are not; on CPUs without it this cannot fail."""
    model = strided_core(kernel, stride)
    run, reference = backend.OpenVinoSession(model), session(model, optimise=False)
    for height in (1, 4, 20, 64, 500):
        for width in (64, 1, 2, 9, 3, 4, 5, 2):
            x = np.random.default_rng(width).integers(0, 128, (1, 16, height, width)).astype(np.float32)
            expected = reference.run(None, {"x": x})[0]
            assert np.abs(run.run(x) - expected).max() <= 1e-5 * np.ptp(expected), (height, width)
    run.close()
    with pytest.raises(MisuseError, match="was closed"):
        run.run(np.zeros((1, 16, 20, 2), np.float32))


def test_maps_one_column_wide_are_told_from_the_network():
    from openvino import Core

    def narrow(*args, **kwargs):
        return backend.NarrowMaps(Core().read_model(strided_core(*args, **kwargs)))

    maps = narrow()
    assert maps.possible
    # In an order that asks at both sides of what is known already.
    for width, expected in ((64, False), (2, True), (3, False), (1, True), (2, True), (4, False), (1000, False)):
        assert maps.met_by((1, 16, 20, width)) == expected, width
    assert not narrow().met_by((1, 7, 20, 1)), "the wrong number of channels: running it says so"
    assert narrow(4, 4).met_by((1, 16, 20, 5)) is False and narrow(4, 4).met_by((1, 16, 20, 3))
    assert narrow(width=2).met_by((1, 16, 20, 2)) and not narrow(width=64).met_by((1, 16, 20, 64))
    assert not narrow(3, 1).possible and not narrow(depthwise=True).possible


def test_what_amx_errs_on_is_never_run_by_it(monkeypatch):
    """As on a CPU with AMX, whichever this is."""
    monkeypatch.setattr(backend, "uses_amx", lambda compiled: True)
    run = backend.OpenVinoSession(strided_core())
    with pytest.raises(DeployError, match=r"narrow as this.*--backend onnxruntime"):
        run.run(np.zeros((1, 16, 20, 2), np.float32))  # not even in float: so it says
    assert run.run(np.zeros((1, 16, 20, 20), np.float32)).shape == (1, 16, 10, 10)


def pooled_branch(sizes):
    """A branch of u8·s8 convolutions, pooled and resized to the size of a map, which is read as `sizes` says."""
    random, constants = np.random.default_rng(0), {"unit": np.float32(1 / 64), "zu": np.uint8(0), "zs": np.int8(0)}
    nodes = []

    def quantised(name):
        nodes.append(helper.make_node("QuantizeLinear", [name, "unit", "zu"], [f"{name} q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name} q", "unit", "zu"], [f"{name} dq"]))
        return f"{name} dq"

    def convolution(name, source, kernel):
        constants[f"{name} w"] = random.integers(-9, 10, (16, 16, kernel, kernel)).astype(np.int8)
        constants[f"{name} b"] = random.normal(1, 2, 16).astype(np.float32)
        nodes.append(helper.make_node("DequantizeLinear", [f"{name} w", "unit", "zs"], [f"{name} wd"]))
        inputs, pads = [source, f"{name} wd", f"{name} b"], [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", inputs, [name], kernel_shape=[kernel] * 2, pads=pads))
        return quantised(name)

    features = convolution("features", quantised("x"), 3)
    nodes.append(helper.make_node("GlobalAveragePool", [features], ["mean"]))
    mean = convolution("projected", quantised("mean"), 1)
    nodes.append(helper.make_node("Shape", [features], ["shape"]))
    constants |= {name: np.array([value]) for name, value in (("0", 0), ("2", 2), ("3", 3), ("4", 4))}
    constants |= {"start": np.array([1, 16]), "scalar 2": np.int64(2), "scalar 3": np.int64(3)}
    for side, place, after in (("h", "2", "3"), ("w", "3", "4")):
        if sizes == "scalars":
            nodes.append(helper.make_node("Gather", ["shape", f"scalar {place}"], [f"{side} of"]))
            nodes.append(helper.make_node("Unsqueeze", [f"{side} of", "0"], [side]))
        else:
            nodes.append(helper.make_node("Slice", ["shape", place, after, "0"], [side]))
    nodes.append(helper.make_node("Concat", ["start", "h", "w"], ["sizes"], axis=0))
    nodes.append(helper.make_node("Resize", [mean, "", "", "sizes"], ["resized"], mode="linear"))
    nodes.append(helper.make_node("Add", [convolution("other", features, 1), "resized"], ["y"]))
    free = ["N", 16, "H", "W"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, free)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 16, "h", "w"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("sizes", ["scalars", "slices"])
def test_int8_keeps_the_biases_of_maps_whose_sizes_are_read(sizes, integers):
    """OpenVINO drops them by itself; in float arithmetic it reads weights of 1×1 wrongly."""
    model = pooled_branch(sizes)
    run, reference = backend.OpenVinoSession(model, integers=integers), session(model, optimise=False)
    for size in ((8, 12), (37, 41), (64, 20)):
        x = np.random.default_rng(1).uniform(0, 3, (1, 16, *size)).astype(np.float32)
        expected = reference.run(None, {"x": x})[0]
        assert np.ptp(expected) > 3
        # Rounding to the next step may differ.
        assert np.abs(run.run(x) - expected).max() < 4 / 64, size


@pytest.mark.slow
def test_int8_that_misses_its_golden_sample_is_not_run_by_it(small, tmp_path, monkeypatch):
    """As networks do that INT8 distorts: rounding then differs between libraries by more than verify-engine allows."""
    monkeypatch.setitem(GOLDEN_SAMPLE, "int8", 1e-6)
    options = QuantizationOptions(int8=True, calib=str(small.parent), max_drop=100)
    tuning = TuningOptions(("onnxruntime", "openvino"), seconds=1)
    config = BuildConfig(quantization=options, tuning=tuning, latency_sizes=[(64, 64)])
    report = build_engine(import_model(small), tmp_path / "m.engine", config)
    refused = {(row.backend, row.precision): row.refused for row in report.candidates}
    assert "golden sample" in refused["openvino", "int8"] and report.backend == "onnxruntime"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["rubbish", "a twentieth of a strip's range"])
def test_int8_that_errs_on_strips_is_not_chosen(fault, tmp_path, monkeypatch):
    """As OpenVINO's kernels for AMX do, were they not kept from them. Of a strip 31 columns of 32 are padding here, so
    its scores lie close together, and a twentieth of that is what kernels round to."""
    from fcn_deploy.export.from_torch import export_module
    from torch import nn

    right = backend.OpenVinoSession.run

    def wrong(self, x):
        scores = right(self, x)
        strip = min(sorted(x.shape)[1:3]) <= 33 and max(x.shape) >= 192  # of [1, H, W, 3] or [1, 3, H, W]
        return scores + strip * (9 if fault == "rubbish" else np.ptp(scores) / 20)

    monkeypatch.setattr(backend.OpenVinoSession, "run", wrong)
    model = nn.Sequential(nn.Conv2d(3, 16, 32, 32), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.Upsample(scale_factor=32))
    export_module(model.eval(), ModelCard(("a", "b", "c", "d"), stride=32, size_multiple=32), tmp_path / "m.onnx")
    save_photos(tmp_path, [(60 + 9 * index, 130 - 7 * index) for index in range(8)])
    options = QuantizationOptions(int8=True, calib=str(tmp_path), max_drop=100)
    tuning = TuningOptions(("onnxruntime", "openvino"), seconds=1)
    config = BuildConfig(quantization=options, tuning=tuning, latency_sizes=[(64, 64)])
    report = build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", config)
    refused = {(row.backend, row.precision): row.refused for row in report.candidates}["openvino", "int8"]
    if fault == "rubbish":
        assert "of 192×1 pixels" in refused and report.backend == "onnxruntime"
    else:
        assert not refused


@pytest.mark.slow
def test_int8_keeps_its_miou_on_photographs(trained, tmp_path):
    """The network that serves as the yardstick, u8·s8, on photographs that calibration did not see."""
    camvid = needs_shared("camvid")
    options = QuantizationOptions(int8=True, calib=str(camvid / "train"), count=20, labels=camvid / "trainannot")
    tuning = TuningOptions(("openvino",), seconds=1)
    config = BuildConfig(quantization=options, tuning=tuning, latency_sizes=[(64, 64)])
    report = build_engine(import_model(trained / "camvid.onnx"), tmp_path / "m.engine", config)
    assert verify(tmp_path / "m.engine")["passed"]
    accuracy = report.accuracy
    assert accuracy.metric == "mIoU" and accuracy.images_judged == 40
    assert accuracy.float32 - accuracy.by_backend["openvino"] < 0.005
    assert abs(accuracy.by_backend["openvino"] - accuracy.by_backend["onnxruntime"]) < 0.005

"""Engines of several outputs: each head's results are the foreign model's, whole and in tiles, and of one run."""

import json
import pickle
from dataclasses import replace

import numpy as np
import onnx
import pytest
from fcn_deploy.calibration.stream import open_stream
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.core import optimise_offline
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.joined_heads import core_of_heads
from fcn_deploy.export.cli.model_options import Activation, ModelOptions
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.quantization.gate import AccuracyGate
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.sizes import parse_sizes
from foreign_onnx import FEATURES, SCORES, SIZES, TO_SIZE, made, planes, ran
from gpu_engines import ready
from helpers import command, needs, one_error, photo, save_photos
from serving import serving

from fcn_deploy import DeployError, MisuseError, Segmenter

DEPTH = """
  d0 = Conv(r2, wp, bp)
  shd = Shape(d0)
  nd = Slice(shd, i0, i2)
  sd = Concat<axis=0>(nd, hw)
  depth = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(d0, , , sd)
"""
# Of a finer map, by another rule, and with probabilities.
FINE = """
  e0 = Conv(r1, w2c)
  she = Shape(e0)
  ne = Slice(she, i0, i2)
  se = Concat<axis=0>(ne, hw)
  e1 = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(e0, , , se)
  edges = Softmax<axis=1>(e1)
"""
OUTPUTS = {"depth": "float[N,1,H,W] depth", "edges": "float[N,2,H,W] edges"}
FAST = BuildConfig(latency_sizes=((16, 16),), tuning=TuningOptions(("onnxruntime",)))


def two(other):
    """Scores of 4 classes, and another output."""
    text = SCORES + TO_SIZE + "y = Identity(f)" + {"depth": DEPTH, "edges": FINE}[other]
    return made(text, gives=f"float[N,4,H,W] y, {OUTPUTS[other]}")


def named(other, **said):
    return ImportOptions(output="y", further=(ImportOptions(output=other, **said),))


def built(folder, model, options):
    onnx.save(model, folder / "two.onnx")
    return build_engine(import_model(folder / "two.onnx", options), folder / "two.engine", FAST)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """(folder with two.onnx and two.engine: classes `y` and values `depth`; the report)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, built(folder, two("depth"), named("depth", activation="none"))


def test_each_output_gives_what_the_model_gives_at_sizes_never_seen(engine):
    folder, report = engine
    assert report.agreement.wrong == 0 and report.further_agreements["depth"].difference < 1e-4
    model = onnx.load(folder / "two.onnx")
    with Segmenter(folder / "two.engine") as net, Segmenter(folder / "two.engine", output="depth") as depth:
        assert [card.activation for card in net.outputs.values()] == ["softmax", "none"]
        for height, width in SIZES:
            image = photo(height, width)
            scores, expected = ran(model, {"p": planes(image)})
            labels, values = net.results(image, "labels", "depth/values")
            np.testing.assert_array_equal(labels, net(image))
            assert (labels == scores[0].argmax(0)).mean() > 0.999
            np.testing.assert_allclose(values, expected[0], atol=1e-4)
            np.testing.assert_array_equal(depth.values(image), values)
            np.testing.assert_array_equal(depth.results(image, "y/labels")[0], labels)
            coarse = depth.heatmap(image)
            assert coarse.shape == (1, -(-height // 4), -(-width // 4))


def test_what_outputs_share_is_computed_once(engine):
    with EngineFile(engine[0] / "two.engine") as file:
        stages = [onnx.load_from_string(file.read(stage.file)) for stage in file.manifest.stages]
        assert [head.name for head in file.manifest.heads] == ["y", "depth"]
    operators = [node.op_type for stage in stages for node in stage.graph.node]
    assert operators.count("Conv") == 4  # two of the trunk, and one of each output
    assert "Resize" not in operators  # both are enlarged by the runtime


def test_tiles_and_streams_and_bands_give_what_the_whole_gives(engine):
    path, image = engine[0] / "two.engine", photo(700, 500)
    with Segmenter(path) as whole, Segmenter(path, memory=10_000_000) as tiled:
        assert tiled.plan(700, 500).grids and not whole.plan(700, 500).grids
        for kind in ("labels", "probabilities", "depth/values"):
            expected = whole.results(image, kind)[0]
            np.testing.assert_allclose(tiled.results(image, kind)[0], expected, atol=1e-4)
            np.testing.assert_array_equal(next(whole.map([image], kind=kind)), expected)
            bands = np.concatenate([rows for _, rows in tiled.bands(image, kind=kind)], axis=-2)
            np.testing.assert_allclose(bands, expected, atol=1e-4)
        again = pickle.loads(pickle.dumps(whole))
        np.testing.assert_array_equal(again(image), whole(image))
        again.close()


def test_outputs_of_other_strides_are_enlarged_in_the_network(tmp_path):
    model = two("edges")
    report = built(tmp_path, model, named("edges"))
    assert report.head == "none" and report.stride == 1
    assert report.further_agreements["edges"].wrong == 0
    with Segmenter(tmp_path / "two.engine") as net:
        for height, width in SIZES:
            image = photo(height, width)
            scores, edges = ran(model, {"p": planes(image)})
            labels, other, shares = net.results(image, "labels", "edges/labels", "edges/probabilities")
            assert (labels == scores[0].argmax(0)).mean() > 0.999
            assert (other == edges[0].argmax(0)).mean() > 0.999
            np.testing.assert_allclose(shares, edges[0], atol=1e-4)


def test_pixels_without_data_are_marked_in_each_output(engine):
    image, valid = photo(30, 40), np.ones((30, 40), bool)
    valid[:5] = False
    with Segmenter(engine[0] / "two.engine") as net:
        labels, depth = net.results(image, "labels", "depth/values", valid=valid)
    assert (labels[:5] == 255).all() and np.isnan(depth[:, :5]).all()
    assert (labels[5:] < 4).all() and np.isfinite(depth[:, 5:]).all()


def test_other_names_and_kinds_are_refused(engine, exports):
    path, image = engine[0] / "two.engine", photo(20, 20)
    with Segmenter(path) as net:
        with pytest.raises(MisuseError, match="it has y, depth"):
            net.results(image, "flow/values")
        with pytest.raises(MisuseError, match=r"gives depth/values \(none\), not depth/labels"):
            net.results(image, "depth/labels")
        with pytest.raises(MisuseError, match="choose labels"):
            net.results(image, "depth/colours")
    with pytest.raises(MisuseError, match=r"output 'flow' of .*it has y, depth"):
        Segmenter(path, output="flow")
    with pytest.raises(MisuseError, match="it has one, without a name; omit it"):
        Segmenter(exports / "narrow.engine", output="y")


def test_what_is_for_one_output_is_refused(tmp_path, engine):
    save_photos(tmp_path, [(20, 20)])
    labelled = QuantizationOptions(int8=True, calib=str(tmp_path), labels=tmp_path)
    source = import_model(engine[0] / "two.onnx", named("depth", activation="none"))
    with pytest.raises(DeployError, match="--labels are of one output, and this engine has y, depth"):
        build_engine(source, tmp_path / "x.engine", replace(FAST, quantization=labelled))
    assert not (tmp_path / "x.engine").exists()


def test_a_plan_gives_every_output(tmp_path, engine, gpu):
    """Whole, in tiles, in batches; by the simulated GPU, whose labels of one output alone would be of all scores."""
    needs("tensorrt_rtx")
    source = import_model(engine[0] / "two.onnx", named("depth", activation="none"))
    config = BuildConfig(target="sm89", sizes=parse_sizes("1x1:64x64:96x96"))
    build_engine(source, tmp_path / "plan.engine", config)
    core = optimise_offline(core_of_heads(source).model).SerializeToString()
    for path in ready(gpu, (tmp_path / "plan.engine", core), tmp_path, "tensorrt_rtx"):
        with (
            Segmenter(path) as net,
            Segmenter(path, output="depth") as depth,
            Segmenter(engine[0] / "two.engine") as cpu,
        ):
            assert net.network.on_gpu and list(net.outputs) == ["y", "depth"]
            for size in ((37, 61), (1, 5), (150, 70)):
                image = photo(*size)
                labels, values = net.results(image, "labels", "depth/values")
                expected, other = cpu.results(image, "labels", "depth/values")
                np.testing.assert_array_equal(net(image), labels)
                assert (labels == expected).mean() > 0.999 and set(np.unique(labels)) <= {0, 1, 2, 3}
                np.testing.assert_allclose(values, other, atol=1e-4)
                np.testing.assert_array_equal(depth.values(image), values)
            images = [photo(40, 40, seed) for seed in range(3)]
            for image, labels in zip(images, net.map(images), strict=True):
                np.testing.assert_array_equal(labels, net(image))


@pytest.mark.parametrize(("target", "precision"), [("cpu", "int8"), ("ort-cuda", "float16")])
def test_low_precision_is_judged_by_every_output(tmp_path, engine, target, precision):
    save_photos(tmp_path / "photos", [(40, 56), (64, 48), (33, 47), (70, 50), (64, 64), (48, 80)])
    asked = {"int8": precision == "int8", "fp16": precision == "float16"}
    options = QuantizationOptions(calib=str(tmp_path / "photos"), max_drop=3.0, **asked)
    source = import_model(engine[0] / "two.onnx", named("depth", activation="none"))
    config = replace(FAST, quantization=options) if target == "cpu" else BuildConfig(target, options)
    report = build_engine(source, tmp_path / "low.engine", config)
    assert report.precision == precision and 0 <= report.accuracy.drop_points <= 3
    core = core_of_heads(source)
    images = open_stream(str(tmp_path / "photos"), core.card)
    gate = AccuracyGate(
        core.model, core.upsampling, core.card, images, None, max_drop=3.0, kernels_exact=True, heads=core.heads
    )
    assert gate.holds(gate.measure(core.model)) and gate.classes[:2] == ["y/class 0", "y/class 1"]
    spoilt = onnx.load_from_string(core.model.SerializeToString())  # the classes as they are, and depth otherwise
    joined = next(node for node in spoilt.graph.node if node.output[0] == "scores")
    spoilt.graph.node.insert(len(spoilt.graph.node) - 1, onnx.helper.make_node("Neg", [joined.input[1]], ["otherwise"]))
    joined.input[1] = "otherwise"
    assert not gate.holds(gate.measure(spoilt)) and gate.sensitivity(spoilt) > 1
    if target == "cpu":
        with Segmenter(tmp_path / "low.engine") as low, Segmenter(engine[0] / "two.engine") as net:
            image = photo(50, 61)
            labels, depth = low.results(image, "labels", "depth/values")
            before, values = net.results(image, "labels", "depth/values")
        assert (labels == before).mean() > 0.9 and np.abs(depth - values).mean() < 0.05 * np.ptp(values)


def test_a_manifest_whose_outputs_contradict_it_is_refused(engine):
    with EngineFile(engine[0] / "two.engine") as file:
        manifest = file.manifest
    text = manifest.to_json()
    assert json.loads(text)["version"] == 6 and Manifest.from_json(text, "m") == manifest
    for change in (
        {"heads": (manifest.heads[0], replace(manifest.heads[1], name="y"))},
        {"heads": manifest.heads[::-1]},
    ):
        with pytest.raises(ValueError, match="output"):
            replace(manifest, **change)
    for damaged in ({"name": ""}, {"activation": "guess"}, {"activated": 1}, {"classes": 3}, {"colors": [[0]]}):
        data = json.loads(text)
        data["heads"][1] |= damaged
        with pytest.raises(DeployError, match="damaged manifest"):
            Manifest.from_json(json.dumps(data), "m")


def test_the_server_lists_and_gives_every_output(engine):
    path, image = engine[0] / "two.engine", photo(37, 41)
    with serving(path) as (client, _), Segmenter(path, threads=2) as net:
        about = client.json("/v2/models/two")
        outputs = {each["name"]: (each["datatype"], each["shape"]) for each in about["outputs"]}
        assert outputs["labels"] == ("UINT8", [-1, -1]) and outputs["depth/values"] == ("FP32", [1, -1, -1])
        assert about["parameters"]["heads"]["depth"]["kind"] == "values"
        found = client.infer("two", image, "labels", "depth/values")
        labels, depth = net.results(image, "labels", "depth/values")
        np.testing.assert_array_equal(found["labels"], labels)
        np.testing.assert_array_equal(found["depth/values"], depth)
        body = json.dumps({"inputs": [], "outputs": [{"name": "flow/values"}]})
        client.error(400, "POST", "/v2/models/two/infer", body)


def test_commands_build_and_write_outputs_by_name(tmp_path):
    onnx.save(two("depth"), tmp_path / "two.onnx")
    save_photos(tmp_path / "in", [(20, 30)])
    words = ("build-engine", tmp_path / "two.onnx", "-o", tmp_path / "two.engine", "--sizes", "16x16")
    words += ("--backend", "onnxruntime", "--output", "y,depth", "--activation", "softmax", "--activation", "none")
    done = command(*words, "--classes", "a,b,c,d", "--classes", "metres,")
    assert "output depth: values differ from" in done.stdout
    with Segmenter(tmp_path / "two.engine") as net:
        assert net.outputs["depth"].classes == ("metres",) and net.card.classes == ("a", "b", "c", "d")
    assert "depth: values" in command("inspect-model", tmp_path / "two.engine").stdout
    labels = ("label-images", tmp_path / "two.engine", tmp_path / "in", "-o")
    command(*labels, tmp_path / "labels")
    command(*labels, tmp_path / "depths", "--output", "depth")
    assert [path.suffix for path in sorted((tmp_path / "labels").iterdir())] == [".png"]
    assert [path.suffix for path in sorted((tmp_path / "depths").iterdir())] == [".tif"]
    assert "it has y, depth" in one_error(command(*labels, tmp_path / "x", "--output", "flow", ok=2))


@pytest.mark.parametrize(
    ("said", "refusal"),
    [
        ({"output": "y,"}, "name each output once"),
        ({"output": "y,y"}, "name each output once"),
        ({"output": "y,depth", "classes": ["a,b,c,d"]}, "once for each"),
        ({"output": "y,depth", "activation": [Activation.none] * 3}, "is given 3 times for 2 outputs"),
        ({"threshold": ["0.5", "0.6"]}, "is given 2 times for 1 output;"),
    ],
)
def test_what_is_said_of_outputs_must_fit_them(said, refusal):
    with pytest.raises(MisuseError, match=refusal):
        ModelOptions(**said).said()


def test_an_output_that_is_not_there_is_named(tmp_path):
    onnx.save(two("depth"), tmp_path / "two.onnx")
    with pytest.raises(MisuseError, match="no output 'flow'; it has y, depth"):
        import_model(tmp_path / "two.onnx", named("flow"))


def test_images_are_padded_to_what_the_pickiest_output_takes(tmp_path):
    """Scores by a sum of two maps take even sizes of cells; the other output alone would take every size."""
    text = (
        FEATURES
        + """
      u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(r2, , x2)
      m = Add(u, r1)
      s = Conv(m, w3, b3)
      y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(s, , x2)
      e0 = Conv(r1, w2c)
      shp = Shape(p)
      hw = Slice(shp, i2, i4)
    """
        + FINE.replace("e0 = Conv(r1, w2c)", "")
    )
    model = made(text, gives=f"float[N,4,H,W] y, {OUTPUTS['edges']}")
    report = built(tmp_path, model, named("edges"))
    assert report.size_multiple == 4 and report.fit == "pad"
    with Segmenter(tmp_path / "two.engine") as net:
        for size in ((8, 12), (64, 96), (32, 20)):  # which the model takes by itself
            image = photo(*size)
            scores, edges = ran(model, {"p": planes(image)})
            labels, other = net.results(image, "labels", "edges/labels")
            assert (labels == scores[0].argmax(0)).mean() > 0.999
            assert (other == edges[0].argmax(0)).mean() > 0.999
        assert net(photo(7, 9)).shape == (7, 9)


def test_outputs_that_would_pad_and_resize_are_refused(tmp_path):
    text = (
        FEATURES
        + """
      u = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(r2, , x2)
      m = Add(u, r1)
      s = Conv(m, w3, b3)
      y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(s, , x2)
      g = GlobalAveragePool(m)
      v = Mul(m, g)
      e = Conv(v, w2c)
      edges = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(e, , x2)
    """
    )
    onnx.save(made(text, gives=f"float[N,4,H,W] y, {OUTPUTS['edges']}"), tmp_path / "m.onnx")
    with pytest.raises(DeployError, match="say --fit pad or --fit resize for all"):
        import_model(tmp_path / "m.onnx", named("edges"))
    source = import_model(tmp_path / "m.onnx", replace(named("edges", fit="resize"), fit="resize"))
    assert source.fit == source.further[0].fit == "resize"
    report = build_engine(source, tmp_path / "m.engine", FAST)
    assert report.agreement.wrong == 0 and report.further_agreements["edges"].wrong == 0


def test_export_onnx_writes_one_output(tmp_path):
    onnx.save(two("depth"), tmp_path / "two.onnx")
    done = command("export-onnx", tmp_path / "two.onnx", "-o", tmp_path / "out.onnx", "--output", "y,depth", ok=2)
    assert "give build-engine an ONNX that has them all" in one_error(done)

"""build-engine: engines whose labels are the model's, from our models and others'."""

import io
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fcn_deploy.calibration.report.engine_report import report_of
from fcn_deploy.export.build.autotune import TuningOptions
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.core import core_of
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.standalone import build_standalone
from fcn_deploy.export.build.working_memory import measure_tensors, working_memory
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.runtime.backends import ORT_TARGETS
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.pixels.prepare import padded_size
from helpers import (
    checkpoint_of,
    command,
    multiples_of,
    needs,
    one_error,
    onnx_model,
    photo,
    random_network,
    save_photos,
)
from onnx import TensorProto, helper
from torch import nn

from fcn_deploy import DeployError, Segmenter


def built(tmp_path, model, card=None, **changes):
    path = tmp_path / "m.onnx"
    if card is None and hasattr(model, "architecture"):
        card = checkpoint_of(model, **changes).card
    export_module(model, card, path)
    return build_engine(import_model(path), tmp_path / "m.engine")


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    [{"stride": 32}, {"stride": 16, "upsampling": "learned"}, {"upsampling": "learned", "backbone": "resnet50"},
     {"arch": "dilated8", "backbone": "resnet50"}, {"classes": 2, "channels": 5}],
    ids=lambda a: "-".join(map(str, a.values())),
)  # fmt: skip
def test_the_head_is_cut_off_every_network_of_ours(tmp_path, architecture):
    model = random_network(width=0.125, **architecture)
    report = built(tmp_path, model)
    assert report.head == "linear" and report.agreement.wrong == 0
    assert report.agreement.labels_equal > 0.999
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.card.stride == model.stride and net.card.size_multiple == model.size_multiple
        assert net.network.upsampling.factor == (model.stride, model.stride)
        image = np.random.default_rng(0).integers(0, 256, (45, 67, net.card.channels), np.uint8)
        with Segmenter(tmp_path / "m.onnx") as plain:
            values = plain.values(image)
        # Borders too, where a transposed convolution fades.
        assert net.network.upsampling.fades == (architecture.get("upsampling") == "learned")
        assert np.abs(net.values(image) - values).max() <= 1e-4 * np.ptp(values)
        assert net.network.scores(image).shape == (model.architecture.classes, *(
            -(-side // model.size_multiple) * model.size_multiple // model.stride for side in (45, 67)))  # fmt: skip


def test_the_engine_holds_what_it_promises(exports):
    with EngineFile(exports / "narrow.engine") as file:
        manifest = file.manifest
        assert manifest.target == "cpu" and manifest.precision == "float32" and manifest.created_by > "fcn-deploy 0"
        assert set(manifest.members) == {"stage-0.onnx", "stage-1.onnx", "golden.npz", "report.json"}
        report = report_of(file)
        nodes = [
            node
            for name in ("stage-0.onnx", "stage-1.onnx")
            for node in onnx.load_from_string(file.read(name)).graph.node
        ]
    assert report.miou is None and report.miou_reason
    assert set(report.latency_ms) == {"64x64"}
    operators = {node.op_type for node in nodes}
    assert "Resize" in operators and not operators & {"Shape", "Slice", "BatchNormalization", "Constant"}
    # Offline optimisation must not tie the engine to this machine.
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}


class Foreign(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.end = end

    def forward(self, x):
        return self.end(self.body(x), x.shape[-2:])


ENDS = {
    "to-size": (lambda y, size: F.interpolate(y, size=size, mode="bilinear"), "linear"),
    "align-corners": (lambda y, size: F.interpolate(y, size=size, mode="bilinear", align_corners=True), "linear"),
    "nearest": (lambda y, size: F.interpolate(y, size=size, mode="nearest"), "nearest"),
    "cubic": (lambda y, size: F.interpolate(y, size=size, mode="bicubic"), "none"),
    "softmax-after": (lambda y, size: F.interpolate(y, size=size, mode="bilinear").softmax(1), "linear"),
    "softmax-before": (lambda y, size: F.interpolate(y.softmax(1), size=size, mode="bilinear"), "linear"),
}


@pytest.mark.parametrize("end", ENDS)
def test_networks_from_elsewhere_keep_their_labels(tmp_path, end, capsys):
    torch.manual_seed(1)
    change, head = ENDS[end]
    report = built(tmp_path, Foreign(change).eval())
    assert report.head == head and report.size_multiple == 1 and report.agreement.wrong == 0
    with Segmenter(tmp_path / "m.onnx") as plain, Segmenter(tmp_path / "m.engine") as net:
        for size in ((1, 1), (19, 53), (90, 41)):
            image = photo(*size)
            assert (plain(image) == net(image)).mean() > 0.999
        # Sizes that end within a cell, in tiles; a cubic Resize to the image's size stays in the core, and whole.
        assert [stage.halo is not None for stage in net.network.manifest.stages] == [head != "none"]
        for size in ((65, 301), (187, 66), (129, 131)) if head != "none" else ():
            image = photo(*size)
            with Segmenter(tmp_path / "m.engine", memory=net.plan(*size).bytes // 2) as tiled:
                assert sum(grid.count for grid in tiled.plan(*size).grids) > 1
                assert np.abs(tiled.network.scores(image) - net.network.scores(image)).max() < 1e-5
                np.testing.assert_array_equal(tiled(image), net(image))
                rows = list(tiled.bands(image, 37))
                np.testing.assert_array_equal(np.concatenate([part for _, part in rows]), net(image)[37:])


class Ties(nn.Module):
    """Nearest neighbours from ⌈n/4⌉ to ⌊n/2⌋, and from that to n."""

    def __init__(self):
        super().__init__()
        self.deep, self.skip, self.last = nn.Conv2d(3, 4, 7, 4, 3), nn.Conv2d(3, 4, 2, 2), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        skip = self.skip(x)
        deep = F.interpolate(self.deep(x), size=skip.shape[2:], mode="nearest")
        return F.interpolate(self.last(torch.cat([deep, skip], 1)), size=x.shape[2:], mode="nearest")


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_nearest_neighbours_that_tie_are_those_of_pytorch(tmp_path, exporter):
    torch.manual_seed(0)
    module, path = Ties().eval(), tmp_path / "m.onnx"
    _, differences = export_module(module, None, path, exporter=exporter)
    assert (117, 117) in [each.size for each in differences]  # one that ties is compared
    said, source = [], import_model(path)
    tuning = TuningOptions(("openvino", "onnxruntime"), seconds=0.2)
    config = BuildConfig(tuning=tuning, latency_sizes=[(16, 16)])
    report = build_engine(source, tmp_path / "m.engine", config, said.append)
    assert report.head == "nearest" and report.agreement.wrong == 0
    assert any("OpenVINO, which takes from other cells at some sizes, is left out" in line for line in said)
    with pytest.raises(DeployError, match=r"OpenVINO takes from other cells.*--backend onnxruntime"):
        build_engine(source, tmp_path / "n.engine", BuildConfig(tuning=TuningOptions(("openvino",))))
    run = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with Segmenter(path) as plain, Segmenter(tmp_path / "m.engine") as net:
        for size in (size for side in range(2, 131) for size in ((side, 9), (9, side))):
            x = torch.randn(1, 3, *size)
            with torch.inference_mode():
                np.testing.assert_allclose(run.run(None, {"image": x.numpy()})[0], module(x).numpy(), atol=1e-5)
            np.testing.assert_array_equal(net(photo(*size)), plain(photo(*size)))


class CoarseEnd(nn.Module):
    """Scores of ⌈n/8⌉, brought to n by nearest neighbours."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 4, 9, 8, 4)

    def forward(self, x):
        return F.interpolate(self.body(x), size=x.shape[2:], mode="nearest")


def test_the_head_of_nearest_neighbours_is_pytorchs_and_runs_in_tiles(tmp_path):
    torch.manual_seed(0)
    module = CoarseEnd().eval()
    assert built(tmp_path, module).head == "nearest"
    with Segmenter(tmp_path / "m.onnx") as plain, Segmenter(tmp_path / "m.engine") as net:
        manifest = net.network.manifest
        assert manifest.upsampling.rounding == "pytorch" and manifest.stages[0].halo is not None
        for side in range(1, 400, 3):
            np.testing.assert_array_equal(net(photo(side, 9)), plain(photo(side, 9)))


def full_size(y, size):
    return F.interpolate(y, size=size, mode="bilinear")


BINARY = {
    "logits": (lambda y, size: full_size(y, size), "sigmoid", "sigmoid"),
    "sigmoid-after": (lambda y, size: full_size(y, size).sigmoid(), "probability", "sigmoid"),
    "sigmoid-before": (lambda y, size: full_size(y.sigmoid(), size), "probability", "probability"),
}


@pytest.mark.parametrize("end", BINARY)
def test_binary_networks_of_one_score(tmp_path, end):
    torch.manual_seed(0)
    change, model_gives, engine_gives = BINARY[end]
    model = Foreign(lambda y, size: change((y[:, :1] - y[:, 1:2]) * 5, size)).eval()
    report = built(tmp_path, model)
    assert report.head == "linear" and report.agreement.wrong == 0
    with Segmenter(tmp_path / "m.onnx") as plain, Segmenter(tmp_path / "m.engine") as net:
        assert (plain.card.activation, net.card.activation) == (model_gives, engine_gives)
        image = photo(60, 61)
        labels = net(image)
        assert 0 < labels.mean() < 1
        np.testing.assert_array_equal(labels, plain(image))
    standalone = tmp_path / "s.onnx"
    build_standalone(import_model(tmp_path / "m.onnx"), standalone)
    np.testing.assert_array_equal(
        onnxruntime.InferenceSession(standalone).run(None, {"image": image[None]})[0][0], labels
    )


def test_standalone_models_take_images_and_give_labels(exports, tmp_path):
    build_standalone(import_model(exports / "narrow.onnx"), tmp_path / "s.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)" and session.get_outputs()[0].type == "tensor(uint8)"
    with Segmenter(exports / "narrow.engine") as net:
        for size in ((1, 1), (37, 61), (130, 90)):
            image = photo(*size)
            labels = session.run(None, {"image": image[None]})[0]
            assert labels.shape == (1, *size) and (labels[0] == net(image)).mean() > 0.999


def test_the_memory_estimate_follows_the_activations(exports):
    core = core_of(import_model(exports / "narrow.onnx"))
    estimate = working_memory(core.model, measure_tensors(core.model, 128)) / 128**2
    # At least the first layer's output and input together; far below the sum of all layers.
    assert 12 < estimate < 500


NCHW = ("N", 3, "H", "W")
NKHW = ("N", 2, "H", "W")


def simple(
    path, output_shape=NKHW, nodes=None, opset=18, input_shape=NCHW, output_type=TensorProto.FLOAT, constants=None
):
    weight = np.random.default_rng(0).normal(size=(2, 3, 1, 1)).astype(np.float32)
    model = onnx_model(
        nodes or [helper.make_node("Conv", ["x", "w"], ["y"])], constants or {"w": weight}, takes=input_shape,
        gives=output_shape, names=("x", "y"), types=(TensorProto.FLOAT, output_type), opset=opset,
    )  # fmt: skip
    onnx.save(model, path)
    return path


@pytest.mark.slow
def test_an_onnx_without_a_card_is_built_with_a_stated_default(tmp_path):
    done = command("build-engine", simple(tmp_path / "m.onnx"), "--sizes", "32x32", "-o", tmp_path / "m.engine")
    assert "no model card; assuming 3-channel uint8 images (RGB), mean [123.67" in done.stderr
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.card.classes == ("class 0", "class 1") and net(photo(9, 5)).shape == (9, 5)


@pytest.mark.slow
def test_a_model_that_takes_multiples_only_is_padded_and_that_is_said(tmp_path):
    weight = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["scores"], strides=[4, 4]),
        helper.make_node("Resize", ["scores", "", "four"], ["up"], mode="linear"),
        helper.make_node("Concat", ["x", "up"], ["image"], axis=1),  # fails unless the sizes agree
        helper.make_node("Conv", ["image", "k2"], ["y"], strides=[2, 2]),
    ]
    constants = {
        "k": weight,
        "four": np.array([1, 1, 4, 4], np.float32),
        "k2": weight[:, :1].repeat(5, 1)[:, :, :2, :2],
    }
    source = import_model(simple(tmp_path / "m.onnx", nodes=nodes, constants=constants))
    assert "takes multiples of 4 only" in source.notes[1] and "1/2 of the image's size" in source.notes[0]
    report = build_engine(source, tmp_path / "m.engine")
    assert (report.size_multiple, report.stride) == (4, 2) and report.agreement.wrong == 0


@pytest.mark.slow
def test_weights_listed_as_inputs_and_names_that_we_use_ourselves(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["scores"], name="a"),
        helper.make_node("Relu", ["scores"], ["image"], name="b"),
        helper.make_node("Neg", ["image"], ["y"], name="c"),
    ]
    path = simple(tmp_path / "m.onnx", nodes=nodes)
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3, 1, 1]))
    onnx.save(model, path)
    source = import_model(path)
    assert build_engine(source, tmp_path / "m.engine").agreement.wrong == 0
    build_standalone(source, tmp_path / "s.onnx")


def test_extra_outputs_are_left_out_and_that_is_said(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["aux"])]
    path = simple(tmp_path / "m.onnx", nodes=nodes)
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("aux", TensorProto.FLOAT, ["N", 2, "H", "W"]))
    onnx.save(model, path)
    assert "several outputs; y is used, and aux left out" in import_model(path).notes[0]


def test_a_card_that_does_not_fit_the_model_is_refused(exports, tmp_path):
    model = onnx.load(exports / "narrow.onnx")
    card = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(card | {"classes": ["a", "b"], "colors": [[0, 0, 0]] * 2})
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(DeployError, match="has 5 scores, and its model card says 2"):
        import_model(tmp_path / "m.onnx")


@pytest.mark.slow
def test_build_engine_from_the_command_line(exports, tmp_path):
    engine = tmp_path / "m.engine"
    done = command("build-engine", exports / "narrow.onnx", "--target", "cpu", "-o", engine, measured=True)
    assert "scores at stride 8, sizes padded to multiples of 32" in done.stdout and "512x1024" in done.stdout
    before = engine.read_bytes()
    assert "exists already" in one_error(command("build-engine", exports / "narrow.onnx", "-o", engine, ok=2))
    assert engine.read_bytes() == before
    words = ("--sizes", "64x64", "-o", engine, "--force", "--json")
    report = json.loads(command("build-engine", exports / "narrow.onnx", *words).stdout)
    assert report["agreement"]["wrong"] == 0
    command("build-engine", exports / "narrow.onnx", "--standalone", "-o", tmp_path / "s.onnx")
    model = exports / "narrow.onnx"
    for words, code, said in (
        ((model, "-o", tmp_path / "m.plan"), 2, "not named .engine"),
        ((model, "--standalone", "-o", tmp_path / "x.engine"), 2, "not named .onnx"),
        ((model, "--standalone", "--force", "-o", model), 2, "is the model itself"),
        ((model, "--target", "tpu", "-o", tmp_path / "x.engine"), 2, "tpu"),
        ((tmp_path / "none.onnx", "-o", tmp_path / "x.engine"), 2, "does not exist"),
    ):
        assert said in one_error(command("build-engine", *words, ok=code))


@pytest.mark.slow
def test_engines_for_gpus_have_profiles_for_the_users_sizes(exports, tmp_path):
    needs("tensorrt_rtx")
    photos = tmp_path / "photos"
    save_photos(photos, [(200, 300)] * 3 + [(600, 450)] * 2 + [(301, 200)])
    (photos / "broken.png").write_bytes(b"junk")
    words = ("--target", "sm86,sm89", "--sizes", photos, "--profiles", "2", "--max-batch", "2", "--workspace", "512MB")
    done = command("build-engine", exports / "narrow.onnx", *words, "-o", tmp_path / "m.engine")
    assert "profile        min        opt        max batch" in done.stdout and "plan for sm86, sm89 by" in done.stdout
    assert "skipped: " in done.stderr and "broken.png" in done.stderr
    with EngineFile(tmp_path / "m.engine") as file:
        gpu, members = file.manifest.gpu, file.manifest.members
        golden = np.load(io.BytesIO(file.read("golden.npz")))
        report = report_of(file)
    assert gpu.library == "tensorrt_rtx" and gpu.targets == ("sm86", "sm89") and len(gpu.profiles) == 2
    for size in ((224, 320), (608, 480), (320, 224)):
        assert sum(profile.holds(size) for profile in gpu.profiles) >= 1
    assert {profile.batch for profile in gpu.profiles} == {2} and all(profile.bytes > 0 for profile in gpu.profiles)
    assert {"stage-0.plan", "kernels.ptx", "kernels-sm86.cubin", "kernels-sm89.cubin"} <= set(members)
    # The golden sample can be run: some profile holds it.
    assert any(profile.holds(padded_size(*golden["image"].shape[:2], multiples_of(32))) for profile in gpu.profiles)
    assert report.builder.seconds > 0 and report.latency_ms is None
    typed = ("--target", "sm89", "--sizes", "64x64:96x96:256x256", "--json")
    done = command("build-engine", exports / "narrow.onnx", *typed, "-o", tmp_path / "t.engine")
    assert [row["max"] for row in json.loads(done.stdout)["builder"]["profiles"]] == [[256, 256]]


@pytest.mark.slow
def test_options_for_gpus_that_make_no_sense_are_one_line(exports, tmp_path):
    out = tmp_path / "x.engine"
    (tmp_path / "none").mkdir()
    for words, code, said in (
        (["--workspace", "64MB"], 2, "--workspace is for TensorRT; name GPUs with --target"),
        (["--timing-cache", "t", "--target", "ort-cuda"], 2, "--timing-cache is for TensorRT"),
        (["--target", "sm89", "--profiles", "2"], 2, "--profiles divides the sizes of --sizes"),
        (["--target", "sm89", "--sizes", tmp_path / "none"], 2, "holds no images"),
        (["--target", "sm89", "--sizes", "0x5"], 2, "both sides must be at least 1"),
        (["--target", "sm89", "--sizes", "9x9:5x5:7x7"], 2, "not in order"),
        (["--target", "sm89", "--hardware-compatible", "ampere+"], 2, "--hardware-compatible is for --target cuda"),
        (["--target", "sm89", "--version-compatible"], 2, "--version-compatible is for --target cuda"),
        (["--target", "sm89,cuda"], 2, "stands alone"),
        (["--target", "sm89", "--timeout", "0.01"], 1, "longer than --timeout"),
        (["--target", "sm89", "--sizes", "1000x1000", "--workspace", "1MB"], 1, "raise --workspace"),
        (["--target", "cuda"], 1, "none can be used"),
    ):
        if code == 1:
            needs("tensorrt_rtx")
        done = command("build-engine", exports / "narrow.onnx", *words, "-o", out, ok=code)
        assert said in one_error(done), words
        assert not out.exists() and not list(tmp_path.glob(".x*"))


@pytest.mark.slow
def test_sizes_are_what_is_timed_on_the_cpu(exports, tmp_path):
    words = ("--sizes", "40x50,100x60,300x200", "--json")
    done = command("build-engine", exports / "narrow.onnx", *words, "-o", tmp_path / "m.engine")
    rows = json.loads(done.stdout)["latency_ms"]
    assert [row["size"] for row in rows] == [[40, 50], [100, 60], [300, 200]] and all(row["ms"] > 0 for row in rows)


def test_an_engine_for_onnx_runtimes_gpu_providers(exports, tmp_path, monkeypatch):
    command("build-engine", exports / "narrow.onnx", "--target", "ort-cuda", "-o", tmp_path / "m.engine")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        done = command("verify-engine", tmp_path / "m.engine", ok=1)
        assert (
            "here has no CUDAExecutionProvider; run: pip uninstall onnxruntime; pip install 'fcn-deploy[ort-cuda]'"
            in one_error(done)
        )
    # The same path, with a provider that is here in the place of CUDA's.
    monkeypatch.setitem(ORT_TARGETS, "ort-cuda", "CPUExecutionProvider")
    image = photo(77, 123)
    with Segmenter(tmp_path / "m.engine") as net, Segmenter(exports / "narrow.engine") as cpu:
        assert net.backend == "onnxruntime, CPUExecutionProvider"
        np.testing.assert_array_equal(net(image), cpu(image))
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: [])
    with pytest.raises(DeployError, match=r"cannot be loaded \(.*; run: pip install 'fcn-deploy\[ort-cuda\]'"):
        Segmenter(tmp_path / "m.engine")

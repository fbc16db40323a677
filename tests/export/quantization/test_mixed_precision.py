"""build-engine --int8 and --fp16: the accuracy gate, what it reverts, and what it refuses."""

import csv
import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tifffile
from fcn_deploy.calibration.mask_options import MaskOptions
from fcn_deploy.calibration.report.engine_report import report_of
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.graph.edit import opset
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.gate import AccuracyGate, LabelFolder
from fcn_deploy.export.quantization.half import emulate_half
from fcn_deploy.export.quantization.mixed_precision import BudgetError, mix_precision
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.export.quantization.quantize import SCHEMES, quantized_convolutions
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.engine_format.stage import Upsampling
from helpers import command, needs, needs_shared, one_error, onnx_model, photo, save_photos
from onnx import TensorProto, helper
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A dozen images of differing sizes, and labels of the same names."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "labels").mkdir()
    sizes = [(40 + 9 * index, 120 - 7 * index) for index in range(12)]
    save_photos(folder / "images", sizes, "{:02}.png")
    for index, size in enumerate(sizes):
        labels = (np.indices(size).sum(0) // 16 % 5).astype(np.uint8)
        Image.fromarray(labels).save(folder / "labels" / f"{index:02}.png")
    return folder


def test_labels_of_the_gate_are_of_any_kind_and_asked_about(tmp_path, caplog):
    card = ModelCard(("a", "b"), mean=(127.5,) * 3, std=(60,) * 3)
    values = np.zeros((8, 9), np.uint8)
    values[2:5] = 255
    tifffile.imwrite(tmp_path / "x.tif", values)
    labels = LabelFolder(tmp_path, card, MaskOptions("0,255"))
    assert np.array_equal(labels.of("photos/x.jpg", (8, 9)), values // 255)
    labels.check()
    with pytest.raises(DeployError, match=r"x\.tif is 8×9, and its image is 9×8"):
        labels.of("x.jpg", (9, 8))
    with pytest.raises(DeployError, match=r"y\.png does not exist; every image needs a label"):
        labels.of("y.jpg", (9, 8))
    silent = LabelFolder(tmp_path, card, MaskOptions())
    silent.of("x.jpg", (8, 9))
    with pytest.raises(MisuseError, match=r"0 and 255 alone.*pass --mask-values 0,255 where 255 is 'b'"):
        silent.check()
    void = LabelFolder(tmp_path, card, MaskOptions("0=a,255=void"))
    void.of("x.jpg", (8, 9))
    assert not caplog.text
    void.check()
    assert "has labels of 'a' alone" in caplog.text
    with pytest.raises(MisuseError, match="say what --labels mean; pass --labels FOLDER"):
        QuantizationOptions(int8=True, calib="photos", masks=MaskOptions("0,255"))


def core_file(nodes, constants, scores=2):
    floats = {name: np.asarray(value, np.float32) for name, value in constants.items()}
    return onnx_model(nodes, floats, gives=("N", scores, "H", "W"))


CARD = ModelCard(("a", "b"), mean=(127.5,) * 3, std=(60,) * 3)


def fragile():
    """Its middle layer tells classes apart by differences far below one INT8 step of its input."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(4, 3, 1, 1))
    spread = np.zeros((4, 4, 1, 1))
    spread[:, :, 0, 0] = np.diag([300.0, 1, 1, 1])  # one channel sets the range of all
    decide = np.zeros((2, 4, 1, 1))
    decide[0, 1], decide[1, 2] = 1, 1
    nodes = [
        helper.make_node("Conv", ["image", "mix"], ["mixed"], name="mixed"),
        helper.make_node("Conv", ["mixed", "spread"], ["wide"], name="wide"),
        helper.make_node("Conv", ["wide", "decide"], ["decided"], name="decided"),
        helper.make_node("Conv", ["image", "faint"], ["harmless"], name="harmless"),
        helper.make_node("Add", ["decided", "harmless"], ["scores"], name="sum"),
    ]
    faint = random.normal(size=(2, 3, 1, 1)) * 1e-4
    return core_file(nodes, {"mix": mix, "spread": spread, "decide": decide, "faint": faint})


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_layers_that_int8_cannot_hold_are_reverted(photos, target):
    said = []
    options = QuantizationOptions(int8=True, fp16=target == "tensorrt", calib=str(photos / "images"), max_drop=1.0)
    result = mix_precision(fragile(), Upsampling(), CARD, target, options, say=said.append)
    assert result.accuracy.kept, "nothing was reverted"
    assert result.accuracy.drop_points <= 1.0 and result.accuracy.metric == "agreement"
    assert quantized_convolutions(result.core) == 4 - len(result.accuracy.kept)
    sensitivities = {layer.name: layer.sensitivity for layer in result.layers}
    assert {"decided", "wide"} & set(result.accuracy.kept)
    assert max(sensitivities, key=sensitivities.get) in result.accuracy.kept
    # Without the gate it would have been much worse.
    free = mix_precision(
        fragile(),
        Upsampling(),
        CARD,
        target,
        QuantizationOptions(int8=True, calib=options.calib, max_drop=100),
        say=said.append,
    )
    assert free.accuracy.drop_points > 1.0 and not free.accuracy.kept


def overflowing():
    nodes = [
        helper.make_node("Conv", ["image", "up"], ["large"]),
        helper.make_node("Conv", ["large", "down"], ["scores"]),
    ]
    up, down = np.random.default_rng(1).normal(size=(2, 4, 3, 1, 1)) * 60000, np.zeros((2, 4, 1, 1))
    down[0, 0], down[1, 1] = 1e-5, 1e-5
    return core_file(nodes, {"up": up[0], "down": down})


def test_fp16_keeps_what_overflows_in_float32(photos):
    options = QuantizationOptions(fp16=True, calib=str(photos / "images"), max_drop=0.1)
    result = mix_precision(overflowing(), Upsampling(), CARD, "tensorrt", options)
    assert set(result.accuracy.kept) == {"large", "scores"}
    assert "beyond float16" in result.accuracy.kept["large"]
    naive = emulate_half(overflowing())
    from fcn_deploy.calibration.stream import open_stream

    gate = AccuracyGate(
        overflowing(),
        Upsampling(),
        CARD,
        open_stream(str(photos / "images"), CARD),
        None,
        max_drop=0.1,
        kernels_exact=False,
    )
    assert not gate.holds(gate.measure(naive))
    assert gate.holds(gate.measure(result.emulated))
    assert [
        note for note in result.notes if "2 layers beyond float16's range stay float32" in note and "--bf16" in note
    ]


def test_bf16_has_the_range_that_fp16_lacks(photos):
    options = QuantizationOptions(bf16=True, calib=str(photos / "images"), max_drop=2)
    result = mix_precision(overflowing(), Upsampling(), CARD, "tensorrt", options, half_interface=True)
    assert not result.accuracy.kept and not result.notes
    assert result.accuracy.precision == "bf16" and result.accuracy.bf16 == result.accuracy.value
    kinds = {tensor.data_type for tensor in result.core.graph.initializer}
    assert kinds == {TensorProto.BFLOAT16}
    assert result.core.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT  # as the runtime's kernels write


def wide():
    """Two dense convolutions that FP8 kernels take, and one that they do not."""
    random = np.random.default_rng(3)
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["a"], name="a"),
        helper.make_node("Relu", ["a"], ["ra"]),
        helper.make_node("Conv", ["ra", "second"], ["b"], name="b"),
        helper.make_node("Relu", ["b"], ["rb"]),
        helper.make_node("Conv", ["rb", "third"], ["c"], name="c"),
        helper.make_node("Conv", ["c", "last"], ["scores"], name="last"),
    ]
    shapes = {"first": (32, 3, 1, 1), "second": (32, 32, 1, 1), "third": (32, 32, 1, 1), "last": (2, 32, 1, 1)}
    return core_file(nodes, {name: random.normal(size=shape) / np.sqrt(shape[1]) for name, shape in shapes.items()})


def test_fp8_is_gated_as_int8_is(photos):
    options = QuantizationOptions(fp8=True, fp16=True, calib=str(photos / "images"), max_drop=100, max_class_drop=100)
    free = mix_precision(wide(), Upsampling(), CARD, "tensorrt", options)
    assert free.accuracy.precision == "fp8" and free.accuracy.layers == 2 and free.accuracy.method == "minmax"
    assert quantized_convolutions(free.core) == 2 and free.accuracy.drop_points > 0
    tight = replace(options, max_drop=free.accuracy.drop_points * 0.99)
    found = mix_precision(wide(), Upsampling(), CARD, "tensorrt", tight)
    assert len(found.accuracy.kept) == 1 and quantized_convolutions(found.core) == 1
    with pytest.raises(BudgetError, match=r"no layer can be FP8 within --max-drop 0 .*build without --fp8"):
        mix_precision(wide(), Upsampling(), CARD, "tensorrt", replace(options, fp16=False, max_drop=0))
    with pytest.raises(MisuseError, match="has no convolution for FP8"):
        mix_precision(fragile(), Upsampling(), CARD, "tensorrt", options)


def test_a_broken_candidate_counts_as_all_lost():
    gate = AccuracyGate.__new__(AccuracyGate)
    gate.baseline = 0.9
    assert gate.drop(float("nan")) == 100


@pytest.mark.slow
def test_an_int8_engine_for_the_cpu(exports, photos, tmp_path):
    calib = photos / "images"
    done = command("build-engine", exports / "narrow.onnx", "--int8", "--calib", calib, "--max-drop", "60", "--sizes",
                   "64x96", "-o", tmp_path / "m.engine", "--precision-report", tmp_path / "layers.csv")  # fmt: skip
    assert "int8: agreement" in done.stdout and "images calibration did not see" in done.stdout
    assert "faster than float32 here" in done.stdout or "SLOWER than float32 here" in done.stdout.splitlines()[-1]
    with EngineFile(tmp_path / "m.engine") as file:
        report = report_of(file)
        stages = [onnx.load_from_string(file.read(stage.file)) for stage in file.manifest.stages]
    assert report.accuracy.calibration_images == 10 and report.accuracy.images_judged == 2
    assert report.core_bytes["int8"] < 0.5 * report.core_bytes["float32"]
    assert sum(map(quantized_convolutions, stages)) == report.accuracy.layers - len(report.accuracy.kept)
    rows = list(csv.DictReader((tmp_path / "layers.csv").open()))
    assert len(rows) == report.accuracy.layers
    ranked = [float(row["sensitivity"]) for row in rows]
    assert ranked == sorted(ranked, reverse=True) and ranked[0] > 0
    done = command("build-engine", exports / "narrow.onnx", "--int8", "--calib", calib, "-o", tmp_path / "n.engine",
                   "--precision-report", tmp_path / "layers.csv", ok=2)  # fmt: skip
    assert "layers.csv exists already" in one_error(done)
    with Segmenter(tmp_path / "m.engine") as net, Segmenter(tmp_path / "m.engine", memory=9_000_000) as small:
        assert net.precision == "int8" and net(photo(50, 70)).shape == (50, 70)
        # Its first layer reads 8-bit pixels, in tiles and in batches too.
        with net.network.backend.prepared(photo(50, 70)) as prepared:
            assert prepared.dtype == np.uint8
        first = net.network.stages[0]  # on squares of pixels, where that was measured faster
        assert first.border == {1: (0, 0, 1, 1), 2: (0, 0, 2, 2)}[first.block]
        image, several = photo(301, 517), [photo(90 + i, 70, i) for i in range(3)]
        assert small.plan(301, 517).grids
        np.testing.assert_array_equal(small.network.scores(image), net.network.scores(image))
        for scores, each in zip(net.network.backend.scores(several), several, strict=True):
            np.testing.assert_array_equal(scores, net.network.scores(each))
    assert "golden sample: ok" in command("verify-engine", tmp_path / "m.engine").stdout


@pytest.mark.slow
def test_labels_make_the_gate_measure_miou(exports, photos, tmp_path):
    options = QuantizationOptions(int8=True, calib=str(photos / "images"), labels=photos / "labels", max_drop=100)
    report = build_engine(
        import_model(exports / "narrow.onnx"), tmp_path / "m.engine", BuildConfig(quantization=options)
    )
    assert report.accuracy.metric == "mIoU" and 0 < report.miou < 1 and report.miou_reason is None
    assert report.miou == report.accuracy.int8


@pytest.mark.slow
def test_engines_for_gpus_are_built_here_and_say_what_was_not_measured(exports, photos, tmp_path):
    needs("tensorrt_rtx")
    kinds = {"--int8": "int8", "--fp16": "float16", "--int8 --no-fp16": "int8", "--fp8": "fp8", "--bf16": "bf16"}
    for index, (words, precision) in enumerate(kinds.items()):
        path = tmp_path / f"{index}.engine"
        gate = ("--calib", photos / "images", "--max-drop", "60")
        done = command("build-engine", exports / "narrow.onnx", *words.split(), *gate, "--target", "sm89", "-o", path)
        assert f"for sm89, {precision}" in done.stdout and f"{precision}: agreement" in done.stdout
        # TensorRT for RTX 1.7 keeps neither: the list of layers says so.
        said = f"note: {precision.upper()}: " in done.stderr and "of this plan take it and give float" in done.stderr
        assert said == (precision in ("int8", "fp8"))
        assert "latency: not measured (no GPU here runs it" in done.stdout
        with EngineFile(path) as file:
            assert file.manifest.target == "sm89" and file.manifest.precision == precision
            assert report_of(file).accuracy.precision == precision
            assert len(file.read("stage-0.plan")) > 10_000
        assert "is an engine for sm89, and no NVIDIA" in one_error(command("verify-engine", path, ok=1))


@pytest.mark.slow
def test_ranges_are_reused_for_the_same_model_alone(exports, photos, tmp_path):
    source = import_model(exports / "narrow.onnx")
    options = QuantizationOptions(
        int8=True, calib=str(photos / "images"), ranges=tmp_path / "ranges.json", max_drop=100
    )
    first = build_engine(source, tmp_path / "a.engine", BuildConfig(quantization=options))
    written = (tmp_path / "ranges.json").read_bytes()
    second = build_engine(source, tmp_path / "b.engine", BuildConfig(quantization=options))
    assert (tmp_path / "ranges.json").read_bytes() == written
    assert first.accuracy.int8 == second.accuracy.int8
    data = json.loads(written) | {"model": "0" * 64}
    (tmp_path / "ranges.json").write_text(json.dumps(data))
    with pytest.raises(MisuseError, match="another network"):
        build_engine(source, tmp_path / "c.engine", BuildConfig(quantization=options))
    assert not (tmp_path / "c.engine").exists()


@pytest.mark.slow
def test_odd_calibration_images(exports, tmp_path, caplog):
    source = import_model(exports / "narrow.onnx")
    folder = tmp_path / "flat"
    folder.mkdir()
    Image.new("RGB", (50, 40), (9, 9, 9)).save(folder / "flat.png")  # one image, of one colour
    options = QuantizationOptions(int8=True, calib=str(folder), max_drop=100)
    assert (
        build_engine(source, tmp_path / "a.engine", BuildConfig(quantization=options)).accuracy.calibration_images == 1
    )
    (folder / "bad.png").write_bytes(b"junk")
    save_photos(folder, [(30 + index, 44) for index in range(4)])
    report = build_engine(source, tmp_path / "b.engine", BuildConfig(quantization=options)).accuracy
    assert len(report.skipped) == 1 and report.calibration_images + report.images_judged == 5
    assert "bad.png" in caplog.text
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "x.png").write_bytes(b"junk")
    with pytest.raises(DeployError, match="could be read"):
        build_engine(
            source, tmp_path / "c.engine", BuildConfig(quantization=QuantizationOptions(int8=True, calib=str(only_bad)))
        )


def test_activations_that_are_not_finite_are_refused(photos):
    model = core_file(
        [helper.make_node("Log", ["image"], ["logs"]), helper.make_node("Conv", ["logs", "w"], ["scores"])],
        {"w": np.ones((2, 3, 1, 1))},
    )
    with pytest.raises(DeployError, match="tensor logs: it has NaN or infinite values"):
        mix_precision(model, Upsampling(), CARD, "cpu", QuantizationOptions(int8=True, calib=str(photos / "images")))


@pytest.mark.slow
def test_misuse_is_one_line(exports, photos, tmp_path):
    model, calib, out = exports / "narrow.onnx", photos / "images", tmp_path / "x.engine"
    (tmp_path / "empty").mkdir()
    for words, code, said in (
        (["--int8"], 2, "--int8 needs real images"),
        (["--fp16", "--target", "sm89"], 2, "--fp16 needs real images"),
        (["--fp16", "--calib", calib], 2, "refused for the CPU"),
        (["--int8", "--calib", tmp_path / "empty"], 2, "holds no images"),
        (["--int8", "--calib", calib, "--calib-method", "guess"], 2, "guess"),
        (["--int8", "--calib", calib, "--target", "sm90"], 2, "sm90"),
        (["--int8", "--calib", calib, "--labels", tmp_path / "none"], 2, "not a folder"),
        (["--int8", "--calib", calib, "--labels", calib], 1, "colours"),
        (["--calib", calib], 2, "--calib is for low precision"),
        (["--max-drop", "1"], 2, "--max-drop is for low precision"),
        (["--fp16", "--calib", calib, "--target", "sm89", "--ranges", tmp_path / "r"], 2, "--ranges is for --int8"),
        (["--int8", "--calib", calib, "--no-fp16"], 2, "--no-fp16 goes with --int8 or --fp8 for GPUs"),
        (["--int8", "--fp16", "--no-fp16", "--calib", calib, "--target", "sm89"], 2, "contradict each other"),
        (["--int8", "--calib", calib, "--precision-report", out], 2, "also -o"),
        (["--int8", "--calib", calib, "--ranges", model], 2, "is the model itself"),
    ):
        assert said in one_error(command("build-engine", model, *words, "-o", out, ok=code)), words
    assert not out.exists()


@pytest.mark.slow
def test_int8_and_fp16_keep_the_miou_of_a_trained_network(trained, tmp_path):
    """From images of differing sizes: within 0.5 points for INT8 and 0.05 for FP16 on CamVid photographs."""
    data = needs_shared("camvid")
    files = sorted((data / "train").glob("*.jpg"))[::24]
    calib = tmp_path / "calib"
    calib.mkdir()
    for index, path in enumerate(files):
        scale = 0.5 + 0.04 * index
        picture = Image.open(path)
        picture.resize((round(480 * scale), round(360 * scale))).save(calib / f"{index}.png")
    core = core_of(import_model(trained / "camvid.onnx"))
    card = core.card
    from fcn_deploy.calibration.datasets import load_dataset
    from fcn_deploy.calibration.stream import ImageStream

    head, core = core.upsampling, optimise_offline(core.model)
    validation = load_dataset(str(data), "val", count=16, card=card)
    stream = ImageStream([validation.pairs[i][0].name for i in range(16)], lambda i: validation[i][0])
    labels = LabelFolder(data / "valannot", card, MaskOptions())
    gates = {
        name: AccuracyGate(core, head, card, stream, labels, max_drop=100, kernels_exact=name == "cpu")
        for name in SCHEMES
    }
    gate = gates["cpu"]
    assert gate.metric == "mIoU" and gate.baseline > 0.55
    for target, wanted, limit in (
        ("cpu", {"int8": True}, 0.5),
        ("tensorrt", {"int8": True, "fp16": True}, 0.5),
        ("tensorrt", {"fp16": True}, 0.05),
    ):
        result = mix_precision(core, head, card, target, QuantizationOptions(calib=str(calib), max_drop=100, **wanted))
        assert gate.drop(gates[target].measure(result.emulated).value) <= limit, (target, wanted)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_gate_never_trusts_kernels_that_saturate(photos, target, monkeypatch):
    """Only the CPU's own graph is run by ONNX Runtime's optimised kernels; s8·s8 as written."""
    levels = []

    def watched(model, threads=None, optimise=True, arena=True):
        if b"QuantizeLinear" in model:
            levels.append(optimise)
        return session(model, threads, optimise, arena)

    monkeypatch.setattr("fcn_deploy.export.quantization.gate.session", watched)
    mix_precision(
        fragile(),
        Upsampling(),
        CARD,
        target,
        QuantizationOptions(int8=True, calib=str(photos / "images"), max_drop=100),
    )
    assert levels and set(levels) == {target == "cpu"}


@pytest.mark.slow
def test_ranges_of_another_sample_are_not_judged_on_what_they_saw(exports, photos, tmp_path):
    source, kept = import_model(exports / "narrow.onnx"), tmp_path / "ranges.json"
    for seed in range(3):
        options = QuantizationOptions(int8=True, calib=str(photos / "images"), ranges=kept, max_drop=100, seed=seed)
        report = build_engine(source, tmp_path / "a.engine", BuildConfig(quantization=options)).accuracy
        assert report.judged_unseen and report.calibration_images == 10
    data = json.loads(kept.read_text())
    data["images"] = [str(path) for path in sorted((photos / "images").iterdir())]
    kept.write_text(json.dumps(data))
    report = build_engine(source, tmp_path / "a.engine", BuildConfig(quantization=options)).accuracy
    assert not report.judged_unseen


@pytest.mark.slow
def test_the_ranking_is_kept_where_the_budget_cannot_be_held(exports, photos, tmp_path):
    words = ["--int8", "--calib", photos / "images", "--max-drop", "0", "--precision-report", tmp_path / "l.csv"]
    done = command("build-engine", exports / "narrow.onnx", *words, "-o", tmp_path / "m.engine", ok=1)
    assert "l.csv ranks the layers" in one_error(done) and not (tmp_path / "m.engine").exists()
    assert len(list(csv.DictReader((tmp_path / "l.csv").open()))) > 10


@pytest.mark.slow
def test_older_models_are_converted_for_int8(photos, tmp_path):
    import torch

    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 5, 1)]
    axes = {"image": {0: "N", 2: "H", 3: "W"}, "logits": {0: "N", 2: "H", 3: "W"}}
    torch.onnx.export(torch.nn.Sequential(*layers), torch.zeros(1, 3, 32, 32), tmp_path / "old.onnx", dynamo=False,
                      opset_version=13, input_names=["image"], output_names=["logits"], dynamic_axes=axes)  # fmt: skip
    assert opset(onnx.load(tmp_path / "old.onnx")) == 13
    options = QuantizationOptions(int8=True, calib=str(photos / "images"), max_drop=100)
    report = build_engine(import_model(tmp_path / "old.onnx"), tmp_path / "m.engine", BuildConfig(quantization=options))
    assert report.agreement.wrong == 0

"""`--fastest` for GPUs: plans in every precision that the gate lets through, and which of them is kept."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from fcn_deploy.calibration.report import page
from fcn_deploy.calibration.report.engine_report import (
    EngineReport,
    PlanLayer,
    PlanReport,
    ProfileReport,
    read_report,
)
from fcn_deploy.calibration.report.results import Entry
from fcn_deploy.export.build import engine
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.report_parts import show_plans
from fcn_deploy.export.build.targets.tensorrt import builder as tensorrt
from fcn_deploy.export.build.targets.tensorrt import fastest_plan
from fcn_deploy.export.build.targets.tensorrt.fastest_plan import Trial, by_layers
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.sizes import parse_sizes
from gpu_engines import KERNELS, profiles_of
from helpers import ReadPage, needs, onnx_model, save_photos
from onnx import helper

from fcn_deploy import DeployError


def tiny(tmp_path, up=1.0):
    """A network of three convolutions; `up` is what the first is scaled by, and the last is scaled by 1 / up."""
    random, nodes, constants, name = np.random.default_rng(0), [], {}, "image"
    for index, (given, taken, size) in enumerate([(24, 3, 3), (24, 24, 3), (4, 24, 1)]):
        scale = {0: up, 2: 1 / up}.get(index, 1.0) / np.sqrt(taken * size * size)
        constants[f"w{index}"] = (random.normal(size=(given, taken, size, size)) * scale).astype(np.float32)
        output = "scores" if index == 2 else f"c{index}"
        nodes.append(helper.make_node("Conv", [name, f"w{index}"], [output], pads=[size // 2] * 4))
        if index < 2:
            nodes.append(helper.make_node("Relu", [output], [f"r{index}"]))
        name = f"r{index}"
    onnx.save(onnx_model(nodes, constants), tmp_path / "m.onnx")
    return import_model(tmp_path / "m.onnx", ImportOptions(classes=("a", "b", "c", "d")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, [(70 + index, 90) for index in range(3)])
    return folder


def config(photos, target="sm89", **more):
    options = QuantizationOptions(fastest=True, calib=str(photos), **({"max_drop": 8, "max_class_drop": 50} | more))
    return BuildConfig(target=target, quantization=options, sizes=parse_sizes("64x96"))


@pytest.fixture(scope="module")
def built(model, photos, tmp_path_factory):
    needs("tensorrt_rtx")
    out = tmp_path_factory.mktemp("fastest") / "m.engine"
    ranges = out.with_name("ranges.json")
    return out, build_engine(model, out, config(photos, ranges=ranges)), ranges


def test_the_engine_is_the_kept_plan_and_its_report_tells_of_all(built):
    out, report, ranges = built
    rows = {row.precision: row for row in report.plans}
    assert [*rows] == ["float16", "int8", "fp8", "float32"]  # nothing overflows: BF16 has nothing to mend
    assert rows["float16"].chosen and report.precision == "float16" and "no GPU here measured it" in report.plans_reason
    assert all("take it and give float" in rows[low].refused for low in ("int8", "fp8")) and not rows["float32"].refused
    for row in rows.values():
        assert row.layers >= row.float_layers > 0 and row.activation_bytes > 0 and row.plan_bytes > 10_000
        assert (row.drop_points is None) == (row.precision == "float32")
    assert rows["float32"].activation_bytes > 1.1 * rows["float16"].activation_bytes
    assert any(types.startswith("Int8") for types in rows["int8"].convolutions)
    assert ranges.is_file() and read_report(out) == report
    with EngineFile(out) as file:
        assert file.manifest.precision == "float16"
        assert len(file.read("stage-0.plan")) == rows["float16"].plan_bytes == report.core_bytes["float16"]
        html = page.page(page.About("e"), [Entry("m.engine", "engine", 9, file.manifest.card, report)])
    assert [row[0] for row in ReadPage(html).tables["Plans in every precision"]][1:] == [*rows]
    assert "refused: INT8: " in show_plans(report.plans)


def test_gpus_without_a_type_leave_it_out(model, photos, tmp_path, monkeypatch):
    """And a plan that cannot be built is none; float32 is kept where it is all that is left."""
    needs("tensorrt_rtx")
    build = tensorrt.build_plan

    def build_plan(core, *rest):
        if any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in core.graph.initializer):
            raise DeployError("no kernel for it")
        return build(core, *rest)

    monkeypatch.setattr(tensorrt, "build_plan", build_plan)
    report = build_engine(model, tmp_path / "m.engine", config(photos, "sm75"))
    rows = {row.precision: row for row in report.plans}
    assert "--int8 is refused for sm75" in rows["int8"].refused and "--fp8 is refused for sm75" in rows["fp8"].refused
    assert rows["float16"].refused == "no kernel for it" and rows["float16"].layers is None
    assert report.precision == "float32" and report.accuracy is None


def test_bf16_is_tried_where_fp16_overflows(photos, tmp_path, monkeypatch):
    needs("tensorrt_rtx")
    monkeypatch.setattr(fastest_plan, "ORDER", ("float16", "bf16", "float32"))
    source = tiny(tmp_path, up=30000)
    report = build_engine(source, tmp_path / "m.engine", config(photos, "sm86,sm89", max_drop=3))
    rows = {row.precision: row for row in report.plans}
    assert rows["bf16"].layers and rows["bf16"].drop_points < 3
    assert report.precision == "bf16", show_plans(report.plans)


def trial(precision, types, memory, count=10):
    layers = tuple(PlanLayer(f"Conv{index}", "correlation", (types[0],), (types[1],)) for index in range(count))
    profile = ProfileReport(0, "1x1", "1x1", "1x1", 1, activation_bytes=memory)
    plan = PlanReport("tensorrt", "11.4", ("sm90",), 1.0, (profile,), layers=layers)
    return Trial(precision, EngineReport(builder=plan))


HALF, FLOAT = ("float16", ("Half", "Half"), 100), ("float32", ("Float", "Float"), 200)


@pytest.mark.parametrize(
    ("trials", "kept", "said"),
    [
        ([HALF, ("int8", ("Int8", "Int8"), 60), FLOAT], "int8", "least memory of"),  # fused: the advice turns by itself
        ([HALF, ("int8", ("Int8", "Float"), 60), FLOAT], "float16", "least memory of"),
        ([HALF, ("fp8", ("FP8", "FP8"), 102), FLOAT], "fp8", "fewest layers that give float, of the least memory"),
        ([("float16", ("Half", "Half"), 102, 12), ("bf16", ("BFloat16", "BFloat16"), 100), FLOAT], "bf16", "fewest"),
        ([("float16", ("Half", "Half"), None), ("float32", ("Float", "Float"), None, 9)], "float32", "fewest"),
        ([("int8", ("Int8", "Float"), 60)], "int8", "least memory of"),  # all there is
    ],
)
def test_what_is_kept_by_the_list_of_layers(trials, kept, said):
    chosen, reason = by_layers([trial(*each) for each in trials])
    assert chosen.precision == kept and reason.startswith(said) and not chosen.refused


def test_labels_that_do_not_fit_are_an_error_and_no_reason_to_keep_float32(model, photos, tmp_path):
    needs("tensorrt_rtx")
    (tmp_path / "labels").mkdir()
    with pytest.raises(DeployError, match="labels"):
        build_engine(model, tmp_path / "m.engine", config(photos, labels=tmp_path / "labels"))
    assert not (tmp_path / "m.engine").exists()


@pytest.fixture
def simulated(gpu, tmp_path, monkeypatch):
    """What builds for the simulated GPU, which runs the first plan with all weights 0: its kernels are wrong."""
    needs("tensorrt_rtx")
    from gpu_sim import tensorrt_sim

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (engine, fastest_plan):  # they would look for the library that the simulation stands in for
        monkeypatch.setattr(module, "check_builder", lambda options, types=(): None)
    gpu.load_kernels(KERNELS)
    real = tensorrt.build_plan

    def registered(core, options, profiles, say):
        built, runs = real(core, options, profiles, say), onnx.ModelProto()
        runs.CopyFrom(core)
        if built_before == []:
            for weights in runs.graph.initializer:
                weights.raw_data = bytes(len(weights.raw_data))
        built_before.append(built)
        tensorrt_sim.register(built.plan, runs.SerializeToString(), profiles_of(SimpleNamespace(profiles=profiles)))
        return built

    built_before = []
    monkeypatch.setattr(tensorrt, "build_plan", registered)
    with gpu.tensorrt("tensorrt_rtx"):
        yield


def test_a_gpu_that_runs_them_decides(simulated, model, photos, tmp_path, monkeypatch):
    """By the simulated GPU, where FP16's kernels are wrong, which the list of layers does not tell."""
    monkeypatch.setattr(fastest_plan, "ORDER", ("float16", "int8", "float32"))
    said = []
    report = build_engine(model, tmp_path / "m.engine", config(photos), said.append)
    rows = {row.precision: row for row in report.plans}
    assert report.plans_reason == "measured fastest on this machine's GPU" and "timing 2 precisions" in said
    assert "its golden sample differs by " in rows["float16"].refused and not rows["float16"].latency_ms
    assert all(rows[kept].latency_ms["64x96"] > 0 and not rows[kept].refused for kept in ("int8", "float32"))
    assert rows[report.precision].chosen and report.latency_ms["64x96"] > 0


def test_an_engine_that_is_wrong_on_the_gpu_at_hand_is_not_written(simulated, model, tmp_path):
    out, asked = tmp_path / "m.engine", BuildConfig(target="sm89", sizes=parse_sizes("64x96"))
    with pytest.raises(DeployError, match=r"on this GPU its golden sample differs by .* at 64×96, where 0.1% is"):
        build_engine(model, out, asked)
    assert not out.exists()
    assert build_engine(model, out, asked).latency_ms["64x96"] > 0  # the second is right

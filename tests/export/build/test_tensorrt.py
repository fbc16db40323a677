"""Plans for GPUs: real builds by TensorRT for RTX, which needs none; TensorRT itself stands in as a recording fake."""

import os
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from fcn_deploy.calibration.report.engine_report import PlanLayer
from fcn_deploy.export.build.config import BuildConfig, TensorRTOptions
from fcn_deploy.export.build.core import core_of
from fcn_deploy.export.build.gpus import parse_targets
from fcn_deploy.export.build.targets.tensorrt import plan as tensorrt_plan
from fcn_deploy.export.build.targets.tensorrt import process as tensorrt_process
from fcn_deploy.export.build.targets.tensorrt.builder import unseen_resize
from fcn_deploy.export.build.targets.tensorrt.plan import activation_cost, build_plan
from fcn_deploy.export.build.targets.tensorrt.process import build_here, choose_module
from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile, default_profiles, plan_profiles
from fcn_deploy.export.build.targets.tensorrt.timing_cache import CACHE_MAGIC, TimingCache
from fcn_deploy.export.importer.import_model import import_model
from gpu_sim import standin
from helpers import finished, multiples_of, needs, onnx_model
from onnx import helper

from fcn_deploy import DeployError, MisuseError

SMALL = [PlannedProfile((32, 32), (64, 64), (128, 128))]
SM89 = TensorRTOptions(("sm89",))


@pytest.fixture
def rtx():
    return needs("tensorrt_rtx")


@pytest.fixture(scope="module")
def core(exports):
    return core_of(import_model(exports / "narrow.onnx")).model


def graph(*nodes, domain="", **constants):
    return onnx_model(nodes, constants, gives=("N", None, "H", "W"), domain=domain)


def children() -> set[str]:
    """Processes started by this one that are still there, by /proc."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[1] == str(os.getpid()):
            found.add(stat.parent.name)
    return found


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """Checks that nothing is left behind: no process, no temporary file."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    before = children()
    yield
    assert not list((tmp_path / "tmp").iterdir())
    assert children() <= before


# Real builds


def test_one_plan_for_several_gpus_with_several_profiles(rtx, core, clean):
    sizes = {(64, 64): 5, (480, 640): 20, (640, 480): 8, (1080, 1920): 9}
    profiles = plan_profiles(sizes, multiples_of(32), 3, batch=2)
    assert len(profiles) == 3
    said = []
    built = build_plan(core, TensorRTOptions(("sm86", "sm89", "sm120")), profiles, said.append)
    assert len(built.plan) > 10_000 and built.module == "tensorrt_rtx" and built.version == rtx.__version__
    assert built.targets == ("sm86", "sm89", "sm120") and built.seconds > 0 and not built.notes
    # Monotone in area, and in proportion to it but for a few MiB that every profile takes.
    assert list(built.activation_bytes) == sorted(built.activation_bytes)
    per_pixel = [size / profile.pixels for size, profile in zip(built.activation_bytes, profiles, strict=True)]
    assert per_pixel[1] == pytest.approx(per_pixel[2], rel=0.2)
    assert said and all(line.endswith(" s)") and "%" not in line for line in said)


def test_activation_memory_is_told_in_the_order_of_the_profiles(rtx, core):
    large, small = PlannedProfile((512, 512), (512, 1024), (1088, 1920)), SMALL[0]
    first, second = (build_plan(core, SM89, order).activation_bytes for order in ([large, small], [small, large]))
    assert first == second[::-1] and first[0] > 10 * first[1]


def test_a_batch_takes_its_share_of_memory(rtx, core):
    one, four = (
        build_plan(core, SM89, default_profiles(multiples_of(32), batch)).activation_bytes[0] for batch in (1, 4)
    )
    assert 3 < four / one < 5


def test_a_budget_planned_for_is_kept_by_the_plan(rtx, core):
    """Memory asked of TensorRT at two sizes tells it for others within 2 % or 1 MiB."""
    cost = activation_cost(core, SM89, multiples_of(32))
    sizes = {(480, 640): 20, (640, 480): 8, (1080, 1920): 9, (1920, 1080): 2, (2160, 3840): 4, (100, 100): 30}
    budget = int(0.9 * sum(cost(profile.pixels) for profile in plan_profiles(sizes, multiples_of(32), 4)))
    profiles = plan_profiles(sizes, multiples_of(32), 4, budget, cost)
    planned = [cost(profile.pixels) for profile in profiles]
    built = build_plan(core, SM89, profiles)
    assert built.activation_bytes == pytest.approx(planned, rel=0.02, abs=1 << 20)
    assert sum(built.activation_bytes) <= budget


def test_too_little_workspace_is_named_with_the_remedy(rtx, core, clean):
    for workspace in (1024, 64 << 20):
        with pytest.raises(DeployError, match="raise --workspace") as caught:
            build_plan(core, TensorRTOptions(("sm89",), workspace=workspace), default_profiles(multiples_of(32), 4))
        assert "\n" not in str(caught.value) and "/_src/" not in str(caught.value)
    assert build_plan(core, TensorRTOptions(("sm89",), workspace=64 << 20), SMALL).plan


def test_sizes_beyond_tensorrt_are_refused_at_build_time(rtx, core):
    with pytest.raises(DeployError, match="largest size is too large: give smaller --sizes"):
        build_plan(core, SM89, [PlannedProfile((32, 32), (64, 64), (1 << 20, 1 << 20), 4)])


def test_a_profile_out_of_order_is_refused(rtx, core):
    with pytest.raises(DeployError, match="refuses profile 1 \\(64x64:32x32:128x128\\)"):
        build_plan(core, SM89, [*SMALL, PlannedProfile((64, 64), (32, 32), (128, 128))])
    with pytest.raises(MisuseError, match="no optimisation profile"):
        build_plan(core, SM89, [])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (graph(helper.make_node("Relu", ["image"], ["r"]), helper.make_node("Det", ["r"], ["scores"], name="odd")),
         "node odd (Det): it is not supported so; replace it in the network before export"),
        (graph(helper.make_node("Frobnicate", ["image"], ["scores"], name="own", domain="my.ops"), domain="my.ops"),
         "node own (Frobnicate): TensorRT has no such operator; replace it"),
        (graph(helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"], name="quantized"),
               helper.make_node("DequantizeLinear", ["q", "s", "z"], ["scores"]), s=np.float32(0.1), z=np.uint8(128)),
         "node quantized (QuantizeLinear): a zero point that is not 0; it is quantized for CPUs"),
        (graph(helper.make_node("DequantizeLinear", ["b", "s"], ["bias"], name="bias"),
               helper.make_node("Add", ["image", "bias"], ["scores"]), s=np.float32(0.1),
               b=np.zeros((1, 3, 1, 1), np.int32)),
         "node bias (DequantizeLinear): an int32 bias; it is quantized for CPUs"),
    ],
    ids=["unsupported", "custom", "zero-point", "int32-bias"],
)  # fmt: skip
def test_what_the_parser_refuses_is_named(rtx, model, said, clean):
    with pytest.raises(DeployError) as caught:
        build_plan(model, SM89, SMALL)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_cpus_int8_is_refused_by_name(rtx, core):
    from fcn_deploy.export.quantization.quantize import SCHEMES, quantize

    ranges = dict.fromkeys({n for node in core.graph.node for n in (*node.input, *node.output)}, (-1.0, 6.0))
    with pytest.raises(DeployError, match="quantized for CPUs; start from the float32 model"):
        build_plan(quantize(core, ranges, SCHEMES["cpu"]), SM89, SMALL)
    assert build_plan(quantize(core, ranges, SCHEMES["tensorrt"]), SM89, SMALL).plan


# Time


def test_a_timeout_is_one_line_and_leaves_nothing(rtx, core, clean):
    with pytest.raises(DeployError, match=r"longer than --timeout 0.001 s, and was stopped while \w+") as caught:
        build_plan(core, TensorRTOptions(("sm89",), timeout=0.001), SMALL)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert build_plan(core, TensorRTOptions(("sm89",), timeout=3600), SMALL).plan


FAKE = """
import os, sys, time
__version__ = "1.0.0"
class ILogger:
    pass
print("noise on stdout")
print("words before the end", file=sys.stderr)
{ending}
"""


@pytest.mark.parametrize(
    ("how", "sizes", "seen"),
    [
        ({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, (1, 1, 2, 4), True),
        ({}, (1, 1, 2, 2), True),
        ({"mode": "linear"}, (1, 1, 1.5, 2), True),
        ({"coordinate_transformation_mode": "asymmetric"}, (1, 1, 2, 2), False),  # rounds a half
        ({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, (1, 1, 3, 2), False),
        ({}, (1, 1, 0.5, 0.5), False),
        ({}, None, False),  # to the size of another map
    ],
)
def test_nearest_neighbours_that_a_rounded_position_decides_are_said(how, sizes, seen):
    constants = {} if sizes is None else {"scales": np.array(sizes, np.float32)}
    nodes = [helper.make_node("Shape", ["image"], ["shape"])]
    inputs = ["image", "", "", "shape"] if sizes is None else ["image", "", "scales"]
    nodes.append(helper.make_node("Resize", inputs, ["scores"], name="up", **how))
    said = unseen_resize(graph(*nodes, **constants))
    assert (
        said == "" if seen else said.startswith("up (Resize) takes nearest neighbours whose places a rounding decides")
    )


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("time.sleep(600)", "took longer than --timeout 0.1 s, and was stopped while starting"),
        ("os.abort()", "broke off while it built (signal 6); it last said: words before the end"),
        ("os._exit(3)", "broke off while it built (exit code 3)"),
        ("os.kill(os.getpid(), 9)", "as it does when memory runs out"),
        ("raise ImportError", "tensorrt_rtx is not installed; run: pip install 'fcn-deploy[rtx]'"),
        ("raise MemoryError", "out of memory while building"),
    ],
)
def test_a_builder_that_hangs_or_dies_is_one_line(core, tmp_path, monkeypatch, clean, ending, said):
    """By a stand-in for tensorrt_rtx, found first by the builder's process as by ours."""
    (tmp_path / "tensorrt_rtx.py").write_text(FAKE.format(ending=ending))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tensorrt_plan, "GRACE", 0.2)
    with pytest.raises(DeployError) as caught:
        build_plan(core, TensorRTOptions(("sm89",), timeout=0.1 if "sleep" in ending else None), SMALL)
    assert said in str(caught.value) and "\n" not in str(caught.value)


# The timing cache


def test_the_timing_cache_makes_a_round_trip(rtx, core, tmp_path):
    options = TensorRTOptions(("sm89",), timing_cache=tmp_path / "new" / "timings")
    first = build_plan(core, options, SMALL)
    content = options.timing_cache.read_bytes()
    assert content.startswith(CACHE_MAGIC)
    assert len(first.notes) == 1 and "times nothing while it builds" in first.notes[0]
    assert build_plan(core, options, SMALL).notes == first.notes
    assert [path.name for path in options.timing_cache.parent.iterdir()] == ["timings"]


@pytest.mark.parametrize(
    ("damage", "said", "kept"),
    [
        (lambda content: content[:-1] + b"?", "is damaged", False),
        (lambda content: content[:60], "is damaged", False),
        (lambda content: content.replace(b"tensorrt_rtx", b"tensorrt", 1), "is of tensorrt ", False),
        (lambda content: b"GIF89a junk" * 50, "is no timing cache of build-engine", True),
        (lambda content: b"", None, False),
    ],
)
def test_a_timing_cache_that_does_not_fit_is_ignored_and_said(rtx, core, tmp_path, damage, said, kept):
    path = tmp_path / "timings"
    options = TensorRTOptions(("sm89",), timing_cache=path)
    build_plan(core, options, SMALL)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    notes = build_plan(core, options, SMALL).notes
    assert said is None or said in notes[0]
    assert (path.read_bytes() == damage(good)) if kept else path.read_bytes().startswith(CACHE_MAGIC)
    assert kept or not any("ignored" in note for note in build_plan(core, options, SMALL).notes)


def test_a_timing_cache_that_cannot_be_written_does_not_lose_the_plan(rtx, core, tmp_path):
    (tmp_path / "file").write_text("")
    built = build_plan(core, TensorRTOptions(("sm89",), timing_cache=tmp_path / "file" / "timings"), SMALL)
    assert built.plan and any("cannot write" in note for note in built.notes)


# What users may ask for


def test_targets():
    assert parse_targets("SM86, sm89,sm86") == ["sm86", "sm89"] and parse_targets("cuda") == ["cuda"]
    for text, said in (("sm90", "sm90"), ("", "''"), ("cuda,sm89", "stands alone"), ("gpu", "choose cpu, cuda")):
        with pytest.raises(MisuseError, match=said):
            parse_targets(text)


def test_options_that_make_no_sense():
    for words, said in (
        ({"workspace": 0}, "--workspace"),
        ({"timeout": 0.0}, "--timeout"),
        ({"timeout": float("nan")}, "--timeout"),
        ({"level": 6}, "choose 0"),
        ({"hardware": "hopper"}, "choose one of none, ampere"),
        ({"targets": ("sm90",)}, "sm90"),
        ({"targets": ("sm89",), "hardware": "ampere+"}, "--hardware-compatible is for --target cuda"),
        ({"targets": ("sm89",), "version_compatible": True}, "--version-compatible is for --target cuda"),
        ({"timing_cache": Path("/")}, "is a folder"),
    ):
        with pytest.raises(MisuseError, match=said):
            TensorRTOptions(**words)


def test_cuda_needs_a_gpu(core, clean):
    # Asked in a process of its own, as plans are built in one: a simulated driver may be loaded in this one.
    code = f"from {tensorrt_process.__name__} import local_device; print(local_device())"
    if finished([sys.executable, "-c", code]).stdout.strip() != "None":
        pytest.skip("this machine has a GPU; run the tests on one without to see the refusal")
    with pytest.raises(DeployError, match=r"none can be used .* --target sm86,sm89,sm120"):
        build_plan(core, TensorRTOptions(), SMALL)


def test_cuda_takes_what_is_there(monkeypatch):
    modules = {}

    def find(name):
        if name not in modules:
            raise ModuleNotFoundError(name, name=name)
        if isinstance(modules[name], Exception):
            raise modules[name]
        return modules[name]

    monkeypatch.setattr(tensorrt_process, "import_module", find)
    monkeypatch.setattr(tensorrt_process, "local_device", lambda: (8, 9))
    broken = ImportError("libnvinfer.so.11: cannot open shared object file", name="tensorrt_bindings.tensorrt")
    for module, said in (
        (None, "tensorrt is not installed, and tensorrt_rtx cannot be imported; run: pip install"),
        (
            SimpleNamespace(__version__="10.3.0"),
            r"tensorrt 10.3.0 is too old \(10.12 or later is wanted\), and tensorrt",
        ),
        (broken, r"tensorrt cannot be imported \(libnvinfer.so.11: cannot open shared object file\), and tensorrt_rtx"),
    ):
        modules |= {"tensorrt": module} if module else {}
        with pytest.raises(DeployError, match=said):
            choose_module(["cuda"])
    modules["tensorrt_rtx"] = SimpleNamespace(__version__="1.7.1")
    assert choose_module(["cuda"]) == (modules["tensorrt_rtx"], ("sm89",))
    monkeypatch.setattr(tensorrt_process, "local_device", lambda: (9, 0))
    said = r"so.11: .*, and TensorRT for RTX has no plans for sm90 \(H100, H200 and GH200\); run: pip install"
    with pytest.raises(DeployError, match=said):
        choose_module(["cuda"])
    modules["tensorrt"] = SimpleNamespace(__version__="11.4.1.2")
    assert choose_module(["cuda"]) == (modules["tensorrt"], ("sm90",))


# TensorRT itself cannot be installed where there is no GPU: a stand-in of NVIDIA's signatures records what is asked.

VERSIONS = ("10.12", "10", "11")
LAYER = (
    "Name: a + b, LayerType: CaskConvolution, Inputs: [ { Name: x, Format/Datatype: Row major linear FP16 }], "
    "Outputs: [ { Name: y, Format/Datatype: Row major linear FP16 }], ParameterType: Convolution, TacticName: sm90_xmma"
)


def recording_tensorrt(calls, version="11", activations="Total Activation Memory: {} bytes", **changed):
    """The stand-in, which builds b"plan" and adds b"+timings" to what it is given of them."""

    def held(content):
        return standin.new(trt.IHostMemory, content=content)

    def add_profile(config, profile):
        count = vars(config).setdefault("num_optimization_profiles", 0)
        object.__setattr__(config, "num_optimization_profiles", count + 1)
        return count

    def set_cache(config, cache, ignore_mismatch):
        object.__setattr__(config, "_cache", cache)
        return cache.content != b"of another GPU"

    def build(builder, network, config):
        log, severity = builder.log, trt.ILogger.Severity
        config.progress_monitor.phase_start("Building engine", None, 1)
        for index in range(config.num_optimization_profiles):
            log.log(severity.INFO, activations.format(1000 * (index + 1)))
        if not config.progress_monitor.step_complete("Building engine", 0):
            log.log(severity.ERROR, "Error Code 7: BuildCanceled (Build canceled by user)")
            return None
        return held(b"plan")

    def parse(parser, path):
        onnx.checker.check_model(path)
        return True

    behaviour = {
        "Builder.__init__": lambda builder, log: object.__setattr__(builder, "log", log),
        "Builder.create_network": lambda builder, flags: standin.new(trt.INetworkDefinition, num_inputs=1),
        "Builder.create_builder_config": lambda builder: standin.new(trt.IBuilderConfig),
        "Builder.create_optimization_profile": lambda builder: standin.new(trt.IOptimizationProfile),
        "Builder.build_serialized_network": build,
        "EngineInspector.get_engine_information": lambda inspector, form: f"Layers:\n{LAYER}\nBindings:\nimage",
        "IBuilderConfig.add_optimization_profile": add_profile,
        "IBuilderConfig.create_timing_cache": lambda config, data: standin.new(trt.ITimingCache, content=data),
        "IBuilderConfig.set_timing_cache": set_cache,
        "IBuilderConfig.get_timing_cache": lambda config: config._cache,
        "ICudaEngine.create_engine_inspector": lambda engine: standin.new(trt.EngineInspector),
        "INetworkDefinition.get_input": lambda network, index: standin.new(
            trt.ITensor, name="image", shape=(-1, 3, -1, -1)
        ),
        "ITimingCache.serialize": lambda cache: held(cache.content + b"+timings"),
        "OnnxParser.parse_from_file": parse,
        "Runtime.deserialize_cuda_engine": lambda runtime, plan: standin.new(trt.ICudaEngine),
    }
    trt = standin.module(version, behaviour | changed, calls)
    return trt


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stand_in_refuses_what_the_bindings_refuse(version):
    trt = recording_tensorrt([], version)

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.anything = 1  # a class written in Python

    builder = trt.Builder(Log())
    config = builder.create_builder_config()
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=4)
    for wrong in (
        lambda: trt.Builder(),
        lambda: trt.Builder("no logger"),
        lambda: trt.IBuilderConfig(),  # no constructor
        lambda: builder.create_network("strongly typed"),
        lambda: builder.create_network(flag=1),
        lambda: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        lambda: config.set_memory_pool_limit(trt.BuilderFlag.TF32, 4),
        lambda: config.set_memory_pool_limit(0, 4),
        lambda: config.set_flag(6),
        lambda: config.set_flag(trt.BuilderFlag.TF32, True),
        lambda: builder.build_serialized_network(config, config),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(AttributeError, match="set_compute_capability"):
        config.set_compute_capability  # noqa: B018 (TensorRT for RTX's alone)
    with pytest.raises(AttributeError, match="no attribute 'max_workspace_size'"):
        config.max_workspace_size = 4
    with pytest.raises(AttributeError, match="no setter"):
        config.num_optimization_profiles = 4
    with pytest.raises(AttributeError):
        trt.ComputeCapability  # noqa: B018
    assert hasattr(trt.BuilderFlag, "FP16") == (version != "11")
    with pytest.raises(NotImplementedError, match=r"IBuilderConfig.get_flag: say what it gives"):
        config.get_flag(trt.BuilderFlag.TF32)
    with pytest.raises(AttributeError, match=r"tensorrt 1\d\..* has no Builder.make_plan"):
        recording_tensorrt([], version, **{"Builder.make_plan": None})


@pytest.fixture
def model_file(core, tmp_path):
    onnx.save(core, tmp_path / "core.onnx")
    return tmp_path / "core.onnx"


TWO = [PlannedProfile((32, 32), (64, 64), (128, 128), 4), PlannedProfile((128, 128), (512, 512), (1088, 1920), 4)]


@pytest.mark.parametrize("version", VERSIONS)
def test_tensorrt_is_asked_for_the_same(model_file, tmp_path, version):
    calls = []
    trt = recording_tensorrt(calls, version)
    options = TensorRTOptions(workspace=1 << 30, hardware="ampere+", version_compatible=True, level=5,
                           timing_cache=tmp_path / "timings")  # fmt: skip
    phases = []
    built = build_here(trt, model_file, options, TWO, ("sm90",), phases.append)
    assert (built.plan, built.activation_bytes, built.module) == (b"plan", (1000, 2000), "tensorrt")
    assert (built.version, built.targets) == (trt.__version__, ("sm90",))
    # Of the inspector, as this log has no list of layers.
    assert built.layers == (PlanLayer("a + b", "CaskConvolution", ("Half",), ("Half",)),)
    assert built.notes == ("a version-compatible plan brings host code along: who loads it must trust it",)
    assert calls[0] == ("create_network", 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert ("clear_flag", trt.BuilderFlag.TF32) in calls
    flags = [call for call in calls if call[0] == "set_flag"]
    assert flags == [("set_flag", trt.BuilderFlag.VERSION_COMPATIBLE)]  # no precision
    assert ("set_memory_pool_limit", trt.MemoryPoolType.WORKSPACE, 1 << 30) in calls
    assert ("hardware_compatibility_level", trt.HardwareCompatibilityLevel.AMPERE_PLUS) in calls
    assert ("builder_optimization_level", 5) in calls
    assert not any("compute_capabilit" in str(call[0]) for call in calls)
    assert [call for call in calls if call[0] == "set_shape"] == [
        ("set_shape", "image", (1, 3, 32, 32), (1, 3, 64, 64), (4, 3, 128, 128)),
        ("set_shape", "image", (1, 3, 128, 128), (1, 3, 512, 512), (4, 3, 1088, 1920)),
    ]
    assert phases[:2] == ["reading the network", "building"] and "building engine" in phases
    calls.clear()
    build_here(trt, model_file, options, TWO, ("sm90",))
    assert ("create_timing_cache", b"+timings") in calls
    calls.clear()
    assert f"is of tensorrt {trt.__version__} sm90" in build_here(trt, model_file, options, TWO, ("sm80",)).notes[1]
    assert ("create_timing_cache", b"") in calls


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_for_windows_is_asked_for_on_linux(model_file, monkeypatch, version):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    calls = []
    trt = recording_tensorrt(calls, version)
    built = build_here(trt, model_file, TensorRTOptions(platform="windows"), TWO, ("sm90",))
    assert ("runtime_platform", trt.RuntimePlatform.WINDOWS_AMD64) in calls
    assert built.notes == ("the plan is for windows-x86_64, and does not run on this machine",)
    dropped = property(lambda config: trt.RuntimePlatform.SAME_AS_BUILD, lambda config, value: None)  # as RTX's does
    monkeypatch.setattr(trt.IBuilderConfig, "runtime_platform", dropped, raising=False)
    with pytest.raises(DeployError, match=r"does not build for --platform windows here"):
        build_here(trt, model_file, TensorRTOptions(platform="windows"), TWO, ("sm90",))
    del trt.RuntimePlatform
    with pytest.raises(DeployError, match=rf"tensorrt {version}.* does not build for --platform windows"):
        build_here(trt, model_file, TensorRTOptions(platform="windows"), TWO, ("sm90",))
    calls.clear()
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    build_here(recording_tensorrt(calls, version), model_file, TensorRTOptions(platform="windows"), TWO, ("sm90",))
    assert "runtime_platform" not in [call[0] for call in calls]  # it is there already


def test_platforms_that_nothing_is_built_for(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for words, said in (
        ({"platform": "macos"}, r"--platform 'macos'; choose windows, or omit it for linux-x86_64"),
        (
            {"platform": "windows", "version_compatible": True},
            "--version-compatible brings the runtime of this machine",
        ),
    ):
        with pytest.raises(MisuseError, match=said):
            TensorRTOptions(**words)
    with pytest.raises(MisuseError, match="--platform is for TensorRT; name GPUs with --target"):
        BuildConfig(tensorrt=TensorRTOptions(platform="windows"))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(MisuseError, match="they are built on linux-x86_64 or there, and this is linux-aarch64"):
        TensorRTOptions(platform="windows")


def test_plans_of_rtx_are_of_every_system(rtx, core):
    """Its builder does not take Windows: it logs an error that is not so, and builds as if it had not been asked."""
    built = build_plan(core, TensorRTOptions(("sm89",), platform="windows"), SMALL)
    assert built.notes == (
        "a plan of TensorRT for RTX runs on Linux and Windows alike: --platform windows changes none",
    )


def test_tensorrt_without_what_other_versions_have(model_file):
    trt = recording_tensorrt([], version="10.12", activations="Total Activation Memory: {}")
    assert build_here(trt, model_file, TensorRTOptions(), TWO, ("sm80",)).activation_bytes == (1000, 2000)
    # As one that knows fewer levels, and where strong typing is all there is.
    trt.HardwareCompatibilityLevel = SimpleNamespace(NONE=0, AMPERE_PLUS=1)
    with pytest.raises(MisuseError, match=r"same-compute-capability: tensorrt 10.12.0.36 does not have it"):
        build_here(trt, model_file, TensorRTOptions(hardware="same-compute-capability"), TWO, ("sm80",))
    calls = []
    trt = recording_tensorrt(calls, activations="silence")
    trt.NetworkDefinitionCreationFlag = SimpleNamespace()
    assert build_here(trt, model_file, TensorRTOptions(), TWO, ("sm80",)).activation_bytes == (None, None)
    assert calls[0] == ("create_network", 0)


def test_timings_that_tensorrt_finds_unfit_are_said(model_file, tmp_path):
    calls = []
    trt = recording_tensorrt(calls)
    path = tmp_path / "timings"
    cache = TimingCache(path, f"tensorrt {trt.__version__} sm90")
    cache.save(SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"of another GPU")))
    built = build_here(trt, model_file, TensorRTOptions(timing_cache=path), TWO, ("sm90",))
    assert "does not fit this TensorRT or GPU" in built.notes[0] and built.plan == b"plan"


def test_a_cancelled_build_keeps_its_timings(model_file, tmp_path):
    options = TensorRTOptions(timeout=1e-9, timing_cache=tmp_path / "timings")
    with pytest.raises(DeployError, match="was stopped while building engine"):
        build_here(recording_tensorrt([]), model_file, options, TWO, ("sm90",))
    assert options.timing_cache.read_bytes().endswith(b"+timings")


def test_a_gpu_of_rtx_is_the_current_one(rtx, model_file, monkeypatch):
    with pytest.raises(DeployError, match="needs a GPU and its driver"):
        build_here(rtx, model_file, TensorRTOptions(), SMALL, ("sm89",))
    for options, said in (
        (TensorRTOptions(hardware="ampere+"), "name several targets instead"),
        (TensorRTOptions(version_compatible=True), "no lean runtime"),
    ):
        with pytest.raises(MisuseError, match=said):
            build_here(rtx, model_file, options, SMALL, ("sm89",))


def test_a_tensorrt_that_cannot_start(model_file):
    def no_builder(builder, log):
        log.log(trt.ILogger.Severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    trt = recording_tensorrt([], **{"Builder.__init__": no_builder})
    with pytest.raises(DeployError, match=r"TensorRT cannot start: CUDA initialization failure .* usable GPU"):
        build_here(trt, model_file, TensorRTOptions(), TWO, ("sm90",))

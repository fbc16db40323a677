"""What a build is told: options that contradict each other are refused before anything is done, in one line."""

from dataclasses import replace
from pathlib import Path

import pytest
from fcn_deploy.export.build.config import BuildConfig, TensorRTOptions, TuningOptions
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.sizes import Sizes, parse_sizes

from fcn_deploy import MisuseError

INT8 = {"int8": True, "calib": "photos"}


def test_nothing_said_is_float32_for_cpus():
    config = BuildConfig()
    assert config.on_cpu and config.quantization.precision == "float32" and config.latency_sizes is None
    assert config.files == {}


def test_a_target_is_a_cpu_a_gpu_or_onnx_runtimes():
    for target, kinds in (
        ("cpu", (True, False, False)), ("ort-cuda", (False, True, False)), ("sm89", (False, False, True)),
        ("cuda", (False, False, True)), ("SM86, sm89", (False, False, True)),
    ):  # fmt: skip
        config = BuildConfig(target=target)
        assert (config.on_cpu, config.on_ort_gpu, config.on_tensorrt) == kinds, target
    assert BuildConfig(target="SM86, sm89").tensorrt_options.targets == ("sm86", "sm89")


def test_latencies_are_measured_at_some_of_the_sizes_that_will_come():
    sizes = Sizes({(40, 50): 3, (480, 640): 1})
    assert BuildConfig(sizes=sizes).latency_sizes == ((40, 50), (480, 640))
    assert BuildConfig(sizes=sizes, latency_sizes=[[7, 9]]).latency_sizes == ((7, 9),)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"target": "tpu"}, "target 'tpu'; choose cpu, cuda"),
        ({"tensorrt": TensorRTOptions(workspace=1)}, "--workspace is for TensorRT; name GPUs with --target"),
        ({"tensorrt": TensorRTOptions(hardware="ampere+")}, "--hardware-compatible is for TensorRT"),
        ({"target": "ort-cuda", "batch": 2}, "--max-batch is for TensorRT"),
        ({"profiles": 2}, "--profiles is for TensorRT"),
        ({"target": "sm89", "profiles": 2}, "--profiles divides the sizes of --sizes; pass them"),
        ({"target": "sm89", "profiles": 17, "sizes": Sizes({(8, 8): 1})}, "choose 1 to 16"),
        ({"target": "sm89", "profiles": 2, "sizes": parse_sizes("8x8:9x9:10x10")}, "omit --profiles"),
        ({"target": "sm89", "batch": 0}, "a batch has at least 1 image"),
        ({"target": "sm89", "tuning": TuningOptions()}, "--backend is for --target cpu; omit it"),
        ({"target": "sm89", "tuning": TuningOptions(stages=5)}, "--stages is for --target cpu; omit it"),
        ({"target": "sm89", "tensorrt": TensorRTOptions(version_compatible=True)}, "is for --target cuda"),
        ({"precision_report": Path("layers.csv")}, "--precision-report is for low precision"),
        ({"threads": 0}, "--threads 0; give 1 or more"),
    ],
)
def test_contradictions_are_refused(words, said):
    with pytest.raises(MisuseError) as caught:
        BuildConfig(**words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"int8": True}, "--int8 needs real images to calibrate on: pass --calib FOLDER"),
        ({"fp16": True}, "--fp16 needs real images to find what overflows"),
        ({"fastest": True}, "--fastest tries INT8, which needs real images"),
        ({"calib": "x"}, "--calib is for low precision; pass --int8"),
        ({"count": 7}, "--calib-count is for low precision"),
        ({"max_drop": 1.0}, "--max-drop is for low precision"),
        ({"fp16": True, "calib": "x", "ranges": Path("r")}, "--ranges is for --int8 and --fp8; pass"),
        ({"fp16": True, "calib": "x", "method": "minmax"}, "--calib-method is for --int8"),
        (INT8 | {"method": "guess"}, "method 'guess'; choose one of minmax"),
        (INT8 | {"count": 0}, "--calib-count 0"),
        (INT8 | {"max_drop": -1.0}, "--max-drop -1.0"),
        (INT8 | {"max_drop": float("nan")}, "--max-drop nan"),
        (INT8 | {"labels": Path("nowhere")}, "nowhere is not a folder"),
    ],
)
def test_precision_that_cannot_be_had_is_refused(words, said):
    with pytest.raises(MisuseError) as caught:
        QuantizationOptions(**words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_precision_goes_with_the_target():
    fp16 = QuantizationOptions(fp16=True, calib="photos")
    with pytest.raises(MisuseError, match="--fp16 is refused for the CPU"):
        BuildConfig(quantization=fp16)
    assert BuildConfig(target="ort-cuda", quantization=fp16).quantization.precision == "float16"
    fastest = QuantizationOptions(fastest=True, calib="photos")
    assert fastest.int8 and BuildConfig(quantization=fastest).quantization.precision == "int8"
    with pytest.raises(MisuseError, match="--fastest is for --target cpu and for TensorRT's plans, not ort-cuda"):
        BuildConfig(target="ort-cuda", quantization=fastest)
    assert BuildConfig(target="sm75", quantization=fastest).fastest_plan  # which leaves INT8 out, and says so
    with pytest.raises(MisuseError, match="--precision-report ranks the layers of one precision"):
        BuildConfig(target="sm89", quantization=fastest, precision_report=Path("layers.csv"))


def test_tuning_that_chooses_among_nothing_is_refused():
    for words, said in (
        ({"backends": ("abacus",)}, "backend 'abacus'; choose onnxruntime or openvino"),
        ({"backends": ()}, "no backend to choose from"),
        ({"seconds": 0.0}, "give more than 0"),
        ({"stages": 0}, "--stages 0; give 1"),
    ):
        with pytest.raises(MisuseError, match=said):
            TuningOptions(**words)


def test_files_are_named_by_their_options(tmp_path):
    quantization = QuantizationOptions(**INT8, ranges=tmp_path / "ranges.json")
    config = BuildConfig(
        target="sm89", quantization=quantization, tensorrt=TensorRTOptions(timing_cache=tmp_path / "t"),
        precision_report=tmp_path / "l.csv",
    )  # fmt: skip
    assert {name: path.name for name, path in config.files.items()} == {
        "--precision-report": "l.csv", "--ranges": "ranges.json", "--timing-cache": "t",
    }  # fmt: skip
    assert "--precision-report" not in replace(config, precision_report=None).files

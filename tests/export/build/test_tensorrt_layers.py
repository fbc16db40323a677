"""What TensorRT made of a network is read from its own list, and shown."""

import json

import pytest
from fcn_deploy.calibration.report.engine_report import PlanLayer
from fcn_deploy.export.build.config import TensorRTOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.targets.tensorrt.layers import (
    advice,
    convolutions_by_type,
    is_reformat,
    layers_of,
    summary,
)
from fcn_deploy.export.build.targets.tensorrt.plan import build_plan
from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.half import half
from fcn_deploy.runtime.backends.tensorrt.device import platform_name
from helpers import command, needs

from benchmarks.plan_layers import SIZE, cores

TENSOR = "{ Name: %s, Dimensions: [1,3,-1,-1], Datatype: %s, Format: (NHWC) Channel major format }"


def line(name, kind, takes, gives, weights="Int8"):
    inputs, outputs, constants = (TENSOR % pair for pair in (("x", takes), ("y", gives), ("w", weights)))
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [ {constants}], Outputs: [ {outputs}], "
        "TacticName: , StreamId: 0, Metadata: "
    )


LIST = [
    "Layers:",
    "Name: __mye1_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0",
    line("__myl_Move_myl0_1", "kgen", "Half", "Half"),
    line("/a/Conv_myl0_2", "correlation", "Int8", "Float"),
    line("__myl_QuanClip_myl0_3", "kgen", "Float", "Int8"),
    line("/b/Conv_myl0_4", "correlation", "Int8", "Float"),
    line("/a/Conv [profile 1]_myl1_2", "correlation", "Int8", "Float"),
    line("__myl_QuanClip_myl1_3", "kgen", "Float", "Int8"),
    "I/O Tensors:",
    " Name: image, IOMode: Input, DataType: Float",
]


def test_layers_are_told_once_with_what_they_take_and_give():
    layers = layers_of(LIST)
    assert layers[1] == PlanLayer("/a/Conv_myl0_2", "correlation", ("Int8",), ("Float",))
    assert [is_reformat(layer) for layer in layers] == [True, False, False, False]
    assert summary(layers) == "4 layers: 2 convolutions Int8 → Float, 1 reformats, 1 others"


def test_a_convolution_compiled_with_what_comes_after_it_is_one():
    fused = [line(f"__myl_{name}_myl0_1", "runtime_fusion", "Half", "Half") for name in ("CorrAddMaxMin", "FcAddRelu")]
    resized = line("__myl_Resi_myl0_2", "runtime_function", "Half", "Half")
    assert summary(layers_of([*fused, resized])) == "3 layers: 2 convolutions Half → Half, 0 reformats, 1 others"


def test_tensorrts_own_list_has_the_same_form():
    convolution = (
        "Name: a + b, LayerType: CaskConvolution, Inputs: [ " + TENSOR % ("x", "Int8") + "], Outputs: [ "
        + TENSOR % ("y", "Int8") + "], ParameterType: Convolution, Kernel: [3,3], TacticName: sm90_xmma"
    )  # fmt: skip
    layers = layers_of(
        [convolution, convolution.replace("CaskConvolution", "Reformat").replace("a + b", "Reformatting")]
    )
    assert convolutions_by_type(layers) == {"Int8 → Int8": 1} and is_reformat(layers[1])
    assert advice(layers, "int8") == ""  # it fuses: nothing to say


def test_data_types_are_read_where_the_library_says_them_with_the_format():
    """As TensorRT's inspector and its verbose log do (`trtexec --dumpLayerInfo`)."""
    rows = (
        ("Reformatting CopyNode for Input Tensor 0 to c", "Reformat", "Row major linear FP32", "Row major Int8 format"),
        ("c + r", "CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format",
         "Thirty-two wide channel vectorized row major Int8 format"),
        ("d", "CaskConvolution", "Channel major FP16 format where C % 8 == 0", "Row major linear BF16"),
    )  # fmt: skip
    tensor = "{ Name: x, Location: Device, Dimensions: [1,3,224,224], Format/Datatype: %s }"
    layers = layers_of(
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensor % takes}], Outputs: [ {tensor % gives}], "
        "ParameterType: Convolution, TacticName: sm90_xmma"
        for name, kind, takes, gives in rows
    )
    assert [(layer.takes, layer.gives) for layer in layers] == [
        (("Float",), ("Int8",)), (("Int8",), ("Int8",)), (("Half",), ("BFloat16",)),
    ]  # fmt: skip
    assert convolutions_by_type(layers) == {"Int8 → Int8": 1, "Half → BFloat16": 1}
    assert [is_reformat(layer) for layer in layers] == [True, False, False]


def test_int8_that_a_plan_does_not_keep_is_said_with_what_to_do():
    assert advice(layers_of(LIST), "float16") == ""
    assert "2 of 2 convolutions of this plan take it and give float" in advice(layers_of(LIST), "int8")
    none = layers_of([line("/a/Conv_myl0_2", "correlation", "Half", "Half")])
    assert "none of the plan's convolutions takes INT8; --fp16" in advice(none, "int8")
    assert advice((), "int8") == ""  # a builder that lists none


def test_fp16_plans_have_hardly_more_layers_than_convolutions(exports):
    needs("tensorrt_rtx")
    core = half(optimise_offline(core_of(import_model(exports / "narrow.onnx")).model), set(), True)
    convolutions = sum(node.op_type == "Conv" for node in core.graph.node)
    profiles = [PlannedProfile((64, 96), (64, 96), (128, 128)), PlannedProfile((96, 96), (480, 640), (480, 640))]
    built = build_plan(core, TensorRTOptions(("sm89",)), profiles)
    types = convolutions_by_type(built.layers)
    assert set(types) == {"Half → Half"} and types["Half → Half"] >= convolutions - 1
    assert len(built.layers) <= 1.15 * convolutions


@pytest.fixture(scope="module")
def full_width():
    """EfficientNet-Lite0 FCN-8s in FP16 and INT8, as build-engine hands it to TensorRT."""
    needs("tensorrt_rtx")
    return cores("efficientnet-lite0", ("float16", "int8"))


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("sm75",), ("sm75", "sm86", "sm89", "sm120"), ("sm86", "sm89", "sm120")])
def test_an_fp16_plan_has_few_layers_and_little_memory_on_every_gpu(full_width, targets):
    """Depthwise convolutions are what sm75 has no kernels for: each was copied before, 72 layers and 521 MiB."""
    core = full_width["float16"]
    convolutions = sum(node.op_type == "Conv" for node in core.graph.node)
    built = build_plan(core, TensorRTOptions(targets), [PlannedProfile(SIZE, SIZE, SIZE, 4)])
    assert convolutions_by_type(built.layers) == {"Half → Half": convolutions}
    assert len(built.layers) <= 1.15 * convolutions
    assert built.activation_bytes[0] <= 92 * 2**20


@pytest.mark.slow
def test_int8_plans_copy_no_maps_before_depthwise_convolutions(full_width):
    """They took 242 MiB, and 56 MB of plan for one image."""
    targets = TensorRTOptions(("sm86", "sm89", "sm120"))
    assert (
        build_plan(full_width["int8"], targets, [PlannedProfile(SIZE, SIZE, SIZE, 4)]).activation_bytes[0] < 160 << 20
    )
    assert len(build_plan(full_width["int8"], targets, [PlannedProfile(SIZE, SIZE, SIZE)]).plan) < 12e6


def test_the_layers_of_an_engine_are_shown_by_inspect_model(gpu_built):
    done = command("inspect-model", gpu_built[0])
    assert " convolutions Float → Float" in done.stdout and "(correlation): Float → Float" in done.stdout
    processor = platform_name().rpartition("-")[2]
    assert f"for sm89 on {processor}, Linux or Windows" in " ".join(done.stdout.split())
    record = json.loads(command("inspect-model", gpu_built[0], "--json").stdout)
    assert record["gpu"]["platform"] == platform_name()
    assert {"name", "kind", "takes", "gives"} == set(record["plan_layers"][0])


@pytest.mark.parametrize("text", ["", "Layers:", "Name: x, LayerType: "])
def test_a_list_of_another_form_tells_of_no_layers(text):
    assert layers_of([text]) == ()

"""The portable model in the runtimes it is meant for: OpenVINO runs it, TensorRT-RTX parses and builds it."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes
from fcn_deploy.export.build.standalone import build_standalone
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.fit_images import fit_images
from fcn_deploy.export.importer.import_model import import_model
from helpers import checkpoint_of, needs, random_network
from onnx import TensorProto, helper, numpy_helper

NETWORKS = [
    {},
    {"stride": 16, "upsampling": "learned"},
    {"stride": 32, "backbone": "alexnet"},
    {"upsampling": "learned", "backbone": "mobilenet-v2"},
    {"backbone": "vgg16"},
    {"arch": "dilated8", "backbone": "resnet50"},
]


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda a: "-".join(map(str, a.values())) or "default")
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    model = random_network(width=0.125, **request.param)
    export_module(model, checkpoint_of(model).card, folder / "m.onnx")
    build_standalone(import_model(folder / "m.onnx"), folder / "s.onnx")
    return folder, model


def test_openvino_gives_pytorchs_logits_at_every_size(exported):
    openvino = needs("openvino")
    import torch

    folder, model = exported
    compiled = openvino.Core().compile_model(folder / "m.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in ((1, 1), (37, 53), (2, 131), (96, 64)):
        x = np.random.default_rng(0).normal(size=(1, 3, *size)).astype(np.float32)
        with torch.inference_mode():
            expected = model(torch.from_numpy(x)).numpy()
        result = compiled([x])[0]
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, atol=1e-3 * np.ptp(expected))


def rtx_build(path, low, best, high):
    """Parse and build with TensorRT for RTX, which needs no GPU to build; returns the plan's size in bytes."""
    trt = needs("tensorrt_rtx")
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse(path.read_bytes()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    profile.set_shape(network.get_input(0).name, low, best, high)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return plan.nbytes


@pytest.mark.slow
def test_tensorrt_rtx_builds_the_portable_model_from_one_pixel_up(exported):
    folder, _ = exported
    assert rtx_build(folder / "m.onnx", (1, 3, 1, 1), (1, 3, 480, 640), (4, 3, 1080, 1920)) > 10_000


@pytest.mark.slow
def test_tensorrt_rtx_builds_the_standalone_model(exported):
    folder, _ = exported
    assert rtx_build(folder / "s.onnx", (1, 1, 1, 3), (1, 480, 640, 3), (2, 1080, 1920, 3)) > 10_000


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("fit", ["pad", "resize"])
def test_tensorrt_builds_what_fits_sizes_from_one_pixel_on(tmp_path, fit, opset):
    weight = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["logits"], strides=[4, 4])],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2, "h", "w"])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.save(fit_images(model, AcceptedSizes(4, 16, 4, 2), "it", fit)[0], tmp_path / "m.onnx")
    assert rtx_build(tmp_path / "m.onnx", (1, 3, 1, 1), (1, 3, 100, 100), (2, 3, 300, 300)) > 0

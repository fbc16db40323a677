"""The working memory of stages: measured at a few sizes, kept at all."""

import json
import subprocess
import sys
from unittest import mock

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.measured_memory import law_of, with_measured_memory
from fcn_deploy.export.build.targets import cpu
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.process_memory import resident
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture(autouse=True)
def measured_memory(little_is_measured):
    """As users have it."""
    with mock.patch.object(cpu, "with_measured_memory", with_measured_memory):
        yield


SIDES = np.array([128, 256, 362, 512, 724, 1024])
PIXELS = SIDES**2


@pytest.mark.parametrize(
    ("law", "taken"),
    [
        ("by pixels", 300.0 * PIXELS),
        ("a fixed part", 40e6 + 100.0 * PIXELS),
        ("by pixels squared", 50.0 * PIXELS + 0.004 * PIXELS.astype(float) ** 2),
    ],
)
def test_a_law_tells_the_memory_of_sizes_that_were_not_run(law, taken):
    fixed, by_pixel, by_square = law_of(list(zip(PIXELS.tolist(), taken.astype(int).tolist(), strict=True)))
    pixels = 4000.0 * 3000
    truth = {
        "by pixels": 300 * pixels,
        "a fixed part": 40e6 + 100 * pixels,
        "by pixels squared": 50 * pixels + 0.004 * pixels**2,
    }[law]
    assert truth <= fixed + by_pixel * pixels + by_square * pixels**2 <= 1.35 * truth


def test_an_uneven_arena_is_no_square():
    seen = [(p, int(p * by)) for p, by in zip(PIXELS.tolist(), (319.5, 356.9, 452.6, 375.2, 383.1, 383.2), strict=True)]
    _, by_pixel, by_square = law_of(seen)
    assert by_square == 0 and 452 < by_pixel < 600
    assert all(taken <= by_pixel * pixels for pixels, taken in seen)


def test_what_is_too_little_to_be_seen_gives_no_law():
    assert law_of([]) is None
    assert law_of([(16384, 0), (65536, 4096), (1 << 20, 2_000_000)]) is None


def _model(nodes, weights, path):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, None, None])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    onnx.save(model, path)
    return path


def _wide_at_full_size(path):
    """24 channels at the image's own size: the features of a small U-Net's first level."""
    random = np.random.default_rng(0)

    def conv(count, channels):
        return (random.standard_normal((count, channels, 3, 3)) / np.sqrt(9 * channels)).astype(np.float32)

    nodes = [
        helper.make_node("Conv", ["x", "a"], ["p"], pads=[1] * 4),
        helper.make_node("Relu", ["p"], ["q"]),
        helper.make_node("Conv", ["q", "b"], ["r"], pads=[1] * 4),
        helper.make_node("Relu", ["r"], ["s"]),
        helper.make_node("Concat", ["q", "s"], ["t"], axis=1),
        helper.make_node("Conv", ["t", "c"], ["y"], pads=[1] * 4),
    ]
    return _model(nodes, {"a": conv(24, 3), "b": conv(24, 24), "c": conv(4, 48)}, path)


def built(model, engine):
    """An engine on ONNX Runtime."""
    config = BuildConfig(latency_sizes=[(64, 64)], tuning=TuningOptions(backends=("onnxruntime",)))
    build_engine(import_model(model), engine, config)


RUN = """
import sys, json, numpy as np
from fcn_deploy import Segmenter
from fcn_deploy.runtime.process_memory import forget_highest, highest, resident
net = Segmenter(sys.argv[1], memory=int(sys.argv[2]), threads=1)
net(np.zeros((64, 64, 3), np.uint8))
image = np.ones((1500, 2000, 3), np.uint8)
before = resident()
forget_highest()
for size in ((1500, 2000), (1200, 1700), (900, 2000), (1499, 1999)):
    net(image[: size[0], : size[1]])
peak = highest() - before
for side in range(60):
    net(image[:64, : 64 + side])
print(json.dumps([peak, resident() - before]))
"""


@pytest.mark.slow
def test_a_memory_budget_is_kept_over_images_of_many_sizes(tmp_path):
    if resident() is None:
        pytest.skip("resident memory is read from Linux's /proc")
    model, engine = _wide_at_full_size(tmp_path / "wide.onnx"), tmp_path / "wide.engine"
    built(model, engine)
    budget = 200_000_000
    out = subprocess.run([sys.executable, "-c", RUN, engine, str(budget)], capture_output=True, text=True, check=True)
    peak, kept = json.loads(out.stdout)
    assert 0.3 * budget < peak <= 1.15 * budget
    assert kept <= 0.4 * budget


def test_memory_by_the_square_of_pixels_is_planned_so(tmp_path):
    if resident() is None:
        pytest.skip("resident memory is read from Linux's /proc")
    weight = np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)
    nodes = [  # at 1/8 of the size, each place attends to each
        helper.make_node("Conv", ["x", "w"], ["f"], strides=[8, 8]),
        helper.make_node("Reshape", ["f", "flat"], ["v"]),
        helper.make_node("Transpose", ["v"], ["k"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["k", "v"], ["s"]),
        helper.make_node("Softmax", ["s"], ["a"], axis=-1),
        helper.make_node("MatMul", ["v", "a"], ["o"]),
        helper.make_node("Shape", ["f"], ["shape"]),
        helper.make_node("Reshape", ["o", "shape"], ["m"]),
        helper.make_node("Resize", ["m", "", "by"], ["y"], mode="linear"),
    ]
    weights = {"w": weight, "flat": np.array([0, 0, -1]), "by": np.array([1, 1, 8, 8], np.float32)}
    engine = tmp_path / "attends.engine"
    built(_model(nodes, weights, tmp_path / "attends.onnx"), engine)
    with EngineFile(engine) as opened:
        (stage,) = opened.manifest.stages
    large, small = stage.working_memory(2048 * 2048), stage.working_memory(512 * 512)
    assert stage.bytes_per_pixel_squared > 0 and large > 100 * small

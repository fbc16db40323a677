"""Q/DQ as each target wants it, and FP16 with its emulation."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import TensorRTOptions
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.build.gpus import parse_targets
from fcn_deploy.export.build.targets.tensorrt.plan import build_plan
from fcn_deploy.export.build.targets.tensorrt.profiles import default_profiles
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.graph.edit import initializers, producers
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.passes.fuse_padding import fuse_padding
from fcn_deploy.export.passes.raw_input import raw_input
from fcn_deploy.export.quantization import calibrate
from fcn_deploy.export.quantization.half import (
    MAGNITUDE_OF,
    emulate_half,
    half,
    overflowing,
    with_magnitudes,
    with_opset_19,
)
from fcn_deploy.export.quantization.quantize import (
    SCHEMES,
    convolutions,
    measured_tensors,
    quantize,
    quantized_convolutions,
)
from fcn_deploy.export.quantization.round_weights import depthwise, round_to_fp8, round_weights
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.pixels.prepare import prepare
from helpers import FAMILY_IN_TURN, checkpoint_of, multiples_of, needs, onnx_model, photo, random_network
from ml_dtypes import bfloat16, float8_e4m3fn
from onnx import TensorProto, helper, numpy_helper

from fcn_deploy import DeployError, ModelCard

RANDOM = np.random.default_rng(0)
INT8_SCHEMES = ("cpu", "tensorrt")


def network(nodes, constants, scores=4):
    floats = {name: np.asarray(value, np.float32) for name, value in constants.items()}
    made = onnx_model(nodes, floats, gives=("N", scores, "h", "w"))
    onnx.checker.check_model(made)
    return made


def residual():
    """conv → clip → conv, plus a skip, → conv."""
    weights = {f"w{i}": RANDOM.normal(size=(4, c, 3, 3)) / 4 for i, c in enumerate((3, 4, 4))}
    return network(
        [
            helper.make_node("Conv", ["image", "w0", "b"], ["c0"], pads=[1] * 4),
            helper.make_node("Clip", ["c0", "low", "high"], ["r0"]),
            helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4),
            helper.make_node("Add", ["c1", "r0"], ["sum"]),
            helper.make_node("Conv", ["sum", "w2", "b"], ["scores"], pads=[1] * 4),
        ],
        weights | {"b": RANDOM.normal(size=4), "low": 0, "high": 6},
    )


def run(model, image, optimise=False, name="scores"):
    onnx.checker.check_model(model)
    return session(model.SerializeToString(), optimise=optimise).run([name], {"image": image})[0]


def test_calibration_keeps_its_memory_from_image_to_image_until_one_is_far_larger(monkeypatch):
    """Each start anew is paid for in page faults: half of the time where sizes are mixed."""
    opened = []
    monkeypatch.setattr(calibrate, "session", lambda data: opened.append(data) or session(data))
    read = calibrate.activation_reader(residual())
    for side in (32, 40, 16, 45, 44, 46, 64):  # 46² is more than twice 32²
        tensors = read(RANDOM.normal(size=(1, 3, side, side)).astype(np.float32))
        assert tensors["sum"].shape == (1, 4, side, side)
    assert len(opened) == 2


def ranges_of(model, images):
    """min-max ranges and means of what quantize needs."""
    names = measured_tensors(model)
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    del tapped.graph.output[:]
    tapped.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != "image")
    taps = session(tapped.SerializeToString())
    seen = {name: [] for name in names}
    for image in images:
        seen["image"].append(image)
        for output, value in zip(taps.get_outputs(), taps.run(None, {"image": image}), strict=True):
            seen[output.name].append(value)
    ranges = {name: (min(v.min() for v in vs), max(v.max() for v in vs)) for name, vs in seen.items()}
    return ranges, {name: np.mean([v.mean((0, 2, 3)) for v in vs], 0) for name, vs in seen.items()}


@pytest.mark.slow
@pytest.mark.parametrize("target", INT8_SCHEMES)
def test_quantized_scores_are_near_the_float_ones(target):
    model = residual()
    images = [RANDOM.normal(size=(1, 3, 20 + i, 30)).astype(np.float32) for i in range(3)]
    ranges, means = ranges_of(model, images)
    lowered = quantize(model, ranges, SCHEMES[target], means=means)
    assert quantized_convolutions(lowered) == 3
    for image in images:
        expected = run(model, image)
        assert np.abs(run(lowered, image) - expected).max() < 0.04 * np.ptp(expected)


@pytest.mark.parametrize(("side", "groups"), [(1, 1), (3, 1), (3, 4)])
def test_scores_of_cpus_are_sums_of_integers_whatever_the_size(side, groups):
    # Sums in float depend on how many pixels there are, and tiles would not have the whole image's scores.
    weight = RANDOM.normal(size=(8, 640 // groups, side, side))
    how = {"pads": [side // 2] * 4, "group": groups}
    model = network([helper.make_node("Conv", ["image", "w", "b"], ["scores"], **how)], {"w": weight, "b": range(8)})
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 640
    image = RANDOM.normal(size=(1, 640, 6, 48)).astype(np.float32)
    ranges, means = ranges_of(model, [image])
    lowered = quantize(model, ranges, SCHEMES["cpu"], means=means)
    assert quantized_convolutions(lowered) == 1
    whole = run(lowered, image, optimise=True)
    for width in (1, 8, 20, 40):
        np.testing.assert_array_equal(
            run(lowered, image[..., : width + 1], optimise=True)[..., :width], whole[..., :width]
        )
    expected = run(model, image)
    assert np.abs(whole - expected).max() < 0.05 * np.ptp(expected)


def test_the_cpus_own_kernels_agree_with_faithful_arithmetic():
    # Sums of two products of u8 and s8 stay inside 16 bits, also on CPUs without VNNI.
    model = residual()
    image = RANDOM.uniform(0, 3, size=(1, 3, 64, 64)).astype(np.float32)
    ranges, means = ranges_of(model, [image])
    lowered = quantize(model, ranges, SCHEMES["cpu"], means=means)
    faithful, real = run(lowered, image), run(lowered, image, optimise=True)
    assert np.abs(faithful - real).max() < 0.02 * np.ptp(faithful)


def strided():
    """A first layer as TensorFlow pads it, at the right and the bottom alone."""
    weights = {"w0": RANDOM.normal(size=(6, 3, 3, 3)) / 4, "w1": RANDOM.normal(size=(4, 6, 3, 3)) / 4}
    return network(
        [
            helper.make_node("Conv", ["image", "w0"], ["c0"], pads=[0, 0, 1, 1], strides=[2, 2]),
            helper.make_node("Relu", ["c0"], ["r0"]),
            helper.make_node("Conv", ["r0", "w1", "b"], ["scores"], pads=[1] * 4),
        ],
        weights | {"b": RANDOM.normal(size=4)},
    )


def pixels_of(size, seed=0):
    return prepare(photo(*size, seed), PIXELS), photo(*size, seed)


NO_INT8 = "its first layer is no INT8 convolution"
PIXELS = ModelCard(tuple("abcd"), mean=(124, 116, 104), size_multiple=2)


@pytest.mark.parametrize(("model", "border"), [(residual(), (1, 1, 1, 1)), (strided(), (0, 0, 1, 1))])
def test_int8_on_pixels_is_as_near_to_float_as_on_normalised_images(model, border):
    ranges, means = ranges_of(model, [pixels_of((64, 96), seed)[0] for seed in range(3)])
    lowered = quantize(model, ranges, SCHEMES["cpu"], means=means)
    raw = raw_input(lowered, model, PIXELS, means["image"])
    assert raw.border == border and not raw.why_not
    assert quantized_convolutions(raw.model) == quantized_convolutions(lowered)
    lost = {"normalised": 0.0, "pixels": 0.0}
    for seed, size in enumerate([(1, 1), (2, 7), (37, 41), (64, 96), (5, 131)]):
        x, image = pixels_of(size, seed + 3)
        expected = run(model, x)
        on_pixels = {how: run(raw.model, prepare(image, PIXELS, border=border), how) for how in (False, True)}
        assert on_pixels[False].shape == expected.shape
        assert np.abs(on_pixels[True] - on_pixels[False]).max() < 0.02 * np.ptp(expected)
        lost["normalised"] += np.square(run(lowered, x) - expected).sum()
        lost["pixels"] += np.square(on_pixels[False] - expected).sum()
    assert lost["pixels"] < 1.2 * lost["normalised"]


@pytest.mark.parametrize("model", [residual(), strided()])
def test_beyond_the_border_of_pixels_is_zero_after_normalisation(model):
    """An image of the mean is zero after normalisation: borders and padding must not be seen."""
    ranges, means = ranges_of(model, [pixels_of((64, 96), 1)[0]])
    lowered = quantize(model, ranges, SCHEMES["cpu"], means=means)
    raw = raw_input(lowered, model, PIXELS)
    image = np.full((9, 13, 3), PIXELS.mean, np.uint8)
    scores, expected = run(raw.model, prepare(image, PIXELS, border=raw.border)), run(lowered, prepare(image, PIXELS))
    assert np.abs(scores - expected).max() < 0.01 * np.ptp(run(model, pixels_of((64, 96), 1)[0]))


def test_networks_that_cannot_read_pixels_keep_their_input():
    model = residual()
    ranges, means = ranges_of(model, [pixels_of((32, 32))[0]])
    lowered = quantize(model, ranges, SCHEMES["cpu"], means=means)
    assert not raw_input(lowered, model, PIXELS).why_not
    wide = raw_input(lowered, model, replace(PIXELS, dtype="uint16"))
    assert wide.model is lowered and wide.border is None and wide.why_not == "its images are of uint16"
    assert raw_input(quantize(model, ranges, SCHEMES["cpu"], kept={"c0"}), model, PIXELS).why_not == NO_INT8
    model.graph.node.append(helper.make_node("Identity", ["image"], ["again"]))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.FLOAT, None))
    assert raw_input(quantize(model, ranges, SCHEMES["cpu"]), model, PIXELS).why_not == NO_INT8


def test_tensorrt_gets_symmetric_activations_and_float_biases():
    model = residual()
    ranges, means = ranges_of(model, [RANDOM.normal(size=(1, 3, 16, 16)).astype(np.float32)])
    lowered = quantize(model, ranges, SCHEMES["tensorrt"], means=means)
    values = initializers(lowered)
    for node in lowered.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert values[node.input[2]].dtype == np.int8 and not values[node.input[2]].any()
    made = producers(lowered)
    for node in lowered.graph.node:
        if node.op_type == "Conv":
            assert values[node.input[2]].dtype == np.float32  # no Q/DQ on biases
            assert made[node.input[0]].op_type == made[node.input[1]].op_type == "DequantizeLinear"
            assert values[made[node.input[1]].input[1]].shape == (4,)  # per channel
        if node.op_type == "Add":
            # The skip is quantized, the convolution's own result is not: that is what fuses.
            assert [name.endswith("/dq") for name in node.input] == [False, True]
        if node.op_type == "Clip":
            assert not node.input[0].endswith("/dq")


def test_cpus_get_unsigned_activations_int32_biases_and_reduced_weights():
    model = residual()
    ranges, means = ranges_of(model, [RANDOM.normal(size=(1, 3, 16, 16)).astype(np.float32)])
    lowered = quantize(model, ranges, SCHEMES["cpu"], means=means)
    types = {tensor.data_type for tensor in lowered.graph.initializer if tensor.name.endswith("/zero")}
    assert types == {TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32}
    values = initializers(lowered)
    weights = [v for name, v in values.items() if name.endswith("/int8")]
    assert len(weights) == 3


@pytest.mark.parametrize("shape", [(7, 3, 3, 3), (16, 24, 1, 1), (4, 5, 7, 7), (3, 1, 1, 2), (6, 2, 1, 1)])
def test_no_two_neighbouring_weights_can_saturate_16_bits(shape):
    for draw in (RANDOM.laplace, RANDOM.normal, lambda size: np.sign(RANDOM.normal(size=size))):
        weight = draw(size=shape).astype(np.float32)
        integers, scale = round_weights(weight, pairs=True)
        size = np.abs(integers.astype(int))
        for order in ((0, 1, 2, 3), (0, 2, 3, 1)):
            line = size.transpose(order).reshape(shape[0], -1)
            assert 255 * (line[:, :-1] + line[:, 1:]).max() < 2**15
        # And better than giving every channel 64 steps.
        peak = np.abs(weight).reshape(shape[0], -1).max(1)[:, None, None, None] / 64
        plain = np.round(weight / peak) * peak
        rounded = integers * scale[:, None, None, None]
        assert ((rounded - weight) ** 2).sum() <= ((plain - weight) ** 2).sum() * 1.0001


def test_only_depthwise_kernels_keep_the_full_range():
    weight = RANDOM.normal(size=(8, 1, 3, 3))
    for groups, alone in ((1, False), (8, True)):
        node = helper.make_node("Conv", ["image", "w"], ["scores"], group=groups)
        assert depthwise(node, weight) == alone


def test_biases_of_zero_channels_and_dead_inputs_survive():
    weight = RANDOM.normal(size=(4, 3, 1, 1))
    weight[1] = 0
    model = network([helper.make_node("Conv", ["image", "w", "b"], ["scores"])], {"w": weight, "b": [0.5, 0.05, -1, 2]})
    image = np.zeros((1, 3, 4, 4), np.float32)
    for target in INT8_SCHEMES:
        for high in (1.0, 30.0):
            lowered = quantize(model, {"image": (0.0, high), "scores": (-1.0, 2.0)}, SCHEMES[target])
            np.testing.assert_allclose(run(lowered, image)[0, :, 0, 0], [0.5, 0.05, -1, 2], atol=0.01)


def test_without_the_limit_weights_have_127_steps():
    weight = RANDOM.normal(size=(5, 6, 3, 3)).astype(np.float32)
    integers, scale = round_weights(weight, pairs=False)
    assert (np.abs(integers.reshape(5, -1).astype(int)).max(1) == 127).all()
    np.testing.assert_allclose(integers * scale[:, None, None, None], weight, atol=scale.max() / 2 * 1.001)


def test_kept_layers_stay_float():
    model = residual()
    ranges, means = ranges_of(model, [RANDOM.normal(size=(1, 3, 16, 16)).astype(np.float32)])
    for target in INT8_SCHEMES:
        lowered = quantize(model, ranges, SCHEMES[target], kept={"c1", "scores"}, means=means)
        assert quantized_convolutions(lowered) == 1
        everything = quantize(model, ranges, SCHEMES[target], kept={"c0", "c1", "scores"}, means=means)
        assert "QuantizeLinear" not in {node.op_type for node in everything.graph.node}
        image = RANDOM.normal(size=(1, 3, 9, 9)).astype(np.float32)
        np.testing.assert_allclose(run(everything, image), run(model, image), atol=1e-5)


def test_bias_correction_takes_the_mean_error_away():
    # One large weight a channel makes the rounding of the others coarse, and of one sign.
    weight = RANDOM.uniform(0.4, 0.49, size=(4, 3, 3, 3)) / 127
    weight[:, 0, 0, 0] = 1
    model = network([helper.make_node("Conv", ["image", "w"], ["scores"], pads=[1] * 4)], {"w": weight})
    images = [RANDOM.uniform(0, 2, size=(1, 3, 40, 40)).astype(np.float32) for _ in range(4)]
    ranges, means = ranges_of(model, images)

    def shift(with_means):
        lowered = quantize(model, ranges, SCHEMES["cpu"], means=with_means)
        inside = np.s_[:, :, 4:-4, 4:-4]
        return np.abs(np.mean([(run(lowered, x) - run(model, x))[inside].mean((0, 2, 3)) for x in images], 0)).max()

    assert shift(means) < 0.5 * shift(None)


def test_a_channel_of_zero_weights_and_a_dead_input():
    weight = RANDOM.normal(size=(4, 3, 1, 1))
    weight[2] = 0
    model = network([helper.make_node("Conv", ["image", "w"], ["scores"])], {"w": weight})
    for target in INT8_SCHEMES:
        lowered = quantize(model, {"image": (0.0, 1e-6), "scores": (0.0, 1e-6)}, SCHEMES[target])
        assert np.isfinite(run(lowered, np.zeros((1, 3, 4, 4), np.float32))).all()


def test_padding_becomes_part_of_the_convolution():
    pads = numpy_helper.from_array(np.array([0, 0, 0, 1, 0, 0, 2, 1], np.int64), "pads")
    graph = helper.make_graph(
        [
            helper.make_node("Pad", ["image", "pads"], ["padded"]),
            helper.make_node("Conv", ["padded", "w"], ["scores"], pads=[1, 0, 0, 0], strides=[2, 2]),
        ],
        "core",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 4, "h", "w"])],
        [pads, numpy_helper.from_array(RANDOM.normal(size=(4, 3, 3, 3)).astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    fused = fuse_padding(model).model
    assert [node.op_type for node in fused.graph.node] == ["Conv"]
    image = RANDOM.normal(size=(1, 3, 9, 8)).astype(np.float32)
    np.testing.assert_allclose(run(fused, image), run(model, image), atol=1e-5)


def every_magnitude():
    """float32 values of all magnitudes, of both signs, ties between the narrower types' values among them."""
    values = (np.arange(1 << 20, dtype=np.uint64) << 12).astype(np.uint32).view(np.float32)
    values = np.concatenate([values[np.isfinite(values)], RANDOM.normal(size=5000).astype(np.float32) * 100])
    return np.resize(values, (1, 3, 1024, 384))


@pytest.mark.parametrize(("kind", "dtype"), [(TensorProto.FLOAT16, np.float16), (TensorProto.BFLOAT16, bfloat16)])
def test_emulated_rounding_is_that_of_the_type(kind, dtype):
    """Subnormals and what overflows too."""
    image = every_magnitude()
    model = network([helper.make_node("Identity", ["image"], ["scores"])], {}, scores=3)
    with np.errstate(over="ignore"):
        expected = image.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(run(emulate_half(model, kind=kind), image), expected)


def test_fp8_as_it_is_written_rounds_as_e4m3_does():
    """Of every magnitude, with saturation at 448 and subnormals; by the kernels that the gate judges with."""
    image = every_magnitude()
    zero, scale = numpy_helper.from_array(np.zeros((), float8_e4m3fn), "z"), np.float32(0.125)
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["scores"]),
    ]
    model = with_opset_19(onnx_model(nodes, {"s": scale}, gives=("N", 3, "H", "W")))
    model.graph.initializer.append(zero)
    found = run(model, image)
    with np.errstate(over="ignore"):
        expected = np.clip(image / scale, -448, 448).astype(float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(found, expected)
    assert found.max() == 56 and found.min() == -56
    assert np.unique(np.abs(found)[(found != 0)]).size == 126  # every value that E4M3 has


def overflowing_network():
    """conv → 120000 → conv: float32 is fine, float16 is infinite."""
    return network(
        [
            helper.make_node("Conv", ["image", "up"], ["large"]),
            helper.make_node("Conv", ["large", "down"], ["small"]),
            helper.make_node("Relu", ["small"], ["scores"]),
        ],
        {"up": np.full((4, 3, 1, 1), 40000.0), "down": np.eye(4)[:, :, None, None] * 1e-4},
    )


def test_a_network_that_overflows_is_caught():
    model = overflowing_network()
    image = np.ones((1, 3, 4, 4), np.float32)
    assert not np.isfinite(run(emulate_half(model), image)).all()  # as in float16
    watched = session(with_magnitudes(model).SerializeToString())
    names = [output.name for output in watched.get_outputs()]
    values = dict(zip(names, watched.run(names, {"image": image}), strict=True))
    largest = {n.removeprefix(MAGNITUDE_OF): float(v) for n, v in values.items() if n.startswith(MAGNITUDE_OF)}
    assert largest["large"] == pytest.approx(120000, rel=1e-3)
    kept = overflowing(largest, model)
    assert kept == {"large", "small"}  # the node that gives it, and the node that reads it
    lowered = half(model, kept)
    types = {node.name: node.op_type for node in lowered.graph.node}
    assert "Cast" in types.values()
    np.testing.assert_allclose(run(lowered, image), run(model, image), rtol=1e-3)
    # bfloat16 has float32's range.
    emulated = run(emulate_half(model, kind=TensorProto.BFLOAT16), image)
    np.testing.assert_allclose(emulated, run(model, image), rtol=2**-6)


def test_half_models_keep_a_float32_interface():
    model = residual()
    lowered = half(model)
    kinds = [value.type.tensor_type.elem_type for value in (lowered.graph.input[0], lowered.graph.output[0])]
    assert kinds == [TensorProto.FLOAT] * 2
    assert {tensor.data_type for tensor in lowered.graph.initializer} == {TensorProto.FLOAT16}
    image = RANDOM.normal(size=(1, 3, 20, 20)).astype(np.float32)
    expected = run(model, image)
    assert np.abs(run(lowered, image) - expected).max() < 0.01 * np.ptp(expected)
    emulated = run(emulate_half(model), image)
    assert 0 < np.abs(emulated - expected).max() < 0.01 * np.ptp(expected)


def test_half_models_may_take_and_give_float16():
    model = residual()
    image = RANDOM.normal(size=(1, 3, 20, 24)).astype(np.float16)
    lowered = half(model, interface=True)
    kinds = [value.type.tensor_type.elem_type for value in (lowered.graph.input[0], lowered.graph.output[0])]
    assert kinds == [TensorProto.FLOAT16] * 2 and "Cast" not in {node.op_type for node in lowered.graph.node}
    onnx.checker.check_model(lowered, full_check=True)
    expected = run(half(model), image.astype(np.float32))
    np.testing.assert_allclose(run(lowered, image).astype(np.float32), expected, atol=0.01 * np.ptp(expected))
    # Nodes that stay float32 read it through a cast, and give float32.
    kept = half(model, [node.output[0] for node in model.graph.node], interface=True)
    assert kept.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    np.testing.assert_allclose(run(kept, image), expected, atol=0.01 * np.ptp(expected))


def dense(channels=32, residual=True):
    """Convolutions wide enough for FP8: 3 → k (not), k → k twice with a skip, depthwise (not), k → 4 (not)."""
    weights = {
        "w0": RANDOM.normal(size=(channels, 3, 3, 3)) / 5,
        "w1": RANDOM.normal(size=(channels, channels, 3, 3)) / 17,
        "w2": RANDOM.normal(size=(channels, channels, 1, 1)) / 6,
        "w3": RANDOM.normal(size=(channels, 1, 3, 3)) / 3,
        "w4": RANDOM.normal(size=(4, channels, 1, 1)) / 6,
    }
    return network(
        [
            helper.make_node("Conv", ["image", "w0"], ["c0"], pads=[1] * 4),
            helper.make_node("Relu", ["c0"], ["r0"]),
            helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2", "b"], ["c2"]),
            helper.make_node("Add", ["c2", "r0"], ["sum"]),
            helper.make_node("Conv", ["sum", "w3"], ["c3"], pads=[1] * 4, group=channels),
            helper.make_node("Conv", ["c3", "w4"], ["scores"]),
        ],
        weights | {"b": RANDOM.normal(size=channels)},
    )


def test_fp8_is_for_dense_convolutions_of_many_channels_alone():
    model = dense()
    names = [node.output[0] for node in SCHEMES["tensorrt-fp8"].quantized(model)]
    assert names == ["c1", "c2"]
    assert not SCHEMES["tensorrt-fp8"].quantized(dense(16))
    assert len(SCHEMES["tensorrt"].quantized(model)) == 5


def test_fp8_scores_are_near_the_float_ones_and_biases_make_up_for_the_mean():
    model = dense()
    image = RANDOM.normal(size=(1, 3, 40, 30)).astype(np.float32)
    ranges, means = ranges_of(model, [image])
    lowered = quantize(model, ranges, SCHEMES["tensorrt-fp8"], means=means)
    assert quantized_convolutions(lowered) == 2
    types = {tensor.data_type for tensor in lowered.graph.initializer}
    assert TensorProto.FLOAT8E4M3FN in types and TensorProto.INT8 not in types
    onnx.checker.check_model(lowered, full_check=True)
    expected = run(model, image)
    error = run(lowered, image) - expected
    assert 0 < np.sqrt((error**2).mean()) < 0.05 * expected.std()
    plain = quantize(model, ranges, SCHEMES["tensorrt-fp8"])
    assert np.abs(error.mean((0, 2, 3))).sum() < np.abs((run(plain, image) - expected).mean((0, 2, 3))).sum()
    everything_kept = quantize(model, ranges, SCHEMES["tensorrt-fp8"], kept={"c1", "c2"})
    np.testing.assert_array_equal(run(everything_kept, image), expected)


def test_fp8_weights_have_the_scale_of_least_error_by_channel_and_zeros_stay():
    weight = (
        RANDOM.normal(size=(5, 20, 3, 3)).astype(np.float32) * np.float32([1, 1e3, 1e-3, 1, 1])[:, None, None, None]
    )
    weight[3] = 0
    stored, scale = round_to_fp8(weight)
    values = stored.astype(np.float32)
    peaks = np.abs(values).reshape(5, -1).max(1)
    assert peaks[3] == 0 and (np.delete(peaks, 3) >= 208).all() and (scale > 0).all()
    plain = np.abs(weight).max((1, 2, 3), keepdims=True) / 448 + (weight == 0).all((1, 2, 3), keepdims=True)
    naive = (weight / plain).astype(float8_e4m3fn).astype(np.float32) * plain
    errors = [np.square(each - weight).sum((1, 2, 3)) for each in (values * scale[:, None, None, None], naive)]
    assert (errors[0] <= errors[1]).all() and errors[0][0] < 0.95 * errors[1][0]
    found = values * scale[:, None, None, None]
    assert np.abs(found - weight).max() <= 2**-4 * np.abs(weight).max()
    large = np.abs(weight) > 0.01 * np.abs(weight).max((1, 2, 3), keepdims=True)
    assert (np.abs(found - weight)[large] <= 2**-4 * 1.0001 * np.abs(weight)[large]).all()  # three bits after the first


@pytest.mark.parametrize("rest", [None, TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_tensorrt_rtx_builds_fp8_where_it_says_so(rest):
    needs("tensorrt_rtx")
    model = dense()
    ranges, means = ranges_of(model, [RANDOM.normal(size=(1, 3, 40, 30)).astype(np.float32)])
    lowered = quantize(model, ranges, SCHEMES["tensorrt-fp8"], means=means)
    lowered = lowered if rest is None else half(lowered, kind=rest)
    assert len(plan_of(lowered, ["sm89", "sm120"], 1)) > 10_000
    with pytest.raises(DeployError, match="fp8"):
        plan_of(lowered, ["sm86"], 1)


def test_transposed_convolutions_stay_float32_in_bf16():
    needs("tensorrt_rtx")
    weights = {"w": RANDOM.normal(size=(4, 3, 1, 1)), "up": RANDOM.normal(size=(4, 4, 4, 4)) / 4}
    nodes = [
        helper.make_node("Conv", ["image", "w"], ["c"]),
        helper.make_node("ConvTranspose", ["c", "up"], ["scores"], strides=[2, 2], pads=[1] * 4),
    ]
    model = network(nodes, weights)
    lowered = half(model, kind=TensorProto.BFLOAT16)
    assert len(plan_of(lowered, ["sm89"], 1)) > 10_000
    types = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    assert types["up"] == TensorProto.FLOAT and TensorProto.BFLOAT16 in types.values()
    image = RANDOM.normal(size=(1, 3, 20, 20)).astype(np.float32)
    expected = run(model, image)
    assert (
        0 < np.abs(run(emulate_half(model, kind=TensorProto.BFLOAT16), image) - expected).max() < np.ptp(expected) / 50
    )


def test_tensorrt_rtx_builds_bf16():
    needs("tensorrt_rtx")
    lowered = half(residual(), kind=TensorProto.BFLOAT16)
    kinds = [value.type.tensor_type.elem_type for value in (lowered.graph.input[0], lowered.graph.output[0])]
    assert kinds == [TensorProto.FLOAT] * 2
    assert {tensor.data_type for tensor in lowered.graph.initializer} == {TensorProto.BFLOAT16}
    assert len(plan_of(lowered, ["sm80", "sm120"], 1)) > 10_000
    with pytest.raises(DeployError, match="b16"):
        plan_of(lowered, ["sm75"], 1)


def plan_of(model, targets, multiple):
    return build_plan(model, TensorRTOptions(tuple(targets)), default_profiles(multiples_of(multiple), 4)).plan


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILY_IN_TURN, ids=lambda a: "-".join(map(str, a.values())))
def test_tensorrt_rtx_builds_int8_and_fp16_of_every_backbone(tmp_path, architecture):
    needs("tensorrt_rtx")
    model = random_network(width=0.125, **architecture)
    export_module(model, checkpoint_of(model).card, tmp_path / "m.onnx")
    core = core_of(import_model(tmp_path / "m.onnx"))
    card, core = core.card, optimise_offline(core.model)
    images = [prepare(photo(*size), card) for size in ((61, 97), (130, 70))]
    ranges, means = ranges_of(core, images)
    lowered = quantize(core, ranges, SCHEMES["tensorrt"], means=means)
    assert quantized_convolutions(lowered) == len(convolutions(core))
    expected = run(core, images[0])
    # Deep random networks amplify any rounding, so accuracy is tested on small and on trained networks.
    assert np.isfinite(run(half(lowered), images[0])).all()
    error = run(half(core), images[0]) - expected
    assert np.sqrt((error**2).mean()) < 0.15 * expected.std()
    for graph in (half(lowered), half(core)):
        assert len(plan_of(graph, ["sm89"], card.size_multiple)) > 10_000


def sized(scores="scores"):
    """A convolution, then a Resize whose scales are computed from the image's size in float32."""
    weight = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["image", "c1"], ["conv"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Cast", ["shape"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("Shape", ["conv"], ["small"]),
        helper.make_node("Cast", ["small"], ["smalls"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["sizes", "smalls"], ["ratio"]),
        helper.make_node("Mul", ["ratio", "mask"], ["masked"]),
        helper.make_node("Add", ["masked", "ones"], ["scales"]),
        helper.make_node("ConstantOfShape", ["small"], ["zeros"]),
        helper.make_node("Add", ["conv", "zeros"], ["c1/dq"]),  # a name that ours would have
        helper.make_node("Resize", ["c1/dq", "", "scales"], [scores], mode="linear"),
    ]
    graph = helper.make_graph(
        nodes,
        "sized",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(scores, TensorProto.FLOAT, ["N", 2, "h", "w"])],
        [
            numpy_helper.from_array(weight, "c1"),
            numpy_helper.from_array(np.float32([0, 0, 1, 1]), "mask"),
            numpy_helper.from_array(np.float32([1, 1, 0, 0]), "ones"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_sizes_are_never_computed_in_float16_and_names_do_not_collide():
    model = sized()
    x = np.random.default_rng(1).normal(size=(1, 3, 2, 5002)).astype(np.float32)  # 2501 is no float16
    expected = session(model.SerializeToString()).run(None, {"image": x})[0]
    ranges = dict.fromkeys(measured_tensors(model), (-30.0, 30.0))
    graphs = [half(model), emulate_half(model), quantize(model, ranges, SCHEMES["tensorrt"]),
              quantize(model, ranges, SCHEMES["cpu"]), half(quantize(model, ranges, SCHEMES["tensorrt"]))]  # fmt: skip
    for graph in graphs:
        onnx.checker.check_model(graph, full_check=True)
        found = session(graph.SerializeToString(), optimise=False).run(["scores"], {"image": x})[0]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1.5  # of 16; steps of 0.24 at the input
    trt = needs("tensorrt_rtx")
    for graph in (graphs[0], graphs[4]):
        assert len(plan_of(graph, ["sm89"], 2)) > 1000, trt.__version__


def test_control_flow_is_refused_for_fp16():
    model = sized()
    inner = helper.make_graph(
        [helper.make_node("Identity", ["c1/dq"], ["same"])],
        "inner",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.insert(10, helper.make_node("If", ["yes"], ["x"], then_branch=inner, else_branch=inner))
    with pytest.raises(DeployError, match="control flow"):
        half(model)


def test_unknown_gpus_are_refused():
    from fcn_deploy import MisuseError

    with pytest.raises(MisuseError, match="sm90"):
        parse_targets("sm89,sm90")
    assert parse_targets("SM86, sm120") == ["sm86", "sm120"]


def test_what_tensorrt_refuses_is_named():
    needs("tensorrt_rtx")
    from fcn_deploy import DeployError

    model = network([helper.make_node("Det", ["image"], ["scores"], name="strange")], {}, scores=3)
    with pytest.raises(DeployError, match=r"TensorRT refuses node strange \(Det\)"):
        plan_of(model, ["sm89"], 32)


def test_one_plan_serves_several_gpus():
    needs("tensorrt_rtx")
    assert len(plan_of(residual(), ["sm86", "sm89", "sm120"], 1)) > 10_000

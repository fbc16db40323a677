"""A first convolution on squares of pixels gives the very scores that it gave on pixels."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.build.targets.cpu import on_blocks
from fcn_deploy.export.passes.raw_input import raw_input
from fcn_deploy.export.passes.space_to_depth import space_to_depth
from fcn_deploy.export.quantization.quantize import SCHEMES, measured_tensors, quantize
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.backends.openvino import OpenVinoSession, profile
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.engine_format.stage import Stage, Upsampling
from fcn_deploy.runtime.pixels.prepare import prepare
from helpers import onnx_model
from onnx import helper

from fcn_deploy import ModelCard

# kernel, stride, pads (top, left, bottom, right), what sizes are multiples of, channels
STEMS = {
    "EfficientNet-Lite": ((3, 3), 2, (0, 0, 1, 1), 2, 3),
    "MobileNet": ((3, 3), 2, (1, 1, 1, 1), 2, 3),
    "ResNet": ((7, 7), 2, (3, 3, 3, 3), 2, 3),
    "unpadded": ((5, 5), 2, (0, 0, 0, 0), 1, 3),
    "even kernel, odd sizes": ((2, 2), 2, (0, 0, 0, 0), 1, 3),
    "uneven pads, odd sizes": ((3, 5), 2, (1, 2, 0, 1), 1, 1),
    "patches": ((4, 4), 4, (0, 0, 0, 0), 4, 4),
    "overlapping patches, odd sizes": ((7, 7), 4, (3, 3, 3, 3), 1, 3),
    "thirds": ((5, 3), 3, (2, 1, 2, 1), 1, 2),
}
SIZES = [(1, 1), (2, 7), (9, 4), (37, 41), (64, 96), (5, 131), (66, 33)]
RANDOM = np.random.default_rng(0)


def core_of(kernel, stride, pads, channels, **more):
    """Stem, activation, scores of two classes: float32."""
    weights = {
        "w0": RANDOM.normal(size=(8, channels, *kernel)) / kernel[0],
        "w1": RANDOM.normal(size=(2, 8, 1, 1)),
        "b0": RANDOM.normal(size=8),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w0", "b0"], ["c0"], strides=[stride] * 2, pads=list(pads), **more),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["scores"]),
    ]
    floats = {name: np.float32(value) for name, value in weights.items()}
    return onnx_model(nodes, floats, takes=("N", channels, "H", "W"), gives=("N", 2, "h", "w"))


def on_pixels(core, card):
    """The core in INT8, on pixels."""
    ranges = dict.fromkeys(measured_tensors(core), (-4.0, 4.0)) | {"r0": (0.0, 6.0)}
    return raw_input(quantize(core, ranges, SCHEMES["cpu"]), core, card)


def card_of(multiple, channels):
    return ModelCard(
        ("a", "b"), channels=channels, mean=[100 + 9 * c for c in range(channels)], std=[60.0] * channels,
        size_multiple=multiple, smallest=7 if multiple == 1 else 1,
    )  # fmt: skip


@pytest.mark.parametrize("stem", STEMS)
def test_scores_on_squares_are_those_on_pixels_bit_for_bit(stem):
    kernel, stride, pads, multiple, channels = STEMS[stem]
    card = card_of(multiple, channels)
    raw = on_pixels(core_of(kernel, stride, pads, channels), card)
    result = space_to_depth(raw.model, raw.border)
    assert not result.why_not and result.block == stride
    onnx.checker.check_model(result.model)
    pairs = [
        [run(made.model.SerializeToString(), threads=1) for made in (raw, result)] for run in (session, OpenVinoSession)
    ]
    for height, width in SIZES:
        image = np.random.default_rng(height).integers(0, 256, (height, width, channels), np.uint8)
        pixels = prepare(image, card, border=raw.border)
        squares = prepare(image, card, border=result.border, block=stride)
        on_ort = [run.run(None, {"image": x})[0] for run, x in zip(pairs[0], (pixels, squares), strict=True)]
        np.testing.assert_array_equal(*on_ort)
        if (
            max(kernel) <= stride
        ):  # OpenVINO's INT8 1×1 convolution of an interleaved image is wrong: the trial refuses it
            continue
        # OpenVINO takes another kernel, which may round a tie of its float scale the other way.
        before, after = (run.run(x) for run, x in zip(pairs[1], (pixels, squares), strict=True))
        assert np.abs(after - before).max() < 0.02 * max(np.ptp(before), 5)
        assert on_ort[0].size and np.ptp(on_ort[0]) > 0


@pytest.mark.parametrize("stem", ["EfficientNet-Lite", "ResNet"])
def test_openvino_runs_the_first_convolution_on_integers(stem):
    """As it does not where pixels are laid out before they are dequantized."""
    kernel, stride, pads, multiple, channels = STEMS[stem]
    card = card_of(multiple, channels)
    raw = on_pixels(core_of(kernel, stride, pads, channels), card)
    squares = space_to_depth(raw.model, raw.border)
    image = RANDOM.integers(0, 256, (64, 96, channels), np.uint8)
    for made, block in ((raw, 1), (squares, stride)):
        x = prepare(image, card, border=made.border, block=block)
        layers, _ = profile(made.model.SerializeToString(), x, threads=1, runs=3)
        first = next(layer for layer in layers if layer.operator == "Convolution")
        assert first.kernel.endswith("_I8"), first.kernel


@pytest.mark.parametrize("layout", ["contiguous", "crop", "mirrored", "columns first"])
@pytest.mark.parametrize(
    ("border", "block"), [((2, 2, 1, 0), 2), ((0, 0, 1, 1), 2), ((4, 0, 3, 5), 4), ((3, 0, 2, 2), 3)]
)
def test_squares_hold_the_pixels_and_the_mean_around_them(border, block, layout):
    card = card_of(1, 3)
    buffer = np.empty(3 * 200 * 200, np.uint8)
    for height, width in SIZES:
        image = RANDOM.integers(0, 256, (height + 4, width + 4, 3), np.uint8)[2:-2, 2:-2]
        changed = {"contiguous": image.copy(), "mirrored": image[::-1, ::-1], "columns first": np.asfortranarray(image)}
        image = changed.get(layout, image)
        buffer[:] = 7  # what an earlier image left must not show
        squares = prepare(image, card, buffer, border, block)[0]
        plain = prepare(image, card, border=border)[0]
        rows, columns = (side // block for side in plain.shape[:2])
        expected = plain[: rows * block, : columns * block].reshape(rows, block, columns, block, 3)
        np.testing.assert_array_equal(squares, expected.swapaxes(1, 2).reshape(rows, columns, -1))


@pytest.mark.parametrize(
    ("core", "why_not"),
    [
        (core_of((3, 3), 1, (1, 1, 1, 1), 3), "its first convolution has strides 1 and 1"),
        (core_of((1, 1), 3, (0, 0, 0, 0), 3), "its first convolution would have 9 times the weights"),
        (core_of((3, 3), 2, (1, 1, 1, 1), 3, dilations=[2, 2]), "its first convolution pads, is dilated or in groups"),
    ],
)
def test_what_cannot_take_squares_says_why(core, why_not):
    raw = on_pixels(core, card_of(2, 3))
    result = space_to_depth(raw.model, raw.border)
    assert result.model is raw.model and result.why_not == why_not and result.block == 1
    floats = space_to_depth(core, (0, 0, 0, 0))
    assert floats.model is core and floats.why_not == "its first layer is no convolution of 8-bit pixels"


def test_engines_say_what_their_first_stage_takes(tmp_path):
    kernel, stride, pads, multiple, channels = STEMS["MobileNet"]
    card = card_of(multiple, channels)
    raw = on_pixels(core_of(kernel, stride, pads, channels), card)
    stage = Stage("stage-0.onnx", stride=(2, 2), border=raw.border)
    manifest = Manifest(card, "cpu", "int8", Upsampling("linear", factor=(2, 2)), (stage,), "a test")
    plain = Draft(manifest, {"stage-0.onnx": raw.model.SerializeToString()})
    squares = on_blocks(plain)
    first = squares.manifest.stages[0]
    assert (first.border, first.block) == ((2, 2, 1, 1), 2) and first.stride == stage.stride
    images = [RANDOM.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    same = [RANDOM.integers(0, 256, (31, 47, 3), np.uint8) for _ in range(3)]
    with plain.opened(1) as before, squares.opened(1) as after:
        for image in images:
            np.testing.assert_array_equal(after.result(image), before.result(image))
        np.testing.assert_array_equal(after.backend.scores(same), before.backend.scores(same))
    manifest = Draft(Manifest(card, "cpu", "float32", Upsampling(), (Stage("stage-0.onnx"),), "a test"), {})
    assert on_blocks(manifest) is None


@pytest.mark.parametrize("wrong", [{"block": 0}, {"block": 2}, {"border": (1, 0, 0, 0), "block": 2}, {"block": "2"}])
def test_a_manifest_with_blocks_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="block"):
        Stage("stage-0.onnx", **wrong)

"""Padding and rounding of windows, written so that every runtime gives the same cells."""

import itertools

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.cut_stages import cut_core, members_of
from fcn_deploy.export.passes.explicit_padding import explicit_padding
from fcn_deploy.export.passes.floor_pooling import floor_pooling
from helpers import needs, onnx_model, run_onnx
from onnx import helper

from fcn_deploy import ModelCard

RANDOM = np.random.default_rng(0)
WINDOWS = [(2, 2, 1), (3, 2, 1), (3, 3, 1), (2, 3, 1), (5, 2, 1), (3, 1, 1)]  # kernel, stride, dilation
DILATED = [(3, 2, 2), (2, 3, 3), (3, 3, 2)]
PADS = [(0, 0), (1, 1), (0, 1), (1, 0), (2, 2)]


def one_node(operator, constants=None, opset=18, **attributes):
    node = helper.make_node(operator, ["image", *(constants or {})], ["scores"], name="node", **attributes)
    return onnx_model([node], constants, takes=("N", 2, "H", "W"), opset=opset)


def by_openvino(model):
    openvino = needs("openvino")
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1},
    )
    return lambda image: compiled([image])[0]


def image(height, width):
    """Below zero, so that padding is seen in a maximum."""
    return -1 - RANDOM.random((1, 2, height, width), dtype=np.float32)


def assert_same(got, expected, *what):
    assert got.shape == expected.shape, what
    np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=str(what))


def pooling(operator, window, pads, opset, **attributes):
    (kernel, stride, dilation), (begin, end) = window, pads
    if dilation > 1:
        attributes["dilations"] = [dilation] * 2
    return one_node(
        operator,
        opset=opset,
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        pads=[begin, begin, end, end],
        ceil_mode=1,
        **attributes,
    )


POOLINGS = [
    ("MaxPool", 18, {}, WINDOWS + DILATED),
    ("LpPool", 18, {"p": 3}, WINDOWS + DILATED),
    ("AveragePool", 18, {"count_include_pad": 0}, WINDOWS),
    ("AveragePool", 18, {"count_include_pad": 1}, WINDOWS),
    ("AveragePool", 19, {"count_include_pad": 1}, WINDOWS),
]


@pytest.mark.parametrize("operator, opset, attributes, windows", POOLINGS)
def test_a_pooling_that_rounds_up_gives_onnxs_cells_at_every_size(operator, opset, attributes, windows):
    for window, pads in itertools.product(windows, PADS):
        kernel, _, dilation = window
        if max(pads) >= kernel:
            continue
        made = pooling(operator, window, pads, opset, **attributes)
        changed = floor_pooling(made)
        assert not changed.why_not
        pool = next(node for node in changed.model.graph.node if node.op_type == operator)
        assert "ceil_mode" not in {item.name for item in pool.attribute}
        smallest = dilation * (kernel - 1) + 1
        for side in range(smallest, smallest + 6):
            x = image(side, side + 1)
            expected = run_onnx(made, x)
            assert_same(run_onnx(changed.model, x), expected, window, pads, side)


@pytest.mark.parametrize("operator, opset, attributes, windows", POOLINGS)
def test_a_pooling_that_rounded_up_gives_onnxs_cells_in_openvino(operator, opset, attributes, windows):
    for window in windows:
        made = pooling(operator, window, (1, 1), opset, **attributes)
        other = by_openvino(floor_pooling(made).model)
        for side in range(window[0] * window[2], window[0] * window[2] + 6):
            x = image(side, side + 1)
            assert_same(other(x), run_onnx(made, x), window, side)


def test_openvino_adds_a_row_to_the_pooling_as_it_was():
    """Otherwise the pass is needed no longer."""
    made = pooling("MaxPool", (3, 3, 1), (1, 1), 18)
    x = image(47, 65)
    assert run_onnx(made, x).shape == (1, 2, 16, 22)
    assert by_openvino(made)(x).shape == (1, 2, 17, 23)


def test_tensorrt_gives_such_a_pooling_onnxs_size():
    trt = needs("tensorrt_rtx")
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    for side in (47, 48, 49):
        made = pooling("MaxPool", (3, 3, 1), (1, 1), 18)
        changed = floor_pooling(made).model
        for place, number in ((0, 1), (2, side), (3, side)):
            changed.graph.input[0].type.tensor_type.shape.dim[place].dim_value = number
        builder = trt.Builder(log)
        network = builder.create_network(0)
        assert trt.OnnxParser(network, log).parse(changed.SerializeToString())
        assert tuple(network.get_output(0).shape) == run_onnx(made, image(side, side)).shape, side


def test_rounding_up_costs_no_node_but_where_padding_counts_in_a_mean():
    for operator, _, attributes, _ in POOLINGS:
        changed = floor_pooling(pooling(operator, (3, 2, 1), (1, 1), 18, **attributes)).model
        counted = attributes.get("count_include_pad", 0)
        assert [node.op_type for node in changed.graph.node] == ["Pad"] * counted + [operator]
    unpadded = pooling("AveragePool", (3, 2, 1), (0, 0), 18, count_include_pad=1)
    assert [node.op_type for node in floor_pooling(unpadded).model.graph.node] == ["AveragePool"]


def test_a_dilated_mean_that_needs_more_padding_than_its_kernel_stays():
    made = pooling("AveragePool", (2, 3, 3), (1, 1), 19)
    assert floor_pooling(made).model is made
    rounded_down = one_node("MaxPool", kernel_shape=[3, 3], strides=[2, 2])
    assert "rounds its size up" in floor_pooling(rounded_down).why_not


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_automatic_padding_of_a_pooling_that_rounds_up(auto):
    for (kernel, stride, _), padded in itertools.product(WINDOWS, (0, 1)):
        if stride > kernel and auto != "VALID":  # ONNX Runtime refuses it
            continue
        for operator in ("MaxPool", "AveragePool"):
            counted = {"count_include_pad": padded} if operator == "AveragePool" else {}
            made = one_node(
                operator, kernel_shape=[kernel] * 2, strides=[stride] * 2, auto_pad=auto, ceil_mode=1, **counted
            )
            both = floor_pooling(explicit_padding(made).model).model
            for side in range(5, 12):
                x = image(side, side + 1)
                expected = run_onnx(made, x)
                assert_same(run_onnx(both, x), expected, operator, kernel, stride, counted, side)
                assert_same(run_onnx(floor_pooling(made).model, x), expected, operator, kernel, stride, counted, side)


# kernel, stride, dilation, output_padding
TRANSPOSED = [(4, 2, 1, 0), (3, 2, 1, 0), (2, 2, 1, 0), (3, 2, 1, 1), (3, 2, 2, 0), (2, 3, 1, 0)]


def transposed(kernel, stride, dilation, extra, auto):
    weights = {"weight": np.random.default_rng(1).normal(size=(2, 3, kernel, kernel)).astype(np.float32)}
    more = {"dilations": [dilation] * 2, "output_padding": [extra] * 2}
    return one_node("ConvTranspose", weights, strides=[stride] * 2, auto_pad=auto, **more)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_a_transposed_convolution_gives_input_times_stride_with_its_padding_written_out(auto):
    for case in TRANSPOSED:
        made = transposed(*case, auto)
        changed = explicit_padding(made).model
        assert "auto_pad" not in {item.name for item in changed.graph.node[0].attribute}
        x = image(5, 8)
        expected = run_onnx(made, x)
        if auto != "VALID" and case[0] >= case[1]:
            assert expected.shape == (1, 3, 5 * case[1], 8 * case[1])
        assert_same(run_onnx(changed, x), expected, case)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_a_transposed_convolution_with_its_padding_written_out_is_equal_in_openvino(auto):
    x = image(5, 8)
    for case in TRANSPOSED:
        made = transposed(*case, auto)
        assert_same(by_openvino(explicit_padding(made).model)(x), run_onnx(made, x), case)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_a_convolutions_padding_is_written_out_where_it_is_the_same_at_every_size(auto):
    for kernel, stride in [(3, 1), (4, 1), (1, 1), (3, 2)]:
        weights = {"weight": RANDOM.normal(size=(3, 2, kernel, kernel)).astype(np.float32)}
        made = one_node("Conv", weights, strides=[stride] * 2, auto_pad=auto)
        changed = explicit_padding(made)
        stays = auto != "VALID" and stride > 1
        assert (changed.model is made) == stays
        x = image(9, 12)
        assert_same(run_onnx(changed.model, x), run_onnx(made, x), kernel, stride)


def test_a_transposed_convolution_to_a_given_shape_stays():
    weights = {"weight": np.ones((2, 3, 4, 4), np.float32)}
    made = one_node("ConvTranspose", weights, strides=[2, 2], auto_pad="SAME_UPPER", output_shape=[9, 9])
    assert explicit_padding(made).model is made


GLOBAL_MEANS = {
    "global": helper.make_node("GlobalAveragePool", ["c"], ["m"], name="mean"),
    "reduced": helper.make_node("ReduceMean", ["c", "last"], ["m"], name="mean"),
    "quantised": helper.make_node("GlobalAveragePool", ["d"], ["m"], name="mean"),
}


@pytest.mark.parametrize("mean", GLOBAL_MEANS)
def test_the_mean_of_a_large_plain_map_is_what_the_map_is(mean):
    """By either library the mean of 2048×2048 equal values was up to 1 % off, and of larger maps much more."""
    nodes = [helper.make_node("Conv", ["image", "w"], ["c"])]
    scale = {"scale": np.float32(0.5), "zero": np.uint8(0)} if mean == "quantised" else {}
    if mean == "quantised":
        nodes.append(helper.make_node("QuantizeLinear", ["c", "scale", "zero"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]))
    nodes += [GLOBAL_MEANS[mean], helper.make_node("Sub", ["c", "m"], ["scores"])]
    constants = {"w": np.float32([100.3, 0.7]).reshape(2, 1, 1, 1), **scale}
    constants |= {"last": np.array([-1, 2])} if mean == "reduced" else {}
    core = onnx_model(nodes, constants, takes=("N", 1, "H", "W"))
    card = ModelCard(("a", "b"), channels=1, mean=(0.0,), std=(1.0,))
    (part,) = cut_core(core, card, most=1)
    assert "mean" in part.stage.whole  # told as it was
    written = onnx.load_from_string(members_of((part,))["stage-0.onnx"])
    assert (written.graph.node != core.graph.node) == (mean != "quantised")
    plain = np.ones((1, 1, 2048, 2048), np.float32)
    noise = RANDOM.normal(size=(1, 1, 53, 97)).astype(np.float32)
    for run in (lambda image: run_onnx(written, image), by_openvino(written)):
        assert_same(run(noise), run_onnx(core, noise))
        if mean != "quantised":  # as it was: of integers
            assert np.abs(run(plain)[:, :, 0, 0] / constants["w"].ravel()).max() < 1e-4

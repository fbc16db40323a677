"""Each graph pass alone, on a small graph."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.graph.edit import prune
from fcn_deploy.export.passes.bilinear_deconv import bilinear_deconv
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.fold_decision import fold_decision
from fcn_deploy.export.passes.fold_input import fold_input
from fcn_deploy.export.passes.pad_and_crop import pad_and_crop
from fcn_deploy.export.passes.split_head import split_head
from fcn_deploy.export.passes.upsample_scores import upsample_scores
from fcn_deploy.fcn.model import bilinear_kernel
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.pixels.prepare import prepare
from helpers import onnx_model, run_onnx
from onnx import helper, numpy_helper

from fcn_deploy import ModelCard

RANDOM = np.random.default_rng(0)


def model(nodes, constants, channels=3, classes=2, opset=18):
    """[N,C,H,W] → [N,K,H,W] from `image` to `logits`."""
    takes, gives = ("N", channels, "H", "W"), ("N", classes, "H", "W")
    made = onnx_model(nodes, constants, takes=takes, gives=gives, names=("image", "logits"), opset=opset)
    onnx.checker.check_model(made)
    return made


CONV = helper.make_node("Conv", ["image", "weight"], ["coarse"], name="conv", strides=[4, 4], kernel_shape=[4, 4])
WEIGHT = RANDOM.normal(size=(2, 3, 4, 4)).astype(np.float32)


def resized(inputs=("coarse", "", "scales"), out="logits", extra=(), constants=None, **attributes):
    """A stride-4 convolution, then a Resize."""
    attributes = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"} | attributes
    node = helper.make_node("Resize", list(inputs), [out], name="resize", **attributes)
    scales = {"scales": np.array([1, 1, 4, 4], np.float32)} if "scales" in inputs else {}
    return model([CONV, node, *extra], {"weight": WEIGHT} | scales | (constants or {}))


def noise(*size, channels=3):
    return RANDOM.normal(size=(1, channels, *size)).astype(np.float32)


def test_passes_leave_their_input_alone():
    made = resized()
    before = made.SerializeToString()
    for change in (split_head, bilinear_deconv, fold_constants, lambda m: pad_and_crop(m, 4).model):
        change(made)
    fold_input(made, ModelCard(("a", "b")))
    fold_decision(made, ModelCard(("a", "b")))
    assert made.SerializeToString() == before


def test_pad_and_crop_makes_every_size_run():
    whole = pad_and_crop(resized(), 4).model
    for size in ((1, 1), (3, 9), (8, 4), (13, 17)):
        image = noise(*size)
        padded = np.zeros((1, 3, -(-size[0] // 4) * 4, -(-size[1] // 4) * 4), np.float32)
        padded[:, :, : size[0], : size[1]] = image
        np.testing.assert_allclose(
            run_onnx(whole, image), run_onnx(resized(), padded)[:, :, : size[0], : size[1]], atol=1e-5
        )


@pytest.mark.parametrize("smallest", [1, 8, 10])
@pytest.mark.parametrize("opset", [11, 12, 13, 14, 15, 18, 21])
def test_every_size_runs_at_every_opset(opset, smallest):
    coarse = model(
        [helper.make_node("Conv", ["image", "weight"], ["logits"], strides=[4, 4])], {"weight": WEIGHT}, opset=opset
    )
    whole = pad_and_crop(upsample_scores(coarse, 4).model, 4, smallest).model
    for size in ((1, 1), (3, 9), (8, 4), (13, 17)):
        image = noise(*size)
        padded = np.zeros((1, 3, *(-(-max(side, smallest) // 4) * 4 for side in size)), np.float32)
        padded[:, :, : size[0], : size[1]] = image
        np.testing.assert_allclose(
            run_onnx(whole, image), run_onnx(resized(), padded)[:, :, : size[0], : size[1]], atol=1e-5
        )
    core = split_head(whole)
    assert (core.size_multiple, core.smallest) == (4, smallest) and core.upsampling.factor == (4.0, 4.0)
    assert [node.op_type for node in core.model.graph.node] == ["Conv"]
    labels = run_onnx(fold_decision(whole, ModelCard(("a", "b"), activation="softmax")).model, image)
    assert labels.shape == (1, 13, 17) and labels.dtype == np.uint8


@pytest.mark.parametrize("opset", [11, 13])
def test_one_score_is_decided_at_every_opset(opset):
    conv = helper.make_node("Conv", ["image", "weight"], ["logits"], strides=[4, 4])
    coarse = model([conv], {"weight": WEIGHT[:1]}, classes=1, opset=opset)
    image = noise(8, 12)
    labels = run_onnx(fold_decision(coarse, ModelCard(("a", "b"), activation="sigmoid")).model, image)
    np.testing.assert_array_equal(labels, run_onnx(coarse, image)[:, 0] > 0)


def test_upsample_scores_gives_coarse_networks_full_size():
    coarse = model([helper.make_node("Conv", ["image", "weight"], ["logits"], strides=[4, 4])], {"weight": WEIGHT})
    image = noise(12, 20)
    np.testing.assert_allclose(run_onnx(upsample_scores(coarse, 4).model, image), run_onnx(resized(), image), atol=1e-6)


@pytest.mark.parametrize("coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
def test_split_head_cuts_the_last_resize_off(coordinates):
    whole = resized(coordinate_transformation_mode=coordinates)
    core = split_head(whole)
    assert core.upsampling == Upsampling("linear", coordinates, (4.0, 4.0)) and (core.size_multiple, core.smallest) == (
        1,
        1,
    )
    image = noise(16, 24)
    assert run_onnx(core.model, image).shape == (1, 2, 4, 6)
    assert [node.op_type for node in core.model.graph.node] == ["Conv"]
    assert (core.model.graph.input[0].name, core.model.graph.output[0].name) == ("image", "scores")


def test_split_head_takes_padding_and_cropping_off_with_it():
    core = split_head(pad_and_crop(resized(), 4).model)
    assert (core.size_multiple, core.smallest) == (4, 1) and core.upsampling.factor == (4.0, 4.0)
    assert [node.op_type for node in core.model.graph.node] == ["Conv"]


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax", "Sigmoid", "Identity"])
def test_what_follows_the_resize_and_changes_no_label_is_dropped(last):
    attributes = {"axis": 1} if "Softmax" in last else {}
    core = split_head(resized(out="full", extra=[helper.make_node(last, ["full"], ["logits"], **attributes)]))
    assert [node.op_type for node in core.model.graph.node] == ["Conv"]


@pytest.mark.parametrize(("axis", "kept"), [(3, 1), (2, 5)])
def test_a_softmax_between_transposes_is_dropped_where_it_is_over_channels(axis, kept):
    extra = [
        helper.make_node("Transpose", ["full"], ["last"], perm=[0, 3, 2, 1]),
        helper.make_node("Softmax", ["last"], ["soft"], axis=axis),
        helper.make_node("Transpose", ["soft"], ["logits"], perm=[0, 3, 2, 1]),
    ]
    assert len(split_head(resized(out="full", extra=extra)).model.graph.node) == kept


def test_a_softmax_over_another_axis_is_kept():
    core = split_head(resized(out="full", extra=[helper.make_node("Softmax", ["full"], ["logits"], axis=3)]))
    assert core.upsampling.mode == "none" and len(core.model.graph.node) == 3


@pytest.mark.parametrize("attributes", [{"mode": "cubic"}, {"antialias": 1}])
def test_upsampling_that_cannot_be_done_by_cells_stays_in_the_core(attributes):
    whole = resized(**attributes)
    core = split_head(whole)
    assert core.upsampling == Upsampling() and [node.op_type for node in core.model.graph.node] == ["Conv", "Resize"]
    image = noise(8, 12)
    np.testing.assert_allclose(run_onnx(core.model, image), run_onnx(whole, image))


def test_a_resize_to_the_images_computed_size_is_a_head_without_a_factor():
    extra = [
        helper.make_node("Shape", ["image"], ["hw"], start=2, end=4),
        helper.make_node("Shape", ["coarse"], ["nk"], start=0, end=2),
        helper.make_node("Concat", ["nk", "hw"], ["sizes"], axis=0),
    ]
    node = helper.make_node("Resize", ["coarse", "", "", "sizes"], ["logits"], mode="linear")
    core = split_head(model([CONV, *extra, node], {"weight": WEIGHT}))
    assert core.upsampling == Upsampling("linear", "half_pixel", None)
    assert [node.op_type for node in core.model.graph.node] == ["Conv"]


def test_a_resize_to_a_constant_size_is_no_head():
    sizes = {"sizes": np.array([1, 2, 16, 16], np.int64)}
    core = split_head(resized(inputs=("coarse", "", "", "sizes"), constants=sizes))
    assert core.upsampling.mode == "none"


@pytest.mark.parametrize("corner", [0, 1])
def test_a_crop_from_the_first_pixel_on_is_the_heads(corner):
    extra = [
        helper.make_node("Shape", ["image"], ["hw"], start=2, end=4),
        helper.make_node("Add", ["hw", "corner"], ["ends"]),
        helper.make_node("Slice", ["full", "corner", "ends", "axes"], ["logits"]),
    ]
    constants = {"corner": np.full(2, corner), "axes": np.array([2, 3], np.int64)}
    whole = resized(out="full", extra=extra, constants=constants)
    core = split_head(whole)
    assert core.upsampling.mode == ("linear" if corner == 0 else "none") and (core.size_multiple, core.smallest) == (
        1,
        1,
    )
    if corner:
        np.testing.assert_allclose(run_onnx(core.model, noise(16, 8)).shape, (1, 2, 15, 7))


def padding_itself(target="image_size", value=0.0, extra=()):
    """A model that pads to multiples of 8 by itself, and crops."""
    nodes = [
        helper.make_node("Shape", ["image"], ["shape"]),
        helper.make_node("Slice", ["shape", "two", "four"], ["image_size"]),
        helper.make_node("Neg", ["image_size"], ["minus"]),
        helper.make_node("Mod", ["minus", "eight"], ["after"]),
        helper.make_node("Concat", ["six", "after"], ["pads"], axis=0),
        helper.make_node("Pad", ["image", "pads", "value"], ["padded"]),
        helper.make_node("Conv", ["padded", "weight"], ["coarse"], strides=[4, 4], kernel_shape=[4, 4]),
        helper.make_node("Shape", ["padded"], ["padded_shape"]),
        helper.make_node("Slice", ["padded_shape", "two", "four"], ["padded_size"]),
        helper.make_node("Shape", ["coarse"], ["coarse_shape"]),
        helper.make_node("Slice", ["coarse_shape", "zero", "two"], ["nk"]),
        helper.make_node("Concat", ["nk", target], ["sizes"], axis=0),
        *extra,
        helper.make_node("Resize", ["coarse", "", "", "sizes"], ["full"], mode="linear"),
        helper.make_node("Slice", ["full", "zeros", "image_size", "axes"], ["logits"]),
    ]
    constants = {"zero": [0], "two": [2], "four": [4], "eight": [8], "six": [0] * 6, "zeros": [0, 0], "axes": [2, 3]}
    constants = {name: np.array(number, np.int64) for name, number in constants.items()}
    return model(nodes, constants | {"weight": WEIGHT, "value": np.float32(value)})


def test_padding_that_a_model_does_by_itself_is_the_runtimes():
    whole = padding_itself("padded_size")
    core = split_head(fold_constants(whole).model)
    assert (core.size_multiple, core.smallest) == (8, 1) and core.upsampling == Upsampling("linear", "half_pixel", None)
    assert [node.op_type for node in core.model.graph.node] == ["Conv"]
    image = noise(13, 17)
    padded = np.pad(image, ((0, 0), (0, 0), (0, 3), (0, 7)))
    scores = run_onnx(core.model, padded)
    up = model([helper.make_node("Resize", ["image", "", "x4"], ["logits"], mode="linear")],
               {"x4": np.array([1, 1, 4, 4], np.float32)}, channels=2)  # fmt: skip
    np.testing.assert_allclose(run_onnx(up, scores)[:, :, :13, :17], run_onnx(whole, image), atol=1e-5)


@pytest.mark.parametrize("kind", [{"target": "image_size"}, {"target": "padded_size", "value": 1.0}])
def test_padding_of_another_kind_stays(kind):
    core = split_head(padding_itself(**kind))
    assert (core.size_multiple, core.smallest) == (1, 1) and "Pad" in {node.op_type for node in core.model.graph.node}
    whole, image = padding_itself(**kind), noise(13, 17)
    if core.upsampling.mode == "none":
        np.testing.assert_allclose(run_onnx(core.model, image), run_onnx(whole, image))


def deconvolution(factor=4, groups=2, bias=False, change=None, pads=None):
    weight = np.zeros((2, 1 if groups == 2 else 2, 2 * factor, 2 * factor), np.float32)
    for index in range(2):
        weight[index, 0 if groups == 2 else index] = bilinear_kernel(factor).numpy()
    if change:
        change(weight)
    inputs = ["coarse", "kernel", *(["bias"] if bias else [])]
    node = helper.make_node(
        "ConvTranspose", inputs, ["logits"], group=groups, strides=[factor] * 2, kernel_shape=[2 * factor] * 2,
        pads=pads or [factor // 2] * 4,
    )  # fmt: skip
    return model(
        [CONV, node], {"weight": WEIGHT, "kernel": weight} | ({"bias": np.ones(2, np.float32)} if bias else {})
    )


@pytest.mark.parametrize("groups", [1, 2])
def test_a_bilinear_deconvolution_at_the_end_becomes_a_resize_of_the_same_labels(groups):
    whole = deconvolution(groups=groups)
    changed = bilinear_deconv(whole).model
    assert [node.op_type for node in changed.graph.node] == ["Conv", "Resize"]
    for size in ((4, 4), (16, 40), (64, 60)):
        image = noise(*size)
        first, second = run_onnx(whole, image), run_onnx(changed, image)
        np.testing.assert_array_equal(first.argmax(1), second.argmax(1))
        if min(size) > 16:
            np.testing.assert_allclose(first[:, :, 2:-2, 2:-2], second[:, :, 2:-2, 2:-2], atol=1e-5)
    padded = bilinear_deconv(pad_and_crop(whole, 4).model).model
    assert "ConvTranspose" not in {node.op_type for node in padded.graph.node}


def learned(weight):
    weight[0, 0, 3, 3] += 0.01


def mixed(weight):
    weight[0, 1, 0, 0] = 0.01


@pytest.mark.parametrize(
    "kept",
    [{"bias": True}, {"change": learned}, {"groups": 1, "change": mixed}, {"pads": [1, 1, 3, 3]}],
    ids=["bias", "learned", "mixes-classes", "shifted"],
)
def test_other_deconvolutions_stay(kept):
    assert [node.op_type for node in bilinear_deconv(deconvolution(**kept)).model.graph.node] == [
        "Conv",
        "ConvTranspose",
    ]


def test_a_bilinear_deconvolution_in_the_middle_stays():
    made = deconvolution()
    made.graph.node[-1].output[0] = "up"
    made.graph.node.append(helper.make_node("Relu", ["up"], ["logits"]))
    assert bilinear_deconv(made).model.graph.node[1].op_type == "ConvTranspose"


def test_fold_constants_leaves_numbers():
    nodes = [
        helper.make_node("Constant", [], ["four"], value=numpy_helper.from_array(np.array([4.0, 4.0], np.float32))),
        helper.make_node("Concat", ["ones", "four"], ["scales"], axis=0),
        CONV,
        helper.make_node("Resize", ["coarse", "", "scales"], ["logits"], mode="linear"),
    ]
    made = model(nodes, {"weight": WEIGHT, "ones": np.ones(2, np.float32)})
    folded = fold_constants(made).model
    assert [node.op_type for node in folded.graph.node] == ["Conv", "Resize"]
    image = noise(8, 8)
    np.testing.assert_allclose(run_onnx(folded, image), run_onnx(made, image), atol=1e-6)


def test_prune_keeps_what_outputs_need():
    made = resized(extra=[helper.make_node("Relu", ["coarse"], ["unused"])])
    made.graph.initializer.append(numpy_helper.from_array(np.ones(3), "spare"))
    prune(made)
    assert len(made.graph.node) == 2 and {t.name for t in made.graph.initializer} == {"weight", "scales"}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_folded_models_take_images_and_give_labels(dtype):
    card = ModelCard(("a", "b"), dtype=dtype, mean=(10, 20, 30), std=(5, 6, 7))
    whole = pad_and_crop(resized(), 4).model
    folded = fold_decision(fold_input(whole, card).model, card).model
    image = RANDOM.uniform(-99 if dtype == "int16" else 0, 200, (13, 9, 3)).astype(dtype)
    labels = run_onnx(folded, image[None])
    assert labels.dtype == np.uint8 and labels.shape == (1, 13, 9)
    np.testing.assert_array_equal(labels[0], run_onnx(whole, prepare(image, card))[0].argmax(0))


def test_a_folded_sigmoid_head_compares_with_its_threshold():
    weight = WEIGHT[:1]
    node = helper.make_node("Resize", ["coarse", "", "scales"], ["labels"], mode="linear")
    made = model([CONV, node, helper.make_node("Identity", ["labels"], ["logits"])],
                 {"weight": weight, "scales": np.array([1, 1, 4, 4], np.float32)}, classes=1)  # fmt: skip
    card = ModelCard(("no", "yes"), activation="sigmoid", threshold=0.8)
    image = noise(12, 12)
    made.graph.node[-1].output[0] = made.graph.output[0].name = "labels"
    made.graph.node[1].output[0] = made.graph.node[2].input[0] = "up"
    logits = run_onnx(made, image)[0, 0]
    np.testing.assert_array_equal(run_onnx(fold_decision(made, card).model, image)[0], 1 / (1 + np.exp(-logits)) > 0.8)


@pytest.mark.parametrize("padded", ["by itself", "by a Pad"])
def test_averages_that_count_padding_are_the_same_as_convolutions(padded):
    from fcn_deploy.export.passes.pooling_as_convolution import pooling_as_convolution
    from helpers import onnx_model, run_onnx

    pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    pool = {"kernel_shape": [3, 3], "strides": [2, 1]}
    nodes = [helper.make_node("Relu", ["image"], ["a"])]
    if padded == "by itself":
        nodes += [helper.make_node("AveragePool", ["a"], ["b"], pads=[1] * 4, count_include_pad=1, **pool)]
    else:
        nodes += [helper.make_node("Pad", ["a", "pads"], ["p"]), helper.make_node("AveragePool", ["p"], ["b"], **pool)]
    nodes.append(helper.make_node("Relu", ["b"], ["scores"]))
    model = onnx_model(nodes, {"pads": pads} if padded == "by a Pad" else {})
    made = pooling_as_convolution(model).model
    assert not any(node.op_type == "AveragePool" for node in made.graph.node)
    image = np.random.default_rng(0).standard_normal((2, 3, 17, 23)).astype(np.float32)
    np.testing.assert_allclose(run_onnx(made, image), run_onnx(model, image), atol=1e-6)

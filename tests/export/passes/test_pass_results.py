"""What all passes have in common: they leave their model alone, give the same bytes again, and say why not."""

from collections import Counter

import numpy as np
import onnx
import pytest
from fcn_deploy.export.analysis.crossings import crossings
from fcn_deploy.export.build.core import optimise_offline
from fcn_deploy.export.passes.as_float32 import as_float32
from fcn_deploy.export.passes.bilinear_deconv import bilinear_deconv
from fcn_deploy.export.passes.cancel_transposes import cancel_transposes
from fcn_deploy.export.passes.cut_decision import cut_decision
from fcn_deploy.export.passes.dequantize_late import dequantize_late
from fcn_deploy.export.passes.drop_idle import drop_idle
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.fold_decision import fold_decision
from fcn_deploy.export.passes.fold_input import fold_input
from fcn_deploy.export.passes.fold_scales import fold_scales
from fcn_deploy.export.passes.fuse_padding import fuse_padding
from fcn_deploy.export.passes.hard_sigmoid import hard_sigmoid
from fcn_deploy.export.passes.hard_swish import hard_swish
from fcn_deploy.export.passes.image_input import image_input
from fcn_deploy.export.passes.mean_in_steps import mean_in_steps
from fcn_deploy.export.passes.nearest_as_pytorch import nearest_as_pytorch
from fcn_deploy.export.passes.pad_and_crop import pad_and_crop
from fcn_deploy.export.passes.pooling_as_convolution import pooling_as_convolution
from fcn_deploy.export.passes.raise_opset import raise_opset
from fcn_deploy.export.passes.resize_by_factor import resize_by_factor
from fcn_deploy.export.passes.resize_to_multiple import resize_to_multiple
from fcn_deploy.export.passes.resolve_branches import resolve_branches
from fcn_deploy.export.passes.result import PassResult
from fcn_deploy.export.passes.reverse_channels import reverse_channels
from fcn_deploy.export.passes.space_to_depth import space_to_depth
from fcn_deploy.export.passes.split_head import split_head
from fcn_deploy.export.passes.upsample_scores import upsample_scores
from fcn_deploy.export.passes.widen_groups import widen_groups
from fcn_deploy.runtime.backends.onnxruntime import session
from onnx import TensorProto, helper, numpy_helper

from fcn_deploy import DeployError, ModelCard

CARD = ModelCard(("a", "b"))
RANDOM = np.random.default_rng(0)
WEIGHTS = {"w": RANDOM.normal(size=(2, 3, 1, 1)).astype(np.float32), "pads": np.int64([0, 0, 1, 1, 0, 0, 1, 1])}
PASSES = {
    "as_float32": as_float32,
    "bilinear_deconv": bilinear_deconv,
    "cancel_transposes": cancel_transposes,
    "cut_decision": cut_decision,
    "dequantize_late": dequantize_late,
    "fold_constants": fold_constants,
    "drop_idle": drop_idle,
    "fold_decision": lambda model: fold_decision(model, CARD),
    "fold_input": lambda model: fold_input(model, CARD),
    "fold_scales": fold_scales,
    "fuse_padding": fuse_padding,
    "hard_sigmoid": hard_sigmoid,
    "hard_swish": hard_swish,
    "image_input": image_input,
    "mean_in_steps": mean_in_steps,
    "nearest_as_pytorch": nearest_as_pytorch,
    "pad_and_crop": lambda model: pad_and_crop(model, 4, 8),
    "pooling_as_convolution": pooling_as_convolution,
    "raise_opset": lambda model: raise_opset(model, 21),
    "resize_by_factor": resize_by_factor,
    "resize_to_multiple": lambda model: resize_to_multiple(model, 4),
    "resolve_branches": resolve_branches,
    "reverse_channels": reverse_channels,
    "space_to_depth": lambda model: space_to_depth(model, (0, 0, 0, 0)),
    "split_head": split_head,
    "upsample_scores": lambda model: upsample_scores(model, 4),
    "widen_groups": widen_groups,
}


def node(operator, inputs, out, **attributes):
    return helper.make_node(operator, inputs, [out], **attributes)


def model(nodes, constants=None, opset=18, kind=TensorProto.FLOAT, shape=("N", 3, "H", "W")):
    """`image` → `logits`."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2, "H", "W"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (WEIGHTS | (constants or {})).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def everything():
    """Something to do for most passes."""
    nodes = [
        node("Constant", [], "four", value_floats=[1.0, 1.0, 4.0, 4.0]),
        node("Identity", ["four"], "scales"),
        node("Transpose", ["image"], "last", perm=[0, 2, 3, 1]),
        node("Relu", ["last"], "positive"),
        node("Transpose", ["positive"], "first", perm=[0, 3, 1, 2]),
        node("Pad", ["first", "pads"], "padded"),
        node("Conv", ["padded", "w"], "coarse"),
        node("Resize", ["coarse", "", "scales"], "full", mode="linear"),
        node("Softmax", ["full"], "logits", axis=1),
    ]
    return model(nodes)


def plain():
    """Nothing to do for most."""
    return model([node("Conv", ["image", "w"], "logits")])


def run(made, image):
    return session(made.SerializeToString(), optimise=False).run(None, {made.graph.input[0].name: image})[0]


def noise(*shape):
    return RANDOM.standard_normal(shape, np.float32)


@pytest.mark.parametrize("made", [everything(), plain()], ids=["everything", "plain"])
@pytest.mark.parametrize("name", PASSES)
def test_passes_change_a_copy_and_give_the_same_bytes_again(name, made):
    before = made.SerializeToString()
    results = [PASSES[name](made) for _ in range(2)]
    assert all(isinstance(result, PassResult) for result in results)
    assert made.SerializeToString() == before
    first, second = (result.model.SerializeToString() for result in results)
    assert first == second
    onnx.checker.check_model(results[0].model)
    assert all("\n" not in note for note in results[0].notes)


@pytest.mark.parametrize(
    ("name", "why_not"),
    [
        ("as_float32", "it is of float32"),
        ("bilinear_deconv", "its last layer is no transposed convolution"),
        ("cancel_transposes", "no two Transposes undo each other"),
        ("cut_decision", "no ArgMax or threshold is last"),
        ("dequantize_late", "nothing that it computes is dequantized"),
        ("drop_idle", "no Pad and no Slice is by numbers that are computed"),
        ("fold_constants", "nothing is computed of constants alone"),
        ("fold_scales", "no map beside a convolution alone is multiplied by, or added to, constants"),
        ("hard_sigmoid", "no sum is clipped to 0 and its divisor"),
        ("hard_swish", "no value is multiplied by its own HardSigmoid"),
        ("fuse_padding", "no convolution reads what a Pad of zeros gives to it alone"),
        ("mean_in_steps", "it takes no mean over the height and width of a map"),
        ("pooling_as_convolution", "no AveragePool counts zeros around a map"),
        ("resolve_branches", "it has no If"),
        ("space_to_depth", "its first layer is no convolution of 8-bit pixels"),
        ("widen_groups", "no convolution has groups of fewer than 8 channels"),
    ],
)
def test_a_pass_that_does_not_apply_says_why_and_gives_an_equal_model(name, why_not):
    made = plain()
    made.graph.initializer.pop()  # what nothing reads
    result = PASSES[name](made)
    assert result.why_not == why_not and result.model == made and not result.notes


def test_a_head_that_stays_is_explained():
    assert split_head(plain()).why_not == "no Resize is last"
    cubic = model([node("Conv", ["image", "w"], "c"), node("Resize", ["c", "", "s"], "logits", mode="cubic")],
                  {"s": np.float32([1, 1, 4, 4])})  # fmt: skip
    assert split_head(cubic).why_not == "its last Resize is cubic, half_pixel, round_prefer_floor"
    assert not split_head(everything()).why_not


def test_notes_are_said_of_a_model():
    halved = plain()
    weight = numpy_helper.from_array(np.float16(RANDOM.normal(size=(20, 3, 1, 1))), "w")
    halved.graph.initializer[0].CopyFrom(weight)
    assert as_float32(halved).said_of("m.onnx") == [
        "m.onnx is of float16; it is run in float32 (--fp16 makes an engine of float16)"
    ]
    raised = raise_opset(model([node("Conv", ["image", "w"], "logits")], opset=11))
    assert raised.said_of("m.onnx") == ["m.onnx is of opset 11; it is converted to 18"]
    with_labels = model([node("Conv", ["image", "w"], "c"), node("ArgMax", ["c"], "logits", name="best", axis=1)])
    result = cut_decision(with_labels)
    assert result.decision.kind == "argmax" and result.notes == (
        "gives labels; they are taken off with node best (ArgMax), and its scores are used",
    )


@pytest.mark.parametrize(
    ("groups", "channels", "filters", "left"),
    [
        (16, 1, 1, 2),  # depthwise
        (16, 1, 2, 2),  # with two filters a channel
        (6, 4, 3, 3),
        (8, 3, 1, 1),
        (20, 1, 1, 2),  # no multiple of 8: groups of 10
        (7, 1, 1, 7),  # no group of 8 or more can be made
        (67, 1, 1, 67),  # one of all would have 67 times the weights
        (2, 8, 8, 2),  # wide enough
    ],
)
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_groups_are_widened_and_sum_the_same(groups, channels, filters, left, kind):
    weight = RANDOM.integers(-4, 5, (groups * filters, channels, 3, 3)).astype(kind)
    conv = node("Conv", ["image", "g", "b"], "logits", group=groups, pads=[1, 0, 1, 0], dilations=[1, 2])
    bias = RANDOM.integers(-4, 5, groups * filters).astype(kind)
    made = model([conv], {"g": weight, "b": bias}, kind=helper.np_dtype_to_tensor_dtype(weight.dtype),
                 shape=("N", groups * channels, "H", "W"))  # fmt: skip
    made.graph.output[0].type.tensor_type.elem_type = made.graph.input[0].type.tensor_type.elem_type
    widened = widen_groups(made)
    (after,) = widened.model.graph.node
    assert {item.name: item for item in after.attribute}["group"].i == left
    assert bool(widened.why_not) == (left == groups)
    image = RANDOM.integers(-4, 5, (2, groups * channels, 7, 9)).astype(kind)
    np.testing.assert_array_equal(run(widened.model, image), run(made, image))


@pytest.mark.parametrize(
    ("scales", "attributes", "shift", "left"),
    [
        (16, {"axis": 0}, None, 2),
        (1, {}, 0, 2),
        (1, {}, 3, 16),  # zeros of which are not 0
        (16, {"axis": 0, "block_size": 1}, None, 16),
    ],
)
def test_groups_of_rounded_weights_are_widened_with_their_scales(scales, attributes, shift, left):
    constants = {
        "q": RANDOM.integers(-9, 10, (16, 1, 3, 3)).astype(np.int8), "zero": np.full((), shift or 0, np.int8),
        "s": 2.0 ** RANDOM.integers(-2, 3, (16, 1, 3, 3)[: 4 if "block_size" in attributes else 1]).astype(np.float32),
    }  # fmt: skip
    if scales == 1:
        constants["s"] = np.float32(0.5)
    read = node("DequantizeLinear", ["q", "s", *([] if shift is None else ["zero"])], "g", **attributes)
    made = model([read, node("Conv", ["image", "g"], "logits", group=16, pads=[1] * 4)], constants, 21,
                 shape=("N", 16, "H", "W"))  # fmt: skip
    widened = widen_groups(made, rounded_alone=True).model
    groups = next(item.i for item in widened.graph.node[-1].attribute if item.name == "group")
    assert groups == left
    if left < 16:
        image = RANDOM.integers(-4, 5, (2, 16, 7, 9)).astype(np.float32)
        np.testing.assert_array_equal(run(widened, image), run(made, image))
    floats = model([node("Conv", ["image", "w"], "logits", group=16)], {"w": np.ones((16, 1, 1, 1), np.float32)})
    assert widen_groups(floats, rounded_alone=True).why_not


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        (["Mul one", "Add one", "Add channels", "Mul channels"], []),
        (["Add channels", "Mul rows"], ["Mul"]),  # of other places of the map
        (["Add batch"], ["Add"]),  # which makes several images of one
        (["Relu", "Mul one"], ["Relu", "Mul"]),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_constants_behind_a_convolution_are_part_of_it(steps, left, bias):
    constants = {
        "one": np.float32([1.7]), "channels": np.float32([[[2]], [[-3]]]), "b": np.float32([0.5, 7]),
        "rows": np.float32([[[[1], [2], [3], [4], [5]]]]), "batch": np.ones((3, 2, 1, 1), np.float32),
    }  # fmt: skip
    nodes, name = [node("Conv", ["image", "w", *(["b"] if bias else [])], "s")], "s"
    for place, (operator, *others) in enumerate(map(str.split, steps)):
        following = "logits" if place == len(steps) - 1 else f"s{place}"
        nodes.append(node(operator, [*others, name], following))
        name = following
    made, image = model(nodes, constants), noise(1, 3, 5, 7)
    folded = fold_scales(made).model
    assert [each.op_type for each in folded.graph.node] == ["Conv", *left]
    np.testing.assert_allclose(run(folded, image), run(made, image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "left"),
    [
        ({}, ["Relu"]),
        ({"pads": [1] * 4}, ["Relu", "Mul", "Add"]),
        ({"pads": [1] * 4, "group": 3}, ["Relu", "Mul", "Add"]),
    ],
)
def test_a_number_before_a_convolution_is_part_of_it(attributes, left):
    constants = {
        "scale": np.float32(1.7),
        "shift": np.float32([0.3]),
        "f": RANDOM.normal(size=(6, 1, 3, 3)).astype("f"),
    }
    wide = attributes.get("group") == 3
    nodes = [
        node("Relu", ["image"], "r"),
        node("Mul", ["scale", "r"], "m"),
        node("Add", ["m", "shift"], "a"),
        node("Mul", ["a", "scale"], "again"),  # which is folded wherever zeros stay zeros
        node("Conv", ["again", "f" if wide else "w"], "logits", **attributes),
    ]
    made, image = model(nodes, constants), noise(1, 3, 5, 7)
    folded = fold_scales(made).model
    assert [each.op_type for each in folded.graph.node] == [*left, "Conv"]
    np.testing.assert_allclose(run(folded, image), run(made, image), rtol=1e-5, atol=1e-5)


def test_the_half_of_a_gelu_stays_beside_it():
    nodes = [
        node("Erf", ["image"], "e"),
        node("Add", ["e", "one"], "a"),
        node("Mul", ["image", "a"], "m"),
        node("Mul", ["m", "half"], "gelu"),
        node("Conv", ["gelu", "w"], "logits"),
    ]
    assert fold_scales(model(nodes, {"one": np.float32(1), "half": np.float32(0.5)})).why_not


def test_a_convolution_that_is_read_twice_keeps_its_scale():
    nodes = [node("Conv", ["image", "w"], "c"), node("Mul", ["c", "half"], "m"), node("Add", ["c", "m"], "logits")]
    assert fold_scales(model(nodes, {"half": np.float32(0.5)})).why_not


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([("Mul", "c", "k", "p"), ("Div", "p", "six", "logits")], False),
        ([("Div", "k", "six", "d"), ("Mul", "d", "c", "logits")], False),
        ([("Mul", "sixth", "k", "d"), ("Mul", "c", "d", "logits")], False),
        ([("Mul", "c", "k", "p"), ("Div", "p", "three", "logits")], True),  # another divisor than the bound
        ([("Mul", "c", "k", "p"), ("Div", "p", "six", "q"), ("Add", "q", "p", "logits")], True),  # read twice
    ],
)
def test_a_hard_swish_of_four_operators_is_written_with_hard_sigmoid(steps, kept):
    constants = {
        "three": np.float32(3), "six": np.float32([6]), "sixth": np.float32(1 / 6), "low": np.float32(0),
        "high": np.float32(6),
    }  # fmt: skip
    nodes = [
        node("Conv", ["image", "w"], "c"),
        node("Add", ["three", "c"], "t"),
        node("Clip", ["t", "low", "high"], "k"),
    ]
    nodes += [node(operator, [first, second], result) for operator, first, second, result in steps]
    made, image = model(nodes, constants), 4 * noise(1, 3, 5, 7)
    result = hard_sigmoid(made)
    operators = [each.op_type for each in result.model.graph.node]
    assert bool(result.why_not) == kept and operators == (operators if kept else ["Conv", "HardSigmoid", "Mul"])
    whole = hard_swish(result.model)
    assert bool(whole.why_not) == kept
    assert kept or [each.op_type for each in whole.model.graph.node] == ["Conv", "HardSwish"]
    np.testing.assert_allclose(run(whole.model, image), run(made, image), rtol=1e-5, atol=1e-5)


def test_a_hard_swish_stays_whole_where_a_core_is_optimised():
    made = model([node("Conv", ["image", "w"], "c"), node("HardSwish", ["c"], "logits")])
    assert [each.op_type for each in optimise_offline(made).graph.node] == ["Conv", "HardSwish"]
    other = model(
        [node("Conv", ["image", "w"], "c"), node("HardSigmoid", ["c"], "s"), node("Mul", ["c", "s"], "logits")]
    )
    assert hard_swish(other).why_not  # of another slope


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([("Relu", ["x"], {}), ("Clip", ["x", "low", "high"], {})], 0),
        ([("Mul", ["x", "channels"], {}), ("Softmax", ["x"], {"axis": -1})], 0),
        ([("Pad", ["x", "around"], {}), ("Slice", ["x", "one", "many", "rows"], {})], 0),
        ([("Resize", ["x", "", "twice"], {"mode": "nearest"}), ("Concat", ["x", "x"], {"axis": 3})], 0),
        ([("ReduceMax", ["x", "rows"], {})], 2),
    ],
)
def test_transposes_cancel_around_what_can_work_on_other_axes(steps, left):
    constants = {
        "low": np.float32(-1),
        "high": np.float32(1),
        "channels": np.float32([1, 2, 3]),
        "twice": np.float32([1, 2, 2, 1]),
        "around": np.int64([0, 1, 2, 0, 0, 2, 1, 0]),
        "one": np.int64([1]),
        "many": np.int64([9]),
        "rows": np.int64([1]),
    }
    nodes, name = [node("Transpose", ["image"], "t", perm=[0, 2, 3, 1])], "t"
    for place, (operator, inputs, attributes) in enumerate(steps):
        nodes.append(node(operator, [name if each == "x" else each for each in inputs], f"s{place}", **attributes))
        name = f"s{place}"
    nodes.append(node("Transpose", [name], "logits", perm=[0, 3, 1, 2]))
    made, image = model(nodes, constants), noise(2, 3, 5, 7)
    result = cancel_transposes(made)
    assert sum(each.op_type == "Transpose" for each in result.model.graph.node) == left
    assert bool(result.why_not) == bool(left)
    np.testing.assert_array_equal(run(result.model, image), run(made, image))


def test_8_bits_are_dequantized_right_before_each_node_that_reads_them():
    nodes = [
        node("QuantizeLinear", ["image", "scale", "zero"], "q"),
        node("DequantizeLinear", ["q", "scale", "zero"], "dq"),
        node("Relu", ["dq"], "r"),
        node("Sigmoid", ["r"], "s"),
        node("Add", ["dq", "s"], "a"),
        node("Conv", ["a", "w"], "logits"),
    ]
    made, image = model(nodes, {"scale": np.float32(0.05), "zero": np.uint8(100)}), noise(1, 3, 5, 7)
    late = dequantize_late(made)
    operators = [each.op_type for each in late.model.graph.node]
    assert operators == ["QuantizeLinear", "DequantizeLinear", "Relu", "Sigmoid", "DequantizeLinear", "Add", "Conv"]
    np.testing.assert_array_equal(run(late.model, image), run(made, image))
    sizes = Counter({"dq/r/0": 400, "r": 400, "s": 400, "dq/a/0": 400, "a": 400, "q": 100})
    assert [crossing.maps for crossing in crossings(late.model, sizes)][2:4] == [("q", "r"), ("q", "s")]


def test_a_transpose_that_is_also_read_elsewhere_stays_for_that():
    nodes = [
        node("Transpose", ["image"], "t", perm=[0, 2, 3, 1]),
        node("Relu", ["t"], "r"),
        node("Shape", ["t"], "shape"),
        node("Reshape", ["r", "shape"], "again"),
        node("Add", ["r", "again"], "sum"),
        node("Transpose", ["r"], "u", perm=[0, 3, 1, 2]),
        node("Transpose", ["sum"], "v", perm=[0, 3, 1, 2]),
        node("Add", ["u", "v"], "logits"),
    ]
    made, image = model(nodes), noise(1, 3, 4, 6)
    result = cancel_transposes(made)
    onnx.checker.check_model(result.model)
    np.testing.assert_array_equal(run(result.model, image), run(made, image))


def test_operators_of_others_are_never_looked_into():
    nodes = [
        node("Transpose", ["image"], "t", perm=[0, 2, 3, 1]),
        node("Relu", ["t"], "r", domain="my.ops"),
        node("Transpose", ["r"], "logits", perm=[0, 3, 1, 2]),
    ]
    assert cancel_transposes(model(nodes)).why_not


@pytest.mark.parametrize("twice", [False, True])
def test_padding_that_something_else_reads_is_not_fused(twice):
    nodes = [
        node("Pad", ["image", "pads"], "p"),
        node("Conv", ["p", "w"], "c") if twice else node("Conv", ["p", "w"], "logits", pads=[1, 0, 0, 2]),
        *([node("ReduceMean", ["p", "axes"], "m"), node("Add", ["c", "m"], "logits")] if twice else []),
    ]
    made, image = model(nodes, {"axes": np.int64([1])}), noise(1, 3, 6, 5)
    result = fuse_padding(made)
    assert ("Pad" in {each.op_type for each in result.model.graph.node}) == twice
    np.testing.assert_allclose(run(result.model, image), run(made, image), atol=1e-6)


def test_a_model_made_for_every_size_twice_still_runs_at_every_size():
    made = model([node("Conv", ["image", "w"], "logits", strides=[2, 2], kernel_shape=[1, 1])])
    whole = pad_and_crop(pad_and_crop(upsample_scores(made, 2).model, 2).model, 4).model
    onnx.checker.check_model(whole)
    assert run(whole, noise(1, 3, 5, 3)).shape == (1, 2, 5, 3)


def test_branches_are_resolved_with_what_they_read_around_them():
    then = helper.make_graph([node("Neg", ["c"], "x")], "then", [],
                             [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)])  # fmt: skip
    inner = numpy_helper.from_array(np.float32([2]), "inner")
    other = helper.make_graph([node("Mul", ["c", "inner"], "x")], "else", [],
                              [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], [inner])  # fmt: skip
    nodes = [
        node("Conv", ["image", "w"], "c"),
        node("Shape", ["c"], "s"),
        node("Gather", ["s", "axis"], "g"),
        node("Equal", ["g", "axis"], "e"),
        node("If", ["e"], "logits", then_branch=then, else_branch=other),
    ]
    made, image = model(nodes, {"axis": np.int64([1])}), noise(1, 3, 4, 5)
    result = resolve_branches(made)
    onnx.checker.check_model(result.model)
    assert [each.op_type for each in result.model.graph.node] == ["Conv", "Mul", "Identity"]
    np.testing.assert_array_equal(run(result.model, image), run(made, image))


@pytest.mark.parametrize("grouped", [False, True])
def test_reversed_channels_are_those_of_the_image_reversed(grouped):
    conv = node("Conv", ["p", "w3" if grouped else "w"], "c", group=3 if grouped else 1)
    nodes = [node("Pad", ["image", "pads"], "p"), conv, node("Relu", ["c"], "logits")]
    made = model(nodes, {"w3": RANDOM.normal(size=(3, 1, 1, 1)).astype(np.float32)})
    image = noise(1, 3, 4, 5)
    reversed_ = reverse_channels(made).model
    assert ("Gather" in {each.op_type for each in reversed_.graph.node}) == grouped
    np.testing.assert_allclose(run(reversed_, image), run(made, image[:, ::-1]), atol=1e-6)


def test_labels_that_are_interpolated_are_refused_by_node():
    nodes = [
        node("Conv", ["image", "w"], "c"),
        node("ArgMax", ["c"], "a", axis=1),
        node("Cast", ["a"], "f", to=TensorProto.FLOAT),
        node("Resize", ["f", "", "s"], "logits", name="up", mode="linear"),
    ]
    with pytest.raises(DeployError, match=r"node up \(Resize\) interpolates labels"):
        cut_decision(model(nodes, {"s": np.float32([1, 1, 2, 2])}))


@pytest.mark.parametrize(("operators", "why_not"), [(("Sub",), ""), (("Min", "Sub"), "no Pad")])
def test_a_pad_of_nothing_is_taken_out_where_larger_images_pad_nothing_either(operators, why_not):
    """By its size less its size; and, which no small image tells, by its size less the smaller of that and 4096."""
    sizes = [node("Shape", ["image"], "shape"), node("Slice", ["shape", "two", "four"], "sides")]
    less = "sides"
    if "Min" in operators:
        sizes, less = [*sizes, node("Min", ["sides", "most"], "capped")], "capped"
    steps = [
        *sizes,
        node("Sub", ["sides", less], "more"),
        node("Concat", ["none", "more"], "amounts", axis=0),
        node("Pad", ["image", "amounts"], "padded"),
        node("Relu", ["padded"], "scores"),
    ]
    constants = {"two": np.int64([2]), "four": np.int64([4]), "most": np.int64([4096, 4096]), "none": np.int64([0] * 6)}
    made = model(steps, constants)
    made.graph.output[0].name = "scores"
    result = drop_idle(made)
    assert result.why_not.startswith(why_not) and bool(result.why_not) == bool(why_not)
    assert ("Pad" in [each.op_type for each in result.model.graph.node]) == bool(why_not)
    image = noise(1, 3, 5, 7)
    assert np.array_equal(run(result.model, image), run(made, image))

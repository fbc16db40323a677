"""Sizes baked into ONNX are freed: the truth is always the PyTorch module itself at the other size."""

import json
import re

import baked
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from baked import BLOCKS, LOCAL, Baked, Cascade, Coarse, Corners, PaddedAndCropped, ToMultiple, ints, static
from fcn_deploy.export.dynamic_shapes.compare_with_source import free_and_verify, verify_freed
from fcn_deploy.export.dynamic_shapes.free_sizes import free_sizes
from fcn_deploy.export.from_onnx import export_onnx_model
from fcn_deploy.export.graph.edit import attributes, dims, metadata, opset, set_shape
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.runtime.pixels.prepare import padded_size
from foreign_onnx import FEATURES, TO_SIZE, fixed, made, ran, refused
from helpers import command, needs, one_error, onnx_model, run_onnx
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fcn_deploy import DeployError, ModelCard

OPSETS = (11, 13, 17, 18)
UNSEEN = ((16, 48), (48, 16), (80, 112), (96, 64), (176, 32))


HALF_TRACED = (
    ("t = ReduceSum(r2, a23)\n d = Div(t, n)\n q = Sub(r2, d)", {"n": np.float32(384)}, "over all places by 384"),
    ("t = ReduceL2(r2, a23)\n d = Div(t, n)\n q = Sub(r2, d)", {"n": np.float32(384**0.5)}, "places by 19.5959"),
    ("h = Shape<start=3>(r2)\n k = Squeeze(h)\n r = Range(k0, k, k1)\n c = Cast<to=1>(r)\n d = Div(c, n)\n "
     "q = Mul(r2, d)", {"k0": np.array(0), "k1": np.array(1), "n": np.float32(24)}, "that are counted by 24"),
    ("g = Gather<axis=3>(r2, n)\n u = Unsqueeze(g, i3)\n q = Sub(r2, u)", {"n": np.array(12)}, "picks place 12 of"),
    ("g = Mul(r2, n)\n q = Softmax<axis=1>(g)", {"n": np.float32(np.log(384))}, "5.95064, the logarithm of 384"),
    ("t = ReduceSum(r2, a23)\n k = Size(r2)\n m = Cast<to=1>(k)\n d = Div(t, m)\n e = Div(r2, n)\n q = Sub(e, d)",
     {"n": np.float32(24)}, ""),
)  # fmt: skip


def named(value) -> str:
    return getattr(value, "__name__", "")


def check_equals(made: onnx.ModelProto, module: torch.nn.Module, sizes, batches=(1, 2)) -> None:
    onnx.checker.check_model(made)
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    for size in sizes:
        for batch in batches:
            image = torch.randn(batch, 3, *size)
            with torch.inference_mode():
                expected = module.eval()(image).numpy()
            result = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
            assert result.shape == expected.shape, size
            np.testing.assert_allclose(result, expected, atol=2e-5 * np.ptp(expected), err_msg=str(size))


@pytest.mark.parametrize("traced", [(64, 96), (64, 64)], ids=["64x96", "64x64"])
@pytest.mark.parametrize("index", range(len(BLOCKS)), ids=[named(block) for block in BLOCKS])
def test_a_freed_network_is_the_module_at_every_size_on_the_grid(index, traced):
    module = Baked(BLOCKS[index])
    model = static(module, traced, OPSETS[(index + (traced == (64, 64))) % len(OPSETS)])
    before = model.SerializeToString()
    freed = free_sizes(model)
    made, notes = freed.model, freed.notes
    assert model.SerializeToString() == before and opset(made) == opset(model)
    assert dims(made.graph.input[0]) == ["N", 3, "H", "W"] and dims(made.graph.output[0]) == ["N", 4, "H", "W"]
    assert notes and all("\n" not in note for note in notes)
    check_equals(made, module, (traced, *UNSEEN[:3]))
    check_equals(made, module, UNSEEN[3:], batches=(2,))


DYNAMO = [baked.attention, baked.windows, baked.crop, baked.coordinates]


@pytest.mark.slow
def test_pytorchs_other_exporter():
    for index, block in enumerate(DYNAMO):
        module, version = Baked(block), (18, 20, 23)[index % 3]
        model = static(module, (64, 64), version, dynamo=True)
        assert opset(model) == version
        check_equals(free_sizes(model).model, module, UNSEEN[1:4], batches=(2,))


@pytest.mark.parametrize(
    ("module", "traced", "sizes"),
    [
        (Corners(), (65, 97), ((129, 65), (33, 33), (61, 97), (1, 7), (200, 331))),
        (Corners(), (65, 65), ((129, 65), (33, 33), (61, 97), (1, 7), (200, 331))),
        (Cascade(), (64, 96), UNSEEN),
        (PaddedAndCropped(), (64, 64), (*UNSEEN, (37, 53), (1, 1))),
        (Coarse(baked.flattened), (64, 64), UNSEEN),
        (ToMultiple(), (64, 64), UNSEEN),
        (baked.Mirrored(), (64, 96), UNSEEN[2:]),
        (Baked(baked.rooted), (64, 96), UNSEEN),
    ],
    ids=["corners", "corners-square", "cascade", "padded-and-cropped", "coarse", "to-multiple", "mirrored", "rooted"],
)
def test_other_ends(module, traced, sizes):
    check_equals(free_sizes(static(module, traced, 18)).model, module, sizes)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(BLOCKS), min_size=2, max_size=4), st.sampled_from([(32, 48), (48, 48), (96, 64)]))
def test_blocks_one_after_the_other(blocks, traced):
    module = Baked(*blocks)
    try:
        made = free_sizes(static(module, traced)).model
    except DeployError as error:
        # Windows as small as the map may be all of it.
        assert "both fit" in str(error) and min(traced) < 64
        return
    check_equals(made, module, ((64, 112), (160, 48)), batches=(2,))


@pytest.mark.parametrize("shape", [["N", 3, "H", "W"], ["N", 3, "H", 96], [1, 3, 64, "W"], [1, 3, None, None]], ids=str)
def test_names_that_promise_more_than_the_graph_holds(shape):
    for block in (baked.channel_shuffle, baked.aspp_pooling, baked.skips, baked.tokens, baked.coordinates):
        module = Baked(block)
        model = static(module, (64, 96))
        set_shape(model.graph.input[0], shape)
        set_shape(model.graph.output[0], ["N", 4, "h", "w"])
        check_equals(free_sizes(model).model, module, UNSEEN[:3], batches=(2,))


@pytest.mark.slow
def test_channels_last():
    class Last(Baked):
        def forward(self, x):
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    module = Last(baked.flattened)
    image = torch.zeros(1, 64, 64, 3)
    program = torch.onnx.export(module.eval(), (image,), dynamo=True, opset_version=18, verbose=False)
    made = free_sizes(program.model_proto).model
    assert dims(made.graph.input[0]) == ["N", "H", "W", 3] and dims(made.graph.output[0]) == ["N", "H", "W", 4]
    session = onnxruntime.InferenceSession(made.SerializeToString())
    x = torch.randn(2, 48, 112, 3)
    expected = module(x).detach().numpy()
    result = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(result, expected, atol=2e-5 * np.ptp(expected))


def test_models_that_take_every_size_already_stay_as_they_are(exports):
    model = onnx.load(exports / "narrow.onnx")
    freed = free_sizes(model)
    made, notes = freed.model, freed.notes
    assert not notes and made.SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (
            baked.pyramid,
            r"AveragePool\): .*over shares of the map, 2×2 of them, .* or windows of 8×8 as they are; both",
        ),
        (
            baked.one_grid,
            r"AveragePool\): .*over shares of the map, 2×2 of them, .* or windows of 8×8 as they are; both",
        ),
        (baked.maxima, r"MaxPool\): its windows of 8×8 share the traced map evenly: adaptive pooling"),
        (baked.even_shares, r"Reshape\): what its numbers stand for cannot be told.*both fit"),
        (baked.embedding, r"Add\): its constant of \[1, 8, 16, 16\] has a value of its own.*positional"),
        (baked.token_embedding, r"Add\): its constant of \[1, 256, 8\] has a value of its own.*positional"),
        (baked.dense, r"MatMul\): a dense layer over the flattened map"),
        (baked.fixed_context, r"Resize\): .*cannot be told: to H/8 by W/8 .*or to the size it names.*both fit"),
        (baked.spatial_norm, r"LayerNormalization\)"),
        (baked.one_image, r"it would mix the images of a batch"),
        (baked.divided, r"it divides by 256, the places of its last axis; --assume \S+=fixed if meant"),
        (baked.warped, r"Div\): it divides by 16 and 16, as a traced map's sides are"),
        (baked.warped_by_axis, r"Div\): it divides by 15, as a traced map's sides are"),
        (baked.quarter_of_all, r"TopK\): .*cannot be told: as they are, or the first H·W/64 of H·W/16; both fit"),
        (baked.rooted, r"Div\): its 16 is H/4 of the traced size; --assume \S+=global, or =fixed"),
        (baked.log_scaled, r"Mul\): its 5\.54518 is log\(H·W/16\) of the traced size; --assume \S+=global, or =fixed"),
        (baked.half_rolled, r"Slice\): .*from H/8 to the end; both fit"),
        (baked.sorted_places, r"Gather\): it picks places of the map by number; --assume \S+=fixed if meant"),
        (baked.middle, r"Gather\): it picks places of the map by number; --assume \S+=fixed if meant"),
        (baked.upper_third, r"Resize"),
        (baked.thirds, r"AveragePool\): its windows of 6×6 are shares of the traced map, rounded up"),
    ],
    ids=named,
)
def test_what_cannot_be_freed_is_refused_by_its_node(block, said):
    model = static(Baked(block), (64, 64), 17)
    with pytest.raises(DeployError, match=r"the size cannot be freed: node /\S+ \(.*" + said) as caught:
        free_sizes(model)
    assert "\n" not in str(caught.value) and "export it again" in str(caught.value)


@pytest.mark.parametrize(
    ("block", "operator", "said"),
    [
        (baked.pyramid, "AveragePool", "over shares of the map, 8×8 of them, instead of windows of 2×3"),
        (baked.upper_left, "Slice", "from 0 to H/8"),
        (baked.mirrored, "Gather", "all places backwards instead of 24 by number"),
        (baked.sampled, "GridSample", "its constant of [1, 16, 24, 2]: from end to end"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_graph_proves_at_a_size_that_is_not_square_is_freed(block, operator, said):
    module = Baked(block)
    freed = free_sizes(static(module, (64, 96), 17))
    assert any(note.startswith(operator) and said in note for note in freed.notes), freed.notes
    check_equals(freed.model, module, UNSEEN[:3])


def test_dilations_and_numbers_that_only_a_traced_size_explains_are_refused():
    for module, said in (
        (Baked(baked.dilated), r"Conv\): its dilations of 2×3 are shares of the traced map, most likely; --assume"),
        (Baked(baked.one_and_root), r"Mul\): its 1\.19596 is 1 \+ √\(H·W/16\)/100 of the traced size; --assume"),
    ):
        with pytest.raises(DeployError, match=said):
            free_sizes(static(module, (64, 96), 18))


def test_numbers_and_dilations_that_fit_the_traced_size_by_chance_are_meant_as_they_are():
    def block(m, y):
        y = torch.tanh(torch.tanh(torch.tanh(y * 1.05) + 0.875) * (6 / 7))
        return F.conv2d(y, m.down.weight[:, :, :1], padding=(0, 2), dilation=(1, 2))  # as ERFNet has them

    module = Baked(block)
    freed = free_sizes(static(module, (64, 128), 17))
    assert not any("dilated" in note for note in freed.notes)
    check_equals(freed.model, module, UNSEEN[:1])


def test_what_is_refused_as_a_share_is_taken_where_the_user_says_that_it_is_none():
    for block, operator in ((baked.quarter_of_all, "TopK"), (baked.middle, "Gather"), (baked.ranks, "Div")):
        model = static(Baked(block), (64, 96), 17)
        with pytest.raises(DeployError, match=rf"\({operator}\).*=fixed") as caught:
            free_sizes(model)
        node = re.search(r"node (\S+) ", str(caught.value))[1]
        assert dims(free_sizes(model, assumed={node: "fixed"}).model.graph.input[0]) == ["N", 3, "H", "W"]


def test_a_number_of_the_traced_size_follows_the_image_where_the_user_says_so():
    for block, operator in (
        (baked.clipped, "Clip"),
        (baked.log_scaled, "Mul"),
        (baked.one_and_root, "Mul"),
        (baked.by_height, "Mul"),
    ):
        module = Baked(block)
        model = static(module, (64, 96), 17)
        node = next(node.name for node in model.graph.node if node.op_type == operator)
        freed = free_sizes(model, assumed={node: "global"}).model
        check_equals(freed, module, UNSEEN[:2])
        for clip in [each for each in freed.graph.node if each.op_type == "Clip"]:  # whose bounds have no axes
            assert clip.input[2] in [each.output[0] for each in freed.graph.node if each.op_type == "Squeeze"]
    notes = free_sizes(model).notes
    assert any(f"{node}: numbers as 8, H/8 when traced, are taken for such of every size" in note for note in notes)


def test_numbers_that_images_are_normalised_by_are_of_no_size():
    class Normalised(Baked):
        def forward(self, x):
            return super().forward((x / 255 - 0.5) / 0.25 + 128 * (1 / 127.5))

    module = Normalised()
    freed = free_sizes(static(module, (128, 256), 17))
    assert len(freed.notes) == 1 and freed.notes[0].startswith("Resize "), freed.notes
    check_equals(freed.model, module, UNSEEN[:2])


def test_heads_of_attention_over_all_places():
    class Heads(Baked):
        def features(self, x):
            y = super().features(x)
            tokens = y.flatten(2).transpose(1, 2)
            return y + self.heads(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).reshape(ints(y))

    module = Heads()
    module.heads = torch.nn.MultiheadAttention(baked.CHANNELS, 2, batch_first=True)
    check_equals(free_sizes(static(module, (64, 96), 17)).model, module, UNSEEN[:2])


def test_what_free_sizes_hide_is_said(tmp_path):
    """Networks of every size, which do by numbers what was of one: they run as they are."""
    for text, weights, said in HALF_TRACED:
        model = made(f"{FEATURES} {text}\n s = Conv(q, w3, b3)\n {TO_SIZE} y = Identity(f)", weights=weights)
        onnx.save(model, tmp_path / "m.onnx")
        notes = import_model(tmp_path / "m.onnx").notes
        assert sum("at every size: a traced size, most likely" in note for note in notes) == bool(said), notes
        assert any(said in note for note in notes)


def test_a_part_of_a_map_that_free_sizes_hide_is_asked_about(tmp_path):
    text = f"{FEATURES} g = Slice(r2, i0, n, i3)\n m = ReduceMean(g, i3)\n q = Sub(r2, m)\n s = Conv(q, w3, b3)\n"
    model = made(f"{text} {TO_SIZE} y = Identity(f)", weights={"n": np.array([12])})
    assert "node g (Slice) goes to place 12 of a map at every size" in refused(tmp_path, model)
    assert "say --assume g=fixed" in refused(tmp_path, model)
    assert "--assume g=global is for a model of one size" in refused(tmp_path, model, assume={"g": "global"})
    source = import_model(tmp_path / "m.onnx", ImportOptions(assume={"g": "fixed"}))
    image = np.random.default_rng(0).standard_normal((1, 3, 80, 112), np.float32)
    np.testing.assert_allclose(ran(source.model, {"p": image})[0], ran(model, {"p": image})[0], atol=1e-5)


def test_sums_along_places_by_a_traced_number_are_asked_about():
    """Each by the number of places in a row, as positions are."""
    text = "c = CumSum(r2, axis)\n d = Div(c, n)\n q = Sub(r2, d)"
    weights = {"axis": np.array(3), "n": np.float32(24)}
    model = fixed(
        made(f"{FEATURES} {text}\n s = Conv(q, w3, b3)\n {TO_SIZE} y = Identity(f)", weights=weights), 1, 3, 64, 96
    )
    with pytest.raises(DeployError, match="its 24 is W/4 of the traced size; --assume d=global, or =fixed"):
        free_sizes(model)
    made_free = free_sizes(model, assumed={"d": "global"}).model
    dynamic = made(
        f"{FEATURES} h = Shape<start=3>(r2)\n k = Cast<to=1>(h)\n {text.replace('n)', 'k)')}\n s = Conv(q, w3, b3)\n "
        f"{TO_SIZE} y = Identity(f)",
        weights=weights,
    )
    image = np.random.default_rng(0).standard_normal((1, 3, 80, 112), np.float32)
    np.testing.assert_allclose(ran(made_free, {"p": image})[0], ran(dynamic, {"p": image})[0], atol=1e-4)


def test_what_crops_nothing_when_traced_is_said_and_padding_to_a_square_is_refused():
    notes = free_sizes(static(ToMultiple(), (64, 96), 17)).notes
    assert any("it crops nothing at the traced size" in note and "are taken for" in note for note in notes)
    for operator in ("Pad", "Conv"):  # of its own, and fused into a convolution
        with pytest.raises(DeployError, match=rf"{operator}\): it makes a square of 64×96"):
            free_sizes(static(baked.ToSquare(), (64, 96), 18, dynamo=operator == "Conv"))


def test_padding_up_to_a_multiple_is_refused():
    for dynamo in (False, True):  # as a Pad, and fused into a convolution
        with pytest.raises(DeployError, match=r"it pads 60 by \d and \d: up to a multiple"):
            free_sizes(static(ToMultiple(), (60, 92), 18, dynamo))


def test_padding_for_even_sizes_asks_for_them():
    class Same(Baked):
        def forward(self, x):
            _, _, h, w = baked.ints(x)
            y = F.conv2d(F.pad(x, (0, 1, 0, 1)), self.first.weight, self.first.bias, 2)
            return F.interpolate(self.score(y), size=(h, w), mode="bilinear")

    _, notes, multiple, *_ = free_and_verify(static(Same(), (64, 96)), "it")
    assert multiple == 2 and notes
    with pytest.raises(DeployError, match="it pads 65 by 0 and 1"):
        free_sizes(static(Same(), (65, 97)))


def small(nodes, constants, size=(32, 48), channels=2):
    """[1,2,32,48] → what `nodes` make of it."""
    return onnx_model(nodes, constants, takes=(1, channels, *size), gives=None, names=("image", "out"), opset=17)


def test_the_size_of_a_deconvolutions_output_becomes_padding():
    weight = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    for kind in ("SAME_UPPER", "SAME_LOWER", "NOTSET"):
        model = small(
            [
                helper.make_node("MaxPool", ["image"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
                helper.make_node(
                    "ConvTranspose", ["pooled", "weight"], ["out"], name="up", strides=[2, 2], output_shape=[32, 48],
                    auto_pad=kind,
                ),
            ],
            {"weight": weight},
        )  # fmt: skip
        freed = free_sizes(model)
        made, notes = freed.model, freed.notes
        assert (
            "ConvTranspose up: padding [1, 1, 1, 1] instead of a size of [32, 48]" in notes
            and "output_shape" not in attributes(made.graph.node[1])
        )
        image = np.random.default_rng(1).normal(size=(1, 2, 32, 48)).astype(np.float32)
        np.testing.assert_array_equal(run_onnx(made, image), run_onnx(model, image))
        assert run_onnx(made, np.zeros((2, 2, 10, 64), np.float32)).shape == (2, 3, 10, 64)


def test_scales_that_were_computed_from_sizes():
    """A map of 11 × 16 brought to the image's 32 × 48, by factors that are for no other size."""
    model = small(
        [
            helper.make_node("Conv", ["image", "weight"], ["coarse"], strides=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Resize", ["coarse", "", "scales"], ["out"], name="up", mode="nearest"),
        ],
        {"weight": np.ones((1, 2, 3, 3), np.float32), "scales": np.float32([1, 1, 32 / 11, 3])},
    )
    freed = free_sizes(model)
    made, notes = freed.model, freed.notes
    assert list(notes) == ["Resize up: to H by W instead of 32 by 48"]
    for size in ((10, 12), (31, 50)):
        assert run_onnx(made, np.zeros((1, 2, *size), np.float32)).shape == (1, 1, *size)


def test_unpooling_to_a_size():
    nodes = [
        helper.make_node("MaxPool", ["image"], ["pooled", "places"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node(
            "MaxUnpool", ["pooled", "places", "size"], ["out"], name="un", kernel_shape=[2, 2], strides=[2, 2]
        ),
    ]
    model = small(nodes, {"size": np.array([1, 2, 32, 48])})
    freed = free_sizes(model)
    made, notes = freed.model, freed.notes
    assert "MaxUnpool un: to H by W instead of 32 by 48" in notes
    image = np.random.default_rng(0).normal(size=(1, 2, 10, 18)).astype(np.float32)
    kept = run_onnx(made, image)
    assert kept.shape == image.shape and (kept[kept != 0] == image[kept != 0]).all() and (kept != 0).sum() == 90


def test_split_into_halves():
    model = small(
        [
            helper.make_node("Split", ["image", "halves"], ["left", "right"], axis=3),
            helper.make_node("Concat", ["right", "left"], ["out"], axis=3),
        ],
        {"halves": np.array([24, 24])},
    )
    made = free_sizes(model).model
    image = np.random.default_rng(0).normal(size=(2, 2, 6, 10)).astype(np.float32)
    np.testing.assert_array_equal(run_onnx(made, image), np.roll(image, 5, 3))


def test_operators_of_others_and_control_flow_are_named():
    custom = helper.make_node("Secret", ["image"], ["out"], name="own", domain="com.example")
    model = small([custom], {})
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    with pytest.raises(DeployError, match=r"node own \(Secret\): com.example has no operator of this name"):
        free_sizes(model)
    with pytest.raises(DeployError, match=r"node which \(NonZero\): what it gives is decided while it runs"):
        free_sizes(small([helper.make_node("NonZero", ["image"], ["out"], name="which")], {}))


def test_tensorrt_builds_what_was_freed():
    tensorrt = needs("tensorrt_rtx")
    blocks = [
        baked.tokens,
        baked.windows,
        baked.aspp_pooling,
        baked.crop,
        baked.coordinates,
        baked.strips,
        baked.summed,
    ]
    model = free_sizes(static(Baked(*blocks), (64, 64), 18)).model
    log = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(log)
    network = builder.create_network(0)
    parser = tensorrt.OnnxParser(network, log)
    assert parser.parse(model.SerializeToString()), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    config.set_compute_capability(tensorrt.ComputeCapability.SM89, 0)
    profile.set_shape(model.graph.input[0].name, (1, 3, 16, 32), (1, 3, 96, 160), (4, 3, 512, 512))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


# Verification: what the pass gets wrong must not pass.


def swapped(model):
    """H and W read in each other's place wherever they are read."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for node in model.graph.node:
        if node.op_type == "Gather" and node.name.startswith("free_sizes/"):
            tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
            place = numpy_helper.to_array(tensor)
            if place.tolist() in ([2], [3]):
                name = f"{tensor.name}_swapped"
                model.graph.initializer.append(numpy_helper.from_array(5 - place, name))
                node.input[1] = name
    return model


def test_height_and_width_in_each_others_place_are_caught():
    for module in (Baked(baked.flattened), Corners(), Coarse(baked.axial_attention)):
        model = static(module, (65, 65) if isinstance(module, Corners) else (64, 64))
        found = free_sizes(model)
        verify_freed(model, found, "it")
        wrong = type(found)(swapped(found.model), found.notes, found.traced, found.size_dependent)
        assert wrong.model != found.model
        with pytest.raises(DeployError):
            verify_freed(model, wrong, "it")


def test_scores_of_another_law_are_caught():
    """The same at its own size, and other where an image goes on."""
    model = static(Baked(baked.channel_shuffle), (64, 64))
    found = free_sizes(model)
    assert "within a larger image it gives the same" in verify_freed(model, found, "it")[0]
    wrong = onnx.ModelProto.FromString(found.model.SerializeToString())
    up = next(node for node in wrong.graph.node if node.op_type == "Resize")
    corner = next(item for item in up.attribute if item.name == "coordinate_transformation_mode")
    corner.s = b"align_corners"
    with pytest.raises(DeployError, match="at its own size of 64×64"):
        verify_freed(model, type(found)(wrong, found.notes, found.traced), "it")
    # A mean over rows whose weight is right for 16 of them alone.
    wrong = onnx.ModelProto.FromString(found.model.SerializeToString())
    result = wrong.graph.output[0].name
    for node in wrong.graph.node:
        node.output[:] = ["before" if name == result else name for name in node.output]
    wrong.graph.initializer.append(numpy_helper.from_array(np.int64([2]), "rows"))
    wrong.graph.initializer.append(numpy_helper.from_array(np.float32(1 / 64), "share"))
    wrong.graph.node.extend(
        [
            helper.make_node("Shape", ["before"], ["shape"]),
            helper.make_node("Gather", ["shape", "rows"], ["count"]),
            helper.make_node("Cast", ["count"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["real", "share"], ["factor"]),
            helper.make_node("Mul", ["before", "factor"], [result]),
        ]
    )
    with pytest.raises(DeployError, match="other scores where an image goes on beyond 64×64"):
        verify_freed(model, type(found)(wrong, found.notes, found.traced), "it")


def test_local_networks_are_compared_with_larger_images():
    for block in LOCAL:
        model = static(Baked(block), (64, 96))
        assert "within a larger image it gives the same" in verify_freed(model, free_sizes(model), "it")[0]
    model = static(Baked(baked.attention), (64, 96))
    assert "see further than half of its own size" in verify_freed(model, free_sizes(model), "it")[0]
    model = static(Baked(baked.coordinates), (64, 96))
    assert "depend on the image's size by Concat" in verify_freed(model, free_sizes(model), "it")[0]


# The file


@pytest.mark.parametrize("block", [baked.channel_shuffle, baked.crop, baked.pixel_shuffle], ids=named)
def test_a_written_model_takes_every_size(tmp_path, block):
    module = Baked(block)
    onnx.save(static(module, (64, 64)), tmp_path / "fixed.onnx")
    card, notes = export_onnx_model(tmp_path / "fixed.onnx", tmp_path / "free.onnx")
    written = onnx.load(tmp_path / "free.onnx")
    assert ModelCard.from_json(metadata(written, "fcn_deploy.card"), "x") == card
    assert [dims(value) for value in (written.graph.input[0], written.graph.output[0])] == [
        ["N", 3, "H", "W"], ["N", 4, "H", "W"],
    ]  # fmt: skip
    assert written.graph.input[0].name == "image" and written.graph.output[0].name == "logits"
    assert card.size_multiple == 4 and any("size freed" in note for note in notes)
    for size in ((1, 1), (7, 13), (37, 41), (61, 97), (16, 131)):
        image = torch.randn(2, 3, *size)
        height, width = padded_size(*size, card)
        padded = F.pad(image, (0, width - size[1], 0, height - size[0]))
        expected = module(padded).detach().numpy()[:, :, : size[0], : size[1]]
        np.testing.assert_allclose(run_onnx(written, image.numpy()), expected, atol=5e-5)


@pytest.mark.slow
def test_from_the_command_line(tmp_path):
    onnx.save(static(Baked(baked.channel_shuffle), (64, 64)), tmp_path / "fixed.onnx")
    onnx.save(static(Baked(baked.embedding), (64, 64)), tmp_path / "tied.onnx")
    options = ("--classes", "a,b,c,d", "--input-mean", "1,2,3", "--input-std", "4,5,6")
    done = command("export-onnx", "fixed.onnx", "-o", "free.onnx", *options, cwd=tmp_path)
    assert "takes every H, W ≥ 1; 4 classes" in done.stdout
    assert "note: fixed.onnx: equal to the model at its own size of 64×64" in done.stderr
    card = ModelCard.from_json(metadata(onnx.load(tmp_path / "free.onnx"), "fcn_deploy.card"), "x")
    assert card.classes == ("a", "b", "c", "d") and card.std == (4, 5, 6) and card.size_multiple == 4
    done = command("export-onnx", "fixed.onnx", "-o", "free.onnx", "--json", "--force", cwd=tmp_path)
    record = json.loads(done.stdout)
    assert record["file"] == "free.onnx" and any("size freed" in note for note in record["notes"])
    kept = (tmp_path / "free.onnx").read_bytes()
    for words, code, said in (
        (("fixed.onnx", "-o", "free.onnx"), 2, "exists already"),
        (("fixed.onnx", "-o", "fixed.onnx", "--force"), 2, "is the model itself"),
        (("none.onnx", "-o", "new.onnx"), 2, "does not exist"),
        (("fixed.onnx", "-o", "new.onnx", "--opset", "20"), 2, "is ONNX already"),
        (("tied.onnx", "-o", "free.onnx", "--force"), 1, "node /Add (Add): its constant of [1, 8, 16, 16]"),
        (("fixed.onnx", "-o", "new.onnx", "--classes", "a,b"), 2, "2 classes are named"),
    ):
        assert said in one_error(command("export-onnx", *words, ok=code, cwd=tmp_path))
    assert (tmp_path / "free.onnx").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fixed.onnx", "free.onnx", "tied.onnx"]


def test_build_engine_frees_what_it_is_given(tmp_path):
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.importer.import_model import import_model

    from fcn_deploy import Segmenter

    module = Baked(baked.aspp_pooling)
    onnx.save(static(module, (64, 96)), tmp_path / "fixed.onnx")
    source = import_model(tmp_path / "fixed.onnx")
    assert any("AveragePool" in note for note in source.notes)
    build_engine(source, tmp_path / "m.engine")
    with Segmenter(tmp_path / "m.engine") as net:
        image = np.random.default_rng(0).integers(0, 256, (80, 112, 3), np.uint8)
        mean, std = (np.float32(value) for value in (net.card.mean, net.card.std))
        logits = module(torch.from_numpy((image - mean) / std).permute(2, 0, 1)[None])[0].detach().numpy()
        best = np.sort(logits, 0)
        clear = best[-1] - best[-2] > 1e-3 * np.ptp(logits)
        assert (net(image) == logits.argmax(0))[clear].all() and clear.mean() > 0.9

"""Inputs of foreign models: layouts, types, and what a graph does to an image first."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.from_onnx import export_onnx_model
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from foreign_onnx import (
    MEAN,
    PLAIN,
    SCORES,
    SIZES,
    STD,
    TO_SIZE,
    best,
    channels_last,
    check,
    made,
    planes,
    ran,
    reads,
    refused,
    weight,
)
from helpers import photo
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from fcn_deploy import Segmenter


@pytest.mark.parametrize("before", ["plain", "arithmetic"])
def test_channels_last_in_and_out(tmp_path, before):
    start = "  t = Sub(x, mean)\n  u = Mul(t, scale)\n" if before == "arithmetic" else "  u = Identity(x)\n"
    text = start + "  p = Transpose<perm=[0,3,1,2]>(u)\n" + SCORES + TO_SIZE + "  y = Transpose<perm=[0,2,3,1]>(f)\n"
    model = made(text, "float[n,h,w,3] x", "float[n,h,w,4] y", weights={"mean": MEAN, "scale": 1 / STD})
    feed = channels_last if before == "plain" else lambda image: image[None].astype(np.float32)
    source, report, card, _ = check(tmp_path, model, lambda r: r[0].argmax(-1), feed)
    assert report.head == "linear" and report.size_multiple == 1
    assert "takes [N,H,W,3]" in source.notes[0]
    assert "Transpose" not in {node.op_type for node in source.model.graph.node}
    if before == "arithmetic":
        assert card.mean == (0, 0, 0) and card.std == (1, 1, 1)
        assert any("normalises 8-bit images by itself (node u (Mul))" in note for note in source.notes)


@pytest.mark.parametrize("shape", ["unk__1,unk__2,unk__3,3", "?,?,?,?", "-1,-1,-1,-1", "1,64,96,3"])
def test_the_layout_is_read_off_the_first_convolution(tmp_path, shape):
    text = "  p = Transpose<perm=[0,3,1,2]>(x)\n" + SCORES + TO_SIZE + "  y = Transpose<perm=[0,2,3,1]>(f)\n"
    model = made(text, "float[n,h,w,c] x")
    for dim, given in zip(model.graph.input[0].type.tensor_type.shape.dim, shape.split(","), strict=True):
        dim.Clear()
        if given.lstrip("-").isdigit():
            dim.dim_value = int(given)
        else:
            dim.dim_param = given
    onnx.save(model, tmp_path / "m.onnx")
    source = import_model(tmp_path / "m.onnx")
    assert source.card.channels == 3 and len(source.card.classes) == 4
    for height, width in ((64, 96), *(() if shape.startswith("1") else ((37, 61),))):
        image = planes(photo(height, width))
        expected = ran(model, {"x": image.transpose(0, 2, 3, 1)})[0].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(
            ran(source.model, {"p": image} if False else {source.model.graph.input[0].name: image})[0],
            expected,
            atol=1e-4,
        )


@pytest.mark.parametrize("end", ["scores", "labels", "softmax", "channels first"])
def test_as_many_classes_as_rows_and_columns_are_told_from_them_by_the_graph(tmp_path, end):
    ends = {
        "scores": "y = Transpose<perm=[0,2,3,1]>(f)", "channels first": "y = Relu(f)",
        "labels": "t = Transpose<perm=[0,2,3,1]>(f)\n y = ArgMax<axis=3, keepdims=0>(t)",
        "softmax": "t = Transpose<perm=[0,2,3,1]>(f)\n y = Softmax<axis=3>(t)",
    }  # fmt: skip
    text = "  p = Transpose<perm=[0,3,1,2]>(x)\n  f = Conv<pads=[1,1,1,1]>(p, w16)\n  " + ends[end]
    model = made(text, "float[1,16,16,3] x", weights={"w16": 4 * weight(16, 3, 3, 3)})
    if end == "labels":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    labels = {"labels": lambda r: r[0], "channels first": best}.get(end, lambda r: r[0].argmax(-1))
    image = photo(16, 16)
    expected = labels(ran(model, {"x": channels_last(image)})[0])
    for fit in (None, "16x16"):
        found = reads(tmp_path, model, fit=fit).model
        assert (best(ran(found, {found.graph.input[0].name: planes(image)})[0]) == expected).all()


def test_uint8_images_are_normalised_in_the_graph(tmp_path):
    start = "  c = Cast<to=1>(x)\n  t = Transpose<perm=[0,3,1,2]>(c)\n  d = Sub(t, mean)\n  p = Div(d, std)\n"
    weights = {"mean": MEAN.reshape(1, 3, 1, 1), "std": STD.reshape(1, 3, 1, 1)}
    model = made(start + SCORES + TO_SIZE + "y = ArgMax<axis=1, keepdims=0>(f)", "uint8[N,H,W,3] x", "int64[N,H,W] y",
                 weights=weights)  # fmt: skip
    source, report, card, _ = check(tmp_path, model, lambda r: r[0], lambda image: image[None])
    assert card.mean == (0, 0, 0) and card.std == (1, 1, 1) and report.head == "linear"
    assert "takes uint8" in " ".join(source.notes) and "go in as they are" in " ".join(source.notes)
    assert "Cast" not in {node.op_type for node in source.model.graph.node}


@pytest.mark.parametrize(("mean", "variance", "found"), [(120, 3500, True), (0.4, 0.06, False), (0, 1, False)])
def test_a_batch_norm_of_8_bit_images_before_all_else_tells_what_it_takes(tmp_path, mean, variance, found):
    """As Keras's residual networks begin; of numbers near 1 it tells nothing."""
    numbers = {"ones": np.ones(3, np.float32), "zeros": np.zeros(3, np.float32)}
    numbers |= {"mean": np.float32([mean] * 3), "var": np.float32([variance] * 3)}
    text = "  q = BatchNormalization(p, ones, zeros, mean, var)\n" + PLAIN.replace(
        "Conv<strides=[2,2], pads=[1,1,1,1]>(p,", "Conv<strides=[2,2], pads=[1,1,1,1]>(q,"
    )
    source = reads(tmp_path, made(text, weights=numbers))
    assert any("normalises 8-bit images by itself (node q" in note for note in source.notes) == found
    assert (source.card.std == (1, 1, 1)) == found


def test_parts_in_bfloat16_run_in_float32(tmp_path):
    """As a network of float32 weights has them that was traced under autocast: NumPy has no such type."""
    halved = """
      pb = Cast<to=16>(p)
      wb = Cast<to=16>(w1)
      cb = Conv<strides=[2,2], pads=[1,1,1,1]>(pb, wb)
      c1 = Cast<to=1>(cb)
    """
    first = "  c1 = Conv<strides=[2,2], pads=[1,1,1,1]>(p, w1)\n"
    text = PLAIN.replace(first, halved)
    assert text != PLAIN
    onnx.save(made(text), tmp_path / "m.onnx")
    source = import_model(tmp_path / "m.onnx")
    assert any("is of bfloat16; it is run in float32" in note for note in source.notes)
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(37, 61)
        np.testing.assert_array_equal(net(image), best(ran(made(PLAIN), {"p": planes(image)})[0]))


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_models_of_other_floats_are_run_in_float32(tmp_path, kind):
    model = made(SCORES + TO_SIZE + "y = Identity(f)", f"{kind}[N,3,H,W] p", f"{kind}[N,4,H,W] y")
    to = np.dtype("float64" if kind == "double" else kind)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(to), tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    source = import_model(tmp_path / "m.onnx")
    assert f"is of {kind}; it is run in float32" in " ".join(source.notes)
    report = build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    assert report.agreement.wrong == 0
    with Segmenter(tmp_path / "m.engine") as net:
        for height, width in SIZES[1:]:
            image = photo(height, width)
            # ONNX Runtime has no convolution of double.
            run = ran if kind == "float16" else lambda m, image: ReferenceEvaluator(m).run(None, image)
            scores = run(model, {"p": planes(image).astype(to)})[0][0].astype(np.float32)
            first, second = np.sort(scores, 0)[-2:][::-1]
            clear = first - second > 0.02 * np.ptp(scores)
            assert clear.mean() > 0.7 and (net(image) == scores.argmax(0))[clear].all()


@pytest.mark.parametrize("first", ["convolution", "arithmetic"])
def test_models_of_bgr_take_rgb(tmp_path, first):
    text = SCORES + TO_SIZE + "y = Identity(f)"
    if first == "arithmetic":
        text = text.replace("(p, w1)", "(e, w1)")
        text = "  e = Mul(p, channel)\n" + text
    model = made(text, weights={"channel": np.float32([1, 2, 0.5]).reshape(1, 3, 1, 1)})
    mean, std = np.float32([103.94, 116.78, 123.68]), np.float32([60, 50, 40])  # of blue, green, red

    def feed(image):
        return ((image[:, :, ::-1] - mean) / std).transpose(2, 0, 1)[None]

    options = ImportOptions(bgr=True, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    source, _, card, _ = check(tmp_path, model, feed=feed, options=options)
    assert card.mean == pytest.approx((123.68, 116.78, 103.94)) and card.std == (40, 50, 60)
    assert any("wants BGR" in note for note in source.notes)
    assert ("Gather" in {n.op_type for n in source.model.graph.node}) == (first == "arithmetic")


def test_what_a_graph_does_to_images_first_is_told_only_where_it_is_sure(tmp_path):
    def card(first, **weights):
        text = first + SCORES + TO_SIZE + "y = Identity(f)"
        shaped = {
            name: value if isinstance(value, np.ndarray) else np.float32(value).reshape(1, -1, 1, 1)
            for name, value in weights.items()
        }
        return reads(tmp_path, made(text, "float[N,3,H,W] x", weights=shaped)).card

    assert card("p = Div(x, m255)\n").std == (1, 1, 1)
    assert card("p = Sub(x, m)\n", m=[123.7, 116.8, 103.9]).std == (1, 1, 1)
    reversed_ = {"last": np.array([-9]), "by": np.array([-1])}
    assert card("e = Slice(x, i2, last, i1, by)\n p = Sub(e, m)\n", m=[103.9, 116.8, 123.7], **reversed_).std == (
        1,
        1,
        1,
    )
    split = "r, g, b = Split<axis=1, num_outputs=3>(x)\n e = Concat<axis=1>(b, g, r)\n p = Div(e, m255)\n"
    assert card(split).std == (1, 1, 1)
    assert card("e = Mul(x, m255)\n p = Sub(e, m)\n", m=[123.7, 116.8, 103.9]).std == (255,) * 3
    assert card("e = Mul(x, m255)\n d = Cast<to=2>(e)\n k = Cast<to=1>(d)\n p = Div(k, m255)\n").std == (255,) * 3
    assert card("e = Clip(x, none, m255)\n p = Identity(e)\n", none=np.array(0, np.float32)).std == (
        1,
        1,
        1,
    )
    unit = card("e = Sub(x, m)\n p = Div(e, d)\n", m=[0.485, 0.456, 0.406], d=[0.229, 0.224, 0.225])
    assert unit.std == (255,) * 3 and unit.mean == (0,) * 3
    assert card("p = Mul(x, m)\n", m=[0.5]).mean == pytest.approx(tuple(MEAN))


def test_inputs_and_outputs_of_each_others_names(tmp_path):
    text = PLAIN.replace("(p,", "(logits,").replace("Shape(p)", "Shape(logits)").replace("y =", "image =")
    path, out = tmp_path / "m.onnx", tmp_path / "free.onnx"
    onnx.save(model := made(text, "float[N,3,H,W] logits", "float[N,4,H,W] image"), path)
    export_onnx_model(path, out)
    image = planes(photo(37, 61))
    assert np.array_equal(ran(onnx.load(out), {"image": image})[0], ran(model, {"logits": image})[0])


WITHOUT_BATCH = {
    "planes": ("  p = Unsqueeze(x, i0)\n", "float[3,H,W] x", lambda image: planes(image)[0]),
    "pixels": (
        "  c = Cast<to=1>(x)\n  b = Slice(c, i2, last, i2, by)\n  d = Sub(b, mean)\n  u = Unsqueeze(d, i0)\n"
        "  p = Transpose<perm=[0,3,1,2]>(u)\n", "uint8[H,W,3] x", lambda image: image,
    ),
    "broadcast": (
        "  t = Transpose<perm=[2,0,1]>(x)\n  p = Sub(t, zeros)\n", "float[H,W,3] x",
        lambda image: channels_last(image)[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WITHOUT_BATCH)
def test_an_image_without_a_batch_is_taken_and_batched(tmp_path, kind):
    first, takes, feed = WITHOUT_BATCH[kind]
    numbers = {"last": np.array([-9]), "by": np.array([-1]), "mean": MEAN[::-1].copy()}
    numbers["zeros"] = np.zeros((1, 3, 1, 1), np.float32)
    text = first + SCORES + TO_SIZE + "a = ArgMax<axis=1, keepdims=0>(f)\n y = Squeeze(a, i0)"
    model = made(text, takes, "int64[H,W] y", weights=numbers)
    source, _, card, _ = check(tmp_path, model, lambda labels: labels, feed)
    assert any("without a batch" in note for note in source.notes) and not card.alone
    batch = np.random.default_rng(1).standard_normal((2, 3, 37, 61)).astype(np.float32)
    name = source.model.graph.input[0].name
    both, second = (ran(source.model, {name: images})[0] for images in (batch, batch[1:]))
    np.testing.assert_allclose(both[1:], second, atol=1e-5)


def test_inputs_that_are_no_single_image(tmp_path):
    two = made(PLAIN.replace("y = Identity(f)", "y = Add(f, bias)"), "float[N,3,H,W] p, float[1] bias")
    assert "has 2 inputs (p, bias)" in refused(tmp_path, two)
    ranks = made(PLAIN)
    ranks.graph.input[0].type.tensor_type.ClearField("shape")
    assert "input p has no rank" in refused(tmp_path, ranks)
    flat = made("y = Mul(p, half)", "float[N,F] p", "float[N,F] y")
    assert "input p is float ['N', 'F'], which is no image" in refused(tmp_path, flat)
    kind = made("q = Cast<to=1>(p)\n" + PLAIN.replace("(p, w1)", "(q, w1)"), "int8[N,3,H,W] p")
    assert "input p is int8" in refused(tmp_path, kind)
    wrong = made(PLAIN, "float[N,5,H,W] p")
    assert "node c1 (Conv) reads 3 channels on axis 1" in refused(tmp_path, wrong)
    unknown = made("y = Mul(p, half)", "float[N,C,H,W] p")
    assert "takes images of C channels, which is no fixed number" in refused(tmp_path, unknown)

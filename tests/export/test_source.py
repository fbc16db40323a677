"""Foreign ONNX: whatever form it comes in, the engine's labels are those of the model as it was given."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.dynamic_shapes.free import export_free
from fcn_deploy.export.importer.card import SourceOptions, read_card_file
from fcn_deploy.export.importer.standard_form import read_source
from helpers import ROOT, command, one_error, photo
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from fcn_deploy import DeployError, MisuseError, Segmenter

RANDOM = np.random.default_rng(0)
SIZES = ((1, 1), (17, 23), (37, 61), (64, 96), (101, 43))
MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])


def weight(*shape):
    """Such that scores stay small, and sigmoids do not saturate."""
    return (RANDOM.normal(size=shape) / np.prod(shape[1:]) ** 0.5).astype(np.float32)


WEIGHTS = {
    "w1": weight(6, 3, 3, 3), "w2": weight(6, 6, 3, 3), "w3": weight(4, 6, 1, 1), "wp": weight(1, 6, 1, 1),
    "w2c": weight(2, 6, 1, 1), "w4": weight(3, 3, 4, 4), "b3": np.float32([0.4, 0.1, -0.2, 0]), "bp": np.float32([0.2]),
    "i0": np.array([0]), "i1": np.array([1]), "i2": np.array([2]), "i3": np.array([3]), "i4": np.array([4]),
    "half": np.float32(0.5), "zero": np.float32(0), "one": np.float32(1), "a23": np.array([2, 3]),
    "x4": np.float32([1, 1, 4, 4]), "x2": np.float32([1, 1, 2, 2]), "m255": np.float32(255), "index1": np.array(1),
}  # fmt: skip
FEATURES = """
  c1 = Conv<strides=[2,2], pads=[1,1,1,1]>(p, w1)
  r1 = Relu(c1)
  c2 = Conv<strides=[2,2], pads=[1,1,1,1]>(r1, w2)
  r2 = Relu(c2)
"""
SCORES = FEATURES + "  s = Conv(r2, w3, b3)\n"
TO_SIZE = """
  shp = Shape(p)
  hw = Slice(shp, i2, i4)
  shs = Shape(s)
  nk = Slice(shs, i0, i2)
  sizes = Concat<axis=0>(nk, hw)
  f = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(s, , , sizes)
"""


def made(text, takes="float[N,3,H,W] p", gives="float[N,4,H,W] y", opset=18, ir=8, weights=None, unshaped=True):
    """A model from the text of its nodes, and those of WEIGHTS that it reads."""
    model = parser.parse_model(f'<ir_version: {ir}, opset_import: ["" : {opset}]>\ng ({takes}) => ({gives}) {{{text}}}')
    read = {name for node in model.graph.node for name in node.input}
    for name, value in (WEIGHTS | (weights or {})).items():
        if name in read:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    if unshaped:  # as many exporters leave them
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
    return model


def ran(model, image):
    """What a model gives, by ONNX Runtime, for its own kind of input."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, image)


def planes(image):
    return ((image - MEAN) / STD).transpose(2, 0, 1)[None]


def channels_last(image):
    return ((image - MEAN) / STD)[None]


def best(result):
    return result[0].argmax(0)


def check(tmp_path, model, labels=best, feed=planes, options=None, sizes=SIZES, output=0, index=None):
    """Build an engine, and compare its labels with those of the model at its own conventions.

    Returns (source, report, Segmenter's card and head).
    """
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    source = read_source(path, options)
    report = build_engine(source, tmp_path / "m.engine", timed=[(16, 16)])
    assert report["agreement"]["wrong"] == 0
    name = model.graph.input[0].name
    with Segmenter(tmp_path / "m.engine") as net:
        seen = set()
        for height, width in sizes:
            image = photo(height, width)
            expected = labels(ran(model, {name: feed(image)})[output])
            got = net(image)
            assert got.shape == expected.shape == (height, width)
            assert (got == expected).mean() > 0.999, (height, width, (got == expected).mean())
            seen |= set(np.unique(got))
        assert len(seen) > 1  # otherwise nothing was compared
        return source, report, net.card, net.head


PLAIN = SCORES + TO_SIZE + "y = Identity(f)"


def refused(tmp_path, model, name="m.onnx", **options):
    path = tmp_path / name
    if isinstance(model, bytes):
        path.write_bytes(model)
    else:
        onnx.save(model, path)
    with pytest.raises(DeployError) as caught:
        read_source(path, SourceOptions(**options))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


ENDS = {
    "logits": ("y = Identity(f)", best, "linear"),
    "softmax": ("y = Softmax<axis=1>(f)", best, "linear"),
    "log-softmax": ("y = LogSoftmax<axis=1>(f)", best, "linear"),
    "sigmoids": ("y = Sigmoid(f)", best, "linear"),
    "clipped": ("q = Softmax<axis=1>(f)\n y = Clip(q, zero, one)", best, "linear"),
    "channels-last": ("y = Transpose<perm=[0,2,3,1]>(f)", lambda r: r[0].argmax(-1), "linear"),
    "softmax-channels-last": (
        "t = Transpose<perm=[0,2,3,1]>(f)\n y = Softmax<axis=-1>(t)", lambda r: r[0].argmax(-1), "linear",
    ),
    "softmax-between-transposes": (
        "t = Transpose<perm=[0,2,3,1]>(f)\n q = Softmax<axis=3>(t)\n y = Transpose<perm=[0,3,1,2]>(q)", best, "linear",
    ),
    "no-batch": ("y = Squeeze(f, i0)", lambda r: r.argmax(0), "linear"),
    "argmax": ("y = ArgMax<axis=1, keepdims=0>(f)", lambda r: r[0], "linear"),
    "argmax-kept": ("y = ArgMax<axis=1, keepdims=1>(f)", lambda r: r[0, 0], "linear"),
    "argmax-cast": ("a = ArgMax<axis=1, keepdims=0>(f)\n y = Cast<to=2>(a)", lambda r: r[0], "linear"),
    "argmax-to-float": (
        "q = Softmax<axis=1>(f)\n a = ArgMax<axis=1, keepdims=0>(q)\n y = Cast<to=1>(a)", lambda r: r[0], "linear",
    ),
    "argmax-times-255": (
        "a = ArgMax<axis=1, keepdims=0>(f)\n b = Cast<to=1>(a)\n y = Mul(b, m255)", lambda r: r[0] / 255, "linear",
    ),
    "argmax-channels-last": (
        "t = Transpose<perm=[0,2,3,1]>(f)\n y = ArgMax<axis=-1, keepdims=0>(t)", lambda r: r[0], "linear",
    ),
    "argmax-without-batch": (
        "a = ArgMax<axis=1, keepdims=0>(f)\n b = Squeeze(a, i0)\n y = Cast<to=6>(b)", lambda r: r, "linear",
    ),
}  # fmt: skip


@pytest.mark.parametrize("end", ENDS)
def test_every_end_gives_the_labels_of_the_model(tmp_path, end):
    text, labels, head = ENDS[end]
    model = made(SCORES + TO_SIZE + text)
    if "argmax" in end:
        kind = {"argmax-cast": TensorProto.UINT8, "argmax-to-float": 1, "argmax-without-batch": TensorProto.INT32}
        kind["argmax-times-255"] = TensorProto.FLOAT
        model.graph.output[0].type.tensor_type.elem_type = kind.get(end, TensorProto.INT64)
    source, report, *_ = check(tmp_path, model, labels)
    assert report["head"] == head
    assert any("gives labels" in note for note in source.notes) == ("argmax" in end)
    assert any("(times 255, which is left out)" in note for note in source.notes) == ("255" in end)


LATE = {
    "nearest": 'b = Cast<to=6>(a)\n y = Resize<mode="nearest", nearest_mode="floor", '
    'coordinate_transformation_mode="asymmetric">(b, , , z)',
    "cast": 'b = Cast<to=1>(a)\n u = Resize<mode="nearest">(b, , , z)\n y = Cast<to=6>(u)',
}


@pytest.mark.parametrize("late", LATE)
def test_labels_that_are_enlarged_are_cut_back_to_scores_enlarged_alike(tmp_path, late):
    text = SCORES + "  a = ArgMax<axis=1, keepdims=1>(s)\n  sh = Shape(p)\n  h = Slice(sh, i2, i4)\n"
    text += "  sa = Shape(a)\n  n1 = Slice(sa, i0, i2)\n  z = Concat<axis=0>(n1, h)\n" + LATE[late]
    model = made(text, gives="int32[N,1,H,W] y")
    _, report, *_ = check(tmp_path, model, lambda r: r[0, 0])
    assert report["head"] == "nearest"


def test_labels_of_channels_last_are_enlarged_and_cropped(tmp_path):
    text = (
        SCORES
        + """
  t = Transpose<perm=[0,2,3,1]>(s)
  a = ArgMax<axis=3, keepdims=0>(t)
  b = Cast<to=1>(a)
  u = Unsqueeze(b, i1)
  v = Resize<mode="nearest">(u, , x4)
  sh = Shape(p)
  h = Slice(sh, i2, i4)
  g = Slice(v, z2, h, a23)
  y = Squeeze(g, i1)
"""
    )
    model = made(text, weights={"z2": np.array([0, 0])})
    source, report, *_ = check(tmp_path, model, lambda r: r[0])
    assert report["head"] == "nearest" and any("ArgMax" in note for note in source.notes)


def test_interpolated_labels_are_refused(tmp_path):
    text = SCORES + '  a = ArgMax<axis=1>(s)\n  b = Cast<to=1>(a)\n  y = Resize<mode="linear">(b, , x4)\n'
    onnx.save(made(text), tmp_path / "m.onnx")
    with pytest.raises(DeployError, match=r"node y \(Resize\) interpolates labels"):
        read_source(tmp_path / "m.onnx")


ONE = FEATURES + "  s = Conv(r2, wp, bp)\n" + TO_SIZE
BINARY = {
    "logit": (ONE + "y = Identity(f)", lambda r: r[0, 0] > 0, "sigmoid", 0.5),
    "sigmoid": (ONE + "y = Sigmoid(f)", lambda r: r[0, 0] > 0.5, "sigmoid", 0.5),
    "squeezed": (ONE + "q = Sigmoid(f)\n y = Squeeze(q, i1)", lambda r: r[0] > 0.5, "sigmoid", 0.5),
    "flat": (ONE + "q = Sigmoid(f)\n y = Squeeze(q, i01)", lambda r: r > 0.5, "sigmoid", 0.5),
    "channels-last": (
        ONE + "q = Sigmoid(f)\n y = Transpose<perm=[0,2,3,1]>(q)", lambda r: r[0, :, :, 0] > 0.5, "sigmoid", 0.5,
    ),
    "reshaped": (
        ONE + "q = Sigmoid(f)\n shq = Shape(q)\n n = Slice(shq, i0, i1)\n e = Slice(shq, i2, i4)\n"
        "k = Concat<axis=0>(n, e, i1)\n y = Reshape(q, k)", lambda r: r[0, :, :, 0] > 0.5, "sigmoid", 0.5,
    ),
    "threshold": (ONE + "q = Sigmoid(f)\n g = Greater(q, t6)\n y = Cast<to=1>(g)", lambda r: r[0, 0], "sigmoid", 0.6),
    "threshold-of-logits": (
        ONE + "g = Less(half, f)\n y = Where(g, m255, zero)", lambda r: r[0, 0] > 0, "sigmoid", 0.62245935,
    ),
    "rounded": (ONE + "q = Sigmoid(f)\n g = Round(q)\n y = Mul(g, m255)", lambda r: r[0, 0] > 0, "sigmoid", 0.5),
    "second-of-two": (
        FEATURES + "s = Conv(r2, w2c)\n" + TO_SIZE + "q = Softmax<axis=1>(f)\n y = Slice(q, i1, i2, i1)",
        lambda r: r[0, 0] > 0.5, "softmax", 0.5,
    ),
    "second-gathered": (
        FEATURES + "s = Conv(r2, w2c)\n" + TO_SIZE + "t = Transpose<perm=[0,2,3,1]>(f)\n q = Softmax<axis=-1>(t)\n"
        "y = Gather<axis=3>(q, index1)", lambda r: r[0] > 0.5, "softmax", 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("end", BINARY)
def test_binary_models_of_every_end(tmp_path, end):
    text, labels, activation, threshold = BINARY[end]
    model = made(text, weights={"t6": np.float32(0.6), "i01": np.array([0, 1])})
    _, report, card, _ = check(tmp_path, model, labels)
    assert card.activation == activation and card.threshold == pytest.approx(threshold) and report["head"] == "linear"


def test_the_second_of_two_channels_with_a_threshold_of_ones_own(tmp_path):
    text = FEATURES + "s = Conv(r2, w2c)\n" + TO_SIZE + "q = Softmax<axis=1>(f)\n y = Slice(q, i1, i2, i1)"
    options = SourceOptions(activation="probability", threshold=0.8)
    check(tmp_path, made(text), lambda r: r[0, 0] > 0.8, options=options)


# Layouts and types


TF = """
  t1 = Transpose<perm=[0,3,1,2]>(x)
  p = Identity(t1)
"""


@pytest.mark.parametrize("before", ["plain", "arithmetic"])
def test_channels_last_in_and_out(tmp_path, before):
    start = "  t = Sub(x, mean)\n  u = Mul(t, scale)\n" if before == "arithmetic" else "  u = Identity(x)\n"
    text = start + "  p = Transpose<perm=[0,3,1,2]>(u)\n" + SCORES + TO_SIZE + "  y = Transpose<perm=[0,2,3,1]>(f)\n"
    model = made(text, "float[n,h,w,3] x", "float[n,h,w,4] y", weights={"mean": MEAN, "scale": 1 / STD})
    feed = channels_last if before == "plain" else lambda image: image[None].astype(np.float32)
    source, report, card, _ = check(tmp_path, model, lambda r: r[0].argmax(-1), feed)
    assert report["head"] == "linear" and report["size_multiple"] == 1
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
    source = read_source(tmp_path / "m.onnx")
    assert source.card.channels == 3 and len(source.card.classes) == 4
    for height, width in ((64, 96), *(() if shape.startswith("1") else ((37, 61),))):
        image = planes(photo(height, width))
        expected = ran(model, {"x": image.transpose(0, 2, 3, 1)})[0].transpose(0, 3, 1, 2)
        np.testing.assert_allclose(
            ran(source.model, {"p": image} if False else {source.model.graph.input[0].name: image})[0],
            expected,
            atol=1e-4,
        )


def test_uint8_images_are_normalised_in_the_graph(tmp_path):
    start = "  c = Cast<to=1>(x)\n  t = Transpose<perm=[0,3,1,2]>(c)\n  d = Sub(t, mean)\n  p = Div(d, std)\n"
    weights = {"mean": MEAN.reshape(1, 3, 1, 1), "std": STD.reshape(1, 3, 1, 1)}
    model = made(start + SCORES + TO_SIZE + "y = ArgMax<axis=1, keepdims=0>(f)", "uint8[N,H,W,3] x", "int64[N,H,W] y",
                 weights=weights)  # fmt: skip
    source, report, card, _ = check(tmp_path, model, lambda r: r[0], lambda image: image[None])
    assert card.mean == (0, 0, 0) and card.std == (1, 1, 1) and report["head"] == "linear"
    assert "takes uint8" in " ".join(source.notes) and "go in as they are" in " ".join(source.notes)
    assert "Cast" not in {node.op_type for node in source.model.graph.node}


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_models_of_other_floats_are_run_in_float32(tmp_path, kind):
    model = made(SCORES + TO_SIZE + "y = Identity(f)", f"{kind}[N,3,H,W] p", f"{kind}[N,4,H,W] y")
    to = np.dtype("float64" if kind == "double" else kind)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(to), tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    source = read_source(tmp_path / "m.onnx")
    assert f"is of {kind}; it is run in float32" in " ".join(source.notes)
    report = build_engine(source, tmp_path / "m.engine", timed=[(16, 16)])
    assert report["agreement"]["wrong"] == 0
    with Segmenter(tmp_path / "m.engine") as net:
        for height, width in SIZES[1:]:
            image = photo(height, width)
            # ONNX Runtime has no convolution of double.
            run = ran if kind == "float16" else lambda m, image: ReferenceEvaluator(m).run(None, image)
            scores = run(model, {"p": planes(image).astype(to)})[0][0].astype(np.float32)
            first, second = np.sort(scores, 0)[-2:][::-1]
            clear = first - second > 0.02 * np.ptp(scores)
            assert clear.mean() > 0.7 and (net(image) == scores.argmax(0))[clear].all()


# Opsets


def old(text, opset, ir, weights=None, **kinds):
    model = made(text, opset=opset, ir=max(ir, 8), weights=weights, **kinds)
    model.ir_version = ir
    if ir < 4:  # weights were inputs too
        for tensor in model.graph.initializer:
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


UPSAMPLE = {
    7: "u = Upsample<mode=MODE, scales=[1.0,1.0,4.0,4.0]>(s)",
    8: "u = Upsample<mode=MODE, scales=[1.0,1.0,4.0,4.0]>(s)",
    9: "u = Upsample<mode=MODE>(s, x4)",
    10: "u = Resize<mode=MODE>(s, x4)",
    11: 'u = Resize<mode=MODE, coordinate_transformation_mode="asymmetric", nearest_mode="floor">(s, none, x4)',
}


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("opset", UPSAMPLE)
def test_opsets_from_7_on_with_what_was_upsampling_then(tmp_path, opset, mode):
    text = SCORES + UPSAMPLE[opset].replace("MODE", f'"{mode}"') + "\n y = Identity(u)"
    model = old(text, opset, 3 if opset < 9 else 6, {"none": np.zeros(0, np.float32)})
    sizes = tuple((4 * height, 4 * width) for height, width in SIZES[:3])
    source, report, _, head = check(tmp_path, model, sizes=sizes)
    assert f"is of opset {opset}; it is converted to 18" in source.notes[0]
    assert (report["head"], head.coordinates, report["size_multiple"]) == (mode, "asymmetric", 4)


def test_sizes_computed_as_old_exporters_did(tmp_path):
    text = (
        SCORES
        + """
  fs = Shape(p)
  ff = Cast<to=1>(fs)
  gs = Shape(s)
  gf = Cast<to=1>(gs)
  ratio = Div(ff, gf)
  hw = Slice<axes=[0], starts=[2], ends=[4]>(ratio)
  scales = Concat<axis=0>(ones, hw)
  u = Upsample<mode="linear">(s, scales)
  y = Softmax<axis=1>(u)
"""
    )
    model = old(text, 9, 4, {"ones": np.ones(2, np.float32)})
    source, report, _, head = check(tmp_path, model, sizes=SIZES[1:])
    assert report["head"] == "linear" and head.factor is None
    assert any("Softmax at its end is over the whole image" in note for note in source.notes)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 17, 18, 21, 23])
def test_other_operators_of_old_opsets(tmp_path, opset):
    axes = opset < 13
    text = """
  n1 = BatchNormalization(p, g, b, m, v)
  c1 = Conv<pads=[1,1,1,1]>(n1, w1)
  d1, mask = Dropout(c1)
"""
    text = text.replace("d1, mask", "d1")
    text += "  k1 = Clip<min=0.0, max=6.0>(d1)\n" if opset < 11 else "  k1 = Clip(d1, zero, six)\n"
    text += "  e1 = Pad<pads=[0,0,1,1,0,0,1,1]>(k1)\n" if opset < 11 else "  e1 = Pad(k1, pads)\n"
    text += "  c2 = Conv(e1, w2)\n"
    text += "  h = ReduceMax<axes=[1], keepdims=1>(c2)\n" if opset < 18 else "  h = ReduceMax<keepdims=1>(c2, i1)\n"
    text += (
        "  q = Squeeze<axes=[1]>(h)\n  o = Unsqueeze<axes=[1]>(q)\n"
        if axes
        else "  q = Squeeze(h, i1)\n  o = Unsqueeze(q, i1)\n"
    )
    text += "  j = Sub(c2, o)\n  s = Conv(j, w3)\n  y = Identity(s)\n"
    weights = {name: RANDOM.uniform(0.5, 1.5, 3).astype(np.float32) for name in "gbmv"}
    weights |= {"six": np.float32(6), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    check(tmp_path, old(text, opset, 3 if opset < 9 else 8, weights))


def test_weights_in_constant_nodes_with_no_initialiser_at_all(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)")
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    nodes += model.graph.node
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    check(tmp_path, model)


def test_nodes_out_of_order_and_local_functions(tmp_path):
    model = made(SCORES + TO_SIZE + "q = local.Twice(f)\n y = Identity(q)")
    model.opset_import.append(helper.make_opsetid("local", 1))
    twice = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    model.functions.append(twice)
    model.graph.node[-2].domain, model.graph.node[-2].op_type = "local", "Twice"
    unsorted = onnx.ModelProto()
    unsorted.CopyFrom(model)
    nodes = list(reversed(model.graph.node))
    del unsorted.graph.node[:]
    unsorted.graph.node.extend(nodes)
    onnx.save(unsorted, tmp_path / "u.onnx")
    source = read_source(tmp_path / "u.onnx")
    image = planes(photo(37, 61))
    np.testing.assert_allclose(ran(source.model, {"p": image})[0], ran(model, {"p": image})[0], atol=1e-4)


# Outputs


def test_the_largest_output_is_used_scores_before_labels_and_the_first_of_equals(tmp_path):
    text = (
        SCORES
        + TO_SIZE
        + """
  main = Identity(f)
  aux = Neg(f)
  coarse = Identity(s)
  labels = ArgMax<axis=1, keepdims=0>(f)
  sure = ReduceMax<keepdims=0>(f, i1)
  mean = ReduceMean(f, a23)
"""
    )
    outputs = {"coarse": "float[N,4,h,w]", "labels": "int64[N,H,W]", "sure": "float[N,H,W]", "mean": "float[N,4,1,1]"}
    both = {"main": "float[N,4,H,W]", "aux": "float[N,4,H,W]"}

    def read(gives, **options):
        onnx.save(made(text, gives=", ".join(f"{kind} {name}" for name, kind in gives.items())), tmp_path / "m.onnx")
        return read_source(tmp_path / "m.onnx", SourceOptions(**options))

    image = planes(photo(37, 61))
    main = ran(made(text, gives="float[N,4,H,W] main"), {"p": image})[0]
    for gives in (outputs | both, {"aux": both["aux"]} | outputs | both, both):
        source = read(gives)
        assert "main is used" in source.notes[0] and "aux" in source.notes[0]
        np.testing.assert_allclose(ran(source.model, {"p": image})[0], main, atol=1e-5)
    source = read(outputs)
    assert "labels is used" in source.notes[0]
    np.testing.assert_allclose(ran(source.model, {"p": image})[0], main, atol=1e-5)
    source = read(outputs | both, output="aux")
    assert not any("outputs" in note for note in source.notes)
    np.testing.assert_allclose(ran(source.model, {"p": image})[0], -main, atol=1e-5)
    with pytest.raises(MisuseError, match="has no output 'none'; it has coarse, labels, sure, mean"):
        read(outputs, output="none")


def test_coarse_scores_are_upsampled_and_that_is_said(tmp_path):
    model = made(SCORES + "  y = Softmax<axis=1>(s)\n")
    onnx.save(model, tmp_path / "m.onnx")
    source = read_source(tmp_path / "m.onnx")
    assert any("1/4 of the image's size; they are upsampled bilinearly" in note for note in source.notes)
    report = build_engine(source, tmp_path / "m.engine", timed=[(16, 16)])
    assert (report["head"], report["stride"], report["size_multiple"]) == ("linear", 4, 4)


# Fixed sizes


def fixed(model, *shape):
    """The model with numbers for the dimensions of its input."""
    for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.Clear()
        dim.dim_value = side
    return model


FIXED = {
    "by name alone": (PLAIN, best, (1, 3, 64, 96), {}),
    "labels, channels last, of two images": (
        "  p = Transpose<perm=[0,3,1,2]>(x)\n" + SCORES + TO_SIZE + "t = Transpose<perm=[0,2,3,1]>(f)\n"
        "y = ArgMax<axis=3, keepdims=0>(t)", lambda r: r[0], (2, 64, 96, 3), {},
    ),
    "resized to a number": (
        SCORES + 'y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(s, , , z)', best,
        (1, 3, 64, 96), {"z": np.array([1, 4, 64, 96])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIXED)
def test_models_of_one_size_take_every_size(tmp_path, kind):
    text, labels, shape, weights = FIXED[kind]
    last = shape[3] == 3
    model = fixed(made(text, "float[N,a,b,c] x" if last else "float[N,a,b,c] p", weights=weights), *shape)
    if "ArgMax" in text:
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64

    def feed(image):
        batch = planes(image).repeat(shape[0], axis=0)
        return batch.transpose(0, 2, 3, 1) if last else batch

    source, report, *_ = check(tmp_path, model, labels, feed, sizes=[(64, 96)])
    assert report["head"] == "linear" and any("64×96" in note for note in source.notes)
    # Beyond its own size it is the same network with its sizes free.
    free = made(PLAIN)
    with Segmenter(tmp_path / "m.engine") as net:
        # What was a number may stand for four times the scores' size as well: at multiples of 4 it is the same.
        for height, width in SIZES:
            image = photo(4 * height, 4 * width) if "number" in kind else photo(height, width)
            assert (net(image) == best(ran(free, {"p": planes(image)})[0])).mean() > 0.999


def test_a_size_that_cannot_be_freed_is_named(tmp_path):
    text = SCORES + "  e = Add(s, place)\n" + 'y = Resize<mode="linear">(e, , x4)'
    place = RANDOM.normal(size=(1, 4, 16, 24)).astype(np.float32)
    model = fixed(made(text, weights={"place": place}), 1, 3, 64, 96)
    assert "node e" in (said := refused(tmp_path, model)) or "e (Add)" in said
    model = made(text, weights={"place": place})
    assert "e (Add)" in refused(tmp_path, model)


def test_a_batch_of_one_that_is_baked_in_is_said(tmp_path):
    text = (
        SCORES
        + TO_SIZE
        + "  sh = Shape(f)\n  e = Slice(sh, i2, i4)\n  k = Concat<axis=0>(one4, e)\n  y = Reshape(f, k)"
    )
    model = made(text, weights={"one4": np.array([1, 4])})
    source, *_ = check(tmp_path, model)
    assert "takes one image at a time" in source.notes[0]


# Padding and cropping inside


def test_a_model_that_pads_and_crops_by_itself_is_tiled_exactly(tmp_path):
    text = (
        """
  shi = Shape(x)
  size = Slice(shi, i2, i4)
  m = Neg(size)
  after = Mod(m, eight)
  pads = Concat<axis=0>(six, after)
  p = Pad(x, pads)
"""
        + SCORES
        + """
  u = Resize<mode="linear">(s, , x4)
  g = Slice(u, two0, size, a23)
  y = Softmax<axis=1>(g)
"""
    )
    weights = {"eight": np.array([8]), "six": np.zeros(6, np.int64), "two0": np.zeros(2, np.int64)}
    model = made(text, "float[N,3,H,W] x", weights=weights)
    _, report, card, head = check(tmp_path, model)
    assert (report["head"], card.size_multiple, head.factor) == ("linear", 8, (4, 4))
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(301, 203)
        whole = net(image)
        with Segmenter(tmp_path / "m.engine", memory=net.plan(301, 203).bytes // 2) as tiled:
            assert tiled.plan(301, 203).grids
            np.testing.assert_array_equal(tiled(image), whole)


def test_a_crop_of_what_was_enlarged_is_the_heads(tmp_path):
    text = (
        SCORES
        + TO_SIZE.replace("p)", "p)", 1).split("shs")[0]
        + """
  u = Resize<mode="linear">(s, , x4)
  b = Slice(u, i0, rows, i2)
  y = Slice(b, i0, columns, i3)
"""
    )
    text = text.replace("  hw = Slice(shp, i2, i4)\n", "  rows = Slice(shp, i2, i3)\n  columns = Slice(shp, i3, i4)\n")
    _, report, card, _ = check(tmp_path, made(text))
    assert (report["head"], card.size_multiple) == ("linear", 1)
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(301, 203)
        with Segmenter(tmp_path / "m.engine", memory=net.plan(301, 203).bytes // 2) as tiled:
            assert tiled.plan(301, 203).grids
            np.testing.assert_array_equal(tiled(image), net(image))


# What the user says


def reads(tmp_path, model, **options):
    onnx.save(model, tmp_path / "m.onnx")
    return read_source(tmp_path / "m.onnx", SourceOptions(**options))


def test_mean_std_and_scale_are_those_of_the_card_in_the_images_units(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)")
    assert reads(tmp_path, model).card.mean == pytest.approx(tuple(MEAN))
    source = reads(tmp_path, model, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), scale=1 / 255)
    assert source.card.mean == pytest.approx((127.5, 102, 76.5))
    assert source.card.std == pytest.approx((51, 63.75, 127.5))
    source = reads(tmp_path, model, scale=1 / 255)
    assert source.card.mean == (0, 0, 0) and source.card.std == pytest.approx((255,) * 3)
    assert not any("mean [" in note for note in source.notes)
    assert reads(tmp_path, model, mean=(127.5,)).card.std == (1, 1, 1)
    feed = lambda image: ((image / np.float32(255) - np.float32(0.5)) / np.float32(0.25)).transpose(2, 0, 1)[None]  # noqa: E731
    check(tmp_path, model, feed=feed, options=SourceOptions(mean=(0.5,), std=(0.25,), scale=1 / 255))
    with pytest.raises(MisuseError, match="--input-mean has 2 numbers, and the model takes 3 channels"):
        reads(tmp_path, model, mean=(1, 2))
    with pytest.raises(MisuseError, match="--scale 0"):
        SourceOptions(scale=0.0)


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

    options = SourceOptions(bgr=True, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    source, _, card, _ = check(tmp_path, model, feed=feed, options=options)
    assert card.mean == pytest.approx((123.68, 116.78, 103.94)) and card.std == (40, 50, 60)
    assert any("wants BGR" in note for note in source.notes)
    assert ("Gather" in {n.op_type for n in source.model.graph.node}) == (first == "arithmetic")


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    broken = np.full((4, 6, 1, 1), np.nan, np.float32)
    with pytest.raises(DeployError, match="gives NaN for an image of noise; check its weights"):
        reads(tmp_path, made(SCORES + TO_SIZE + "y = Identity(f)", weights={"w3": broken}))


def test_scores_of_8_bits_are_scores(tmp_path):
    text = SCORES + TO_SIZE + "q = Softmax<axis=1>(f)\n m = Mul(q, m255)\n y = Cast<to=2>(m)"
    check(tmp_path, made(text, gives="uint8[N,4,H,W] y"))
    moved = text.replace("y = Cast<to=2>(m)", "c = Cast<to=2>(m)\n y = Transpose<perm=[0,2,3,1]>(c)")
    check(tmp_path, made(moved, gives="uint8[N,H,W,4] y"), lambda result: result[0].argmax(2))


def test_classes_activation_and_threshold(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)")
    source = reads(tmp_path, model, classes=("a", "b", "c", "d"))
    assert source.card.classes == ("a", "b", "c", "d") and not any("unnamed" in note for note in source.notes)
    for options, said in (
        ({"classes": ("a", "b")}, "2 classes are named, and .* has 4"),
        ({"activation": "sigmoid"}, "activation sigmoid is for one score, and .* has 4"),
        (
            {"activation": "argmax"},
            "--activation argmax; choose one of softmax, sigmoid, probability, multilabel, none",
        ),
        ({"threshold": 0.4}, "a threshold is for one score or for masks, and .* has 4"),
        ({"activation": "multilabel", "threshold": 1.5}, "threshold 1.5"),
    ):
        with pytest.raises(MisuseError, match=said):
            reads(tmp_path, model, **options)
    with pytest.raises(MisuseError, match="ends in a Softmax over all of them; say softmax"):
        reads(tmp_path, made(SCORES + TO_SIZE + "y = Softmax<axis=1>(f)"), activation="multilabel")
    one = made(ONE + "y = Sigmoid(f)")
    assert reads(tmp_path, one, threshold=0.3, classes=("road", "crack")).card.threshold == 0.3
    for options, said in (
        ({"activation": "softmax"}, "needs two scores or more"),
        ({"activation": "sigmoid"}, "ends in a Sigmoid; say probability"),
    ):
        with pytest.raises(MisuseError, match=said):
            reads(tmp_path, one, **options)
    depth = reads(tmp_path, made(ONE + "y = Identity(f)"), activation="none", classes=("depth",))
    assert depth.card.activation == "none" and depth.card.classes == ("depth",)


MASKS = {
    "after": "y = Sigmoid(f)",
    "before": 'y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(q, , , sizes)',
    "compared": "q2 = Sigmoid(f)\n g = Greater(q2, t4)\n y = Cast<to=1>(g)",
}


@pytest.mark.parametrize("sigmoid", MASKS)
def test_masks_of_many_sigmoids(tmp_path, sigmoid):
    text = SCORES + ("  q = Sigmoid(s)\n" if sigmoid == "before" else "") + TO_SIZE + MASKS[sigmoid]
    if sigmoid == "before":
        text = text.replace("shs = Shape(s)", "shs = Shape(q)")
    model = made(text, weights={"t4": np.float32(0.4)})
    options = {"activation": "multilabel", "threshold": (0.4, 0.5, 0.6, 0.4)}
    if sigmoid == "compared":
        options = {}
    else:
        noted = reads(tmp_path, model)
        assert noted.card.activation == "softmax" and any("--activation multilabel" in note for note in noted.notes)
    source = reads(tmp_path, model, **options)
    assert source.card.activation == "multilabel" and source.card.scores == 4
    report = build_engine(source, tmp_path / "m.engine", timed=[(16, 16)])
    assert report["head"] == "linear" and report["agreement"]["wrong"] == 0
    limits = np.float32([0] * 4 if sigmoid == "compared" else options["threshold"])[:, None, None]
    with Segmenter(tmp_path / "m.engine") as net:
        for size in SIZES:
            image = photo(*size)
            expected = ran(model, {"p": planes(image)})[0][0] > limits
            assert (net.masks(image) == expected).mean() > 0.999


def test_maps_of_values(tmp_path):
    model = made(ONE + "q = Sigmoid(f)\n y = Squeeze(q, i1)")
    source = reads(tmp_path, model, activation="none", classes=("matte",))
    build_engine(source, tmp_path / "m.engine", timed=[(16, 16)])
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.card.classes == ("matte",)
        for size in SIZES:
            image = photo(*size)
            np.testing.assert_allclose(net.values(image), ran(model, {"p": planes(image)})[0], atol=1e-4)


def test_what_a_graph_does_to_images_first_is_told_only_where_it_is_sure(tmp_path):
    def card(first, **weights):
        text = first + SCORES + TO_SIZE + "y = Identity(f)"
        shaped = {name: np.float32(value).reshape(1, -1, 1, 1) for name, value in weights.items()}
        return reads(tmp_path, made(text, "float[N,3,H,W] x", weights=shaped)).card

    assert card("p = Div(x, m255)\n").std == (1, 1, 1)
    assert card("p = Sub(x, m)\n", m=[123.7, 116.8, 103.9]).std == (1, 1, 1)
    unit = card("e = Sub(x, m)\n p = Div(e, d)\n", m=[0.485, 0.456, 0.406], d=[0.229, 0.224, 0.225])
    assert unit.std == (255,) * 3 and unit.mean == (0,) * 3
    assert card("p = Mul(x, m)\n", m=[0.5]).mean == pytest.approx(tuple(MEAN))


def test_a_card_file(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)")
    file = tmp_path / "card.toml"
    file.write_text(
        'classes = ["road", "car", "tree", "sky"]\ncolors = [[0, 0, 0], [9, 9, 9], [0, 255, 0], [0, 0, 255]]\n'
        "mean = [1, 2.5, 3]\nstd = 2\n"
    )
    source = reads(tmp_path, model, card=read_card_file(file))
    assert source.card.classes == ("road", "car", "tree", "sky") and source.card.colors[2] == (0, 255, 0)
    assert source.card.mean == (1, 2.5, 3) and source.card.std == (2, 2, 2)
    assert source.notes == (
        f"{tmp_path / 'm.onnx'} carries no model card; assuming 3-channel uint8 images (RGB), labels by argmax",
    )
    for text, said in (
        ('clases = ["a"]', "card.toml has 'clases'; a card file may have classes, colors, channels"),
        ("classes = [", "card.toml: "),
        ("mean = 'red'", "the model card would have"),
        ("channels = 4", "says 4 channels, and .* takes 3"),
        ("activation = 'relu'", "activation 'relu'"),
    ):
        file.write_text(text)
        with pytest.raises(MisuseError, match=said):
            reads(tmp_path, model, card=read_card_file(file))
    with pytest.raises(MisuseError, match=r"none\.toml"):
        read_card_file(tmp_path / "none.toml")
    with pytest.raises(MisuseError, match="--classes is in the card file too"):
        SourceOptions(classes=("a",), card={"classes": ["b"]})


def test_the_card_file_of_the_docs(tmp_path):
    text = (ROOT / "docs" / "formats.md").read_text()
    (tmp_path / "card.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    model = made(SCORES + TO_SIZE + "k = Slice(f, i0, i3, i1)\n y = Sigmoid(k)", gives="float[N,3,H,W] y")
    card = reads(tmp_path, model, card=read_card_file(tmp_path / "card.toml")).card
    assert card.classes[1] == "road" and card.threshold == (0.5, 0.4, 0.6) and card.kind == "masks"


def test_options_for_a_model_with_a_card_of_its_own_are_misuse(exports):
    for options, name in (({"mean": (1.0,)}, "input-mean"), ({"bgr": True}, "bgr"), ({"card": {"mean": [1]}}, "card")):
        with pytest.raises(MisuseError, match=f"has a model card; --{name} is for models without one"):
            read_source(exports / "narrow.onnx", SourceOptions(**options))
    assert read_source(exports / "narrow.onnx", SourceOptions(output="logits")).notes == ()


def test_the_command_line_says_it_all(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)\n other = Neg(f)", gives="float[N,4,H,W] y, float[N,4,H,W] other")
    onnx.save(model, tmp_path / "m.onnx")
    (tmp_path / "names.txt").write_text("road\ncar\n\ntree\nsky\n")
    words = ("--input-mean", "0.5,0.4,0.3", "--input-std", "0.25", "--scale", "0.01", "--bgr", "--output", "other")
    words += ("--classes", tmp_path / "names.txt", "--activation", "softmax", "--json", "--sizes", "16x16")
    done = command("build-engine", tmp_path / "m.onnx", *words, "-o", tmp_path / "m.engine")
    notes = json.loads(done.stdout)["notes"]
    assert len(notes) == len(done.stderr.strip().splitlines()) and "wants BGR" in notes[0]
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.card.classes == ("road", "car", "tree", "sky")
        assert net.card.mean == pytest.approx((30, 40, 50)) and net.card.std == (25, 25, 25)
    (tmp_path / "card.toml").write_text("mean = 3")
    for words, said in (
        (("--input-mean", "red"), "--input-mean 'red'"),
        (("--threshold", "0.4"), "a threshold is for one score"),
        (("--card", tmp_path / "card.toml", "--input-mean", "3"), "--input-mean is in the card file too"),
        (("--card", tmp_path / "card.toml", "--scale", "2"), "--scale goes with --input-mean"),
        (("--card", tmp_path / "none.toml"), "none.toml"),
        (("--classes", "nowhere"), "--classes nowhere"),
        (("--output", "third"), "has no output 'third'; it has y, other"),
    ):
        done = command("build-engine", tmp_path / "m.onnx", *words, "-o", tmp_path / "x.engine", ok=2)
        assert said in one_error(done) and not (tmp_path / "x.engine").exists()


@pytest.mark.parametrize("weight", ["wp", "w3"])
def test_a_squeeze_as_pytorch_exports_it(tmp_path, weight):
    text = (
        FEATURES
        + f"  s = Conv(r2, {weight})\n"
        + TO_SIZE
        + """
  q = Sigmoid(f)
  shq = Shape(q)
  k = Gather<axis=0>(shq, i1)
  b = Equal(k, i1)
  y = Identity(q)
"""
    )
    then = parser.parse_graph("then () => (float[N,H,W] z) { ax = Constant<value_ints=[1]>() z = Squeeze(q, ax) }")
    other = parser.parse_graph("else () => (float[N,K,H,W] z) { z = Identity(q) }")
    model = made(text)
    model.graph.node[-1].CopyFrom(helper.make_node("If", ["b"], ["y"], then_branch=then, else_branch=other))
    one = weight == "wp"
    check(tmp_path, model, (lambda r: r[0] > 0.5) if one else best)


# What is refused, in one line that names the node and the reason


def test_files_that_are_no_onnx(tmp_path):
    with pytest.raises(MisuseError, match="does not exist"):
        read_source(tmp_path / "none.onnx")
    with pytest.raises(MisuseError, match="is not a file"):
        read_source(tmp_path)
    good = made(PLAIN).SerializeToString()
    for data in (b"", b"junk", b"\x89PNG\r\n\x1a\n" + bytes(99), good[: len(good) // 2], bytes(1000)):
        assert "is not a valid ONNX model" in refused(tmp_path, data)
    empty = made(PLAIN)
    del empty.graph.output[:]
    assert "no output" in refused(tmp_path, empty)
    unknown = made(PLAIN)
    unknown.graph.initializer[0].data_type = 58
    assert "is of an unknown type, 58" in refused(tmp_path, unknown)
    for opset in (6, 99):
        changed = made(PLAIN)
        changed.opset_import[0].version = opset
        assert f"is of opset {opset}; 7 to " in refused(tmp_path, changed)


def test_damaged_files_are_refused_in_one_line_or_read(tmp_path):
    good, random = made(PLAIN).SerializeToString(), np.random.default_rng(1)
    outcomes = set()
    for _ in range(60):
        data = bytearray(good)
        for place in random.integers(0, len(good), 3):
            data[place] = random.integers(256)
        (tmp_path / "m.onnx").write_bytes(data)
        try:
            read_source(tmp_path / "m.onnx")
            outcomes.add("read")
        except DeployError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_weights_in_files_that_are_missing_or_truncated(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)")
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    read_source(tmp_path / "m.onnx")
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:100])
    with pytest.raises(DeployError, match=r"of m\.data for .*, and the file has 100; it is truncated"):
        read_source(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    with pytest.raises(DeployError, match=r"keeps weights \(.*\) in m\.data, which is not beside it"):
        read_source(tmp_path / "m.onnx")
    outside = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "m.data").write_bytes(data)
    for tensor in outside.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../m.data"
    assert "cannot be read" in refused(tmp_path / "sub", outside)


def test_graphs_that_are_no_networks(tmp_path):
    custom = made(PLAIN.replace("Relu(c1)", "org_example.Swish(c1)"))
    custom.graph.node[1].domain, custom.graph.node[1].name = "org.example", "act"
    custom.opset_import.append(helper.make_opsetid("org.example", 1))
    assert "node act (" in (said := refused(tmp_path, custom)) and "custom operator of the domain org.example" in said
    cycle = made(PLAIN)
    cycle.graph.node[0].input[0] = "r2"
    assert "has a cycle" in (said := refused(tmp_path, cycle)) and "c1 (Conv) → r1 (Relu)" in said
    missing = made(PLAIN)
    missing.graph.node[2].input[0] = "nowhere"
    assert "node c2 (Conv) reads nowhere, which nothing gives" in refused(tmp_path, missing)
    twice = made(PLAIN)
    twice.graph.node[2].output[0] = "c1"
    assert "gives c1 by two nodes" in refused(tmp_path, twice)
    sequence = made(
        SCORES + TO_SIZE + "q = SequenceConstruct(f)\n y = SequenceAt(q, index0)", weights={"index0": np.array(0)}
    )
    assert "node q (SequenceConstruct) works on sequences" in refused(tmp_path, sequence)
    branch = parser.parse_graph("then () => (float[N,4,H,W] z) { z = Identity(f) }")
    other = parser.parse_graph("else () => (float[N,4,H,W] z) { z = Neg(f) }")
    control = made(SCORES + TO_SIZE + "h = ReduceMax<keepdims=0>(f)\n b = Cast<to=9>(h)\n y = Identity(f)")
    control.graph.node[-1].CopyFrom(
        helper.make_node("If", ["b"], ["y"], "choice", then_branch=branch, else_branch=other)
    )
    assert "node choice (If) is control flow" in refused(tmp_path, control)
    training = made(SCORES.replace("Relu(c1)", "BatchNormalization<training_mode=1>(c1, g, g, g, g)").replace(
        "r1 =", "r1, m1, v1 =") + TO_SIZE + "y = Identity(f)", weights={"g": np.ones(6, np.float32)})  # fmt: skip
    assert "node r1 (BatchNormalization) is in training mode" in refused(tmp_path, training)


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


def test_outputs_that_are_no_scores_of_pixels(tmp_path):
    classifier = made(FEATURES + "m = ReduceMean<keepdims=0>(r2, a23)\n y = Softmax<axis=1>(m)", gives="float[N,6] y")
    assert "gives y [1, 6]: a classifier's scores" in refused(tmp_path, classifier)
    boxes = made(FEATURES + "y = Reshape(r2, shape)", weights={"shape": np.array([1, -1, 6])})
    assert "gives y [1, " in (said := refused(tmp_path, boxes)) and "boxes instead of scores" in said
    labels = made(SCORES + TO_SIZE + "m = ReduceMax<keepdims=0>(f, i1)\n y = Cast<to=7>(m)", gives="int64[N,H,W] y")
    assert "gives labels of int64 by node y (Cast), from which no scores can be told" in refused(tmp_path, labels)


HUGE = {
    "ConstantOfShape": "z = ConstantOfShape(big)",
    "Expand": "z = Expand(one, big)",
    "Tile": "t = Unsqueeze(one, i0)\n z = Tile(t, million2)",
    "Resize": "z = Resize(p, , bigscale)",
    "Range": "z = Range(index0, far, index1)",
    "Pad": "z = Pad(p, bigpads)",
    "computed": "a = Shape(p)\n b = Mul(a, million)\n z = Expand(one, b)",
}


@pytest.mark.parametrize("operator", HUGE)
def test_a_tensor_that_would_take_the_machine_down_is_named_before_it_is_made(tmp_path, operator):
    weights = {
        "big": np.array([1 << 20, 1 << 20]), "million": np.array([1 << 20]), "bigscale": np.float32([1, 1, 1e5, 1e5]),
        "far": np.array(1 << 40), "index0": np.array(0), "bigpads": np.array([0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20]),
        "million2": np.array([1 << 40]),
    }  # fmt: skip
    text = HUGE[operator] + "\n" + SCORES + TO_SIZE
    text += "e = Cast<to=1>(z)\n h = ReduceMax<keepdims=0>(e)\n y = Add(f, h)"
    said = refused(tmp_path, made(text, weights=weights))
    name = "Expand" if operator == "computed" else operator
    assert f"node z ({name}) makes a tensor of " in said


def test_images_declared_of_impossible_sizes(tmp_path):
    assert "more than a machine" in refused(tmp_path, made(PLAIN, "float[1,3,1048576,1048576] p"))


OTHER_LABELS = {
    "table": ("a = ArgMax<axis=1, keepdims=1>(f)\n y = Gather<axis=0>(table, a)", "int64[N,1,H,W] y"),
    "sum": ("a = ArgMax<axis=1, keepdims=1>(f)\n b = Cast<to=1>(a)\n y = Add(b, one)", "float[N,1,H,W] y"),
    "product": ("a = ArgMax<axis=1, keepdims=0>(f)\n b = Cast<to=1>(a)\n y = Mul(m255, b)", "float[N,H,W] y"),
    "mask": (
        "a = ArgMax<axis=1, keepdims=0>(f)\n b = Cast<to=9>(a)\n y = Where(b, m255, zero)",
        "float[N,H,W] y",
    ),
    "argmin": ("m = Neg(f)\n y = ArgMin<axis=1, keepdims=1>(m)", "int64[N,1,H,W] y"),
    "best": ("v, y = TopK<axis=1>(f, i1)", "int64[N,1,H,W] y"),
    "and": ("a = Greater(f, zero)\n b = Less(f, one)\n c = And(a, b)\n y = Slice(c, i0, i1, i1)", "bool[N,1,H,W] y"),
    "whole numbers": ("a = Slice(f, i0, i1, i1)\n b = Mul(a, m255)\n y = Cast<to=6>(b)", "int32[N,1,H,W] y"),
}


@pytest.mark.parametrize("end", OTHER_LABELS)
def test_labels_that_cannot_be_undone_are_never_taken_for_scores(tmp_path, end):
    text, gives = OTHER_LABELS[end]
    model = made(SCORES + TO_SIZE + text, gives=gives, weights={"table": np.array([3, 0, 2, 1])})
    assert "from which no scores can be told" in refused(tmp_path, model)


@pytest.mark.parametrize("end", ["a = Mul(c, m255)\n y = Round(a)", "a = Relu(c)\n y = GreaterOrEqual(a, zero)"])
def test_what_is_no_threshold_is_refused(tmp_path, end):
    text = SCORES + TO_SIZE + "c = Slice(f, i1, i2, i1)\n" + end
    gives = "bool[N,1,H,W] y" if "Greater" in end else "float[N,1,H,W] y"
    assert "does not give what it gave" in refused(tmp_path, made(text, gives=gives))


@pytest.mark.parametrize(
    "end",
    ["q = Softmax<axis=1>(f)\n y = Slice(q, i2, i3, i1)", "c = Slice(f, i0, i1, i1)\n y = HardSigmoid(c)",
     "c = Slice(f, i0, i1, i1)\n y = Clip(c, zero, one)"],
)  # fmt: skip
def test_one_score_between_0_and_1_is_a_probability(tmp_path, end):
    path = tmp_path / "m.onnx"
    onnx.save(model := made(SCORES + TO_SIZE + end, gives="float[N,1,H,W] y"), path)
    build_engine(read_source(path, SourceOptions(threshold=0.4)), tmp_path / "m.engine", timed=[(16, 16)])
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.card.activation == "probability"
        for size in SIZES:
            image = photo(*size)
            expected = ran(model, {"p": planes(image)})[0][0]
            assert np.abs(net.probabilities(image) - expected).max() < 1e-4
            assert ((net(image) == 1) == (expected[0] > 0.4)).mean() > 0.999


def test_masks_of_an_onnx_that_ends_in_sigmoids(tmp_path):
    path, out = tmp_path / "m.onnx", tmp_path / "free.onnx"
    onnx.save(model := made(SCORES + TO_SIZE + "y = Sigmoid(f)"), path)
    export_free(path, out, SourceOptions(activation="multilabel", threshold=(0.3, 0.5, 0.6, 0.7)))
    build_engine(read_source(out), tmp_path / "m.engine", timed=[(16, 16)])
    for file in (out, tmp_path / "m.engine"):
        with Segmenter(file) as net:
            image = photo(37, 61)
            expected = ran(model, {"p": planes(image)})[0][0]
            assert np.abs(net.probabilities(image) - expected).max() < 1e-4
            assert (net.masks(image) == (expected > np.array(net.card.thresholds)[:, None, None])).mean() > 0.999


def test_of_two_activations_the_last_gives_the_probabilities(tmp_path):
    text = SCORES.replace("s = Conv", "s0 = Conv") + "s = Sigmoid(s0)\n" + TO_SIZE + "y = Softmax<axis=1>(f)"
    path = tmp_path / "m.onnx"
    onnx.save(model := made(text), path)
    build_engine(read_source(path), tmp_path / "m.engine", timed=[(16, 16)])
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(37, 61)
        assert np.abs(net.probabilities(image) - ran(model, {"p": planes(image)})[0][0]).max() < 1e-4


def test_inputs_and_outputs_of_each_others_names(tmp_path):
    text = PLAIN.replace("(p,", "(logits,").replace("Shape(p)", "Shape(logits)").replace("y =", "image =")
    path, out = tmp_path / "m.onnx", tmp_path / "free.onnx"
    onnx.save(model := made(text, "float[N,3,H,W] logits", "float[N,4,H,W] image"), path)
    export_free(path, out)
    image = planes(photo(37, 61))
    assert np.array_equal(ran(onnx.load(out), {"image": image})[0], ran(model, {"logits": image})[0])


@pytest.mark.parametrize("multiple", [18, 100])
def test_multiples_that_no_usual_size_is_of(tmp_path, multiple):
    text = f"c = Conv<strides=[{multiple}, {multiple}]>(p, wk)\n r = Relu(c)\n"
    text += f"y = ConvTranspose<strides=[{multiple}, {multiple}]>(r, wt)"
    weights = {"wk": weight(2, 3, multiple, multiple), "wt": weight(2, 4, multiple, multiple)}
    onnx.save(made(text, weights=weights), tmp_path / "m.onnx")
    assert read_source(tmp_path / "m.onnx").sizes.multiple == multiple


@pytest.mark.parametrize(
    "end",
    ["e = Exp(f)\n d = ReduceSum<keepdims=1>(e, i1)\n y = Div(e, d)",
     "a = Slice(f, i0, i1, i1)\n b = Sigmoid(a)\n c = Sub(one, b)\n y = Concat<axis=1>(c, b)"],
)  # fmt: skip
def test_scores_that_add_up_to_one_are_the_probabilities(tmp_path, end):
    onnx.save(model := made(SCORES + TO_SIZE + end), tmp_path / "m.onnx")
    build_engine(read_source(tmp_path / "m.onnx"), tmp_path / "m.engine", timed=[(16, 16)])
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(37, 61)
        assert np.abs(net.probabilities(image) - ran(model, {"p": planes(image)})[0][0]).max() < 1e-4

"""Ends of foreign models: whatever form scores, labels and masks come in, the engine's labels are the model's."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.from_onnx import export_onnx_model
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from foreign_onnx import FEATURES, ONE, SCORES, SIZES, TO_SIZE, best, check, made, planes, ran, reads, refused
from helpers import photo
from onnx import TensorProto, helper, parser

from fcn_deploy import DeployError, MisuseError, Segmenter

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
    # As TensorFlow adds an axis.
    "argmax-and-all-of-an-axis": (
        "a = ArgMax<axis=1, keepdims=0>(f)\n b = Unsqueeze(a, i3)\n "
        "far = Constant<value_ints=[1000000000, 1000000000]>()\n"
        "start = Constant<value_ints=[0, 0]>()\n axes = Constant<value_ints=[0, 3]>()\n"
        "y = Slice(b, start, far, axes)",
        lambda r: r[0, ..., 0], "linear",
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
    assert report.head == head
    assert any("gives labels" in note for note in source.notes) == ("argmax" in end)
    assert any("(times 255, which is left out)" in note for note in source.notes) == ("255" in end)


SELDOM = {
    "argmin": ("a = ArgMin<axis=1, keepdims=0>(f)\n y = Cast<to=7>(a)", "int64[N,H,W] y", 0),
    "best": ("v, t = TopK<axis=1>(f, i1)\n y = Squeeze(t, i1)", "int64[N,H,W] y", 0),
    "least": ("v, t = TopK<axis=-3, largest=0>(f, i1)\n y = Squeeze(t, i1)\n c = Squeeze(v, i1)",
              "float[N,H,W] c, int64[N,H,W] y", 1),
}  # fmt: skip


@pytest.mark.parametrize("end", SELDOM)
def test_labels_by_the_least_and_by_the_best_of_one_are_taken(tmp_path, end):
    text, gives, output = SELDOM[end]
    model = made(SCORES + TO_SIZE + text, gives=gives)
    source, report, *_ = check(tmp_path, model, lambda r: r[0], output=output)
    negated = end != "best"
    assert report.head == "linear" and any(
        "read as an ArgMax" in note and ("negated" in note) == negated for note in source.notes
    )


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
    assert report.head == "nearest"


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
    assert report.head == "nearest" and any("ArgMax" in note for note in source.notes)


def test_interpolated_labels_are_refused(tmp_path):
    text = SCORES + '  a = ArgMax<axis=1>(s)\n  b = Cast<to=1>(a)\n  y = Resize<mode="linear">(b, , x4)\n'
    onnx.save(made(text), tmp_path / "m.onnx")
    with pytest.raises(DeployError, match=r"node y \(Resize\) interpolates labels"):
        import_model(tmp_path / "m.onnx")


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
    "times-255": (
        ONE + "q = Sigmoid(f)\n m = Mul(q, m255)\n c = Clip(m, zero, m255)\n y = Squeeze(c, i1)",
        lambda r: r[0] > 127.5, "sigmoid", 0.5,
    ),
    "whole-255": (
        ONE + "q = Sigmoid(f)\n m = Mul(m255, q)\n w = Round(m)\n y = Cast<to=2>(w)", lambda r: r[0, 0] > 127.5,
        "sigmoid", 0.5,
    ),
    "255-compared": (
        ONE + "q = Sigmoid(f)\n m = Mul(q, m255)\n g = Greater(m, t153)\n y = Cast<to=1>(g)", lambda r: r[0, 0],
        "sigmoid", 0.6,
    ),
    "below": (ONE + "q = Sigmoid(f)\n g = Less(q, t6)\n y = Cast<to=1>(g)", lambda r: r[0, 0], "sigmoid", 0.4),
    "not-below": (ONE + "g = Less(f, half)\n n = Not(g)\n y = Where(n, m255, zero)", lambda r: r[0, 0] > 0, "sigmoid",
                  0.62245935),
    "below-as-zero": (ONE + "g = Less(f, half)\n y = Where(g, zero, m255)", lambda r: r[0, 0] > 0, "sigmoid",
                      0.62245935),
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
    model = made(text, weights={"t6": np.float32(0.6), "t153": np.float32(153), "i01": np.array([0, 1])})
    if end == "whole-255":
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    _, report, card, _ = check(tmp_path, model, labels)
    assert card.activation == activation and card.threshold == pytest.approx(threshold) and report.head == "linear"


def test_the_second_of_two_channels_with_a_threshold_of_ones_own(tmp_path):
    text = FEATURES + "s = Conv(r2, w2c)\n" + TO_SIZE + "q = Softmax<axis=1>(f)\n y = Slice(q, i1, i2, i1)"
    options = ImportOptions(activation="probability", threshold=0.8)
    check(tmp_path, made(text), lambda r: r[0, 0] > 0.8, options=options)


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
        return import_model(tmp_path / "m.onnx", ImportOptions(**options))

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
    source = import_model(tmp_path / "m.onnx")
    assert any("1/4 of the image's size; they are upsampled bilinearly" in note for note in source.notes)
    report = build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    assert (report.head, report.stride, report.size_multiple) == ("linear", 4, 1)


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    broken = np.full((4, 6, 1, 1), np.nan, np.float32)
    with pytest.raises(DeployError, match="gives NaN for an image of noise; check its weights"):
        reads(tmp_path, made(SCORES + TO_SIZE + "y = Identity(f)", weights={"w3": broken}))


def test_scores_of_8_bits_are_scores(tmp_path):
    text = SCORES + TO_SIZE + "q = Softmax<axis=1>(f)\n m = Mul(q, m255)\n y = Cast<to=2>(m)"
    check(tmp_path, made(text, gives="uint8[N,4,H,W] y"))
    moved = text.replace("y = Cast<to=2>(m)", "c = Cast<to=2>(m)\n y = Transpose<perm=[0,2,3,1]>(c)")
    check(tmp_path, made(moved, gives="uint8[N,H,W,4] y"), lambda result: result[0].argmax(2))


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
    report = build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    assert report.head == "linear" and report.agreement.wrong == 0
    limits = np.float32([0] * 4 if sigmoid == "compared" else options["threshold"])[:, None, None]
    with Segmenter(tmp_path / "m.engine") as net:
        for size in SIZES:
            image = photo(*size)
            expected = ran(model, {"p": planes(image)})[0][0] > limits
            assert (net.masks(image) == expected).mean() > 0.999


def test_maps_of_values(tmp_path):
    model = made(ONE + "q = Sigmoid(f)\n y = Squeeze(q, i1)")
    source = reads(tmp_path, model, activation="none", classes=("matte",))
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.card.classes == ("matte",)
        for size in SIZES:
            image = photo(*size)
            np.testing.assert_allclose(net.values(image), ran(model, {"p": planes(image)})[0], atol=1e-4)


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


OTHER_LABELS = {
    "table": ("a = ArgMax<axis=1, keepdims=1>(f)\n y = Gather<axis=0>(table, a)", "int64[N,1,H,W] y"),
    "sum": ("a = ArgMax<axis=1, keepdims=1>(f)\n b = Cast<to=1>(a)\n y = Add(b, one)", "float[N,1,H,W] y"),
    "product": ("a = ArgMax<axis=1, keepdims=0>(f)\n b = Cast<to=1>(a)\n y = Mul(m255, b)", "float[N,H,W] y"),
    "mask": (
        "a = ArgMax<axis=1, keepdims=0>(f)\n b = Cast<to=9>(a)\n y = Where(b, m255, zero)",
        "float[N,H,W] y",
    ),
    "numbers of classes compared": (
        "a = ArgMax<axis=1, keepdims=1>(f)\n b = Cast<to=1>(a)\n y = Greater(b, half)",
        "bool[N,1,H,W] y",
    ),
    "two best": ("v, t = TopK<axis=1>(f, i2)\n y = Slice(t, i0, i1, i1)", "int64[N,1,H,W] y"),
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
    build_engine(
        import_model(path, ImportOptions(threshold=0.4)), tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)])
    )
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
    export_onnx_model(path, out, ImportOptions(activation="multilabel", threshold=(0.3, 0.5, 0.6, 0.7)))
    build_engine(import_model(out), tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
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
    build_engine(import_model(path), tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(37, 61)
        assert np.abs(net.probabilities(image) - ran(model, {"p": planes(image)})[0][0]).max() < 1e-4


@pytest.mark.parametrize(
    "end",
    ["e = Exp(f)\n d = ReduceSum<keepdims=1>(e, i1)\n y = Div(e, d)",
     "a = Slice(f, i0, i1, i1)\n b = Sigmoid(a)\n c = Sub(one, b)\n y = Concat<axis=1>(c, b)"],
)  # fmt: skip
def test_scores_that_add_up_to_one_are_the_probabilities(tmp_path, end):
    onnx.save(model := made(SCORES + TO_SIZE + end), tmp_path / "m.onnx")
    build_engine(import_model(tmp_path / "m.onnx"), tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    with Segmenter(tmp_path / "m.engine") as net:
        image = photo(37, 61)
        assert np.abs(net.probabilities(image) - ran(model, {"p": planes(image)})[0][0]).max() < 1e-4


def test_outputs_that_are_no_scores_of_pixels(tmp_path):
    classifier = made(FEATURES + "m = ReduceMean<keepdims=0>(r2, a23)\n y = Softmax<axis=1>(m)", gives="float[N,6] y")
    assert "gives y [1, 6]: a classifier's scores" in refused(tmp_path, classifier)
    boxes = made(FEATURES + "y = Reshape(r2, shape)", weights={"shape": np.array([1, -1, 6])})
    assert "gives y [1, " in (said := refused(tmp_path, boxes)) and "boxes instead of scores" in said
    labels = made(SCORES + TO_SIZE + "m = ReduceMax<keepdims=0>(f, i1)\n y = Cast<to=7>(m)", gives="int64[N,H,W] y")
    assert "gives labels of int64 by node y (Cast), from which no scores can be told" in refused(tmp_path, labels)


def test_infinite_scores_are_refused_by_what_they_are(tmp_path):
    """As of a class that is left out by minus infinity."""
    bias = np.float32([0, 0, 0, -np.inf]).reshape(1, 4, 1, 1)
    said = refused(tmp_path, made(SCORES + TO_SIZE + "y = Add(f, never)", weights={"never": bias}))
    assert "gives infinite scores" in said and "-1e9" in said and len(said) <= 300

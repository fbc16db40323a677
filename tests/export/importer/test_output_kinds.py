"""Outputs that follow the image and are no scores of classes; scores in other shapes; networks that are quantised."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.quantization.options import QuantizationOptions
from foreign_onnx import FEATURES, ONE, RANDOM, SCORES, TO_SIZE, best, check, made, planes, ran, reads, refused, weight
from helpers import photo
from onnx import TensorProto, helper

from fcn_deploy import MisuseError, Segmenter

MAPS = FEATURES + "  y = Conv(r2, w3, b3)\n"


def with_outputs(model, names, meta=()):
    """The model with more outputs, and metadata."""
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    for value in model.graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for key, value in meta:
        model.metadata_props.add(key=key, value=value)
    return model


def prototypes():
    text = MAPS + "  d = Conv<strides=[2,2], pads=[1,1,1,1]>(r2, wd)\n  boxes = Reshape(d, flat)\n"
    weights = {"wd": weight(10, 6, 3, 3), "flat": np.array([0, 10, -1])}
    return with_outputs(made(text, weights=weights), ["boxes"])


def beside_a_vector(name, maps="w3, b3"):
    """As SAM's masks come with an IoU for each, and Cellpose's flows with the style of an image."""
    text = MAPS.replace("w3, b3", maps) + f"  g = GlobalAveragePool(r2)\n  {name} = Flatten(g)\n"
    count = {"w3, b3": 4, "w3f": 3}[maps]
    return with_outputs(made(text, gives=f"float[N,{count},h,w] y", weights={"w3f": weight(3, 6, 1, 1)}), [name])


KINDS = {
    "mask prototypes": (prototypes, "beside boxes"),
    "masks of queries": (
        lambda: with_outputs(
            made(MAPS + "  g = GlobalAveragePool(y)\n  q = Reshape(g, s41)\n  logits = MatMul(q, w16)\n",
                 weights={"s41": np.array([0, 4, 1]), "w16": weight(1, 7)}), ["logits"],
        ), "beside logits",
    ),
    "distances or classes": (
        lambda: with_outputs(
            made(MAPS + "  o = Conv(r2, wp, bp)\n  prob = Sigmoid(o)\n"), ["prob"],
        ), "ends in a Sigmoid",
    ),
    "embeddings": (lambda: made(MAPS.replace("  y =", "  e =") + "  y = LpNormalization<axis=1>(e)\n"), "length 1"),
    "embeddings or normals": (
        lambda: made(
            MAPS.replace("  y =", "  e =") + "  q = Mul(e, e)\n  t = ReduceSum(q, i1)\n  r = Sqrt(t)\n  y = Div(e, r)\n"
        ), "all are of length 1",
    ),
    "masks of one object or classes": (lambda: beside_a_vector("iou_predictions"), "beside iou_predictions"),
    "flows with a probability or classes": (lambda: beside_a_vector("style", maps="w3f"), "beside style"),
    "images": (
        lambda: made(MAPS.replace("w3, b3", "w3f").replace("  y =", "  e =") + '  u = Resize<mode="linear">(e, , x4)\n'
                     "  d = Mul(p, half)\n  a = Sub(d, u)\n  y = Clip(a, zero, one)\n",
                     weights={"w3f": weight(3, 6, 1, 1)}), "node a makes them of the image itself",
    ),
    "flows": (lambda: made(SCORES + "  flow = Identity(s)\n", gives="float[N,4,H,W] flow"), "by its name"),
}  # fmt: skip


def test_one_map_that_is_no_score_is_told_what_takes_it_for_one(tmp_path):
    model = made(ONE + "  predicted_depth = Relu(f)", gives="float[N,1,H,W] predicted_depth")
    said = refused(tmp_path, model)
    assert "holds depths" in said and "--activation sigmoid takes its map for a score all the same" in said
    assert reads(tmp_path, model, activation="sigmoid").card.activation == "sigmoid"


@pytest.mark.parametrize("what", KINDS)
def test_maps_that_are_no_classes_are_named_and_given_as_values_on_request(tmp_path, what):
    make, why = KINDS[what]
    model = make()
    said = refused(tmp_path, model)
    assert what in said and why in said and "--activation" in said and len(said) <= 300
    source = reads(tmp_path, model, activation="none", output=model.graph.output[0].name)
    assert source.card.kind == "values" and source.card.scores in (3, 4)
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.values(photo(37, 41)).shape == (source.card.scores, 37, 41)
    assert reads(tmp_path, model, activation="softmax").card.kind == "labels"  # who says so is believed


def test_two_maps_that_are_scaled_may_be_flows_and_that_is_said(tmp_path):
    text = FEATURES + "  o = Conv(r2, w2c)\n  y = Mul(o, k)\n"
    notes = reads(tmp_path, made(text, weights={"k": np.float32(20)})).notes
    assert any("2 maps that are multiplied by 20" in note and "--activation none" in note for note in notes)
    assert not any("multiplied" in note for note in reads(tmp_path, made(text, weights={"k": np.float32(1)})).notes)


def test_an_exporters_word_for_instances_is_taken(tmp_path):
    meta = [("task", "segment"), ("names", "{0: 'person', 1: 'dog'}")]
    model = with_outputs(made(MAPS + "  z = GlobalAveragePool(r2)\n"), ["z"], meta)
    assert "task=segment, with 2 classes" in refused(tmp_path, model)


def test_scores_beside_others_stay_scores(tmp_path):
    """Deep supervision, an edge without a Sigmoid, and what a classifier says of the whole image."""
    text = SCORES + TO_SIZE + "  y = Identity(f)\n  aux = Identity(s)\n  edge = Conv(r2, wp, bp)\n"
    text += "  g = GlobalAveragePool(s)\n  whole = Flatten(g)\n"
    source, *_ = check(tmp_path, with_outputs(made(text), ["aux", "edge", "whole"]))
    assert source.card.scores == 4


@pytest.mark.parametrize("order", ["pixels first", "classes first", "half size"])
def test_scores_whose_pixels_are_flattened_are_taken(tmp_path, order):
    last, half = "pixels" in order, "half" in order
    text = "  a = Conv<strides=[S,S], pads=[1,1,1,1]>(p, w43)\n  b = Reshape(a, flat)\n"
    text += (
        "  c = Transpose<perm=[0,2,1]>(b)\n  y = Softmax<axis=2>(c)\n" if last or half else "  y = Softmax<axis=1>(b)\n"
    )
    model = made(text.replace("S,S", "2,2" if half else "1,1"), gives="float[N,a,b] y",
                 weights={"w43": weight(4, 3, 3, 3), "flat": np.array([0, 0, -1])})  # fmt: skip

    def labels(result):
        return result[0].argmax(1 if last else 0)

    source = reads(tmp_path, model)
    assert any("flattened" in note for note in source.notes) and source.sizes.factor == (2 if half else 1)
    if not half:
        onnx.save(model, tmp_path / "m.onnx")
        build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
        with Segmenter(tmp_path / "m.engine") as net:
            for size in ((17, 23), (64, 96)):
                image = photo(*size)
                wanted = labels(ran(model, {"p": planes(image)})[0]).reshape(size)
                assert (net(image) == wanted).mean() > 0.999


@pytest.mark.parametrize("end", ["OneHot", "Hardmax"])
def test_one_hot_classes_are_taken(tmp_path, end):
    one_hot = """
      i = ArgMax<axis=1, keepdims=0>(f)
      o = OneHot<axis=-1>(i, k, v)
      t = Transpose<perm=[0,3,1,2]>(o)
      y = Cast<to=1>(t)
    """
    text = SCORES + TO_SIZE + (one_hot if end == "OneHot" else "  y = Hardmax<axis=1>(f)\n")
    model = made(text, weights={"k": np.array(4), "v": np.array([0, 1])})
    source, report, *_ = check(tmp_path, model, best)
    assert report.head == "linear" and source.card.scores == 4


def test_what_is_not_as_the_image_is_told_truly(tmp_path):
    twice = made(
        "  a = Conv<pads=[1,1,1,1]>(p, w)\n  y = DepthToSpace<blocksize=2>(a)\n", weights={"w": weight(16, 3, 3, 3)}
    )
    assert "more than one value per pixel" in refused(tmp_path, twice)
    valid = made("  a = Conv(p, w)\n  b = Relu(a)\n  y = Conv(b, w2)\n", weights={"w": weight(6, 3, 5, 5)})
    said = refused(tmp_path, valid)
    assert "no whole share" in said and "whatever the size" not in said
    same = made("  a = Conv<pads=[1,1,1,1]>(p, w)\n  y = Resize(a, , , to)\n",
                weights={"w": weight(4, 3, 3, 3), "to": np.array([1, 4, 50, 70])})  # fmt: skip
    assert "whatever the size" in refused(tmp_path, same)


def quantised():
    text = """
      q = QuantizeLinear(p, qs, qz)
      d = DequantizeLinear(q, qs, qz)
      w = DequantizeLinear(wq, ws, wz)
      c = Conv<pads=[1,1,1,1]>(d, w)
      e = QuantizeLinear(c, ys, qz)
      y = DequantizeLinear(e, ys, qz)
    """
    return made(text, weights={
        "qs": np.float32(0.02), "qz": np.uint8(128), "ws": np.float32(0.005), "wz": np.int8(0), "ys": np.float32(0.05),
        "wq": RANDOM.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8),
    })  # fmt: skip


def test_a_quantised_network_is_built_as_it_is_and_called_so(tmp_path):
    source = reads(tmp_path, quantised())
    assert source.quantised == "q (QuantizeLinear)" and any("quantised already" in note for note in source.notes)
    assert any(t.data_type == TensorProto.INT8 for t in source.model.graph.initializer)  # weights are not made floats
    config = BuildConfig(latency_sizes=[(16, 16)], tuning=TuningOptions(("onnxruntime",)))
    report = build_engine(source, tmp_path / "m.engine", config)
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.network.precision == report.precision == "int8"
    int8 = QuantizationOptions(int8=True, calib=str(tmp_path))
    with pytest.raises(MisuseError, match=r"quantised already, by node q \(QuantizeLinear\).*omit --int8"):
        build_engine(source, tmp_path / "m.engine", BuildConfig(quantization=int8))


def dynamically_quantised():
    nodes, x = [], "p"
    for index, (name, out) in enumerate((("a", "a"), ("b", "y"))):
        q, s, z, i, f, k = (f"{name}{letter}" for letter in "qszifk")
        nodes += [
            helper.make_node("DynamicQuantizeLinear", [x], [q, s, z], name=f"scales_{name}"),
            helper.make_node("ConvInteger", [q, f"w{index}", z, "wz"], [i], pads=[1] * 4),
            helper.make_node("Cast", [i], [f], to=1),
            helper.make_node("Mul", [s, "ws"], [k]),
            helper.make_node("Mul", [f, k], [out]),
        ]
        x = out
    weights = {f"w{i}": RANDOM.integers(0, 255, s).astype(np.uint8) for i, s in enumerate(((6, 3, 3, 3), (4, 6, 3, 3)))}
    tensors = {**weights, "wz": np.uint8(128), "ws": np.float32(0.01)}
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)


@pytest.mark.parametrize("size", [None, (64, 64)], ids=["free", "fixed"])
def test_scales_that_depend_on_the_data_are_never_of_a_batch(tmp_path, size):
    model = dynamically_quantised()
    if size:
        for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim, (1, 3, *size), strict=True):
            dim.Clear()
            dim.dim_value = side
    source = reads(tmp_path, model)
    assert "scales_a" in source.card.alone and any("one image at a time" in note for note in source.notes)
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    images = [photo(64, 64, seed=seed) // (1 + 4 * (seed % 2)) for seed in range(16)]
    with Segmenter(tmp_path / "m.engine") as net:
        for _ in range(3):  # by then batches would have been measured
            results = list(net.map(images))
            assert all(np.array_equal(net(image), result) for image, result in zip(images, results, strict=True))
        assert not net.network.batch_costs


def test_a_network_that_rounds_its_scores_up_is_not_padded(tmp_path):
    text = FEATURES + "  y = Conv<pads=[2,2,2,2], dilations=[2,2]>(r2, k6)\n"
    model = made(text, weights={"k6": weight(4, 6, 3, 3)})
    source = reads(tmp_path, model)
    assert (source.sizes.multiple, source.sizes.factor, source.fit) == (1, 4, "")
    build_engine(source, tmp_path / "m.engine", BuildConfig(latency_sizes=[(16, 16)]))
    sizes, memory = ((1, 1), (61, 103), (260, 97)), None
    for _ in range(2):  # whole, and in tiles
        with Segmenter(tmp_path / "m.engine", memory=memory) as net:
            for size in sizes:
                image = photo(*size)
                wanted = ran(model, {"p": planes(image)})[0][0]
                coarse = net.heatmap(image)
                assert coarse.shape == wanted.shape
                assert np.abs(coarse - wanted).max() <= 1e-4 * np.ptp(wanted)
            plan = net.network.plan(260, 97)
            assert bool(plan.grids) == (memory is not None)
            sizes, memory = sizes[-1:], plan.bytes - 1


def test_a_number_less_the_size_is_freed_or_refused(tmp_path):
    text = """
      shp = Shape(p)
      hw = Slice(shp, i2, i4)
      lacking = Sub(target, hw)
      before = Div(lacking, halves)
      behind = Sub(lacking, before)
      pads = Concat<axis=0>(none, before, none, behind)
      padded = Pad(p, pads)
      c = Conv<strides=[2,2]>(padded, w1)
      g = GlobalAveragePool(c)
      m = Mul(c, g)
      k = Conv(m, w3, b3)
      y = Resize<mode="linear">(k, , x2)
    """

    def model(target, text=text):
        numbers = {"target": np.array([target] * 2), "halves": np.array([2, 2]), "none": np.array([0, 0])}
        numbers["none2"] = numbers["none"]
        return made(text, weights=numbers)

    source = reads(tmp_path, model(65))  # of 64, whatever its names promise
    assert source.sizes.multiple == 2 and any("Pad padded" in note and "size freed" in note for note in source.notes)
    wide = np.zeros((1, 3, 128, 128), np.float32)
    edge = wide.copy()
    edge[:, :, -4:] = 1
    name = source.model.graph.input[0].name
    assert not np.array_equal(*(ran(source.model, {name: image})[0] for image in (wide, edge)))
    # The same that crops nothing: of smaller images it pads as much, of larger ones none.
    clipped = text.replace("lacking = Sub(target, hw)", "l = Sub(target, hw)\n      lacking = Max(l, none2)")
    source = reads(tmp_path, model(65, clipped))
    assert source.sizes.multiple == 2 and any("Pad padded" in note and "size freed" in note for note in source.notes)
    # No stride makes it "same" padding, and the last Resize hides it.
    unlike = text.split("  c = Conv")[0] + "  c = Conv<pads=[1,1,1,1]>(padded, w1)\n  s = Conv(c, w3, b3)\n"
    unlike += TO_SIZE.replace("  shp = Shape(p)\n  hw = Slice(shp, i2, i4)\n", "") + "  y = Identity(f)\n"
    said = refused(tmp_path, model(65, unlike))
    assert "node padded (Pad)" in said and "65" in said


# Padded behind by what the rows and columns of an image lack, a number computed of its size.
PADDED_BEHIND = """
  shp = Shape(p)
  hw = Slice(shp, i2, i4)
  LACKING
  none = Concat<axis=0>(i0, i0, i0, i0, i0, i0)
  pads = Concat<axis=0>(none, lacking)
  padded = Pad(p, pads)
  c = Conv<strides=[2,2], pads=[1,1,1,1]>(padded, w1)
  s = Conv(c, w3, b3)
  f = Resize<mode="linear">(s, , x2)
  y = Slice(f, from, hw, a23)
"""


@pytest.mark.parametrize(
    ("lacking", "unit"),
    [
        # At 64×96 and 96×64 it comes to 128×128 as well.
        ("rest = Mod(hw, units)\n less = Sub(units, rest)\n lacking = Mod(less, units)", 128),
        ("less = Sub(units, hw)\n lacking = Max(less, from)", 64),
    ],
    ids=["to a large multiple", "of small images alone"],
)
def test_padding_by_the_size_is_no_size(tmp_path, lacking, unit):
    text = PADDED_BEHIND.replace("LACKING", lacking)
    model = made(text, weights={"units": np.array([unit, unit]), "from": np.array([0, 0])})
    source = reads(tmp_path, model)
    for size in ((30, 50), (70, 150)):
        image = RANDOM.standard_normal((1, 3, *size)).astype(np.float32)
        np.testing.assert_allclose(ran(source.model, {"p": image})[0], ran(model, {"p": image})[0], atol=1e-5)


def test_flattened_pixels_without_a_batch_are_called_so(tmp_path):
    text = SCORES + TO_SIZE + "  t = Transpose<perm=[0,2,3,1]>(f)\n  y = Reshape(t, pixels)\n"
    said = refused(tmp_path, made(text, weights={"pixels": np.array([-1, 4])}))
    assert "are flattened" in said and "classifier" not in said


def test_quick_refusals_of_what_is_assumed(tmp_path):
    with pytest.raises(MisuseError, match="has no node of this name"):
        reads(tmp_path, made(SCORES + TO_SIZE + "y = Identity(f)"), assume={"nowhere": "fixed"})
    with pytest.raises(MisuseError, match="fixed or global"):
        reads(tmp_path, made(SCORES + TO_SIZE + "y = Identity(f)"), assume={"c1": "free"})

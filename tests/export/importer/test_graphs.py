"""Graphs of foreign models as older exporters wrote them, and those that are no networks."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.core import core_of
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.openvino_differences import without_openvino_where_it_differs
from fcn_deploy.export.importer.import_model import import_model
from foreign_onnx import (
    FEATURES,
    PLAIN,
    RANDOM,
    SCORES,
    SIZES,
    TO_SIZE,
    best,
    check,
    fixed,
    made,
    planes,
    ran,
    reads,
    refused,
    weight,
)
from helpers import needs, photo
from onnx import helper, numpy_helper, parser

from fcn_deploy import DeployError, Segmenter


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
    assert (report.head, head.coordinates, report.size_multiple) == (mode, "asymmetric", 4)


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
    assert report.head == "linear" and head.factor is None
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
    unsorted.graph.name = ""
    onnx.save(unsorted, tmp_path / "u.onnx")
    source = import_model(tmp_path / "u.onnx")
    image = planes(photo(37, 61))
    np.testing.assert_allclose(ran(source.model, {"p": image})[0], ran(model, {"p": image})[0], atol=1e-4)


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
    assert "node choice (If) chooses a branch by the values of the image" in refused(tmp_path, control)
    training = made(SCORES.replace("Relu(c1)", "BatchNormalization<training_mode=1>(c1, g, g, g, g)").replace(
        "r1 =", "r1, m1, v1 =") + TO_SIZE + "y = Identity(f)", weights={"g": np.ones(6, np.float32)})  # fmt: skip
    assert "node r1 (BatchNormalization) is in training mode" in refused(tmp_path, training)
    noise = made(SCORES.replace("Relu(c1)", "RandomNormalLike<dtype=1>(c1)") + TO_SIZE + "y = Identity(f)")
    assert "node r1 (RandomNormalLike) draws random numbers" in refused(tmp_path, noise)


def test_a_branch_that_a_constant_takes_and_inputs_that_nothing_reads(tmp_path):
    branch = parser.parse_graph("then () => (float[N,6,h,w] z) { z = Relu(c2) }")
    other = parser.parse_graph("else () => (float[N,6,h,w] z) { z = Neg(c2) }")
    model = made(PLAIN, "float[1] strength, float[N,3,H,W] p, float[N,1,H,W] mask", weights={"yes": np.array(True)})
    relu = next(node for node in model.graph.node if node.output[0] == "r2")
    relu.CopyFrom(helper.make_node("If", ["yes"], ["r2"], "choice", then_branch=branch, else_branch=other))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    onnx.save(model, tmp_path / "m.onnx")
    imported = import_model(tmp_path / "m.onnx").model
    image = RANDOM.standard_normal((1, 3, 37, 61)).astype(np.float32)
    assert [value.name for value in imported.graph.input] == ["p"]
    np.testing.assert_allclose(ran(imported, {"p": image})[0], ran(made(PLAIN), {"p": image})[0], atol=1e-5)


HEIGHT = "  rows = Gather<axis=0>(hws, two)\n  tall = Greater(rows, limit)\n"
BRANCHING = FEATURES.replace("c2 =", "  hws = Shape(p)\n" + HEIGHT + "  c2 =") + "  s = Conv(r2, w3, b3)\n" + TO_SIZE


def branching(**opsets):
    """A network that does otherwise with images of more than 100 rows, and otherwise again from 200 columns on."""
    wide = parser.parse_graph("a () => (float[N,6,h,w] z) { z = Neg(c2) }")
    narrow = parser.parse_graph("b () => (float[N,6,h,w] z) { z = Sigmoid(c2) }")
    columns = parser.parse_graph(
        "then () => (float[N,6,h,w] z) { i = Constant<value = int64 {3}>() l = Constant<value = int64 {200}>()\n"
        "m = Gather<axis=0>(hws, i)\n q = Greater(m, l)\n z = Identity(c2) }"
    )
    columns.node[-1].CopyFrom(helper.make_node("If", ["q"], ["z"], "inner", then_branch=wide, else_branch=narrow))
    low = parser.parse_graph("else () => (float[N,6,h,w] z) { z = Relu(c2) }")
    model = made(BRANCHING + "y = Identity(f)", weights={"two": np.array(2), "limit": np.array(100)}, **opsets)
    relu = next(node for node in model.graph.node if node.output[0] == "r2")
    relu.CopyFrom(helper.make_node("If", ["tall"], ["r2"], "choice", then_branch=columns, else_branch=low))
    return model


@pytest.mark.parametrize("opset", [17, 18])
def test_branches_that_the_images_size_decides_are_what_they_are_at_each_size(tmp_path, opset):
    source, report, card, _ = check(
        tmp_path, branching(opset=opset), sizes=[(37, 61), (100, 64), (101, 64), (104, 201), (1, 1)]
    )
    assert card.whole == "If choice" and "choice (If)" in card.alone and report.size_multiple == 1
    said = []
    tuning = TuningOptions(("openvino", "onnxruntime"), seconds=0.5)
    build_engine(source, tmp_path / "n.engine", BuildConfig(tuning=tuning, latency_sizes=[(16, 16)]), said.append)
    assert any("node choice (If) chooses a branch" in line and "left out" in line for line in said)
    with pytest.raises(DeployError, match=r"node choice \(If\) chooses a branch by the image's size.*--target cpu"):
        build_engine(source, tmp_path / "n.engine", BuildConfig(target="sm89"))


def test_branches_that_cannot_be_kept_are_named(tmp_path):
    one_size = fixed(branching(), 1, 3, 64, 96)
    assert "node choice (If): of its branches one alone is seen at one size" in refused(tmp_path, one_size)
    assert "--fit 64x96" in refused(tmp_path, one_size)
    noise = branching()
    noise.graph.node[-1].op_type = "Identity"
    choice = next(node for node in noise.graph.node if node.op_type == "If")
    (relu,) = next(branch for branch in choice.attribute if branch.name == "else_branch").g.node
    relu.op_type, relu.name = "RandomNormalLike", "drawn"
    assert "node drawn (RandomNormalLike) draws random numbers" in refused(tmp_path, noise)
    cropped = branching()
    for name, value in (("from", [0, 0]), ("to", [48, 48]), ("along", [2, 3])):
        cropped.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    cropped.graph.node.insert(0, helper.make_node("Slice", ["p", "from", "to", "along"], ["small"], "crop"))
    cropped.graph.node[1].input[0] = "small"
    assert "does not look at all of an image" in refused(tmp_path, cropped)


WINDOWS = {
    "a maximum that rounds up": """
  a = Conv<pads=[1,1,1,1]>(p, w1)
  b = MaxPool<kernel_shape=[3,3], strides=[3,3], pads=[1,1,1,1], ceil_mode=1>(a)
""",
    "a mean that rounds up and counts its padding": """
  a = Conv<pads=[1,1,1,1]>(p, w1)
  b = AveragePool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1, count_include_pad=1>(a)
""",
    "a transposed convolution that keeps sizes": """
  a = Conv<strides=[2,2], pads=[1,1,1,1]>(p, w1)
  t = ConvTranspose<strides=[2,2], auto_pad="SAME_UPPER">(a, up)
  b = Relu(t)
""",
}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("windows", WINDOWS)
def test_windows_that_runtimes_place_differently_give_the_labels_of_onnx(tmp_path, windows, backend):
    if backend == "openvino":
        needs("openvino")
    text = WINDOWS[windows] + "  s = Conv<pads=[1,1,1,1]>(b, k3)\n" + TO_SIZE + "  y = Identity(f)"
    model = made(text, weights={"k3": weight(4, 6, 3, 3), "up": weight(6, 6, 4, 4)})
    sizes = [(47, 65), (48, 66), (49, 64), (16, 23)]
    check(tmp_path, model, sizes=sizes, backend=backend)


LETTERBOX = (
    """  q = Resize<mode="linear", axes=[2,3], keep_aspect_ratio_policy="not_larger">(p, , , box)
  a = Conv<pads=[1,1,1,1]>(q, w1)
  s = Conv(a, w3, b3)
"""
    + TO_SIZE
    + "y = Identity(f)"
)


def test_a_resize_that_keeps_the_aspect_ratio_is_left_to_onnx_runtime(tmp_path):
    """OpenVINO stretches it without a word."""
    model = made(LETTERBOX, weights={"box": np.array([64, 64])})
    onnx.save(model, tmp_path / "m.onnx")
    said = []
    tuning = TuningOptions(("openvino", "onnxruntime"), seconds=0.5)
    source = import_model(tmp_path / "m.onnx")
    build_engine(source, tmp_path / "m.engine", BuildConfig(tuning=tuning, latency_sizes=[(16, 16)]), said.append)
    assert any("node q (Resize) keeps the aspect ratio" in line and "left out" in line for line in said)
    image = photo(48, 96)
    with Segmenter(tmp_path / "m.engine") as net:
        assert net.network.manifest.backend == "onnxruntime"
        assert (net(image) == best(ran(model, {"p": planes(image)})[0])).mean() > 0.999
    for config, why in (
        (BuildConfig(tuning=TuningOptions(("openvino",))), "OpenVINO stretches.*--backend onnxruntime"),
        (BuildConfig(target="sm89"), "TensorRT refuses.*--target cpu"),
    ):
        with pytest.raises(DeployError, match=rf"node q \(Resize\) keeps the aspect ratio.*{why}"):
            build_engine(source, tmp_path / "n.engine", config)
        assert not (tmp_path / "n.engine").exists()


PLACES = (
    SCORES
    + TO_SIZE
    + """  cells = Mul(sideA, sideB)
  odd = Mod(cells, two)
  shift = Cast<to=1>(odd)
  y = Add(f, shift)
"""
)


def test_numbers_of_places_are_left_to_onnx_runtime(tmp_path):
    """Of 4099×4101 places OpenVINO says that they are even; sizes of sides alone it has right."""
    sides = "  sideA = Slice(shp, i2, i3)\n  sideB = Slice(shp, i3, i4)\n  cells ="
    model = made(PLACES.replace("  cells =", sides), weights={"two": np.array([2])})
    onnx.save(model, tmp_path / "m.onnx")
    source = import_model(tmp_path / "m.onnx")
    with pytest.raises(DeployError, match=r"\(Mod\) computes with numbers of places by Mod.*--backend onnxruntime"):
        build_engine(source, tmp_path / "m.engine", BuildConfig(tuning=TuningOptions(("openvino",))))
    alone = core_of(source).model
    next(node for node in alone.graph.node if node.op_type == "Mod").input[0] = "sideA"
    tuning = BuildConfig(tuning=TuningOptions(("openvino",)))
    assert without_openvino_where_it_differs(alone, tuning, print) is tuning


BY_A_SCALE = (
    """  q = Resize<HOW>(p, , by)
  a = Conv<pads=[1,1,1,1]>(q, w1)
  s = Conv(a, w3, b3)
"""
    + TO_SIZE
    + "y = Identity(f)"
)
LINEAR, EXCLUDING = 'mode="linear"', 'mode="cubic", exclude_outside=1'


@pytest.mark.parametrize(
    "how, by, left_out",
    [
        (LINEAR, 1.3, r"resizes by 1\.3, which OpenVINO gives another length"),
        (LINEAR, 1.5, None),
        ('mode="linear", antialias=1', 0.5, "is antialiased, which OpenVINO does not do"),
        (EXCLUDING, 1.5, r"leaves out what is beyond the border \(exclude_outside\), which OpenVINO does not do"),
    ],
)
def test_a_resize_that_openvino_computes_otherwise_is_left_to_onnx_runtime(tmp_path, how, by, left_out):
    """Of 90 columns OpenVINO makes 117 by 1.3, ONNX Runtime 116, at most sizes they agree; or the border differs."""
    model = made(BY_A_SCALE.replace("HOW", how), weights={"by": np.float32([1, 1, by, by])})
    onnx.save(model, tmp_path / "m.onnx")
    said = []
    tuning = TuningOptions(("openvino", "onnxruntime"), seconds=0.5)
    source = import_model(tmp_path / "m.onnx")
    build_engine(source, tmp_path / "m.engine", BuildConfig(tuning=tuning, latency_sizes=[(16, 16)]), said.append)
    assert any("node q (Resize)" in line and "left out" in line for line in said) == bool(left_out)
    image = photo(37, 90)
    with Segmenter(tmp_path / "m.engine") as net:
        assert (net(image) == best(ran(model, {"p": planes(image)})[0])).mean() > 0.999
    if left_out:
        with pytest.raises(DeployError, match=f"{left_out}.*onnxruntime"):
            build_engine(source, tmp_path / "n.engine", BuildConfig(tuning=TuningOptions(("openvino",))))
        assert not (tmp_path / "n.engine").exists()


def test_numbers_of_constant_nodes_are_of_32_bits(tmp_path):
    """As functions of dynamo's exports have them, which are repeated with their names."""
    text = SCORES.replace("r1 = Relu(c1)", "low = Constant<value_float=0.0>()\n high = Constant<value_floats=[6.0]>()\n"
                          "top = Squeeze(high)\n r1 = Clip(c1, low, top)")  # fmt: skip
    model = made(text + TO_SIZE + "y = Identity(f)")
    expected = ran(model, {"p": planes(photo(37, 61))})[0]
    for node in model.graph.node:
        node.name = "block/op"
    source = reads(tmp_path, model)
    np.testing.assert_allclose(ran(source.model, {"p": planes(photo(37, 61))})[0], expected, atol=1e-5)

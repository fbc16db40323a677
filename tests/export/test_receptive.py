"""The receptive field of a network, from its graph."""

from fractions import Fraction

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.build import core_of
from export.builders import cpu
from export.receptive import Field, WholeImageError, receptive_field
from export.source import read_source
from runtime.backends.onnxruntime import session


def graph(nodes, constants=None, channels=1):
    made = helper.make_graph(
        nodes,
        "core",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", channels, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", "K", "h", "w"])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def layer(kind, index, random):
    """A random layer: (nodes from x{index} to x{index + 1}, constants)."""
    source, out, name = f"x{index}", f"x{index + 1}", f"w{index}"
    kernel, step, dilation = (int(random.integers(low, high)) for low, high in ((1, 5), (1, 3), (1, 3)))
    reach = (kernel - 1) * dilation
    if kind == "Conv":
        # As "same" as it gets: at multiples of the step there are as many cells as steps.
        total = max(reach + 1 - step, 0)
        before = int(random.integers(0, total + 1))
        pads = [before, before, total - before, total - before]
        weight = random.uniform(0.5, 1, (1, 1, kernel, kernel)).astype(np.float32)
        node = helper.make_node("Conv", [source, name], [out], kernel_shape=[kernel] * 2, strides=[step] * 2,
                                dilations=[dilation] * 2, pads=pads)  # fmt: skip
        return [node], {name: weight}
    if kind == "MaxPool":
        return [helper.make_node("MaxPool", [source], [out], kernel_shape=[2, 2], strides=[2, 2])], {}
    if kind == "ConvTranspose":
        weight = random.uniform(0.5, 1, (1, 1, 4, 4)).astype(np.float32)
        return [helper.make_node("ConvTranspose", [source, name], [out], strides=[2, 2], pads=[1] * 4)], {name: weight}
    mode, coordinates = random.choice(["linear", "nearest"]), random.choice(["half_pixel", "asymmetric"])
    factor = np.float32([1, 1, 2, 2])
    node = helper.make_node("Resize", [source, "", name], [out], mode=str(mode),
                            coordinate_transformation_mode=str(coordinates))  # fmt: skip
    return [node], {name: factor}


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["Conv", "MaxPool", "ConvTranspose", "Resize"]), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
)
def test_no_pixel_outside_the_field_changes_a_score_and_tiles_are_exact(kinds, seed):
    random = np.random.default_rng(seed)
    nodes, constants = [helper.make_node("Identity", ["image"], ["x0"])], {}
    for index, kind in enumerate(kinds):
        made, values = layer(kind, index, random)
        nodes, constants = nodes + made, constants | values
    nodes.append(helper.make_node("Identity", [f"x{len(kinds)}"], ["scores"]))
    model = graph(nodes, constants)
    found = receptive_field(model)
    period, (halo, _) = found.period, found.halo
    run = session(model.SerializeToString(), optimise=False)
    length = 2 * halo + 3 * period
    image = random.uniform(1, 2, (1, 1, period, length)).astype(np.float32)
    scores = run.run(None, {"image": image})[0]
    field = found.fields[1]
    # Perturb everything outside the field of a cell in the middle.
    cell = int((halo + period) / field.stride)
    if cell < scores.shape[3]:
        low, high = int(np.floor(field.stride * cell + field.low)), int(np.ceil(field.stride * cell + field.high))
        other = image + 5
        other[..., max(low, 0) : high + 1] = image[..., max(low, 0) : high + 1]
        np.testing.assert_array_equal(run.run(None, {"image": other})[0][..., cell], scores[..., cell])
    # A tile between two others.
    tile = run.run(None, {"image": np.ascontiguousarray(image[..., period:-period])})[0]
    cells = int(period / field.stride)
    start = int(halo / field.stride)
    ours, theirs = tile[..., start : start + cells], scores[..., start + cells : start + 2 * cells]
    if ours.shape == theirs.shape and ours.shape[-1] == cells:
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_known_fields():
    three = {"w": np.ones((1, 1, 3, 3), np.float32)}
    conv = helper.make_node("Conv", ["image", "w"], ["a"], pads=[1] * 4)
    again = helper.make_node("Conv", ["a", "w"], ["scores"], pads=[1] * 4, strides=[2, 2])
    field = receptive_field(graph([conv, again], three)).fields[0]
    assert (field.stride, field.low, field.high, field.period) == (2, -2, 2, 2)
    assert receptive_field(graph([conv, again], three)).halo == (2, 2)
    dilated = helper.make_node("Conv", ["image", "w"], ["scores"], pads=[4] * 4, dilations=[4, 4])
    assert receptive_field(graph([dilated], three)).halo == (4, 4)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([helper.make_node("GlobalAveragePool", ["image"], ["scores"], name="gap")], "GlobalAveragePool gap"),
        ([helper.make_node("InstanceNormalization", ["image", "one", "one"], ["scores"], name="norm")], "Instance"),
        ([helper.make_node("ReduceMean", ["image"], ["m"]), helper.make_node("Sub", ["image", "m"], ["scores"])],
         "ReduceMean m"),
        ([helper.make_node("Resize", ["image", "", "", "sizes"], ["scores"], name="up")], "Resize up goes to a size"),
        ([helper.make_node("Resize", ["image", "", "two"], ["scores"], name="up", mode="linear",
                           coordinate_transformation_mode="align_corners")], "align_corners"),
        ([helper.make_node("Add", ["image", "map"], ["scores"], name="position")], "differs from place to place"),
        ([helper.make_node("Strange", ["image"], ["scores"], name="x", domain="other")], "Strange x"),
    ],
)  # fmt: skip
def test_what_looks_at_the_whole_image_is_named(nodes, said):
    constants = {
        "one": np.ones(1, np.float32), "sizes": np.int64([1, 1, 64, 64]), "two": np.float32([1, 1, 2, 2]),
        "map": np.ones((1, 1, 8, 8), np.float32),
    }  # fmt: skip
    with pytest.raises(WholeImageError, match=said):
        receptive_field(graph(nodes, constants))


def test_a_part_that_starts_at_features_has_its_field_in_pixels_of_the_image():
    three = {"w": np.ones((1, 1, 3, 3), np.float32)}
    conv = helper.make_node("Conv", ["image", "w"], ["scores"], pads=[1] * 4, strides=[2, 2])
    features = Field(Fraction(8), Fraction(0), Fraction(7), 8)
    found = receptive_field(graph([conv], three), (features, features))
    assert (found.fields[0].stride, found.fields[0].low, found.fields[0].high, found.period) == (16, -8, 15, 16)
    assert found.halo == (16, 16)


def test_the_halo_at_full_width(trained):
    core = onnx.load_from_string(cpu.build(core_of(read_source(trained / "camvid.onnx"))[0]))
    assert receptive_field(core).halo == (480, 480) and receptive_field(core).period == 32

"""Decoders that resize to the size of a skip, as the factors that they are."""

import itertools

import numpy as np
import pytest
from fcn_deploy.export.analysis.map_shapes import score_stride
from fcn_deploy.export.analysis.receptive_field import receptive_field
from fcn_deploy.export.analysis.receptive_fields import WholeImageError
from fcn_deploy.export.passes.resize_by_factor import computed_resizes, resize_by_factor
from fcn_deploy.runtime.backends.onnxruntime import session
from onnx import TensorProto, helper, numpy_helper

RANDOM = np.random.default_rng(0)
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
LINEAR = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}


def u_net(pads=(1, 1, 1, 1), last=True, **resize):
    """Two halvings, and two Resizes to the size of what was halved, the second of the image."""
    weights = {
        "w1": RANDOM.normal(size=(4, 3, 3, 3)),
        "w2": RANDOM.normal(size=(4, 4, 3, 3)),
        "w3": RANDOM.normal(size=(2, 8, 3, 3)),
    }
    constants = {name: value.astype(np.float32) for name, value in weights.items()} | {
        "two": np.int64([2]), "four": np.int64([4]), "kept": np.int64([1, 4]), "out": np.int64([1, 2]),
    }  # fmt: skip
    halved = {"strides": [2, 2], "pads": list(pads)}
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["half"], **halved),
        helper.make_node("Conv", ["half", "w2"], ["quarter"], **halved),
        helper.make_node("Shape", ["half"], ["half_shape"]),
        helper.make_node("Slice", ["half_shape", "two", "four"], ["half_sides"]),
        helper.make_node("Concat", ["kept", "half_sides"], ["half_sizes"], axis=0),
        helper.make_node("Resize", ["quarter", "", "", "half_sizes"], ["up"], **resize),
        helper.make_node("Concat", ["up", "half"], ["joined"], axis=1),
        helper.make_node("Conv", ["joined", "w3"], ["coarse" if last else "scores"], pads=[1, 1, 1, 1]),
    ]
    if last:
        nodes += [
            helper.make_node("Shape", ["image"], ["image_shape"]),
            helper.make_node("Slice", ["image_shape", "two", "four"], ["image_sides"]),
            helper.make_node("Concat", ["out", "image_sides"], ["image_sizes"], axis=0),
            helper.make_node("Resize", ["coarse", "", "", "image_sizes"], ["scores"], **resize),
        ]
    graph = helper.make_graph(
        nodes,
        "u_net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 2, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def deep(halvings, **resize):
    """So many halvings, and back to the size of each map that was halved, the image's last."""
    names = ["image", *(f"map{index}" for index in range(halvings))]
    nodes, weights = [], {"two": np.int64([2]), "four": np.int64([4]), "kept": np.int64([1, 3])}
    for index, (before, after) in enumerate(itertools.pairwise(names)):
        weights[f"w{index}"] = RANDOM.normal(size=(3, 3, 3, 3)).astype(np.float32)
        nodes.append(helper.make_node("Conv", [before, f"w{index}"], [after], strides=[2, 2], pads=[1, 1, 1, 1]))
    now = names[-1]
    for skip in names[-2::-1]:
        nodes += [
            helper.make_node("Shape", [skip], [f"{skip}_shape"]),
            helper.make_node("Slice", [f"{skip}_shape", "two", "four"], [f"{skip}_sides"]),
            helper.make_node("Concat", ["kept", f"{skip}_sides"], [f"{skip}_sizes"], axis=0),
            helper.make_node("Resize", [now, "", "", f"{skip}_sizes"], [f"{skip}_up"], **resize),
            helper.make_node("Add", [f"{skip}_up", skip], ["scores" if skip == "image" else f"{skip}_sum"]),
        ]
        now = f"{skip}_sum"
    graph = helper.make_graph(
        nodes,
        "deep",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model, image):
    return session(model.SerializeToString(), optimise=False).run(None, {"image": image})[0]


def image(*size):
    return RANDOM.standard_normal((1, 3, *size), dtype=np.float32)


def test_a_u_net_that_goes_to_the_size_of_its_skips_is_the_same_by_factors_at_every_size():
    model = u_net(**NEAREST)
    found = resize_by_factor(model).model
    assert not computed_resizes(found)
    for size in ((1, 1), (2, 3), (7, 13), (64, 61), (97, 101), (130, 259)):
        pixels = image(*size)
        assert np.array_equal(run(found, pixels), run(model, pixels))


def test_by_factors_its_tiles_are_exact_also_where_the_image_ends_within_a_period():
    model = resize_by_factor(u_net(**NEAREST)).model
    field = receptive_field(model)
    (halo, _), unit = field.halo, field.period
    assert unit == 4
    for side in (20 * unit, 20 * unit + 1, 20 * unit + 3):
        pixels = image(side, 8)
        whole, start = run(model, pixels), 12 * unit
        tile = run(model, np.ascontiguousarray(pixels[:, :, start - halo :]))
        assert np.allclose(tile[:, :, halo:], whole[:, :, start:], atol=1e-5)


def test_linear_resizes_are_factors_at_multiples_of_the_stride_alone():
    model = u_net(**LINEAR)
    assert resize_by_factor(model).why_not == "no Resize to a computed size has the same factor at every size"
    with pytest.raises(WholeImageError, match="export-onnx --fit pad avoids that"):
        receptive_field(model)
    found = resize_by_factor(model, 4).model
    assert not computed_resizes(found) and receptive_field(found).period == 4
    for size in ((4, 8), (64, 100), (132, 256)):
        pixels = image(*size)
        assert np.allclose(run(found, pixels), run(model, pixels), atol=1e-5)


@pytest.mark.parametrize("multiple", [2, 4, 6, 32])
@pytest.mark.parametrize("resize", [NEAREST, LINEAR])
def test_a_network_deeper_than_the_multiples_that_it_takes_stays_the_same(resize, multiple):
    """Its sides are even, and those of the maps that it comes back to may be odd."""
    model = deep(5, **resize)
    found = resize_by_factor(model, multiple).model
    assert len(computed_resizes(found)) == (0 if resize is NEAREST or multiple == 32 else 4 if multiple != 4 else 3)
    for rows, columns in ((1, 2), (2, 5), (17, 9), (25, 33), (50, 7)):
        pixels = image(rows * multiple, columns * multiple)
        assert np.allclose(run(found, pixels), run(model, pixels), rtol=1e-4, atol=1e-3)


def test_a_map_of_half_the_cells_rounded_down_is_no_factor_of_an_odd_one():
    found = resize_by_factor(u_net(pads=(1, 1, 0, 0), **NEAREST))
    assert found.why_not and resize_by_factor(u_net(pads=(1, 1, 0, 0), **NEAREST), 4).why_not == ""


def test_the_stride_of_scores_is_that_of_the_map_whatever_comes_after():
    assert score_stride(u_net(last=False, **NEAREST)) == 2
    assert score_stride(u_net(**NEAREST)) == 1

"""Upsampling gives what ONNX Runtime's own Resize gives, for every kind of interpolation: labels, masks and values."""

from unittest import mock

import numpy as np
import onnxruntime
import pytest
import torch
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.head import argmax
from fcn_deploy.runtime.head import upsampling as heads
from fcn_deploy.runtime.head.argmax import best_class
from fcn_deploy.runtime.head.resize_axis import axis_of
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import labels_from_scores, masks_from_scores, new_result, values_from_scores
from helpers import window
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

MARGIN = 1e-4


def resize(scores, head, padded, activation="Identity"):
    """ONNX Runtime's own Resize of [K, h, w] scores, and a Softmax or Sigmoid of that."""
    inputs = ["scores", "", "scales"] if head.factor else ["scores", "", "", "sizes"]
    options = {"axis": 1} if activation == "Softmax" else {}
    last = helper.make_node(activation, ["resized"], ["full"], **options)
    node = helper.make_node(
        "Resize", inputs, ["resized"], mode=head.mode, coordinate_transformation_mode=head.coordinates,
        nearest_mode=head.rounding,
    )  # fmt: skip
    constants = [
        helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, *head.factor])
        if head.factor
        else helper.make_tensor("sizes", TensorProto.INT64, [4], [1, len(scores), *padded])
    ]
    graph = helper.make_graph(
        [node, last],
        "resize",
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, *scores.shape])],
        [helper.make_tensor_value_info("full", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"scores": scores[None]})[0][0]


def card(classes):
    return ModelCard(tuple(map(str, range(classes))))


def check(scores, head, padded, size):
    full = resize(scores, head, padded)[:, : size[0], : size[1]]
    labels = labels_from_scores(window(scores, padded, size), head, card(len(scores)))
    assert labels.shape == size and labels.dtype == np.uint8
    if len(scores) == 1:
        assert not labels.any()
        return
    best = np.partition(full, -2, axis=0)[-2:]
    clear = best[1] - best[0] > MARGIN * np.ptp(scores)
    wrong = (labels != full.argmax(0)) & clear
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} labels differ"


def some_scores(classes, height, width, seed, smooth):
    random = np.random.default_rng(seed)
    scores = random.normal(size=(classes, height, width)).astype(np.float32)
    if smooth:  # regions, as of a real network
        scores = scores.cumsum(1).cumsum(2) / 4
    return scores.astype(np.float32)


KINDS = [(mode, coordinates) for mode in ("linear", "nearest") for coordinates in ("half_pixel", "asymmetric")]
KINDS += [("linear", "align_corners"), ("linear", "pytorch_half_pixel")]


@pytest.mark.parametrize(("mode", "coordinates"), KINDS)
@pytest.mark.parametrize("factor", [(8.0, 8.0), (2.0, 2.0), (3.0, 5.0), (1.0, 1.0), (32.0, 16.0), (2.5, 3.25), None])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_labels_equal_argmax_of_interpolated_scores(mode, coordinates, factor, data):
    height, width, classes = (data.draw(st.integers(1, high)) for high in (9, 11, 6))
    scores = some_scores(classes, height, width, data.draw(st.integers(0, 999)), data.draw(st.booleans()))
    if factor is None:  # an output size that is no multiple of the scores'
        padded = data.draw(st.integers(height, 60)), data.draw(st.integers(width, 60))
        full = padded
    else:
        full = tuple(int(side * by) for side, by in zip((height, width), factor, strict=True))
        padded = full
    size = data.draw(st.integers(1, full[0])), data.draw(st.integers(1, full[1]))
    check(scores, Upsampling(mode, coordinates, factor), padded, size)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_every_rounding_of_nearest(rounding):
    head = Upsampling("nearest", "half_pixel", (4.0, 2.5), rounding)
    check(some_scores(5, 7, 9, 0, False), head, (28, 22), (27, 21))


@pytest.mark.parametrize("coordinates", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_nearest_reads_the_cell_that_onnx_runtime_reads_where_cells_tie(coordinates, rounding):
    resize = helper.make_node(
        "Resize", ["x", "", "", "sizes"], ["y"], mode="nearest", coordinate_transformation_mode=coordinates,
        nearest_mode=rounding,
    )  # fmt: skip
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, "h", "w"])]
    ends.append(helper.make_tensor_value_info("sizes", TensorProto.INT64, [4]))
    graph = helper.make_graph([resize], "nearest", ends, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    run = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    head = Upsampling("nearest", coordinates, None, rounding)
    for cells in (2, 7, 14, 26, 28, 30, 49):  # whose multiples are other sides' too
        x = np.arange(cells, dtype=np.float32).reshape(1, 1, 1, cells)
        for side in range(1, 240):
            read = run.run(None, {"x": x, "sizes": np.array([1, 1, 1, side])})[0].ravel()
            np.testing.assert_array_equal(axis_of(head, 1, cells, side, 0, side).first, read, f"{cells} to {side}")


def test_nearest_as_pytorch_reads_the_cell_that_pytorch_reads():
    head = Upsampling("nearest", "asymmetric", None, "pytorch")
    for cells in (2, 11, 30, 49, 82):
        x = torch.arange(cells, dtype=torch.float32).reshape(1, 1, cells)
        for side in range(1, 240):
            read = torch.nn.functional.interpolate(x, size=side, mode="nearest").numpy().ravel()
            np.testing.assert_array_equal(axis_of(head, 1, cells, side, 0, side).first, read, f"{cells} to {side}")


@pytest.mark.parametrize("words", [{"coordinates": "half_pixel"}, {"factor": (2, 2)}, {"mode": "linear"}])
def test_the_rounding_of_pytorch_is_of_one_kind(words):
    with pytest.raises(ValueError, match="rounding pytorch"):
        Upsampling(**{"mode": "nearest", "coordinates": "asymmetric", "rounding": "pytorch"} | words)


def test_a_cropped_edge_still_reads_the_cell_beyond_it():
    # Row 36 of 37 interpolates cells 4 and 5; ⌈37/8⌉ = 5 cells would have lost cell 5.
    scores = np.zeros((2, 8, 8), np.float32)
    scores[0], scores[1, 5] = 1, 99
    labels = labels_from_scores(
        window(scores, (64, 64), (37, 37)), Upsampling("linear", "half_pixel", (8.0, 8.0)), card(2)
    )
    assert labels[36].all() and not labels[30].any()


def test_scores_of_a_large_image_are_interpolated_in_bounded_pieces():
    scores = some_scores(21, 96, 96, 3, False)
    check(scores, Upsampling("linear", "half_pixel", (8.0, 8.0)), (768, 768), (761, 768))
    check(scores, Upsampling("linear", "align_corners", (8.0, 8.0)), (768, 768), (761, 768))


def test_the_first_of_equal_classes_wins():
    scores = np.ones((3, 4, 5), np.float32)
    assert not best_class(scores, np.dtype(np.uint8)).any()
    labels = labels_from_scores(
        window(scores, (32, 40), (31, 33)), Upsampling("linear", "half_pixel", (8.0, 8.0)), card(3)
    )
    assert not labels.any()


@pytest.mark.parametrize("size", [(1, 1), (13, 17), (31, 40)])
def test_best_class_is_argmax(size):
    """Of few places and of many, the first of equals."""
    scores = np.random.default_rng(0).integers(0, 9, (7, *size)).astype(np.float32)
    assert (size[0] * size[1] > argmax.FEW_PLACES) == (size == (31, 40))
    found = best_class(scores, np.dtype(np.uint8))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, scores.argmax(0))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("size", [(40, 56), (160, 200)])
def test_labels_are_those_of_interpolating_each_cell_alone(size, smooth):
    """In whatever groups cells of many and of few possible classes are interpolated."""
    scores = some_scores(9, size[0] // 8, size[1] // 8, 5, smooth)
    head, whole = Upsampling("linear", "half_pixel", (8.0, 8.0)), window(scores, size, size)
    found = {}
    for worth in (0, 500, 10**9):
        with mock.patch.object(argmax, "GROUP_WORTH", worth):
            found[worth] = labels_from_scores(whole, head, card(9))
    with mock.patch.object(argmax, "CHUNK", 1):
        alone = labels_from_scores(whole, head, card(9))
    for labels in found.values():
        np.testing.assert_array_equal(labels, alone)


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_sigmoid_card_compares_interpolated_logits_with_its_threshold(threshold):
    scores = some_scores(1, 6, 7, 1, True) * 8
    head = Upsampling("linear", "half_pixel", (8.0, 8.0))
    binary = ModelCard(("no", "yes"), activation="sigmoid", threshold=threshold)
    labels = labels_from_scores(window(scores, (48, 56), (45, 50)), head, binary)
    expected = 1 / (1 + np.exp(-resize(scores, head, (48, 56))[0, :45, :50])) > threshold
    assert 0 < labels.mean() < 1
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize(("mode", "coordinates"), KINDS)
@pytest.mark.parametrize("factor", [(8.0, 8.0), (3.0, 5.0), (1.0, 1.0), (2.5, 3.25), None])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_values_and_probabilities_are_onnx_runtimes_own(mode, coordinates, factor, data):
    height, width, classes = (data.draw(st.integers(1, high)) for high in (9, 11, 6))
    activation = data.draw(st.sampled_from(["softmax", "sigmoid", "probability", "multilabel", "none"]))
    classes = {"sigmoid": 1, "probability": 1}.get(activation, classes)
    head = Upsampling(mode, coordinates, factor, activated=activation != "none" and data.draw(st.booleans()))
    scores = some_scores(classes, height, width, data.draw(st.integers(0, 999)), data.draw(st.booleans())) * 3
    if factor is None:
        padded = data.draw(st.integers(height, 60)), data.draw(st.integers(width, 60))
    else:
        padded = tuple(int(side * by) for side, by in zip((height, width), factor, strict=True))
    size = data.draw(st.integers(1, padded[0])), data.draw(st.integers(1, padded[1]))
    names = ("no", "yes") if classes == 1 and activation != "none" else tuple(map(str, range(classes)))
    if activation in ("softmax", "multilabel"):
        names = tuple(map(str, range(classes)))
    kind = ModelCard(names, activation=activation)
    taken = {"softmax": "Softmax", "sigmoid": "Sigmoid", "multilabel": "Sigmoid"}.get(activation, "Identity")
    start = data.draw(st.integers(0, size[0] - 1))
    for probabilities in (False, True):
        activated = "Identity" if head.activated or not probabilities else taken
        expected = resize(scores, head, padded, activated)[:, start : size[0], : size[1]]
        found = values_from_scores(
            window(scores, padded, size, (start, size[0])), head, kind, probabilities=probabilities
        )
        assert found.dtype == np.float32 and found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * max(np.ptp(scores) if activated == "Identity" else 1, 1e-3)


@pytest.mark.parametrize("coordinates", ["half_pixel", "align_corners"])
def test_values_are_made_a_few_rows_at_a_time_into_memory_that_is_given(coordinates, monkeypatch):
    head = Upsampling("linear", coordinates, (8.0, 8.0))
    scores = some_scores(3, 5, 7, 0, True)
    expected = values_from_scores(window(scores, (40, 56), (37, 50)), head, card(3), probabilities=True)
    monkeypatch.setattr(heads, "VALUES_AT_A_TIME", 3 * 50 * 4 + 1)
    rows = []
    real = heads._interpolate
    monkeypatch.setattr(heads, "_interpolate", lambda part, *rest: rows.append(part.rows) or real(part, *rest))
    out = np.full((3, 60, 50), 7, np.float32)
    found = values_from_scores(
        window(scores, (40, 56), (37, 50), (6, 37)), head, card(3), out=out[:, 10:41], probabilities=True
    )
    np.testing.assert_array_equal(out[:, 10:41], expected[:, 6:])
    assert np.shares_memory(found, out) and (out[:, :10] == 7).all() and (out[:, 41:] == 7).all()
    assert rows == [(top, min(top + 4, 37)) for top in range(6, 37, 4)]


@pytest.mark.parametrize(
    "head", [Upsampling("linear", "half_pixel", (8.0, 8.0)), Upsampling("nearest", "half_pixel", (8.0, 8.0))]
)
def test_there_is_one_copy_of_full_size_values(head):
    import tracemalloc

    scores = some_scores(19, 90, 90, 0, True)
    tracemalloc.start()
    values = values_from_scores(window(scores, (720, 720), (719, 715)), head, card(19), probabilities=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < values.nbytes + 8_000_000 < 1.3 * values.nbytes


def test_full_size_scores_may_become_probabilities_in_their_own_memory():
    scores = some_scores(4, 30, 20, 0, False)
    expected = values_from_scores(window(scores, (30, 20), (30, 20)), Upsampling(), card(4), probabilities=True)
    found = values_from_scores(
        window(scores, (30, 20), (30, 20)), Upsampling(), card(4), out=scores, probabilities=True
    )
    assert found is scores
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)


def test_probabilities_of_extreme_scores_are_finite():
    scores = np.array([[[-1e30]], [[1e30]], [[500]]], np.float32)
    for activation, expected in (("softmax", [0, 1, 0]), ("multilabel", [0, 1, 1])):
        kind = ModelCard(("a", "b", "c"), activation=activation)
        found = values_from_scores(window(scores, (1, 1), (1, 1)), Upsampling(), kind, probabilities=True)
        np.testing.assert_array_equal(found[:, 0, 0], expected)


@pytest.mark.parametrize(("mode", "coordinates"), KINDS)
@pytest.mark.parametrize("factor", [(8.0, 8.0), (2.5, 3.25), None])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_masks_are_where_interpolated_scores_are_above_their_thresholds(mode, coordinates, factor, data):
    height, width, classes = (data.draw(st.integers(1, high)) for high in (9, 11, 4))
    scores = some_scores(classes, height, width, data.draw(st.integers(0, 999)), data.draw(st.booleans()))
    padded = tuple(int(side * by) for side, by in zip((height, width), factor or (3, 4), strict=True))
    size = data.draw(st.integers(1, padded[0])), data.draw(st.integers(1, padded[1]))
    thresholds = tuple(data.draw(st.floats(0.05, 0.95)) for _ in range(classes))
    kind = ModelCard(tuple(map(str, range(classes))), activation="multilabel", threshold=thresholds)
    head = Upsampling(mode, coordinates, factor, activated=data.draw(st.booleans()))
    full = resize(scores, head, padded)[:, : size[0], : size[1]]
    limits = np.array(thresholds if head.activated else kind.score_thresholds)[:, None, None]
    start = data.draw(st.integers(0, size[0] - 1))
    out = new_result("masks", kind, *size)
    masks_from_scores(window(scores, padded, size), head, kind, out=out)
    assert out.dtype == bool and out.shape == (classes, *size)
    clear = np.abs(full - limits) > MARGIN * max(np.ptp(scores), 1e-3)
    assert not ((out != (full > limits)) & clear).any()
    np.testing.assert_array_equal(
        masks_from_scores(window(scores, padded, size, (start, size[0])), head, kind), out[:, start:]
    )


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_values_fade_as_a_bilinear_transposed_convolution_does(data):
    import torch

    factor = data.draw(st.sampled_from([2, 3, 8, 16]))
    height, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    scores = some_scores(3, height, width, data.draw(st.integers(0, 99)), False)
    odd = factor % 2
    line = 1 - np.abs(np.arange(2 * factor - odd) - factor + (1 + odd) / 2) / factor
    kernel = np.broadcast_to(np.outer(line, line).astype(np.float32), (3, 1, len(line), len(line))).copy()
    given, weight = torch.from_numpy(scores[None]), torch.from_numpy(kernel)
    expected = torch.conv_transpose2d(given, weight, None, factor, (factor - odd) // 2, groups=3)[0].numpy()
    head, full = Upsampling("linear", "half_pixel", (factor, factor), fades=True), (height * factor, width * factor)
    found = values_from_scores(window(scores, full, full), head, ModelCard(("a", "b", "c"), activation="none"))
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(scores)


@pytest.mark.parametrize(
    "words", [{"fades": True}, {"mode": "linear", "fades": True}, {"mode": "nearest", "factor": (2, 2), "fades": True},
              {"activated": 1}, {"fades": "no"}],
)  # fmt: skip
def test_heads_that_make_no_sense_are_refused(words):
    with pytest.raises(ValueError, match=r"fades|activated"):
        Upsampling(**words)


def test_more_than_256_classes_give_uint16_labels():
    scores = np.zeros((300, 2, 2), np.float32)
    scores[299] = 1
    labels = labels_from_scores(
        window(scores, (16, 16), (9, 9)), Upsampling("linear", "half_pixel", (8.0, 8.0)), card(300)
    )
    assert labels.dtype == np.uint16 and (labels == 299).all()


def test_half_precision_scores_are_taken():
    scores = some_scores(4, 5, 5, 2, True)
    head = Upsampling("linear", "half_pixel", (8.0, 8.0))
    labels = labels_from_scores(window(scores.astype(np.float16), (40, 40), (40, 40)), head, card(4))
    expected = labels_from_scores(
        window(scores.astype(np.float16).astype(np.float32), (40, 40), (40, 40)), head, card(4)
    )
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("factor", [None, (1.0, 1.0)])
@pytest.mark.parametrize(("mode", "coordinates"), KINDS)
def test_scores_of_the_images_own_size_are_not_interpolated(mode, coordinates, factor, monkeypatch):
    """As of a network that takes multiples of 8, at one of them: that took three times as long as the network."""
    scores, head = some_scores(4, 24, 40, 3, False), Upsampling(mode, coordinates, factor)
    for way in ("_labels_of_equal_cells", "_labels_of_bands"):
        monkeypatch.setattr(argmax, way, None)
    part = ScoreWindow.whole(scores, (24, 40), (23, 37)).part(Upsampling(), (5, 20), (7, 30))
    np.testing.assert_array_equal(labels_from_scores(part, head, card(4)), scores.argmax(0)[5:20, 7:30])
    np.testing.assert_array_equal(
        values_from_scores(window(scores, (24, 40), (23, 37)), head, card(4)), scores[:, :23, :37]
    )


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_labels_made_a_few_rows_at_a_time_are_those_made_at_once(data):
    cells = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    factor = data.draw(st.sampled_from([4.0, 8.0, 2.5, 1.25]))
    mode = data.draw(st.sampled_from(["linear", "nearest"]))
    coordinates = data.draw(st.sampled_from(["half_pixel", "asymmetric", "align_corners"]))
    head = Upsampling(mode, coordinates, (factor, factor))
    scores = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(3, *cells)).astype(np.float32)
    padded = tuple(int(side * factor) for side in cells)
    size = tuple(data.draw(st.integers(1, side)) for side in padded)
    card, whole = ModelCard(("a", "b", "c")), ScoreWindow.whole(scores, padded, size)
    expected = argmax._best(whole, head, np.dtype(np.uint8))
    with mock.patch.object(argmax, "PIXELS_AT_A_TIME", data.draw(st.integers(1, 3)) * size[1]):
        np.testing.assert_array_equal(labels_from_scores(whole, head, card), expected)
        start = data.draw(st.integers(0, size[0] - 1))
        np.testing.assert_array_equal(labels_from_scores(whole.of_rows(start, size[0]), head, card), expected[start:])

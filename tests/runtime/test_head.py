"""Labels of the exact head equal argmax(interpolate(scores)) for every kind of interpolation."""

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from runtime.engine_file import Head, ModelCard
from runtime.head import best_class, labels_from_scores

MARGIN = 1e-4


def resize(scores, head, padded):
    """ONNX Runtime's own Resize of [K, h, w] scores."""
    inputs = ["scores", "", "scales"] if head.factor else ["scores", "", "", "sizes"]
    node = helper.make_node(
        "Resize", inputs, ["full"], mode=head.mode, coordinate_transformation_mode=head.coordinates,
        nearest_mode=head.rounding,
    )  # fmt: skip
    constants = [
        helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, *head.factor])
        if head.factor
        else helper.make_tensor("sizes", TensorProto.INT64, [4], [1, len(scores), *padded])
    ]
    graph = helper.make_graph(
        [node],
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
    labels = labels_from_scores(scores, head, card(len(scores)), padded, size)
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
    check(scores, Head(mode, coordinates, factor), padded, size)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_every_rounding_of_nearest(rounding):
    head = Head("nearest", "half_pixel", (4.0, 2.5), rounding)
    check(some_scores(5, 7, 9, 0, False), head, (28, 22), (27, 21))


def test_a_cropped_edge_still_reads_the_cell_beyond_it():
    # Row 36 of 37 interpolates cells 4 and 5; ⌈37/8⌉ = 5 cells would have lost cell 5.
    scores = np.zeros((2, 8, 8), np.float32)
    scores[0], scores[1, 5] = 1, 99
    labels = labels_from_scores(scores, Head("linear", "half_pixel", (8.0, 8.0)), card(2), (64, 64), (37, 37))
    assert labels[36].all() and not labels[30].any()


def test_scores_of_a_large_image_are_interpolated_in_bounded_pieces():
    scores = some_scores(21, 96, 96, 3, False)
    check(scores, Head("linear", "half_pixel", (8.0, 8.0)), (768, 768), (761, 768))
    check(scores, Head("linear", "align_corners", (8.0, 8.0)), (768, 768), (761, 768))


def test_the_first_of_equal_classes_wins():
    scores = np.ones((3, 4, 5), np.float32)
    assert not best_class(scores, np.dtype(np.uint8)).any()
    labels = labels_from_scores(scores, Head("linear", "half_pixel", (8.0, 8.0)), card(3), (32, 40), (31, 33))
    assert not labels.any()


def test_best_class_is_argmax():
    scores = np.random.default_rng(0).normal(size=(7, 13, 17)).astype(np.float32)
    np.testing.assert_array_equal(best_class(scores, np.dtype(np.uint8)), scores.argmax(0))


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_sigmoid_card_compares_interpolated_logits_with_its_threshold(threshold):
    scores = some_scores(1, 6, 7, 1, True) * 8
    head = Head("linear", "half_pixel", (8.0, 8.0))
    binary = ModelCard(("no", "yes"), activation="sigmoid", threshold=threshold)
    labels = labels_from_scores(scores, head, binary, (48, 56), (45, 50))
    expected = 1 / (1 + np.exp(-resize(scores, head, (48, 56))[0, :45, :50])) > threshold
    assert 0 < labels.mean() < 1
    np.testing.assert_array_equal(labels, expected)


def test_more_than_256_classes_give_uint16_labels():
    scores = np.zeros((300, 2, 2), np.float32)
    scores[299] = 1
    labels = labels_from_scores(scores, Head("linear", "half_pixel", (8.0, 8.0)), card(300), (16, 16), (9, 9))
    assert labels.dtype == np.uint16 and (labels == 299).all()


def test_half_precision_scores_are_taken():
    scores = some_scores(4, 5, 5, 2, True)
    head = Head("linear", "half_pixel", (8.0, 8.0))
    labels = labels_from_scores(scores.astype(np.float16), head, card(4), (40, 40), (40, 40))
    expected = labels_from_scores(scores.astype(np.float16).astype(np.float32), head, card(4), (40, 40), (40, 40))
    np.testing.assert_array_equal(labels, expected)

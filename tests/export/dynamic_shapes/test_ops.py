"""The operators: each file of ops/ is named in the table of operators, under the names that its functions bear."""

import importlib
import pkgutil

import numpy as np
import pytest
from fcn_deploy.export.dynamic_shapes import ops
from fcn_deploy.export.dynamic_shapes.interpret import interpretations
from fcn_deploy.export.dynamic_shapes.size_numbers import _is_telling, _is_usual
from fcn_deploy.export.dynamic_shapes.sizes import axis_of, axis_sizes, fixed, sample_sizes
from fcn_deploy.export.dynamic_shapes.traced_graph import ConflictError, State, TracedGraph
from helpers import onnx_model
from onnx import helper

N, H, W = sample_sizes(1, 64, 96)
VERBS = ("propagate", "check", "interpret", "assume")
FILES = [module.name for module in pkgutil.iter_modules(ops.__path__)]


def before(node, constants, shape):
    """The state before a node that reads `image` of this shape, and constants."""
    model = onnx_model([node], constants, takes=("N", 8, "H", "W"), gives=("N", 8, "h", "w"), names=("image", "out"))
    graph = TracedGraph(model)
    return State(graph, {"N": N, "H": H, "W": W}, {"image": tuple(map(axis_of, shape))})


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_an_operator_is_in_the_table(name):
    module = importlib.import_module(f"{ops.__name__}.{name}")
    for verb in VERBS:
        if (function := getattr(module, verb, None)) is not None:
            used = {getattr(operator, verb) for operator in ops.OPERATORS.values()}
            assert function in used or name == "broadcasting", f"{name}.{verb} is used by no operator"
    assert any(hasattr(module, verb) for verb in VERBS)


def test_a_resizes_size_is_a_share_of_its_inputs_a_map_before_it_or_meant_as_it_stands():
    half = [tuple(side // 2 for side in whole) for whole in (H, W)]
    node = helper.make_node("Resize", ["image", "", "", "size"], ["out"], mode="linear")
    found = interpretations(node, before(node, {"size": np.int64([1, 8, 64, 96])}, [N, fixed(8), *half]), True)
    assert axis_sizes(found[0].shapes["out"])[2:] == [H, W] and found[0].rewrite is not None
    assert found[0].description == "to 2 by 2 times its input's size instead of 64 by 96"
    stays = [each for each in found if axis_sizes(each.shapes["out"])[2:] == [fixed(64), fixed(96)]]
    assert stays and all(each.cost > 0 for each in stays)  # rarely meant where a map grows by a whole factor


def test_numbers_stand_as_they_are_where_nothing_is_freed():
    node = helper.make_node("Resize", ["image", "", "", "size"], ["out"], mode="linear")
    state = before(node, {"size": np.int64([1, 8, 64, 96])}, [fixed(1), fixed(8), fixed(32), fixed(48)])
    (only,) = interpretations(node, state, False)
    assert axis_sizes(only.shapes["out"]) == [fixed(1), fixed(8), fixed(64), fixed(96)] and only.rewrite is None


@pytest.mark.parametrize(
    ("operator", "settings", "reason"),
    [
        ("Softmax", {"axis": 0}, "mix the images of a batch"),
        ("ReduceMean", {"keepdims": 1}, "mix the images of a batch"),
        ("Einsum", {"equation": "n...->n"}, "is not followed here"),
        ("NonZero", {}, "decided while it runs"),
        ("Unheard", {}, "no operator of this name"),
    ],
)
def test_what_holds_at_no_other_size_is_refused_by_its_node(operator, settings, reason):
    node = helper.make_node(operator, ["image"], ["out"], **settings)
    with pytest.raises(ConflictError, match=reason) as caught:
        interpretations(node, before(node, {}, [N, fixed(8), H, W]), True)
    assert caught.value.node == node


def test_an_operator_without_what_it_needs_is_refused():
    node = helper.make_node("Expand", ["image"], ["out"])
    with pytest.raises(ConflictError, match="has no shape"):
        interpretations(node, before(node, {}, [N, fixed(8), H, W]), True)


@pytest.mark.parametrize("number", [0.05, 0.2, 0.3, 0.7, 0.9, 0.015])
def test_numbers_of_two_digits_are_written_by_hand_in_any_precision(number):
    assert _is_usual(float(np.float32(number))) and _is_usual(number)


@pytest.mark.parametrize("number", [1e-5, 1e-4, 1e-3, 5e-3, 255.0, 1 / 255, 0.1])
def test_epsilons_are_no_numbers_that_only_a_size_explains(number):
    assert not _is_telling(float(np.float32(number))) and _is_telling(float(np.float32(1 / 6144)))


def test_sides_of_images_are_no_numbers_that_are_met_everywhere():
    numbers = (0, 0.5, 6, 10, 100, 1000, 1e9, -1e4, -0.25, 1 / 3, 0.1, 0.01, 1e-5, 1e-12)
    assert all(_is_usual(float(np.float32(number))) for number in numbers)
    assert not any(map(_is_usual, (320, 640, -480, 800, 1200, 16, 1 / 640)))


@pytest.mark.parametrize(
    ("lengths", "first", "reason"),
    [
        (np.int32([64]), None, "as far as the sequences of the traced map are long"),
        (None, np.ones((1, 1, 4), np.float32), "starts from values for each sequence"),
        (None, np.zeros((1, 1, 4), np.float32), ""),
    ],
)
def test_a_recurrent_network_along_a_map_has_nothing_of_the_traced_one(lengths, first, reason):
    weights = {"w": np.ones((1, 12, 8), np.float32), "r": np.ones((1, 12, 4), np.float32)}
    given = {name: array for name, array in (("lengths", lengths), ("first", first)) if array is not None}
    places = [name if name in given else "" for name in ("lengths", "first")]
    node = helper.make_node("GRU", ["image", "w", "r", "", *places], ["out"], hidden_size=4)
    beside = N if lengths is None else fixed(1)
    state = before(node, weights | given, [H, beside, fixed(8)])
    if reason:
        with pytest.raises(ConflictError, match=reason):
            interpretations(node, state, True)
    else:
        (only,) = interpretations(node, state, True)
        assert only.rewrite is not None and axis_sizes(only.shapes["out"]) == [H, fixed(1), N, fixed(4)]

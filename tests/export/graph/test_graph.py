"""Graphs as analyses read them and as passes edit them: nothing is lost, nothing is changed but what is edited."""

import numpy as np
import onnx
import pytest
from fcn_deploy.export.graph.edit import extract
from fcn_deploy.export.graph.index import GraphIndex
from fcn_deploy.export.graph.rewrite import Rewrite, constant, declare, dims, reroute
from fcn_deploy.runtime.backends.onnxruntime import session
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fcn_deploy import DeployError

FLOAT = TensorProto.FLOAT
WEIGHT = np.ones((3, 3, 1, 1), np.float32)


def value(name, shape=("N", 3, "H", "W"), kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, constants=None, inputs=None, outputs=None, opset=18, **more):
    """`image` → `scores`, unless it says otherwise."""
    graph = helper.make_graph(
        nodes,
        "graph",
        inputs or [value("image")],
        outputs or [value("scores")],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()],
        **more,
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("my.ops", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def node(operator, inputs, outputs, **attributes):
    return helper.make_node(operator, inputs, outputs if isinstance(outputs, list) else [outputs], **attributes)


def branches():
    """An If whose branches read what is around them, one of them by an If of its own, and use the same names."""
    deep = helper.make_graph([node("Add", ["a", "inner"], "x")], "deep", [], [value("x", None)],
                             [numpy_helper.from_array(np.ones(1, np.float32), "inner")])  # fmt: skip
    other = helper.make_graph([node("Neg", ["a"], "x")], "other", [], [value("x", None)])
    first = helper.make_graph(
        [node("If", ["yes"], "y", then_branch=deep, else_branch=other)], "then", [], [value("y", None)]
    )
    second = helper.make_graph([node("Relu", ["a"], "y")], "else", [], [value("y", None)])
    return model(
        [
            node("Conv", ["image", "weight"], "a"),
            node("If", ["yes"], "b", then_branch=first, else_branch=second, doc_string="either"),
            node("Identity", ["b"], "scores"),
        ],
        {"weight": WEIGHT, "yes": np.array(True)},
    )


def looped():
    """A Loop that adds what is around it three times."""
    body = helper.make_graph(
        [node("Identity", ["go"], "on"), node("Add", ["state", "image"], "sum")],
        "body",
        [value("count", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("state")],
        [value("on", [], TensorProto.BOOL), value("sum")],
    )
    return model([node("Loop", ["three", "", "image"], "scores", body=body)], {"three": np.array(3)})


def everything():
    """What files hold beside nodes: notes, shapes, names of all kinds, operators of others, optional places."""
    made = model(
        [
            node("Conv", ["image", "weight"], "a"),
            node("Dropout", ["a"], ["b", "mask"]),
            node("Custom", ["b", "", "weight"], ["c", "", "d"], domain="my.ops", name="mine", doc_string="note",
                 numbers=[1, 2], text="text", real=0.5),
            node("Clip", ["c", "", "six"], "scores"),
        ],
        {"weight": WEIGHT, "six": np.float32(6), "unused": np.arange(3)},
        inputs=[value("image"), value("weight", [3, 3, 1, 1])],
        outputs=[value("scores"), onnx.ValueInfoProto(name="d")],
        value_info=[value("a", ["N", 3, None, "W"]), value("six", [])],
        doc_string="of the graph",
    )  # fmt: skip
    made.producer_name, made.producer_version, made.domain, made.model_version = "someone", "2", "here", 7
    made.doc_string = "of the model"
    helper.set_model_props(made, {"key": "value", "fcn_deploy.card": "{}"})
    made.graph.node[0].metadata_props.add(key="of", value="a node")
    made.graph.metadata_props.add(key="of", value="a graph")
    annotation = made.graph.quantization_annotation.add(tensor_name="a")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="six")
    made.training_info.add()
    sparse = made.graph.sparse_initializer.add(dims=[3])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "places"))
    made.graph.node[2].input.append("sparse")
    made.functions.append(
        helper.make_function("my.ops", "Twice", ["x"], ["y"], [node("Add", ["x", "x"], "y")],
                             [helper.make_opsetid("", 18)])
    )  # fmt: skip
    return made


def old():
    """Of an opset where what is left out of a Resize has a name, and BatchNormalization another form."""
    made = model(
        [node("Resize", ["image", "region", "scales"], "a", mode="nearest"), node("Relu", ["a"], "scores")],
        {"region": np.zeros(0, np.float32), "scales": np.float32([1, 1, 2, 2])},
        opset=11,
    )
    return made


ZOO = {"branches": branches, "looped": looped, "everything": everything, "old": old}


def sorted_fields(made):
    """A model with what has no order in an order: shapes of tensors inside, annotations, metadata."""
    made = onnx.ModelProto.FromString(made.SerializeToString())
    for field in (made.graph.value_info, made.graph.quantization_annotation, made.metadata_props):
        items = sorted(field, key=lambda item: item.SerializeToString())
        del field[:]
        field.extend(items)
    return made


@pytest.mark.parametrize("name", ZOO)
def test_what_is_not_edited_comes_back_as_it_was(name):
    made = ZOO[name]()
    before = made.SerializeToString(deterministic=True)
    edit = Rewrite(made)
    assert sorted_fields(edit.model()) == sorted_fields(made)
    assert made.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", ZOO)
def test_the_same_edits_give_the_same_bytes(name):
    def edited():
        edit = Rewrite(ZOO[name]())
        edit.constant("new", np.arange(3))
        edit.rename(edit.image, "picture")
        edit.prune()
        return edit.model().SerializeToString()

    assert edited() == edited()


@pytest.mark.parametrize("name", ["branches", "looped"])
def test_renamed_tensors_are_read_by_subgraphs_too(name):
    made, image = ZOO[name](), np.random.default_rng(0).standard_normal((1, 3, 4, 5), np.float32)
    edit = Rewrite(made)
    edit.rename(edit.image, "y")  # which branches use as well
    edit.rename(edit.result, "a")  # as what branches read
    changed = edit.model()
    onnx.checker.check_model(changed)
    expected = session(made.SerializeToString()).run(None, {"image": image})
    np.testing.assert_array_equal(session(changed.SerializeToString()).run(None, {"y": image}), expected)


def test_pruning_keeps_what_subgraphs_read_and_drops_the_rest():
    made = branches()
    made.graph.node.insert(0, node("Relu", ["image"], "unused"))
    made.graph.initializer.append(numpy_helper.from_array(np.ones(3), "spare"))
    edit = Rewrite(made)
    edit.prune()
    kept = edit.model()
    assert [each.op_type for each in kept.graph.node] == ["Conv", "If", "Identity"]
    assert {tensor.name for tensor in kept.graph.initializer} == {"weight", "yes"}
    onnx.checker.check_model(kept)


def test_sparse_constants_are_read_as_what_they_hold():
    values = helper.make_tensor("values", FLOAT, [2], [2.0, 3.0])
    places = helper.make_tensor("places", TensorProto.INT64, [2], [0, 2])
    sparse = helper.make_sparse_tensor(values, places, [3])
    made = model([node("Constant", [], "k", sparse_value=sparse), node("PRelu", ["image", "k"], "scores")])
    np.testing.assert_array_equal(constant(Rewrite(made).value("k")), [2, 0, 3])


def test_what_cannot_be_edited_is_refused_in_one_line():
    made = model([node("Identity", ["image"], "scores")])
    made.graph.input[0].type.map_type.key_type = TensorProto.INT64
    made.graph.input[0].type.map_type.value_type.tensor_type.elem_type = FLOAT
    with pytest.raises(DeployError, match="cannot be edited: Map types") as caught:
        Rewrite(made)
    assert "\n" not in str(caught.value)


def test_new_names_are_none_that_the_model_has_in_subgraphs_either():
    edit = Rewrite(branches())
    assert edit.constant("weight", np.ones(1)).name == "weight'"
    assert edit.node("Relu", [edit.image], "inner").name == "inner'"
    assert edit.constant("weight", np.ones(1)).name == "weight''"


def test_the_original_keeps_its_names_where_a_constant_is_renamed():
    made = model([node("Conv", ["image", "scores_weight"], "scores")], {"scores_weight": WEIGHT})
    edit = Rewrite(made)
    edit.rename(edit.value("scores_weight"), "other")
    assert edit.model().graph.initializer[0].name == "other"
    assert made.graph.initializer[0].name == "scores_weight"


def test_a_value_is_replaced_as_output_and_as_input():
    made = model(
        [node("Relu", ["image"], "scores"), node("Neg", ["scores"], "n")], outputs=[value("scores"), value("n")]
    )
    edit = Rewrite(made)
    edit.replace(edit.result, edit.node("Abs", [edit.image], "abs", before=edit.first()))
    edit.prune()
    changed = edit.model()
    assert [each.op_type for each in changed.graph.node] == ["Abs", "Neg"]
    assert [output.name for output in changed.graph.output] == ["scores", "n"]
    assert dims(Rewrite(changed).result) == ["N", 3, "H", "W"]
    onnx.checker.check_model(changed)


def test_a_node_is_put_behind_a_value_under_its_name():
    edit = Rewrite(model([node("Relu", ["image"], "r"), node("Neg", ["r"], "scores")]))
    edit.follow_with(edit.value("r"), "Abs", "after")
    edit.follow_with(edit.result, "Exp", "last")
    changed = edit.model()
    assert [(each.op_type, *each.input, *each.output) for each in changed.graph.node] == [
        ("Relu", "image", "r/moved"), ("Abs", "r/moved", "r"), ("Neg", "r", "scores/moved"),
        ("Exp", "scores/moved", "scores"),
    ]  # fmt: skip
    onnx.checker.check_model(changed)


def test_inputs_are_declared_anew_and_read_by_others():
    edit = Rewrite(model([node("Relu", ["image"], "scores")]))
    uses = tuple(edit.image.uses())
    reroute(uses, edit.node("Cast", [edit.image], "floats", before=edit.first(), to=FLOAT))
    declare(edit.image, ["N", "H", "W", 3], TensorProto.UINT8)
    changed = edit.model()
    assert session(changed.SerializeToString()).run(None, {"image": np.ones((1, 4, 5, 3), np.uint8)})[0].dtype == "f4"


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_an_index_says_what_a_search_through_the_nodes_says(data):
    names, nodes = ["image", "weight"], []
    for place in range(data.draw(st.integers(1, 12))):
        reads = data.draw(st.lists(st.sampled_from([*names, ""]), min_size=1, max_size=3))
        nodes.append(node("Sum", reads, f"t{place}"))
        names.append(f"t{place}")
    nodes.append(node("Identity", [names[-1]], "scores"))
    made = model(nodes, {"weight": WEIGHT})
    index = GraphIndex(made)
    for name in [*names, "scores"]:
        assert index.consumers(name) == [each for each in nodes if name in each.input]
        assert index.producer(name) == next((each for each in nodes if name in each.output), None)
    assert index.constant("image") is None and index.constant("weight").shape == WEIGHT.shape
    ancestors = set(index.ancestors("scores"))
    part = extract(made, ["scores"])
    assert ancestors - {"image", "weight"} == {name for each in part.graph.node for name in each.output}
    assert ("weight" in ancestors) == bool(part.graph.initializer)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"value": numpy_helper.from_array(np.arange(3))}, [0, 1, 2]),
        ({"value_ints": [4, 5]}, [4, 5]),
        ({"value_float": 0.5}, 0.5),
        ({"value_string": "text"}, None),
    ],
)
def test_constants_are_known_behind_identities_in_an_index_and_in_a_rewrite(attributes, expected):
    made = model(
        [node("Constant", [], "k", **attributes), node("Identity", ["k"], "j"), node("Relu", ["image"], "scores")]
    )
    for found in (GraphIndex(made).constant("j"), constant(Rewrite(made).value("j"))):
        if expected is None:
            assert found is None or found.dtype.kind not in "fiu"
        else:
            np.testing.assert_array_equal(found, expected)


def test_subgraphs_read_through_an_index():
    index = GraphIndex(branches())
    assert [each.op_type for each in index.consumers("a")] == ["If"]
    assert set(index.ancestors("scores")) >= {"b", "a", "image", "weight", "yes"}
    assert "image" not in set(index.ancestors("scores", stop="a"))


def test_a_part_of_a_model_starts_where_it_is_told_to():
    made = model([node("Relu", ["image"], "a"), node("Conv", ["a", "weight"], "scores")], {"weight": WEIGHT})
    late = extract(made, ["scores"], [value("a")])
    assert [each.op_type for each in late.graph.node] == ["Conv"] and late.graph.input[0].name == "a"
    early = extract(made, ["a"])
    assert [each.op_type for each in early.graph.node] == ["Relu"] and not early.graph.initializer
    assert len(made.graph.node) == 2

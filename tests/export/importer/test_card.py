"""What the user says of a foreign model: options, card files and the command line."""

import json

import numpy as np
import onnx
import onnx.utils
import pytest
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions, read_card_file
from foreign_onnx import (
    MEAN,
    ONE,
    PLAIN,
    SCORES,
    TO_SIZE,
    check,
    made,
    reads,
)
from helpers import ROOT, command, one_error

from fcn_deploy import MisuseError, Segmenter


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
    check(tmp_path, model, feed=feed, options=ImportOptions(mean=(0.5,), std=(0.25,), scale=1 / 255))
    with pytest.raises(MisuseError, match="--input-mean has 2 numbers, and the model takes 3 channels"):
        reads(tmp_path, model, mean=(1, 2))
    with pytest.raises(MisuseError, match="--input-scale 0"):
        ImportOptions(scale=0.0)


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
        ImportOptions(classes=("a",), card={"classes": ["b"]})


def test_the_card_file_of_the_docs(tmp_path):
    text = (ROOT / "docs" / "reference" / "formats.md").read_text()
    (tmp_path / "card.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    model = made(SCORES + TO_SIZE + "k = Slice(f, i0, i3, i1)\n y = Sigmoid(k)", gives="float[N,3,H,W] y")
    card = reads(tmp_path, model, card=read_card_file(tmp_path / "card.toml")).card
    assert card.classes[1] == "road" and card.threshold == (0.5, 0.4, 0.6) and card.kind == "masks"


def test_options_for_a_model_with_a_card_of_its_own_are_misuse(exports):
    for options, name in (({"mean": (1.0,)}, "input-mean"), ({"bgr": True}, "bgr"), ({"card": {"mean": [1]}}, "card")):
        with pytest.raises(MisuseError, match=f"has a model card; --{name} is for models without one"):
            import_model(exports / "narrow.onnx", ImportOptions(**options))
    assert import_model(exports / "narrow.onnx", ImportOptions(output="logits")).notes == ()


@pytest.mark.slow
def test_the_command_line_says_it_all(tmp_path):
    model = made(SCORES + TO_SIZE + "y = Identity(f)\n other = Neg(f)", gives="float[N,4,H,W] y, float[N,4,H,W] other")
    onnx.save(model, tmp_path / "m.onnx")
    (tmp_path / "names.txt").write_text("road\ncar\n\ntree\nsky\n")
    words = ("--input-mean", "0.5,0.4,0.3", "--input-std", "0.25", "--input-scale", "0.01", "--bgr")
    words += (
        "--output",
        "other",
        "--classes",
        tmp_path / "names.txt",
        "--activation",
        "softmax",
        "--json",
        "--sizes",
        "16x16",
    )
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
        (("--card", tmp_path / "card.toml", "--input-scale", "2"), "--input-scale goes with --input-mean"),
        (("--card", tmp_path / "none.toml"), "none.toml"),
        (("--classes", "nowhere"), "--classes nowhere"),
        (("--output", "third"), "has no output 'third'; it has y, other"),
    ):
        done = command("build-engine", tmp_path / "m.onnx", *words, "-o", tmp_path / "x.engine", ok=2)
        assert said in one_error(done) and not (tmp_path / "x.engine").exists()


def test_a_tool_that_drops_metadata_is_named_where_mean_and_std_are_assumed(tmp_path):
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(made(PLAIN, unshaped=False), before)
    onnx.utils.extract_model(before, after, ["p"], ["y"])
    said = "onnx.utils.extract_model, which wrote it, drops metadata"
    assert any(said in note and "assuming" in note for note in import_model(after).notes)
    assert not any("drops metadata" in note for note in import_model(before).notes)


def test_what_exporters_write_of_classes_and_images_is_taken(tmp_path):
    """Keys as Ultralytics and Deepness write them; what the user says goes first."""
    ultralytics = {"author": "Ultralytics", "task": "semantic", "names": "{0: 'road', 1: 'car', 2: 'tree', 3: 'sky'}"}
    deepness = {
        "model_type": '"Segmentor"', "class_names": '{"0": "_bg", "1": "a", "2": "b", "3": "c"}',
        "standardization_mean": "[0.5, 0.4, 0.2]", "standardization_std": "[0.2, 0.2, 0.4]",
    }  # fmt: skip

    def source(written, **options):
        model = made(PLAIN)
        for key, value in written.items():
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
        return reads(tmp_path, model, **options)

    card = source(ultralytics).card
    assert (card.classes, card.mean, card.std) == (("road", "car", "tree", "sky"), (0, 0, 0), (255, 255, 255))
    said = source(ultralytics, classes=("a", "b", "c", "d"), mean=(1.0,), std=(2.0,))
    assert said.card.classes == ("a", "b", "c", "d") and said.card.mean == (1, 1, 1)
    assert not any("metadata" in note or "Ultralytics" in note for note in said.notes)
    few = source(ultralytics | {"names": "['road']"}).card
    assert few.classes[0] == "class 0" and few.std == (255, 255, 255)
    card = source(deepness).card
    assert card.classes[0] == "_bg" and card.mean == (127.5, 102, 51) and card.std == (51, 51, 102)
    for damaged in ({"names": "road", "class_names": "[1, 2"}, {"names": '{"²": "a"}'}):
        assert source(damaged).card.classes[0] == "class 0"
    for std in ('["a", null, 1]', "[0, 1, 1]", "[NaN, 1, 1]"):
        assert source(deepness | {"standardization_std": std}).card.std == source({}).card.std

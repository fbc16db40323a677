"""export-onnx --deepness: what the plugin of QGIS reads and does with it, as its version 0.6.5."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
from fcn_deploy.export.deepness import write_for_deepness
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from helpers import command, one_error, onnx_model, photo
from onnx import helper

from fcn_deploy import MisuseError, ModelCard, Segmenter


def plugin(path, image):
    """Labels of a tile [T, T, 3], 8 bits, as the plugin makes them: from the model and its metadata alone."""
    session = onnxruntime.InferenceSession(path)
    about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert given.shape[-2:] == [about["tile_size"]] * 2 == result.shape[-2:] and about["model_type"] == "Segmentor"
    assert [about["class_names"][str(i)] for i in range(len(about["class_names"]))]
    mean, std = (np.array(about[f"standardization_{name}"], np.float32) for name in ("mean", "std"))
    tile = (np.float32(image / 255.0) - mean) / std
    found = session.run(None, {given.name: tile.transpose(2, 0, 1)[None].astype(np.float32)})[0]
    found[found < about["seg_thresh"]] = 0
    return (found[0, 0] != 0).astype(int) if found.shape[1] == 1 else found[0].argmax(axis=0)


@pytest.mark.slow
def test_the_plugin_makes_the_engines_labels(exports, tmp_path):
    words = exports / "narrow.safetensors", "-o", tmp_path / "qgis.onnx", "--deepness", "12.5", "--tile-size", "128"
    assert "tiles of 128×128, 12.5 cm a pixel" in command("export-onnx", *words).stdout
    image = photo(128, 128)
    with Segmenter(exports / "narrow.engine") as net:
        assert np.mean(plugin(tmp_path / "qgis.onnx", image) == net(image)) > 0.999  # two ways to normalise
    model = onnx.load(tmp_path / "qgis.onnx")
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["resolution"]) == 12.5 and CARD_KEY in about


def one_layer(tmp_path, card):
    """A model whose scores are the first channels of its image."""
    weight = np.eye(3, dtype=np.float32)[: card.scores, :, None, None]
    node = helper.make_node("Conv", ["image", "w"], ["logits"])
    model = onnx_model([node], {"w": weight}, names=("image", "logits"), gives=("N", card.scores, "H", "W"))
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_one_score_is_a_probability_with_the_cards_threshold(tmp_path):
    card = ModelCard(("no", "yes"), activation="sigmoid", threshold=0.3, mean=(100, 100, 100), std=(50, 50, 50))
    path, image = one_layer(tmp_path, card), photo(32, 32)
    write_for_deepness(path, card, 10, 32)
    expected = (image[:, :, 0] - 100.0) / 50 > np.log(0.3 / 0.7)
    assert np.array_equal(plugin(path, image), expected)


def test_classes_whose_logits_are_all_negative_are_told_apart(tmp_path):
    card = ModelCard(("a", "b", "c"), mean=(255, 255, 255), std=(9, 9, 9))
    path, image = one_layer(tmp_path, card), photo(16, 16)
    write_for_deepness(path, card, 10, 16)
    assert np.array_equal(plugin(path, image), image.argmax(axis=2))


@pytest.mark.parametrize(
    ("card", "tile", "said"),
    [
        (ModelCard(("a", "b"), activation="multilabel"), 32, "this model gives masks"),
        (ModelCard(("a", "b"), dtype="uint16"), 32, "images of 8 bits"),
        (ModelCard(("a", "b"), size_multiple=32), 33, "--tile-size 33; this model needs a multiple of 32"),
    ],
)
def test_what_the_plugin_does_not_take_is_refused(tmp_path, card, tile, said):
    with pytest.raises(MisuseError, match=said):
        write_for_deepness(tmp_path / "m.onnx", card, 10, tile)


def test_a_tile_size_is_of_deepness(tmp_path):
    done = command("export-onnx", "m.safetensors", "-o", tmp_path / "m.onnx", "--tile-size", "64", ok=2)
    assert "--tile-size is of --deepness" in one_error(done)

"""Pixels that are no image: shown to the network as its mean, marked in what comes out, in tiles as whole."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import tifffile
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.graph.edit import set_metadata
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from fcn_deploy.runtime.images.overlay import _legend, overlay, overlay_sheet
from fcn_deploy.runtime.labelling.files import label_files
from fcn_deploy.runtime.labelling.regions import label_regions
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.pixels.no_data import HoleRecorder, filled, mean_values
from helpers import photo, save_photos
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter

CARD = ModelCard(("a", "b", "c"), size_multiple=4, stride=4)
FLOATS = replace(CARD, dtype="float32", mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
FAST = BuildConfig(latency_sizes=[(32, 32)])


def save_network(path, card, scale=1.0):
    """Scores of 7×7 pixels at stride 4, upsampled; `scale` multiplies them."""
    random, node = np.random.default_rng(1), helper.make_node
    weights = {
        "k": random.normal(size=(8, card.channels, 7, 7)) / 8, "b": random.normal(size=8),
        "s": scale * random.normal(size=(card.scores, 8, 1, 1)), "four": [1, 1, 4, 4],
    }  # fmt: skip
    nodes = [
        node("Conv", ["image", "k", "b"], ["f"], strides=[4, 4], pads=[3, 3, 3, 3]),
        node("Relu", ["f"], ["r"]),
        node("Conv", ["r", "s"], ["coarse"]),
        node("Resize", ["coarse", "", "four"], ["scores"], mode="linear"),
    ]
    shapes = (("image", card.channels), ("scores", card.scores))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, "H", "W"]) for n, c in shapes]
    parts = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], parts)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    set_metadata(model, CARD_KEY, card.to_json())
    onnx.save(model, path)
    return path


def engine_of(folder, card, config=FAST):
    path = folder / "e.engine"
    build_engine(import_model(save_network(folder / "m.onnx", card)), path, config)
    return path


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """dtype → path of an engine of the same network."""
    return {
        "uint8": engine_of(tmp_path_factory.mktemp("e"), CARD),
        "float32": engine_of(tmp_path_factory.mktemp("f"), FLOATS),
    }


def holes(size, seed=0):
    """bool [H, W], False in a margin, in a corner and at single pixels."""
    valid = np.random.default_rng(seed).random(size) > 0.02
    valid[:, : size[1] // 3] = valid[-9:, -9:] = False
    return valid


def test_the_network_sees_its_mean_and_results_are_marked(engines):
    with Segmenter(engines["uint8"]) as net:
        image, valid = photo(61, 90), holes((61, 90))
        shown = np.where(valid[:, :, None], image, np.uint8([124, 116, 104]))
        before = image.copy()
        labels = net(image, valid)
        np.testing.assert_array_equal(labels, np.where(valid, net(shown), 255))
        assert labels.dtype == np.uint8 and net.card.no_data == 255
        for found, expected in (
            (net.probabilities(image, valid), net.probabilities(shown)),
            (net.values(image, valid=valid), net.values(shown)),
        ):
            np.testing.assert_array_equal(found, np.where(valid, expected, np.nan))
        np.testing.assert_array_equal(net.heatmap(image, valid), net.heatmap(shown))
        np.testing.assert_array_equal(image, before)
        np.testing.assert_array_equal(net(image, np.ones((61, 90), bool)), net(image))
        assert (net(image, np.zeros((61, 90), bool)) == 255).all()
        masked = np.ma.MaskedArray(image, np.repeat(~valid[:, :, None], 3, 2))
        one_band = np.ma.MaskedArray(image, np.dstack([~valid, np.zeros((61, 90, 2), bool)]))
        for each in (masked, one_band):
            np.testing.assert_array_equal(net(each), labels)


def test_what_is_not_finite_in_a_float_image_is_no_data(engines):
    with Segmenter(engines["float32"]) as net:
        image, valid = (photo(70, 50) / 255).astype(np.float32), holes((70, 50))
        shown = np.where(valid[:, :, None], image, np.float32(FLOATS.mean))
        for value in (np.nan, np.inf, -np.inf):
            broken = image.copy()
            broken[~valid, 1] = value
            np.testing.assert_array_equal(net(broken), np.where(valid, net(shown), 255))
        np.testing.assert_array_equal(net(np.full_like(image, 1e35)) == 255, False)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_tiles_bands_and_streams_give_what_a_call_gives(engines, dtype):
    size = (300, 140)
    image, valid = photo(*size), holes(size)
    if dtype == "float32":
        image = np.where(valid[:, :, None], image / np.float32(255), np.float32(np.nan))
        given = image
    else:
        given = np.ma.MaskedArray(image, np.repeat(~valid[:, :, None], 3, 2))
    with Segmenter(engines[dtype]) as net:
        whole = {kind: net.network.result(given, kind) for kind in ("labels", "probabilities")}
        assert (whole["labels"] == 255).sum() == (~valid).sum()
        budget = net.plan(*size).bytes // 2
        for each in net.map([given] * 9):
            np.testing.assert_array_equal(each, whole["labels"])
    with Segmenter(engines[dtype], memory=budget) as tiled:
        assert tiled.plan(*size, bands=True).grids
        np.testing.assert_array_equal(tiled(given), whole["labels"])
        for kind, start in (("labels", 0), ("labels", 133), ("probabilities", 0), ("probabilities", 200)):
            parts = [part for _, part in tiled.bands(given, start, kind)]
            np.testing.assert_array_equal(np.concatenate(parts, -2), whole[kind][..., start:, :])


def test_a_small_batch_of_a_stream_is_marked(engines):
    images = [np.ma.MaskedArray(photo(32, 40, seed), np.repeat(~holes((32, 40), seed)[:, :, None], 3, 2))
              for seed in range(64)]  # fmt: skip
    with Segmenter(engines["uint8"]) as net:
        for image, labels in zip(images, net.map(images), strict=True):
            np.testing.assert_array_equal(labels, net(image))


def test_int8_engines_are_shown_the_rounded_mean(tmp_path):
    save_photos(tmp_path, ((64, 64), (64, 96)))
    config = replace(FAST, quantization=QuantizationOptions(int8=True, calib=str(tmp_path), max_drop=100))
    with Segmenter(engine_of(tmp_path, CARD, config)) as net:
        assert net.precision == "int8"
        image, valid = photo(61, 90), holes((61, 90))
        shown = np.where(valid[:, :, None], image, np.uint8([124, 116, 104]))
        np.testing.assert_array_equal(net(image, valid), np.where(valid, net(shown), 255))


def test_masks_are_false_where_there_is_no_data(tmp_path):
    card = replace(CARD, activation="multilabel")
    with Segmenter(save_network(tmp_path / "m.onnx", card)) as net:
        image, valid = photo(64, 64), holes((64, 64))
        masks = net.masks(image, valid)
        assert not masks[:, ~valid].any() and masks.any()


def test_bad_masks_are_refused(engines):
    with Segmenter(engines["uint8"]) as net:
        image = photo(30, 40)
        for valid, found in (
            (np.ones((40, 30), bool), r"bool \[40, 30\]"),
            (np.ones((30, 40, 3), bool), r"bool \[30, 40, 3\]"),
            (np.full((30, 40), 255, np.uint8), r"uint8 \[30, 40\]"),
            ([[True]], "list"),
        ):
            with pytest.raises(MisuseError, match=rf"valid is {found}; it is a bool array \[H, W\]"):
                net(image, valid)


def test_where_every_label_is_a_class_there_is_none_for_no_data(tmp_path):
    counts = {255: 255, 256: None, 257: 65535, 65535: 65535, 65536: None}
    assert {n: ModelCard(tuple(map(str, range(n)))).no_data for n in counts} == counts
    card = ModelCard(tuple(map(str, range(256))), size_multiple=4, stride=4)
    with Segmenter(save_network(tmp_path / "m.onnx", card)) as net:
        valid = np.ones((32, 32), bool)
        assert net(photo(32, 32), valid).shape == (32, 32)
        valid[0, 0] = False
        with pytest.raises(MisuseError, match="256 classes leave no label"):
            net(photo(32, 32), valid)
        assert np.isnan(net.probabilities(photo(32, 32), valid)[:, 0, 0]).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_what_the_network_cannot_do_with_an_image_is_said_with_its_name(tmp_path, name):
    pixels = photo(32, 32)
    if name == "a.png":
        Image.fromarray(np.dstack([pixels, np.uint8(255) * (pixels[:, :, 0] > 60)])).save(tmp_path / name)
    else:
        pixels[:9] = 0
        tifffile.imwrite(tmp_path / name, pixels, photometric="rgb", extratags=[*GEO, (42113, "s", 0, "0", True)])
    card = ModelCard(tuple(map(str, range(256))), size_multiple=4, stride=4)
    with Network(save_network(tmp_path / "m.onnx", card)) as net:
        (record,) = label_files(net, [tmp_path / name], tmp_path / "o")
    assert record["error"].startswith(f"{tmp_path / name}: the image has pixels without data")


def test_scores_that_are_not_finite_never_become_a_class(tmp_path):
    path = save_network(tmp_path / "m.onnx", CARD, scale=1e38)
    with Segmenter(path) as net:
        for of in (net, net.probabilities, net.values):
            with pytest.raises(DeployError, match=r"scores are NaN or infinite at [\d.]+%"):
                of(photo(64, 64))
    values = replace(CARD, activation="none")
    with Segmenter(save_network(tmp_path / "v.onnx", values, scale=1e38)) as net:
        assert not np.isfinite(net.values(photo(64, 64))).all()


GEO = [
    (33550, "d", 3, (10.0, 10.0, 0.0), True),
    (33922, "d", 6, (0, 0, 0, 5e5, 5e6, 0), True),
    (34735, "H", 8, (1, 1, 0, 1, 1024, 0, 1, 1), True),
]


def label(engine, out, *sources, **options):
    """Label files; a record of each."""
    with Network(engine) as net:
        return list(label_files(net, sources, out, **options))


def test_label_files_mark_no_data(engines, tmp_path):
    image, valid = (photo(61, 90) / 255).astype(np.float32), holes((61, 90))
    image[~valid] = np.nan
    np.save(tmp_path / "a.npy", image)
    tifffile.imwrite(tmp_path / "b.tif", image, photometric="rgb", extratags=GEO)
    options = {"overlay": True, "probabilities": True}
    records = label(engines["float32"], tmp_path / "o", tmp_path / "a.npy", tmp_path / "b.tif", **options)
    assert not [record for record in records if "error" in record]
    with Segmenter(engines["float32"]) as net:
        labels, probabilities = net(image), net.probabilities(image)
    assert set(np.unique(labels)) > {0, 255}
    with Image.open(tmp_path / "o/a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), labels)
        colors = np.asarray(picture.convert("RGB"))
        assert (colors[~valid] == (224, 224, 192)).all()
        np.testing.assert_array_equal(colors[valid], np.uint8(CARD.colors)[labels[valid]])
    with tifffile.TiffFile(tmp_path / "o/b.tif") as file:
        np.testing.assert_array_equal(file.asarray(), labels)
        assert file.pages.first.nodata == 255
        assert (file.pages.first.colormap[:, 255] >> 8).tolist() == [224, 224, 192]
    for name in ("a", "b"):
        with tifffile.TiffFile(tmp_path / f"o/{name}.probabilities.tif") as file:
            np.testing.assert_array_equal(file.asarray(), probabilities)
            assert all(np.isnan(page.nodata) for page in file.pages)
        with Image.open(tmp_path / f"o/{name}.overlay.png") as picture:
            assert picture.width >= 90


def test_legends_share_what_is_data():
    labels = np.full((10, 10), 255, np.uint8)
    labels[0] = 1
    image = photo(10, 10)
    shown = overlay(image, labels, CARD)
    np.testing.assert_array_equal(shown[1:], image[1:])
    assert (shown[0] != image[0]).any()
    with patch("fcn_deploy.runtime.images.overlay._legend", wraps=_legend) as drawn:
        overlay_sheet(image, labels, CARD)
        assert [*drawn.call_args[0][1]] == [("b", CARD.colors[1], 1.0)]
        overlay_sheet(image, np.full((10, 10), 255, np.uint8), CARD)
        assert [*drawn.call_args[0][1]] == []


def test_a_mean_outside_the_type_is_clipped():
    card = replace(CARD, mean=(-3, 300, 12.5))
    assert mean_values(card).tolist() == [0, 255, 12] and mean_values(card).dtype == np.uint8


def test_a_recorder_keeps_the_holes_of_what_was_read():
    image = np.ma.MaskedArray(photo(200, 70), np.repeat(~holes((200, 70))[:, :, None], 3, 2))
    expected = filled(image, CARD)[1]
    recorder = HoleRecorder(image, CARD)
    for top in range(0, 200, 37):
        for left in range(0, 70, 23):
            recorder[top : top + 40, left : left + 30]
    for top, bottom in ((0, 5), (5, 64), (64, 129), (129, 200)):
        np.testing.assert_array_equal(recorder.invalid(top, bottom), expected[top:bottom])
    recorder[0:200, 0:70]
    assert recorder.invalid(0, 64) is None  # forgotten
    assert HoleRecorder(photo(20, 20), CARD).invalid(0, 20) is None


@pytest.mark.parametrize("layout", [{}, {"tile": (64, 64), "compression": "deflate"}], ids=["strips", "tiles"])
def test_a_scene_with_margins_has_the_labels_of_the_scene_without(tmp_path, layout):
    """4 bands of uint16, 40 % without data, region by region: beyond what the network sees nothing differs."""
    card = replace(CARD, channels=4, dtype="uint16", mean=(1500,) * 4, std=(500,) * 4)
    path = engine_of(tmp_path, card)
    scene = np.clip(np.random.default_rng(0).normal(1500, 500, (600, 800, 4)), 1, 9000).astype(np.uint16)
    cut = scene.copy()
    cut[:120] = cut[:, :200] = 0
    margin = (cut == 0).all(axis=2)
    for name, image in (("scene", scene), ("cut", cut)):
        tifffile.imwrite(
            tmp_path / f"{name}.tif", image, photometric="minisblack", planarconfig="contig",
            extratags=[(42113, "s", 0, "0", True), (33550, "d", 3, (1.0, 1.0, 0.0), True)], **layout,
        )  # fmt: skip
    with Network(path, memory=8_000_000) as net:
        assert net.plan(600, 800, bands=True).grids
        for name in ("scene", "cut"):
            label_regions(net, tmp_path / f"{name}.tif", tmp_path / f"{name}-labels.tif")
        whole, found = (tifffile.imread(tmp_path / f"{name}-labels.tif") for name in ("scene", "cut"))
        with Segmenter(path) as held:
            np.testing.assert_array_equal(held(cut, ~margin), found)
    reach = 3 + 2 * 4  # 7×7 pixels, and the cells between which is interpolated
    np.testing.assert_array_equal(found[120 + reach :, 200 + reach :], whole[120 + reach :, 200 + reach :])
    assert len(np.unique(whole)) == 3 and margin.mean() == 0.4
    assert (found[margin] == 255).all() and (found[~margin] != 255).all()

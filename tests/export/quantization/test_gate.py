"""The accuracy gate counts pixels that are data, and no others."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile
from fcn_deploy.calibration.datasets import load_dataset, take_census
from fcn_deploy.calibration.mask_options import MaskOptions
from fcn_deploy.calibration.stream import open_stream
from fcn_deploy.export.quantization.gate import AccuracyGate, LabelFolder
from fcn_deploy.runtime.engine_format.stage import Upsampling
from helpers import onnx_model
from onnx import helper
from PIL import Image

from fcn_deploy import ModelCard

CARD = ModelCard(("low", "high"), channels=1, dtype="float32", mean=(5,), std=(1,))


def core(bias):
    """Scores x and `bias`: of no data, which is shown as 0, the label depends on the sign of the bias."""
    weights = {"w": np.float32([1, 0]).reshape(2, 1, 1, 1), "b": np.float32([0, bias])}
    return onnx_model([helper.make_node("Conv", ["image", "w", "b"], ["scores"])], weights, takes=("N", 1, "H", "W"))


@pytest.fixture
def scenes(tmp_path):
    """Two scenes of values 3 and 7 with margins of NaN, and their labels."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for index in range(2):
        low = np.random.default_rng(index).random((20, 30)) < 0.5
        image = np.where(low, 3, 7).astype(np.float32)
        image[:, :20] = np.nan
        labels = low.astype(np.uint8)
        labels[:, :20] = 0  # which would be wrong of the second core
        tifffile.imwrite(tmp_path / "images" / f"{index}.tif", image, photometric="minisblack")
        tifffile.imwrite(tmp_path / "labels" / f"{index}.tif", labels)
    return tmp_path


def gate_of(scenes, labels, card=CARD):
    stream = open_stream(str(scenes / "images"), card)
    folder = LabelFolder(scenes / "labels", card, MaskOptions()) if labels else None
    return AccuracyGate(core(-0.01), Upsampling(), card, stream, folder, max_drop=0.5, kernels_exact=True)


@pytest.mark.parametrize("labels", [False, True])
def test_labels_where_there_is_no_data_are_not_compared(scenes, labels):
    gate = gate_of(scenes, labels)
    assert gate.baseline == 1 and gate.count == 2
    assert gate.measure(core(0.01)).value == 1  # it differs in the margins alone
    assert gate.measure(core(-2.5)).value < 0.9 and gate.measure(core(2.5)).value < 0.9


def bump(height):
    """Scores x, and x with a bump around 0: what no data is shown as."""
    node = helper.make_node
    weights = {
        "w": np.ones((2, 1, 1, 1), np.float32),
        "one": np.float32(1),
        "h": np.float32([0, height]).reshape(2, 1, 1),
    }
    nodes = [
        node("Conv", ["image", "w"], ["x"]), node("Abs", ["x"], ["a"]), node("Sub", ["one", "a"], ["s"]),
        node("Relu", ["s"], ["r"]), node("Mul", ["r", "h"], ["m"]), node("Add", ["x", "m"], ["scores"]),
    ]  # fmt: skip
    return onnx_model(nodes, weights, takes=("N", 1, "H", "W"))


@pytest.mark.parametrize("activation", ["multilabel", "none"])
def test_nor_are_masks_and_values(scenes, activation):
    card = replace(CARD, activation=activation)
    stream = open_stream(str(scenes / "images"), card)
    gate = AccuracyGate(bump(0), Upsampling(), card, stream, None, max_drop=0.5, kernels_exact=True)
    assert gate.measure(bump(1)).value == 1  # in the margins alone
    assert gate.measure(core(0.1)).value < 0.95


def test_labels_that_are_of_one_class_where_there_is_data_are_told(scenes, caplog):
    for index in range(2):
        labels = np.ones((20, 30), np.uint8)
        labels[:, :20] = 0
        tifffile.imwrite(scenes / "labels" / f"{index}.tif", labels)
    gate_of(scenes, True)
    assert "has labels of 'high' alone" in caplog.text


LABELS = np.tile(np.uint8([[0, 1, 1, 255]]), (5, 3))  # 255: no label


def write_geotiff(path):
    tags = [(42113, "s", 0, "9", True), (33550, "d", 3, (1.0, 1.0, 0.0), True)]
    tifffile.imwrite(path.with_suffix(".tif"), np.where(LABELS == 255, 9, LABELS), extratags=tags)


def write_floats(path):
    tifffile.imwrite(path.with_suffix(".tif"), np.where(LABELS == 255, np.nan, LABELS).astype(np.float32))


def write_colours(path):
    table = np.zeros((256, 3), np.uint8)
    table[1], table[255] = (200, 10, 10), (1, 2, 3)
    Image.fromarray(table[LABELS]).save(path.with_suffix(".png"))
    (path.parents[1] / "colours.txt").write_text("low 0 0 0\nhigh 200 10 10\nvoid 1 2 3\n")


KINDS = {
    "GeoTIFF": (write_geotiff, None),
    "big-endian .npy": (lambda path: np.save(path.with_suffix(".npy"), LABELS.astype(">i4")), None),
    "floats": (write_floats, None),
    "0 and 255": (
        lambda path: Image.fromarray(np.uint8([0, 255, 128])[np.minimum(LABELS, 2)]).save(path.with_suffix(".png")),
        "0=low,255=high,128=void",
    ),
    "colours": (write_colours, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_every_kind_are_read_alike_wherever_they_are_taken(tmp_path, kind):
    write, values = KINDS[kind]
    layouts = {"folders": ("train", "trainannot"), "VOC": ("JPEGImages", "SegmentationClass")}
    for layout, (images, labels) in layouts.items():
        for name in (images, labels):
            (tmp_path / layout / name).mkdir(parents=True)
        Image.fromarray(np.zeros((*LABELS.shape, 3), np.uint8)).save(tmp_path / layout / images / "x.png")
        write(tmp_path / layout / labels / "x")
    listing = tmp_path / "VOC" / "ImageSets" / "Segmentation" / "train.txt"
    listing.parent.mkdir(parents=True)
    listing.write_text("x\n")
    card = ModelCard(("low", "high"))
    colours = tmp_path / "folders" / "colours.txt"
    masks = MaskOptions(values, colours if colours.exists() else None)
    (tmp_path / "VOC" / "classes.txt").write_text("low\nhigh\n")
    for layout in layouts:
        for known in (card, None):  # evaluation has one, training none yet
            names = tmp_path / "VOC" / "classes.txt"
            data = load_dataset(str(tmp_path / layout), "train", card=known, masks=masks, class_file=names)
            np.testing.assert_array_equal(data[0][1], LABELS)
            assert take_census(data, "train").pixels.tolist() == [15, 30]
    folder = LabelFolder(tmp_path / "folders" / "trainannot", card, masks)
    np.testing.assert_array_equal(folder.of("x.jpg", LABELS.shape), LABELS)
    folder.check()

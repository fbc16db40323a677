"""Pixels without data have no part in what is measured: ranges of activations, mean and std, counted labels."""

from dataclasses import replace

import numpy as np
import pytest
import tifffile
from fcn_deploy.calibration.datasets import load_dataset, take_census
from fcn_deploy.calibration.normalisation import measure_normalisation
from fcn_deploy.calibration.ranges import Histogram, cells_with_data, collect_histograms
from fcn_deploy.calibration.stream import open_stream
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.pixels.no_data import filled
from fcn_deploy.runtime.pixels.prepare import prepare

from fcn_deploy import DeployError, MisuseError, ModelCard

FLOAT = ModelCard(("a", "b"), channels=2, dtype="float32", mean=(100.0, 3.0), std=(20.0, 0.5), size_multiple=8)
SIZE = (64, 96)


def scene(seed=0, size=SIZE):
    """float32 [H, W, 2] of the mean and std of the card."""
    random = np.random.default_rng(seed)
    return (random.normal(size=(*size, 2)) * [20, 0.5] + [100, 3]).astype(np.float32)


def save(path, array, nodata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = [] if nodata is None else [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig", extratags=tags)
    return path


def with_margins(array, value):
    """The scene with margins as wide as itself, without data."""
    height, width = array.shape[:2]
    whole = np.full((height, 3 * width, array.shape[2]), value, array.dtype)
    whole[:, width : 2 * width] = array
    return whole


def tensors(x):
    """Of a network: its input, means of 8×8 pixels, and a single number of the whole."""
    count, bands, height, width = x.shape
    coarse = x.reshape(count, bands, height // 8, 8, width // 8, 8).mean((3, 5))
    return {"image": x, "coarse": coarse, "whole": x.mean((2, 3), keepdims=True)}


def ranges_of(folder, card=FLOAT, reading=None):
    stream = open_stream(str(folder), card, reading or ReadOptions())
    return collect_histograms(tensors, stream, "", lambda image: prepare(filled(image, card)[0], card)), stream


@pytest.mark.parametrize(("value", "tag", "option"), [(np.nan, None, None), (-9999, "-9999", None), (7e8, None, 7e8)])
def test_a_scene_with_margins_calibrates_like_the_same_scene_without(tmp_path, value, tag, option):
    save(tmp_path / "plain" / "s.tif", scene())
    save(tmp_path / "margins" / "s.tif", with_margins(scene(), value), tag)
    plain, _ = ranges_of(tmp_path / "plain")
    found, _ = ranges_of(tmp_path / "margins", reading=ReadOptions(no_data=option))
    for name in ("image", "coarse"):
        expected, histogram = plain.histograms[name], found.histograms[name]
        np.testing.assert_array_equal(histogram.counts, expected.counts)
        assert (histogram.low, histogram.high, histogram.limit) == (expected.low, expected.high, expected.limit)
        for method in ("minmax", "percentile", "mse", "entropy"):
            assert histogram.range(method) == expected.range(method)
        np.testing.assert_allclose(found.channel_mean(name), plain.channel_mean(name), rtol=1e-6)
    assert found.histograms["whole"].counts.sum() == 2  # what has no place is counted


def test_an_image_without_any_data_is_skipped_by_its_name(tmp_path, caplog):
    save(tmp_path / "a.tif", scene())
    save(tmp_path / "b.tif", np.full((8, 8, 2), np.nan, np.float32))
    found, stream = ranges_of(tmp_path)
    assert len(found.images) == 1 and list(stream.skipped) == [str(tmp_path / "b.tif")]
    assert "b.tif has no data in any pixel" in caplog.text
    (tmp_path / "a.tif").unlink()
    with pytest.raises(DeployError, match="no calibration image could be read"):
        ranges_of(tmp_path)


def test_a_cell_counts_where_any_of_its_pixels_is_data():
    data = np.zeros((16, 24), bool)
    data[7, 8] = data[15, 23] = True
    np.testing.assert_array_equal(cells_with_data(data, (2, 3)), [[0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(cells_with_data(data, (16, 24)), data)
    assert cells_with_data(data, (1, 1)) is None and cells_with_data(data, (32, 48)) is None
    histogram = Histogram()
    histogram.add(np.zeros(0, np.float32))
    assert not histogram.counts.any()


def pairs(folder, images, labels, nodata=None):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        save(folder / "train" / f"{index}.tif", image, nodata)
        save(folder / "trainannot" / f"{index}.tif", label)
    return str(folder)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_mean_and_std_are_those_of_the_pixels_that_are_data(tmp_path, dtype):
    random = np.random.default_rng(0)
    images = [(random.normal(size=(40 + 9 * i, 50, 4)) * 300 + 2000).astype(dtype) for i in range(3)]
    margins = [with_margins(image, -9999 if dtype != "uint16" else 0) for image in images]
    labels = [np.zeros(image.shape[:2], np.uint8) for image in margins]
    labels[0][0, 60] = 1
    data = load_dataset(pairs(tmp_path, margins, labels, "0" if dtype == "uint16" else "-9999"), "train")
    card = ModelCard(("a", "b"), channels=4, dtype=dtype, mean=(0,) * 4, std=(1,) * 4)
    data = replace(data, card=card)
    mean, std = measure_normalisation(data, card)
    values = np.concatenate([image.reshape(-1, 4) for image in images]).astype(float)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(std, values.std(0), rtol=1e-5)
    census = take_census(data, "train")  # labels in the margins are not counted
    assert census.pixels.tolist() == [sum(image[:, :, 0].size for image in images) - 1, 1]
    assert (data[0][1][:, :50] == 255).all() and (data[0][1][:, 50:100] != 255).all()


def test_a_flat_band_and_images_without_data(tmp_path, caplog):
    flat = np.stack([np.full((9, 9), 5, np.uint16), np.arange(81, dtype=np.uint16).reshape(9, 9)], axis=2)
    data = load_dataset(pairs(tmp_path, [flat], [np.uint8(np.eye(9))]), "train")
    card = ModelCard(("a", "b"), channels=2, dtype="uint16", mean=(0, 0), std=(1, 1))
    mean, std = measure_normalisation(replace(data, card=card), card)
    assert mean == (5, 40) and std[0] == 1 and "band 1 holds one value everywhere (5)" in caplog.text
    with pytest.raises(MisuseError, match=r"no-data value 70000, and .* holds uint16 values, 0 to 65535"):
        measure_normalisation(replace(data, card=card, reading=ReadOptions(no_data=70000)), card)
    nothing = replace(card, channels=2, dtype="float32")
    data = load_dataset(pairs(tmp_path / "n", [np.full((9, 9, 2), np.nan, np.float32)], [np.uint8(np.eye(9))]), "train")
    with pytest.raises(DeployError, match="have no data in any pixel"):
        measure_normalisation(replace(data, card=nothing), nothing)

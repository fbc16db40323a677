"""Instances: numbered and measured as scipy does in the whole image, whatever strips it is read in."""

import csv
from unittest.mock import patch

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.images.results import open_result
from fcn_deploy.runtime.images.write import write_labels, write_maps
from fcn_deploy.runtime.labelling.ground import Ground
from fcn_deploy.runtime.labelling.instances import Instances, write_table
from helpers import needs
from hypothesis import given, settings
from hypothesis import strategies as st

from fcn_deploy import ModelCard

ndimage = needs("scipy.ndimage")
CARD = ModelCard(("back", "cell", "border"))
PLACE = [(33550, 12, 3, (2.0, 2.0, 0.0)), (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0))]


def expected(labels, classes, connectivity):
    """Numbers of the objects, [H, W], class after class."""
    found, count = np.zeros(labels.shape, np.uint32), 0
    for index in classes:
        objects, more = ndimage.label(labels == index, np.ones((3, 3)) if connectivity == 8 else None)
        found = np.where(objects > 0, objects + count, found)
        count += more
    return found


def numbered(path, classes, connectivity, folder):
    with open_result(path) as result:
        instances = Instances(result, Ground(), CARD, classes, connectivity)
        write_maps(folder / "i.tif", instances, ("instances",), tiled=True)
        write_table(folder / "i.csv", "an image", instances, classes, Ground(), CARD)
    with (folder / "i.csv").open(newline="") as text:
        return tifffile.imread(folder / "i.tif"), list(csv.DictReader(text))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 70), width=st.integers(1, 50), share=st.floats(0, 1), seed=st.integers(0, 99),
    connectivity=st.sampled_from([4, 8]), strip=st.integers(1, 400), kind=st.sampled_from(["png", "tif"]),
)  # fmt: skip
def test_objects_are_those_of_the_whole_image(tmp_path_factory, height, width, share, seed, connectivity, strip, kind):
    folder = tmp_path_factory.mktemp("i")
    random = np.random.default_rng(seed)
    labels = np.where(random.random((height, width)) < share, random.integers(1, 3, (height, width)), 0)
    labels = labels.astype(np.uint8)
    labels[random.random((height, width)) < 0.05] = 255
    path = folder / f"l.{kind}"
    if kind == "png":
        write_labels(path, labels, CARD)
    else:
        write_maps(path, labels[None], ("labels",), tiled=True)
    with patch("fcn_deploy.runtime.labelling.instances.STRIP_PIXELS", strip * width // 8):
        found, rows = numbered(path, [2, 1], connectivity, folder)
    wanted = expected(labels, [2, 1], connectivity)
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)
    check_rows(rows, wanted, labels)


def check_rows(rows, numbers, labels):
    boxes = ndimage.find_objects(numbers.astype(np.int64))
    assert len(rows) == len(boxes) == numbers.max(initial=0)
    centres = ndimage.center_of_mass(numbers > 0, numbers, np.arange(1, len(rows) + 1)) if rows else []
    pixels = np.bincount(numbers.ravel())
    for number, (row, (high, wide), centre) in enumerate(zip(rows, boxes, centres, strict=True), 1):
        assert (int(row["instance"]), int(row["pixels"])) == (number, pixels[number])
        bounds = [int(row[side]) for side in ("top", "bottom", "left", "right")]
        assert bounds == [high.start, high.stop, wide.start, wide.stop]
        assert (float(row["row"]), float(row["column"])) == pytest.approx(centre, abs=6e-4)
        place = tuple(np.argwhere(numbers == number)[0])
        assert int(row["class"]) == labels[place] and row["name"] == CARD.classes[labels[place]]


def test_a_snake_through_all_strips_is_one_object(tmp_path):
    labels = np.zeros((1500, 700), np.uint8)
    labels[::4] = 1
    labels[::8, :-1] = 1
    for row in range(0, 1499, 4):  # each line is joined to the next at alternating ends
        labels[row : row + 4, -1 if row % 8 else 0] = 1
    labels[2:1400:96, 300] = 2
    write_maps(tmp_path / "l.tif", labels[None], ("labels",), tiled=True)
    found, rows = numbered(tmp_path / "l.tif", [1, 2], 4, tmp_path)
    np.testing.assert_array_equal(found, expected(labels, [1, 2], 4))
    assert [row["class"] for row in rows].count("1") == ndimage.label(labels == 1)[1] < 3


def test_objects_on_the_ground_have_areas_and_places(tmp_path):
    labels = np.zeros((20, 30), np.uint8)
    labels[4:8, 10:20] = 1
    write_maps(tmp_path / "l.tif", labels[None], ("labels",), tags=PLACE)
    with open_result(tmp_path / "l.tif") as result:
        ground = Ground((2.0, 0.0, 5e5, 0.0, -2.0, 5e6), None, np.arange(21) * 4.0)
        instances = Instances(result, ground, CARD, [1], 4)
        write_table(tmp_path / "i.csv", "an image", instances, [1], ground, CARD)
    with (tmp_path / "i.csv").open(newline="") as text:
        (row,) = csv.DictReader(text)
    assert (row["image"], row["name"], float(row["area_m2"])) == ("an image", "cell", 160)
    assert (float(row["x"]), float(row["y"])) == (500030, 4999988)  # the middle of 10 to 20, and of 4 to 8

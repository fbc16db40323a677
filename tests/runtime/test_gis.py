"""Results for a GIS: class names, Cloud-Optimized GeoTIFFs, polygons and statistics, each held against other tools."""

import csv
import json
import logging
import os
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from fcn_deploy.export.graph.edit import set_metadata
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from fcn_deploy.runtime.labelling import ground
from fcn_deploy.runtime.labelling.files import label_files
from fcn_deploy.runtime.labelling.products import Products
from fcn_deploy.runtime.network import Network
from helpers import command, finished, label_records, needs
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard

rasterio, features = needs("rasterio"), needs("rasterio.features")
pyogrio, ndimage = needs("pyogrio"), needs("scipy.ndimage")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

CARD = ModelCard(("field & wood", "road", "roof"), mean=(0, 0, 0), std=(255, 255, 255))
MASKS = replace(CARD, activation="multilabel", threshold=0.55)
UTM = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}
DEGREES = {"crs": "EPSG:4326", "transform": rasterio.Affine(0.01, 0, 15, 0, -0.01, 46)}
FEET = {"crs": "EPSG:2263", "transform": rasterio.Affine(3, 0, 9e5, 0, -3, 2e5)}
MERCATOR = {"crs": "EPSG:3857", "transform": rasterio.Affine(100, 0, 1.6e6, 0, -100, 5.8e6)}


def save_network(folder, card=CARD):
    """A network whose scores are the bands of the image: the class is the brightest."""
    bands = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3, "H", "W"]) for n in ("image", "scores")]
    weights = numpy_helper.from_array(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w"], ["scores"])], "g", bands[:1], bands[1:], [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    set_metadata(model, CARD_KEY, card.to_json())
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def classes(height, width, seed=0, margin=0):
    """Labels of blobs, 255 in a margin at the top."""
    noise = np.random.default_rng(seed).normal(size=(3, height, width))
    found = ndimage.gaussian_filter(noise, (0, 2, 2)).argmax(0).astype(np.uint8)
    found[:margin] = 255
    return found


def save_scene(path, labels, **where):
    """An image that gets these labels: a GeoTIFF whose no-data value is 0, or a PNG."""
    image = np.where(labels == np.arange(3)[:, None, None], 200, 10).astype(np.uint8)
    image[:, labels == 255] = 0
    if path.suffix == ".png":
        Image.fromarray(image.transpose(1, 2, 0)).save(path)
        return path
    options = {"height": labels.shape[0], "width": labels.shape[1], "count": 3, "dtype": "uint8", "nodata": 0}
    with rasterio.open(path, "w", driver="GTiff", **options, **where) as file:
        file.write(image)
    return path


def label(folder, *sources, card=CARD, **options):
    with Network(save_network(folder, card)) as net:
        return list(label_files(net, sources, folder / "o", **options))


def table(path):
    with path.open(newline="") as text:
        return list(csv.DictReader(text))


def test_label_tiffs_name_their_classes(tmp_path):
    labels = classes(70, 90, margin=9)
    label(tmp_path, save_scene(tmp_path / "s.tif", labels, **UTM))
    with rasterio.open(tmp_path / "o/s.tif") as file:
        np.testing.assert_array_equal(file.read(1), labels)
        assert (file.nodata, file.crs.to_epsg(), file.transform) == (255, 32633, UTM["transform"])
        assert [file.colormap(1)[i][:3] for i in range(3)] == [*CARD.colors] and file.descriptions == ("labels",)
    band = ElementTree.parse(tmp_path / "o/s.tif.aux.xml").getroot().find("PAMRasterBand")
    assert [each.text for each in band.find("CategoryNames")] == [*CARD.classes]
    rows = [[cell.text for cell in row] for row in band.iter("Row")]
    assert rows == [[str(i), CARD.classes[i], *map(str, CARD.colors[i])] for i in range(3)]
    usages = [int(field.find("Usage").text) for field in band.iter("FieldDefn")]
    assert usages == [5, 2, 6, 7, 8]  # GDAL's GFU_MinMax, GFU_Name, GFU_Red, …


def test_classes_that_are_only_numbered_are_not_named(tmp_path):
    card = replace(CARD, classes=("class 0", "class 1", "class 2"))
    label(tmp_path, save_scene(tmp_path / "s.tif", classes(9, 9), **UTM), card=card)
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["s.tif"]


@pytest.mark.parametrize("card", [CARD, MASKS], ids=["labels", "masks"])
def test_cloud_optimized_tiffs_are_valid_and_hold_what_others_do(tmp_path, card):
    validate = needs("rio_cogeo").cog_validate
    scene = save_scene(tmp_path / "s.tif", classes(760, 640, margin=100), **UTM)
    (tmp_path / "plain").mkdir()
    label(tmp_path / "plain", scene, card=card, probabilities=True)
    label(tmp_path, scene, card=card, probabilities=True, products=Products(cog=True))
    assert {path.name for path in (tmp_path / "o").iterdir()} == {
        path.name for path in (tmp_path / "plain/o").iterdir()
    }
    for name in ("s.tif", "s.probabilities.tif"):
        valid, errors, warnings = validate(tmp_path / "o" / name, strict=True)
        assert valid and not errors and not warnings
        with rasterio.open(tmp_path / "o" / name) as found, rasterio.open(tmp_path / "plain/o" / name) as plain:
            np.testing.assert_array_equal(found.read(), plain.read())
            for each in ("crs", "transform", "descriptions", "colorinterp", "dtypes"):
                assert getattr(found, each) == getattr(plain, each)
            assert repr(found.nodata) == repr(plain.nodata) and found.overviews(1) == [2]
            if name == "s.tif" and card is CARD:
                assert found.colormap(1) == plain.colormap(1)
                assert_most_frequent(tmp_path / "o" / name, found.read(1))


def assert_most_frequent(path, labels):
    """The first overview has the most frequent class of each four pixels that are data."""
    with rasterio.open(path, overview_level=0) as file:
        overview = file.read(1)
    height, width = overview.shape
    four = labels.reshape(height, 2, width, 2).transpose(0, 2, 1, 3).reshape(height, width, 4)
    counts = np.stack([(four == index).sum(2) for index in range(3)])
    nothing = counts.max(0) == 0
    np.testing.assert_array_equal(overview == 255, nothing)
    chosen = np.take_along_axis(counts, np.where(nothing, 0, overview)[None].astype(int), 0)[0]
    np.testing.assert_array_equal(chosen[~nothing], counts.max(0)[~nothing])


@pytest.mark.parametrize("kind", ["RPC", "control points", "rotated"])
def test_cloud_optimized_tiffs_keep_every_georeference(tmp_path, kind):
    from rasterio.control import GroundControlPoint
    from rasterio.rpc import RPC

    points = [GroundControlPoint(r, c, 5e5 + 10 * c, 5e6 - 10 * r) for r, c in ((0, 0), (0, 90), (70, 0), (70, 90))]
    where = {
        "RPC": {},
        "control points": {"gcps": points, "crs": "EPSG:32633"},
        "rotated": {"crs": "EPSG:32633", "transform": rasterio.Affine(8, 3, 5e5, 3, -8, 5e6)},
    }[kind]
    scene = save_scene(tmp_path / "s.tif", classes(70, 90), **where)
    if kind == "RPC":
        numbers = dict.fromkeys(("height_off", "height_scale", "lat_off", "lat_scale", "line_off", "line_scale"), 1.0)
        numbers |= dict.fromkeys(("long_off", "long_scale", "samp_off", "samp_scale"), 2.0)
        coefficients = {f"{a}_{b}_coeff": [0.5] * 20 for a in ("line", "samp") for b in ("num", "den")}
        with rasterio.open(scene, "r+") as file:
            file.rpcs = RPC(**numbers, **coefficients, err_bias=None, err_rand=None)
    label(tmp_path, scene, products=Products(cog=True))
    with rasterio.open(scene) as given, rasterio.open(tmp_path / "o/s.tif") as found:
        assert found.transform == given.transform and found.crs == given.crs
        assert [(p.row, p.col, p.x, p.y) for p in found.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in given.gcps[0]]
        assert (found.rpcs and found.rpcs.to_dict()) == (given.rpcs and given.rpcs.to_dict())


def test_polygons_are_those_of_the_whole_image_and_have_its_areas(tmp_path):
    scenes = {
        "a.tif": (classes(150, 120, 1, margin=20), UTM),
        "b.tif": (classes(40, 50, 2), DEGREES),
        "c.png": (classes(30, 40, 3), {}),
        "d.tif": (classes(40, 30, 4), UTM),
    }
    sources = [save_scene(tmp_path / name, labels, **where) for name, (labels, where) in scenes.items()]
    label(tmp_path, *sources, products=Products(polygons=tmp_path / "p.gpkg"))
    layers = {"a.tif": "labels", "d.tif": "labels", "b.tif": "labels_EPSG_4326", "c.png": "labels_pixels"}
    assert {name for name, _ in pyogrio.list_layers(tmp_path / "p.gpkg")} == {*layers.values()}
    for source in sources:
        labels, where = scenes[source.name]
        about, _, shapes, columns = pyogrio.raw.read(tmp_path / "p.gpkg", layer=layers[source.name])
        fields = dict(zip(about["fields"], columns, strict=True))
        mine = fields["image"] == str(source)
        assert about["crs"] == where.get("crs")
        transform = where.get("transform", rasterio.Affine.identity())
        expected = features.shapes(labels, mask=labels != 255, connectivity=4, transform=transform)
        expected = sorted((value, tuple(map(tuple, shape["coordinates"][0]))) for shape, value in expected)
        found = [(index, outline(shape)) for index, shape in zip(fields["class"][mine], shapes[mine], strict=True)]
        assert len(found) == len(expected)
        for (index, points), (value, ring) in zip(sorted(found), expected, strict=True):
            assert index == value
            np.testing.assert_allclose(points, ring, rtol=1e-12)
        assert {*fields["name"][mine]} == {*CARD.classes}
        for index in range(3):
            assert fields["pixels"][mine & (fields["class"] == index)].sum() == (labels == index).sum()
        area = fields["area_m2"][mine].sum()
        assert np.isnan(area) if not where else area == pytest.approx((labels != 255).sum() * 100) or where is DEGREES


def outline(binary):
    """The outer ring of a polygon in well-known binary."""
    assert binary[:5] == b"\x01\x03\0\0\0"
    count = int.from_bytes(binary[9:13], "little")
    return tuple(map(tuple, np.frombuffer(binary, "<f8", 2 * count, 13).reshape(-1, 2)))


def test_polygons_of_a_large_image_do_not_end_at_its_tiles(tmp_path):
    labels = np.zeros((1100, 1200), np.uint8)
    labels[100:1000, 100:1100] = 1
    labels[300:800, 400:700] = 2  # a hole of the other, across tiles
    label(tmp_path, save_scene(tmp_path / "s.tif", labels, **UTM), products=Products(polygons=tmp_path / "p.gpkg"))
    _, _, shapes, columns = pyogrio.raw.read(tmp_path / "p.gpkg", columns=["class", "pixels", "area_m2"])
    assert sorted(zip(*map(np.ndarray.tolist, columns), strict=True)) == [
        (i, (labels == i).sum(), (labels == i).sum() * 100) for i in range(3)
    ]
    assert [int.from_bytes(shape[5:9], "little") for shape in shapes] != [1, 1, 1]  # rings


def test_geojson_has_longitudes_and_latitudes(tmp_path):
    labels = np.zeros((500, 600), np.uint8)
    labels[100:400, 100:500] = 1
    scene = save_scene(tmp_path / "s.tif", labels, **UTM)
    label(tmp_path, scene, products=Products(polygons=tmp_path / "p.geojson"))
    found = json.loads((tmp_path / "p.geojson").read_text())
    assert found["type"] == "FeatureCollection" and "crs" not in found  # RFC 7946, 4
    inner = next(each for each in found["features"] if each["properties"]["class"] == 1)
    assert inner["properties"] == {
        "image": str(scene), "class": 1, "name": "road", "pixels": 120_000, "area_m2": 12_000_000,
    }  # fmt: skip
    (ring,) = inner["geometry"]["coordinates"]
    x, y = np.array(ring).T
    assert ((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0) and ring[0] == ring[-1]  # counterclockwise, closed
    east, north = rasterio.warp.transform("EPSG:4326", "EPSG:32633", x, y)
    columns, rows = (np.array(east) - 5e5) / 10, (5e6 - np.array(north)) / 10
    for place in (columns, rows):  # all points lie on the square's sides, at most 200 pixels apart
        assert np.diff(place).max() <= 200.001
    on_side = np.isclose(columns, 100) | np.isclose(columns, 500) | np.isclose(rows, 100) | np.isclose(rows, 400)
    assert on_side.all() and len(ring) > 5
    outer = next(each for each in found["features"] if each["properties"]["class"] == 0)
    hole = np.array(outer["geometry"]["coordinates"][1])
    assert (hole[:-1, 0] * hole[1:, 1] - hole[1:, 0] * hole[:-1, 1]).sum() < 0
    assert pyogrio.read_info(tmp_path / "p.geojson")["crs"] == "EPSG:4326"


@pytest.mark.parametrize(
    ("where", "across"),
    [
        ({"crs": "EPSG:32660", "transform": rasterio.Affine(1000, 0, 8.0e5, 0, -1000, 1e6)}, True),
        ({"crs": "EPSG:3857", "transform": rasterio.Affine(1000, 0, 20_012_508, 0, -1000, 5.8e6)}, True),
        ({"crs": "EPSG:4326", "transform": rasterio.Affine(0.01, 0, 350, 0, -0.01, 10)}, False),
        ({"crs": "EPSG:4326", "transform": rasterio.Affine(0.01, 0, 179.8, 0, -0.01, 10)}, True),
        ({"crs": "EPSG:4326", "transform": rasterio.Affine(0.01, 0, -180.2, 0, -0.01, 10)}, True),
    ],
    ids=["utm", "mercator", "350 degrees", "east", "west"],
)
def test_polygons_end_at_the_antimeridian(tmp_path, where, across):
    def mercator(ring):
        x, y = rasterio.warp.transform("EPSG:4326", "EPSG:3857", *ring.T)
        x, y = (np.array(x) - x[0]) / 1000, (np.array(y) - y[0]) / 1000
        return (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2

    cut, pixels = 0, 0.0
    labels = classes(60, 50)
    scene = save_scene(tmp_path / "s.tif", labels, **where)
    products = Products(polygons=tmp_path / "p.geojson", stats=tmp_path / "t.csv")
    label(tmp_path, scene, products=products)
    for each in json.loads((tmp_path / "p.geojson").read_text())["features"]:
        shape = each["geometry"]
        parts = shape["coordinates"] if shape["type"] == "MultiPolygon" else [shape["coordinates"]]
        cut += len(parts) > 1
        for part in parts:  # on one side of the antimeridian each, holes in their outlines
            rings = np.concatenate([np.array(ring) for ring in part])
            assert np.ptp(rings[:, 0]) < 1 and abs(rings[:, 0]).max() <= 180
            outer, *holes = (np.array(ring) for ring in part)
            x, y = (outer - outer[0]).T
            assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() > 0
            if where["crs"] == "EPSG:3857":
                pixels += abs(mercator(outer)) - sum(abs(mercator(hole)) for hole in holes)
    assert (cut > 0) == across
    if where["crs"] == "EPSG:3857":
        assert pixels == pytest.approx(50 * 60, rel=1e-5)  # nothing is lost by cutting
    if where["crs"] == "EPSG:3857":
        areas = [float(row["area_m2"]) for row in table(tmp_path / "t.csv")]
        assert areas == pytest.approx([on_the_ellipsoid(labels == i, where) for i in range(3)], rel=1e-6)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"crs": "IAU_2015:30100", "transform": DEGREES["transform"]}, "no way to longitudes and latitudes of WGS 84"),
        ({"crs": "EPSG:3031", "transform": rasterio.Affine(1000, 0, -25e3, 0, -1000, 30e3)}, "a polygon round a pole"),
    ],
    ids=["moon", "pole"],
)
def test_what_longitudes_cannot_say_is_one_line_and_a_geopackage_holds_it(tmp_path, where, said):
    labels = np.ones((60, 50), np.uint8)
    scene = save_scene(tmp_path / "s.tif", labels, **where)
    (record,) = label(tmp_path, scene, products=Products(polygons=tmp_path / "p.geojson"))
    assert said in record["error"] and record["error"].endswith("name a .gpkg with --polygons")
    assert json.loads((tmp_path / "p.geojson").read_text())["features"] == []
    products = Products(polygons=tmp_path / "p.gpkg", stats=tmp_path / "t.csv")
    (record,) = label(tmp_path, scene, products=products, force=True)
    assert "error" not in record and pyogrio.read_info(tmp_path / "p.gpkg")["features"] == 1
    assert (table(tmp_path / "t.csv")[1]["area_m2"] == "") == ("30100" in where["crs"])


def test_geojson_of_pictures_is_in_pixels_and_mixes_with_nothing(tmp_path):
    picture = save_scene(tmp_path / "a.png", classes(20, 30), **{})
    scene = save_scene(tmp_path / "b.tif", classes(20, 30), **UTM)
    records = label(tmp_path, picture, scene, products=Products(polygons=tmp_path / "p.geojson"))
    assert (
        "error" not in records[0]
        and "lies in a coordinate system, and images before it in pixels" in records[1]["error"]
    )
    found = json.loads((tmp_path / "p.geojson").read_text())["features"]
    assert {each["properties"]["image"] for each in found} == {str(picture)}
    points = np.concatenate([ring for each in found for ring in each["geometry"]["coordinates"]])
    assert points.min() == 0 and points.max(0).tolist() == [30, 20]
    assert all(each["properties"]["area_m2"] is None for each in found)


@pytest.mark.parametrize("where", [UTM, FEET, DEGREES, MERCATOR, {}], ids=["metres", "feet", "degrees", "3857", "none"])
def test_statistics_have_pixels_shares_and_areas(tmp_path, where):
    labels = classes(60, 50, margin=10)
    name = "s.tif" if where else "s.png"
    scene = save_scene(tmp_path / name, labels if where else np.minimum(labels, 2), **where)
    labels = labels if where else np.minimum(labels, 2)
    label(tmp_path, scene, products=Products(stats=tmp_path / "t.csv"))
    rows = table(tmp_path / "t.csv")
    valid = (labels != 255).sum()
    for index, row in enumerate(rows):
        count = (labels == index).sum()
        assert (row["image"], int(row["class"]), row["name"]) == (str(scene), index, CARD.classes[index])
        assert (int(row["pixels"]), int(row["valid_pixels"])) == (count, valid)
        assert float(row["share"]) == pytest.approx(count / valid, abs=1e-9)
        if where is UTM:
            assert float(row["area_m2"]) == count * 100
        elif where is FEET:
            assert float(row["area_m2"]) == pytest.approx(count * 9 * (1200 / 3937) ** 2, rel=1e-9)
        elif where:
            assert float(row["area_m2"]) == pytest.approx(on_the_ellipsoid(labels == index, where), rel=1e-6)
        else:
            assert row["area_m2"] == ""
    assert len(rows) == 3


SITE = 'LOCAL_CS["site",UNIT["foot",0.3048]]'


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            {"crs": "EPSG:4326", "transform": rasterio.Affine(1e-3, 1e-4, 10, 1e-4, -1e-3, 50)},
            "it is rotated, in degrees",
        ),
        ({"crs": "IAU_2015:30100", "transform": DEGREES["transform"]}, "no way to longitudes and latitudes"),
        ({"transform": UTM["transform"]}, "its coordinate system is not known: name it first"),
        ({"crs": SITE, "transform": UTM["transform"]}, ""),
    ],
    ids=["rotated", "moon", "no system", "site"],
)
def test_why_areas_are_not_known_is_said(tmp_path, caplog, monkeypatch, where, said):
    monkeypatch.setattr(ground, "_said", set())
    labels = classes(20, 30, margin=4)
    scenes = [save_scene(tmp_path / name, labels, **where) for name in ("a.tif", "b.tif")]
    label(tmp_path, *scenes, products=Products(stats=tmp_path / "t.csv"))
    told = [record.getMessage() for record in caplog.records if "no areas in square metres" in record.getMessage()]
    assert len(told) == bool(said) and said in "".join(told)
    areas = [row["area_m2"] for row in table(tmp_path / "t.csv")]
    assert areas == [""] * 6 if said else float(areas[0]) == pytest.approx((labels == 0).sum() * 100 * 0.3048**2)


def test_a_scene_without_polygons_has_a_layer_in_its_place(tmp_path):
    scenes = [save_scene(tmp_path / f"{size}.tif", np.full((9, size), 255), **UTM) for size in (9, 8)]
    label(tmp_path, *scenes, products=Products(polygons=tmp_path / "p.gpkg"))
    assert pyogrio.list_layers(tmp_path / "p.gpkg")[:, 0].tolist() == ["labels"]
    found = pyogrio.read_info(tmp_path / "p.gpkg")
    assert (found["features"], found["crs"]) == (0, "EPSG:32633")


def on_the_ellipsoid(chosen, where):
    """Area of pixels, each as a geodesic polygon."""
    geod = needs("pyproj").Geod(ellps="WGS84")
    total = 0.0
    for row, count in enumerate(chosen.sum(1)):
        corners = [where["transform"] @ corner for corner in ((0, row), (1, row), (1, row + 1), (0, row + 1))]
        east, north = rasterio.warp.transform(where["crs"], "EPSG:4326", *zip(*corners, strict=True))
        total += count * abs(geod.polygon_area_perimeter(east, north)[0])
    return total


@pytest.mark.parametrize("cog", [False, True])
def test_masks_that_overlap_have_polygons_and_statistics_too(tmp_path, cog):
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "s.png")
    products = Products(polygons=tmp_path / "p.gpkg", stats=tmp_path / "t.csv", instances="road,roof", cog=cog)
    (record,) = label(tmp_path, tmp_path / "s.png", card=MASKS, products=products)
    with rasterio.open(tmp_path / "o/s.tif") as file:
        masks = file.read()
    rows = table(tmp_path / "t.csv")
    assert [int(row["pixels"]) for row in rows] == masks.sum((1, 2)).tolist()
    assert record["instance_counts"] == {name: ndimage.label(masks[i])[1] for i, name in ((1, "road"), (2, "roof"))}
    _, _, _, columns = pyogrio.raw.read(tmp_path / "p.gpkg", columns=["class", "pixels"])
    assert [columns[1][columns[0] == i].sum() for i in range(3)] == masks.sum((1, 2)).tolist()


def test_gdals_warning_of_pixels_beyond_a_mask_is_not_passed_on(caplog):
    gdal = logging.getLogger("rasterio._env")  # it comes by chance, of memory that nobody has set
    gdal.warning("CPLE_AppDefined in cog.tif, band 3: One or more pixels clipped to fit 1 bit domain.")
    assert not caplog.messages
    gdal.warning("something else")
    assert caplog.messages


def test_a_run_that_is_gone_on_with_has_the_products_of_all_images(tmp_path):
    sources = [save_scene(tmp_path / f"{i}.png", classes(20, 30, i)) for i in range(3)]
    label(tmp_path, *sources[:2])
    products = Products(polygons=tmp_path / "p.gpkg", stats=tmp_path / "t.csv", instances="roof")
    records = label(tmp_path, *sources, products=products, resume=True)
    assert [record.get("skipped", False) for record in records] == [True, True, False]
    assert [row["image"] for row in table(tmp_path / "t.csv")] == [str(source) for source in sources for _ in range(3)]
    assert {*pyogrio.raw.read(tmp_path / "p.gpkg", columns=["image"])[3][0]} == {str(source) for source in sources}
    before = (tmp_path / "t.csv").read_text()
    other = save_scene(tmp_path / "other.png", classes(20, 30))
    with pytest.raises(MisuseError, match=r"t\.csv exists already"):
        label(tmp_path, other, products=Products(stats=tmp_path / "t.csv"))
    label(tmp_path, *sources, products=products, resume=True)
    assert (tmp_path / "t.csv").read_text() == before


def test_nothing_is_left_of_a_run_that_ends_early(tmp_path):
    sources = [save_scene(tmp_path / f"{i}.png", classes(20, 30, i)) for i in range(3)]
    (tmp_path / "t.csv").write_text("precious")
    products = Products(polygons=tmp_path / "p.gpkg", stats=tmp_path / "t.csv")
    with (
        Network(save_network(tmp_path)) as net,
        closing(label_files(net, sources, tmp_path / "o", products=products, force=True)) as records,
    ):
        next(records)
    assert (tmp_path / "t.csv").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", "1.png", "2.png", "m.onnx", "o", "t.csv"}


def test_a_broken_image_is_left_out(tmp_path):
    good = save_scene(tmp_path / "a.png", classes(20, 30))
    (tmp_path / "b.png").write_bytes(b"no picture")
    records = label(tmp_path, tmp_path / "b.png", good, products=Products(stats=tmp_path / "t.csv"))
    assert "error" in records[0] and {row["image"] for row in table(tmp_path / "t.csv")} == {str(good)}
    label(tmp_path, tmp_path / "b.png", products=Products(polygons=tmp_path / "p.gpkg"))
    assert pyogrio.read_info(tmp_path / "p.gpkg", layer="labels")["features"] == 0
    label(tmp_path, tmp_path / "b.png", products=Products(polygons=tmp_path / "p.geojson"))
    assert json.loads((tmp_path / "p.geojson").read_text())["features"] == []


@pytest.mark.parametrize(
    ("products", "said"),
    [
        (Products(polygons="p.shp"), r"--polygons p\.shp; name a file that ends in \.gpkg or \.geojson"),
        (Products(stats="t.txt"), r"--stats t\.txt; name a file that ends in \.csv"),
        (Products(instances="tree"), r"--instances 'tree'; name classes of this model \(field & wood, road, roof\)"),
        (Products(instances="3"), r"--instances '3'; name classes of this model"),
        (Products(instances="roof,2"), "--instances names '2' twice"),
        (Products(instances=""), "--instances ''; name classes"),
        (Products(instances="roof", connectivity=6), "--connectivity 6; write 4"),
        (Products(stats="s.instances.csv", instances="roof"), r"s\.instances\.csv is an image or a result of this run"),
    ],
)
def test_what_cannot_be_made_is_said_before_the_work(tmp_path, products, said):
    paths = {n: v and tmp_path / "o" / v for n, v in (("polygons", products.polygons), ("stats", products.stats))}
    scene = save_scene(tmp_path / "s.png", classes(20, 30))
    with pytest.raises(MisuseError) as caught:
        label(tmp_path, scene, products=replace(products, **paths))
    text = str(caught.value).replace(f"{tmp_path}/o/", "")
    assert re.search(said, text) and len(text) <= 300 and "\n" not in text
    assert not (tmp_path / "o").exists()


def test_values_and_videos_have_no_products(tmp_path):
    scene = save_scene(tmp_path / "s.png", classes(20, 30))
    with pytest.raises(MisuseError, match="--stats: this model gives values, no classes"):
        label(tmp_path, scene, card=replace(CARD, activation="none"), products=Products(stats=tmp_path / "t.csv"))
    (tmp_path / "v.mp4").write_bytes(b"")
    with pytest.raises(MisuseError, match=r"--polygons: .*v\.mp4 is a video"):
        label(tmp_path, tmp_path / "v.mp4", products=Products(polygons=tmp_path / "p.gpkg"))


@pytest.mark.parametrize(
    ("missing", "options", "extra"),
    [
        ("rasterio", {"products": Products(cog=True)}, "gdal"),
        ("rasterio", {"products": Products(polygons=Path("p.gpkg"))}, "gdal"),
        ("pyogrio", {"products": Products(polygons=Path("p.gpkg"))}, "gdal"),
        ("scipy.ndimage", {"products": Products(instances="roof")}, "instances"),
    ],
)
def test_a_missing_package_is_one_line_before_the_work(tmp_path, monkeypatch, missing, options, extra):
    scene = save_scene(tmp_path / "s.png", classes(20, 30))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(DeployError, match=rf"{missing} is not installed; run: pip install 'fcn-deploy\[{extra}\]'"):
        label(tmp_path, scene, **options)
    assert not (tmp_path / "o").exists()


def test_overlays_of_large_images_are_reduced_unless_asked(tmp_path):
    for name, where in (("s.png", {}), ("t.tif", UTM)):
        scene = save_scene(tmp_path / name, classes(220, 300), **where)
        label(tmp_path, scene, overlay=True, products=Products(overlay_side=100))
        with Image.open(tmp_path / f"o/{scene.stem}.overlay.png") as small:
            assert small.width == 160 and small.height < 140  # a legend has 160 pixels at least
        label(tmp_path, scene, overlay=True, force=True)
        with Image.open(tmp_path / f"o/{scene.stem}.overlay.png") as full:
            assert full.width == 300 and full.height > 220


@pytest.mark.slow
def test_the_command_makes_all_of_it(tmp_path):
    (tmp_path / "in").mkdir()
    labels = classes(60, 50, margin=10)
    save_scene(tmp_path / "in/s.tif", labels, **UTM)
    out = tmp_path / "o"
    words = [save_network(tmp_path), tmp_path / "in", "-o", out, "--polygons", out / "p.gpkg", "--stats", out / "t.csv"]
    words += ["--instances", "roof, road", "--connectivity", "8", "--cog"]
    (record,) = label_records(command("infer", *words, "--json"))
    assert record["instance_counts"] == {
        name: ndimage.label(labels == index, np.ones((3, 3)))[1] for index, name in ((2, "roof"), (1, "road"))
    }
    assert {path.name for path in out.iterdir()} == {
        "s.tif", "s.tif.aux.xml", "s.instances.tif", "s.instances.csv", "p.gpkg", "t.csv",
    }  # fmt: skip
    counts = record["instance_counts"]
    assert [row["instances"] for row in table(out / "t.csv")] == ["", str(counts["road"]), str(counts["roof"])]
    done = command("infer", *words, "--resume")
    assert f"s.tif  {counts['roof']} roof, {counts['road']} road" in done.stdout


QGIS = """
import json, sys
from qgis.core import QgsApplication, QgsRasterLayer, QgsVectorLayer
app = QgsApplication([], False)
app.initQgis()
labels, polygons = QgsRasterLayer(sys.argv[1], "labels"), QgsVectorLayer(sys.argv[2] + "|layername=labels", "polygons")
print("found:" + json.dumps({
    "valid": [labels.isValid(), polygons.isValid()], "systems": [labels.crs().authid(), polygons.crs().authid()],
    "renderer": type(labels.renderer()).__name__, "nodata": labels.dataProvider().sourceNoDataValue(1),
    "names": [each.label for each in labels.renderer().classes()][:3], "extent": labels.extent().toString(0),
    "areas": sum(each["area_m2"] for each in polygons.getFeatures()),
}))
"""


def test_qgis_shows_labels_by_name_and_polygons(tmp_path):
    python = os.environ.get("QGIS_PYTHON", "/usr/bin/python3")
    environment = {**os.environ, "QT_QPA_PLATFORM": "offscreen"}
    try:
        there = subprocess.run([python, "-c", "import qgis.core"], capture_output=True, env=environment)
    except OSError:
        there = None
    if there is None or there.returncode:
        pytest.skip("no Python with QGIS is at hand; apt-get install python3-qgis, or set QGIS_PYTHON")
    labels = classes(70, 90, margin=9)
    scene = save_scene(tmp_path / "s.tif", labels, **UTM)
    label(tmp_path, scene, products=Products(cog=True, polygons=tmp_path / "p.gpkg"))
    done = finished([python, "-c", QGIS, tmp_path / "o/s.tif", tmp_path / "p.gpkg"], env=environment)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found:"))[6:])
    assert found == {
        "valid": [True, True], "systems": ["EPSG:32633"] * 2, "renderer": "QgsPalettedRasterRenderer", "nodata": 255,
        "names": [*CARD.classes], "extent": "500000,4999300 : 500900,5000000",
        "areas": (labels != 255).sum() * 100,
    }  # fmt: skip

"""Georeference of every kind: labels lie where rasterio says that their image lies."""

import sys

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.images.georeference import own_tags, transform_of
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.regions import by_regions, open_regions
from fcn_deploy.runtime.images.write import write_maps
from helpers import command, needs, photo
from PIL import Image

from fcn_deploy import MisuseError, ModelCard

rasterio = needs("rasterio")
copy = needs("rasterio.shutil").copy
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

CARD = ModelCard(("a", "b"))
SIZE = (48, 64)
WORLD = "10\n0\n0\n-10\n500005\n4999995\n"
ELSEWHERE = "10\n0\n0\n-10\n500105\n4999995\n"  # ten pixels to the east
TURNED = "8.5\n2.25\n-2.25\n-8.5\n500005.125\n4999995.75\n"
KEYS = (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True)
POINT_KEYS = (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2, 3072, 0, 1, 32633), True)
PLACE = [(33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, (0, 0, 0, 5e5, 5e6, 0), True)]
MATRIX = [(34264, "d", 16, (9.0, 2.0, 0, 5e5, 2.0, -9.0, 0, 5e6, 0, 0, 0, 0, 0, 0, 0, 1), True)]
POINTS = [(33922, "d", 18, (0, 0, 0, 5e5, 5e6, 0, 64, 0, 0, 500640, 5e6, 0, 0, 48, 0, 5e5, 4999520, 0), True)]
RPC = [(50844, "d", 92, (-1.0, -1.0, 24, 32, 46.5, 15.2, 300, 24, 32, 0.5, 0.5, 500, *np.linspace(-1, 1, 80)), True)]
AUX_PLACE = "<SRS>EPSG:32632</SRS><GeoTransform>7e5, 5, 0, 51e5, 0, -5</GeoTransform>"
AUX_POINTS = '<GCPList Projection="EPSG:32633">' + "".join(
    f'<GCP Id="{i}" Info="" Pixel="{x}" Line="{y}" X="{5e5 + 10 * x}" Y="{5e6 - 10 * y}" Z="0"/>'
    for i, (x, y) in enumerate([(0, 0), (64, 0), (0, 48), (64, 48)])
) + "</GCPList>"  # fmt: skip
RPC_TXT = "".join(
    f"{name}: {value}\n"
    for name, value in {
        "LINE_OFF": 24, "SAMP_OFF": 32, "LAT_OFF": 46.5, "LONG_OFF": 15.2, "HEIGHT_OFF": 300, "LINE_SCALE": 24,
        "SAMP_SCALE": 32, "LAT_SCALE": 0.5, "LONG_SCALE": 0.5, "HEIGHT_SCALE": 500,
        **{f"{a}_{b}_COEFF_{i}": i / 10 for a in ("LINE", "SAMP") for b in ("NUM", "DEN") for i in range(1, 21)},
    }.items()
)  # fmt: skip
AUX_RPC = '<Metadata domain="RPC">' + "".join(
    f'<MDI key="{name}">{value}</MDI>'
    for name, value in {
        **dict(line.split(": ") for line in RPC_TXT.splitlines()[:10]),
        **{f"{each}_COEFF": " ".join(str(i / 10) for i in range(1, 21))
           for each in ("LINE_NUM", "LINE_DEN", "SAMP_NUM", "SAMP_DEN")},
    }.items()
) + "</Metadata>"  # fmt: skip
CASES = {
    "tags": ("a.tif", [*PLACE, KEYS], {}),
    "tags of pixels that are points": ("a.tif", [*PLACE, POINT_KEYS], {}),
    "a place without a coordinate system": ("a.tif", PLACE, {}),
    "a coordinate system without a place": ("a.tif", [KEYS], {}),
    "a matrix": ("a.tif", [*MATRIX, KEYS], {}),
    "control points": ("a.tif", [*POINTS, KEYS], {}),
    "RPC": ("a.tif", RPC, {}),
    "RPC and tags": ("a.tif", [*PLACE, KEYS, *RPC], {}),
    "a.tfw": ("a.tif", [], {"a.tfw": WORLD}),
    "A.TFW": ("A.TIF", [], {"A.TFW": WORLD}),
    "a.tifw": ("a.tif", [], {"a.tifw": WORLD}),
    "a.wld": ("a.tiff", [], {"a.wld": WORLD}),
    "a turned world file": ("a.tif", [], {"a.tfw": TURNED}),
    "a world file with commas": ("a.tif", [], {"a.tfw": WORLD.replace("10\n", "10,0\n")}),
    "a world file that says the same": ("a.tif", [*PLACE, KEYS], {"a.tfw": WORLD}),
    "a world file and a coordinate system": ("a.tif", [KEYS], {"a.tfw": WORLD}),
    "a world file and control points": ("a.tif", [*POINTS, KEYS], {"a.tfw": WORLD}),
    "a world file and a coordinate system of points": ("a.tif", [POINT_KEYS], {"a.tfw": WORLD}),
    "a turned world file and a coordinate system of points": ("a.tif", [POINT_KEYS], {"a.tfw": TURNED}),
    "a world file and control points of points": ("a.tif", [*POINTS, POINT_KEYS], {"a.tfw": WORLD}),
    "a world file, a coordinate system and RPCs": ("a.tif", [KEYS], {"a.tfw": WORLD, "a_RPC.TXT": RPC_TXT}),
    "a world file, one of points and RPCs": ("a.tif", [POINT_KEYS], {"a.tfw": WORLD, "a_RPC.TXT": RPC_TXT}),
    "tags of points and RPCs": ("a.tif", [*PLACE, POINT_KEYS], {"a_RPC.TXT": RPC_TXT}),
    "aux.xml with RPCs, and a world file": ("a.tif", [KEYS], {"a.tfw": WORLD, "a.tif.aux.xml": AUX_RPC}),
    "a.wld of a PPM": ("a.ppm", [], {"a.wld": WORLD}),
    "what is no world file": ("a.tif", [*PLACE, KEYS], {"a.tfw": "a note\n"}),
    "a world file without an area": ("a.tif", [], {"a.tfw": "0\n0\n0\n0\n5\n5\n"}),
    "a.jgw": ("a.jpg", [], {"a.jgw": WORLD}),
    "a.jpgw": ("a.jpg", [], {"a.jpgw": TURNED}),
    "a.wld of a JPEG": ("a.jpeg", [], {"a.wld": WORLD}),
    "a.pgw": ("a.png", [], {"a.pgw": WORLD}),
    "A.PGW": ("a.png", [], {"a.PGW": WORLD}),
    "a.gfw": ("a.gif", [], {"a.gfw": WORLD}),
    "a.bpw": ("a.bmp", [], {"a.bpw": WORLD}),
    "aux.xml of a JPEG": ("a.jpg", [], {"a.jpg.aux.xml": AUX_PLACE}),
    "aux.xml of a PNG, and a world file": ("a.png", [], {"a.png.aux.xml": AUX_PLACE, "a.pgw": WORLD}),
    "aux.xml of a JPEG, before a world file": ("a.jpg", [], {"a.jpg.aux.xml": AUX_PLACE, "a.jgw": WORLD}),
    "aux.xml of a TIFF, before its tags": ("a.tif", [*PLACE, KEYS], {"a.tif.aux.xml": AUX_PLACE}),
    "aux.xml with control points": ("a.tif", [], {"a.tif.aux.xml": AUX_POINTS}),
    "aux.xml with a coordinate system, and a world file": (
        "a.jpg", [], {"a.jpg.aux.xml": "<SRS>EPSG:32633</SRS>", "a.jgw": WORLD},
    ),
    "aux.xml with statistics": ("a.tif", [*PLACE, KEYS], {"a.tif.aux.xml": "<Metadata></Metadata>"}),
    "a_RPC.TXT": ("a.tif", [], {"a_RPC.TXT": RPC_TXT}),
    "a_rpc.txt beside tags": ("a.tif", [*PLACE, KEYS], {"a_rpc.txt": RPC_TXT}),
}  # fmt: skip


def written(folder, name, tags, files):
    """An image with these tags, and files beside it."""
    path = folder / name
    if path.suffix.lower() in (".tif", ".tiff"):
        tifffile.imwrite(path, photo(*SIZE), photometric="rgb", extratags=tags)
    else:
        Image.fromarray(photo(*SIZE)).save(path)
    for other, text in files.items():
        text = f"<PAMDataset>{text}</PAMDataset>" if other.endswith(".xml") else text
        (folder / other).write_text(text)
    return path


def place(path):
    """Where rasterio says that a file lies."""
    with rasterio.open(path) as file:
        points, crs = file.gcps
        points = [(p.row, p.col, p.x, p.y, p.z) for p in points]
        rpcs = file.rpcs and {k: np.array(v, float).tolist() for k, v in file.rpcs.to_dict().items() if "err" not in k}
        return tuple(file.transform), file.crs, points, crs, rpcs


def labels_of(path, folder, options=None):
    with open_regions(path, CARD, options or ReadOptions()) as image:
        height, width, _ = image.shape
        write_maps(folder / "l.tif", np.zeros((1, height, width), np.uint8), ("l",), tags=image.tags)
    return folder / "l.tif"


@pytest.mark.parametrize("case", CASES)
def test_labels_lie_where_the_image_lies(tmp_path, caplog, case):
    path = written(tmp_path, *CASES[case])
    (tmp_path / "o").mkdir()
    expected = place(path)
    nowhere = (tuple(rasterio.Affine.identity()), None, [], None, None)
    assert place(labels_of(path, tmp_path / "o")) == expected
    assert by_regions(path) == (expected != nowhere or case == "a world file without an area")
    assert (expected == nowhere) == (case == "a world file without an area")
    assert ("contradicts" in caplog.text) == (case == "aux.xml of a JPEG, before a world file")


def test_the_file_rpb_is_read(tmp_path):
    path = written(tmp_path, "a.tif", RPC, {})
    with rasterio.open(path) as file:
        rpcs = file.rpcs
    options = {"height": 48, "width": 64, "count": 3, "dtype": "uint8", "profile": "BASELINE", "rpb": "YES"}
    with rasterio.open(tmp_path / "b.tif", "w", driver="GTiff", **options) as file:
        file.write(photo(*SIZE).transpose(2, 0, 1))
        file.rpcs = rpcs
    assert (tmp_path / "b.RPB").exists() and place(tmp_path / "b.tif")[4]
    assert place(labels_of(tmp_path / "b.tif", tmp_path)) == place(tmp_path / "b.tif")


def test_a_world_file_that_contradicts_the_tags_is_named_in_one_line(tmp_path, caplog):
    path = written(tmp_path, "a.tif", [*PLACE, KEYS], {"a.tfw": ELSEWHERE})
    assert place(labels_of(path, tmp_path)) == place(path)  # GDAL follows the tags
    (line,) = [record.getMessage() for record in caplog.records]
    assert "a.tfw contradicts its tags" in line and "by 10 pixels" in line and "remove the one" in line
    assert len(line) <= 300 + len(str(tmp_path)) and "\n" not in line
    with pytest.raises(MisuseError, match=r"a\.tfw contradicts its tags, .*\(refused by --strict\)"):
        labels_of(path, tmp_path, ReadOptions(strict=True))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"a.pgw": "10\n0\n0\nx\n5\n5\n"}, "a.pgw does not hold the six numbers of a world file, and is ignored"),
        ({"a.pgw": ELSEWHERE, "a.prj": "GEOGCS[]"}, "its coordinate system in a.prj is not read, as GDAL does not"),
        ({"a.pgw": ELSEWHERE}, ""),
    ],
    ids=["no numbers", "a system beside", "numbers alone"],
)  # fmt: skip
def test_what_is_not_taken_from_files_beside_is_named(tmp_path, caplog, beside, said):
    path = written(tmp_path, "a.png", [], beside)
    assert place(labels_of(path, tmp_path)) == place(path)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said) and all(said in line for line in lines)


def test_without_rasterio_tags_and_world_files_are_kept_and_others_are_named(tmp_path, caplog, monkeypatch):
    world = place(written(tmp_path, "a.jpg", [], {"a.jgw": WORLD}))
    rpc = written(tmp_path, "b.tif", [*PLACE, KEYS], {"b_RPC.TXT": RPC_TXT})
    monkeypatch.setitem(sys.modules, "rasterio", None)
    monkeypatch.setattr("fcn_deploy.runtime.images.georeference.find_spec", lambda name: None)
    assert place(labels_of(tmp_path / "a.jpg", tmp_path)) == world
    assert not caplog.text
    found = place(labels_of(rpc, tmp_path))
    assert found[1].to_epsg() == 32633 and found[4] is None
    assert "b_RPC.TXT, which is not read; run: pip install 'fcn-deploy[gdal]'" in caplog.text


def test_a_broken_file_beside_is_one_line(tmp_path):
    path = written(tmp_path, "a.jpg", [], {"a.jgw": WORLD})
    (tmp_path / "a.jpg.aux.xml").write_text("<PAMDataset><SRS>EPSG:32632</SRS><GeoTransform>7e5, 5")
    assert place(labels_of(path, tmp_path)) == place(path)


def test_a_photo_that_is_stored_turned_and_georeferenced_is_refused(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photo(*SIZE)).save(tmp_path / "a.jpg", exif=exif)
    labels_of(tmp_path / "a.jpg", tmp_path)
    (tmp_path / "a.jgw").write_text(WORLD)
    with pytest.raises(MisuseError, match=r"a\.jpg is stored turned .* and georeferenced"):
        labels_of(tmp_path / "a.jpg", tmp_path)


def test_mosaics_and_jpeg_2000_keep_control_points_and_rpcs(tmp_path):
    points = written(tmp_path, "p.tif", [*POINTS, KEYS], {})
    rpc = written(tmp_path, "r.tif", RPC, {})
    for source in (points, rpc):
        copy(source, tmp_path / "m.vrt", driver="VRT")
        assert place(labels_of(tmp_path / "m.vrt", tmp_path)) == place(tmp_path / "m.vrt") == place(source)


@pytest.mark.slow
def test_a_folder_of_georeferenced_images_gives_labels_in_place(exports, tmp_path):
    (tmp_path / "in").mkdir()
    paths = [
        written(tmp_path / "in", "a.jpg", [], {"a.jgw": WORLD}),
        written(tmp_path / "in", "b.tif", [], {"b.tfw": WORLD}),
        written(tmp_path / "in", "c.tif", [*PLACE, KEYS, *RPC], {}),
    ]
    command("infer", exports / "narrow.engine", tmp_path / "in", "-o", tmp_path / "o")
    for path in paths:
        assert place(tmp_path / "o" / f"{path.stem}.tif") == place(path)


@pytest.mark.parametrize("keys", [KEYS, POINT_KEYS], ids=["areas", "points"])
@pytest.mark.parametrize("scale", [(10.0, -10.0, 0.0), (0.0, 0.0, 0.0), None, (20.0, 5.0, 0.0), (10.0,)])
def test_odd_pixel_scales_are_taken_as_gdal_takes_them(tmp_path, scale, keys):
    """Polygons, areas and objects lie by transform_of, labels by the tags: a negative scale set them apart."""
    tags = [] if scale is None else [(33550, "d", len(scale), scale if scale[1:] else scale[0], True)]
    for points in ([PLACE[1]], []):
        tifffile.imwrite(tmp_path / "a.tif", photo(*SIZE), photometric="rgb", extratags=[*tags, *points, keys])
        with tifffile.TiffFile(tmp_path / "a.tif") as file, rasterio.open(tmp_path / "a.tif") as expected:
            known = None if expected.transform.is_identity else tuple(expected.transform)[:6]
            assert transform_of(own_tags(file.pages.first)) == known

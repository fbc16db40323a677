"""GeoTIFFs over a grid of GDAL's own creation options: the values that rasterio reads, whole and by regions."""

import itertools
import sys

import numpy as np
import pytest
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.read import decode, read_image
from fcn_deploy.runtime.images.regions import open_regions
from fcn_deploy.runtime.images.stored import open_stored
from fcn_deploy.runtime.images.write import write_maps
from helpers import needs, photo
from PIL import Image

from fcn_deploy import DeployError, ModelCard

rasterio = needs("rasterio")
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SIZE = (37, 53)
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
COMPRESSIONS = ("LZW", "DEFLATE", "ZSTD", "LZMA", "PACKBITS", "LERC", "LERC_ZSTD", "LERC_DEFLATE")
STRIPS = {"tiled": False, "blockysize": 5}
TILES = {"tiled": True, "blockxsize": 16, "blockysize": 32}


def card(channels, dtype="float32"):
    return ModelCard(("a", "b"), channels=channels, dtype=dtype, mean=(0,) * channels, std=(1,) * channels)


def pixels(dtype, bands, bits=0):
    """[bands, H, W] that use the whole range of the type, or so many bits."""
    rng = np.random.default_rng(bands)
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 1000, (bands, *SIZE)).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = (0, 2**bits - 1) if bits else (limits.min, limits.max)
    return rng.integers(low, high, (bands, *SIZE), dtype, endpoint=True)


def grid():
    """name → (dtype, bands, bits, creation options) of some hundred files."""
    files = {}

    def add(dtype, bands, bits=0, **options):
        name = " ".join([dtype, f"{bands} bands", *(f"{key}={value}" for key, value in options.items())])
        files[name] = (dtype, bands, bits, options)

    for dtype, bands, interleave, blocks in itertools.product(DTYPES, (1, 3, 5), ("PIXEL", "BAND"), (STRIPS, TILES)):
        add(dtype, bands, interleave=interleave, **blocks)
    for compress, interleave, blocks in itertools.product(COMPRESSIONS, ("PIXEL", "BAND"), (STRIPS, TILES)):
        for dtype, bands in (("uint8", 1), ("uint16", 4), ("float32", 2)):
            add(dtype, bands, compress=compress, interleave=interleave, **blocks)
    for compress, dtype, interleave in itertools.product(("LZW", "DEFLATE", "ZSTD"), DTYPES, ("PIXEL", "BAND")):
        for predictor in (2, 3) if np.dtype(dtype).kind == "f" else (2,):
            add(dtype, 3, compress=compress, predictor=predictor, interleave=interleave, **TILES)
    for dtype, interleave, compress in itertools.product(
        ("uint8", "uint16", "int16", "float32", "float64"), ("PIXEL", "BAND"), ("NONE", "DEFLATE")
    ):
        add(dtype, 3, endianness="BIG", compress=compress, interleave=interleave, **TILES)
        add(dtype, 3, bigtiff="YES", compress=compress, interleave=interleave)
    for (dtype, bits), bands, interleave, compress in itertools.product(
        [("uint8", b) for b in (1, 2, 4, 7)] + [("uint16", b) for b in (9, 12, 15)],
        (1, 3), ("PIXEL", "BAND"), ("NONE", "DEFLATE"),
    ):  # fmt: skip
        add(dtype, bands, bits, nbits=bits, compress=compress, interleave=interleave)
    for interleave, predictor in itertools.product(("PIXEL", "BAND"), (1, 3)):
        add("float32", 2, nbits=16, compress="DEFLATE", predictor=predictor, interleave=interleave)
    for compress in ("CCITTRLE", "CCITTFAX3", "CCITTFAX4", "LZW"):
        add("uint8", 1, 1, nbits=1, compress=compress)
    for dtype, interleave, blocks in itertools.product(
        ("uint8", "uint16", "float32"), ("PIXEL", "BAND"), (STRIPS, TILES)
    ):
        add(dtype, 3, sparse_ok="TRUE", compress="DEFLATE", interleave=interleave, sparse=True, **blocks)
        add(dtype, 3, sparse_ok="TRUE", interleave=interleave, sparse=True, nodata=7, **blocks)
    for interleave, blocks in itertools.product(("PIXEL", "BAND"), (STRIPS | {"blockysize": 8}, TILES)):
        add("uint8", 1, compress="JPEG", interleave=interleave, **blocks)
        add("uint8", 3, compress="JPEG", interleave=interleave, **blocks)
        add("uint8", 4, compress="JPEG", interleave=interleave, **blocks)
    for blocks in (STRIPS | {"blockysize": 16}, TILES):
        add("uint8", 3, compress="WEBP", webp_lossless="YES", **blocks)
        add("uint8", 4, compress="WEBP", webp_lossless="YES", alpha="YES", **blocks)
    for dtype, alpha, photometric, bands in itertools.product(
        ("uint8", "uint16"), ("YES", "PREMULTIPLIED", "NO"), ("RGB", "MINISBLACK"), (2, 4)
    ):
        if photometric == "MINISBLACK" or bands == 4:
            add(dtype, bands, alpha=alpha, photometric=photometric)
    for compress, blocks in itertools.product(("NONE", "DEFLATE", "JPEG"), (STRIPS | {"blockysize": 8}, TILES)):
        for bands in (1, 3):
            add("uint8", bands, compress=compress, mask=True, **blocks)
            add("uint8", bands, compress=compress, overviews=True, **blocks)
            add("uint8", bands, compress=compress, mask=True, overviews=True, **blocks)
    add("uint8", 1, 1, nbits=1, mask=True)
    add("uint8", 1, 1, nbits=1, mask=True, overviews=True, compress="DEFLATE")
    for dtype, bits in (("uint8", 0), ("uint16", 0), ("uint8", 1)):
        add(dtype, 1, bits, photometric="MINISWHITE", **({"nbits": bits} if bits else {}))
    add("uint8", 1, photometric="PALETTE", palette=True)
    add("uint16", 1, photometric="PALETTE", palette=True, compress="DEFLATE")
    add("uint8", 1, 4, photometric="PALETTE", palette=True, nbits=4, compress="DEFLATE")
    return files


def write(path, dtype, bands, bits, options):
    """A file as GDAL writes it; its band values, [H, W, bands], as rasterio reads them."""
    options = dict(options)
    mask, overviews, sparse, palette = (options.pop(key, False) for key in ("mask", "overviews", "sparse", "palette"))
    values = pixels(dtype, bands, 8 if palette and not bits else bits)
    if options.get("compress") in ("JPEG", "WEBP"):
        values = np.moveaxis(photo(*SIZE)[:, :, [0, 1, 2, 0][:bands]], 2, 0).copy()
    profile = {"driver": "GTiff", "height": SIZE[0], "width": SIZE[1], "count": bands, "dtype": dtype} | options
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as file:
        if palette:
            file.write_colormap(1, {i: (i % 256, 255 - i % 256, 7, 255) for i in range(2 ** (bits or 8))})
        if sparse:
            file.write(values[:, :8, :16], window=((0, 8), (0, 16)))
        else:
            file.write(values)
        if mask:
            file.write_mask(np.random.default_rng(1).random(SIZE) > 0.5)
    if overviews:
        with rasterio.open(path, "r+") as file:
            file.build_overviews([2, 4])
    with rasterio.open(path) as file:
        found = np.moveaxis(file.read(), 0, 2)
    if palette:
        index = found[:, :, 0]
        found = np.stack([index, 255 - index, np.full_like(index, 7)], 2).astype(np.uint8)
    if options.get("photometric") == "MINISWHITE":
        found = (2**bits - 1 if bits else np.iinfo(dtype).max) - found
    return found


FILES = grid()


def test_the_grid_is_of_hundreds_of_files():
    assert len(FILES) >= 300


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_gdal_has_rasterios_values_whole_and_by_regions(tmp_path, caplog, name):
    dtype, bands, bits, options = FILES[name]
    path = tmp_path / "i.tif"
    expected = write(path, dtype, bands, bits, options)
    height, width, bands = expected.shape
    header = read_header(path)
    assert (header.size, header.bands, header.pages) == (SIZE, bands, 1)
    with open_stored(header, card(bands)) as stored:
        np.testing.assert_array_equal(stored.read(0, height, 0, width), expected)
        for top, bottom, left, right in ((0, 20, 3, 40), (7, 29, 0, width), (30, 37, 47, 53)):
            part = stored.read(top, bottom, left, right)
            np.testing.assert_array_equal(part, expected[top:bottom, left:right])
    assert not caplog.text
    if (dtype in ("uint16", "float32") and not bits) or options.get("mask"):  # none but uint8 is scaled
        with rasterio.open(path) as file:
            valid = np.ones(SIZE, bool) if "alpha" in str(file.colorinterp) else file.dataset_mask() > 0
        wanted = card(bands, dtype)
        found = decode(header, wanted)
        if not bits:
            np.testing.assert_array_equal(np.asarray(found), expected)
        np.testing.assert_array_equal(~np.ma.getmaskarray(found).any(2), valid)
        np.testing.assert_array_equal(read_image(path, wanted), np.where(valid[:, :, None], np.asarray(found), 0))
        with open_regions(path, wanted) as regions:
            part = regions[5:20, 7:50]
        np.testing.assert_array_equal(np.asarray(part), np.asarray(found)[5:20, 7:50])
        np.testing.assert_array_equal(~np.ma.getmaskarray(part).any(2), valid[5:20, 7:50])


@pytest.mark.parametrize("blocks", [STRIPS | {"blockysize": 16}, TILES], ids=["strips", "tiles"])
def test_jpegs_with_coarser_colours_are_those_of_other_jpegs(tmp_path, blocks):
    # GDAL's libjpeg repeats the colours of 2×2 pixels where others interpolate them.
    smooth = np.stack([np.add.outer(np.arange(37) * a, np.arange(53) * b) for a, b in ((3, 2), (1, 4), (2, 1))])
    options = {"height": 37, "width": 53, "count": 3, "dtype": "uint8", "compress": "JPEG", "photometric": "YCBCR"}
    with rasterio.open(tmp_path / "i.tif", "w", driver="GTiff", **options, **blocks) as file:
        file.write(np.clip(smooth, 0, 255).astype(np.uint8))
    with rasterio.open(tmp_path / "i.tif") as file:
        expected = np.moveaxis(file.read(), 0, 2).astype(int)
    found = read_image(tmp_path / "i.tif", card(3, "uint8"))
    assert abs(found - expected).max() <= 6
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "i.tif")))
    with open_regions(tmp_path / "i.tif", card(3, "uint8")) as regions:
        np.testing.assert_array_equal(regions[5:20, 7:50], found[5:20, 7:50])


def test_inks_are_gdals_colours(tmp_path):
    expected = write(tmp_path / "i.tif", "uint8", 4, 0, {"photometric": "CMYK"})[:, :, :3].astype(int)
    found = read_image(tmp_path / "i.tif", card(3, "uint8"))
    assert abs(found - expected).max() <= 1
    np.testing.assert_array_equal(found, np.asarray(Image.open(tmp_path / "i.tif").convert("RGB")))
    with open_regions(tmp_path / "i.tif", card(3, "uint8")) as regions:
        np.testing.assert_array_equal(regions[5:20, 7:50], found[5:20, 7:50])


@pytest.mark.parametrize("dtype", ["bool", "float32"])
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("names", [("tree",), ("road & rail", "<roof>", "Bäume")])
def test_masks_and_values_are_named_bands_for_gdal(tmp_path, dtype, tiled, names):
    maps = np.random.default_rng(0).normal(size=(len(names), 600, 530))
    maps = maps > 0 if dtype == "bool" else maps.astype(dtype)
    tags = [(33550, 12, 3, (10.0, 10.0, 0.0)), (33922, 12, 6, (0.0, 0.0, 0.0, 5e5, 5e6, 0.0)),
            (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633))]  # fmt: skip
    write_maps(tmp_path / "m.tif", maps, names, tiled=tiled, tags=tags)
    with rasterio.open(tmp_path / "m.tif") as file:
        assert file.count == len(names) and file.descriptions == names and not file.subdatasets
        assert file.crs.to_epsg() == 32633 and file.transform.c == 5e5
        np.testing.assert_array_equal(file.read(), maps)


GEO = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)}


def mosaic(folder, parts, size):
    """A VRT of GeoTIFFs that lie beside each other."""
    bands = []
    for band in (1, 2, 3):
        sources = "".join(
            f"<SimpleSource><SourceFilename relativeToVRT='1'>{name}</SourceFilename><SourceBand>{band}</SourceBand>"
            f"<SrcRect xOff='0' yOff='0' xSize='{w}' ySize='{h}'/><DstRect xOff='{left}' yOff='0' xSize='{w}' "
            f"ySize='{h}'/></SimpleSource>"
            for name, left, (h, w) in parts
        )
        bands.append(f"<VRTRasterBand dataType='UInt16' band='{band}'>{sources}</VRTRasterBand>")
    (folder / "m.vrt").write_text(
        f"<VRTDataset rasterXSize='{size[1]}' rasterYSize='{size[0]}'><SRS>EPSG:32633</SRS>"
        f"<GeoTransform>500000, 10, 0, 5000000, 0, -10</GeoTransform>{''.join(bands)}</VRTDataset>"
    )
    return folder / "m.vrt"


def test_mosaics_are_read_whole_and_by_regions_with_their_georeference(tmp_path):
    image = pixels("uint16", 3)
    for name, part in (("a.tif", image[:, :, :30]), ("b.tif", image[:, :, 30:])):
        options = {"height": 37, "width": part.shape[2], "count": 3, "dtype": "uint16"}
        with rasterio.open(tmp_path / name, "w", driver="GTiff", **options, **GEO) as file:
            file.write(part)
    path = mosaic(tmp_path, [("a.tif", 0, (37, 30)), ("b.tif", 30, (37, 23))], SIZE)
    check_gdals(path, image.transpose(1, 2, 0), tmp_path)
    assert read_image(path, card(3, "uint8")).max() == 255  # the high byte, as of every file
    (tmp_path / "b.tif").unlink()
    with pytest.raises(DeployError, match=r"cannot read .*m\.vrt as an image: .*b\.tif") as caught:
        read_image(path, card(3, "uint16"))
    assert "\n" not in str(caught.value)
    path.write_text("<VRTDataset")
    with pytest.raises(DeployError, match=r"m\.vrt"):
        read_header(path)


def test_jpeg_2000_is_read_by_regions_with_its_georeference(tmp_path):
    image = pixels("uint16", 3)
    options = {"height": 37, "width": 53, "count": 3, "dtype": "uint16", "QUALITY": 100, "REVERSIBLE": "YES"}
    with rasterio.open(tmp_path / "i.jp2", "w", driver="JP2OpenJPEG", **options, **GEO) as file:
        file.write(image)
    check_gdals(tmp_path / "i.jp2", image.transpose(1, 2, 0), tmp_path)


def check_gdals(path, expected, folder):
    header = read_header(path)
    assert (header.size, header.bands, header.dtype, header.georeferenced) == (SIZE, 3, np.uint16, True)
    np.testing.assert_array_equal(read_image(path, card(3, "uint16")), expected)
    with open_regions(path, card(3, "uint16")) as regions:
        np.testing.assert_array_equal(regions[5:20, 7:50], expected[5:20, 7:50])
        write_maps(folder / "labels.tif", np.zeros((1, *SIZE), np.uint8), ("labels",), tags=regions.tags)
    with rasterio.open(folder / "labels.tif") as labels, rasterio.open(path) as given:
        assert labels.crs == given.crs == GEO["crs"] and labels.transform == given.transform == GEO["transform"]


def test_mosaics_without_rasterio_are_one_line(tmp_path, monkeypatch):
    path = mosaic(tmp_path, [], SIZE)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(DeployError, match=r"rasterio is not installed; run: pip install 'fcn-deploy\[gdal\]'"):
        read_header(path)


@pytest.mark.parametrize("by_band", [False, True], ids=["pixels", "bands"])
@pytest.mark.parametrize("compress", ["LERC", "LERC_ZSTD", "LERC_DEFLATE"])
def test_lerc_keeps_what_is_not_a_number(tmp_path, compress, by_band):
    """Its masks say so: of a pixel, or of each band, which tifffile decodes as zeros and as pixels of other bands."""
    image = pixels("float32", 3)
    image[:, 5:20, 10:40] = np.nan
    if by_band:
        image[0, 30:] = np.nan
    for interleave, blocks in itertools.product(("PIXEL", "BAND"), (STRIPS, TILES)):
        options = {"height": 37, "width": 53, "count": 3, "dtype": "float32", "compress": compress}
        with rasterio.open(tmp_path / "i.tif", "w", driver="GTiff", interleave=interleave, **options, **blocks) as file:
            file.write(image)
        expected = np.isnan(image).any(axis=0)
        whole = decode(read_header(tmp_path / "i.tif"), card(3))
        with open_regions(tmp_path / "i.tif", card(3)) as regions:
            for found, where in ((whole, np.s_[:, :]), (regions[3:33, 7:50], np.s_[3:33, 7:50])):
                np.testing.assert_array_equal(np.ma.getmaskarray(found).any(axis=2), expected[where])
                np.testing.assert_array_equal(np.ma.getdata(found), image.transpose(1, 2, 0)[where])


def test_each_band_of_a_mosaic_has_its_own_no_data(tmp_path, caplog):
    image = pixels("uint16", 2)
    image[0, 5:20, 10:40], image[1, 5:20, 10:40] = 0, 65535
    image[0, 30, 30] = 65535  # of the other band
    bands = []
    for number, value in enumerate((0, 65535)):
        options = {"height": 37, "width": 53, "count": 1, "dtype": "uint16"}
        with rasterio.open(tmp_path / f"{number}.tif", "w", driver="GTiff", **options) as file:
            file.write(image[number : number + 1])
        bands.append(
            f'<VRTRasterBand dataType="UInt16" band="{number + 1}"><NoDataValue>{value}</NoDataValue><SimpleSource>'
            f'<SourceFilename relativeToVRT="1">{number}.tif</SourceFilename></SimpleSource></VRTRasterBand>'
        )
    path = tmp_path / "m.vrt"
    path.write_text(f'<VRTDataset rasterXSize="53" rasterYSize="37">{"".join(bands)}</VRTDataset>')
    expected = np.zeros(SIZE, bool)
    expected[5:20, 10:40] = True
    found = decode(read_header(path), card(2, "uint16"))
    np.testing.assert_array_equal(np.ma.getmaskarray(found)[:, :, 0], expected)
    assert "no-data values of their own" not in caplog.text
    named = decode(read_header(path), card(2, "uint16"), ReadOptions(no_data=7))  # instead of the file's own
    assert not np.ma.getmaskarray(named).any() or (image[:, np.ma.getmaskarray(named)[:, :, 0]] == 7).all()


@pytest.mark.parametrize(("value", "alone"), [(-1, False), (-9999, True), (0, False)])
def test_a_no_data_value_that_a_band_may_have_by_chance_is_none_in_one_band_alone(tmp_path, value, alone):
    image = np.maximum(pixels("int16", 3), 1)
    image[:, 5:20, 10:40] = value
    image[1, 30, 30] = value
    options = {"height": 37, "width": 53, "count": 3, "dtype": "int16", "nodata": value}
    with rasterio.open(tmp_path / "i.tif", "w", driver="GTiff", **options) as file:
        file.write(image)
    mask = np.ma.getmaskarray(decode(read_header(tmp_path / "i.tif"), card(3, "int16")))[:, :, 0]
    assert mask[5:20, 10:40].all() and mask.sum() == 450 + alone and mask[30, 30] == alone

"""Label files of every kind hold the classes that were stored, whatever was done to the file since."""

import importlib.util

import numpy as np
import pytest
import tifffile
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.calibration.label_files import read_labels
from fcn_deploy.runtime.engine_format.model_card import voc_palette
from helpers import needs
from PIL import Image

from fcn_deploy import DeployError

LABELS = np.uint8([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 2, 2]])
COLORS = ((10, 20, 30), (200, 0, 0), (0, 200, 0), (0, 0, 200))


def png(path, indices, palette=None, bits=None):
    image = Image.fromarray(np.asarray(indices, np.uint8))
    if palette is not None:
        image.putpalette([value for color in palette for value in color])
    image.save(path, **({} if bits is None else {"bits": bits}))
    return path


def renumbered(labels, order, colors):
    """Indices and palette as an optimiser leaves them, whose entries are classes in this order."""
    return np.argsort(order)[labels], [colors[index] for index in order]


def grey(count):
    return [(index,) * 3 for index in range(count)]


def grey_png(path, values, bits):
    """A PNG of one grey channel of few bits, which Pillow does not write by itself."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    rows = b""
    for row in values:
        flat = "".join(f"{value:0{bits}b}" for value in row)
        flat += "0" * (-len(flat) % 8)
        rows += b"\0" + bytes(int(flat[place : place + 8], 2) for place in range(0, len(flat), 8))
    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path


def grey_tiff(path, values, bits, white=False):
    """A TIFF of one grey channel of few bits, as GDAL's NBITS makes it."""
    import struct

    height, width = values.shape
    strip = b""
    for row in values:
        flat = "".join(f"{value:0{bits}b}" for value in row)
        flat += "0" * (-len(flat) % 8)
        strip += bytes(int(flat[place : place + 8], 2) for place in range(0, len(flat), 8))
    tags = [
        (256, width), (257, height), (258, bits), (259, 1), (262, 0 if white else 1), (273, 8), (277, 1), (278, height),
        (279, len(strip)),
    ]  # fmt: skip
    strip += b"\0" * (len(strip) % 2)
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory + b"\0\0\0\0")
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_labels_of_few_bits_are_what_is_stored(tmp_path, bits):
    stored = LABELS % min(1 << bits, 4)
    assert np.array_equal(read_labels(grey_png(tmp_path / "l.png", stored, bits)).values, stored)
    assert np.array_equal(read_labels(grey_tiff(tmp_path / "l.tif", stored, bits)).values, stored)
    inverted = grey_tiff(tmp_path / "w.tif", (1 << bits) - 1 - stored, bits, white=True)
    assert np.array_equal(read_labels(inverted).values, stored)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm"])
def test_colours_of_16_bits_are_all_read(tmp_path, suffix):
    needs("imagecodecs")

    def save(array):
        path = tmp_path / f"l{suffix}"
        if suffix == ".png":
            path.write_bytes(needs("imagecodecs").png_encode(array))
        elif suffix == ".tif":
            tifffile.imwrite(path, array, photometric="rgb")
        else:
            path.write_bytes(b"P6 %d %d 65535\n" % array.shape[1::-1] + array.astype(">u2").tobytes())
        return path

    thrice = np.repeat(LABELS[:, :, None], 3, axis=2).astype(np.uint16)
    np.testing.assert_array_equal(read_labels(save(thrice)).single, LABELS)
    colors = np.uint8(COLORS)[LABELS]
    np.testing.assert_array_equal(read_labels(save(colors * np.uint16(257))).values, colors)
    with pytest.raises(DeployError, match="colours of 16 bits that are none of 8"):
        read_labels(save(thrice + np.uint16([0, 1, 2])))


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint16", "float32", "float64"])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"compression": "zlib", "predictor": True}])
def test_big_endian_tiffs_are_read_as_others(tmp_path, dtype, options):
    labels = LABELS.astype(dtype)
    labels[0, 0] = 255 if dtype == "uint16" else -7
    for order in "<>":
        tifffile.imwrite(tmp_path / "l.tif", labels, byteorder=order, **options)
        np.testing.assert_array_equal(read_labels(tmp_path / "l.tif").values, labels)


def test_what_changes_labels_or_leaves_some_out_is_said_once(tmp_path, caplog):
    for name in ("a.jpg", "b.jpg"):
        Image.fromarray(LABELS).save(tmp_path / name, quality=95)
        read_labels(tmp_path / name)
    tifffile.imwrite(tmp_path / "two.tif", np.stack([LABELS, LABELS[::-1]]), photometric="minisblack")
    np.testing.assert_array_equal(read_labels(tmp_path / "two.tif").values, LABELS)
    with tifffile.TiffWriter(tmp_path / "with an overview.tif") as file:
        file.write(LABELS, subifds=0)
        file.write(LABELS[::2, ::2], subfiletype=1)
    read_labels(tmp_path / "with an overview.tif")
    first, second = (record.message for record in caplog.records)
    assert "a.jpg is a JPEG, which changes the numbers of labels" in first
    assert "two.tif holds several images; only the first" in second


@pytest.mark.parametrize("name", ["png.tif", "tif.png"])
def test_labels_are_of_the_kind_that_their_first_bytes_say(tmp_path, name):
    image, kind = Image.fromarray(LABELS), name.partition(".")[0]
    image.save(tmp_path / name, format={"png": "PNG", "tif": "TIFF"}[kind])
    np.testing.assert_array_equal(read_labels(tmp_path / name).values, LABELS)


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("l.webp", {}, "WebP"), ("l.webp", {"lossless": True}, ""), ("l.avif", {}, "AVIF"),
        ("l.jp2", {"quality_mode": "rates", "quality_layers": [20]}, "JPEG 2000"),
        ("l.tif", {"compression": "jpeg2000"}, "JPEG 2000"),
        ("l.tif", {"compression": "jpegxl"}, "JPEG XL"), ("l.tif", {"compression": "lzw"}, ""),
    ],
)  # fmt: skip
def test_compression_of_photographs_is_said_of_labels(tmp_path, caplog, name, options, kind):
    labels = np.tile(np.uint8([[0, 1], [2, 3]]), (16, 16))
    if name == "l.tif":
        tifffile.imwrite(tmp_path / name, labels, **options)
    else:
        Image.fromarray(labels).save(tmp_path / name, **options)
    read_labels(tmp_path / name)
    assert [record.message.partition(" is ")[2] for record in caplog.records] == [
        f"compressed as {kind}, which changes the numbers of labels unless it is lossless; use PNG"
    ] * bool(kind)


def test_labels_of_16_bits_are_inverted_where_0_is_white(tmp_path):
    stored = LABELS.astype(np.uint16) * 1000
    for photometric, values in (("minisblack", stored), ("miniswhite", 65535 - stored)):
        for compression in (None, "deflate"):
            tifffile.imwrite(tmp_path / "l.tif", values, photometric=photometric, compression=compression)
            assert np.array_equal(read_labels(tmp_path / "l.tif").values, stored)
    Image.fromarray(stored).save(tmp_path / "l.png")
    assert np.array_equal(read_labels(tmp_path / "l.png").values, stored)


def test_booleans_that_tifffile_wrote_are_not_turned_round(tmp_path, caplog):
    tifffile.imwrite(tmp_path / "l.tif", LABELS > 1)
    assert np.array_equal(read_labels(tmp_path / "l.tif").values, LABELS > 1) and not caplog.text
    tifffile.imwrite(tmp_path / "w.tif", 255 - LABELS, photometric="miniswhite")
    assert np.array_equal(read_labels(tmp_path / "w.tif").values, LABELS)
    assert "w.tif calls 0 white, so its numbers are turned round" in caplog.text


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, ">u2"])
def test_labels_that_are_stored_turned_are_upright(tmp_path, compression, dtype):
    wide = np.random.default_rng(0).integers(0, 3, (30, 40)).astype(dtype)
    turns = {1: wide, 3: wide[::-1, ::-1], 5: wide.T, 6: np.rot90(wide, -1), 7: np.rot90(wide.T, 2), 8: np.rot90(wide)}
    for orientation, upright in turns.items():
        options = {"compression": compression, "extratags": [(274, "H", 1, orientation, True)]}
        tifffile.imwrite(tmp_path / "l.tif", wide, byteorder=">" if dtype == ">u2" else "<", **options)
        assert np.array_equal(read_labels(tmp_path / "l.tif").values, upright), orientation
    tifffile.imwrite(tmp_path / "l.tif", wide[:, :30], extratags=[(274, "H", 1, 6, True)])
    tifffile.imwrite(tmp_path / "l.tif.msk", np.full((30, 30), 255, np.uint8))
    with pytest.raises(DeployError, match=r"stored turned .* and the mask beside it, l\.tif\.msk, is not"):
        read_labels(tmp_path / "l.tif")


@pytest.mark.parametrize("most", [15, 255, 1000, 65535])
def test_labels_of_a_pgm_are_what_is_stored(tmp_path, most):
    data = LABELS.astype(">u2" if most > 255 else np.uint8).tobytes()
    (tmp_path / "l.pgm").write_bytes(b"P5 4 3 %d\n" % most + data)
    assert np.array_equal(read_labels(tmp_path / "l.pgm").values, LABELS)
    if most == 1000:  # of text 8 bits or 16 are read
        return
    (tmp_path / "t.pgm").write_text(f"P2 4 3 {most}\n{' '.join(map(str, LABELS.ravel()))}\n")
    assert np.array_equal(read_labels(tmp_path / "t.pgm").values, LABELS)
    (tmp_path / "t.pbm").write_text(f"P1 4 3\n{' '.join(map(str, LABELS.ravel() % 2))}\n")
    assert np.array_equal(read_labels(tmp_path / "t.pbm").values, 1 - LABELS % 2)  # of a PBM 1 is black


@pytest.mark.parametrize("order", [(3, 0, 2, 1), (1, 0, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("colors", [None, COLORS, voc_palette(4)])
def test_a_palette_of_greys_in_another_order_is_read_by_its_greys(tmp_path, order, colors):
    path = png(tmp_path / "l.png", *renumbered(LABELS, order, grey(4)))
    assert np.array_equal(read_labels(path, colors).values, LABELS)


def test_greys_that_say_nothing_else_leave_the_indices(tmp_path):
    mask = LABELS % 2
    assert np.array_equal(read_labels(png(tmp_path / "m.png", mask, [(0,) * 3, (255,) * 3]), COLORS).values, mask)
    shown = [(index * 80,) * 3 for index in range(4)]
    assert np.array_equal(read_labels(png(tmp_path / "s.png", LABELS, shown), COLORS).values, LABELS)  # no class 80
    few = [(0,) * 3, (3,) * 3, (1,) * 3, (2,) * 3]  # the classes' own colours
    assert np.array_equal(read_labels(png(tmp_path / "f.png", LABELS, few), few).values, LABELS)


def test_ignored_pixels_stay_ignored_in_a_palette_of_greys(tmp_path):
    greys = [(255,) * 3, (1,) * 3, (0,) * 3, (2,) * 3]
    expected = np.uint8([255, 1, 0, 2])[LABELS]
    assert np.array_equal(read_labels(png(tmp_path / "l.png", LABELS, greys), COLORS).values, expected)


def test_the_classes_colours_in_another_order_tell_the_classes(tmp_path, caplog):
    for index, order in enumerate([(3, 0, 2, 1), (1, 0, 2, 3)]):
        path = png(tmp_path / f"{index}.png", *renumbered(LABELS, order, COLORS))
        assert np.array_equal(read_labels(path, COLORS).values, LABELS)
        assert not np.array_equal(read_labels(path).values, LABELS)  # without colours nothing tells
    assert caplog.text.count("palette in another order") == 1  # a line for a folder
    padded = [(0, 0, 0)] * 252  # a GIF's palette has entries by powers of two, and a TIFF's as many as its indices
    path = png(tmp_path / "padded.png", LABELS, [COLORS[index] for index in (3, 2, 1, 0)] + padded)
    assert np.array_equal(read_labels(path, COLORS).values, 3 - LABELS)
    for name, options in (("l.gif", {}), ("l.tif", {"compression": "tiff_lzw"})):
        Image.fromarray(np.uint8(COLORS)[LABELS]).quantize(4).save(tmp_path / name, **options)
        assert np.array_equal(read_labels(tmp_path / name, COLORS).values, LABELS)
    unset = [COLORS[0], COLORS[1], COLORS[0], COLORS[0], *padded]  # as of a mask of two classes
    assert np.array_equal(read_labels(png(tmp_path / "unset.png", LABELS, unset), COLORS).values, LABELS)
    only = np.full((2, 2), 3, np.uint8)
    assert np.array_equal(read_labels(png(tmp_path / "one.png", only * 0, [COLORS[3]]), COLORS).values, only)


def test_a_palette_in_class_order_or_of_other_colours_leaves_the_indices(tmp_path):
    others = [(9, 9, 8), (8, 7, 6), (5, 5, 1), (1, 2, 3)]
    some = [COLORS[3], COLORS[1], COLORS[2], (9, 9, 8)] + [(7, 7, 7)] * 252  # one of no class, as no optimiser leaves
    for palette in (COLORS, (*COLORS, (255, 255, 255)), others, some):
        assert np.array_equal(read_labels(png(tmp_path / "l.png", LABELS, palette), COLORS).values, LABELS)
    chance = [(0, 0, 0), (0, 128, 0), (0, 0, 128), (1, 2, 3)]  # one of them is another class's in colours nobody chose
    assert np.array_equal(read_labels(png(tmp_path / "l.png", LABELS, chance), voc_palette(4)).values, LABELS)


@pytest.mark.parametrize(
    "palette, colors, why",
    [
        ([COLORS[3], COLORS[0], COLORS[2], (9, 9, 8)], COLORS, r"one, \(9, 9, 8\), is of no class"),
        ([COLORS[3], COLORS[0], COLORS[2], COLORS[1]], (*COLORS, COLORS[3]), r"classes 3 and 4 are both \(0, 0, 200\)"),
        (voc_palette(4)[::-1], voc_palette(4), "nobody said what colours"),
    ],
)
def test_colours_that_may_mean_either_are_refused(tmp_path, palette, colors, why):
    with pytest.raises(DeployError, match=f"in another order.*{why}.*one channel of grey"):
        read_labels(png(tmp_path / "l.png", LABELS, palette), colors)


def test_a_folder_of_labelled_images_is_read_so(tmp_path):
    for name in ("train", "trainannot"):
        (tmp_path / name).mkdir()
    (tmp_path / "classes.txt").write_text("sky\nbuilding\npole\nroad\n")
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "train" / "a.png")
    png(tmp_path / "trainannot" / "a.png", LABELS)
    data = load_dataset(str(tmp_path), "train")
    colors = data.colors
    png(tmp_path / "trainannot" / "a.png", *renumbered(LABELS, (2, 3, 1, 0), colors))
    assert np.array_equal(data[0][1], LABELS)


def test_labels_with_alpha_and_of_32_bits_are_read_as_rasterio_wrote_them(tmp_path):
    rasterio = needs("rasterio")
    labels, alpha = np.tile(LABELS, (4, 5)), np.full((12, 20), 255, np.uint8)
    alpha[:, :3] = 0
    colours = {index: (*color, 255) for index, color in enumerate(COLORS)}
    options = {"driver": "GTiff", "height": 12, "width": 20, "count": 2, "dtype": "uint8", "alpha": "YES"}
    for name, more in {
        "planes": {"interleave": "BAND", "compress": "DEFLATE"}, "pixels": {}, "palette": {"photometric": "palette"},
    }.items():  # fmt: skip
        with rasterio.open(tmp_path / f"{name}.tif", "w", **options, **more) as file:
            if name == "palette":
                file.write_colormap(1, colours)
            file.write(np.stack([labels, alpha]))
        stored = read_labels(tmp_path / f"{name}.tif", COLORS)
        np.testing.assert_array_equal(stored.single, labels)
        np.testing.assert_array_equal(stored.missing, alpha == 0)
    inverted = np.dstack([255 - labels, alpha])
    tifffile.imwrite(tmp_path / "w.tif", inverted, photometric="miniswhite", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(read_labels(tmp_path / "w.tif").single, labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "w.tif").missing, alpha == 0)
    wide = labels.astype(np.uint32)
    wide[:, :3] = 2**32 - 1
    tifffile.imwrite(tmp_path / "wide.tif", wide, extratags=[(42113, "s", 0, str(2**32 - 1), True)])
    np.testing.assert_array_equal(read_labels(tmp_path / "wide.tif").missing, alpha == 0)


@pytest.mark.parametrize("options", [{}, {"compress": "DEFLATE"}, {"tiled": True, "blockxsize": 16, "blockysize": 16}])
@pytest.mark.parametrize("dtype, nodata", [("uint8", 255), ("int16", -1), ("uint8", None)])
def test_strips_and_tiles_that_a_label_file_leaves_out_hold_no_data(tmp_path, options, dtype, nodata):
    rasterio = needs("rasterio")
    common = {"driver": "GTiff", "height": 40, "width": 48, "count": 1, "SPARSE_OK": True, "blockysize": 16}
    with rasterio.open(tmp_path / "l.tif", "w", dtype=dtype, nodata=nodata, **(common | options)) as file:
        file.write(np.full((16, 48), 3, dtype), 1, window=((0, 16), (0, 48)))
    expected = np.full((40, 48), 0 if nodata is None else nodata)  # as rasterio reads it
    expected[:16] = 3
    stored = read_labels(tmp_path / "l.tif")
    np.testing.assert_array_equal(stored.values, expected)
    assert stored.nodata == nodata


@pytest.mark.parametrize("compress", ["LERC", "LERC_ZSTD"])
def test_nan_of_labels_in_lerc_is_no_class(tmp_path, compress):
    rasterio, _ = needs("rasterio"), needs("imagecodecs")
    values = np.tile(LABELS, (8, 8)).astype(np.float32)
    values[2:5, 3:9] = np.nan
    options = {"driver": "GTiff", "height": 24, "width": 32, "count": 1, "dtype": "float32", "nodata": np.nan}
    with rasterio.open(tmp_path / "l.tif", "w", compress=compress, **options) as file:
        file.write(values, 1)
    stored = read_labels(tmp_path / "l.tif")
    np.testing.assert_array_equal(stored.missing, np.isnan(values))
    assert np.array_equal(stored.values[~stored.missing], values[~np.isnan(values)])


def test_no_data_of_float16_is_what_the_type_has_of_it(tmp_path):
    values = LABELS.astype(np.float16)
    values[0] = -9999
    tifffile.imwrite(tmp_path / "l.tif", values, extratags=[(42113, "s", 0, "-9999", True)])
    stored = read_labels(tmp_path / "l.tif")
    assert stored.nodata == -10000 and np.array_equal(stored.values == stored.nodata, values < 0)


@pytest.mark.parametrize("kind", ["grey", "grey of 16 bits", "palette", "palette in another order"])
def test_what_a_png_calls_transparent_is_no_data_as_gdal_has_it(tmp_path, kind):
    path, order = tmp_path / "l.png", (3, 0, 2, 1)
    palette, values = "palette" in kind, LABELS
    if kind.endswith("order"):
        values = np.argsort(order)[LABELS].astype(np.uint8)
    picture = Image.fromarray(values.astype(np.uint16 if "16" in kind else np.uint8))
    if palette:
        picture.putpalette(
            np.uint8([COLORS[index] for index in (order if kind.endswith("order") else range(4))]).tobytes()
        )
    picture.save(path, transparency=bytes([255, 128, 0, 255]) if palette else 2)
    stored = read_labels(path, COLORS)
    np.testing.assert_array_equal(stored.values, LABELS)
    hidden = stored.nodata == LABELS if stored.missing is None else stored.missing
    np.testing.assert_array_equal(hidden, LABELS == 2)
    Image.fromarray(LABELS > 1).save(tmp_path / "bit.png", transparency=255)
    assert read_labels(tmp_path / "bit.png").nodata == 1
    if importlib.util.find_spec("rasterio"):
        with needs("rasterio").open(path) as file:
            np.testing.assert_array_equal(file.dataset_mask() == 0, hidden)


@pytest.mark.parametrize("compress", ["LZW", "ZSTD"])  # by Pillow, and by tifffile
@pytest.mark.parametrize("beside", [False, True])
def test_no_data_of_a_palette_in_another_order_is_of_its_indices(tmp_path, compress, beside):
    rasterio, _ = needs("rasterio"), needs("imagecodecs")
    order = (3, 0, 2, 1)
    options = {"driver": "GTiff", "height": 3, "width": 4, "count": 1, "dtype": "uint8", "photometric": "palette"}
    path = tmp_path / "l.tif"
    with rasterio.open(path, "w", compress=compress, nodata=None if beside else 0, **options) as file:
        file.write(np.argsort(order)[LABELS].astype(np.uint8), 1)
        file.write_colormap(1, {index: (*COLORS[place], 255) for index, place in enumerate(order)})
    if beside:
        told = '<PAMRasterBand band="1"><NoDataValue>0</NoDataValue></PAMRasterBand>'
        (tmp_path / "l.tif.aux.xml").write_text(f"<PAMDataset>{told}</PAMDataset>")
    stored = read_labels(path, COLORS)
    np.testing.assert_array_equal(stored.values, LABELS)
    np.testing.assert_array_equal(stored.missing, LABELS == 3)  # which has the index 0
    assert stored.nodata is None
    np.testing.assert_array_equal(read_labels(path, shown=True).values, np.uint8(COLORS)[LABELS])

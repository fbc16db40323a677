"""What GDAL keeps beside files, masks and no-data values, holds wherever images and labels are read."""

import logging
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.calibration.label_files import read_labels
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.read import decode
from fcn_deploy.runtime.images.regions import open_regions
from helpers import command, needs, one_error, photo
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard

RGB = ModelCard(("a", "b"))
GREY = replace(RGB, channels=1, mean=(127.5,), std=(127.5,))


def valid(path, card=RGB, **options):
    """Where a file has data; whole and by regions it must be the same."""
    options = ReadOptions(**options)
    whole = decode(read_header(path, page=options.page), card, options)
    with open_regions(path, card, options) as regions:
        part = regions[3:41, 5:33]
    np.testing.assert_array_equal(np.ma.getmaskarray(part), np.ma.getmaskarray(whole)[3:41, 5:33])
    np.testing.assert_array_equal(np.asarray(part), np.asarray(whole)[3:41, 5:33])
    return ~np.ma.getmaskarray(whole).any(axis=2)


def save(path, array, **options):
    if path.suffix == ".tif":
        tifffile.imwrite(path, array, photometric="rgb" if array.ndim == 3 else "minisblack", **options)
    else:
        Image.fromarray(array).save(path)
    return path


def save_mask(path, mask, **options):
    """As GDAL writes it; rasterio's own is compared with it below."""
    tifffile.imwrite(path.with_name(f"{path.name}.msk"), mask, photometric="minisblack", **options)


def pam(path, *values):
    bands = "".join(
        f'<PAMRasterBand band="{band}"><NoDataValue>{value}</NoDataValue></PAMRasterBand>'
        for band, value in enumerate(values, 1)
    )
    path.with_name(f"{path.name}.aux.xml").write_text(f"<PAMDataset>{bands}</PAMDataset>")


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jpg"])
@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}], ids=["strips", "tiles"])
def test_a_mask_beside_an_image_says_where_there_is_data(tmp_path, name, options):
    path = save(tmp_path / name, photo(50, 60))
    expected = np.random.default_rng(0).random((50, 60)) > 0.3
    save_mask(path, expected * np.uint8(255), **options)
    np.testing.assert_array_equal(valid(path), expected)


def test_a_mask_as_rasterio_writes_it(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="pip install 'fcn-deploy[gdal]'")
    path = save(tmp_path / "a.tif", photo(50, 60))
    expected = np.random.default_rng(0).random((50, 60)) > 0.3
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as file:
        file.write_mask(expected)
    assert (tmp_path / "a.tif.msk").exists()
    np.testing.assert_array_equal(valid(path), expected)
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.dataset_mask() > 0, expected)


@pytest.mark.parametrize("internal", [False, True])
def test_a_palette_has_no_data_by_its_index_and_by_a_mask(tmp_path, internal):
    rasterio = pytest.importorskip("rasterio", reason="pip install 'fcn-deploy[gdal]'")
    indices, mask = photo(50, 60)[:, :, 0] % 7, np.random.default_rng(0).random((50, 60)) > 0.3
    told = {"driver": "GTiff", "height": 50, "width": 60, "count": 1, "dtype": "uint8", "photometric": "palette"}
    inside = rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal)
    with inside, rasterio.open(tmp_path / "a.tif", "w", nodata=3, **told) as file:
        file.write(indices, 1)
        file.write_colormap(1, {index: (index, 9, 9, 255) for index in range(7)})
        file.write_mask(mask)
    np.testing.assert_array_equal(valid(tmp_path / "a.tif"), mask & (indices != 3))


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.bmp"])
def test_a_palette_of_other_formats_has_no_data_by_its_index_too(tmp_path, name):
    indices, path = photo(50, 60)[:, :, 0] % 7, tmp_path / name
    image = Image.fromarray(indices, "P")
    image.putpalette([3] * 9 + [number for index in range(3, 7) for number in (index, 9, 9)])
    image.save(path)
    stored = np.asarray(Image.open(path))
    np.testing.assert_array_equal(valid(path, no_data=3), stored != 3)
    pam(path, 4)
    np.testing.assert_array_equal(valid(path), stored != 4)
    save_mask(path, (np.arange(3000).reshape(50, 60) % 2) * np.uint8(255))
    np.testing.assert_array_equal(valid(path), (stored != 4) & (np.arange(3000).reshape(50, 60) % 2 > 0))


def test_no_data_beside_a_file_is_of_its_first_image(tmp_path):
    first, second = (Image.fromarray(photo(50, 60, seed)[:, :, 0] % 7, "P") for seed in (0, 1))
    for image in (first, second):
        image.putpalette([3] * 9 + [number for index in range(3, 7) for number in (index, 9, 9)])
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    pam(tmp_path / "a.gif", 3)
    assert not valid(tmp_path / "a.gif").all()
    assert valid(tmp_path / "a.gif", page=1).all()


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_values_of_all_bands_that_are_no_data_together(tmp_path, name):
    image = photo(50, 60) % 4
    path = save(tmp_path / name, image)
    expected = ~(image == (1, 0, 2)).all(axis=2)
    if name == "a.tif":
        rasterio = pytest.importorskip("rasterio", reason="pip install 'fcn-deploy[gdal]'")
        with rasterio.open(path, "r+") as file:
            file.update_tags(NODATA_VALUES="1 0 2")
        with rasterio.open(path) as file:
            np.testing.assert_array_equal(file.dataset_mask() > 0, expected)
    else:
        told = '<PAMDataset><Metadata><MDI key="NODATA_VALUES">1 0 2</MDI></Metadata></PAMDataset>'
        path.with_name(f"{name}.aux.xml").write_text(told)
    assert 0 < (~expected).sum() < 500
    np.testing.assert_array_equal(valid(path), expected)
    np.testing.assert_array_equal(valid(path, GREY, channels=(1,)), expected)
    np.testing.assert_array_equal(valid(path, no_data=3), ~(image == 3).all(axis=2))


def test_channels_that_are_chosen_keep_the_alpha_and_the_mask_of_their_file(tmp_path):
    image, alpha = photo(50, 60) % 4, np.full((50, 60), 255, np.uint8)
    alpha[:9] = 0
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.dstack([image, alpha]), photometric="rgb", extrasamples=["unassalpha"])
    told = '<PAMDataset><Metadata><MDI key="NODATA_VALUES">1 0 2 255</MDI></Metadata></PAMDataset>'
    path.with_name("a.tif.aux.xml").write_text(told)
    expected = (alpha > 0) & ~(image == (1, 0, 2)).all(axis=2)
    np.testing.assert_array_equal(valid(path, GREY, channels=(1,)), expected)
    np.testing.assert_array_equal(valid(path, channels=(2, 1, 0)), expected)


def test_values_of_bands_in_float32_that_are_no_data_together_are_what_float32_makes_of_them(tmp_path):
    image = np.random.default_rng(0).random((50, 60, 3), np.float32)
    image[7:9, 3:20] = 0.1, 0.2, -3.40282346638529e38
    path = save(tmp_path / "a.tif", image)
    told = "<Item name='NODATA_VALUES'>0.1 0.2 -3.40282346638529e+38</Item>".replace("'", '"')
    path.with_name("a.tif.aux.xml").write_text(f"<PAMDataset><Metadata>{told}</Metadata></PAMDataset>")
    expected = image[:, :, 2] >= 0
    card = replace(RGB, dtype="float32", mean=(0.5,) * 3, std=(0.5,) * 3)
    grey = replace(GREY, dtype="float32", mean=(0.5,), std=(0.5,))
    np.testing.assert_array_equal(valid(path, card), expected)
    np.testing.assert_array_equal(valid(path, grey, channels=(1,)), expected)


def test_a_grey_of_16_bits_that_is_transparent_is_no_data(tmp_path):
    image = photo(50, 60)[:, :, 0].astype(np.uint16) * 200
    Image.fromarray(image).save(tmp_path / "a.png", transparency=int(image[7, 9]))
    card = replace(GREY, dtype="uint16")
    np.testing.assert_array_equal(valid(tmp_path / "a.png", card), image != image[7, 9])


@pytest.mark.parametrize("name", ["a.tif", "a.jpg"])
def test_margins_that_a_compression_has_frayed_are_named(tmp_path, caplog, name):
    needs("imagecodecs")
    image = np.full((200, 300, 3), 200, np.uint8)
    image[np.add.outer(np.arange(200), np.arange(300)) < 150] = 0  # a scene that is turned on its grid
    path, said = tmp_path / name, {} if name == "a.tif" else {"no_data": 0}
    options = {"compression": "jpeg", "extratags": [(42113, "s", 0, "0", True)]} if name == "a.tif" else {}
    save(path, image, **options)
    with pytest.raises(MisuseError, match=r"compressed as JPEG.*no-data value 0 .*get classes.*nearblack.*--strict"):
        valid(path, strict=True, **said)
    save_mask(path, (image[:, :, 0] > 0) * np.uint8(255))
    np.testing.assert_array_equal(valid(path, strict=True, **said), image[:, :, 0] > 0)
    tifffile.imwrite(tmp_path / "b.tif", image, photometric="rgb", extratags=[(42113, "s", 0, "0", True)])
    valid(tmp_path / "b.tif", strict=True)
    night = np.abs(np.random.default_rng(0).normal(0, 6, image.shape)).astype(np.uint8)
    save(path, night, **options)
    path.with_name(f"{name}.msk").unlink()
    assert not valid(path, strict=True, **said).all()  # single pixels that are black, and no margin
    assert not caplog.text


def test_a_mask_that_cannot_be_meant_is_refused(tmp_path):
    path = save(tmp_path / "a.png", photo(50, 60))
    save_mask(path, np.zeros((25, 30), np.uint8))
    with pytest.raises(DeployError, match=r"a\.png\.msk, the mask of a\.png, is 25×30 and the image 50×60"):
        valid(path)
    (tmp_path / "a.png.msk").write_bytes(b"")
    with pytest.raises(DeployError, match=r"cannot read .*a\.png\.msk, the mask of a\.png.*mend or remove it"):
        valid(path)
    exif = Image.Exif()
    exif[274] = 6
    turned = tmp_path / "t.jpg"
    Image.fromarray(photo(50, 60)).save(turned, exif=exif)
    save_mask(turned, np.zeros((50, 60), np.uint8))
    with pytest.raises(MisuseError, match=r"stored turned.*t\.jpg\.msk, is not; turn the image upright"):
        valid(turned)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_a_no_data_value_beside_an_image_is_one_and_before_its_own_tag(tmp_path, name):
    array = photo(50, 60)[:, :, 0] // 2
    array[:9], array[40:] = 7, 3
    path = tmp_path / name
    tags = {"extratags": [(42113, "s", 0, "3", True)]} if name == "a.tif" else {}
    save(path, array, **tags)
    pam(path, 7)
    np.testing.assert_array_equal(valid(path, GREY), array != 7)
    np.testing.assert_array_equal(valid(path, GREY, no_data=3), array != 3)  # what is said wins
    rasterio = pytest.importorskip("rasterio", reason="pip install 'fcn-deploy[gdal]'")
    with rasterio.open(path) as file:
        assert file.nodata == 7


def test_bands_with_no_data_values_of_their_own_are_named(tmp_path, caplog):
    path = save(tmp_path / "a.tif", photo(50, 60))
    pam(path, 7, 7, 9)
    valid(path)
    assert "bands with no-data values of their own (7, 7, 9), of which 7 is taken for all" in caplog.text
    with pytest.raises(MisuseError, match="refused by --strict"):
        valid(path, strict=True)
    pam(path, 7, 7, 7)
    caplog.clear()
    valid(path, strict=True)
    path.with_name("a.tif.aux.xml").write_text("<PAMDataset><PAMRasterBand band='1'><NoDataValue>x</NoDataValue>")
    assert valid(path).all() and not caplog.text


def test_a_vrt_with_a_mask_of_its_own(tmp_path):
    rasterio = pytest.importorskip("rasterio", reason="pip install 'fcn-deploy[gdal]'")
    array, expected = photo(50, 60), np.ones((50, 60), bool)
    expected[:, :20] = False
    save(tmp_path / "a.tif", array)
    save(tmp_path / "m.tif", expected * np.uint8(255))
    part = '<{tag}><SourceFilename relativeToVRT="1">{name}</SourceFilename><SourceBand>{band}</SourceBand></{tag}>'
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}">{part.format(tag="SimpleSource", name="a.tif", band=band)}'
        "</VRTRasterBand>"
        for band in (1, 2, 3)
    )
    source = part.format(tag="SimpleSource", name="m.tif", band=1)
    mask = f'<MaskBand><VRTRasterBand dataType="Byte">{source}</VRTRasterBand></MaskBand>'
    vrt = tmp_path / "a.vrt"
    vrt.write_text(f'<VRTDataset rasterXSize="60" rasterYSize="50">{bands}{mask}</VRTDataset>')
    with rasterio.open(vrt) as file:
        np.testing.assert_array_equal(file.dataset_mask() > 0, expected)
    np.testing.assert_array_equal(valid(vrt), expected)


def test_labels_heed_what_is_beside_them_and_beside_their_images(tmp_path):
    labels = np.random.default_rng(0).integers(0, 2, (50, 60), np.uint8)
    for folder in ("train", "trainannot"):
        (tmp_path / folder).mkdir()
    (tmp_path / "classes.txt").write_text("a\nb\n")
    image, file = save(tmp_path / "train/a.tif", photo(50, 60)), tmp_path / "trainannot/a.tif"
    stored = labels.copy()
    stored[:5] = 9
    save(file, stored)
    pam(file, 9)
    outside = np.zeros((50, 60), bool)
    outside[:, :20] = True
    save_mask(image, ~outside * np.uint8(255))
    inside = np.full((50, 60), 255, np.uint8)
    inside[40:] = 0
    save_mask(file, inside)
    data = load_dataset(str(tmp_path), "train")
    expected = np.where(outside, 255, labels)
    expected[:5] = expected[40:] = 255
    np.testing.assert_array_equal(data[0][1], expected)
    np.testing.assert_array_equal(data.labels(0).labels, expected)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_labels_are_turned_upright_as_images_are(tmp_path, suffix):
    labels = np.random.default_rng(0).integers(0, 200, (40, 40), np.uint8)  # square: no size betrays it
    exif = Image.Exif()
    exif[274] = 6
    stored = np.rot90(labels, 1)
    picture = Image.fromarray(stored if suffix == ".png" else np.repeat(stored[:, :, None], 3, 2))
    picture.save(tmp_path / f"a{suffix}", exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    np.testing.assert_array_equal(read_labels(tmp_path / f"a{suffix}").single, labels)


def test_inverted_grey_with_alpha_or_a_no_data_value(tmp_path):
    """Where 0 is white, the tag is of what is stored, and alpha is not inverted."""
    array = np.random.default_rng(0).integers(0, 255, (50, 60), np.uint8)
    alpha = np.full_like(array, 255)
    alpha[:10] = 0
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.dstack([array, alpha]), photometric="miniswhite", extrasamples=["unassalpha"])
    np.testing.assert_array_equal(valid(path, GREY), alpha > 0)
    shown = np.asarray(decode(read_header(path), GREY))[:, :, 0]
    np.testing.assert_array_equal(shown[10:], 255 - array[10:])
    array[20:30] = 255
    for options in ({}, {"tile": (16, 16), "compression": "zlib"}):
        tags = [(42113, "s", 0, "255", True)]
        tifffile.imwrite(path, array, photometric="miniswhite", extratags=tags, **options)
        np.testing.assert_array_equal(valid(path, GREY), array != 255)
        assert read_labels(path).nodata == 0  # of labels 255 - what is stored
        np.testing.assert_array_equal(read_labels(path).single, 255 - array)


FILLED = {"int16": (-32768, -9999), "float32": (-9999, -3.4028235e38, 1e20)}


@pytest.mark.parametrize(("dtype", "fill"), [(dtype, fill) for dtype, fills in FILLED.items() for fill in fills])
def test_a_value_that_looks_like_no_data_without_a_tag_is_asked_about(tmp_path, caplog, dtype, fill):
    caplog.set_level(logging.WARNING)
    array = np.random.default_rng(0).normal(300, 50, (60, 70)).astype(dtype)
    path, card = tmp_path / "a.tif", replace(GREY, dtype=dtype, mean=(300,), std=(50,))
    tifffile.imwrite(path, array)
    assert valid(path, card, strict=True).all()
    array[30, 30:32] = fill  # so few that no percentile sees them
    tifffile.imwrite(path, array)
    assert valid(path, card).all()
    said = next(record.message for record in caplog.records if "if it is no data" in record.message)
    remedy = said.split("--nodata ")[1].split(";")[0]
    with pytest.raises(MisuseError, match=r"if it is no data, say so with --nodata .* \(refused by --strict\)"):
        valid(path, card, strict=True)
    found = valid(path, card, no_data=float(remedy), strict=True)
    np.testing.assert_array_equal(found, array != np.dtype(dtype).type(fill))


def test_training_names_a_value_that_would_spoil_its_normalisation(tmp_path):
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in (split, f"{split}annot"):
            (tmp_path / folder).mkdir()
        image = random.normal(300, 50, (64, 64)).astype(np.int16)
        image[:20] = -32768
        tifffile.imwrite(tmp_path / split / "a.tif", image)
        Image.fromarray(random.integers(0, 2, (64, 64), np.uint8)).save(tmp_path / f"{split}annot/a.png")
    train = ("train-fcn", "--data", tmp_path, "-o", tmp_path / "m.safetensors", "--channels", "1", "--dtype", "int16")
    said = one_error(command(*train, "--no-pretrained", "--width", "0.25", "--epochs", "1", "--strict", ok=2))
    assert "holds -32768 in 0.31 of the pixels" in said and "--nodata -32768" in said


def test_complex_numbers_are_refused_and_not_cut_in_half(tmp_path):
    array = np.full((20, 30), 3 + 4j, np.complex64)
    tifffile.imwrite(tmp_path / "a.tif", array)
    np.save(tmp_path / "a.npy", array)
    card = replace(GREY, dtype="float32", mean=(0.5,), std=(0.25,))
    for name in ("a.tif", "a.npy"):
        with pytest.raises(MisuseError, match=rf"{name} holds complex numbers; save what the network shall see"):
            decode(read_header(tmp_path / name), card, ReadOptions(input_range=(0, 10)))


TAGS = {
    "0 0 0": 0, "7 8 9": 7, "0,0": 0, "255,5": 255.5, "1e3": 1000, "255.0": 255,
    "-3.4028234663852886e+038": -3.4028235e38, " -9999 ": -9999, ".5": 0.5, "inf": np.inf,
}  # fmt: skip


@pytest.mark.parametrize("text", TAGS)
def test_a_no_data_tag_is_the_number_that_gdal_reads(tmp_path, text, caplog):
    path, card = tmp_path / "a.tif", replace(GREY, dtype="float32", mean=(0.5,), std=(0.25,))
    array = np.random.default_rng(0).random((50, 60)).astype(np.float32)
    array[:10] = TAGS[text]
    tifffile.imwrite(path, array, extratags=[(42113, "s", 0, text, True)])
    np.testing.assert_array_equal(valid(path, card), array != np.float32(TAGS[text]))
    assert not caplog.text  # of tifffile's, which reads such tags otherwise
    rasterio = pytest.importorskip("rasterio", reason="pip install 'fcn-deploy[gdal]'")
    with rasterio.open(path) as file:
        assert np.float32(file.nodata) == np.float32(TAGS[text])


@pytest.mark.parametrize("text", ["none", "n/a", "0x10", "1.#INF"])
def test_a_no_data_tag_without_a_number_is_named(tmp_path, text, caplog):
    path = save(tmp_path / "a.tif", photo(50, 60), extratags=[(42113, "s", 0, text, True)])
    assert valid(path).all()
    assert f"begins with no number ({text!r}), and is ignored: name the value with --nodata" in caplog.text
    with pytest.raises(MisuseError, match="refused by --strict"):
        valid(path, strict=True)
    valid(path, strict=True, no_data=0)  # what is said settles it


def test_palettes_of_tiffs_and_mosaics_have_the_no_data_and_colours_of_gdal(tmp_path):
    rasterio, shutil = needs("rasterio"), needs("rasterio.shutil")
    indices, alpha = photo(50, 60)[:, :, 0] % 4, np.full((50, 60), 255, np.uint8)
    alpha[:, :9] = 0
    colours = {index: (40 * index % 256, 255 - index, 7, 255) for index in range(256)}
    shown = np.array([colours[index][:3] for index in range(256)], np.uint8)[indices]
    options = {"driver": "GTiff", "height": 50, "width": 60, "dtype": "uint8", "photometric": "palette"}
    with rasterio.open(tmp_path / "a.tif", "w", count=1, nodata=2, **options) as file:
        file.write_colormap(1, colours)
        file.write(indices, 1)
    shutil.copy(tmp_path / "a.tif", tmp_path / "a.vrt", driver="VRT")
    for name in ("a.tif", "a.vrt"):
        np.testing.assert_array_equal(valid(tmp_path / name), indices != 2)
        np.testing.assert_array_equal(valid(tmp_path / name, no_data=3.0), indices != 3)
        np.testing.assert_array_equal(decode(read_header(tmp_path / name), RGB).data, shown)
    with rasterio.open(tmp_path / "few.tif", "w", count=1, NBITS=4, **options) as file:  # 16 colours
        file.write_colormap(1, dict(list(colours.items())[:16]))
        file.write(indices, 1)
    shutil.copy(tmp_path / "few.tif", tmp_path / "few.vrt", driver="VRT")
    np.testing.assert_array_equal(decode(read_header(tmp_path / "few.vrt"), RGB), shown)
    text = (tmp_path / "few.vrt").read_text()
    entries = [line for line in text.splitlines(keepends=True) if "<Entry" in line]
    (tmp_path / "few.vrt").write_text(text.replace("".join(entries[3:]), ""))
    with pytest.raises(DeployError, match="pixels of none of its palette's 3 colours"):
        decode(read_header(tmp_path / "few.vrt"), RGB)
    with rasterio.open(tmp_path / "b.tif", "w", count=2, alpha="YES", **options) as file:
        file.write_colormap(1, colours)
        file.write(np.stack([indices, alpha]))
    np.testing.assert_array_equal(valid(tmp_path / "b.tif"), alpha > 0)
    table = np.array([colours[index][:3] for index in range(256)], np.uint16).T  # 8 bits, where 16 belong
    tifffile.imwrite(tmp_path / "c.tif", indices, photometric="palette", colormap=table)
    np.testing.assert_array_equal(decode(read_header(tmp_path / "c.tif"), RGB), shown)


@pytest.mark.parametrize("bits", [1, 2, 4, 16])
def test_a_grey_of_a_png_that_is_transparent_is_no_data_whatever_its_bits(tmp_path, bits):
    grey = np.random.default_rng(0).integers(0, 2**bits, (50, 64), np.uint16)
    transparent = int(grey[7, 8])
    rows = np.unpackbits(grey.astype(">u2").view(np.uint8).reshape(50, 64, 2), axis=2)[:, :, 16 - bits :]
    lines = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 64, 50, bits, 0, 0, 0, 0)), (b"tRNS", struct.pack(">H", transparent)),
             (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]  # fmt: skip
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    np.testing.assert_array_equal(valid(tmp_path / "a.png", GREY), grey != transparent)


@pytest.mark.parametrize(
    ("dtype", "fill", "text"),
    [
        ("float32", -3.4028234663852886e38, "-3.4028e+38"),
        ("float64", -1.7976931348623157e308, "-1.79769313486232e+308"),  # as ArcGIS writes it, beyond all floats
        ("float64", 1e20, "1e20"),
        ("uint64", 2**64 - 1, "18446744073709551615"),
        ("int64", 2**63 - 1, "9223372036854775807"),
        ("int64", -(2**63), "-9223372036854775808"),
    ],
)
def test_no_data_at_the_ends_of_wide_types_is_found_in_images_and_labels(tmp_path, dtype, fill, text):
    array = np.random.default_rng(0).integers(0, 3, (50, 60)).astype(dtype)
    array[:, :9] = fill
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", extratags=[(42113, "s", 0, text, True)])
    np.testing.assert_array_equal(valid(tmp_path / "a.tif", GREY, input_range=(0, 3))[20], np.arange(60) >= 9)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.tif").missing[20], np.arange(60) < 9)


def test_what_gdal_calls_the_bands_is_heeded(tmp_path, caplog):
    rasterio = needs("rasterio")
    bands = np.random.default_rng(0).integers(0, 256, (4, 50, 60), np.uint8)

    def save_called(name, *colours, **options):
        with rasterio.open(tmp_path / name, "w", driver="GTiff", height=50, width=60, count=len(colours), dtype="uint8",
                           **options) as file:  # fmt: skip
            file.write(bands[: len(colours)])
            file.colorinterp = [rasterio.enums.ColorInterp[colour] for colour in colours]
        return tmp_path / name

    near_infrared = save_called("n.tif", "red", "green", "blue", "nir")  # rasterio's tags call it alpha
    assert valid(near_infrared).all() and not caplog.text
    reversed_ = save_called("b.tif", "blue", "green", "red")
    assert valid(reversed_).all()
    assert "its bands are blue, green, red" in caplog.text and "--channel 2,1,0" in caplog.text
    caplog.clear()
    assert valid(reversed_, channels=(2, 1, 0)).all() and not caplog.text
    four = save_called("f.tif", "blue", "green", "red", "nir", photometric="MINISBLACK")
    with pytest.raises(MisuseError, match="say which with label-images --channel, such as 2,1,0"):
        valid(four)

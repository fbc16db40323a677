"""Image files of every kind come in as a user would expect; labels and overlays go out."""

import ast
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.engine_format.model_card import voc_palette
from fcn_deploy.runtime.images.find import IMAGE_SUFFIXES, find_images, find_placed
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.overlay import overlay, overlay_sheet
from fcn_deploy.runtime.images.read import decode, read_image
from fcn_deploy.runtime.images.regions import open_regions
from fcn_deploy.runtime.images.write import write_labels
from helpers import ROOT, needs, photo
from PIL import Image, PngImagePlugin

from fcn_deploy import DeployError, MisuseError, ModelCard

RGB = ModelCard(("background", "thing", "other"))
GREY = ModelCard(("a", "b"), channels=1, mean=(0,), std=(1,))


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)


def save(path, array, mode=None, **options):
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "ppm", "npy"])
def test_lossless_colour_files_come_in_as_they_are(tmp_path, picture, suffix):
    path = tmp_path / f"x.{suffix}"
    if suffix == "npy":
        np.save(path, picture)
    else:
        save(path, picture, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(path, RGB), picture)


def test_grey_becomes_three_equal_channels_and_colour_becomes_grey(tmp_path, picture):
    grey = picture[:, :, 0]
    np.testing.assert_array_equal(read_image(save(tmp_path / "g.png", grey), RGB), np.stack([grey] * 3, 2))
    assert read_image(save(tmp_path / "c.png", picture), GREY).shape == (13, 17, 1)


def test_alpha_is_dropped(tmp_path, picture):
    rgba = np.dstack([picture, np.full((13, 17), 7, np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba), RGB), picture)
    la = save(tmp_path / "la.png", picture, "LA")
    assert read_image(la, RGB).shape == (13, 17, 3)


def test_palette_images_show_their_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png", RGB)[0].tolist() == [[10, 20, 30], [200, 100, 50]]


@pytest.mark.parametrize(("card", "mode"), [(RGB, "RGB"), (GREY, "L")])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_upright_pictures_in_the_cards_colours_are_not_copied(tmp_path, picture, monkeypatch, card, mode, suffix):
    path = save(tmp_path / f"x.{suffix}", picture, mode)
    monkeypatch.setattr(Image.Image, "copy", lambda self: pytest.fail("Pillow copied the picture"))
    assert read_image(path, card).shape == (13, 17, card.channels)


def test_cmyk_jpegs_become_rgb(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[:, :, 0] = 255
    image = read_image(save(tmp_path / "c.jpg", red, "CMYK", quality=95), RGB)
    assert image.shape == (16, 16, 3) and (abs(image.astype(int) - red) < 40).all()


def deep_files(folder):
    """Colours of more than 8 bits in every kind of file: name → the values stored."""
    imagecodecs = needs("imagecodecs")
    colours = np.random.default_rng(0).integers(0, 65536, (13, 17, 3), np.uint16)
    (folder / "c.png").write_bytes(imagecodecs.png_encode(colours))
    (folder / "c.jp2").write_bytes(imagecodecs.jpeg2k_encode(colours, codecformat="jp2", reversible=True, level=0))
    (folder / "c.ppm").write_bytes(b"P6\n# a comment\n17 13\n65535\n" + colours.astype(">u2").tobytes())
    (folder / "g.pgm").write_bytes(b"P5 17 13 4095\n" + (colours[:, :, :1] >> 4).astype(">u2").tobytes())
    return {"c.png": colours, "c.jp2": colours, "c.ppm": colours, "g.pgm": colours[:, :, :1] >> 4}


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_colours_of_sixteen_bits_stay_whole_for_a_card_that_wants_them(tmp_path, dtype):
    for name, values in deep_files(tmp_path).items():
        channels = values.shape[2]
        card = ModelCard(("a", "b"), channels=channels, dtype=dtype, mean=(0,) * channels, std=(1,) * channels)
        np.testing.assert_array_equal(read_image(tmp_path / name, card), values)
        header = read_header(tmp_path / name)
        assert (header.size, header.bands, header.dtype) == ((13, 17), channels, np.uint16)


def test_colours_of_sixteen_bits_lose_their_low_bits_for_a_card_of_eight(tmp_path):
    for name, values in deep_files(tmp_path).items():
        found = read_image(tmp_path / name, RGB).astype(int)
        assert abs(found - (values >> (4 if name == "g.pgm" else 8))).max() <= 1, name


def test_deep_files_that_are_cut_off_or_want_a_package_are_one_line(tmp_path, monkeypatch):
    card = ModelCard(("a", "b"), dtype="uint16")
    deep_files(tmp_path)
    (tmp_path / "text.ppm").write_text("P3 1 1 65535\n1 2 3\n")
    for name in ("c.png", "c.ppm"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut.{name}").write_bytes(content[: len(content) // 2])
    for name in ("cut.c.png", "cut.c.ppm", "text.ppm"):
        with pytest.raises(DeployError) as caught:
            read_image(tmp_path / name, card)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(DeployError, match=r"imagecodecs is not installed; run: pip install 'fcn-deploy\[tiff\]'"):
        read_image(tmp_path / "c.png", card)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("r.png", "r.tif"):
        image = read_image(save(tmp_path / name, ramp), RGB)
        np.testing.assert_array_equal(image[:, :, 1], ramp >> 8)
    tifffile.imwrite(tmp_path / "rgb16.tif", np.stack([ramp] * 3, 2), photometric="rgb")
    np.testing.assert_array_equal(read_image(tmp_path / "rgb16.tif", RGB)[:, :, 2], ramp >> 8)


@pytest.mark.parametrize(
    "kind", ["PNG of 2 bits", "PNG of 4 bits", "PGM to 15", "PPM to 15", "PGM to 4095", "16-bit RGB PNG"]
)
def test_numbers_that_are_spoken_of_are_those_of_the_file(tmp_path, kind):
    """Pillow spreads few bits over 0 to 255, PGM's over 0 to 65535, and drops bytes; what a user says is of files."""
    bits = {"2": 2, "4": 4, "15": 4, "4095": 12}.get(kind.removesuffix(" bits").split()[-1], 16)
    bands = 3 if kind.startswith(("PPM", "16")) else 1
    stored = np.random.default_rng(0).integers(0, 2**bits, (12, 16, bands)).astype(np.uint8 if bits < 8 else np.uint16)
    stored[:2] = 3
    path = tmp_path / "x.img"
    if kind.startswith("PNG"):
        per = 8 // bits
        rows = sum(stored[:, place::per, 0] << (8 - bits * (place + 1)) for place in range(per)).astype(np.uint8)

        def chunk(name, content):
            return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

        head, lines = struct.pack(">IIBBBBB", 16, 12, bits, 0, 0, 0, 0), b"".join(b"\0" + row.tobytes() for row in rows)
        chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    elif kind.startswith("P"):
        content = stored.astype(">u2") if bits > 8 else stored
        path.write_bytes(f"{'P6' if bands == 3 else 'P5'}\n16 12\n{2**bits - 1}\n".encode() + content.tobytes())
    else:
        imagecodecs = needs("imagecodecs")
        path.write_bytes(imagecodecs.png_encode(stored))
    most = 2**bits - 1
    spread = np.rint(stored / most * 255)
    for channels in (1, 3):
        card = ModelCard(("a", "b"), channels=channels, mean=(0,) * channels, std=(1,) * channels)
        whole = decode(read_header(path), card, ReadOptions(input_range=(0, most)))
        with open_regions(path, card, ReadOptions(input_range=(0, most), no_data=3)) as image:
            parts = image[:, :]
        luma = channels < bands
        wanted = spread @ np.array([0.299, 0.587, 0.114])[:, None] if luma else spread
        assert abs(whole.astype(float) - wanted).max() <= (
            0.51 if not luma else 1 if bits > 8 else 9
        )  # luma has as many bits
        hidden = np.ma.getmaskarray(parts)[:, :, 0]
        assert hidden[:2].all() and (luma or np.array_equal(hidden, (stored == 3).all(axis=2)))
        np.testing.assert_array_equal(np.asarray(parts), whole)
    wide = ModelCard(("a", "b"), channels=bands, dtype="uint16", mean=(0,) * bands, std=(1,) * bands)
    np.testing.assert_array_equal(read_image(path, wide), stored)


def test_bilevel_images_are_black_and_white(tmp_path):
    bits = np.array([[True, False], [False, True]])
    image = read_image(save(tmp_path / "b.png", bits), RGB)
    assert image[:, :, 0].tolist() == [[255, 0], [0, 255]]


def test_rotated_jpegs_are_turned_upright(tmp_path):
    flat = np.zeros((20, 40, 3), np.uint8)
    flat[:, :20] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    image = read_image(save(tmp_path / "r.jpg", flat, exif=exif.tobytes(), quality=95), RGB)
    assert image.shape == (40, 20, 3)
    assert image[:15].mean() > 240 and image[25:].mean() < 15


def test_a_deep_png_is_turned_by_tags_before_or_after_its_pixels_and_decoded_once(tmp_path, monkeypatch):
    codecs = needs("imagecodecs")
    stored = np.arange(4 * 6 * 3, dtype=np.uint16).reshape(4, 6, 3) * 700
    content = codecs.png_encode(stored)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("Pillow decodes it"))
    for place, turns in ((33, 1), (-12, 1), (None, 0)):  # after IHDR, before IEND
        (tmp_path / "d.png").write_bytes(content if place is None else content[:place] + chunk + content[place:])
        wide = ModelCard(("a", "b"), dtype="uint16", mean=(0,) * 3, std=(1,) * 3)
        np.testing.assert_array_equal(read_image(tmp_path / "d.png", wide), np.rot90(stored, -turns))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_animations_the_first_image_is_used_and_that_is_said(tmp_path, picture, caplog, suffix):
    frames = [Image.fromarray(np.full((9, 8, 3), value, np.uint8)) for value in (0, 120, 240)]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / f"x.{suffix}", RGB).max() < 10
    assert "only the first is used" in caplog.text and "3" in caplog.text


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_many_bands_from_tiff_and_npy(tmp_path, dtype, planar):
    card = ModelCard(("a", "b"), channels=5, dtype=dtype, mean=(0,) * 5, std=(1,) * 5)
    image = np.random.default_rng(0).uniform(0, 60000, (11, 13, 5)).astype(dtype)
    stored = image if planar == "contig" else np.moveaxis(image, 2, 0)
    tifffile.imwrite(tmp_path / "x.tif", stored, planarconfig=planar, photometric="minisblack")
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", card), image)
    np.save(tmp_path / "x.npy", image)
    np.testing.assert_array_equal(read_image(tmp_path / "x.npy", card), image)


def test_alpha_of_planar_tiffs_is_dropped_and_not_columns(tmp_path):
    card = ModelCard(("a", "b"), dtype="uint16")
    image = np.random.default_rng(0).integers(0, 60000, (20, 30, 4), np.uint16)
    for planar, stored in (("separate", np.moveaxis(image, 2, 0)), ("contig", image)):
        tifffile.imwrite(
            tmp_path / "x.tif", stored, planarconfig=planar, photometric="rgb", extrasamples=["unassalpha"]
        )
        np.testing.assert_array_equal(read_image(tmp_path / "x.tif", card), image[:, :, :3])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("pages", [3, 4])
def test_pages_of_a_tiff_are_no_bands(tmp_path, caplog, dtype, pages):
    stack = np.random.default_rng(0).integers(0, 255, (pages, 12, 14)).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", stack, photometric="minisblack")
    image = read_image(tmp_path / "x.tif", RGB)
    np.testing.assert_array_equal(image[:, :, 0], stack[0] >> 8 if dtype == "uint16" else stack[0])
    assert "only the first is used" in caplog.text


def test_pages_that_are_bands_are_no_pages_that_are_left_out(tmp_path, caplog):
    stack = np.random.default_rng(0).integers(0, 255, (5, 12, 14)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", stack, photometric="minisblack")
    card = ModelCard(("a", "b"), channels=5, mean=(0,) * 5, std=(1,) * 5)
    np.testing.assert_array_equal(read_image(tmp_path / "x.tif", card), stack.transpose(1, 2, 0))
    assert not caplog.text


def test_white_is_zero_is_turned_round_in_8_and_16_bits(tmp_path):
    for dtype in ("uint8", "uint16"):
        ramp = np.linspace(0, np.iinfo(dtype).max, 240).astype(dtype).reshape(12, 20)
        tifffile.imwrite(tmp_path / f"{dtype}.tif", ramp, photometric="miniswhite")
    eight, sixteen = (read_image(tmp_path / f"{dtype}.tif", RGB).astype(int) for dtype in ("uint8", "uint16"))
    assert eight[0, 0, 0] == 255 and abs(eight - sixteen).max() <= 1


def test_arrays_that_are_no_images_are_refused_with_what_to_do(tmp_path):
    np.save(tmp_path / "a.npy", photo(40, 50).transpose(2, 0, 1))
    with pytest.raises(MisuseError, match=r"holds \[3, 40, 50\], and an image is \[H, W, C\]: save array.transpose"):
        read_image(tmp_path / "a.npy", RGB)
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(MisuseError, match="holds Python objects, which are never loaded"):
        read_image(tmp_path / "a.npy", RGB)
    for strange in (np.zeros((4, 5), [("r", "u1"), ("g", "u1")]), np.zeros((4, 5), "M8[s]"), np.zeros((4, 5), "U3")):
        np.save(tmp_path / "a.npy", strange)
        with pytest.raises(MisuseError, match="which are no numbers; save an array of numbers"):
            read_image(tmp_path / "a.npy", RGB)
    np.savez(tmp_path / "a.npz", photo(40, 50))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(MisuseError, match=r"holds several arrays, as \.npz files do; save the image alone"):
        read_image(tmp_path / "a.npy", RGB)


def test_the_first_of_a_phones_jpegs_in_one_is_a_jpeg(tmp_path):
    pictures = [Image.fromarray(photo(40, 50, seed)) for seed in range(2)]
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    header = read_header(tmp_path / "a.jpg")
    assert (header.format, header.pages) == ("JPEG", 2)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", RGB), np.asarray(Image.open(tmp_path / "a.jpg")))


def test_big_endian_arrays_are_taken(tmp_path):
    card = ModelCard(("a", "b"), channels=1, dtype="uint16", mean=(0,), std=(1,))
    np.save(tmp_path / "x.npy", np.arange(12, dtype=">u2").reshape(3, 4))
    assert read_image(tmp_path / "x.npy", card)[2, 3, 0] == 11


def test_one_band_of_sixteen_bits_stays_whole_for_a_card_that_wants_it(tmp_path):
    card = ModelCard(("a", "b"), channels=1, dtype="uint16", mean=(0,), std=(1,))
    ramp = np.arange(0, 60000, 1000, np.uint16).reshape(6, 10)
    for name in ("x.png", "x.tif"):
        np.testing.assert_array_equal(read_image(save(tmp_path / name, ramp), card)[:, :, 0], ramp)


def test_what_the_card_does_not_allow_is_refused(tmp_path, picture):
    bands = ModelCard(("a", "b"), channels=4, dtype="uint8", mean=(0,) * 4, std=(1,) * 4)
    np.save(tmp_path / "x.npy", picture)
    with pytest.raises(MisuseError, match="3 channels; this model takes 4"):
        read_image(tmp_path / "x.npy", bands)
    np.save(tmp_path / "f.npy", picture.astype(np.float32))
    with pytest.raises(MisuseError, match="float32 values; this model takes uint8"):
        read_image(tmp_path / "f.npy", RGB)
    tifffile.imwrite(tmp_path / "f.tif", np.zeros((4, 5), np.float32))
    with pytest.raises(MisuseError, match="float32"):
        read_image(tmp_path / "f.tif", RGB)
    np.save(tmp_path / "v.npy", np.zeros(7))
    with pytest.raises(MisuseError, match="shape"):
        read_image(tmp_path / "v.npy", RGB)
    np.save(tmp_path / "z.npy", np.zeros((0, 4, 3), np.uint8))
    with pytest.raises(DeployError):
        read_image(tmp_path / "z.npy", RGB)


def test_a_header_says_what_the_file_holds(tmp_path, picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(picture), Image.fromarray(255 - picture)]
    georeference = [(33550, "d", 3, (1.0, 1.0, 0.0), True), (34735, "H", 4, (1, 1, 0, 0), True)]
    save(tmp_path / "turned.jpg", picture, exif=exif.tobytes())
    save(tmp_path / "grey.png", np.zeros((13, 17), np.uint8))
    save(tmp_path / "deep.png", np.zeros((13, 17), np.uint16))
    save(tmp_path / "bits.png", np.zeros((13, 17), bool))
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "stack.tif", save_all=True, append_images=frames[1:])
    tifffile.imwrite(tmp_path / "map.tif", picture, photometric="rgb", extratags=georeference)
    tifffile.imwrite(tmp_path / "bands.tif", np.zeros((13, 17, 5), np.uint16), photometric="minisblack",
                     planarconfig="contig")  # fmt: skip
    np.save(tmp_path / "a.npy", np.zeros((13, 17, 4), np.float32))
    np.save(tmp_path / "flat.npy", np.zeros((13, 17), ">u2"))
    found = {
        path.name: (header.format, header.size, header.bands, header.dtype.name, header.pages, header.georeferenced)
        for path in tmp_path.iterdir()
        for header in [read_header(path)]
    }
    assert found == {
        "turned.jpg": ("JPEG", (17, 13), 3, "uint8", 1, False),
        "grey.png": ("PNG", (13, 17), 1, "uint8", 1, False),
        "deep.png": ("PNG", (13, 17), 1, "uint16", 1, False),
        "bits.png": ("PNG", (13, 17), 1, "bool", 1, False),
        "film.gif": ("GIF", (13, 17), 1, "uint8", 2, False),
        "stack.tif": ("TIFF", (13, 17), 3, "uint8", 2, False),
        "map.tif": ("TIFF", (13, 17), 3, "uint8", 1, True),
        "bands.tif": ("TIFF", (13, 17), 5, "uint16", 1, False),
        "a.npy": ("NPY", (13, 17), 4, "float32", 1, False),
        "flat.npy": ("NPY", (13, 17), 1, "uint16", 1, False),
    }


def test_what_reads_images_needs_no_network():
    imported = {
        node.module
        for path in (ROOT / "runtime" / "images").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level == 2
    }
    assert "errors" in imported and imported <= {
        "arrays",
        "errors",
        "extras",
        "files",
        "planning.kept_rows",
        "engine_format.model_card",
        "pixels.no_data",
        "pixels.value_range",
    }


def test_the_limit_of_pixels_is_ours_and_not_pillows(tmp_path, monkeypatch):
    path = save(tmp_path / "x.png", np.zeros((300, 400), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow would refuse
    assert read_image(path, RGB).shape == (300, 400, 3)
    assert Image.MAX_IMAGE_PIXELS == 10
    with pytest.raises(DeployError, match=r"400×300 = 120,000 pixels, over the limit of 100,000.*--max-pixels"):
        read_image(path, RGB, max_pixels=100_000)


def test_files_folders_and_globs_are_found_in_order(tmp_path, picture):
    for name in ("b.png", "a.JPG", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, picture)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    assert [p.name for p in find_images([tmp_path])] == ["a.JPG", "b.png"]
    assert [p.name for p in find_images([f"{tmp_path}/**/*.png"])] == ["b.png", "c.png"]
    assert [p.name for p in find_images([tmp_path / "b.png", tmp_path])] == ["b.png", "a.JPG"]
    placed = find_placed([tmp_path / "b.png", f"{tmp_path}/**/*.png", f"{tmp_path}/d*/*.png", tmp_path])
    assert [(path.name, str(folder)) for path, folder in placed.items()] == [
        ("b.png", "."),
        ("c.png", "deep"),
        ("a.JPG", "."),
    ]
    descending = [f"{tmp_path}/**/*.png"]
    (tmp_path / "also").symlink_to(tmp_path / "deep")
    assert [str(p.relative_to(tmp_path)) for p in find_images(descending)] == ["also/c.png", "b.png", "deep/c.png"]
    (tmp_path / "also").unlink()
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    assert [str(p.relative_to(tmp_path)) for p in find_images(descending)] == ["b.png", "deep/c.png"]
    with pytest.raises(MisuseError, match="back up behind a wildcard"):
        find_placed([f"{tmp_path}/*/../*.png"])
    assert {path.name for path in find_images([f"{tmp_path}/*/../*.png"])} == {"b.png"}
    for wrong, said in ((tmp_path / "empty", "no images"), (tmp_path / "x", "does not exist"), ("*.zzz", "no images")):
        with pytest.raises(MisuseError, match=said):
            find_images([wrong])


def test_what_a_folder_holds_and_nothing_reads_is_counted_and_named(tmp_path, picture, caplog):
    save(tmp_path / "a.png", picture)
    for name in ("b.heic", "c.HEIC", "scan.nii.gz", "scan.dcm", "notes.txt", "clip.mp4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.dcm").mkdir()
    said = (
        "holds 5 files that are not read here: 1 .dcm (pydicom reads it), 2 .heic (pillow-heif reads it), "
        "1 .mp4 (fcn-deploy[video] reads it), 1 .nii.gz (nibabel reads it); convert them to .png or .tif"
    )
    for item in (tmp_path, f"{tmp_path}/*"):
        assert [path.name for path in find_images([item])] == ["a.png"]
        assert [record.getMessage() for record in caplog.records] == [f"{item} {said}"]
        caplog.clear()
    find_images([tmp_path], IMAGE_SUFFIXES | {".mp4"})
    assert "holds 4 files" in caplog.text and ".mp4" not in caplog.text
    save(tmp_path / "folder.dcm" / "a.png", picture)
    (tmp_path / "a.png").unlink()
    with pytest.raises(MisuseError, match=r"holds 5 files that are not read here: .*2 \.heic"):
        find_images([tmp_path])
    for path in tmp_path.glob("*.*"):
        if path.is_file():
            path.unlink()
    with pytest.raises(
        MisuseError, match=r"folders with some, such as .*/folder.dcm/a\.png; '.*/\*\*' takes those too"
    ):
        find_images([tmp_path])
    (tmp_path / "b.jpg").touch()
    with pytest.raises(DeployError, match=r"b\.jpg is empty, a file of 0 bytes"):
        read_image(tmp_path / "b.jpg", RGB)
    (tmp_path / "b.heic").write_bytes(b"0")
    with pytest.raises(DeployError, match=r"b\.heic is not an image of a known format; convert it \(pillow-heif"):
        read_image(tmp_path / "b.heic", RGB)
    (tmp_path / "lfs.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(DeployError, match="it is a pointer of Git LFS: fetch the file itself by git lfs pull"):
        read_image(tmp_path / "lfs.jpg", RGB)


def test_labels_are_palette_pngs_in_the_cards_colours(tmp_path):
    labels = np.array([[0, 1], [2, 1]], np.uint8)
    write_labels(tmp_path / "l.png", labels, RGB)
    image = Image.open(tmp_path / "l.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), labels)
    assert np.asarray(image.convert("RGB"))[1, 0].tolist() == list(voc_palette(3)[2])


def test_labels_of_many_classes_are_16_bit(tmp_path):
    labels = np.array([[0, 299]], np.uint16)
    write_labels(tmp_path / "l.png", labels, ModelCard(tuple(map(str, range(300)))))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "l.png")), labels)


def test_background_stays_clear_in_overlays(picture):
    labels = np.zeros((13, 17), np.uint8)
    labels[5:] = 1
    shown = overlay(picture, labels, RGB)
    np.testing.assert_array_equal(shown[:5], picture[:5])
    assert (shown[5:] != picture[5:]).any()


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (400, 900)])
def test_overlays_have_a_legend_below_the_picture(size):
    labels = np.zeros(size, np.uint8)
    labels[: size[0] // 2] = 2
    sheet = np.asarray(overlay_sheet(np.zeros((*size, 3), np.uint8), labels, RGB))
    legend = sheet[size[0] :]
    assert legend.shape[0] > 15 and legend.shape[1] >= 160
    swatch = (legend == voc_palette(3)[2]).all(2).sum()
    assert (swatch > 50) == (size != (1, 1))  # only classes that are present


def test_overlays_of_other_bands_are_stretched():
    card = ModelCard(("a", "b"), channels=5, dtype="uint16", mean=(0,) * 5, std=(1,) * 5)
    image = np.random.default_rng(0).integers(0, 4000, (20, 20, 5), np.uint16)
    shown = overlay(image, np.zeros((20, 20), np.uint8), card, opacity=0)
    assert shown.dtype == np.uint8 and shown.shape == (20, 20, 3) and np.ptp(shown) == 255

"""What the numbers of files mean: value ranges, what looks wrong, and what is no data by tag, alpha, mask or option."""

import logging
import pickle
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tifffile
from fcn_deploy.export.graph.edit import set_metadata
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import ReadOptions, value_of
from fcn_deploy.runtime.images.read import decode, read_image
from fcn_deploy.runtime.images.regions import open_regions
from fcn_deploy.runtime.pixels.value_range import parse_range, scaled, windows
from helpers import command, label_records, needs, one_error, onnx_model, photo, save_photos
from onnx import helper
from PIL import Image

from fcn_deploy import MisuseError, ModelCard, Segmenter

RGB = ModelCard(("a", "b"))
GREY = replace(RGB, channels=1, mean=(127.5,), std=(127.5,))
GREY16 = replace(GREY, dtype="uint16", mean=(32767.5,), std=(32767.5,))
FLOAT = replace(GREY, dtype="float32", mean=(0.5,), std=(0.25,))
FOUR = replace(RGB, channels=4, dtype="uint16", mean=(1500,) * 4, std=(800,) * 4)


def read(path, card, **options):
    """(image, valid) of a file; whole and by regions must be equal."""
    options = ReadOptions(**options)
    whole = decode(read_header(path), card, options)
    with open_regions(path, card, options) as regions:
        height, width = regions.shape[:2]
        for top in range(0, height, 37):
            for left in range(0, width, 29):
                part = regions[top : top + 37, left : left + 29]
                expected = whole[top : top + 37, left : left + 29]
                np.testing.assert_array_equal(np.ma.getmaskarray(part), np.ma.getmaskarray(expected))
                np.testing.assert_array_equal(np.asarray(part), np.asarray(expected))
    return np.asarray(whole), ~np.ma.getmaskarray(whole).any(axis=2)


def twelve_bits(size=(64, 70)):
    """uint16 values of 0 to 4000."""
    return (np.random.default_rng(0).random(size) * 4001).astype(np.uint16)


def save(path, array, **options):
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        tifffile.imwrite(path, array, photometric="minisblack" if array.ndim == 2 else "rgb", **options)
    return path


@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_a_range_says_what_the_networks_0_and_1_are(tmp_path, suffix):
    array = twelve_bits()
    array[0, :3] = 0, 4000, 65535
    path = save(tmp_path / f"a{suffix}", array)
    share = np.clip((array.astype(float) - 200) / 3800, 0, 1)
    image, _ = read(path, GREY, input_range=(200, 4000))
    np.testing.assert_array_equal(image[:, :, 0], np.rint(share * 255))
    image, _ = read(path, GREY16, input_range="200,4000")
    np.testing.assert_array_equal(image[:, :, 0], np.rint(share * 65535))
    image, _ = read(path, FLOAT, input_range=(200, 4000))
    np.testing.assert_allclose(image[:, :, 0], (array.astype(float) - 200) / 3800, rtol=1e-6)
    eight = save(tmp_path / f"b{suffix}", photo(50, 60)[:, :, 0])
    image, _ = read(eight, GREY, input_range=(0, 255))
    np.testing.assert_array_equal(image[:, :, 0], photo(50, 60)[:, :, 0])


def test_percentiles_are_of_each_file_and_of_its_data(tmp_path):
    array = twelve_bits((300, 310))
    array[:, :120] = 65535
    path = save(tmp_path / "a.tif", array, extratags=[(42113, "s", 0, "65535", True)], tile=(64, 64))
    image, valid = read(path, GREY, input_range="percentile")
    assert not valid[:, :120].any() and valid[:, 120:].all()
    shown = image[valid]
    assert (shown == 0).mean() == pytest.approx(0.01, abs=0.005) and (shown == 255).mean() == pytest.approx(
        0.01, abs=0.005
    )
    assert abs(int(np.median(shown)) - 127) < 4
    flat = save(tmp_path / "f.tif", np.full((9, 9), 77, np.uint16))
    assert read(flat, GREY, input_range="percentile")[0].max() == 0
    nothing = save(tmp_path / "n.tif", np.zeros((9, 9), np.uint16))
    assert not read(nothing, GREY, input_range="percentile", no_data=0)[1].any()


def named(caplog, path, card, **options):
    """What is logged of a file."""
    caplog.clear()
    options = ReadOptions(**options)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            decode(read_header(path), card, options)
    return [record.getMessage() for record in caplog.records]


def test_more_bits_than_the_networks_are_named_once_and_refused_by_strict(tmp_path, caplog):
    path = save(tmp_path / "a.tif", np.uint16([[200, 3800]] * 9))
    (message,) = named(caplog, path, GREY)
    assert message.startswith(f"{path} holds 16-bit values, here 200 to 3800, for a network of uint8 images")
    assert "0 to 14" in message and "--input-range LO,HI" in message and "0,65535" in message
    assert not named(caplog, path, GREY, input_range=(0, 4000))
    assert not named(caplog, path, replace(GREY16, mean=(1500,), std=(800,)))
    with pytest.raises(MisuseError, match=r"holds 16-bit values, here 200 to 3800.*\(refused by --strict\)"):
        read(path, GREY, strict=True)
    read(path, GREY, strict=True, input_range=(0, 65535))
    Image.fromarray(np.uint16([[0, 65535]] * 9)).save(tmp_path / "b.png")
    (message,) = named(caplog, tmp_path / "b.png", GREY)
    assert "0 to 255:" in message


@pytest.mark.parametrize(
    ("array", "card", "said"),
    [
        (twelve_bits(), GREY16, "a small part of what this network's mean (32767.5) and std (32767.5) say"),
        (np.uint8([[0, 1]] * 9), GREY, "values of 0 to 1, a small part"),
        (photo(30, 30)[:, :, 0], GREY16, "a small part"),
        (photo(30, 30)[:, :, 0], FLOAT, "far outside what this network's mean (0.5) and std (0.25) say"),
        (twelve_bits().astype(np.float32), FLOAT, "far outside"),
        (photo(30, 30)[:, :, 0], GREY, None),
        (photo(30, 30)[:, :, 0] // np.uint8(4), GREY, None),  # a dark image
        (np.zeros((9, 9), np.uint8), GREY, None),  # a black one
        (twelve_bits().astype(np.float32) / 4000, FLOAT, None),
        (twelve_bits().astype(np.float32), replace(FLOAT, mean=(0,), std=(1,)), None),  # nothing is known
        (twelve_bits(), replace(GREY16, mean=(1500,), std=(800,)), None),
    ],
)
def test_values_that_cannot_be_the_networks_are_named(tmp_path, caplog, array, card, said):
    path = save(tmp_path / "a.tif", array)
    messages = named(caplog, path, card)
    assert len(messages) == bool(said) and all(said in each for each in messages)
    if said:
        with pytest.raises(MisuseError, match="refused by --strict"):
            read(path, card, strict=True)


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "a,b", "0,inf", "nan,1", "5,5", "6,5", (3,), (1, None), 7])
def test_bad_ranges_are_refused(text):
    with pytest.raises(MisuseError, match="input range"):
        ReadOptions(input_range=text)
    assert parse_range("-1.5, 3") == (-1.5, 3) and parse_range("percentile") == "percentile"


def test_what_is_outside_a_files_type_is_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.full((9, 9), 7, np.uint8))
    for options, said in (
        ({"input_range": (0, 256)}, "input range 0,256, and .* holds uint8 values, 0 to 255"),
        ({"input_range": (-1, 9)}, "input range -1,9, and"),
        ({"no_data": 300}, "no-data value 300, and .* holds uint8 values, 0 to 255"),
        ({"no_data": 0.5}, "no-data value 0.5, and"),
    ):
        with pytest.raises(MisuseError, match=said):
            read(path, GREY, **options)
    assert value_of(float("nan"), np.dtype(np.uint8), "x") is None  # as of a folder of floats and photographs
    assert value_of(-9999, np.dtype(np.uint8), None) is None  # a tag that no pixel can have
    assert value_of(-9999, np.dtype(np.int16), None) == -9999


def tag(text):
    return {"extratags": [(42113, "s", 0, text, True)]}


def test_tagged_no_data(tmp_path):
    image = photo(64, 70)
    image[:, :20] = 0
    image[50, 60] = (0, 9, 0)
    valid = (image != 0).any(2)
    path = save(tmp_path / "a.tif", image, **tag("0"))
    shown, found = read(path, RGB)
    np.testing.assert_array_equal(found, valid)
    np.testing.assert_array_equal(shown[valid], image[valid])
    assert found[50, 60]  # a band alone may be 0
    assert read(path, RGB, no_data=255)[1].mean() > 0.9  # instead of the tag
    for text in ("-9999", "nan", "some", ""):
        assert read(save(tmp_path / "b.tif", image, **tag(text)), RGB)[1].all()
    np.testing.assert_array_equal(read_image(path, RGB)[~valid], [[124, 116, 104]] * int((~valid).sum()))


def test_tagged_no_data_of_floats_and_signed_numbers(tmp_path):
    image = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    card = replace(FLOAT, mean=(0.5,), std=(0.3,))
    for text, value in (("-9999", -9999), ("nan", np.nan), ("-3.4028234663852886e+38", -3.4028234663852886e38)):
        given = image.copy()
        given[:9] = value
        _, valid = read(save(tmp_path / "a.tif", given, **tag(text)), card)
        assert not valid[:9].any() and valid[9:].all()
    four = np.random.default_rng(0).random((40, 50, 3)).astype(np.float32)
    four[:9, :, 1] = -9999
    path = save(tmp_path / "b.tif", four, **tag("-9999"))
    assert not read(path, replace(card, channels=3, mean=(0.5,) * 3, std=(0.3,) * 3))[1][:9].any()
    np.save(tmp_path / "i.npy", np.int16([[-9999, 5]] * 4))
    assert (
        read(tmp_path / "i.npy", replace(card, mean=(0,), std=(1,)), no_data=-9999)[1].tolist() == [[False, True]] * 4
    )


@pytest.mark.parametrize("name", ["s.tif", "s.png", "s.vrt"])
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_scales_of_gdal_are_said_and_not_applied(tmp_path, caplog, name):
    rasterio = needs("rasterio")
    array = np.random.default_rng(0).integers(0, 65536, (1, 40, 50), np.uint16)
    options = {"driver": name[2:].upper().replace("TIF", "GTiff").replace("VRT", "GTiff"), "dtype": "uint16"}
    with rasterio.open(tmp_path / name.replace("vrt", "tif"), "w", height=40, width=50, count=1, **options) as file:
        file.write(array)
        file.scales, file.offsets = (0.0001,), (-0.1,)
    if name == "s.vrt":
        needs("rasterio.shutil").copy(tmp_path / "s.tif", tmp_path / name, driver="VRT")
    found, _ = read(tmp_path / name, GREY16, strict=True)
    np.testing.assert_array_equal(found[:, :, 0], array[0])
    assert "numbers are to be taken times 0.0001 plus -0.1, which is not done" in caplog.records[0].message
    caplog.clear()
    read(tmp_path / name, GREY16, input_range=(0, 65535))  # what they mean is told
    assert not caplog.records


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_of_zero_is_no_data(tmp_path, mode):
    image, alpha = photo(40, 50), np.full((40, 50), 255, np.uint8)
    alpha[:, :9], alpha[0, 20] = 0, 1
    if mode == "P":
        picture = Image.fromarray((photo(40, 50)[:, :, 0] | 1) * (alpha > 0), "P")
        picture.putpalette(bytes(range(256)) * 3)
        picture.save(tmp_path / "a.png", transparency=0)
    else:
        bands = image if mode == "RGBA" else image[:, :, :1]
        Image.fromarray(np.dstack([bands, alpha]), mode).save(tmp_path / "a.png")
    for card in (RGB, GREY):
        shown, valid = read(tmp_path / "a.png", card)
        np.testing.assert_array_equal(valid, alpha > 0)
        if (mode, card) == ("RGBA", RGB):
            np.testing.assert_array_equal(shown[valid], image[valid])
    if mode == "RGBA":
        tifffile.imwrite(tmp_path / "a.tif", np.dstack([image, alpha]), photometric="rgb", extrasamples=["unassalpha"])
        np.testing.assert_array_equal(read(tmp_path / "a.tif", RGB)[1], alpha > 0)
        # A fourth band of a network of four is what it is: GDAL calls any fourth band alpha.
        four = np.dstack([image, alpha]).astype(np.uint16)
        tifffile.imwrite(tmp_path / "b.tif", four, photometric="rgb", extrasamples=["unassalpha"])
        assert read(tmp_path / "b.tif", FOUR)[1].all()


@pytest.mark.parametrize("tile", [None, (32, 32)])
def test_an_internal_mask_says_what_is_data(tmp_path, tile):
    image = photo(70, 90)
    valid = np.random.default_rng(3).random((70, 90)) > 0.3
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(image, photometric="rgb", tile=tile, metadata=None)
        writer.write(valid, photometric="mask", subfiletype=4, tile=tile, metadata=None)
    shown, found = read(tmp_path / "a.tif", RGB)
    np.testing.assert_array_equal(found, valid)
    np.testing.assert_array_equal(shown[valid], image[valid])


def test_windows_cover_small_images_and_lie_in_large_ones():
    assert windows((3, 5), 4) == [(0, 3, 0, 5)]
    for size in ((1000, 2000), (7, 100_000), (100_000, 1)):
        found = windows(size, 4)
        assert all(0 <= t < b <= size[0] and 0 <= left < right <= size[1] for t, b, left, right in found)
        assert found[0][0] == 0 and found[-1][1] == size[0] and found[-1][3] == size[1]


def test_large_arrays_are_scaled_as_small_ones():
    array = np.arange(65536, dtype=np.uint16)[None].repeat(2, 0)
    expected = np.rint(np.clip((np.arange(65536.0) - 100) / 900, 0, 1) * 255)
    np.testing.assert_array_equal(scaled(array, (100, 1000), np.dtype(np.uint8))[1], expected)
    assert scaled(np.float32([[np.nan, np.inf, 550]]), (100, 1000), np.dtype(np.uint8)).tolist() == [[0, 255, 128]]


def test_label_images_takes_ranges_and_no_data(exports, tmp_path):
    engine, folder = exports / "narrow.engine", tmp_path / "in"
    folder.mkdir()
    image = photo(61, 97)
    wide = image.astype(np.uint16) * 10
    wide[:, :30] = 7
    tifffile.imwrite(folder / "a.tif", wide, photometric="rgb")
    np.save(folder / "b.npy", wide)
    done = command(
        "infer", engine, folder, "-o", tmp_path / "o", "--input-range", "0,2550", "--nodata", "7", "--strict"
    )
    assert not done.stderr
    valid = np.ones((61, 97), bool)
    valid[:, :30] = False
    with Segmenter(engine) as net:
        expected = net(image, valid)
    assert set(np.unique(expected)) > {255}
    for name in ("a", "b"):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"o/{name}.png")), expected)
    done = command("infer", engine, folder, "-o", tmp_path / "p")
    (warning,) = done.stderr.splitlines()  # once for both
    assert re.search(r"in/(a.tif|b.npy) holds 16-bit values, here 0 to 2550", warning)
    done = command("infer", engine, folder, "-o", tmp_path / "q", "--strict", "--json", ok=1)
    records = label_records(done)
    assert all("refused by --strict" in record["error"] for record in records) and not (tmp_path / "q/a.png").exists()


def test_bad_ranges_and_values_are_one_line_each(exports, tmp_path):
    save_photos(tmp_path / "in", [(20, 20)])
    words = (exports / "narrow.engine", tmp_path / "in", "-o", tmp_path / "o")
    for text, said in (("9,9", "the first number must be below the second"), ("many", "write two numbers")):
        assert said in one_error(command("infer", *words, "--input-range", text, ok=2))
    assert not (tmp_path / "o").exists()
    for options, said in (
        (("--input-range", "0,256"), "uint8 values, 0 to 255"),
        (("--nodata", "-1"), "no-data value -1"),
    ):
        done = command("infer", *words, *options, ok=1)
        (line,) = done.stderr.splitlines()
        assert said in line and not (tmp_path / "o/0.png").exists()


def test_a_segmenter_takes_numbers_of_any_type(exports):
    image = photo(61, 97)
    with Segmenter(exports / "narrow.engine") as net:
        labels, probabilities = net(image), net.probabilities(image)
        with pytest.raises(MisuseError, match="image of dtype uint16; this model takes uint8"):
            net(image.astype(np.uint16))
    for given, limits in (
        (image.astype(np.uint16) * 16, (0, 4080)),
        (image.astype(np.int16) - 300, (-300, -45)),
        (image / 255, (0, 1)),
    ):
        with Segmenter(exports / "narrow.engine", input_range=limits) as net, pickle.loads(pickle.dumps(net)) as again:
            net.warmup([(32, 32)])
            np.testing.assert_array_equal(net(given), labels)
            np.testing.assert_array_equal(again(given), labels)
            np.testing.assert_array_equal(net.probabilities(given), probabilities)
            for each in net.map([given] * 9):
                np.testing.assert_array_equal(each, labels)
            np.testing.assert_array_equal(np.concatenate([part for _, part in net.bands(given)]), labels)
    given[:9, :, 1] = np.nan
    with Segmenter(exports / "narrow.engine", input_range=(0, 1)) as net:
        assert (net(given)[:9] == 255).all() and (net(given)[9:] != 255).all()
        np.testing.assert_array_equal(np.concatenate([part for _, part in net.bands(given)]), net(given))
        with pytest.raises(MisuseError, match=r"image of shape \[61, 97\]; this model takes"):
            net(given[:, :, 0])
        with pytest.raises(MisuseError, match="image of dtype bool; an input range is of numbers"):
            net(given > 0.5)


def test_percentiles_of_arrays_are_those_of_files(exports, tmp_path):
    wide = photo(300, 280).astype(np.uint16) * 13 + 50
    tifffile.imwrite(tmp_path / "a.tif", wide, photometric="rgb")
    with Segmenter(exports / "narrow.engine") as net:
        expected = net(read(tmp_path / "a.tif", net.card, input_range="percentile")[0])
    with Segmenter(exports / "narrow.engine", input_range="percentile") as net:
        np.testing.assert_array_equal(net(wide), expected)
        np.testing.assert_array_equal(np.concatenate([part for _, part in net.bands(wide)]), expected)


def test_an_array_outside_a_range_of_its_type_is_refused(exports):
    said = "input range 0,4000, and the image holds uint8 values, 0 to 255"
    with Segmenter(exports / "narrow.engine", input_range=(0, 4000)) as net, pytest.raises(MisuseError, match=said):
        net(photo(20, 20))
    with pytest.raises(MisuseError, match="the first number must be below the second"):
        Segmenter(exports / "narrow.engine", input_range=(4, 4))


def test_deep_colours_are_named_and_take_a_range(tmp_path, caplog):
    cv2 = pytest.importorskip("cv2")
    wide = photo(30, 40).astype(np.uint16) * 10
    cv2.imwrite(str(tmp_path / "a.png"), wide[:, :, ::-1])
    (message,) = named(caplog, tmp_path / "a.png", RGB)
    assert "holds 16-bit values, here 0 to 2550" in message
    np.testing.assert_array_equal(read(tmp_path / "a.png", RGB)[0], wide >> 8)
    np.testing.assert_array_equal(read(tmp_path / "a.png", RGB, input_range=(0, 2550))[0], photo(30, 40))


RANGED = replace(GREY, range=(0, 4000))  # a card that says what its 0 and 255 are


def test_the_cards_range_is_what_files_are_read_by_unless_their_user_says_another(tmp_path, caplog):
    array = twelve_bits()
    path = save(tmp_path / "a.tif", array)
    assert not named(caplog, path, RANGED)
    image, _ = read(path, RANGED)
    np.testing.assert_array_equal(image[:, :, 0], np.rint(array / 4000 * 255))
    np.testing.assert_array_equal(image, read(path, GREY, input_range=(0, 4000))[0])
    np.testing.assert_array_equal(read(path, RANGED, input_range=(0, 8000))[0][:, :, 0], np.rint(array / 8000 * 255))
    each = replace(GREY, range="percentile")
    np.testing.assert_array_equal(read(path, each)[0], read(path, GREY, input_range="percentile")[0])
    eight = save(tmp_path / "b.tif", photo(30, 30)[:, :, 0])
    with pytest.raises(MisuseError, match=r"range is 0 to 4000, and .*b\.tif holds uint8 values, 0 to 255; say which"):
        read(eight, RANGED)


@pytest.mark.parametrize(
    ("array", "card", "said"),
    [
        (twelve_bits() // 40, RANGED, "a small part of this model's range, 0 to 4000"),
        (twelve_bits() * 16, RANGED, "most of them outside this model's range, 0 to 4000, and clipped there"),
        (twelve_bits() // 40, replace(GREY16, range=(0, 4095), mean=(0,), std=(1,)), "part of this model's range"),
        ((twelve_bits() + 9).astype(np.float32), replace(FLOAT, range=(-2, 2)), "outside this model's range, -2"),
        (twelve_bits().astype(np.float32), replace(FLOAT, range=(0, 4000)), None),
        (twelve_bits() // 2, RANGED, None),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fill_the_cards_range_is_named(tmp_path, caplog, array, card, said):
    test_values_that_cannot_be_the_networks_are_named(tmp_path, caplog, array, card, said)


def test_models_carry_their_range_from_build_to_labels(tmp_path):
    """Engines read files, and arrays of any type of numbers, by the range that build-engine was told."""
    random = np.random.default_rng(2)
    weights = {"w": np.float32(random.normal(size=(2, 3, 5, 5))), "b": np.zeros(2, np.float32)}
    nodes = [helper.make_node("Conv", ["image", "w", "b"], ["scores"], pads=[2] * 4)]
    model = onnx_model(nodes, weights, gives=("N", 2, "H", "W"))
    set_metadata(model, CARD_KEY, RGB.to_json())
    onnx.save(model, tmp_path / "m.onnx")
    scene = np.random.default_rng(1).integers(0, 4001, (61, 70, 3)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", scene, photometric="rgb")
    build = ("build-engine", tmp_path / "m.onnx", "--backend", "onnxruntime", "--sizes", "32x32")
    command(*build, "-o", tmp_path / "plain.engine")
    done = command(*build, "-o", tmp_path / "ranged.engine", "--input-range", "0,4000")
    assert "note" not in done.stderr
    command("export-onnx", tmp_path / "m.onnx", "-o", tmp_path / "free.onnx", "--input-range", "0,4000")
    with Segmenter(tmp_path / "plain.engine") as plain, Segmenter(tmp_path / "ranged.engine") as ranged:
        assert plain.card.range is None and ranged.card == replace(plain.card, range=(0, 4000))
        expected = plain(np.rint(scene / 4000 * 255).astype(np.uint8))
        assert len(np.unique(expected)) > 1
        np.testing.assert_array_equal(ranged(scene), expected)
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(ranged))(scene), expected)
        with pytest.raises(MisuseError, match="this model's range is 0 to 4000, and the image holds uint8"):
            ranged(scene.astype(np.uint8))
        with Segmenter(tmp_path / "free.onnx") as free:
            np.testing.assert_array_equal(free(scene), expected)
    done = command("infer", tmp_path / "ranged.engine", tmp_path / "s.tif", "-o", tmp_path / "o", "--strict")
    assert not done.stderr
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "o" / "s.png")), expected)
    command("verify-engine", tmp_path / "ranged.engine")  # whose golden sample is in the network's own numbers
    done = command("export-onnx", tmp_path / "free.onnx", "-o", tmp_path / "x.onnx", "--input-range", "1,9")
    assert "--input-range takes the place of the card's range, (0.0, 4000.0)" in done.stderr
    refused = command(*build, "-o", tmp_path / "y.engine", "--input-range", "4000,0", ok=2)
    assert "the first number must be below the second" in one_error(refused)
    assert not (tmp_path / "y.engine").exists()

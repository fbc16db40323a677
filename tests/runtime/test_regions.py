"""Images read and labelled region by region: the whole image's labels, resumable, nothing half-written."""

import errno
import json

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.files import WriteError
from fcn_deploy.runtime.images import tiff
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.read import read_image
from fcn_deploy.runtime.images.regions import by_regions, open_regions
from fcn_deploy.runtime.images.tiff_chunks import Chunks
from fcn_deploy.runtime.labelling.partial_result import PartialResult
from fcn_deploy.runtime.labelling.regions import label_regions
from helpers import photo
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter

CARD = ModelCard(("a", "b"))
LAYOUTS = {
    "one strip": {},
    "strips, LZW": {"rowsperstrip": 7, "compression": "lzw", "predictor": True},
    "tiles, deflate": {"tile": (64, 48), "compression": "zlib"},
    "tiles, JPEG": {"tile": (64, 64), "compression": "jpeg"},
    "planes": {"planarconfig": "separate", "tile": (32, 32)},
    "planes in one run": {"planarconfig": "separate"},
    "BigTIFF": {"bigtiff": True, "tile": (64, 64), "compression": "zlib"},
    "big-endian": {"byteorder": ">", "rowsperstrip": 16},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_region_is_that_part_of_the_image(tmp_path, layout):
    image = photo(150, 211)
    stored = image.transpose(2, 0, 1) if "planarconfig" in layout else image
    tifffile.imwrite(tmp_path / "i.tif", stored, photometric="rgb", **layout)
    whole = read_image(tmp_path / "i.tif", CARD)
    with open_regions(tmp_path / "i.tif", CARD) as found:
        assert found.shape == (150, 211, 3) and found.dtype == np.uint8
        for top, bottom, left, right in ((0, 150, 0, 211), (3, 90, 40, 60), (63, 65, 0, 211), (149, 150, 210, 211)):
            np.testing.assert_array_equal(found[top:bottom, left:right], whole[top:bottom, left:right])


KINDS = {
    "grey": (photo(40, 50)[:, :, 0], {"photometric": "minisblack"}, 3),
    "grey for a card of one channel": (photo(40, 50)[:, :, 0], {"photometric": "minisblack"}, 1),
    "inverted grey": (photo(40, 50)[:, :, 0], {"photometric": "miniswhite"}, 3),
    "16 bits": (photo(40, 50).astype(np.uint16) * 257, {"photometric": "rgb"}, 3),
    "alpha": (np.dstack([photo(40, 50), photo(40, 50)[:, :, :1]]), {"photometric": "rgb"}, 3),
    "palette": (
        photo(40, 50)[:, :, 0],
        {"photometric": "palette", "colormap": np.random.default_rng(0).integers(0, 65536, (3, 256), np.uint16)},
        3,
    ),
    "five bands": (photo(40, 50)[:, :, [0, 1, 2, 0, 1]], {"photometric": "minisblack", "planarconfig": "contig"}, 5),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel_comes_as_the_card_wants_it(tmp_path, kind):
    image, options, channels = KINDS[kind]
    card = ModelCard(("a", "b"), channels=channels, mean=(0,) * channels, std=(1,) * channels)
    tifffile.imwrite(tmp_path / "i.tif", image, tile=(16, 32), compression="zlib", **options)
    with open_regions(tmp_path / "i.tif", card) as found:
        np.testing.assert_array_equal(found[0:40, 0:50], read_image(tmp_path / "i.tif", card))


def test_scanned_documents_of_one_bit_are_not_inverted(tmp_path):
    page = photo(40, 50)[:, :, 0] > 120
    for photometric in ("miniswhite", "minisblack"):
        tifffile.imwrite(tmp_path / "i.tif", page, photometric=photometric, rowsperstrip=8, compression="zlib")
        with open_regions(tmp_path / "i.tif", CARD) as found:
            np.testing.assert_array_equal(found[0:40, 0:50], read_image(tmp_path / "i.tif", CARD))


@pytest.mark.parametrize("turned", range(1, 9))
def test_images_that_are_stored_turned_come_upright(tmp_path, turned):
    image = photo(40, 50)
    for layout in ({}, {"tile": (16, 16), "compression": "zlib"}):
        tifffile.imwrite(tmp_path / "i.tif", image, extratags=[(274, "H", 1, turned, True)], **layout)
        with Image.open(tmp_path / "i.tif") as picture:
            upright = np.asarray(picture)  # Pillow turns TIFFs as it loads them
        assert upright.shape[:2] == ((50, 40) if turned > 4 else (40, 50)) == read_header(tmp_path / "i.tif").size
        np.testing.assert_array_equal(read_image(tmp_path / "i.tif", CARD), upright)
        with open_regions(tmp_path / "i.tif", CARD) as found:
            np.testing.assert_array_equal(found[3:17, 20:39], upright[3:17, 20:39])


@pytest.mark.parametrize("turned", [1, 6])
def test_a_turned_image_is_decoded_once_and_no_more_of_it_is_kept_than_is_planned(tmp_path, monkeypatch, turned):
    monkeypatch.setattr(tiff, "KEPT_BYTES", 0)
    kept, decoded, decode, read = [], [], Chunks._decode, Chunks.read
    monkeypatch.setattr(Chunks, "_decode", lambda self, *args: decoded.append(1) or decode(self, *args))

    def reading(self, *region):
        part = read(self, *region)
        kept.append(sum(chunk.nbytes for chunk in self.decoded.values()))
        return part

    monkeypatch.setattr(Chunks, "read", reading)
    tags = [(274, "H", 1, turned, True)]
    tifffile.imwrite(tmp_path / "i.tif", photo(300, 900), tile=(16, 32), compression="zlib", extratags=tags)
    with open_regions(tmp_path / "i.tif", CARD) as found:
        height, width = found.shape[:2]
        kept.clear(), decoded.clear()  # of a look at the values
        for top in range(0, height, 40):
            for left in range(0, width, 100):
                assert found[top : top + 40, left : left + 100].size
        planned = found.kept.taken(np.array(40.0), np.array(0.0), height)
    assert len(decoded) <= -(-300 // 16) * -(-900 // 32)  # each tile once
    assert planned / 2 < max(kept) <= planned


def test_a_turned_image_with_a_georeference_is_refused(tmp_path):
    tags = [(274, "H", 1, 6, True), (34735, "H", 4, (1, 1, 0, 0), True)]
    tifffile.imwrite(tmp_path / "turned.tif", photo(40, 50), extratags=tags)
    with pytest.raises(MisuseError, match=r"stored turned \(by its orientation\) and georeferenced"):
        read_image(tmp_path / "turned.tif", CARD)


def test_colours_that_tifffile_does_not_decode_are_read_by_libtiff(tmp_path):
    tifffile.imwrite(tmp_path / "ycc.tif", photo(40, 50), photometric="ycbcr", tile=(16, 16), compression="zlib")
    with Image.open(tmp_path / "ycc.tif") as picture:
        expected = np.asarray(picture.convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "ycc.tif", CARD), expected)
    with open_regions(tmp_path / "ycc.tif", CARD) as found:
        np.testing.assert_array_equal(found[3:17, 20:39], expected[3:17, 20:39])


def test_large_and_georeferenced_files_are_labelled_by_regions(tmp_path, monkeypatch):
    monkeypatch.setattr("fcn_deploy.runtime.images.regions.REGION_PIXELS", 5000)
    tifffile.imwrite(tmp_path / "large.tif", photo(80, 80))
    tifffile.imwrite(tmp_path / "small.tif", photo(60, 60))
    tifffile.imwrite(tmp_path / "geo.tif", photo(60, 60), extratags=[(34735, "H", 4, (1, 1, 0, 0), True)])
    np.save(tmp_path / "large.npy", photo(80, 80))
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    found = {path.name for path in tmp_path.iterdir() if by_regions(path)}
    assert found == {"large.tif", "geo.tif", "large.npy"}


@pytest.fixture
def net(exports):
    # Little enough for a few dozen tiles.
    with Segmenter(exports / "narrow.engine", threads=2, memory=4_000_000) as found:
        yield found


@pytest.fixture
def large(tmp_path):
    """A georeferenced TIFF of many tiles."""
    tags = [(33550, "d", 3, (0.5, 0.5, 0.0), True), (33922, "d", 6, (0, 0, 0, 440720.0, 100000.0, 0), True),
            (34735, "H", 4, (1, 1, 0, 0), True), (34737, "s", 0, "Gauß-Krüger|".encode(), True)]  # fmt: skip
    image = photo(2400, 100)
    tifffile.imwrite(tmp_path / "large.tif", image, tile=(128, 128), compression="zlib", extratags=tags)
    return tmp_path / "large.tif"


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_labels_are_the_whole_images_and_keep_its_georeference(exports, net, large, tmp_path):
    steps = []
    plan = label_regions(
        net.network, large, tmp_path / "out.tif", overlay=tmp_path / "out.png", progress=lambda *at: steps.append(at)
    )
    assert plan.size == (2400, 100) and steps[0] == (0, 2400) and steps[-1] == (2400, 2400) and len(steps) > 3
    with Segmenter(exports / "narrow.engine", threads=2) as whole:
        assert not whole.plan(*plan.size).grids
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), whole(photo(2400, 100)))
    with tifffile.TiffFile(tmp_path / "out.tif") as found, tifffile.TiffFile(large) as given:
        page = found.pages.first
        assert page.is_geotiff and page.is_tiled and page.photometric.name == "PALETTE"
        for code in (33550, 33922, 34735, 34737):
            assert page.tags[code].value == given.pages.first.tags[code].value
        assert tuple(page.colormap[:, 1] // 257) == net.card.colors[1]
        assert page.tags[42113].value == "255" and page.nodata == 255  # else merging takes class 0 for a hole
    assert left(tmp_path) == ["large.tif", "out.png", "out.tif"]


@pytest.mark.parametrize("classes, nodata", [(255, "255"), (256, None), (257, "65535")])
def test_no_class_is_said_to_be_no_data(tmp_path, classes, nodata):
    card = ModelCard(tuple(map(str, range(classes))))
    part = PartialResult.of("labels", tmp_path / "out.tif", card, 4)
    part.path.write_bytes(np.zeros((3, 4), card.label_dtype).tobytes())
    part.write(3, 4, card, [(34735, "H", 4, (1, 1, 0, 0))])
    with tifffile.TiffFile(part.out) as file:
        tag = file.pages.first.tags.get(42113)
        assert (tag and tag.value) == nodata
    part.write(3, 4, card, [])  # what is not of the earth has holes too
    with tifffile.TiffFile(part.out) as file:
        assert (42113 in file.pages.first.tags) == (nodata is not None)


def test_npy_arrays_are_labelled_by_regions_too(net, tmp_path):
    np.save(tmp_path / "i.npy", photo(300, 200))
    label_regions(net.network, tmp_path / "i.npy", tmp_path / "out.tif")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), net(photo(300, 200)))


def stopping(net, monkeypatch, after, error):
    """Let the network fail after so many bands."""
    bands = net.network.bands_of

    def stopped(image, start, *kinds):
        for count, band in enumerate(bands(image, start, *kinds)):
            if count == after:
                raise error
            yield band

    monkeypatch.setattr(net.network, "bands_of", stopped)


@pytest.mark.parametrize("memory", [4_000_000, 3_600_000])
def test_an_interrupted_run_goes_on_where_it_stopped(exports, net, large, tmp_path, monkeypatch, memory):
    with monkeypatch.context() as patch:
        stopping(net, patch, 2, KeyboardInterrupt())
        with pytest.raises(
            KeyboardInterrupt, match=r"interrupted at row \d+ of 2400 .* the same command with --resume goes"
        ):
            label_regions(net.network, large, tmp_path / "out.tif")
    assert left(tmp_path) == [".out.tif.partial", ".out.tif.partial.json", "large.tif"]
    done = json.loads((tmp_path / ".out.tif.partial.json").read_text())["rows"]
    steps = []
    with Segmenter(exports / "narrow.engine", threads=2, memory=memory) as again:  # with other tiles, even
        label_regions(again.network, large, tmp_path / "out.tif", progress=lambda *at: steps.append(at))
    assert steps[0] == (done, 2400) and 0 < done < 2400
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), net(photo(2400, 100)))
    assert left(tmp_path) == ["large.tif", "out.tif"]


def test_rows_that_were_not_refined_are_not_gone_on_from(exports, net, large, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(net, patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            label_regions(net.network, large, tmp_path / "out.tif")
    with Segmenter(exports / "narrow.engine", threads=2, refine=True, memory=6_000_000) as refined:
        label_regions(refined.network, large, tmp_path / "out.tif")
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), refined(photo(2400, 100)))


def test_rows_of_another_file_are_not_gone_on_from(net, large, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(net, patch, 2, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            label_regions(net.network, large, tmp_path / "out.tif")
    tifffile.imwrite(large, photo(2400, 100, 5), tile=(128, 128))
    steps = []
    label_regions(net.network, large, tmp_path / "out.tif", progress=lambda *at: steps.append(at))
    assert steps[0] == (0, 2400)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), net(photo(2400, 100, 5)))


def test_a_full_disk_is_one_line_and_keeps_the_rows(net, large, tmp_path, monkeypatch):
    (tmp_path / "out.tif").write_bytes(b"what was there")
    with monkeypatch.context() as patch:
        stopping(net, patch, 2, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(DeployError, match=r"cannot write .*out.tif: No space.* \d+ of 2400 rows are kept, and the"):
            label_regions(net.network, large, tmp_path / "out.tif")
    assert (tmp_path / "out.tif").read_bytes() == b"what was there"
    monkeypatch.setattr("fcn_deploy.runtime.labelling.partial_result.write_maps", _full)
    with pytest.raises(DeployError, match=r"2400 of 2400 rows are kept"):
        label_regions(net.network, large, tmp_path / "out.tif")
    monkeypatch.undo()
    steps = []
    label_regions(net.network, large, tmp_path / "out.tif", progress=lambda *at: steps.append(at))
    assert steps == [(2400, 2400)]
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "out.tif"), net(photo(2400, 100)))


def _full(*_, **__):
    raise WriteError("full") from OSError(errno.ENOSPC, "No space left on device")


def test_what_cannot_be_taken_is_said_before_the_work(net, tmp_path):
    five = photo(40, 40)[:, :, [0, 1, 2, 0, 1]]
    tifffile.imwrite(tmp_path / "five.tif", five, photometric="minisblack", planarconfig="contig")
    with pytest.raises(MisuseError, match="5 channels; this model takes 3"):
        label_regions(net.network, tmp_path / "five.tif", tmp_path / "out.tif")
    tifffile.imwrite(tmp_path / "lab.tif", np.zeros((40, 40, 3), np.uint8), photometric="cielab")
    with pytest.raises(MisuseError, match=r"CIELAB colours.* convert it to RGB"):
        label_regions(net.network, tmp_path / "lab.tif", tmp_path / "out.tif")
    tifffile.imwrite(tmp_path / "i.tif", photo(40, 40))
    with pytest.raises(DeployError, match="over the limit of 100"):
        label_regions(net.network, tmp_path / "i.tif", tmp_path / "out.tif", options=ReadOptions(max_pixels=100))
    with pytest.raises(DeployError, match="does not exist"):
        label_regions(net.network, tmp_path / "none.tif", tmp_path / "out.tif")
    (tmp_path / "text.tif").write_text("no image")
    with pytest.raises(DeployError, match=r"text.tif is not an image of a known format"):
        label_regions(net.network, tmp_path / "text.tif", tmp_path / "out.tif")
    assert not [name for name in left(tmp_path) if "out" in name]


def test_bands_take_readers_and_starts(net):
    image = photo(400, 300)
    with pytest.raises(MisuseError, match="start is row 400"):
        net.bands(image, 400)
    with pytest.raises(MisuseError, match="NumPy array"):
        net([[0]])
    assert np.concatenate([labels for _, labels in net.bands(image, 123)]).shape == (277, 300)

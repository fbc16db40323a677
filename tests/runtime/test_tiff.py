"""TIFFs of every structure: bands, pages and masks told apart by the file's own word, the same whole and by regions."""

import struct
import threading

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.images import fit, tiff, tiff_chunks
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.read import read_image
from fcn_deploy.runtime.images.regions import open_regions
from fcn_deploy.runtime.images.tiff_chunks import Chunks
from helpers import photo
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard

RGB = ModelCard(("a", "b"))


def card(channels, dtype="uint8"):
    return ModelCard(("a", "b"), channels=channels, dtype=dtype, mean=(0,) * channels, std=(1,) * channels)


def read(path, wanted):
    """An image read whole, which is the same by regions and of the size that its header says."""
    whole = read_image(path, wanted)
    height, width = read_header(path).size
    assert whole.shape == (height, width, wanted.channels) and whole.dtype == wanted.dtype
    with open_regions(path, wanted) as found:
        assert found.shape == whole.shape and found.dtype == whole.dtype
        for top, bottom, left, right in ((0, height, 0, width), (3, 11, 5, 17), (0, height // 2, 0, width)):
            np.testing.assert_array_equal(found[top:bottom, left:right], whole[top:bottom, left:right])
    return whole


def one_band_in_planes(path, pixels):
    """A TIFF of one band and PlanarConfiguration 2 in a single strip, as rasterio's profiles ask for."""
    height, width = pixels.shape
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 0), (277, 1), (278, height),
            (279, pixels.size), (284, 2)]  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", code, 4, 1, start if code == 273 else value) for code, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + pixels.tobytes())


def test_one_band_in_planes_is_a_grey_image(tmp_path):
    pixels = photo(50, 60)[:, :, 0]
    one_band_in_planes(tmp_path / "i.tif", pixels)
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(1))[:, :, 0], pixels)
    np.testing.assert_array_equal(read(tmp_path / "i.tif", RGB)[:, :, 2], pixels)


@pytest.mark.parametrize("layout", [{"tile": (16, 16)}, {"rowsperstrip": 8}], ids=["tiles", "strips"])
def test_jpegs_of_separate_planes_keep_their_colours(tmp_path, layout):
    smooth = np.stack([np.add.outer(np.arange(40) * a, np.arange(50) * b) for a, b in ((3, 2), (1, 4), (2, 1))], 0)
    smooth = np.clip(smooth, 0, 255).astype(np.uint8)
    tifffile.imwrite(
        tmp_path / "i.tif", smooth, photometric="rgb", planarconfig="separate", compression="jpeg", **layout
    )
    assert abs(read(tmp_path / "i.tif", RGB).astype(int) - smooth.transpose(1, 2, 0)).max() <= 6


def leave_out_tiles(path, count):
    """Set offsets and byte counts of the first tiles to 0, as GDAL's SPARSE_OK leaves them out."""
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for code in (324, 325):
            tag = file.pages.first.tags[code]
            size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
            content[tag.valueoffset : tag.valueoffset + count * size] = bytes(count * size)
    path.write_bytes(content)


@pytest.mark.parametrize("nodata", [None, 7, -9999])
def test_tiles_that_are_left_out_hold_no_data_or_nothing(tmp_path, nodata):
    image = photo(64, 96)
    tags = [] if nodata is None else [(42113, "s", 0, str(nodata), True)]
    tifffile.imwrite(tmp_path / "i.tif", image, tile=(32, 32), photometric="rgb", compression="zlib", extratags=tags)
    leave_out_tiles(tmp_path / "i.tif", 2)
    found = read(tmp_path / "i.tif", RGB)
    assert (found[:32, :64] == ([124, 116, 104] if nodata == 7 else 0)).all()  # the network's mean
    np.testing.assert_array_equal(found[32:], image[32:])


def test_webp_tiles_are_read_where_imagecodecs_is(tmp_path):
    tifffile.imwrite(
        tmp_path / "i.tif", photo(64, 96), photometric="rgb", tile=(32, 32), compression="webp",
        compressionargs={"lossless": True},
    )  # fmt: skip
    np.testing.assert_array_equal(read(tmp_path / "i.tif", RGB), photo(64, 96))


@pytest.mark.parametrize("axes", ["CYX", "ZCYX", "TZCYX"])
@pytest.mark.parametrize("kind", ["imagej", "ome", "ome in tiles"])
def test_channels_of_microscopes_are_bands_and_planes_a_stack(tmp_path, caplog, axes, kind):
    image = photo(40, 50).transpose(2, 0, 1).astype(np.uint16) * 200
    stack = np.zeros(([2] * (len(axes) - 3)) + [3, 40, 50], np.uint16)
    stack[(0,) * (len(axes) - 3)] = image
    path = tmp_path / ("i.tif" if kind == "imagej" else "i.ome.tif")
    tiles = {"tile": (16, 16), "compression": "zlib"} if kind == "ome in tiles" else {}
    tifffile.imwrite(path, stack, imagej=kind == "imagej", photometric="minisblack", metadata={"axes": axes}, **tiles)
    np.testing.assert_array_equal(read(path, card(3, "uint16")), image.transpose(1, 2, 0))
    images = {3: 1, 4: 2, 5: 4}[len(axes)]
    assert read_header(path).pages == images and read_header(path).bands == 3
    assert (f"holds {images} images; only the first is used" in caplog.text) == (images > 1)


@pytest.mark.parametrize("kind", [{"imagej": True}, {"ome": True}, {"metadata": None}])
def test_slices_are_a_stack_even_where_a_card_has_as_many_channels(tmp_path, caplog, kind):
    stack = np.stack([photo(40, 50)[:, :, 0] // (k + 1) for k in range(5)])
    named = {"axes": "ZYX"} if kind.get("metadata", 0) is not None else None
    tifffile.imwrite(tmp_path / "i.tif", stack, photometric="minisblack", **(kind | {"metadata": named}))
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(1))[:, :, 0], stack[0])
    assert "holds 5 images" in caplog.text
    if named:
        with pytest.raises(MisuseError, match="1 channels; this model takes 5"):
            read_image(tmp_path / "i.tif", card(5))
    else:  # pages without a name, as some write bands
        np.testing.assert_array_equal(read(tmp_path / "i.tif", card(5)), stack.transpose(1, 2, 0))


def test_overviews_thumbnails_and_masks_are_no_pages(tmp_path, caplog):
    image = photo(64, 96)
    with tifffile.TiffWriter(tmp_path / "i.tif") as file:
        options = {"photometric": "rgb", "metadata": None, "compression": "zlib"}
        file.write(np.ascontiguousarray(image[::8, ::8]), subfiletype=1, **options)  # a thumbnail comes first
        file.write(image, tile=(32, 32), **options)
        file.write(np.ascontiguousarray(image[::2, ::2]), subfiletype=1, tile=(32, 32), **options)
        file.write(image[:, :, 0] > 90, subfiletype=4, metadata=None)
    valid = image[:, :, :1] > 90  # the mask says so
    np.testing.assert_array_equal(read(tmp_path / "i.tif", RGB), np.where(valid, image, np.uint8([124, 116, 104])))
    with tifffile.TiffWriter(tmp_path / "bits.tif") as file:
        file.write(image[:, :, 0] > 90, metadata=None, photometric="minisblack")
        file.write(image[:, :, 1] > 90, subfiletype=4, metadata=None, photometric="minisblack")
    shown = ((image[:, :, 0] > 90) & (image[:, :, 1] > 90)) * np.uint8(255)  # the mean of this card is 0
    np.testing.assert_array_equal(read(tmp_path / "bits.tif", card(1))[:, :, 0], shown)
    assert read_header(tmp_path / "i.tif").pages == read_header(tmp_path / "bits.tif").pages == 1 and not caplog.text


EXACT = {
    "uint16": ("uint8", "bool", ">u2"),
    "int16": ("uint8", "int8", ">i2"),
    "float32": ("uint8", "uint16", "int8", "int16", "float16", "bool", ">u2", ">i2", ">f2", ">f4"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "stored"), [(wanted, stored) for wanted, those in EXACT.items() for stored in those]
)
@pytest.mark.parametrize("layout", [{}, {"tile": (16, 16), "compression": "zlib"}], ids=["mapped", "tiles"])
def test_what_is_exact_in_the_cards_type_is_widened(tmp_path, wanted, stored, layout):
    dtype = np.dtype(stored)
    if dtype.kind == "f":
        values = np.random.default_rng(0).normal(0, 100, (40, 50)).astype(dtype)
    else:
        low, high = (0, 1) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        values = np.random.default_rng(0).integers(low, high, (40, 50), endpoint=True).astype(dtype)
    np.save(tmp_path / "i.npy", values)
    np.testing.assert_array_equal(read(tmp_path / "i.npy", card(1, wanted))[:, :, 0], values)
    byteorder = ">" if dtype.byteorder == ">" else "<"
    tifffile.imwrite(tmp_path / "i.tif", values, photometric="minisblack", byteorder=byteorder, **layout)
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(1, wanted))[:, :, 0], values)


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [("uint16", "int16"), ("uint16", "float32"), ("float32", "uint32"), ("float32", "float64"), ("uint8", "int8")],
)
def test_what_would_be_rounded_or_clipped_is_refused(tmp_path, wanted, stored):
    np.save(tmp_path / "i.npy", np.zeros((5, 6), stored))
    tifffile.imwrite(tmp_path / "i.tif", np.zeros((5, 6), stored))
    for name in ("i.npy", "i.tif"):
        with pytest.raises(MisuseError, match=f"holds {stored} values; this model takes {wanted}: convert it first"):
            read_image(tmp_path / name, card(1, wanted))
        with pytest.raises(MisuseError, match=stored), open_regions(tmp_path / name, card(1, wanted)):
            pass


def test_an_alpha_band_is_dropped_and_an_unnamed_one_is_not(tmp_path):
    bands = np.maximum(photo(40, 50)[:, :, [0, 1, 2, 0, 1]], 1)
    for extra, channels in (("unassalpha", 4), ("unspecified", 5)):
        tifffile.imwrite(tmp_path / "i.tif", bands, photometric="minisblack", planarconfig="contig",
                         extrasamples=["unspecified"] * 3 + [extra])  # fmt: skip
        np.testing.assert_array_equal(read(tmp_path / "i.tif", card(channels)), bands[:, :, :channels])
    with pytest.raises(MisuseError, match="takes 4: say which with label-images --channel, such as 0,1,2,3"):
        read_image(tmp_path / "i.tif", card(4))
    # GDAL's ALPHA=YES marks the second band where the first is called grey.
    tifffile.imwrite(tmp_path / "i.tif", bands, photometric="minisblack", planarconfig="contig",
                     extrasamples=["unassalpha"] + ["unspecified"] * 3)  # fmt: skip
    for channels in (1, 3):
        with pytest.raises(MisuseError, match=f"5 channels; this model takes {channels}"):
            read_image(tmp_path / "i.tif", card(channels))


@pytest.mark.parametrize(
    ("kind", "alpha", "said"), [("assocalpha", 100, True), ("assocalpha", 0, False), ("unassalpha", 100, False)]
)
def test_colours_that_are_multiplied_by_alpha_are_named(tmp_path, caplog, kind, alpha, said):
    image = np.dstack([photo(40, 50), np.full((40, 50), 255, np.uint8)])
    image[:9] = alpha
    tifffile.imwrite(tmp_path / "i.tif", image, photometric="rgb", extrasamples=[kind])
    with open_regions(tmp_path / "i.tif", RGB, ReadOptions()) as found:
        np.testing.assert_array_equal(found[:, :], image[:, :, :3])
    assert ("has colours that are multiplied by its alpha" in caplog.text) == said
    tifffile.imwrite(tmp_path / "i.tif", image, photometric="separated")
    with open_regions(tmp_path / "i.tif", card(4), ReadOptions()):
        assert "its inks are the network's four channels" in caplog.text


@pytest.mark.parametrize("told", [False, True])
def test_no_data_of_a_palette_is_an_index(tmp_path, told):
    indices = np.arange(40 * 50).reshape(40, 50).astype(np.uint8) % 7
    colours = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257
    tag = [] if told else [(42113, "s", 0, "3", True)]
    tifffile.imwrite(tmp_path / "i.tif", indices, photometric="palette", colormap=colours, extratags=tag)
    options = ReadOptions(no_data=3 if told else None)
    with open_regions(tmp_path / "i.tif", RGB, options) as image:
        part = image[3:30, 5:]
    np.testing.assert_array_equal(np.ma.getmaskarray(part)[:, :, 0], indices[3:30, 5:] == 3)
    np.testing.assert_array_equal(np.asarray(part), (colours >> 8).astype(np.uint8).T[indices[3:30, 5:]])


def test_a_tiff_is_known_by_its_first_bytes(tmp_path):
    tifffile.imwrite(tmp_path / "i.tif", photo(40, 50).astype(np.uint16), photometric="rgb")
    (tmp_path / "i.tif").rename(tmp_path / "i.img")
    np.testing.assert_array_equal(read(tmp_path / "i.img", card(3, "uint16")), photo(40, 50))
    Image.fromarray(photo(40, 50)).save(tmp_path / "i.png")
    (tmp_path / "i.png").rename(tmp_path / "png.tif")  # and what is none, by its own
    np.testing.assert_array_equal(read(tmp_path / "png.tif", RGB), photo(40, 50))


def test_pages_that_are_missing_are_one_line(tmp_path):
    tifffile.imwrite(tmp_path / "i.tif", np.zeros((3, 40, 50), np.uint8), imagej=True, photometric="minisblack",
                     metadata={"axes": "CYX"})  # fmt: skip
    content = (tmp_path / "i.tif").read_bytes()
    (tmp_path / "i.tif").write_bytes(content[: len(content) - 3000])
    with pytest.raises(DeployError, match=r"i\.tif holds less than its ImageJ .* truncated") as caught:
        read_image(tmp_path / "i.tif", RGB)
    assert "\n" not in str(caught.value)


def test_tiles_far_larger_than_their_image_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "i.tif", photo(40, 50), photometric="rgb", tile=(16, 16), compression="zlib")
    content = bytearray((tmp_path / "i.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "i.tif") as file:
        places = [file.pages.first.tags[code] for code in (322, 323)]
    for tag in places:
        content[tag.valueoffset : tag.valueoffset + 2] = (65520).to_bytes(2, "little")
    (tmp_path / "i.tif").write_bytes(content)
    with pytest.raises(DeployError, match="tiles of 65520×65520 pixels"):
        read_image(tmp_path / "i.tif", RGB)


@pytest.mark.parametrize("separate", [False, True], ids=["contig", "planes"])
def test_regions_read_side_by_side_decode_each_tile_once(tmp_path, monkeypatch, separate):
    pixels = np.random.default_rng(0).integers(0, 4000, (150, 230, 2), np.uint16)
    stored = np.moveaxis(pixels, 2, 0) if separate else pixels
    planar = "separate" if separate else "contig"
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, stored, tile=(32, 32), compression="zlib", photometric="minisblack", planarconfig=planar)
    monkeypatch.setattr(tiff_chunks, "KEPT_BYTES", 0)  # what a row of regions needs is kept all the same
    monkeypatch.setattr(tiff_chunks.os, "cpu_count", lambda: 2)
    tiff_chunks._decoders.cache_clear()
    with tifffile.TiffFile(file) as opened:
        chunks = Chunks(file, opened.pages[0], opened.pages[0])
        decoded: list[int] = []
        decode = chunks._decode
        monkeypatch.setattr(chunks, "_decode", lambda index, data: decoded.append(index) or decode(index, data))
        for top in range(0, 150, 48):
            for left in range(0, 230, 64):
                # With a halo, as tiles of a network are read.
                where = max(top - 8, 0), min(top + 56, 150), max(left - 8, 0), min(left + 72, 230)
                np.testing.assert_array_equal(chunks.read(*where), pixels[where[0] : where[1], where[2] : where[3]])
                assert len(chunks.decoded) <= 4 * 8 * chunks.planes, "no more than a row of regions is kept"
        assert len(decoded) == len(set(decoded)) == len(opened.pages[0].dataoffsets)
    tiff_chunks._decoders.cache_clear()


@pytest.mark.parametrize("separate", [False, True], ids=["contig", "planes"])
def test_no_more_is_kept_than_plans_count(tmp_path, monkeypatch, separate):
    pixels = np.random.default_rng(0).integers(0, 4000, (150, 230, 2), np.uint16)
    stored, planar = (np.moveaxis(pixels, 2, 0), "separate") if separate else (pixels, "contig")
    file = tmp_path / "a.tif"
    kept = []
    read = Chunks.read
    for module in (tiff, tiff_chunks):
        monkeypatch.setattr(module, "KEPT_BYTES", 0)

    def read_and_counted(chunks, *where):
        part = read(chunks, *where)
        kept.append(sum(chunk.nbytes for chunk in chunks.decoded.values()))
        return part

    monkeypatch.setattr(Chunks, "read", read_and_counted)
    for compression in ("zlib", None):
        kept.clear()
        tifffile.imwrite(
            file, stored, tile=(32, 32), compression=compression, photometric="minisblack", planarconfig=planar
        )
        with open_regions(file, card(2, "uint16")) as image:
            for top in range(0, 150, 40):
                for left in range(0, 230, 64):
                    rows, columns = slice(max(top - 8, 0), min(top + 48, 150)), slice(left, left + 72)
                    np.testing.assert_array_equal(image[rows, columns], pixels[rows, columns])
            planned = image.kept.taken(np.array(56.0), np.array(0.0), 150)
            assert image.kept.ahead == 4
        assert max(kept) <= planned and (max(kept) > planned / 2 or compression is None)
        assert compression or planned == 0, "what lies in the file as it is is not kept"


def test_a_part_that_is_expected_is_read_meanwhile_and_what_is_wrong_with_it_told_when_it_is_asked_for(
    tmp_path, monkeypatch
):
    file = tmp_path / "a.tif"
    pixels = np.arange(32 * 160, dtype=np.uint16).reshape(32, 160)
    tifffile.imwrite(file, pixels, tile=(32, 32), compression="zlib")
    with tifffile.TiffFile(file) as opened:
        offset, count = opened.pages[0].dataoffsets[3], opened.pages[0].databytecounts[3]
    data = bytearray(file.read_bytes())
    data[offset : offset + count] = bytes(count)
    file.write_bytes(data)
    monkeypatch.setattr(fit, "GRIDS", ())  # no look at the values, which would meet the tile
    threads = []
    read_chunks = Chunks.read

    def read_by(chunks, *where):
        threads.append((where, threading.current_thread().name))
        return read_chunks(chunks, *where)

    monkeypatch.setattr(Chunks, "read", read_by)
    with open_regions(file, card(1, "uint16")) as image:
        for left in (0, 32):
            np.testing.assert_array_equal(image[:, left : left + 32][:, :, 0], pixels[:, left : left + 32])
            image.expect((slice(0, 32), slice(left + 32, left + 64)))
        np.testing.assert_array_equal(image[:, 64:96][:, :, 0], pixels[:, 64:96])
        image.expect((slice(0, 32), slice(128, 160)), lambda part: part.copy())  # another is asked for than expected
        with pytest.raises(DeployError, match=r"cannot read rows 0 to 31 of .*is it damaged\?"):
            image[:, 96:128]
        np.testing.assert_array_equal(image[:, 128:160][:, :, 0], pixels[:, 128:160])
        assert ((0, 32, 64, 96), "regions_0") in threads and ((0, 32, 128, 160), "regions_0") in threads
        image.expect((slice(0, 32), slice(96, 128)))
        with pytest.raises(DeployError, match="cannot read rows 0 to 31"):
            image[:, 96:128]
    assert not any(thread.name.startswith("regions") for thread in threading.enumerate())

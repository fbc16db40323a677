"""Pages, channels and axes: any plane of a stack, by the axes of ImageJ and OME files, whole and by regions."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import tifffile
from fcn_deploy.export.graph.edit import set_metadata
from fcn_deploy.runtime.engine_format.model_card import CARD_KEY
from fcn_deploy.runtime.images.georeference import transform_of
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.numbers import ReadOptions
from fcn_deploy.runtime.images.read import decode
from fcn_deploy.runtime.images.regions import open_regions
from fcn_deploy.runtime.labelling.files import label_files
from fcn_deploy.runtime.labelling.planes import Planes
from fcn_deploy.runtime.labelling.products import Products
from fcn_deploy.runtime.network import Network
from helpers import command, label_records, one_error, photo
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard

SIZE = (30, 40)


def card(channels, dtype="uint16"):
    return ModelCard(("dark", "bright"), channels=channels, dtype=dtype, mean=(0,) * channels, std=(1,) * channels)


def read(path, card, page=None, channels=None):
    """An image, read whole; by regions it must be the same."""
    options = ReadOptions(page=page, channels=channels)
    whole = decode(read_header(path, page=page), card, options)
    with open_regions(path, card, options) as image:
        np.testing.assert_array_equal(image[3:20, 5:33], whole[3:20, 5:33])
    return whole


KINDS = {
    "ImageJ": {"imagej": True},
    "OME": {"ome": True},
    "OME in tiles": {"ome": True, "tile": (16, 16), "compression": "zlib"},
    "ImageJ, compressed": {"imagej": True, "compression": "zlib"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axes", ["CYX", "ZYX", "TYX", "ZCYX", "TCYX", "TZYX", "TZCYX"])
def test_every_plane_and_channel_of_a_stack_is_read(tmp_path, caplog, axes, kind):
    sides = {"T": 2, "Z": 3, "C": 4}
    shape = [sides[axis] for axis in axes[:-2]]
    stack = np.random.default_rng(0).integers(0, 65536, (*shape, *SIZE), np.uint16)
    path = tmp_path / ("i.ome.tif" if "OME" in kind else "i.tif")
    tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": axes}, **KINDS[kind])
    bands = stack if "C" in axes else np.expand_dims(stack, -3)
    planes = bands.reshape(-1, *bands.shape[-3:])  # T, then Z, then C
    assert read_header(path).pages == len(planes)
    for page, plane in enumerate(planes):
        np.testing.assert_array_equal(read(path, card(len(plane)), page), plane.transpose(1, 2, 0))
        for channel in range(len(plane)):
            np.testing.assert_array_equal(read(path, card(1), page, (channel,))[:, :, 0], plane[channel])
    assert not caplog.text
    np.testing.assert_array_equal(read(path, card(len(planes[0]))), planes[0].transpose(1, 2, 0))
    assert ("only the first is used (see --page)" in caplog.text) == (len(planes) > 1)
    with pytest.raises(MisuseError, match=rf"page {len(planes)}, and .* holds {len(planes)}, counted from 0"):
        read_header(path, page=len(planes))


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"truncate": True}, {"metadata": None}])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1), (1, 2)])
def test_every_page_of_an_array_of_many_axes_without_names_is_read(tmp_path, shape, options):
    stack = np.random.default_rng(0).integers(0, 65536, (*shape, *SIZE), np.uint16)
    tifffile.imwrite(tmp_path / "i.tif", stack, photometric="minisblack", **options)
    pages = stack.reshape(-1, *SIZE)
    assert read_header(tmp_path / "i.tif").pages == len(pages)
    for page, plane in enumerate(pages):
        np.testing.assert_array_equal(read(tmp_path / "i.tif", card(1), page)[:, :, 0], plane)
    if len(pages) == 2:  # of one axis, in truth
        np.testing.assert_array_equal(read(tmp_path / "i.tif", card(2)), pages.transpose(1, 2, 0))


def test_unnamed_pages_that_are_stored_in_one_run_may_be_bands(tmp_path):
    bands = np.random.default_rng(0).integers(0, 65536, (4, *SIZE), np.uint16)
    tifffile.imwrite(tmp_path / "i.tif", bands, photometric="minisblack", truncate=True)
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(4)), bands.transpose(1, 2, 0))


def test_channels_are_chosen_in_any_order(tmp_path):
    image = np.random.default_rng(0).integers(0, 65536, (*SIZE, 13), np.uint16)
    tifffile.imwrite(tmp_path / "i.tif", image, photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(3), channels=(3, 2, 1)), image[:, :, [3, 2, 1]])
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(3), channels=(5,)), image[:, :, [5, 5, 5]])
    np.save(tmp_path / "i.npy", image)
    np.testing.assert_array_equal(read(tmp_path / "i.npy", card(2), channels=(12, 0)), image[:, :, [12, 0]])
    for channels, said in (
        ((13,), "channel 13, and .* has 13, counted from 0"),
        ((0, 1), "has 2 channels; this model"),
    ):
        with pytest.raises(MisuseError, match=said):
            read(tmp_path / "i.tif", card(3), channels=channels)


def test_one_colour_of_a_picture_is_its_own_not_luma(tmp_path):
    image = photo(*SIZE)
    Image.fromarray(image).save(tmp_path / "i.png")
    tifffile.imwrite(tmp_path / "i.tif", image, photometric="rgb")
    for name in ("i.png", "i.tif"):
        np.testing.assert_array_equal(read(tmp_path / name, card(1, "uint8"), channels=(2,))[:, :, 0], image[:, :, 2])
    alpha = np.dstack([image, np.where(image[:, :, :1] > 90, 255, 0).astype(np.uint8)])
    Image.fromarray(alpha).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png", card(1, "uint8"), channels=(1,))
    np.testing.assert_array_equal(np.ma.getmaskarray(found)[:, :, 0], alpha[:, :, 3] == 0)


def test_pages_of_several_sizes_and_frames_of_animations_are_pages(tmp_path):
    pages = [photo(*SIZE), photo(20, 24), photo(*SIZE)[::-1]]
    with tifffile.TiffWriter(tmp_path / "i.tif") as file:
        for page in pages:
            file.write(page, photometric="rgb", metadata=None)
            file.write(np.ascontiguousarray(page[::2, ::2]), photometric="rgb", metadata=None, subfiletype=1)
    assert read_header(tmp_path / "i.tif").pages == 3
    for number, page in enumerate(pages):
        assert read_header(tmp_path / "i.tif", page=number).size == page.shape[:2]
        np.testing.assert_array_equal(decode(read_header(tmp_path / "i.tif", page=number), card(3, "uint8")), page)
    frames = [Image.fromarray(np.full((*SIZE, 3), 60 * k, np.uint8)) for k in range(4)]
    frames[0].save(tmp_path / "i.gif", save_all=True, append_images=frames[1:])
    assert [read(tmp_path / "i.gif", card(3, "uint8"), page)[0, 0, 0] for page in range(4)] == [0, 60, 120, 180]


def as_mask(path, number):
    """Say of a page, which tifffile has written as reduced, that it is a mask (TIFF 6.0, NewSubfileType)."""
    with tifffile.TiffFile(path) as file:
        place = file.pages[number].tags[254].valueoffset
    content = bytearray(path.read_bytes())
    content[place] = 4
    path.write_bytes(content)


def test_a_further_page_has_tags_and_a_mask_of_its_own(tmp_path):
    """As rasterio opens each (GTIFF_DIR:2:…), which the first page's would place, colour and cut otherwise."""
    path, grey = tmp_path / "i.tif", np.random.default_rng(0).integers(0, 4, SIZE, np.uint8)
    colours = np.zeros((2, 3, 256), np.uint16)
    colours[0, 0, :4], colours[1, 2, :4] = np.arange(4) * 16448, np.arange(4) * 21845
    valid = np.random.default_rng(1).random((2, *SIZE)) > 0.3
    with tifffile.TiffWriter(path) as file:
        for number in range(2):
            corner = (0, 0, 0, 5e5 + 1e4 * number, 5e6, 0)
            tags = [(33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, corner, True),
                    (42113, "s", 0, str(number), True)]  # fmt: skip
            file.write(grey, photometric="palette", colormap=colours[number], metadata=None, extratags=tags)
            file.write(valid[number].astype(np.uint8) * 255, photometric="minisblack", metadata=None, subfiletype=1)
    for mask in (1, 3):
        as_mask(path, mask)
    for number in range(2):
        found = read(path, card(3, "uint8"), number)
        expected = (colours[number][:, grey] >> 8).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(found), expected)
        np.testing.assert_array_equal(~np.ma.getmaskarray(found)[:, :, 0], valid[number] & (grey != number))
        with open_regions(path, card(3, "uint8"), ReadOptions(page=number)) as image:
            assert transform_of(image.tags)[2] == 5e5 + 1e4 * number
    with tifffile.TiffWriter(path) as file:
        file.write(grey, photometric="minisblack", metadata=None)
        file.write(grey, photometric="minisblack", metadata=None, extratags=[(274, "H", 1, 3, True)])
    np.testing.assert_array_equal(read(path, card(1, "uint8"), 1)[:, :, 0], grey[::-1, ::-1])
    beside = path.with_name("i.tif.aux.xml")  # is of the first page
    beside.write_text('<PAMDataset><Metadata><MDI key="NODATA_VALUES">1</MDI></Metadata></PAMDataset>')
    for page, missing in enumerate((grey == 1, np.zeros(SIZE, bool))):
        np.testing.assert_array_equal(np.ma.getmaskarray(read(path, card(1, "uint8"), page))[:, :, 0], missing)
    beside.unlink()
    with tifffile.TiffWriter(path) as file:  # a mask of 8 bits is no page, and no band
        file.write(grey, photometric="minisblack", metadata=None)
        file.write(valid[0].astype(np.uint8) * 255, photometric="minisblack", metadata=None, subfiletype=1)
        file.write(grey, photometric="minisblack", metadata=None)
        file.write(grey, photometric="minisblack", metadata=None, subfiletype=1)
    as_mask(path, 3)
    assert read_header(path).pages == 3
    as_mask(path, 1)
    assert read_header(path).pages == 2
    np.testing.assert_array_equal(np.ma.getmaskarray(read(path, card(1, "uint8")))[:, :, 0], ~valid[0])


def test_a_lookup_table_of_imagej_leaves_grey_as_it_is_for_networks_of_one_channel(tmp_path, caplog):
    grey, green = photo(*SIZE)[:, :, 0], np.zeros((3, 256), np.uint16)
    green[1] = np.arange(256) * 257
    picture = green[:, np.random.default_rng(0).permutation(256)]
    for table in (green, picture):
        tifffile.imwrite(tmp_path / "i.tif", grey, photometric="palette", colormap=table, metadata=None,
                         description="ImageJ=1.53t\nimages=1\n")  # fmt: skip
        shown = (table[1, grey] >> 8).astype(np.uint8)
        np.testing.assert_array_equal(read(tmp_path / "i.tif", card(3, "uint8"))[:, :, 1], shown)
        found = read(tmp_path / "i.tif", card(1, "uint8"))[:, :, 0]
        if table is green:
            np.testing.assert_array_equal(found, grey)
            assert "has a lookup table of ImageJ" in caplog.text
        else:  # colours of a picture, in no order
            assert not np.array_equal(found, grey)


def test_pages_without_a_name_are_no_bands_where_a_page_is_asked_for(tmp_path):
    stack = np.random.default_rng(0).integers(0, 65536, (5, *SIZE), np.uint16)
    tifffile.imwrite(tmp_path / "i.tif", stack, photometric="minisblack", metadata=None)
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(5)), stack.transpose(1, 2, 0))
    np.testing.assert_array_equal(read(tmp_path / "i.tif", card(1), page=3)[:, :, 0], stack[3])
    with pytest.raises(MisuseError, match="1 channels; this model takes 5"):
        read(tmp_path / "i.tif", card(5), page=3)


def test_files_of_one_image_have_one_page(tmp_path):
    np.save(tmp_path / "i.npy", photo(*SIZE))
    Image.fromarray(photo(*SIZE)).save(tmp_path / "i.png")
    for name in ("i.npy", "i.png"):
        np.testing.assert_array_equal(read(tmp_path / name, card(3, "uint8"), page=0), photo(*SIZE))
        with pytest.raises(MisuseError, match=r"page 1, and .* holds 1, counted from 0; choose another page"):
            read_header(tmp_path / name, page=1)


@pytest.mark.parametrize(
    ("planes", "said"),
    [
        (Planes(page="-1"), "--page -1; write a number, counted from 0, or all"),
        (Planes(page="one"), "--page one; write"),
        (Planes(channel="r,g"), "--channel r,g; write numbers"),
        (Planes(channel=""), "--channel ; write numbers"),
    ],
)
def test_what_is_no_number_is_refused(planes, said):
    with pytest.raises(MisuseError, match=said):
        _ = planes.number, planes.channels


def save_threshold(folder, card):
    """A network that calls pixels of a 16-bit image bright from 32768 on."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", count, "H", "W"])
        for name, count in (("image", 1), ("scores", 2))
    ]
    weights = {"w": np.array([[[[0]]], [[[1]]]], np.float32), "b": np.array([32767.5, 0], np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["image", "w", "b"], ["scores"])], "g", ends[:1], ends[1:],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    set_metadata(model, CARD_KEY, card.to_json())
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def test_all_pages_of_a_stack_get_a_result_each(tmp_path):
    stack = np.random.default_rng(0).integers(0, 65536, (2, 6, 2, *SIZE), np.uint16)
    path = tmp_path / "s.ome.tif"
    tifffile.imwrite(path, stack, photometric="minisblack", metadata={"axes": "TZCYX"})
    tifffile.imwrite(tmp_path / "one.tif", stack[0, 0], imagej=True, photometric="minisblack", metadata={"axes": "CYX"})
    with Network(save_threshold(tmp_path, card(1))) as net:
        options = ReadOptions(channels=(1,))
        products = Products(stats=tmp_path / "t.csv", cog=False)
        records = list(
            label_files(
                net, [path, tmp_path / "one.tif"], tmp_path / "o", options=options, all_pages=True, products=products,
                overlay=True,
            )
        )  # fmt: skip
        (record,) = label_files(net, [path], tmp_path / "p", options=replace(options, page=7))
    assert [record.get("page") for record in records] == [*range(12), None]
    for number, plane in enumerate(stack[:, :, 1].reshape(12, *SIZE)):
        labels = np.asarray(Image.open(tmp_path / f"o/s.ome.page{number:02d}.png"))
        np.testing.assert_array_equal(labels, plane > 32767)
        assert (tmp_path / f"o/s.ome.page{number:02d}.overlay.png").exists()
    assert (tmp_path / "o/one.png").exists()
    assert record["page"] == 7 and record["labels"] == str(tmp_path / "p/s.ome.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "p/s.ome.png")), stack[1, 1, 1] > 32767)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[1].startswith(f"{path} page 0,0,dark,") and len(lines) == 1 + 13 * 2


@pytest.mark.slow
def test_the_command_takes_pages_and_channels(tmp_path):
    stack = np.random.default_rng(0).integers(0, 65536, (3, 2, *SIZE), np.uint16)
    tifffile.imwrite(tmp_path / "s.tif", stack, imagej=True, photometric="minisblack", metadata={"axes": "ZCYX"})
    model = save_threshold(tmp_path, card(1))
    words = [model, tmp_path / "s.tif", "-o", tmp_path / "o", "--channel", "0", "--json"]
    records = label_records(command("infer", *words, "--page", "all"))
    assert [record["page"] for record in records] == [0, 1, 2]
    for number in range(3):
        labels = np.asarray(Image.open(tmp_path / f"o/s.page{number}.png"))
        np.testing.assert_array_equal(labels, stack[number, 0] > 32767)
    assert "page 3, and" in one_error(command("infer", *words[:-1], "--page", "3", ok=1))


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}], ids=["strips", "tiles"])
def test_images_of_an_ome_file_follow_each_other(tmp_path, caplog, options):
    """As of microscopes that write positions, or an overview and a stack, into one file."""
    random = np.random.default_rng(0)
    slices = random.integers(0, 65536, (3, *SIZE), np.uint16)
    positions = random.integers(0, 65536, (2, 2, 50, 45), np.uint16)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(slices, photometric="minisblack", metadata={"axes": "ZYX", "Name": "stack"}, **options)
        for position in positions:
            file.write(position, photometric="minisblack", metadata={"axes": "CYX"}, **options)
    assert read_header(path).pages == 5
    for page in range(3):
        np.testing.assert_array_equal(read(path, card(1), page)[:, :, 0], slices[page])
    for page in (3, 4):
        header = read_header(path, page=page)
        assert (header.size, header.bands) == ((50, 45), 2)
        np.testing.assert_array_equal(read(path, card(2), page), np.moveaxis(positions[page - 3], 0, 2))
    caplog.clear()
    np.testing.assert_array_equal(read(path, card(1))[:, :, 0], slices[0])
    assert f"{path} holds 5 images; only the first is used (see --page)" in caplog.text
    with pytest.raises(MisuseError, match=r"page 5, and .* holds 5, counted from 0; choose another page"):
        read_header(path, page=5)


def test_sizes_of_a_pyramid_are_no_images_of_an_ome_file(tmp_path):
    array = photo(128, 160)
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        for _ in range(2):
            file.write(array, photometric="rgb", subifds=1, tile=(32, 32), metadata={"axes": "YXS"})
            file.write(array[::2, ::2], photometric="rgb", subfiletype=1, tile=(32, 32))
    assert read_header(path).pages == 2
    np.testing.assert_array_equal(read(path, card(3, "uint8"), 1), array)


def save_set(folder, planes, held):
    """An OME image whose planes lie in files of their own, by OME's UUIDs; those of `held` are written."""
    names = [f"z{number}.ome.tif" for number in range(len(planes))]
    data = "".join(
        f'<TiffData FirstZ="{number}" IFD="0" PlaneCount="1">'
        f'<UUID FileName="{name}">urn:uuid:{number}</UUID></TiffData>'
        for number, name in enumerate(names)
    )
    height, width = planes[0].shape
    for number in held:
        xml = (
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:{number}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" '
            f'SizeX="{width}" SizeY="{height}" SizeZ="{len(planes)}" SizeC="1" SizeT="1">'
            f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{data}</Pixels></Image></OME>'
        )
        tifffile.imwrite(folder / names[number], planes[number], description=xml, metadata=None)
    return [folder / names[number] for number in held]


def test_a_file_of_an_ome_set_stands_for_its_own_planes(tmp_path, caplog):
    planes = np.random.default_rng(0).integers(0, 65536, (3, *SIZE), np.uint16)
    files = save_set(tmp_path, planes, range(3))
    for number, path in enumerate(files):
        np.testing.assert_array_equal(read(path, card(1))[:, :, 0], planes[number])
        np.testing.assert_array_equal(read(path, card(1), 2)[:, :, 0], planes[2])  # by its number in the set
    assert "only the first" not in caplog.text
    with Network(save_threshold(tmp_path, card(1))) as net:
        records = list(label_files(net, files, tmp_path / "o", all_pages=True))
    assert len(records) == 3
    for number in range(3):
        labels = np.asarray(Image.open(tmp_path / f"o/z{number}.ome.png"))
        np.testing.assert_array_equal(labels, planes[number] > 32767)
    (tmp_path / "alone").mkdir()
    (alone,) = save_set(tmp_path / "alone", planes, [1])
    np.testing.assert_array_equal(read(alone, card(1))[:, :, 0], planes[1])
    with pytest.raises(DeployError, match=r"does not hold its page 2, .* choose another page$"):  # and is not black
        read(alone, card(1), 2)

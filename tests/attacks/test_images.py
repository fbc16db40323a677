"""Image files that are damaged, edited or made to harm: one line each, and nothing half-written."""

import io

import numpy as np
import pytest
import tifffile
from fcn_deploy.runtime.images.header import read_header
from fcn_deploy.runtime.images.read import read_image
from fcn_deploy.runtime.labelling.regions import label_regions
from helpers import photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter

RGB = ModelCard(("background", "thing", "other"))


def hostile(tmp_path):
    """Broken files of every kind."""
    (tmp_path / "text.png").write_text("this is no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "pickle.npy").write_bytes(b"\x93NUMPY\x01\x00\x16\x00{'descr':'|O','fortran_order':False,'shape':(1,)}")
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (900000000, 900000000, 3), }"
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (tmp_path / "text.tif").write_text("II*\0 no tiff")
    for suffix in ("png", "jpg", "tif", "gif", "webp", "npy"):
        path = tmp_path / f"cut.{suffix}"
        noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
        if suffix == "npy":
            np.save(path, noise)
        else:
            Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return sorted(tmp_path.iterdir())


def test_broken_files_are_one_line_each(tmp_path):
    files = hostile(tmp_path)
    assert len(files) == 11
    for path in files:
        with pytest.raises(DeployError) as caught:
            read_image(path, RGB)
        assert path.name in str(caught.value) and "\n" not in str(caught.value), path


def test_headers_of_broken_files_are_one_line_each_or_the_size(tmp_path):
    for path in hostile(tmp_path):
        try:
            size = read_header(path).size
        except DeployError as error:
            assert path.name in str(error) and "\n" not in str(error), path
        else:
            assert path.name.startswith("cut.") and size == (64, 64), path
    with pytest.raises(MisuseError, match="does not exist"):
        read_header(tmp_path / "none.png")


def test_postscript_in_disguise_is_not_run(tmp_path):
    (tmp_path / "x.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DeployError, match="not an image of a known format"):
        read_image(tmp_path / "x.png", RGB)


def encoded(kind):
    """A small photo as a file of this kind."""
    file, image = io.BytesIO(), photo(24, 40)
    if kind == "npy":
        np.save(file, image)
    elif kind == "tiles":
        tifffile.imwrite(file, image, tile=(16, 16), compression="zlib")
    elif kind == "planes":
        tifffile.imwrite(file, image.transpose(2, 0, 1), photometric="rgb", planarconfig="separate", rowsperstrip=7,
                         compression="jpeg")  # fmt: skip
    elif kind in ("imagej", "ome"):
        tifffile.imwrite(file, image.transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"},
                         **{kind: True})  # fmt: skip
    else:
        Image.fromarray(image).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp", "tiff", "tiles", "planes", "imagej", "ome", "npy"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_edited_file_is_one_line_or_an_image(tmp_path_factory, kind, data):
    content = bytearray(encoded(kind))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("edit") / f"x.{'tif' if kind in ('tiles', 'planes', 'imagej', 'ome') else kind}"
    path.write_bytes(content)
    try:
        image = read_image(path, RGB)
    except DeployError as error:
        assert "\n" not in str(error) and path.name in str(error)
    else:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


@pytest.fixture
def net(exports):
    # Little enough for a few dozen tiles.
    with Segmenter(exports / "narrow.engine", threads=2, memory=3_500_000) as found:
        yield found


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("layout", [{"tile": (128, 128), "compression": "zlib"}, {"rowsperstrip": 16}, {}])
def test_a_truncated_file_is_one_line_and_leaves_nothing(net, tmp_path, share, layout):
    tifffile.imwrite(tmp_path / "whole.tif", photo(1500, 100), **layout)
    content = (tmp_path / "whole.tif").read_bytes()
    (tmp_path / "whole.tif").unlink()
    (tmp_path / "cut.tif").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DeployError, match=r"cut.tif.*(truncated|damaged)") as caught:
        label_regions(net.network, tmp_path / "cut.tif", tmp_path / "out.tif")
    assert "\n" not in str(caught.value) and sorted(path.name for path in tmp_path.iterdir()) == ["cut.tif"]


def test_bytes_that_decode_to_nothing_are_one_line(net, tmp_path):
    tifffile.imwrite(tmp_path / "i.tif", photo(1500, 100), tile=(128, 128), compression="zlib")
    content = bytearray((tmp_path / "i.tif").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\x55" * 2000
    (tmp_path / "i.tif").write_bytes(content)
    with pytest.raises(DeployError, match=r"cannot read rows \d+ to \d+ of .*i.tif: .*damaged"):
        label_regions(net.network, tmp_path / "i.tif", tmp_path / "out.tif")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i.tif"]

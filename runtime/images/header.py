"""What an image file says of itself before a pixel is decoded: the one place where its size is found out."""

import io
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError, MisuseError
from .deep import bits_of
from .gdal import is_gdals, open_gdal
from .georeference import GEOREFERENCE
from .pillow import check_pixels, open_pillow
from .ranged import opened
from .tiff import is_tiff, lay_out

if TYPE_CHECKING:
    from PIL import Image as Pictures

log = logging.getLogger(__name__)

DEFAULT_MAX_PIXELS = 500_000_000  # above a 20000×20000 image
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
TAGS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")  # chunks of a PNG that may hold one
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


@dataclass(frozen=True)
class Header:
    """What an image file says of itself.

    Attributes:
        path: of the file.
        format: `NPY`, `TIFF`, `GDAL`, or what Pillow calls it: `PNG`, `JPEG`, …
        size: (height, width) in pixels, as the image is read: turned upright by its EXIF orientation.
        bands: samples of a pixel, as stored; 3 of a palette in a TIFF; 1 where they are pages without a name.
        dtype: of a sample, as stored.
        pages: images in the file, without overviews, thumbnails and masks.
        own: those of them, by number, that the file holds itself: others are in other files of an OME set.
        page: the one that is read, counted from 0; None: the first, as nobody asked for one.
        mode: Pillow's, where Pillow decodes the file; None for other files.
        georeferenced: whether it says itself where it lies: a GeoTIFF, or one with RPCs.
        bits: of a sample, where Pillow decodes 8 of more; 0: as Pillow or tifffile decode them.
    """

    path: Path
    format: str
    size: tuple[int, int]
    bands: int
    dtype: np.dtype[Any]
    pages: int = 1
    mode: str | None = None
    georeferenced: bool = False
    bits: int = 0
    page: int | None = None
    own: tuple[int, ...] = (0,)

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


def read_header(path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS, page: int | None = None) -> Header:
    """The header of an image file; nothing is decoded.

    Args:
        path: of it.
        max_pixels: an image of more is refused.
        page: of a file of several images, counted from 0.

    Raises:
        DeployError: not an image, damaged, or larger than `max_pixels`.
        MisuseError: an array or axes that are not an image's, no pixels, or no such page.
    """
    path = Path(path)
    with reading(path):
        kind = file_kind(path)
        if kind == "NPY":
            header = _npy(path)
        elif kind == "TIFF":
            header = _tiff(path, page)
        elif kind == "GDAL":
            with open_gdal(path) as raster:
                header = Header(path, kind, raster.size, raster.bands, raster.dtype, georeferenced=raster.georeferenced)
        else:
            with open_pillow(path, max_pixels) as picture:
                header = _picture(picture, path, page)
        if page is not None and not 0 <= page < header.pages:
            raise MisuseError(f"page {page}, and {path} holds {header.pages}, counted from 0; choose another page")
        check_pixels(header.size, max_pixels, path)
    return replace(header, page=page)


def file_kind(path: Path) -> str:
    """`NPY`, `TIFF` or `GDAL`, by first bytes and suffix; "" for what is left to Pillow. Raises OSError."""
    if opened(path) is not path:
        return "TIFF"
    with path.open("rb") as file:
        start = file.read(6)
    if start == b"\x93NUMPY" or path.suffix.lower() == ".npy":
        return "NPY"
    if is_gdals(path):
        return "GDAL"
    return "TIFF" if is_tiff(start) else ""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file in the block is raised as one line, a DeployError."""
    try:
        yield
    except DeployError:
        raise
    except FileNotFoundError as error:
        raise MisuseError(f"{path} does not exist; name an image") from error
    except MemoryError as error:
        raise DeployError(f"{path} does not fit into memory; use a smaller image") from error
    except Exception as error:  # decoders raise whatever they meet in a hostile file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DeployError(f"cannot read {path} as an image: {reason}; is it damaged or truncated?") from error


def open_npy(path: Path) -> NDArray[Any]:
    """The array of a .npy, [H, W] or [H, W, C], mapped: a header that promises terabytes costs nothing.

    Raises MisuseError for an array of another shape, and what NumPy raises for a broken file.
    """
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if "Python objects" not in str(error):
            raise
        raise MisuseError(f"{path} holds Python objects, which are never loaded; save an array of numbers") from error
    if not isinstance(array, np.ndarray):
        raise MisuseError(f"{path} holds several arrays, as .npz files do; save the image alone by numpy.save")
    if array.dtype.kind not in "buifc":
        raise MisuseError(f"{path} holds {str(array.dtype)[:60]}, which are no numbers; save an array of numbers")
    if array.ndim not in (2, 3) or 0 in array.shape[2:]:
        raise MisuseError(f"{path} holds an array of shape {list(array.shape)}; an image is [H, W] or [H, W, C]")
    return array


def _npy(path: Path) -> Header:
    array = open_npy(path)
    height, width, *bands = array.shape
    return Header(path, "NPY", (height, width), bands[0] if bands else 1, array.dtype)


def _picture(picture: "Pictures.Image", path: Path, page: int | None) -> Header:
    from PIL import ImageMode

    pages = getattr(picture, "n_frames", 1)
    if page is not None and 0 <= page < pages:
        picture.seek(page)

    bits = bits_of(path, picture)
    return Header(
        path,
        "JPEG" if picture.format == "MPO" else picture.format or "",  # several JPEGs in one, as phones write them
        _upright_size(picture, path),
        len(picture.getbands()),
        np.dtype(np.uint16 if bits else ImageMode.getmode(picture.mode).typestr),
        pages,
        picture.mode,
        bits=bits,
        own=tuple(range(pages)),
    )


def _tiff(path: Path, page: int | None) -> Header:
    import tifffile

    with tifffile.TiffFile(opened(path), name=path.name) as file:
        found = lay_out(file, path, page=page)
        georeferenced = any(found.tag(code) is not None for code in GEOREFERENCE)
        return Header(
            path, "TIFF", found.upright, found.bands, found.dtype, found.images, None, georeferenced, own=found.own
        )


def _upright_size(picture: "Pictures.Image", path: Path) -> tuple[int, int]:
    """(height, width) after ImageOps.exif_transpose."""
    width, height = picture.size
    return (width, height) if orientation_of(picture, path) in TURNED else (height, width)


def orientation_of(picture: "Pictures.Image", path: Path) -> int:
    """The EXIF orientation of a file that Pillow has opened, 1 where it says none; no pixel is decoded."""
    from PIL import ExifTags, Image

    if picture.format != "PNG":
        exif = picture.getexif()
    # PngImageFile.getexif decodes the whole image, for the sake of a tag that may come after the pixels.
    elif (tags := _tags_after_pixels(path)) is None:
        exif = Image.Image.getexif(picture)
    else:
        with Image.open(io.BytesIO(tags), formats=("PNG",)) as without_pixels:
            exif = Image.Image.getexif(without_pixels)
    return int(exif.get(ExifTags.Base.Orientation, 1))


def _tags_after_pixels(path: Path) -> bytes | None:
    """A PNG of the header, EXIF and text of a PNG that has such after its pixels; None: it has none there."""
    with path.open("rb") as file:
        found = [file.read(8)]
        pixels = after = False
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            pixels |= kind == b"IDAT"
            if kind not in (b"IHDR", *TAGS):
                file.seek(length + 4, os.SEEK_CUR)
                continue
            after |= pixels and kind in TAGS
            content = file.read(length)
            file.seek(4, os.SEEK_CUR)
            # Checksums after the pixels are none that Pillow looks at, so that they are made anew.
            found += [head, content, zlib.crc32(kind + content).to_bytes(4, "big")]
    return b"".join([*found, PNG_END]) if after else None

"""What an image file says of itself before a pixel is decoded: the one place where its size is found out."""

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError, MisuseError

if TYPE_CHECKING:
    from PIL import Image as Pictures

log = logging.getLogger(__name__)

# Pillow's names. Not all it knows: some start other programs (EPS), or are no images (PDF).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
DEFAULT_MAX_PIXELS = 500_000_000  # above a 20000×20000 image
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Header:
    """What an image file says of itself.

    Attributes:
        path: of the file.
        format: `NPY`, `TIFF`, or what Pillow calls it: `PNG`, `JPEG`, …
        size: (height, width) in pixels, as the image is read: turned upright by its EXIF orientation.
        bands: samples of a pixel, as stored; 1 where they are stored as pages of a TIFF, or with a palette.
        dtype: of a sample, as stored.
        pages: images in the file; the first is read.
        mode: Pillow's, where Pillow decodes the file; None for .npy, and for TIFFs which it does not take for 8 bits.
        georeferenced: whether it is a GeoTIFF.
    """

    path: Path
    format: str
    size: tuple[int, int]
    bands: int
    dtype: np.dtype[Any]
    pages: int = 1
    mode: str | None = None
    georeferenced: bool = False

    @property
    def pixels(self) -> int:
        return self.size[0] * self.size[1]


def read_header(path: str | os.PathLike[str], max_pixels: int = DEFAULT_MAX_PIXELS) -> Header:
    """The header of an image file; nothing is decoded.

    Raises:
        DeployError: not an image, damaged, or larger than `max_pixels`.
        MisuseError: an array or axes that are not an image's, or no pixels.
    """
    path = Path(path)
    with reading(path):
        if path.suffix.lower() == ".npy":
            header = _npy(path)
        elif path.suffix.lower() in (".tif", ".tiff"):
            header = _tiff(path)
        else:
            with open_pillow(path, max_pixels) as picture:
                header = _picture(picture, path)
        check_pixels(header.size, max_pixels, path)
    return header


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


def check_pixels(size: tuple[int, int], max_pixels: int, path: Path) -> None:
    """Raise DeployError where (height, width) are more than `max_pixels`, and MisuseError where a side is 0."""
    height, width = size
    if not height or not width:
        raise MisuseError(f"{path} has no pixels ({height}×{width}); remove it")
    if width * height > max_pixels:
        raise DeployError(
            f"{path} has {width}×{height} = {width * height:,} pixels, over the limit of {max_pixels:,}; "
            "raise it with max_pixels= (--max-pixels) if you trust the file"
        )


def open_npy(path: Path) -> NDArray[Any]:
    """The array of a .npy, [H, W] or [H, W, C], mapped: a header that promises terabytes costs nothing.

    Raises MisuseError for an array of another shape, and what NumPy raises for a broken file.
    """
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (2, 3) or 0 in array.shape[2:]:
        raise MisuseError(f"{path} holds an array of shape {list(array.shape)}; an image is [H, W] or [H, W, C]")
    return array


@contextmanager
def open_pillow(path: Path, max_pixels: int) -> Iterator["Pictures.Image"]:
    """Image.open, with `max_pixels` instead of Pillow's own limit, which is one for the whole process."""
    from PIL import Image, UnidentifiedImageError

    with _pillow_limit, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            picture = Image.open(path, formats=FORMATS)
        except UnidentifiedImageError as error:
            raise DeployError(f"{path} is not an image of a known format; remove or convert it") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with picture:
        check_pixels((picture.height, picture.width), max_pixels, path)
        yield picture


def _npy(path: Path) -> Header:
    array = open_npy(path)
    height, width, *bands = array.shape
    return Header(path, "NPY", (height, width), bands[0] if bands else 1, array.dtype)


def _picture(picture: "Pictures.Image", path: Path) -> Header:
    from PIL import ImageMode

    return Header(
        path,
        picture.format or "",
        _upright_size(picture, path),
        len(picture.getbands()),
        np.dtype(ImageMode.getmode(picture.mode).typestr),
        getattr(picture, "n_frames", 1),
        picture.mode,
    )


def _tiff(path: Path) -> Header:
    """Pillow's word for 8-bit grey and colour, as it turns them upright; tifffile's for all others."""
    plain = None
    try:
        # Its pixels are counted by the caller, as of every file.
        with open_pillow(path, DEFAULT_MAX_PIXELS) as picture:
            if not picture.mode.startswith(("I", "F")):
                plain = _picture(picture, path)
    except Exception as error:  # tifffile reads more kinds, or says what is wrong
        log.debug("Pillow does not read %s: %s", path, error)
    import tifffile

    georeferenced = False
    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            georeferenced = bool(page.is_geotiff)
            if plain is not None:
                return replace(plain, pages=len(file.pages), georeferenced=georeferenced)
            series = file.series[0]
            sides = dict(zip(series.axes, series.shape, strict=True))
            if not {"Y", "X"} <= set(sides):
                raise MisuseError(f"{path} has axes {series.axes}, which are not an image's")
            size, dtype = (sides["Y"], sides["X"]), np.dtype(page.dtype)
            return Header(path, "TIFF", size, page.samplesperpixel, dtype, len(file.pages), None, georeferenced)
    except Exception:
        if plain is not None and not georeferenced:  # Pillow is content with less
            return plain
        raise


def _upright_size(picture: "Pictures.Image", path: Path) -> tuple[int, int]:
    """(height, width) after ImageOps.exif_transpose."""
    from PIL import ExifTags, Image

    width, height = picture.size
    if picture.format == "TIFF":
        return height, width  # Pillow has it turned already
    if picture.format == "PNG":
        # PngImageFile.getexif decodes the whole image, for the sake of a tag that may come after the pixels.
        if _tags_follow_pixels(path):
            picture.load()
        exif = Image.Image.getexif(picture)
    else:
        exif = picture.getexif()
    return (width, height) if exif.get(ExifTags.Base.Orientation, 1) in TURNED else (height, width)


def _tags_follow_pixels(path: Path) -> bool:
    """Whether a PNG has EXIF or text chunks after its pixels."""
    with path.open("rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            pixels |= head[4:] == b"IDAT"
            if pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False

"""Image files as Pillow opens them, under a limit of pixels that is ours."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import DeployError, MisuseError, OverBudgetError
from .find import package_for

if TYPE_CHECKING:
    from PIL import Image as Pictures

# Pillow's names. Not all it knows: some start other programs (EPS), or are no images (PDF).
# Those of preinit() first: for the first other one Pillow loads all that it has.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "AVIF", "TGA")
LFS = b"version https://git-lfs"  # how a file begins that stands for another
_limit = threading.Lock()


def check_pixels(size: tuple[int, int], max_pixels: int, path: Path) -> None:
    """Raise OverBudgetError where (height, width) are more than `max_pixels`, and MisuseError where a side is 0."""
    height, width = size
    if not height or not width:
        raise MisuseError(f"{path} has no pixels ({height}×{width}); remove it")
    if width * height > max_pixels:
        raise OverBudgetError(
            f"{path} has {width}×{height} = {width * height:,} pixels, over the limit of {max_pixels:,}; "
            "raise it with max_pixels= (--max-pixels) if you trust the file"
        )


@contextmanager
def open_pillow(path: Path, max_pixels: int) -> Iterator["Pictures.Image"]:
    """Image.open, with `max_pixels` instead of Pillow's own limit, which is one for the whole process."""
    # Of a name Pillow maps what is not compressed into memory, and garbles it where it is stored sideways (13.0.0).
    with path.open("rb") as file, _opened(file, path) as picture:
        check_pixels((picture.height, picture.width), max_pixels, path)
        yield picture


def _opened(file: IO[bytes], path: Path) -> "Pictures.Image":
    from PIL import Image, UnidentifiedImageError

    Image.preinit()
    with _limit, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            package = package_for(path)
            remedy = f"convert it ({package} reads it)" if package else "remove or convert it"
            file.seek(0)
            start = file.read(len(LFS))
            if not start:
                raise DeployError(f"{path} is empty, a file of 0 bytes; fetch it again, or remove it") from error
            if start == LFS:
                remedy = "it is a pointer of Git LFS: fetch the file itself by git lfs pull"
            raise DeployError(f"{path} is not an image of a known format; {remedy}") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def samples_of(picture: "Pictures.Image", card: ModelCard, as_stored: bool) -> NDArray[Any]:
    """Grey or RGB as the card wants it, what Pillow cannot turn into them soundly, or its samples `as_stored`."""
    if as_stored and picture.mode in ("L", "LA", "RGB", "RGBA"):
        return np.asarray(picture)
    if picture.mode in ("1", "I", "F"):
        return np.asarray(picture)
    if picture.mode.startswith("I;16"):
        # Pillow would clip to 255 on conversion instead of scaling.
        return np.asarray(picture).astype(np.uint16)
    if (picture.mode, card.channels) in (("RGBA", 4), ("LA", 2)):
        return np.asarray(picture)
    grey = card.channels == 1
    wanted = ("LA" if grey else "RGBA") if picture.has_transparency_data else "L" if grey else "RGB"
    return np.asarray(picture if picture.mode == wanted else picture.convert(wanted))  # to its own mode it would copy

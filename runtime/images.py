"""Image files in, as the card wants them; labels and overlay pictures out."""

import glob
import logging
import math
import os
import threading
import warnings
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .errors import DeployError, MisuseError
from .files import replacing
from .model_card import ModelCard

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".avif", ".tga", ".npy",
))  # fmt: skip
# Pillow's names. Not all it knows: some start other programs (EPS), or are no images (PDF).
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
DEFAULT_MAX_PIXELS = 500_000_000  # above a 20000×20000 image
ROWS = 256  # drawn at a time: floats of the whole picture would take many times its memory
_pillow_limit = threading.Lock()


def find_images(inputs: Sequence[str | os.PathLike], suffixes: Container[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Files for a list of images, folders (not descended into) and globs (`**` descends), in name order.

    Args:
        inputs: paths and patterns.
        suffixes: what is taken from folders and globs. A file that is named is taken whatever its suffix.

    Raises:
        MisuseError: an input that does not exist, or holds no images.
    """
    found: list[Path] = []
    for item in map(os.fspath, inputs):
        path = Path(item)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
            if not files:
                raise MisuseError(f"{item} holds no images; name a folder with some ({', '.join(_COMMON)}, …)")
        elif path.exists():
            files = [path]
        elif glob.has_magic(item):
            matches = sorted(map(Path, glob.glob(item, recursive=True)))  # noqa: PTH207 (absolute patterns too)
            files = [file for file in matches if file.suffix.lower() in suffixes and file.is_file()]
            if not files:
                raise MisuseError(f"{item} matches no images; check the pattern, and quote it")
        else:
            raise MisuseError(f"{item} does not exist; name an image, a folder or a glob")
        found += files
    return list(dict.fromkeys(found))


_COMMON = (".jpg", ".png", ".tif", ".npy")


def read_image(path: str | os.PathLike, card: ModelCard, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Read an image file as the card wants it.

    Grey, palette, CMYK and other colour spaces become RGB (or grey, for a card of one channel); alpha is
    dropped; 16 bits become 8 by dropping the low byte; JPEGs are turned upright by their EXIF orientation;
    of animations and stacks the first image is taken, and a warning says so. `.npy` arrays and TIFFs of
    any bands are taken as they are.

    Returns:
        [H, W, channels] of the card's dtype.

    Raises:
        DeployError: not an image, truncated, or larger than `max_pixels`.
        MisuseError: channels or dtype that the card does not allow.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            return fit(_read_npy(path, max_pixels), card, path)
        common = card.dtype == "uint8" and card.channels in (1, 3)
        tiff = path.suffix.lower() in (".tif", ".tiff")
        if tiff and not (common and _is_plain_tiff(path)):
            return fit(_read_tiff(path, card, max_pixels), card, path)
        return fit(_read_pillow(path, card, max_pixels), card, path)
    except DeployError:
        raise
    except FileNotFoundError as error:
        raise DeployError(f"{path} does not exist") from error
    except MemoryError as error:
        raise DeployError(f"{path} does not fit into memory; use a smaller image") from error
    except Exception as error:  # decoders raise whatever they meet in a hostile file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DeployError(f"cannot read {path} as an image: {reason}; is it damaged or truncated?") from error


def check_pixels(width: int, height: int, max_pixels: int, path: Path) -> None:
    if width * height > max_pixels:
        raise DeployError(
            f"{path} has {width}×{height} = {width * height:,} pixels, over the limit of {max_pixels:,}; "
            "raise it with max_pixels= (--max-pixels) if you trust the file"
        )


@contextmanager
def open_pillow(path: Path, max_pixels: int):
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
        check_pixels(*picture.size, max_pixels, path)
        yield picture


def _read_pillow(path: Path, card: ModelCard, max_pixels: int) -> np.ndarray:
    from PIL import ImageOps

    with open_pillow(path, max_pixels) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            log.warning("%s holds %d images; only the first is used", path, picture.n_frames)
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.mode in ("I", "F"):
            return np.asarray(picture)
        if picture.mode.startswith("I;16"):
            # Pillow would clip to 255 on conversion instead of scaling.
            return np.asarray(picture).astype(np.uint16)
        return np.asarray(picture.convert("L" if card.channels == 1 else "RGB"))


def _is_plain_tiff(path: Path) -> bool:
    """Whether Pillow reads this TIFF as 8-bit grey or colour."""
    try:
        with open_pillow(path, DEFAULT_MAX_PIXELS) as picture:
            return not picture.mode.startswith(("I", "F"))
    except Exception:
        return False  # tifffile reads more kinds, or says what is wrong


def image_size(path: str | os.PathLike, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """(height, width) that read_image would give, in pixels, from the file's header: nothing is decoded.

    Raises:
        DeployError: not an image, damaged, or larger than `max_pixels`.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".npy":
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
            if len(shape) not in (2, 3) or 0 in shape:
                raise DeployError(f"{path} holds an array of shape {list(shape)}; an image is [H, W] or [H, W, C]")
            height, width = shape[:2]
        elif path.suffix.lower() in (".tif", ".tiff") and not _is_plain_tiff(path):
            import tifffile

            with tifffile.TiffFile(path) as file:
                sides = dict(zip(file.series[0].axes, file.series[0].shape, strict=True))
            if not {"Y", "X"} <= set(sides):
                raise DeployError(f"{path} has axes {''.join(sides)}, which are not an image's")
            height, width = sides["Y"], sides["X"]
        else:
            with open_pillow(path, max_pixels) as picture:
                width, height = _upright_size(picture, path)
        check_pixels(width, height, max_pixels, path)
        return height, width
    except DeployError:
        raise
    except FileNotFoundError as error:
        raise DeployError(f"{path} does not exist") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DeployError(f"cannot read {path} as an image: {reason}; is it damaged or truncated?") from error


def _upright_size(picture, path: Path) -> tuple[int, int]:
    """(width, height) after ImageOps.exif_transpose."""
    from PIL import ExifTags, Image

    if picture.format == "TIFF":
        return picture.size  # Pillow has it turned already
    if picture.format == "PNG":
        # PngImageFile.getexif decodes the whole image, for the sake of a tag that may come after the pixels.
        if _tags_follow_pixels(path):
            picture.load()
        exif = Image.Image.getexif(picture)
    else:
        exif = picture.getexif()
    width, height = picture.size
    return (height, width) if exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) else (width, height)


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


def _read_npy(path: Path, max_pixels: int) -> np.ndarray:
    # Mapped first: a header that promises terabytes fails here, not in an allocation.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim not in (2, 3):
        raise MisuseError(f"{path} holds an array of shape {list(array.shape)}; an image is [H, W] or [H, W, C]")
    check_pixels(array.shape[1], array.shape[0], max_pixels, path)
    return np.array(array)


def _read_tiff(path: Path, card: ModelCard, max_pixels: int) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        if "Y" not in axes or "X" not in axes:
            raise MisuseError(f"{path} has axes {axes}, which are not an image's")
        check_pixels(shape[axes.index("X")], shape[axes.index("Y")], max_pixels, path)
        array, photometric = series.asarray(), series.keyframe.photometric.name
    # Bands are the samples of a pixel (S), or channels stored one after the other (C); what remains is a stack.
    bands = next((axis for axis in "SC" if axis in axes), None)
    if bands is None and len(axes) == 3 and shape[0] == card.channels and card.channels not in (1, 3):
        bands = axes[0]  # some writers store bands as pages; three grey pages are pages all the same
    for axis in axes:
        if axis not in ("Y", "X", bands):
            count = array.shape[axes.index(axis)]
            if count > 1:
                log.warning("%s holds a stack of %d images; only the first is used", path, count)
            array = array.take(0, axes.index(axis))
            axes = axes.replace(axis, "", 1)
    array = array.transpose([axes.index(axis) for axis in ("Y", "X", bands) if axis])
    if photometric == "MINISWHITE" and array.dtype.kind == "u":
        array = np.iinfo(array.dtype).max - array
    if photometric == "RGB" and card.channels == 3 and array.ndim == 3:
        array = array[:, :, :3]  # alpha is dropped
    return array


def fit(array: np.ndarray, card: ModelCard, path: Path) -> np.ndarray:
    """[H, W] or [H, W, C] of some dtype as [H, W, channels] of the card's, where that is sound."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.ndim == 2:
        array = array[:, :, None]
        if card.channels == 3:
            array = np.repeat(array, 3, axis=2)
    if array.shape[2] != card.channels:
        raise MisuseError(f"{path} has {array.shape[2]} channels; this model takes {card.channels}")
    if array.dtype == np.int32 and card.dtype in ("uint8", "uint16") and 0 <= array.min() <= array.max() < 65536:
        array = array.astype(np.uint16)  # what Pillow makes of some 16-bit files
    if array.dtype == np.bool_ and card.dtype == "uint8":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16 and card.dtype == "uint8":
        array = (array >> 8).astype(np.uint8)
    if array.dtype != card.dtype:
        raise MisuseError(f"{path} holds {array.dtype} values; this model takes {card.dtype}: convert it first")
    if 0 in array.shape:
        raise MisuseError(f"{path} has no pixels (shape {list(array.shape)})")
    return np.ascontiguousarray(array)


def write_labels(path: str | os.PathLike, labels: np.ndarray, card: ModelCard) -> None:
    """Write labels, [H, W], as a palette PNG in the card's colours (16-bit grey beyond 256 classes)."""
    from PIL import Image

    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        picture.putpalette(np.asarray(card.colors, np.uint8).tobytes())
    write_png(path, picture, RUNS)


TILE = 512  # pixels


def write_maps(
    path: str | os.PathLike, maps: np.ndarray, names: Sequence[str], tiled: bool = False, tags: Sequence = (), **options
) -> None:
    """Write maps, [K, H, W], as a TIFF of a page each, named as they are: `tifffile.imread` gives the same array.

    Masks have 1 bit a pixel. All are lossless; what is not float is compressed.

    Args:
        path: replaced in one step.
        maps: bool, uint8, uint16 or float32; may be a numpy.memmap.
        names: of the pages (TIFF's PageName).
        tiled: in tiles of TILE, which are read and written one at a time.
        tags: for each page: (code, type, count, value).
        options: of tifffile's `write`.
    """
    import tifffile

    def tiles(page: np.ndarray) -> Iterator[np.ndarray]:
        for top in range(0, page.shape[0], TILE):
            for left in range(0, page.shape[1], TILE):
                part = page[top : top + TILE, left : left + TILE]
                yield np.pad(part, [(0, TILE - side) for side in part.shape])

    options = {"photometric": "minisblack"} | options
    if maps.dtype.kind != "f":
        options |= {"compression": "zlib", "compressionargs": {"level": 1}}
    if tiled:
        options |= {"tile": (TILE, TILE), "shape": maps.shape[1:], "dtype": maps.dtype}
    # Beyond 4 GB a plain TIFF cannot point; compression helps, but how much is known afterwards only.
    with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=maps.nbytes > 2**31) as writer:
        for page, name in zip(maps, names, strict=True):
            named = [(285, "s", 0, name), *tags]
            writer.write(
                tiles(page) if tiled else page, metadata=None, software="fcn-deploy",
                # As bytes: texts that are not ASCII would be refused.
                extratags=[(*tag, value.encode() if isinstance(value, str) else value, True) for *tag, value in named],
                **options,
            )  # fmt: skip


RUNS = 3  # zlib's Z_RLE: labels are runs of equal bytes; two thirds of level 1's size, and of its time


def write_png(path: str | os.PathLike, picture, strategy: int = -1) -> None:
    """Write a Pillow image as PNG, atomically. `strategy` is zlib's; -1: its default."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1, compress_type=strategy)  # a third of level 6's time


def overlay(image: np.ndarray, labels: np.ndarray, card: ModelCard, opacity: float = 0.55) -> np.ndarray:
    """The image under the colours of its labels: [H, W, 3] uint8. A class named background stays clear.

    Args:
        image: [H, W, C] as the card says; what is not 8-bit RGB is shown stretched to it.
        labels: [H, W]; or masks, [K, H, W] bool, whose colours are mixed where they overlap.
        opacity: of the colours, 0..1.
    """
    picture = displayable(image)
    colors = np.asarray(card.colors, np.float32)
    alpha = np.full((len(colors), 1), opacity, np.float32)
    for index, name in enumerate(card.classes):
        if name.lower() == "background":
            alpha[index] = 0
    result = np.empty(picture.shape, np.uint8)
    for top in range(0, len(picture), ROWS):
        rows = slice(top, top + ROWS)
        if labels.ndim == 2:
            strength, color = alpha[labels[rows]], colors[labels[rows]]
        else:
            weights = labels[:, rows] * alpha[:, :, None]
            strength = weights.max(0)[:, :, None]
            color = np.tensordot(weights, colors, (0, 0)) / np.maximum(weights.sum(0), 1e-6)[:, :, None]
        result[rows] = picture[rows] * (1 - strength) + color * strength + 0.5
    return result


def displayable(image: np.ndarray) -> np.ndarray:
    """[H, W, C] of any dtype as [H, W, 3] uint8: the first three bands (or the first), stretched to 0..255."""
    image = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    if image.dtype == np.uint8:
        return image
    values = np.nan_to_num(image.astype(np.float32))
    low, high = np.percentile(values, (1, 99))
    return (np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255 + 0.5).astype(np.uint8)


def overlay_sheet(image: np.ndarray, labels: np.ndarray, card: ModelCard):
    """The overlay with a legend below it, a Pillow image: the classes present, largest first, and their share."""
    from PIL import Image

    picture = Image.fromarray(overlay(image, labels, card))
    if labels.ndim == 2:
        rows = (labels[top : top + ROWS].ravel() for top in range(0, len(labels), ROWS))
        counts = sum(np.bincount(part, minlength=len(card.classes)) for part in rows)
    else:
        counts = np.array([np.count_nonzero(mask) for mask in labels])
    pixels = math.prod(labels.shape[-2:])
    present = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    key = _legend(picture.width, [(card.classes[i], card.colors[i], counts[i] / pixels) for i in present])
    sheet = Image.new("RGB", (max(picture.width, key.width), picture.height + key.height), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(key, (0, picture.height))
    return sheet


def picture_of(kind: str, image: np.ndarray, result: np.ndarray, card: ModelCard):
    """What `--overlay` writes, a Pillow image: an overlay sheet of labels or masks; values are stretched to
    0..255, and grey, or red, green and blue where there are three maps or more.
    """
    if kind != "values":
        return overlay_sheet(image, result, card)
    from PIL import Image

    return Image.fromarray(displayable(result.transpose(1, 2, 0)))


def _legend(width: int, entries: Iterable[tuple[str, tuple[int, int, int], float]]):
    """A strip of colour swatches with names and shares, wrapped to `width` pixels (160 at least)."""
    from PIL import Image, ImageDraw, ImageFont

    width = max(width, 160)
    size = int(np.clip(width // 60, 12, 40))
    font = ImageFont.load_default(size)
    line, gap = size + size // 2, size // 2
    x = y = gap
    placed = []
    for name, color, share in entries:
        text = f"{name} {share:.1%}"
        length = size + gap // 2 + int(font.getlength(text)) + 2 * gap
        if x > gap and x + length > width:
            x, y = gap, y + line
        placed.append((x, y, text, color))
        x += length
    widest = max((px + size + gap + int(font.getlength(text)) + gap for px, _, text, _ in placed), default=0)
    strip = Image.new("RGB", (max(width, widest), y + line + gap // 2), "white")
    draw = ImageDraw.Draw(strip)
    for px, py, text, color in placed:
        draw.rectangle((px, py, px + size, py + size), fill=tuple(color), outline="black")
        draw.text((px + size + gap // 2, py + size / 2), text, fill="black", font=font, anchor="lm")
    return strip

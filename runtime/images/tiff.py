"""TIFFs, by tifffile: where the bands of an image lie, and their samples, in any part, as they are stored."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError, MisuseError
from ..pixels.no_data import hold_together, number_in
from ..planning.kept_rows import NOTHING_KEPT, KeptRows
from .pillow import open_pillow
from .stacks import STANDING_ALONE, find_plane
from .tiff_chunks import KEPT_BYTES, LOOKED_AT, ORIENTATION, SIDEWAYS, WHOLE_PIXELS, Chunks, chunk_size, in_place

log = logging.getLogger(__name__)
# tifffile warns of tags of no data that are not of the image's type, such as 255.0. They are read here.
logging.getLogger("tifffile").addFilter(lambda record: "parsing GDAL_NODATA tag" not in record.getMessage())

Read = Callable[[int, int, int, int], NDArray[Any]]  # top, bottom, left, right → [h, w, bands]
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG = (6, 7)  # compressions whose YCbCr is decoded to RGB
COLOURS = {  # of a photometric interpretation, once it is read
    "MINISBLACK": "grey", "MINISWHITE": "grey", "RGB": "RGB", "PALETTE": "RGB", "YCBCR": "RGB", "SEPARATED": "CMYK",
}  # fmt: skip
LOSSY = {  # compressions that may change numbers, though some of them need not
    6: "JPEG", 7: "JPEG", 22610: "JPEG XR", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000",
    34712: "JPEG 2000", 34892: "JPEG", 34934: "JPEG XR", 50001: "WebP", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip
MASK_PAGES = 32  # among which an image's mask is looked for
# Orientation (TIFF 6.0, page 36): are rows reversed, columns reversed, both then exchanged, to turn it upright?
TURNS = {
    2: (False, True, False), 3: (True, True, False), 4: (True, False, False), 5: (False, False, True),
    6: (True, False, True), 7: (True, True, True), 8: (False, True, True),
}  # fmt: skip


@dataclass(frozen=True)
class TiffLayout:
    """Where an image of a TIFF lies, and what its samples are.

    Attributes:
        size: (height, width) as stored.
        bands: samples of a pixel as read: those of the pages one after the other; 3 of a palette.
        dtype: of a sample as read.
        bits: of a sample, as the file says: 12 in uint16, 4 in uint8.
        colours: `grey`, `RGB`, `CMYK`; "" where bands are no colours.
        alpha: the band that is alpha, or None.
        turned: orientation; 1: upright.
        images: in the file, without overviews, thumbnails and masks.
        pages: whose samples are the bands.
        keyframe: the page whose tags of how samples are stored hold for all.
        tagged: the pages whose other tags are the image's: its own, and behind it the first of a stack that names its
            planes, which says what holds for all of them.
        run: (offset, shape, axes) of pixels that are stored in one run under a single page; None: in pages.
        place: where along the other axes of such a run the image is.
        own: images, by number, that the file holds itself; others are in other files of an OME set.
    """

    size: tuple[int, int]
    bands: int
    dtype: np.dtype[Any]
    bits: int
    colours: str
    alpha: int | None
    turned: int
    images: int
    pages: tuple[Any, ...]
    keyframe: Any
    tagged: tuple[Any, ...]
    run: tuple[int, tuple[int, ...], str] | None
    place: Mapping[str, int]
    own: tuple[int, ...]

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) as read."""
        return self.size[::-1] if self.turned in TURNS and TURNS[self.turned][2] else self.size

    @property
    def premultiplied(self) -> bool:
        """Whether colours are multiplied by alpha (TIFF 6.0, page 31: associated)."""
        return self.alpha is not None and 1 in self.keyframe.extrasamples

    @property
    def palette(self) -> bool:
        """Whether its bands are colours of a palette."""
        return getattr(self.keyframe.photometric, "name", "") == "PALETTE"

    def tag(self, code: int, default: Any = None) -> Any:
        """The value of one of the image's tags."""
        return next((page.tags.valueof(code) for page in self.tagged if code in page.tags), default)


def is_tiff(start: bytes) -> bool:
    """By the first bytes of a file."""
    return start[:4] in SIGNATURES


def lay_out(file: Any, path: Path, channels: int | None = None, page: int | None = None) -> TiffLayout:
    """The layout of an image in an open tifffile.TiffFile: see find_plane.

    Raises:
        MisuseError: no image, or of a kind that is not read; no such page.
        DeployError: damaged.
    """
    plane = find_plane(file, path, channels, page)
    key, axes, shape, across = plane.series.keyframe, plane.axes, plane.series.shape, plane.across
    inner = "S" in axes and shape[axes.index("S")] > 1
    run = None
    if len(plane.series.pages) == 1 and plane.sides:
        if plane.series.dataoffset is None:
            raise MisuseError(f"{path} stores {axes} {list(shape)} under one page; write a page for each image")
        run = (plane.series.dataoffset, shape, axes)
    count = plane.sides[across] if across else key.samplesperpixel if run is None or inner else 1
    high, wide = shape[axes.index("Y")], shape[axes.index("X")]
    own = plane.pages[0].aspage()
    layout = TiffLayout(
        (high, wide), *_samples(key, count, bool(across), path), 1, plane.images, tuple(plane.pages), key,
        (own,) if plane.series.kind in STANDING_ALONE else (own, key), run, plane.place, plane.own,
    )  # fmt: skip
    orientation = layout.tag(ORIENTATION, 1)
    return replace(layout, turned=orientation if orientation in TURNS else 1)


def _samples(key: Any, count: int, across: bool, path: Path) -> tuple[int, np.dtype[Any], int, str, int | None]:
    """`bands`, `dtype`, `bits`, `colours`, `alpha` of a layout, of so many samples, `across` pages or in one."""
    if key.dtype is None:
        formats = getattr(key.sampleformat, "name", key.sampleformat)
        raise MisuseError(f"{path} has samples of {key.bitspersample} bits ({formats}), which are not read; convert it")
    kind = getattr(key.photometric, "name", str(key.photometric))
    if kind not in COLOURS:
        raise MisuseError(f"{path} has {kind} colours, which are not read; convert it to RGB")
    if kind == "PALETTE":
        if key.colormap is None:
            raise DeployError(f"{path} has a palette without colours; is it damaged?")
        return 3, np.dtype(np.uint8), 8, "RGB", None
    extras = len(key.extrasamples)
    alpha = next((count - extras + place for place, extra in enumerate(key.extrasamples) if extra in (1, 2)), None)
    colours = "" if across or (COLOURS[kind] == "grey" and count - extras > 1) else COLOURS[kind]
    return count, np.dtype(key.dtype), key.bitspersample, colours, None if across else alpha


def in_parts(file: Any, path: Path) -> bool:
    """Whether an open tifffile.TiffFile can be read in parts of at most WHOLE_PIXELS / 4 by its tiles or strips alone.

    Raises MisuseError, DeployError: as `lay_out`.
    """
    layout = lay_out(file, path)
    key = layout.keyframe
    small = math.prod(chunk_size(key)) <= WHOLE_PIXELS // 4
    return layout.run is None and small and not _undecodable(key)


def turned(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """[H, W, …] turned upright."""
    rows, columns, exchanged = TURNS.get(orientation, (False, False, False))
    pixels = pixels[:: -1 if rows else 1, :: -1 if columns else 1]
    return pixels.swapaxes(0, 1) if exchanged else pixels


def reader(layout: TiffLayout, path: Path) -> Read:
    """What reads parts of the image, upright: [h, w, bands] of the layout's dtype, inverted grey turned round."""
    return _upright(_stored(layout, path), layout)


def _upright(stored: Read, layout: TiffLayout) -> Read:
    """What reads parts of the image upright, from what reads them as stored."""
    if layout.turned == 1:
        return stored
    rows, columns, exchanged = TURNS[layout.turned]
    height, width = layout.size

    def read(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        if exchanged:
            top, bottom, left, right = left, right, top, bottom
        if rows:
            top, bottom = height - bottom, height - top
        if columns:
            left, right = width - right, width - left
        return turned(stored(top, bottom, left, right), layout.turned)

    return read


def kept_rows(layout: TiffLayout, masked: bool) -> KeptRows:
    """What is kept decoded beside a region that is read, of an image that is `masked` by another."""
    key = layout.keyframe
    if layout.run is not None or _undecodable(key) or in_place(layout.pages[0]):
        return NOTHING_KEPT
    (high, wide), width = chunk_size(key), key.imagewidth
    if layout.turned in SIDEWAYS:  # its columns are the image's rows
        high, wide, width = wide, high, key.imagelength
    row = -(-width // wide) * wide * key.samplesperpixel * key.dtype.itemsize * len(layout.pages)
    return KeptRows(row + (width if masked else 0), 2 * high, _kept_bytes(key) + (KEPT_BYTES if masked else 0))


def _kept_bytes(key: Any) -> int:
    return KEPT_BYTES * (LOOKED_AT if int(key.compression) in LOSSY else 1)


def tagged_no_data(layout: TiffLayout) -> float | None:
    """The value that GDAL's tag calls no data, as `reader` gives it; None where there is no tag, or no number in it."""
    value = number_in(no_data_text(layout))
    return None if value is None else as_read(value, layout)


def no_data_text(layout: TiffLayout) -> str:
    """What GDAL's tag of no data holds; "" where there is none."""
    return str(layout.tag(42113, "")).strip("\0 ")


def as_read(value: float, layout: TiffLayout) -> float:
    """What `reader` makes of a stored value: inverted grey is turned round."""
    return 2**layout.bits - 1 - value if _inverted(layout.keyframe, layout.dtype) else value


def mask_reader(file: Any, layout: TiffLayout, path: Path) -> Read | None:
    """What reads the image's own mask, [h, w, 1], 0 where there is no data; None where the file has none.

    That of a further image follows it; that of the first may stand behind others, as GDAL takes it.
    """
    own = layout.tagged[0]
    first = own.index if own.parent is file else len(file.pages)
    for index in range(first + 1, min(len(file.pages), first + MASK_PAGES)):
        page = file.pages[index].aspage()
        if page.is_mask and not page.is_reduced and (page.imagelength, page.imagewidth) == layout.size:
            return _upright(page_reader(path, page), layout)
        if first > 0 and not page.is_mask and not page.is_reduced:
            break
    return None


def is_lookup_table(file: Any, layout: TiffLayout) -> bool:
    """Whether a palette is how ImageJ shows grey: its colours never get darker, as those of pictures do."""
    if not (layout.palette and file.is_imagej):
        return False
    shown: NDArray[Any] = np.array([299, 587, 114]) @ colours_of(layout.tagged[0].colormap).astype(np.int64)
    return bool((np.diff(shown) >= 0).all())


def alpha_of_palette(layout: TiffLayout, path: Path) -> Read | None:
    """What reads the alpha beside a palette's indices, [h, w, 1]; None where the image has no such."""
    band = next((place for place, extra in enumerate(layout.keyframe.extrasamples, 1) if extra in (1, 2)), None)
    if not layout.palette or band is None:
        return None
    read = _upright(page_reader(path, layout.pages[0]), layout)
    return lambda *where: read(*where)[:, :, band : band + 1]


def unlike(read: Read, value: float | tuple[float, ...]) -> Read:
    """A mask as of `mask_reader`, 0 where all bands that `read` gives hold a value, or each its own."""
    return lambda *where: ~hold_together(read(*where), value)[:, :, None]


def both(first: Read, second: Read | None) -> Read:
    """A mask as of `mask_reader`, 0 where one of two is."""
    return first if second is None else lambda *where: (first(*where) != 0) & (second(*where) != 0)


def index_reader(layout: TiffLayout, path: Path) -> Read:
    """What reads the indices of a palette's image, upright: [h, w, 1]."""
    read = _upright(page_reader(path, layout.pages[0]), layout)
    return lambda *where: read(*where)[:, :, :1]


def page_reader(path: Path, page: Any) -> Read:
    """What reads parts of one page as it is stored, palettes too: [h, w, samples]."""
    return Chunks(path, page, page).read


def _stored(layout: TiffLayout, path: Path) -> Read:
    key = layout.keyframe
    if layout.run is not None:
        mapped = _run(layout, path)
        return lambda top, bottom, left, right: _meant(mapped[top:bottom, left:right], layout)
    if problem := _undecodable(key):
        return _by_pillow(layout, path, problem)
    pages = [Chunks(path, page, key, _kept_bytes(key) // len(layout.pages)) for page in layout.pages]

    def read(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        parts = [page.read(top, bottom, left, right) for page in pages]
        return _meant(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2), layout)

    return read


def _run(layout: TiffLayout, path: Path) -> NDArray[Any]:
    """[H, W, bands] of images stored one after the other under a single page, mapped."""
    assert layout.run is not None
    offset, shape, axes = layout.run
    key = layout.keyframe
    # tifffile's dtype is the machine's; the file's byte order is its own.
    dtype = np.dtype(key.parent.byteorder + key.dtype.char)
    array: NDArray[Any] = np.memmap(path, dtype, "r", offset=offset, shape=shape)
    bands = "S" if "S" in axes and shape[axes.index("S")] == layout.bands > 1 else ""
    bands = bands or "".join(axis for axis in axes if axis not in "YXS" and axis not in layout.place)
    for axis in [axis for axis in axes if axis not in "YX" + (bands if layout.bands > 1 else "")]:
        array = array[(slice(None),) * axes.index(axis) + (layout.place.get(axis, 0),)]
        axes = axes.replace(axis, "", 1)
    if layout.bands == 1:
        return array.transpose([axes.index("Y"), axes.index("X")])[:, :, None]
    named = next(axis for axis in axes if axis not in "YX")
    return array.transpose([axes.index("Y"), axes.index("X"), axes.index(named)])


def _meant(pixels: NDArray[Any], layout: TiffLayout) -> NDArray[Any]:
    """Palettes and inverted grey resolved."""
    if layout.palette:
        try:
            colours: NDArray[Any] = colours_of(layout.tagged[0].colormap)[:, pixels[:, :, 0]]
        except IndexError as error:
            raise DeployError("a pixel is of no colour of the palette; is it damaged?") from error
        return colours.transpose(1, 2, 0)
    if _inverted(layout.keyframe, pixels.dtype):
        grey = pixels[:, :, :1]
        grey = ~grey if pixels.dtype == bool else (2**layout.bits - 1) - grey
        # What follows is alpha, or of no colour.
        return grey if pixels.shape[2] == 1 else np.concatenate([grey, pixels[:, :, 1:]], axis=2)
    return pixels


def colours_of(colormap: NDArray[Any]) -> NDArray[np.uint8]:
    """A palette's colours of a TIFF, of 16 bits, as 8; some writers put 8 there, as libtiff and GDAL take them."""
    return (colormap if colormap.max() < 256 else colormap >> 8).astype(np.uint8)


def _inverted(key: Any, dtype: np.dtype[Any]) -> bool:
    """Whether a page's 0 is white, of a type that has a white."""
    return getattr(key.photometric, "name", "") == "MINISWHITE" and dtype.kind in "ub"


def _undecodable(key: Any) -> str:
    """What keeps tifffile from decoding a page, in words; "" where nothing does."""
    if getattr(key.photometric, "name", "") == "YCBCR" and int(key.compression) not in JPEG:
        return "YCBCR colours without JPEG"
    name = getattr(key.decode, "__name__", "")
    if not name.startswith("decode_raise"):
        return ""
    try:
        key.decode(None, 0)
    except Exception as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    return ""


def _by_pillow(layout: TiffLayout, path: Path, problem: str) -> Read:
    """By libtiff, which has some decoders more: all at once, and of 8 bits only."""
    remedy = "pip install 'fcn-deploy[tiff]'" if "imagecodecs" in problem else "convert it to RGB or deflate"
    height, width = layout.size
    modes = {1: ("L", "P"), 2: ("LA",), 3: ("RGB", "YCbCr", "P"), 4: ("RGBA", "CMYK")}
    with open_pillow(path, height * width) as picture:
        plain = picture.mode in modes.get(layout.bands, ()) and layout.bits == 8 and len(layout.pages) == 1
        if not plain or height * width > WHOLE_PIXELS:
            raise MisuseError(f"cannot read {path}: {problem}; {remedy}")
        picture.load()  # turned upright by this
        if picture.mode == "YCbCr" or (picture.mode == "P" and layout.bands == 3):
            picture = picture.convert("RGB")
        pixels = np.asarray(picture)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    if layout.turned in TURNS:  # back, as `reader` turns it
        rows, columns, exchanged = TURNS[layout.turned]
        pixels = (pixels.swapaxes(0, 1) if exchanged else pixels)[:: -1 if rows else 1, :: -1 if columns else 1]
    return lambda top, bottom, left, right: pixels[top:bottom, left:right]

"""Label files of every kind: what was stored, whatever a viewer or an optimiser makes of it."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fcn_deploy.calibration.label_palettes import Color, labels_by_palette
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.images.deep import bits_of, read_deep
from fcn_deploy.runtime.images.find import IMAGE_SUFFIXES
from fcn_deploy.runtime.images.header import DEFAULT_MAX_PIXELS, open_npy, orientation_of
from fcn_deploy.runtime.images.pillow import check_pixels, open_pillow
from fcn_deploy.runtime.images.sidecars import has_mask_beside, mask_beside, no_data_beside
from fcn_deploy.runtime.images.tiff import LOSSY, TURNS, colours_of, is_tiff, page_reader, turned
from fcn_deploy.runtime.images.tiff_chunks import ORIENTATION
from fcn_deploy.runtime.pixels.no_data import equal, number_in
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL import Image as Pictures

log = logging.getLogger(__name__)

WHITE = "calls 0 white, so its numbers are turned round, as viewers show them; tifffile and GDAL give them as stored"
SOFTWARE = 305  # the tag
MINISWHITE = 0  # of a TIFF's PhotometricInterpretation
PALETTE = 3
PLAIN = (1, 2, PALETTE)  # grey, RGB and palettes
UNSIGNED, SIGNED = 1, 2  # of its SampleFormat
SEPARATE = 2  # of its PlanarConfiguration
REDUCED, TRANSPARENCY = 1, 4  # bits of its NewSubfileType: a page is an overview, or the mask, of another
BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT, GDAL_NODATA = 258, 259, 262, 284, 339, 42113  # tags
SIZES = (279, 325)  # tags of the bytes in each strip, or tile
SINGLE = ("L", "LA", "1", "I", "F", "I;16", "I;16B")  # Pillow's names of what has one channel
PALETTES = ("P", "PA")
COLORED = ("RGB", "RGBA", "RGBX")
LARGEST = 2**31  # of a value; float32 has whole numbers beyond it that mean nothing
DEEP = 257  # times a colour of 8 bits is the same in 16
_said: set[tuple[Path, str]] = set()  # folders and what was told of them
FULL = 255  # what the largest value of fewer than 8 bits is read as


@dataclass(frozen=True)
class StoredLabels:
    """What a label file holds, before anything is made of it.

    Attributes:
        values: [H, W] of integers, or [H, W, 3] uint8 of colours.
        missing: [H, W] bool, where there is no label whatever the value: NaN, transparent, outside an internal mask.
        nodata: the value that GDAL's tag names; None: it names none.
        shown: the grey that a viewer shows for a value, where it is another than the value.
        renumbered: whether a palette's colours tell the values; no-data values are of its indices, and in `missing`.
    """

    values: NDArray[Any]
    missing: NDArray[np.bool_] | None = None
    nodata: int | None = None
    shown: Mapping[int, int] = field(default_factory=dict)
    renumbered: bool = False

    @property
    def single(self) -> NDArray[Any] | None:
        """The values where they are of one channel, be it written three times; None where they are colours."""
        if self.values.ndim == 2:
            return self.values
        return self.values[:, :, 0] if (self.values == self.values[:, :, :1]).all() else None


def read_labels(path: Path, colors: Sequence[Color] | None = None, shown: bool = False) -> StoredLabels:
    """The labels of an image file of one channel, a palette or colours, of a TIFF, or of a .npy.

    Of fewer than 8 bits a value they are what is stored, which Pillow would stretch to 0..255. Of a TIFF whose 0 is
    white they are inverted, as images are. A palette may have been renumbered by a PNG optimiser, which keeps what is
    shown: one of greys is then the labels, and one of the classes' colours in another order tells the classes. Floats
    are whole numbers, and NaN where there is no label.

    Args:
        path: of the file.
        colors: of classes 0, 1, …; None: not known, and palettes of colours are believed as they are.
        shown: take the colours of a palette instead of its indices.

    Raises:
        DeployError: not a label image, damaged, or with a palette from which the classes cannot be told.
    """
    try:
        if path.suffix.lower() == ".npy":
            return _from_array(np.array(open_npy(path)), path)
        stored = _by_pillow(path, colors, shown)
        return _with_sidecars(path, _from_tiff(path, colors, shown) if stored is None else stored)
    except DeployError:
        raise
    except FileNotFoundError as error:
        raise DeployError(f"{path} does not exist; every image needs a label of the same name") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DeployError(f"cannot read {path} as labels: {reason}; is it damaged or truncated?") from error


def _by_pillow(path: Path, colors: Sequence[Color] | None, shown: bool) -> StoredLabels | None:
    """None for a TIFF that only tifffile reads."""
    with path.open("rb") as file:
        tiff = is_tiff(file.read(4))
    try:
        with open_pillow(path, DEFAULT_MAX_PIXELS) as picture:
            if tiff and _is_misread(picture):
                return None
            far = _far_out(path, _tag(picture, GDAL_NODATA, None) if tiff else None)
            if _photometric(picture) == MINISWHITE:
                if picture.mode == "1" and str(_tag(picture, SOFTWARE, "")).startswith("tifffile"):
                    return None  # it calls 0 white of every bool array, and means the array
                say_once(path, WHITE)
            _name_lossy(path, _lossy(picture, path))
            if picture.mode not in COLORED + SINGLE + PALETTES:
                raise DeployError(
                    f"{path} has colours of the kind {picture.mode}; labels are class indices in one channel or a "
                    "palette, or RGB"
                )
            if bits_of(path, picture):
                stored = _from_array(read_deep(path, picture.format or ""), path)
            elif picture.mode in COLORED or (shown and picture.mode in PALETTES):
                array = np.asarray(picture.convert("RGBA" if _transparent(picture) else "RGB"))
                stored = _from_array(array, path)
            else:
                stored = _single(picture, path, colors, far)
            if not tiff:  # Pillow turns TIFFs
                stored = _turned(stored, orientation_of(picture, path))
            nodata = _nodata(_tag(picture, GDAL_NODATA, None)) if picture.format == "TIFF" else None
            if nodata is not None and _photometric(picture) == MINISWHITE:  # the tag is of what is stored
                nodata = _largest(picture, path) - nodata
            nodata = stored.nodata if nodata is None or stored.renumbered else nodata
            pages = getattr(picture, "n_frames", 1)
    except FileNotFoundError:
        raise
    except Exception:
        if tiff and path.is_file() and path.stat().st_size:
            return None
        raise
    missing = _masked(path, stored.missing) if tiff and pages > 1 else stored.missing
    return replace(stored, nodata=nodata, missing=missing)


def _is_misread(picture: "Pictures.Image") -> bool:
    """Whether Pillow gives other numbers of a TIFF than it holds."""
    bits = _tag(picture, BITS_PER_SAMPLE, (8,))[0]
    return (
        # 8 bits with a sign are taken for those without, and 32 the other way.
        (picture.mode == "L" and _tag(picture, SAMPLE_FORMAT, (UNSIGNED,))[0] == SIGNED)
        or (picture.mode == "I" and bits == 32)
        # 8 bits of colours are decoded, and bytes of what is compressed and big-endian are swapped.
        or (bits > 8 and (picture.mode in COLORED or _big_endian(picture)))
        # Planes are taken for one.
        or (picture.mode in ("LA", "PA") and _tag(picture, PLANAR, 1) == SEPARATE)
        # The beginning of the file is taken for strips and tiles that it leaves out.
        or any(0 in _tag(picture, sizes, ()) for sizes in SIZES)
    )


def _turned(stored: StoredLabels, orientation: int) -> StoredLabels:
    """Upright, as images are."""
    if orientation not in TURNS:
        return stored
    missing = None if stored.missing is None else turned(stored.missing, orientation)
    return replace(stored, values=turned(stored.values, orientation), missing=missing)


def _transparent(picture: "Pictures.Image") -> bool:
    return picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info


def _single(picture: "Pictures.Image", path: Path, colors: Sequence[Color] | None, far: float | None) -> StoredLabels:
    """Of one channel, or the indices of a palette."""
    if picture.mode == "LA":
        array = np.asarray(picture)
        return StoredLabels(array[:, :, 0], _some(array[:, :, 1] == 0))
    largest = _largest(picture, path)  # while the file is not decoded yet
    values = _stored(picture, largest)
    stored = _from_array(values if values.ndim == 2 else values[:, :, 0], path, far)
    if picture.mode in PALETTES:
        if picture.mode == "PA":
            stored = replace(stored, missing=_some(values[:, :, 1] == 0))
        told = _nodata(_tag(picture, GDAL_NODATA, None)) if picture.format == "TIFF" else _transparent_value(picture)
        palette = np.array(picture.getpalette(), np.uint8).reshape(-1, 3)
        return _by_palette(replace(stored, nodata=told), palette, colors, path)
    stored = replace(stored, nodata=_transparent_value(picture))
    if largest < FULL:
        return replace(stored, shown={value: round(value * FULL / largest) for value in range(largest + 1)})
    return stored


def _transparent_value(picture: "Pictures.Image") -> int | None:
    """The one value, or index, that a picture calls transparent, which is its no-data value, as of GDAL."""
    told = picture.info.get("transparency")
    if isinstance(told, bytes):
        told = told.index(0) if told.count(0) == 1 else None
    if not isinstance(told, int):
        return None
    return min(told, 1) if picture.mode == "1" else told  # of which Pillow says 255


def _by_palette(
    stored: StoredLabels, palette: NDArray[np.uint8], colors: Sequence[Color] | None, path: Path
) -> StoredLabels:
    """Of indices of a palette, [entries, 3]."""
    labels = labels_by_palette(stored.values, palette, colors, path)
    if labels is None:
        greys = {index: int(entry[0]) for index, entry in enumerate(palette) if len(set(entry.tolist())) == 1}
        return replace(stored, shown=greys)
    say_once(path, "has its palette in another order; labels are told by their colours, not by their index")
    told = next((each for each in map(_nodata, no_data_beside(path)[:1]) if each is not None), stored.nodata)
    missing = stored.missing if told is None else _some(stored.values == told, stored.missing)
    return replace(stored, values=labels, nodata=None, missing=missing, renumbered=True)


def _from_tiff(path: Path, colors: Sequence[Color] | None, shown: bool) -> StoredLabels:
    """By tifffile: sparse files, bands in planes, signed bytes and whatever else Pillow does not decode."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        check_pixels((page.imagelength, page.imagewidth), DEFAULT_MAX_PIXELS, path)
        if page.photometric not in (MINISWHITE, *PLAIN):
            kind = getattr(page.photometric, "name", page.photometric)
            raise DeployError(f"{path} has colours of the kind {kind}; labels have one channel, or three of RGB")
        _name_lossy(path, LOSSY.get(int(page.compression), ""))
        told, array = page.tags.valueof(GDAL_NODATA), page_reader(path, page)(0, page.imagelength, 0, page.imagewidth)
        nodata = _nodata(told, array.dtype)
        white = page.photometric == MINISWHITE and array.dtype.kind == "u"
        orientation = page.tags.valueof(ORIENTATION, 1)
        alpha = page.samplesperpixel == 2 and page.extrasamples[:1] in ((1,), (2,))
        colormap = page.colormap if page.photometric == PALETTE else None
        palette = None if colormap is None else colours_of(colormap).T
    transparent = array[:, :, 1] == 0 if alpha else None
    array = array[:, :, 0] if alpha or array.shape[2] == 1 else array
    if white:
        say_once(path, WHITE)
        largest = (1 << page.bitspersample) - 1
        array, nodata = np.array(largest, array.dtype) - array, None if nodata is None else largest - nodata
    if palette is not None and shown:
        array, nodata = palette[array], None
    stored = replace(_from_array(array, path, _far_out(path, told)), nodata=nodata)
    if palette is not None and not shown:
        stored = _by_palette(stored, palette, colors, path)
    if transparent is not None:
        stored = replace(stored, missing=_some(transparent, stored.missing))
    stored = _turned(stored, orientation)
    return replace(stored, missing=_masked(path, stored.missing))


def _masked(path: Path, missing: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
    """With what a TIFF's internal mask leaves out, upright."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        first = file.pages.first
        others = [page.aspage() for page in list(file.pages)[1:]]
        if any(not page.subfiletype & (REDUCED | TRANSPARENCY) for page in others):
            say_once(path, "holds several images; only the first is taken for labels")
        for page in others:
            if page.subfiletype & TRANSPARENCY and page.shape[:2] == first.shape[:2]:
                outside = turned(page.asarray() == 0, first.tags.valueof(ORIENTATION, 1))
                return _some(outside, missing)
    return missing


def _with_sidecars(path: Path, stored: StoredLabels) -> StoredLabels:
    """With what GDAL keeps beside the file: a mask, and a no-data value."""
    told = [_nodata(value) for value in no_data_beside(path)[:1]]
    with ExitStack() as stack:
        height, width = stored.values.shape[:2]
        mask = mask_beside(stack, path, (height, width), _is_turned(path)) if has_mask_beside(path) else None
        if mask is not None:
            outside = mask(0, height, 0, width)[:, :, 0] == 0
            stored = replace(stored, missing=_some(outside, stored.missing))
    return stored if stored.renumbered or not told or told[0] is None else replace(stored, nodata=told[0])


def _is_turned(path: Path) -> bool:
    """Whether it is stored turned, by its orientation."""
    import tifffile

    with path.open("rb") as file:
        tiff = is_tiff(file.read(4))
    if tiff:
        with tifffile.TiffFile(path) as stored:
            return stored.pages.first.tags.valueof(ORIENTATION, 1) in TURNS
    with open_pillow(path, DEFAULT_MAX_PIXELS) as picture:
        return orientation_of(picture, path) in TURNS


def _nodata(text: object, dtype: np.dtype[Any] | None = None) -> int | None:
    """The value of GDAL's tag as one of a type, where labels can have it: float16 has -10000 for -9999."""
    value = number_in(text)
    if value is not None and dtype is not None and dtype.kind == "f":
        value = float(dtype.type(value)) if abs(value) <= np.finfo(dtype).max else None
    return int(value) if value is not None and value.is_integer() else None


def _far_out(path: Path, text: object) -> float | None:
    """The no-data value beside a file or in its tag, where it is one that no label has, such as the least of floats."""
    value = next(iter(no_data_beside(path)), number_in(text))
    return value if value is not None and abs(value) > LARGEST else None


def _from_array(array: NDArray[Any], path: Path, far: float | None = None) -> StoredLabels:
    """An array of any type as integers in one channel, or as colours; those equal to `far` have no label."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    colored = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype in (np.uint8, np.uint16)
    if array.ndim == 3 and not colored and 1 in (array.shape[0], array.shape[2]):
        array = array[:, :, 0] if array.shape[2] == 1 else array[0]
    if array.ndim == 3:
        if array.shape[2] == 2 and array.dtype == np.uint16:  # grey and alpha of a PNG
            return StoredLabels(array[:, :, 0], _some(array[:, :, 1] == 0))
        if not colored:
            raise DeployError(
                f"{path} has {array.shape[2]} channels of {array.dtype}; labels have one channel, or three of colours "
                "in uint8"
            )
        missing = _some(array[:, :, 3] == 0) if array.shape[2] == 4 else None
        return StoredLabels(_colors_of(array[:, :, :3], path), missing)
    if array.dtype.kind == "b":
        return StoredLabels(array.astype(np.uint8))
    if array.dtype.kind in "iu":
        return StoredLabels(array, None if far is None else _some(equal(array, far)))
    if array.dtype.kind != "f":
        raise DeployError(f"{path} holds {array.dtype}; labels are whole numbers")
    nan = np.isnan(array) if far is None else np.isnan(array) | equal(array, far)
    whole = np.where(nan, IGNORE, array.astype(np.float64))
    broken = ~np.isfinite(whole) | (np.rint(whole) != whole) | (np.abs(whole) > LARGEST)
    if broken.any():
        raise DeployError(f"{path} holds {whole[broken][0]:g}; labels are whole numbers, one for each class")
    return StoredLabels(whole.astype(np.int64), _some(nan))


def _colors_of(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """[H, W, 3] of 8 or 16 bits as colours of 8; as values, [H, W], where those of 16 are no colours but thrice one."""
    if array.dtype == np.uint8:
        return array
    if not (array % DEEP).any():
        return (array // DEEP).astype(np.uint8)
    if (array == array[:, :, :1]).all():
        return array[:, :, 0]
    raise DeployError(f"{path} has colours of 16 bits that are none of 8; write labels in one channel, or colours of 8")


def _some(missing: NDArray[np.bool_], others: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
    """Where there is no label, `others` besides; None: nowhere."""
    missing = missing if others is None else missing | others
    return missing if missing.any() else None


def _stored(picture: "Pictures.Image", largest: int) -> NDArray[Any]:
    """The values of a grey or palette image as its file stores them."""
    values: NDArray[Any] = np.asarray(picture)
    if picture.mode == "1":
        return values.astype(np.uint8)
    if picture.mode == "L" and largest < FULL:
        return np.rint(values * (largest / FULL)).astype(np.uint8)
    if picture.mode == "I" and picture.format == "PPM" and largest < 65535:
        return np.rint(values * (largest / 65535)).astype(np.uint16)
    if picture.mode.startswith("I;16") and _photometric(picture) == MINISWHITE:  # others are inverted by Pillow
        return np.uint16(largest) - values.astype(np.uint16)
    return values


def _largest(picture: Any, path: Path) -> int:
    """The largest value that a sample of a grey image can have in its file."""
    bits = 8
    if picture.format == "PNG":
        with path.open("rb") as file:
            bits = file.read(25)[24]  # behind signature, length, name, width and height
    elif picture.format == "TIFF":
        bits = _tag(picture, BITS_PER_SAMPLE, (1,))[0]
    elif picture.format == "PPM":
        codec, arguments = picture.tile[0][0], picture.tile[0][3]
        if codec.startswith("ppm") and isinstance(arguments, tuple):
            return int(arguments[1])
        bits = 16 if picture.mode == "I" else 8  # what needs no MAXVAL to be decoded
    return int((1 << bits) - 1)


def _photometric(picture: "Pictures.Image") -> int | None:
    return _tag(picture, PHOTOMETRIC, None) if picture.format == "TIFF" else None


def _big_endian(picture: Any) -> bool:
    return bool(picture.tag_v2.prefix == b"MM")  # a TIFF's first bytes


def _tag(picture: Any, tag: int, default: Any) -> Any:
    return picture.tag_v2.get(tag, default)


def say_once(path: Path, what: str) -> None:
    """For each folder, by its first file."""
    if (path.parent, what) not in _said:
        _said.add((path.parent, what))
        log.warning("%s %s", path, what)


def _name_lossy(path: Path, kind: str) -> None:
    """Say of labels in a format of photographs, `kind`, what it does to them; of none, nothing."""
    if kind == "JPEG":
        say_once(path, "is a JPEG, which changes the numbers of labels; export them as PNG instead")
    elif kind:
        say_once(path, f"is compressed as {kind}, which changes the numbers of labels unless it is lossless; use PNG")


def _lossy(picture: "Pictures.Image", path: Path) -> str:
    """By what kind of compression a file may have changed its numbers; "" where by none."""
    if picture.format == "TIFF":
        return LOSSY.get(_tag(picture, COMPRESSION, 1), "")
    lossless = picture.format == "WEBP" and b"VP8L" in path.read_bytes()
    # A JPEG 2000 does not tell: one of the reversible wavelet may have been cut to a size (GDAL's QUALITY).
    return {"JPEG": "JPEG", "AVIF": "AVIF", "JPEG2000": "JPEG 2000", "WEBP": "" if lossless else "WebP"}.get(
        picture.format or "", ""
    )


def find_label_files(folder: Path) -> dict[str, Path]:
    """The label files of a folder, by stem. Raises DeployError where an image would have two."""
    by_stem: dict[str, Path] = {}
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        if by_stem.setdefault(file.stem, file) != file:
            raise DeployError(f"{by_stem[file.stem]} and {file} are labels of one image; remove one")
    return by_stem

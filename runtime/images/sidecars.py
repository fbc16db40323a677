"""What GDAL keeps beside an image file, or in a tag, of its values: masks (`.msk`), no-data values and scales."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ..errors import DeployError, MisuseError
from ..pixels.no_data import number_in
from .numbers import ReadOptions
from .tiff import Read
from .tiff_chunks import Chunks

MOST_XML = 1 << 22  # bytes: of a .aux.xml that is looked at
BAND = re.compile(r"<PAMRasterBand\b.*?</PAMRasterBand>", re.DOTALL)
NO_DATA = re.compile(r"<NoDataValue\b[^>]*>([^<]*)</NoDataValue>")

EACH_NO_DATA = re.compile(r'<(?:Item name|MDI key)="NODATA_VALUES"[^>]*>([^<]*)<')
COLOUR_IN_TAG = re.compile(r'<Item name="COLORINTERP" sample="(\d+)"[^>]*>(\w+)<')
COLOUR = re.compile(r"<ColorInterp>(\w+)</ColorInterp>")
# What numbers are to be multiplied by, and then have added, in GDAL's tag of metadata and in .aux.xml.
FACTORS = re.compile(r'<Item\b[^>]*\brole="scale"[^>]*>([^<]*)|<Scale>([^<]*)')
SUMMANDS = re.compile(r'<Item\b[^>]*\brole="offset"[^>]*>([^<]*)|<Offset>([^<]*)')


def told_beside(path: Path) -> bool:
    """Whether files beside an image may say where it has no data."""
    return _mask_file(path) is not None or bool(no_data_beside(path))


def no_data_beside(path: Path | None) -> list[float]:
    """The no-data values of the bands that an image's .aux.xml names, which GDAL believes before the file's own tag."""
    found = [value for band in BAND.findall(_text_beside(path)) for value in NO_DATA.findall(band)[:1]]
    return _numbers(found)


def scales_of(path: Path | None, tag: str = "") -> str:
    """What an image's tag of GDAL's metadata and its .aux.xml say of the scale of its numbers; empty: nothing."""
    text = tag + _text_beside(path)
    factors, summands = (_numbers(["".join(each) for each in kind.findall(text)]) for kind in (FACTORS, SUMMANDS))
    return scales_told(factors, summands)


def scales_told(factors: Sequence[float], summands: Sequence[float]) -> str:
    """The scale of an image's numbers in words, of its first band that has one; empty: they are as they are."""
    said = (f"times {each:g}" for each in factors if each != 1), (f"plus {each:g}" for each in summands if each != 0)
    return " ".join(next(each, "") for each in said).strip()


def each_no_data(path: Path | None, bands: int, options: ReadOptions, tag: str = "") -> tuple[float, ...]:
    """The values of so many bands that are no data together, as GDAL's tag of metadata or an image's .aux.xml says.

    Empty where it says nothing, or not of each band, or the user names another value.
    """
    if options.no_data is not None or (found := EACH_NO_DATA.search(_text_beside(path) + tag)) is None:
        return ()
    values = tuple(_numbers(found[1].split()))
    return values if len(values) == bands else ()


def colours_told(path: Path | None, bands: int, tag: str = "") -> tuple[str, ...]:
    """What GDAL's tag of metadata and an image's .aux.xml call so many bands: red, nir, alpha, …; "": nothing."""
    found = {int(band): name.lower() for band, name in COLOUR_IN_TAG.findall(tag)}
    for place, band in enumerate(BAND.findall(_text_beside(path))):
        if (name := COLOUR.search(band)) is not None:
            found[place] = name[1].lower()
    return tuple(found.get(band, "") for band in range(bands))


def _text_beside(path: Path | None) -> str:
    """An image's .aux.xml; "" where there is none, as of None."""
    if path is None:
        return ""
    try:
        with path.with_name(f"{path.name}.aux.xml").open(encoding="utf-8", errors="replace") as file:
            return file.read(MOST_XML)
    except OSError:
        return ""


def _numbers(texts: Sequence[str]) -> list[float]:
    return [number for number in map(number_in, texts) if number is not None]


def one_no_data(path: Path, values: Sequence[float | None], options: ReadOptions) -> float | None:
    """The no-data value of an image's bands; where they have several, the first, which is said."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if len({str(value) for value in known}) > 1 and options.no_data is None:
        listed = ", ".join(f"{value:g}" for value in known[:6])
        options.name(
            "no-data",
            f"{path} has bands with no-data values of their own ({listed}), of which {known[0]:g} is taken for all: "
            "name another with --nodata, or write one mask for all bands",
        )
    return known[0]


def mask_beside(stack: ExitStack, path: Path, size: tuple[int, int], turned: bool) -> Read | None:
    """What reads the mask that GDAL keeps in a file beside an image, [h, w, 1], 0 where a band has no data.

    Args:
        stack: which closes it.
        path: of the image.
        size: of it, (height, width).
        turned: whether it is stored turned, by its orientation.

    Raises:
        DeployError: a mask of another size, or damaged.
        MisuseError: a mask of an image that is stored turned.
    """
    if (beside := _mask_file(path)) is None:
        return None
    if turned:
        raise MisuseError(
            f"{path} is stored turned (by its orientation), and the mask beside it, {beside.name}, is not; turn the "
            "image upright, or remove the mask"
        )
    import tifffile

    try:
        page = stack.enter_context(tifffile.TiffFile(beside)).pages.first
        found = page.imagelength, page.imagewidth
    except Exception as error:  # tifffile raises whatever it meets
        raise DeployError(f"cannot read {beside}, the mask of {path.name}: {error}; mend or remove it") from error
    if found != size:
        raise DeployError(
            f"{beside}, the mask of {path.name}, is {found[0]}×{found[1]} and the image {size[0]}×{size[1]}; mend or "
            "remove it"
        )
    chunks = Chunks(beside, page, page)
    return lambda *where: chunks.read(*where).min(axis=2, keepdims=True)


def has_mask_beside(path: Path) -> bool:
    """Whether `mask_beside` would read one."""
    return _mask_file(path) is not None


def _mask_file(path: Path) -> Path | None:
    beside = path.with_name(f"{path.name}.msk")
    return beside if beside.is_file() else None

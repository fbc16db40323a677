"""Which pages of a TIFF are the image that is wanted, by the axes that the file itself names (ImageJ, OME)."""

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import DeployError, MisuseError

UNNAMED = ("generic", "uniform", "shaped")  # kinds of series whose pages nothing names
STANDING_ALONE = ("generic", "uniform")  # likewise, of which each has tags of its own


@dataclass(frozen=True)
class Plane:
    """One image of a TIFF.

    Attributes:
        series: of tifffile, in which it is.
        axes: of the series, by letters that are one each.
        pages: whose samples are its bands; of pixels that are stored in one run under a single page, that one.
        sides: axes along which the series' pages lie, outermost first: axis → how many.
        across: the axis along which pages are bands, or None.
        place: axis → where along it the plane is; of all axes but `across`.
        images: in the file, without overviews, thumbnails and masks.
        own: those of them that the file holds itself; others lie in other files of an OME set, or nowhere.
    """

    series: Any
    axes: str
    pages: list[Any]
    sides: dict[str, int]
    across: str | None
    place: dict[str, int]
    images: int
    own: tuple[int, ...]


def find_plane(file: Any, path: Path, channels: int | None, page: int | None) -> Plane:
    """The first image of an open tifffile.TiffFile, or that of a number; of one file of an OME set its own first.

    Bands are the samples of a pixel (axis S), or channels (C) as the file's own kind says (ImageJ, OME). Pages without
    a name are a stack of images; they are bands only where no page is asked for, and `channels`, of a card, is their
    number and not 1 or 3.

    Args:
        file: of tifffile.
        path: of it.
        channels: of the card.
        page: counted from 0; in a stack of several axes the last one named runs fastest (of TZYX: Z), and images of
            an OME file follow each other.

    Raises:
        MisuseError: no image, or of a kind that is not read; no such page.
        DeployError: damaged, or the page is not in the file.
    """
    all_series = [s for s in file.series if not (s.keyframe.is_reduced or s.keyframe.is_mask)]
    if not all_series:
        raise MisuseError(f"{path} holds no image")
    if file.is_imagej and all_series[0].kind == "generic":
        raise DeployError(f"{path} holds less than its ImageJ description says; is it truncated?")
    places = _places(all_series, channels, page)
    if page is not None and not 0 <= page < len(places):
        raise MisuseError(f"page {page}, and {path} holds {len(places)}, counted from 0; choose another page")
    own = _own(file, all_series, places)
    which, number = places[(own[0] if own else 0) if page is None else page]
    series = all_series[which]
    if not series.axes:
        raise DeployError(f"{path} holds no image; is it damaged?")
    if "Y" not in series.axes or "X" not in series.axes or series.keyframe.imagedepth != 1:
        raise MisuseError(f"{path} has axes {series.axes}, which are not an image's")
    pages, sides = _pages(series)
    across = _axis_of_bands(series, sides, channels if page is None else None)
    place = _place({axis: side for axis, side in sides.items() if axis != across}, number)
    if len(pages) > 1 or not sides:
        pages = _pages_at(pages, sides, across, place, path)
    if None in pages:
        raise DeployError(
            f"{path} does not hold its page {page or 0}, which is left out, or in another file of the set that is not "
            "beside it; choose another page"
        )
    return Plane(series, _told_apart(series.axes), pages, sides, across, place, len(places), own)


def _told_apart(axes: str) -> str:
    """Axes of which none is as another: tifffile calls all of an array's that nobody named Q."""
    return "".join(axis if axis not in axes[:place] else chr(ord("a") + place) for place, axis in enumerate(axes))


def _pages(series: Any) -> tuple[list[Any], dict[str, int]]:
    """The pages of a series, and along which axes they lie, outermost first: axis → how many."""
    pages = list(series.pages)
    # A mask in 1 bit looks like an image in 1 bit; one in 8, which others than GDAL write, like one in 8.
    ends = (pages[1], pages[-1]) if len(pages) > 1 and series.kind in STANDING_ALONE else ()
    masked = any(page.aspage().is_mask for page in ends)  # behind its image, or behind all: not each page is looked at
    if masked or (len(pages) > 1 and series.keyframe.bitspersample == 1):
        pages = [page for page in pages if not page.aspage().is_mask]
        return pages, {"I": len(pages)} if len(pages) > 1 else {}
    axes = _told_apart(series.axes)
    return pages, {axis: side for axis, side in zip(axes, series.shape, strict=True) if axis not in "YXS"}


def _places(all_series: list[Any], channels: int | None, page: int | None) -> list[tuple[int, int]]:
    """(series, number there) of each image, where a page is asked for, or none.

    Only pages of several sizes, which are a series each, and images of an OME file are more than one series' images.
    """
    first = all_series[0]
    places = [(0, number) for number in range(_images(first, channels if page is None else None))]
    if len(all_series) > 1 and first.kind in UNNAMED:
        listed = sorted((each.index, i, k) for i, one in enumerate(all_series) for k, each in enumerate(_pages(one)[0]))
        places = [(which, number) for _, which, number in listed]
    elif len(all_series) > 1 and first.kind == "ome":  # images of their own axes each, as the file names them
        places = [(which, number) for which, one in enumerate(all_series) for number in range(_images(one, None))]
    return places


def _own(file: Any, all_series: list[Any], places: list[tuple[int, int]]) -> tuple[int, ...]:
    """Those of the images, by their number, of which a file holds a band itself; all, where it holds none."""
    if all_series[0].kind != "ome":
        return tuple(range(len(places)))
    held: set[tuple[int, int]] = set()
    for which, series in enumerate(all_series):
        pages, sides = _pages(series)
        if len(pages) != math.prod(sides.values()):  # one run of pixels, or a file that was cut off
            held |= {(which, number) for number in range(_images(series, None))}
            continue
        across = _axis_of_bands(series, sides, None)
        for place, page in zip(product(*map(range, sides.values())), pages, strict=True):
            if page is not None and page.parent is file:
                number = 0
                for axis, at in zip(sides, place, strict=True):
                    number = number if axis == across else number * sides[axis] + at
                held.add((which, number))
    return tuple(index for index, place in enumerate(places) if place in held) or tuple(range(len(places)))


def _images(series: Any, channels: int | None) -> int:
    """How many images a series holds."""
    _, sides = _pages(series)
    across = _axis_of_bands(series, sides, channels)
    return math.prod(side for axis, side in sides.items() if axis != across)


def _axis_of_bands(series: Any, sides: dict[str, int], channels: int | None) -> str | None:
    """The axis along which pages are bands."""
    if "S" in series.axes and series.shape[series.axes.index("S")] > 1:
        return None
    if "C" in sides:
        return "C"
    long = [axis for axis, side in sides.items() if side > 1]
    unnamed = long[0] if len(long) == 1 and (long[0] in "IQ" or long[0].islower()) else None
    return unnamed if unnamed and sides[unnamed] == channels and channels not in (1, 3) else None


def _place(sides: dict[str, int], number: int) -> dict[str, int]:
    """Where a plane is along each axis, of which the last runs fastest."""
    place = {}
    for axis, side in reversed(sides.items()):
        number, place[axis] = divmod(number, side)
    return place


def _pages_at(
    pages: list[Any], sides: dict[str, int], across: str | None, place: dict[str, int], path: Path
) -> list[Any]:
    """The page of an image, or those of its bands along the axis `across`."""
    said = math.prod(sides.values())
    if said != len(pages):
        raise DeployError(f"{path} holds {len(pages)} pages, and should hold {said}; is it truncated?")

    def index(band: int) -> int:
        found = 0
        for axis, side in sides.items():
            found = found * side + (band if axis == across else place[axis])
        return found

    return [pages[index(band)] for band in range(sides[across] if across else 1)]

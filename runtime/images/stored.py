"""An image file as it is stored: its samples, whole or in parts, and what it says of their meaning."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import MisuseError
from ..planning.kept_rows import NOTHING_KEPT, KeptRows
from .deep import few_bits_of, not_spread, read_deep
from .gdal import open_gdal
from .georeference import Tag, dataset_tags, own_tags
from .header import Header, open_npy, orientation_of, reading
from .numbers import COMMON, ReadOptions
from .pillow import open_pillow, samples_of
from .ranged import opened
from .sidecars import colours_told, each_no_data, mask_beside, no_data_beside, one_no_data, scales_of, scales_told
from .tiff import (
    LOSSY,
    TURNS,
    Read,
    TiffLayout,
    alpha_of_palette,
    as_read,
    both,
    index_reader,
    is_lookup_table,
    kept_rows,
    lay_out,
    mask_reader,
    no_data_text,
    reader,
    tagged_no_data,
    turned,
    unlike,
)

log = logging.getLogger(__name__)

GDAL_METADATA = 42112  # the tag
PHOTOGRAPHS = ("JPEG", "WEBP", "AVIF", "JPEG2000")  # formats that may change numbers


@dataclass(frozen=True)
class StoredImage:
    """An open image file: its samples as stored, and what the file says they mean.

    Attributes:
        path: of the file.
        size: (height, width), upright.
        read: (top, bottom, left, right) → [h, w, bands], as stored: palettes and inverted grey are resolved, nothing is
            dropped, scaled or widened.
        bits: of a sample that the file uses: 1 of a bool, 4 of a uint8, 12 of a uint16; 0: all of the type's.
        colours: what the first bands are: `grey`, `RGB`, `CMYK`; "" where the file does not say.
        alpha: the band that is alpha, or None.
        tags: of a TIFF, to be copied to its labels: (code, type, count, value).
        no_data: a value that is none, by GDAL's tag.
        mask: reads likewise where the file's own mask has data: [h, w, 1], 0 where there is none.
        turned: whether it is stored turned, by its orientation.
        kept: in memory, beside a part that is read.
        scales: what the file says that its numbers are to be scaled by, in words.
        premultiplied: whether colours are stored multiplied by alpha.
        indexed: whether its colours are of a palette whose indices numbers of no data are of, as `mask` says.
        told: what the file calls each band, red, nir, …, where it names them.
        each_no_data: values of all bands that are none together, by GDAL's metadata.
        lossy: the compression that may have changed its numbers; "" where none has.
    """

    path: Path
    size: tuple[int, int]
    read: Read
    bits: int = 0
    colours: str = ""
    alpha: int | None = None
    tags: tuple[Tag, ...] = ()
    no_data: float | None = None
    mask: Read | None = None
    turned: bool = False
    kept: KeptRows = NOTHING_KEPT
    scales: str = ""
    premultiplied: bool = False
    indexed: bool = False
    lossy: str = ""
    each_no_data: tuple[float, ...] = ()
    told: tuple[str, ...] = ()


@contextmanager
def open_stored(header: Header, card: ModelCard, options: ReadOptions = COMMON) -> Iterator[StoredImage]:
    """Open an image file of which `read_header` has told.

    Raises:
        DeployError: damaged.
        MisuseError: an image of a kind that is not read; channels that it does not have.
    """
    pages = header.pages  # of a TIFF they may be bands
    with ExitStack() as stack:
        with reading(header.path):  # what goes wrong while it is open is the caller's
            if header.format == "NPY":
                array = open_npy(header.path)
                array = array[:, :, None] if array.ndim == 2 else array
                colours = "grey" if array.shape[2] == 1 else ""
                stored = StoredImage(header.path, header.size, parts_of(array), colours=colours)
            elif header.format == "TIFF":
                import tifffile

                file = stack.enter_context(tifffile.TiffFile(opened(header.path), name=header.path.name))
                layout = lay_out(file, header.path, card.channels, header.page)
                pages = len(layout.own)
                stored = _tiff(file, layout, header, card, options, stack)
            elif header.format == "GDAL":
                raster = stack.enter_context(open_gdal(header.path))
                each = len(set(map(str, raster.dataset.nodatavals))) > 1  # each band's own, which the mask goes by
                no_data = None if each else raster.dataset.nodatavals[0]
                mask = None if each and options.no_data is not None else raster.mask
                if raster.indices is not None:
                    mask, no_data = _by_index(raster.indices, no_data, mask, options), None
                stored = StoredImage(
                    header.path, raster.size, raster.read, raster.bits, raster.colours, raster.alpha,
                    dataset_tags(raster.dataset) if raster.georeferenced else (),
                    no_data, mask, indexed=raster.indices is not None, told=raster.told,
                    scales=scales_told(raster.dataset.scales, raster.dataset.offsets),
                    lossy="JPEG 2000" if raster.dataset.driver.startswith("JP2") else "",
                )  # fmt: skip
            else:
                stored, indices = _picture(header, card, options.channels is not None)
                beside, mask = None, None
                together: tuple[float, ...] = ()
                if not header.page:  # what lies beside is of the first image
                    beside = one_no_data(header.path, no_data_beside(header.path), options)
                    mask = mask_beside(stack, header.path, stored.size, stored.turned)
                    together = each_no_data(header.path, stored.read(0, 1, 0, 1).shape[2], options)
                if indices is None:
                    stored = replace(stored, no_data=beside, each_no_data=together, scales=scales_of(header.path))
                else:
                    mask = _by_index(parts_of(indices), beside, mask, options)
                mask = mask if stored.mask is None else both(stored.mask, mask)
                lossy = header.format if header.format in PHOTOGRAPHS else ""
                stored = replace(stored, mask=mask, indexed=indices is not None, lossy=lossy)
            if options.channels is not None:
                stored = _chosen(stored, options.channels)
        if pages > 1 and header.page is None:
            log.warning("%s holds %d images; only the first is used (see --page)", header.path, pages)
        yield stored


def _chosen(stored: StoredImage, channels: tuple[int, ...]) -> StoredImage:
    """The same image with some of its channels alone; alpha that is not among them says where there is no data."""
    bands = stored.read(0, 1, 0, 1).shape[2]
    if (most := max(channels)) >= bands:
        raise MisuseError(f"channel {most}, and {stored.path} has {bands}, counted from 0; choose others by --channel")
    read, alpha, mask = stored.read, stored.alpha, stored.mask
    if stored.each_no_data:
        mask = both(unlike(read, stored.each_no_data), mask)
    if alpha is not None and alpha not in channels:
        mask = both(lambda *where: read(*where)[:, :, alpha : alpha + 1], mask)
    colours = stored.colours if channels == (0, 1, 2) else "grey" if len(channels) == 1 else ""
    return replace(
        stored,
        read=lambda *where: read(*where)[:, :, list(channels)],
        colours=colours,
        alpha=None,
        mask=mask,
        each_no_data=(),
        told=(),
    )


def _tiff(
    file: Any, layout: TiffLayout, header: Header, card: ModelCard, options: ReadOptions, stack: ExitStack
) -> StoredImage:
    path = header.path
    tags = next((found for page in layout.tagged if (found := own_tags(page))), ())
    if layout.turned != 1 and tags:
        raise turned_on_the_ground(path)
    first = None if header.page else path  # of which alone an .aux.xml speaks
    beside = one_no_data(path, no_data_beside(first), options)
    no_data = tagged_no_data(layout) if beside is None else as_read(beside, layout)
    if no_data is None and options.no_data is None and (text := no_data_text(layout)):
        said = f"{path} has a no-data tag that begins with no number ({text[:40]!r}), and is ignored"
        options.name("no-data tag", f"{said}: name the value with --nodata")
    mask = mask_reader(file, layout, path)
    if mask is None and not header.page:
        mask = mask_beside(stack, path, layout.upright, layout.turned != 1)
    if card.channels == 1 and is_lookup_table(file, layout):
        options.mention(
            "lookup table",
            f"{path} has a lookup table of ImageJ, whose colours are not looked at: the network is shown grey values",
        )
        return StoredImage(
            path, layout.upright, index_reader(layout, path), layout.bits, "grey", None, tags, no_data, mask,
            layout.turned != 1, kept_rows(layout, mask is not None),
            lossy=LOSSY.get(int(layout.keyframe.compression), ""),
        )  # fmt: skip
    if layout.palette:
        mask = _by_index(index_reader(layout, path), no_data, mask, options)
        opaque = alpha_of_palette(layout, path)
        mask = mask if opaque is None else both(opaque, mask)
    metadata = str(layout.tag(GDAL_METADATA, ""))
    each = () if layout.palette else each_no_data(first, layout.bands, options, metadata)
    told = () if layout.palette else colours_told(first, layout.bands, metadata)
    alpha, colours = layout.alpha, layout.colours
    if any(told):  # which GDAL believes before the tags of TIFF, where rasterio calls a fourth band alpha by itself
        alpha = told.index("alpha") if "alpha" in told else None if alpha is not None and told[alpha] else alpha
        colours = "RGB" if told[:3] == ("red", "green", "blue") else colours
    return StoredImage(
        path, layout.upright, reader(layout, path), layout.bits, colours, alpha, tags,
        None if layout.palette else no_data, mask, layout.turned != 1, kept_rows(layout, mask is not None),
        scales_of(first, metadata), layout.premultiplied, layout.palette,
        LOSSY.get(int(layout.keyframe.compression), ""), tuple(as_read(value, layout) for value in each), told,
    )  # fmt: skip


def _by_index(indices: Read, no_data: float | None, mask: Read | None, options: ReadOptions) -> Read | None:
    """A mask of a palette's image: not its colours are the numbers that are spoken of, but its indices."""
    number = no_data if options.no_data is None else options.no_data
    return mask if number is None else both(unlike(indices, number), mask)


def turned_on_the_ground(path: Path) -> MisuseError:
    """What is said of an image that is stored turned, and georeferenced."""
    return MisuseError(
        f"{path} is stored turned (by its orientation) and georeferenced, which contradict each other; turn it upright"
    )


def parts_of(array: NDArray[Any]) -> Read:
    """What reads parts of an array that is held, [H, W, bands]."""
    return lambda top, bottom, left, right: array[top:bottom, left:right]


def _picture(header: Header, card: ModelCard, as_stored: bool) -> tuple[StoredImage, NDArray[Any] | None]:
    """By Pillow: grey, RGB, or what it cannot turn into them soundly; with `as_stored` the file's own channels.

    And the indices of a palette's colours, [H, W, 1]; None where there is no palette.
    """
    bits, indices, mask = header.bits, None, None
    with open_pillow(header.path, header.pixels) as picture:
        if header.page is not None:
            picture.seek(header.page)
        orientation = orientation_of(picture, header.path)
        if bits:
            array = turned(read_deep(header.path, header.format), orientation)
        else:
            few = few_bits_of(header.path, picture)
            picture.load()
            if orientation in TURNS:  # or it would be a copy, which takes as long as decoding
                from PIL import ImageOps

                picture = ImageOps.exif_transpose(picture)
            indices = np.asarray(picture)[:, :, None] if picture.mode == "P" else None
            array = samples_of(picture, card, as_stored)
            # Of other modes Pillow makes alpha of it; of 2 and 4 bits by what it has spread, which none is equal to.
            transparent, bilevel = picture.info.get("transparency"), picture.mode == "1"
            if isinstance(transparent, int) and (few or bilevel or picture.mode.startswith("I;16")):
                grey = not_spread(np.asarray(picture), few) if few else array
                mask = unlike(parts_of(grey[:, :, None]), transparent > 0 if bilevel else transparent)
            if few:
                array, bits = not_spread(array, few), few
    array = array[:, :, None] if array.ndim == 2 else array
    colours = {1: "grey", 3: "RGB", 4: "RGB"}.get(array.shape[2], "grey")
    alpha = array.shape[2] - 1 if array.shape[2] in (2, 4) else None
    bits = 1 if array.dtype == bool else bits
    found = StoredImage(header.path, header.size, parts_of(array), bits, colours, alpha, mask=mask)
    return replace(found, turned=orientation in TURNS), indices

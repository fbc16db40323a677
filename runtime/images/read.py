"""An image file's pixels, whole or in parts, as the card of a network wants them: the one reader for every use.

`open_stored` gives the samples as the file stores them, with what the file says of their meaning; `fit` makes of them
what a card wants. Whoever reads images (label-images, calibration, training, evaluation) comes through here, so that no
file is right in one and damaged in another.
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import MisuseError
from ..pixels.no_data import filled, masked, over_bands
from ..pixels.value_range import GRIDS, Range, limits_of, limits_within, percentiles, scaled, windows
from ..planning.kept_rows import NOTHING_KEPT, KeptRows
from .deep import few_bits_of, not_spread, read_deep
from .gdal import open_gdal
from .georeference import Tag, dataset_tags, own_tags
from .header import DEFAULT_MAX_PIXELS, Header, open_npy, read_header, reading
from .numbers import NEAR, ReadOptions, apart, beyond, doubtful, frayed, frayed_margins, value_of, wide_type
from .pillow import open_pillow, samples_of
from .ranged import opened
from .sidecars import mask_beside, no_data_beside, one_no_data, scales_of, scales_told, told_beside
from .tiff import (
    LOSSY,
    TURNS,
    Read,
    TiffLayout,
    as_read,
    index_reader,
    kept_rows,
    lay_out,
    mask_reader,
    no_data_text,
    reader,
    tagged_no_data,
    turned,
)
from .tiff_chunks import ORIENTATION

log = logging.getLogger(__name__)

GDAL_METADATA = 42112  # the tag
PHOTOGRAPHS = ("JPEG", "WEBP", "AVIF", "JPEG2000")  # formats that may change numbers
COMMON = ReadOptions()  # of those who say nothing: what looks wrong is named once a process


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


@dataclass(frozen=True)
class Fit:
    """How a file's samples become what a card wants.

    Attributes:
        stored: the file.
        card: of the network.
        limits: (LO, HI) that become the network's 0 and 1; None: numbers are taken as they are.
        no_data: a value of the file's type that is none.
    """

    stored: StoredImage
    card: ModelCard
    limits: Range | None = None
    no_data: float | None = None

    def read(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        """A part, [h, w, channels] of the card's dtype; a MaskedArray where there is no data. Raises MisuseError."""
        pixels = _native(self.stored.read(top, bottom, left, right))
        invalid = self._invalid(pixels, (top, bottom, left, right))
        image = _converted(_banded(pixels, self.stored, self.card), self.stored, self.card, self.limits)
        # Planes of a file stay planes in memory: networks are given bands one by one.
        planes = image.transpose(2, 0, 1).flags.c_contiguous or image.flags.c_contiguous
        image = np.asarray(image) if planes else np.array(image, order="K")
        return image if invalid is None or not invalid.any() else masked(image, ~invalid)

    def _invalid(self, pixels: NDArray[Any], where: tuple[int, int, int, int]) -> NDArray[np.bool_] | None:
        """Where a part has no data, bool [h, w]; None: nowhere."""
        stored, found = self.stored, []
        alpha = stored.alpha if pixels.shape[2] != self.card.channels else None
        bands = pixels if alpha is None else pixels[:, :, :alpha]  # what follows alpha is of no network
        if self.no_data is not None and not math.isnan(self.no_data):
            # A band alone may be 0, 255 or -1 by chance, but not -9999.
            every = -128 <= self.no_data <= 1e30
            found.append(over_bands(bands == pixels.dtype.type(self.no_data), every))
        if alpha is not None:
            found.append(pixels[:, :, alpha] == 0)
        if stored.mask is not None:
            found.append(stored.mask(*where)[:, :, 0] == 0)
        if pixels.dtype.kind == "f":
            found.append(over_bands(~np.isfinite(bands)))
        return np.logical_or.reduce(found) if found else None

    def values(self, grid: int) -> NDArray[Any]:
        """Samples as stored, of the card's bands, [n], where the file has data, in so many windows a side."""
        parts = []
        for window in windows(self.stored.size, grid):
            pixels = _native(self.stored.read(*window))
            invalid = self._invalid(pixels, window)
            bands = _banded(pixels, self.stored, self.card)
            parts.append((bands if invalid is None else bands[~invalid]).reshape(-1))
        return np.concatenate(parts)

    def has_frayed_margins(self) -> bool:
        """Whether a lossy compression has changed values beside the no-data value, where values are looked at."""
        stored = self.stored
        if not stored.lossy or self.no_data is None or stored.mask is not None or stored.alpha is not None:
            return False
        for window in windows(stored.size, GRIDS[1]):
            pixels = _native(stored.read(*window))
            invalid = self._invalid(pixels, window)
            near = NEAR << max(0, _bits(stored, pixels.dtype) - 8)
            if invalid is not None and invalid.any() and frayed(pixels, invalid, self.no_data, near):
                return True
        return False

    def has_dimmed(self) -> bool:
        """Whether colours are stored multiplied by an alpha that is neither 0 nor full, where values are looked at."""
        if not self.stored.premultiplied or self.stored.alpha is None:
            return False
        looked = [self.stored.read(*window)[:, :, self.stored.alpha] for window in windows(self.stored.size, GRIDS[0])]
        most = 1 if looked[0].dtype.kind == "f" else limits_of(looked[0].dtype)[1]
        return any(bool(((part > 0) & (part < most)).any()) for part in looked)


def fit_of(stored: StoredImage, card: ModelCard, options: ReadOptions) -> Fit:
    """How an open file is read for a card, after a look at its values: what looks wrong is named.

    Raises MisuseError: a no-data value or a range outside the file's type, or with `options.strict` what looks wrong.
    """
    dtype = _native(stored.read(0, 1, 0, 1)).dtype
    if dtype.kind == "c":
        raise MisuseError(f"{stored.path} holds complex numbers; save what the network shall see, such as magnitudes")
    told = options.no_data is not None
    tag = options.no_data if told else stored.no_data
    no_data = None if tag is None else value_of(tag, dtype, str(stored.path) if told else None)
    no_data = None if stored.indexed else no_data
    fit = Fit(stored, card, None, no_data)
    _banded(stored.read(0, 1, 0, 1), stored, card)  # channels are told first
    if stored.colours == "CMYK" and card.channels == 4:
        options.mention(
            "CMYK", f"{stored.path} has colours of print (CMYK), and its inks are the network's four channels"
        )
    if fit.has_dimmed():
        options.mention(
            "premultiplied",
            f"{stored.path} has colours that are multiplied by its alpha, and the network is shown them as they are "
            "stored, as rasterio reads them; where that is too dark, save it without alpha",
        )
    if fit.has_frayed_margins():
        options.name("frayed", frayed_margins(stored.path, stored.lossy, no_data))
    values = next((found for grid in GRIDS if (found := fit.values(grid)).size), None)
    said = options.input_range
    wanted = card.range if said is None else said
    if isinstance(wanted, str):
        return replace(fit, limits=percentiles(values))
    if wanted is not None:
        fit = replace(fit, limits=limits_within(wanted, dtype, stored.path, said is None))
    if said is None and values is not None:
        _look(values, fit, options)
    return fit


def _look(values: NDArray[Any], fit: Fit, options: ReadOptions) -> None:
    """Name a file whose values are not the network's."""
    stored, card, limits = fit.stored, fit.card, fit.limits
    if limits is None and stored.scales:
        options.mention(
            "scales",
            f"{stored.path} says that its numbers are to be taken {stored.scales}, which is not done: the network is "
            "shown them as they are stored, as rasterio reads them",
        )
    if options.no_data is None and (alone := apart(stored.path, values)) is not None:
        options.name("apart", alone[1])
        values = values[values != alone[0]]
    if values.dtype == np.int32 and 0 <= values.min() <= values.max() < 65536:
        values = values.astype(np.uint16)
    bits = _bits(stored, values.dtype)
    if limits is not None and (outside := beyond(stored.path, values, limits, card)) is not None:
        options.name(*outside)
        return
    if limits is None and card.dtype == "uint8" and values.dtype == np.uint16 and bits > 8:
        options.name("wide", wide_type(stored.path, values, bits, card))
        return
    shown = _converted(values[:, None, None], stored, card, limits)
    if (found := doubtful(stored.path, shown, card, values)) is not None:
        options.name(*found)


def read_image(path: str | os.PathLike[str], card: ModelCard, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[Any]:
    """Read an image file as the card wants it.

    Grey, palette, CMYK and other colour spaces become RGB (or grey, for a card of one channel); alpha is
    dropped; for a card of uint8, 16 bits become 8 by dropping the low byte, which is said aloud, and fewer than 8 are
    spread over 0 to 255;
    for others values are as stored, widened where that is exact (uint8 to uint16, int16 to float32, …); JPEGs and TIFFs
    are turned upright by their orientation; of animations and stacks the first image is taken, and a warning says so.
    `.npy` arrays and TIFFs of any bands are taken as they are.

    Returns:
        [H, W, channels] of the card's dtype; pixels that are no data are the card's mean.

    Raises:
        DeployError: not an image, truncated, or larger than `max_pixels`.
        MisuseError: no such file; channels or dtype that the card does not allow.
    """
    return filled(decode(read_header(path, max_pixels), card), card)[0]


def decode(header: Header, card: ModelCard, options: ReadOptions = COMMON) -> NDArray[Any]:
    """`read_image` of a file whose header is known already; a MaskedArray where there is no data."""
    with reading(header.path), open_stored(header, card, options) as stored:
        height, width = stored.size
        pixels = stored.read(0, height, 0, width)
        pixels = np.array(pixels) if isinstance(pixels, np.memmap) else pixels  # read now, and the caller's own
        found = fit_of(replace(stored, read=_parts(pixels)), card, options).read(0, height, 0, width)
        return found if found.flags.c_contiguous else found.copy(order="C")


def may_have_no_data(header: Header, card: ModelCard, options: ReadOptions = COMMON) -> bool:
    """Whether some pixels of a file may be no data, as far as it can be told before they are decoded."""
    if options.no_data is not None or header.dtype.kind == "f" or told_beside(header.path):
        return True
    if header.format in ("TIFF", "GDAL"):
        with reading(header.path), open_stored(header, card) as stored:
            return stored.no_data is not None or stored.mask is not None or stored.alpha is not None
    if header.format == "NPY" or header.mode is None:
        return False
    with reading(header.path), open_pillow(header.path, header.pixels) as picture:
        return bool(picture.has_transparency_data)


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
                stored = StoredImage(header.path, header.size, _parts(array), colours=colours)
            elif header.format == "TIFF":
                import tifffile

                file = stack.enter_context(tifffile.TiffFile(opened(header.path), name=header.path.name))
                layout = lay_out(file, header.path, card.channels, header.page)
                pages = layout.images
                stored = _tiff(file, layout, header, options, stack)
            elif header.format == "GDAL":
                raster = stack.enter_context(open_gdal(header.path))
                palette = raster.dataset.colorinterp[0].name == "palette"  # its colours are not the numbers of no data
                each = len(set(map(str, raster.dataset.nodatavals))) > 1  # each band's own, which the mask goes by
                stored = StoredImage(
                    header.path, raster.size, raster.read, raster.bits, raster.colours, raster.alpha,
                    dataset_tags(raster.dataset) if raster.georeferenced else (),
                    None if palette or each else raster.dataset.nodatavals[0],
                    None if each and options.no_data is not None else raster.mask,
                    scales=scales_told(raster.dataset.scales, raster.dataset.offsets),
                    lossy="JPEG 2000" if raster.dataset.driver.startswith("JP2") else "",
                )  # fmt: skip
            else:
                stored = _picture(header, card, options.channels is not None)
                if header.mode != "P":  # a palette's colours are not the numbers of no data
                    beside = one_no_data(header.path, no_data_beside(header.path), options)
                    stored = replace(stored, no_data=beside, scales=scales_of(header.path))
                stored = replace(stored, lossy=header.format if header.format in PHOTOGRAPHS else "")
                if not header.page:
                    stored = replace(stored, mask=mask_beside(stack, header.path, stored.size, stored.turned))
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
    if alpha is not None and alpha not in channels and mask is None:
        mask = lambda *where: read(*where)[:, :, alpha : alpha + 1]  # noqa: E731
    colours = stored.colours if channels == (0, 1, 2) else "grey" if len(channels) == 1 else ""
    return replace(
        stored, read=lambda *where: read(*where)[:, :, list(channels)], colours=colours, alpha=None, mask=mask
    )


def _tiff(file: Any, layout: TiffLayout, header: Header, options: ReadOptions, stack: ExitStack) -> StoredImage:
    tags, path = own_tags(layout.keyframe), header.path
    if layout.turned != 1 and tags:
        raise turned_on_the_ground(path)
    palette = getattr(layout.keyframe.photometric, "name", "") == "PALETTE"
    beside = one_no_data(path, no_data_beside(path), options)
    no_data = tagged_no_data(layout) if beside is None else as_read(beside, layout)
    if no_data is None and options.no_data is None and (text := no_data_text(layout)):
        said = f"{path} has a no-data tag that begins with no number ({text[:40]!r}), and is ignored"
        options.name("no-data tag", f"{said}: name the value with --nodata")
    mask = mask_reader(file, layout, path)
    if mask is None and not header.page:
        mask = mask_beside(stack, path, layout.upright, layout.turned != 1)
    if palette:  # its colours are not the numbers that are spoken of, but its indices
        number = no_data if options.no_data is None else options.no_data
        mask = mask if number is None else index_reader(layout, path, number, mask)
    return StoredImage(
        path, layout.upright, reader(layout, path), layout.bits, layout.colours, layout.alpha, tags,
        None if palette else no_data, mask, layout.turned != 1, kept_rows(layout, mask is not None),
        scales_of(path, str(layout.keyframe.tags.valueof(GDAL_METADATA, ""))), layout.premultiplied, palette,
        LOSSY.get(int(layout.keyframe.compression), ""),
    )  # fmt: skip


def turned_on_the_ground(path: Path) -> MisuseError:
    """What is said of an image that is stored turned, and georeferenced."""
    return MisuseError(
        f"{path} is stored turned (by its orientation) and georeferenced, which contradict each other; turn it upright"
    )


def _parts(array: NDArray[Any]) -> Read:
    return lambda top, bottom, left, right: array[top:bottom, left:right]


def _picture(header: Header, card: ModelCard, as_stored: bool) -> StoredImage:
    """By Pillow: grey, RGB, or what it cannot turn into them soundly; with `as_stored` the file's own channels."""
    from PIL import ImageOps

    bits = header.bits
    with open_pillow(header.path, header.pixels) as picture:
        if header.page is not None:
            picture.seek(header.page)
        orientation = picture.getexif().get(ORIENTATION, 1)
        if bits:
            array = turned(read_deep(header.path, header.format), orientation)
        else:
            few = few_bits_of(header.path, picture)
            picture.load()
            array = samples_of(ImageOps.exif_transpose(picture), card, as_stored)
            if few:
                array, bits = not_spread(array, few), few
    array = array[:, :, None] if array.ndim == 2 else array
    colours = {1: "grey", 3: "RGB", 4: "RGB"}.get(array.shape[2], "grey")
    alpha = array.shape[2] - 1 if array.shape[2] in (2, 4) else None
    bits = 1 if array.dtype == bool else bits
    return StoredImage(header.path, header.size, _parts(array), bits, colours, alpha, turned=orientation in TURNS)


def _native(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _bits(stored: StoredImage, dtype: np.dtype[Any]) -> int:
    """Of a sample of this type that the file uses."""
    return stored.bits if 0 < stored.bits < 8 * dtype.itemsize else 8 * dtype.itemsize


def _banded(pixels: NDArray[Any], stored: StoredImage, card: ModelCard) -> NDArray[Any]:
    """The card's channels of a file's bands."""
    found, channels, colours = pixels.shape[2], card.channels, stored.colours
    if colours == "CMYK" and channels in (1, 3) and pixels.dtype == np.uint8:
        pixels, colours = _rgb_of_cmyk(pixels), "RGB"
    elif stored.alpha == found - 1 and found == channels + 1:
        pixels = pixels[:, :, :-1]
    if colours == "RGB" and pixels.shape[2] >= 3:
        if channels == 3:
            pixels = pixels[:, :, :3]
        elif channels == 1 and pixels.dtype in (np.uint8, np.uint16) and stored.bits in (0, 8, 16):
            pixels = _grey_of_rgb(pixels)
    if colours == "grey" and channels in (1, 3) and (pixels.shape[2] == 1 or (stored.alpha, pixels.shape[2]) == (1, 2)):
        pixels = np.repeat(pixels[:, :, :1], channels, axis=2)
    if pixels.shape[2] != channels:
        such = ",".join(map(str, range(channels)))
        remedy = f": say which with label-images --channel, such as {such}" if found > channels else ""
        raise MisuseError(f"{stored.path} has {found} channels; this model takes {channels}{remedy}")
    return pixels


def _grey_of_rgb(pixels: NDArray[Any]) -> NDArray[Any]:
    """Luma by ITU-R 601-2, as Pillow computes it: [h, w, 1] of [h, w, ≥ 3], uint8 or uint16."""
    total = pixels[:, :, :3].astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((total + 0x8000) >> 16).astype(pixels.dtype)[:, :, None]


def _rgb_of_cmyk(pixels: NDArray[Any]) -> NDArray[Any]:
    """White less each ink and black, as Pillow computes it: [h, w, 3] of uint8 [h, w, ≥ 4]."""
    light = 255 - pixels[:, :, 3:4].astype(np.int32)
    ink = pixels[:, :, :3].astype(np.int32) * light + 128
    return np.clip(light - (((ink >> 8) + ink) >> 8), 0, 255).astype(np.uint8)


def _converted(pixels: NDArray[Any], stored: StoredImage, card: ModelCard, limits: Range | None) -> NDArray[Any]:
    """Of the card's dtype: by `limits`, or exactly, or brought to 8 bits by the number of bits that the file has."""
    wanted = np.dtype(card.dtype)
    if limits is not None:
        return scaled(pixels, limits, wanted)
    if pixels.dtype == np.int32 and wanted in (np.uint8, np.uint16) and 0 <= pixels.min() <= pixels.max() < 65536:
        pixels = pixels.astype(np.uint16)  # what Pillow makes of some 16-bit files
    bits = _bits(stored, pixels.dtype)
    if wanted == np.uint8 and pixels.dtype == np.bool_:
        pixels = pixels * np.uint8(255)
    elif wanted == np.uint8 and pixels.dtype == np.uint16:
        pixels = (pixels >> (bits - 8)).astype(np.uint8)
    elif wanted == np.uint8 == pixels.dtype and bits < 8:
        pixels = ((pixels.astype(np.uint16) * 255 + (2**bits - 1) // 2) // (2**bits - 1)).astype(np.uint8)
    elif np.can_cast(pixels.dtype, wanted, "safe"):
        pixels = pixels.astype(wanted, copy=False)
    if pixels.dtype != wanted:
        raise MisuseError(
            f"{stored.path} holds {pixels.dtype} values; this model takes {wanted}: convert it first, or let "
            "label-images do it by --input-range LO,HI"
        )
    return pixels

"""How the samples that a file stores become what the card of a network wants, with a look at whether they are it."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import MisuseError
from ..pixels.no_data import FAR_OUT, equal, hold_together, masked, over_bands
from ..pixels.value_range import GRIDS, Range, limits_of, limits_within, percentiles, scaled, windows
from .numbers import NEAR, ReadOptions, apart, beyond, doubtful, frayed, frayed_margins, value_of, wide_type
from .stored import StoredImage

ORDER = ("red", "green", "blue")  # of the bands of a network of colours


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
            every = -128 <= self.no_data <= FAR_OUT
            found.append(over_bands(equal(bands, self.no_data), every))
        if stored.each_no_data:
            found.append(hold_together(pixels, stored.each_no_data))
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
    by_user = options.no_data is not None
    tag = options.no_data if by_user else stored.no_data
    no_data = None if tag is None else value_of(tag, dtype, str(stored.path) if by_user else None)
    no_data = None if stored.indexed else no_data
    fit = Fit(stored, card, None, no_data)
    _banded(stored.read(0, 1, 0, 1), stored, card)  # channels are told first
    if stored.colours == "CMYK" and card.channels == 4:
        options.mention(
            "CMYK", f"{stored.path} has colours of print (CMYK), and its inks are the network's four channels"
        )
    told = stored.told[:3]
    if card.channels in (1, 3) and sorted(told) == sorted(ORDER) and told != ORDER:
        options.name(
            "order",
            f"{stored.path} says that its bands are {', '.join(told)}, and the network is shown them in this order as "
            f"red, green, blue: label-images --channel {_places_of_colours(stored.told)} turns them round",
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
        if channels == 3 and set(ORDER) <= set(stored.told):
            such = _places_of_colours(stored.told)
        if stored.path.suffix == ".npy" and stored.size[0] == channels:
            shape = [*stored.size, found]
            raise MisuseError(f"{stored.path} holds {shape}, and an image is [H, W, C]: save array.transpose(1, 2, 0)")
        remedy = f": say which with label-images --channel, such as {such}" if found > channels else ""
        raise MisuseError(f"{stored.path} has {found} channels; this model takes {channels}{remedy}")
    return pixels


def _places_of_colours(told: tuple[str, ...]) -> str:
    """The bands that are red, green and blue, as --channel takes them."""
    return ",".join(str(told.index(colour)) for colour in ORDER)


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
            f"{stored.path} holds {pixels.dtype} values; this model takes {wanted}: convert it first, or say "
            "which values are the ends of that by --input-range LO,HI"
        )
    return pixels

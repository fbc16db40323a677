"""TIFFs that Pillow does not read, or not in parts: any bands and types, tiles and strips (by tifffile)."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError, MisuseError
from ..model_card import ModelCard

log = logging.getLogger(__name__)

JPEG = (6, 7)  # compressions whose YCbCr is decoded to RGB


def read_tiff(path: Path, card: ModelCard) -> NDArray[Any]:
    """The first image of a TIFF: [H, W] or [H, W, bands] as stored, inverted grey turned and alpha dropped."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        if "Y" not in axes or "X" not in axes:
            raise MisuseError(f"{path} has axes {axes}, which are not an image's")
        array, photometric = series.asarray(), getattr(series.keyframe.photometric, "name", "")
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


class TiffRegions:
    """Decodes the tiles or strips that a region needs, and keeps those which the regions beside it need too."""

    def __init__(self, path: Path, page: Any, card: ModelCard) -> None:
        self.path, self.page, self.card = path, page, card
        kind = getattr(page.photometric, "name", str(page.photometric))
        if kind not in ("MINISBLACK", "MINISWHITE", "RGB", "YCBCR", "PALETTE"):
            raise MisuseError(f"{path} has {kind} colours, which are not read region by region; convert it to RGB")
        if kind == "YCBCR" and int(page.compression) not in JPEG:
            raise MisuseError(
                f"{path} has YCBCR colours without JPEG, which are not read by regions; convert it to RGB"
            )
        if kind != "PALETTE" and page.bitspersample not in (1, 8, 16, 32, 64):
            raise MisuseError(
                f"{path} has {page.bitspersample} bits a sample, which are not read region by region; convert it to 8"
            )
        if (turned := page.tags.valueof(274, 1)) != 1:
            raise MisuseError(
                f"{path} is stored turned (orientation {turned}), which is not read region by region; turn it upright"
            )
        self.kind = kind
        self.separate = page.planarconfig == 2
        self.planes = page.samplesperpixel if self.separate else 1
        if page.is_tiled:
            self.high, self.wide = page.tilelength, page.tilewidth
        else:
            self.high, self.wide = min(page.rowsperstrip, page.imagelength), page.imagewidth
        if self.high < 1 or self.wide < 1 or page.imagedepth != 1:
            raise DeployError(f"{path} has tiles of {self.high}×{self.wide} pixels, or depth; write it again")
        self.rows, self.columns = -(-page.imagelength // self.high), -(-page.imagewidth // self.wide)
        if len(page.dataoffsets) < self.rows * self.columns * self.planes:
            # One run of pixels that is said to be a single strip, or a table that was cut off.
            raise DeployError(
                f"{path} lists {len(page.dataoffsets)} of its {self.rows * self.columns * self.planes} tiles; "
                "is it truncated?"
            )
        self.decoded: dict[int, NDArray[Any]] = {}
        self.mapped: NDArray[Any] | None = None
        if page.is_memmappable:
            import tifffile

            mapped: NDArray[Any] = tifffile.memmap(path, page=0, mode="r")
            mapped = mapped[..., None] if mapped.ndim == 2 else mapped
            self.mapped = mapped.transpose(1, 2, 0) if self.separate else mapped

    def read(self, top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
        if self.mapped is not None:
            return self._colours(self.mapped[top:bottom, left:right])
        page, samples = self.page, self.page.samplesperpixel
        out = np.empty((bottom - top, right - left, samples), page.dtype)
        first_row = top // self.high
        # Regions come from top to bottom.
        for index in [i for i in self.decoded if i // self.columns % self.rows < first_row]:
            del self.decoded[index]
        for plane in range(self.planes):
            for row in range(first_row, -(-bottom // self.high)):
                for column in range(left // self.wide, -(-right // self.wide)):
                    chunk = self._chunk((plane * self.rows + row) * self.columns + column)
                    y, x = row * self.high, column * self.wide
                    a, b = max(top, y), min(bottom, y + self.high)
                    c, d = max(left, x), min(right, x + self.wide)
                    into = out[a - top : b - top, c - left : d - left]
                    (into[:, :, plane : plane + 1] if self.separate else into)[:] = chunk[a - y : b - y, c - x : d - x]
        return self._colours(out)

    def _chunk(self, index: int) -> NDArray[Any]:
        """[h, w, samples] of one tile or strip."""
        if (found := self.decoded.get(index)) is not None:
            return found
        page, row = self.page, index // self.columns % self.rows
        rows = f"rows {row * self.high} to {min((row + 1) * self.high, page.imagelength) - 1}"
        try:
            file = page.parent.filehandle
            offset, count = page.dataoffsets[index], page.databytecounts[index]
            data = None
            if count:
                file.seek(offset)
                data = file.read(count)
                if len(data) < count:
                    raise DeployError(f"{self.path} is truncated: {rows} are not there; copy it again")
            chunk, _, shape = page.decode(data, index, jpegtables=page.jpegtables)
        except DeployError:
            raise
        except Exception as error:  # decoders raise whatever they meet in a hostile file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            remedy = "pip install 'fcn-deploy[tiff]'" if "imagecodecs" in reason else "is it damaged?"
            raise DeployError(f"cannot read {rows} of {self.path}: {reason}; {remedy}") from error
        # Sparse files omit tiles that hold nothing.
        found = np.full(shape[1:], page.nodata, page.dtype) if chunk is None else chunk[0]
        self.decoded[index] = found
        return found

    def _colours(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """As `read_image` would have them: palettes and inverted grey resolved, alpha dropped."""
        if self.kind == "PALETTE":
            colours: NDArray[Any] = self.page.colormap[:, pixels[:, :, 0]] >> 8
            return colours.astype(np.uint8).transpose(1, 2, 0)
        if self.kind == "MINISWHITE" and pixels.dtype.kind in "ub":
            pixels = ~pixels  # of unsigned and boolean values: the largest less the value
        if self.kind.startswith("MIN") and pixels.shape[2] == 2 and self.card.channels in (1, 3):
            pixels = pixels[:, :, :1]  # alpha is dropped
        if self.kind in ("RGB", "YCBCR") and self.card.channels == 3:
            return pixels[:, :, :3]
        return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels

"""Labels, masks, values and pictures, written to files in one step."""

import io
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from ..files import replacing
from ..model_card import ModelCard
from .georeference import Tag

if TYPE_CHECKING:
    from PIL import Image as Pictures

TILE = 512  # pixels: the sides of a tiled TIFF's tiles
NO_DATA_COLOR = (224, 224, 192)  # Pascal VOC's for its void
GDAL_METADATA = 42112  # the tag
RUNS = 3  # zlib's Z_RLE: labels are runs of equal bytes; two thirds of level 1's size, and of its time


def write_labels(path: str | os.PathLike[str], labels: NDArray[Any], card: ModelCard) -> None:
    """Write labels, [H, W], as a palette PNG in the card's colours (16-bit grey beyond 256 classes).

    Where there is no data, the palette has a colour for that too.
    """
    write_png(path, label_picture(labels, card), RUNS)


def label_png(labels: NDArray[Any], card: ModelCard) -> bytes:
    """The bytes of the file that `write_labels` writes."""
    file = io.BytesIO()
    _save_png(file, label_picture(labels, card), RUNS)
    return file.getvalue()


def label_picture(labels: NDArray[Any], card: ModelCard) -> "Pictures.Image":
    """Labels, [H, W], as a Pillow image, with the card's palette where they are 8-bit."""
    from PIL import Image

    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        marked = card.no_data is not None and labels.max(initial=0) == card.no_data
        colors = palette(card) if marked else np.asarray(card.colors, np.uint8)
        picture.putpalette(colors.tobytes())
    return picture


def palette(card: ModelCard) -> NDArray[np.uint8]:
    """The card's colours, then black, and NO_DATA_COLOR for the label of no data: [256, 3] uint8."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(card.colors)] = card.colors
    if card.no_data is not None:
        colors[card.no_data] = NO_DATA_COLOR
    return colors


def no_data_tag(value: float) -> Tag:
    """GDAL's tag of a TIFF that says which value is no data."""
    text = f"{value:g}".encode()
    return 42113, 2, len(text), text  # 2: ASCII


def write_maps(
    path: str | os.PathLike[str],
    maps: NDArray[Any],
    names: Sequence[str],
    tiled: bool = False,
    tags: Sequence[Tag] = (),
    **options: Any,
) -> None:
    """Write maps, [K, H, W], as a TIFF of a band each, in planes: `tifffile.imread` gives the same array.

    GDAL, rasterio and QGIS show the bands by name. Masks have 1 bit a pixel. All are lossless; what is not float is
    compressed.

    Args:
        path: replaced in one step.
        maps: bool, uint8, uint16 or float32; may be a numpy.memmap.
        names: of the bands (GDAL's band descriptions).
        tiled: in tiles of TILE, which are read and written one at a time.
        tags: (code, type, count, value).
        options: of tifffile's `write`.
    """
    import tifffile

    count, height, width = maps.shape

    def tiles() -> Iterator[NDArray[Any]]:
        for band in maps:
            for top in range(0, height, TILE):
                for left in range(0, width, TILE):
                    part = band[top : top + TILE, left : left + TILE]
                    yield np.pad(part, [(0, TILE - side) for side in part.shape])

    options = {"photometric": "minisblack"} | options
    if count > 1:
        options["planarconfig"] = "separate"
    if maps.dtype.kind != "f":
        options |= {"compression": "zlib", "compressionargs": {"level": 1}}
    if tiled:
        options |= {"tile": (TILE, TILE), "shape": maps.shape if count > 1 else maps.shape[1:], "dtype": maps.dtype}
    written: list[Any] = [*tags, (GDAL_METADATA, "s", 0, _band_names(names))]
    # Beyond 4 GB a plain TIFF cannot point; compression helps, but how much is known afterwards only.
    with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=maps.nbytes > 2**31) as writer:
        writer.write(
            tiles() if tiled else maps if count > 1 else maps[0], metadata=None, software="fcn-deploy",
            # As bytes: texts that are not ASCII would be refused.
            extratags=[(*tag, value.encode() if isinstance(value, str) else value, True) for *tag, value in written],
            **options,
        )  # fmt: skip


def _band_names(names: Sequence[str]) -> str:
    """GDAL's XML, as its driver of TIFFs writes the descriptions of bands: what is escaped is escaped twice."""
    items = (
        f'<Item name="DESCRIPTION" sample="{band}" role="description">{escape(escape(name))}</Item>'
        for band, name in enumerate(names)
    )
    return f"<GDALMetadata>{''.join(items)}</GDALMetadata>"


def write_png(path: str | os.PathLike[str], picture: "Pictures.Image", strategy: int = -1) -> None:
    """Write a Pillow image as PNG, atomically. `strategy` is zlib's; -1: its default."""
    with replacing(path) as temporary:
        _save_png(temporary, picture, strategy)


def _save_png(file: Any, picture: "Pictures.Image", strategy: int) -> None:
    picture.save(file, format="PNG", compress_level=1, compress_type=strategy)  # a third of level 6's time

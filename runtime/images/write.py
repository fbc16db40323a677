"""Labels, masks, values and pictures, written to files in one step."""

import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import one_line
from ..extras import need
from ..files import WriteError, replacing
from .georeference import Tag

if TYPE_CHECKING:
    from PIL import Image as Pictures

# GDAL warns of what it fills tiles of 1 bit beyond the image with; pixels are none of it.
logging.getLogger("rasterio._env").addFilter(lambda record: "clipped to fit 1 bit domain" not in record.getMessage())

TILE = 512  # pixels: the sides of a tiled TIFF's tiles
COMPRESSED_AT_ONCE = 16_000_000  # bytes of a TIFF's tiles; tifffile's own would be 256 MB
NO_DATA_COLOR = (224, 224, 192)  # Pascal VOC's for its void
GDAL_METADATA = 42112  # the tag
ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})  # of XML's text, as html.escape has them
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
    maps: Any,
    names: Sequence[str],
    tiled: bool = False,
    tags: Sequence[Tag] = (),
    cog: str | None = None,
    **options: Any,
) -> None:
    """Write maps, [K, H, W], as a TIFF of a band each, in planes: `tifffile.imread` gives the same array.

    GDAL, rasterio and QGIS show the bands by name. Masks have 1 bit a pixel. All are lossless; what is not float is
    compressed.

    Args:
        path: replaced in one step.
        maps: bool, uint8, uint16, uint32 or float32; may be a numpy.memmap, or what has bands that are read likewise.
        names: of the bands (GDAL's band descriptions).
        tiled: in tiles of TILE, which are read and written one at a time.
        tags: (code, type, count, value).
        cog: how overviews of a Cloud-Optimized GeoTIFF are made (GDAL's name of it: MODE, AVERAGE, NEAREST); None: a
            plain TIFF.
        options: of tifffile's `write`.

    Raises:
        DeployError: a Cloud-Optimized GeoTIFF, and rasterio is not installed.
    """
    import tifffile

    count, height, width = maps.shape

    def tiles() -> Iterator[NDArray[Any]]:
        for band in maps:
            for top in range(0, height, TILE):
                for left in range(0, width, TILE):
                    part = band[top : top + TILE, left : left + TILE]
                    yield np.pad(part, [(0, TILE - side) for side in part.shape])

    own: dict[str, Any] = {"photometric": "minisblack", "buffersize": COMPRESSED_AT_ONCE, "maxworkers": os.cpu_count()}
    options = own | options
    if count > 1:
        options["planarconfig"] = "separate"
    if maps.dtype.kind != "f":
        options |= {"compression": "zlib", "compressionargs": {"level": 1}}
    if tiled:
        options |= {"tile": (TILE, TILE), "shape": maps.shape if count > 1 else maps.shape[1:], "dtype": maps.dtype}
    written: list[Any] = [*tags, (GDAL_METADATA, "s", 0, _band_names(names))]
    with (
        replacing(path) as temporary,
        _plain(temporary, cog) as plain,
        # Beyond 4 GB a plain TIFF cannot point; compression helps, but how much is known afterwards only.
        tifffile.TiffWriter(plain, bigtiff=maps.nbytes > 2**31) as writer,
    ):
        writer.write(
            tiles() if tiled else maps if count > 1 else maps[0], metadata=None, software="fcn-deploy",
            # As bytes: texts that are not ASCII would be refused.
            extratags=[(*tag, each.encode() if isinstance(each, str) else each, True) for *tag, each in written],
            **options,
        )  # fmt: skip


@contextmanager
def _plain(path: Path, cog: str | None) -> Iterator[Path]:
    """Where to write a plain TIFF that is to be at `path`, as a Cloud-Optimized GeoTIFF where `cog` says how."""
    if cog is None:
        yield path
        return
    rasterio, shutil = need("rasterio", "gdal"), need("rasterio.shutil", "gdal")
    with TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as folder:  # GDAL leaves files of its own there
        yield Path(folder, "plain.tif")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            try:
                shutil.copy(
                    Path(folder, "plain.tif"), Path(folder, "cog.tif"), driver="COG", compress="DEFLATE", level=6,
                    overview_resampling=cog, overviews="IGNORE_EXISTING", blocksize=TILE, bigtiff="IF_SAFER",
                )  # fmt: skip
            except (rasterio.errors.RasterioError, rasterio.errors.CPLE_BaseError) as error:
                raise WriteError(f"cannot write {path.name} as a Cloud-Optimized GeoTIFF: {one_line(error)}") from error
        Path(folder, "cog.tif").replace(path)


def attribute_table(card: ModelCard) -> str | None:
    """What an .aux.xml beside labels says of the classes, for GDAL and QGIS (GDAL's persistent auxiliary metadata).

    Category names, and a raster attribute table of value, name and colour; None where classes are only numbered.
    """
    if card.classes == tuple(f"class {index}" for index in range(len(card.classes))):
        return None
    names = [_escaped(name) for name in card.classes]
    columns = [("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8)]  # name, type, usage
    fields = "".join(
        f'<FieldDefn index="{i}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage></FieldDefn>'
        for i, (name, kind, usage) in enumerate(columns)
    )
    rows = "\n".join(
        f'<Row index="{i}">{"".join(f"<F>{value}</F>" for value in (i, name, *color))}</Row>'
        for i, (name, color) in enumerate(zip(names, card.colors, strict=True))
    )
    categories = "".join(f"<Category>{name}</Category>" for name in names)
    return (
        f'<PAMDataset><PAMRasterBand band="1">\n<CategoryNames>{categories}</CategoryNames>\n'
        f'<GDALRasterAttributeTable tableType="thematic">{fields}\n{rows}\n</GDALRasterAttributeTable>\n'
        "</PAMRasterBand></PAMDataset>\n"
    )


def _escaped(text: str) -> str:
    return text.translate(ESCAPES)


def _band_names(names: Sequence[str]) -> str:
    """GDAL's XML, as its driver of TIFFs writes the descriptions of bands: what is escaped is escaped twice."""
    items = (
        f'<Item name="DESCRIPTION" sample="{band}" role="description">{_escaped(_escaped(name))}</Item>'
        for band, name in enumerate(names)
    )
    return f"<GDALMetadata>{''.join(items)}</GDALMetadata>"


def write_png(path: str | os.PathLike[str], picture: "Pictures.Image", strategy: int = -1) -> None:
    """Write a Pillow image as PNG, atomically. `strategy` is zlib's; -1: its default."""
    with replacing(path) as temporary:
        _save_png(temporary, picture, strategy)


def _save_png(file: Any, picture: "Pictures.Image", strategy: int) -> None:
    picture.save(file, format="PNG", compress_level=1, compress_type=strategy)  # a third of level 6's time

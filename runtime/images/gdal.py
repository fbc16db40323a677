"""Files that GDAL reads and nothing else here: VRT mosaics and JPEG 2000 by regions (rasterio, the extra [gdal])."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError, MisuseError
from ..extras import need
from .tiff import Read

ALWAYS = (".vrt",)
WHERE_INSTALLED = (".jp2", ".j2k")  # Pillow reads them too: whole, without their georeference


@dataclass(frozen=True)
class GdalImage:
    """An open raster of GDAL.

    Attributes:
        size: (height, width).
        bands: samples of a pixel, 3 of a palette.
        dtype: of a sample.
        bits: of a sample that are used.
        colours, alpha, told: as of a StoredImage.
        georeferenced: whether it has a coordinate system or a transform.
        read: as of a StoredImage.
        indices: reads a palette's indices, [h, w, 1]; None: there is no palette.
        dataset: rasterio's.
        mask: reads where the dataset's own mask has data, [h, w, 1], 0 where there is none; None: it has none.
    """

    size: tuple[int, int]
    bands: int
    dtype: np.dtype[Any]
    bits: int
    colours: str
    alpha: int | None
    told: tuple[str, ...]
    georeferenced: bool
    read: Read
    indices: Read | None
    dataset: Any
    mask: Read | None


def is_gdals(path: Path) -> bool:
    """Whether a file is left to GDAL, by its suffix."""
    suffix = path.suffix.lower()
    return suffix in ALWAYS or (suffix in WHERE_INSTALLED and find_spec("rasterio") is not None)


@contextmanager
def open_gdal(path: Path) -> Iterator[GdalImage]:
    """Open a raster.

    Raises:
        DeployError: rasterio is not installed.
        MisuseError: bands of several types.
        Exception: whatever GDAL raises for a file that is damaged or absent.
    """
    rasterio = need("rasterio", "gdal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        opened = rasterio.open(path)
    with opened as dataset:
        if len(set(dataset.dtypes)) > 1:
            raise MisuseError(f"{path} has bands of several types ({', '.join(dataset.dtypes)}); make them one")
        kinds = [kind.name for kind in dataset.colorinterp]
        palette = None
        if kinds == ["palette"]:  # of as many colours as the file has: 16 of 4 bits
            colours_by_index = dataset.colormap(1)
            palette = np.zeros((max(colours_by_index, default=-1) + 1, 3), np.uint8)
            palette[list(colours_by_index)] = [colour[:3] for colour in colours_by_index.values()]
        bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", "0")

        def read_bands(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
            try:
                found: NDArray[Any] = dataset.read(window=((top, bottom), (left, right)))
            except rasterio.errors.RasterioIOError as error:  # its own text says only that there was an error before
                raise OSError(str(error.__cause__ or error)) from error
            return found.transpose(1, 2, 0)

        def read_colours(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
            assert palette is not None
            try:
                colours: NDArray[Any] = palette[read_bands(top, bottom, left, right)[:, :, 0]]
            except IndexError as error:
                raise DeployError(
                    f"{path} has pixels of none of its palette's {len(palette)} colours; is it damaged?"
                ) from error
            return colours

        def read_mask(top: int, bottom: int, left: int, right: int) -> NDArray[Any]:
            mask: NDArray[Any] = dataset.dataset_mask(window=((top, bottom), (left, right)))
            return mask[:, :, None]

        # Alpha and no-data values are masks of a dataset to GDAL too, and are read as what they are.
        flags = {flag.name for flag in dataset.mask_flag_enums[0]}
        masked = "per_dataset" in flags and not flags & {"alpha", "nodata"}
        masked = masked or len(set(map(str, dataset.nodatavals))) > 1  # where each band has another
        colours = "RGB" if kinds[:3] == ["red", "green", "blue"] or palette is not None else ""
        yield GdalImage(
            (dataset.height, dataset.width), dataset.count if palette is None else 3,
            np.dtype(dataset.dtypes[0] if palette is None else np.uint8),
            int(bits) if palette is None and bits.isdigit() else 0,
            colours or ("grey" if dataset.count == 1 or kinds == ["gray", "alpha"] else ""),
            kinds.index("alpha") if "alpha" in kinds else None, tuple(kinds),
            dataset.crs is not None or not dataset.transform.is_identity or bool(dataset.gcps[0]) or bool(dataset.rpcs),
            read_bands if palette is None else read_colours, None if palette is None else read_bands, dataset,
            read_mask if masked else None,
        )  # fmt: skip

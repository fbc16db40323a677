"""What a pixel of a result is on the ground: its area, and where its corners lie."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError, one_line
from ..extras import need
from ..images.georeference import Transform, transform_of
from ..images.results import ResultFile

log = logging.getLogger(__name__)

LOCAL_UNIT = re.compile(r'LOCAL_CS\[.*?\bUNIT\["[^"]*",([\d.eE+-]+)', re.DOTALL)  # of a building site, say; metres
NO_SYSTEM = "its coordinate system is not known: name it first (rio edit-info --crs)"
# WGS 84's equatorial radius in metres, and its first eccentricity squared (NIMA TR8350.2, table 3.1).
RADIUS, ECCENTRICITY2 = 6378137.0, 6.69437999014e-3


@dataclass(frozen=True)
class Ground:
    """Where a result lies.

    Attributes:
        transform: from (column, row) to the coordinates of its system; None where it has none, but pixels.
        crs: rasterio's coordinate system; None where it is not known.
        areas: [H + 1], square metres of a column one pixel wide, from the top to each row; None where unknown.
    """

    transform: Transform | None = None
    crs: Any | None = None
    areas: NDArray[np.float64] | None = None

    @property
    def kind(self) -> str:
        """Of its coordinates, in words."""
        if self.crs is not None:
            return "a coordinate system"
        return "pixels" if self.transform is None else "units of a map that is not named"

    def coordinates(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """[n, 2] (column, row) → [n, 2] (x, y)."""
        if self.transform is None:
            return np.asarray(points, np.float64)
        a, b, c, d, e, f = self.transform
        columns, rows = np.asarray(points, np.float64).T
        return np.stack([a * columns + b * rows + c, d * columns + e * rows + f], 1)

    def degrees(self, points: NDArray[Any]) -> NDArray[np.float64]:
        """[n, 2] (column, row) → [n, 2] (longitude, latitude). Raises DeployError where `crs` has none of the earth."""
        x, y = self.coordinates(points).T
        longitudes, latitudes = _degrees(self.crs, x, y)
        if self.crs is not None and self.crs.is_geographic:  # as continuous as they are in its own degrees
            own = x * np.degrees(self.crs.units_factor[1])
            longitudes = longitudes + 360 * np.round((own - longitudes) / 360)
        return np.stack([longitudes, latitudes], 1)


def ground_of(result: ResultFile) -> Ground:
    """Where a result lies, as its tags say. Raises DeployError where it is georeferenced and rasterio is absent."""
    transform = transform_of(result.tags)
    if transform is None:  # control points and RPCs say where some points lie, and not how large a pixel is
        if result.tags:
            _say(str(result.path), "it has control points or RPCs alone: warp it first (gdalwarp)")
        return Ground()
    with raster(result.path) as dataset:
        crs = dataset.crs
    areas = NO_SYSTEM if crs is None else _areas(transform, crs, result.size[0])
    if isinstance(areas, str):
        _say(str(result.path), areas)
        return Ground(transform, crs)
    return Ground(transform, crs, areas)


_said: set[str] = set()


def _say(path: str, reason: str) -> None:
    """Say why areas are not known, once for each reason."""
    if reason not in _said:
        _said.add(reason)
        log.warning("%s has no areas in square metres: %s; other such images are not named", path, reason)


def significant(area: float) -> float:
    """An area without the noise of its sum: 12 digits."""
    return float(f"{area:.12g}")


@contextmanager
def raster(path: Path, **options: str) -> Iterator[Any]:
    """A file as rasterio opens it, with options of GDAL's driver."""
    rasterio = need("rasterio", "gdal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        opened = rasterio.open(path, **options)
    with opened as dataset:
        yield dataset


def _areas(transform: Transform, crs: Any, height: int) -> NDArray[np.float64] | str:
    """`areas` of a Ground, or why they are not known.

    In degrees and in Mercator's projection a row's area depends on its latitude: there it is that on WGS 84. In others
    it is that of the plane, as planar area is measured in a GIS.
    """
    a, b, c, d, e, f = transform
    if not crs.is_geographic and crs.to_dict().get("proj") not in ("merc", "webmerc"):
        try:
            metres = crs.linear_units_factor[1]
        except Exception:  # rasterio's own error of a system that is no projection of the earth
            if (local := LOCAL_UNIT.match(crs.to_wkt())) is None:
                return f"its system ({one_line(crs.to_wkt())[:60]}…) has no unit of length"
            metres = local[1]
        pixel = abs(a * e - b * d) * float(metres) ** 2
        return np.arange(height + 1, dtype=np.float64) * pixel
    if b or d:
        return "it is rotated, in degrees or Mercator's projection, where pixels of a row differ: warp it (gdalwarp)"
    rows = f + e * np.arange(height + 1)
    try:
        (first, second), _ = _degrees(crs, np.array([c, c + a]), np.array([f, f]))
        _, latitudes = _degrees(crs, np.full(height + 1, c), rows)
    except DeployError as error:  # of the Moon, or Mars
        return str(error)
    zone = _zone(np.radians(np.clip(latitudes, -90, 90)))
    width = second - first - 360 * round((second - first) / 360)  # a pixel may lie on both sides of the antimeridian
    found: NDArray[np.float64] = np.abs(zone - zone[0]) * abs(np.radians(width))
    return found if np.isfinite(found).all() else "its coordinates lie outside their system"


def _degrees(crs: Any, x: NDArray[Any], y: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longitudes and latitudes on WGS 84. Raises DeployError where there is no way to them."""
    try:
        longitudes, latitudes = need("rasterio.warp", "gdal").transform(crs, "EPSG:4326", x, y)
    except Exception as error:  # GDAL's own, of which rasterio names no class
        name = one_line(crs.to_wkt())[:60]
        raise DeployError(f"its system ({name}…) has no way to longitudes and latitudes of WGS 84") from error
    return np.asarray(longitudes, np.float64), np.asarray(latitudes, np.float64)


def _zone(latitudes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Area between the equator and a latitude, of a zone one radian wide: a²·q/2 (Snyder 1987, equation 3-12)."""
    eccentricity, sine = np.sqrt(ECCENTRICITY2), np.sin(latitudes)
    part = np.arctanh(eccentricity * sine) / eccentricity
    found: NDArray[np.float64] = RADIUS**2 * (1 - ECCENTRICITY2) / 2 * (sine / (1 - ECCENTRICITY2 * sine**2) + part)
    return found

"""Polygons of the classes in label files, as GDAL finds them (rasterio), in one GeoPackage or GeoJSON of all images."""

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from struct import pack
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import DeployError, one_line
from ..extras import need
from ..files import WriteError
from ..images.results import ResultFile
from .ground import Ground, raster

TOGETHER = 20_000  # polygons that are in hand at once
REMEDY = "name a .gpkg with --polygons"
EDGE = 200  # pixels: a longer edge gets points between, as a straight line of one map is not straight on another
Ring = NDArray[Any]  # [n, 2], closed: (column, row) or (x, y)


@dataclass(frozen=True)
class Polygon:
    """Pixels of a class that touch by their sides.

    Attributes:
        value: class index.
        rings: the outline, then its holes, as (column, row).
        pixels: of it.
        area: in square metres; None where that is not known.
    """

    value: int
    rings: tuple[Ring, ...]
    pixels: int
    area: float | None


def polygons_of(result: ResultFile, ground: Ground, card: ModelCard) -> Iterator[Polygon]:
    """Polygons of the classes in an open file of labels or masks; none of where there is no data.

    GDAL reads a TIFF row by row; what is held is the outlines.
    """
    features, rasterio = need("rasterio.features", "gdal"), need("rasterio", "gdal")
    with ExitStack() as stack:
        if result.path.suffix.lower() == ".png":
            sources: list[Any] = [*result.rows(0, result.size[0])]
        else:
            # Without its georeference: polygons would be in its coordinates, whatever transform `shapes` is given.
            dataset = stack.enter_context(raster(result.path, GEOREF_SOURCES="NONE"))
            sources = [rasterio.band(dataset, band + 1) for band in range(result.maps)]
        for band, source in enumerate(sources):
            for shape, value in features.shapes(source, connectivity=4):
                index = int(value) if card.kind == "labels" else band if value else -1
                if 0 <= index < len(card.classes):
                    rings = tuple(np.array(ring).round().astype(np.int64) for ring in shape["coordinates"])
                    area = None if ground.areas is None else _area(rings, ground.areas)
                    yield Polygon(index, rings, round(_area(rings, None)), area)


def _area(rings: tuple[Ring, ...], areas: NDArray[np.float64] | None) -> float:
    """By what lies above each horizontal edge: `areas` of a Ground, or None: pixels."""
    found = []
    for ring in rings:
        above = ring[:-1, 1] if areas is None else areas[ring[:-1, 1]]
        found.append(abs(float((np.diff(ring[:, 0]) * above).sum())))
    return found[0] - sum(found[1:])


@dataclass
class GeoPackage:
    """A GeoPackage that grows by an image at a time: a layer for each coordinate system, the first called `labels`, and
    for each of the kinds of coordinates that have none.

    Args:
        path: of it; nothing is there yet.
        card: of the network.
    """

    path: Path
    card: ModelCard
    _layers: dict[str, str] = field(default_factory=dict)

    def add(self, image: str, result: ResultFile, ground: Ground) -> None:
        """Write the polygons of an image's result."""
        found = polygons_of(result, ground, self.card)
        some = list(islice(found, TOGETHER))
        self._write(image, some, ground)  # without any too: its layer has its coordinate system
        while some := list(islice(found, TOGETHER)):
            self._write(image, some, ground)

    def finish(self) -> None:
        if not self._layers:
            self._write("", [], Ground())

    def _write(self, image: str, some: list[Polygon], ground: Ground) -> None:
        crs = None if ground.crs is None else ground.crs.to_wkt()
        known = (crs or ground.kind) in self._layers
        if known and not some:
            return
        layer = self._layers.setdefault(crs or ground.kind, self._name(ground))
        fields = {
            "image": np.array([image for _ in some], object),
            "class": np.array([each.value for each in some], np.int32),
            "name": np.array([self.card.classes[each.value] for each in some], object),
            "pixels": np.array([each.pixels for each in some], np.int64),
            "area_m2": np.array([each.area for each in some], np.float64),  # None is NaN, and becomes NULL
        }
        shapes = np.empty(len(some), object)
        shapes[:] = [_well_known_binary([ground.coordinates(ring) for ring in each.rings]) for each in some]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that there is no coordinate system
            try:
                need("pyogrio.raw", "gdal").write(
                    self.path, shapes, [*fields.values()], [*fields], layer=layer, driver="GPKG", crs=crs,
                    geometry_type="Polygon", append=known,
                )  # fmt: skip
            except RuntimeError as error:  # of which all of pyogrio's are
                raise WriteError(f"cannot write polygons: {one_line(error)}; free space beside the file") from error

    def _name(self, ground: Ground) -> str:
        if not self._layers:
            return "labels"
        if ground.crs is None:
            return "labels_pixels" if ground.transform is None else "labels_map"
        code = ground.crs.to_epsg()
        return f"labels_{f'EPSG_{code}' if code else len(self._layers) + 1}"


@dataclass
class GeoJson:
    """A FeatureCollection (RFC 7946) that grows by an image at a time, in longitudes and latitudes; of images whose
    coordinate system is not known, in their own coordinates.

    Args:
        name: of the file, as the user knows it.
        card: of the network.
        text: what it is written to.
    """

    name: str
    card: ModelCard
    text: IO[str]
    _kind: str = ""  # of the coordinates before

    def add(self, image: str, result: ResultFile, ground: Ground) -> None:
        """Write the polygons of an image's result.

        Raises:
            DeployError: the coordinates of others before it are of another kind.
        """
        if self._kind not in ("", ground.kind):
            raise DeployError(
                f"{image} lies in {ground.kind}, and images before it in {self._kind}, of which {self.name} holds one; "
                "name a .gpkg with --polygons"
            )
        found = polygons_of(result, ground, self.card)
        while some := list(islice(found, TOGETHER)):
            self._write(image, some, ground)

    def finish(self) -> None:
        self.text.write("\n]}\n" if self._kind else '{"type": "FeatureCollection", "features": []}\n')

    def _write(self, image: str, some: list[Polygon], ground: Ground) -> None:
        rings = [ring if ground.crs is None else _with_points(ring) for each in some for ring in each.rings]
        together = np.concatenate(rings)
        try:
            points = ground.coordinates(together) if ground.crs is None else ground.degrees(together)
        except DeployError as error:
            raise DeployError(f"{image}: {error}, which are what {self.name} holds; {REMEDY}") from error
        parts = iter(np.split(points, np.cumsum([len(ring) for ring in rings])[:-1]))
        outlines = [[next(parts) for _ in each.rings] for each in some]
        if ground.crs is not None:
            outlines = [_continuous(outline, ground.crs.is_geographic) for outline in outlines]
            if any(ring[0, 0] != ring[-1, 0] for outline in outlines for ring in outline):
                raise DeployError(f"{image} has a polygon round a pole, which no longitudes outline; {REMEDY}")
        for each, outline in zip(some, outlines, strict=True):
            parts_of_it = [outline] if ground.crs is None else _within_180(outline)
            wound = [
                [_wound(ring, bool(place)).round(9).tolist() for place, ring in enumerate(part)] for part in parts_of_it
            ]
            said = {
                "image": image, "class": each.value, "name": self.card.classes[each.value], "pixels": each.pixels,
                "area_m2": each.area,
            }  # fmt: skip
            one = len(wound) == 1
            shape = {"type": "Polygon" if one else "MultiPolygon", "coordinates": wound[0] if one else wound}
            self.text.write('{"type": "FeatureCollection", "features": [\n' if not self._kind else ",\n")
            self.text.write(json.dumps({"type": "Feature", "properties": said, "geometry": shape}))
            self._kind = ground.kind


@contextmanager
def open_polygons(path: Path, name: str, card: ModelCard) -> Iterator[GeoPackage | GeoJson]:
    """A file to write polygons into, .gpkg or .geojson; `name`: as the user knows it. What is at `path` is lost."""
    file: GeoPackage | GeoJson
    if path.suffix.lower() == ".gpkg":
        path.unlink()
        file = GeoPackage(path, card)
        yield file
        file.finish()
        return
    with path.open("w", encoding="utf-8") as text:
        file = GeoJson(name, card, text)
        yield file
        file.finish()


def _well_known_binary(rings: list[Ring]) -> bytes:
    """A polygon in OGC's well-known binary (OGC 06-103r4, 8.2)."""
    parts = [pack("<BII", 1, 3, len(rings))]
    for ring in rings:
        parts += [pack("<I", len(ring)), ring.astype("<f8").tobytes()]
    return b"".join(parts)


def _with_points(ring: Ring) -> Ring:
    """A ring with points between those that are further than EDGE apart."""
    steps = -(-np.abs(np.diff(ring, axis=0)).max(1) // EDGE)
    if steps.max() == 1:
        return ring
    places = np.concatenate([np.arange(count) / count + place for place, count in enumerate(steps)] + [[len(steps)]])
    return np.stack([np.interp(places, np.arange(len(ring)), side) for side in ring.T], 1)


def _continuous(outline: list[Ring], geographic: bool) -> list[Ring]:
    """Rings of longitudes and latitudes that do not jump by 360 degrees at the antimeridian, its middle within -180 to
    180. Those of a `geographic` system do not jump, whatever the steps between their points."""
    if not geographic:
        turns = [np.cumsum(np.round(np.diff(ring[:, 0], prepend=ring[0, 0]) / 360)) for ring in outline]
        outline = [ring - np.stack([360 * each, 0 * each], 1) for ring, each in zip(outline, turns, strict=True)]
    middles = np.array([ring[:, 0].min() / 2 + ring[:, 0].max() / 2 for ring in outline])
    shifts = 360 * np.round((middles[0] - middles) / 360) - 360 * np.round(middles[0] / 360)
    return [ring + np.array((shift, 0)) if shift else ring for ring, shift in zip(outline, shifts, strict=True)]


def _within_180(outline: list[Ring]) -> list[list[Ring]]:
    """A polygon of longitudes and latitudes as RFC 7946 wants it (3.1.9): in parts, where it crosses the antimeridian.

    GDAL cuts it; where the parts are not all of it, it stays whole, and its longitudes go on beyond ±180.
    """
    low, high = outline[0][:, 0].min(), outline[0][:, 0].max()
    if low >= -180 and high <= 180:
        return [outline]
    shape, text = np.empty(1, object), BytesIO()
    shape[:] = [_well_known_binary([np.add(ring, (360, 0)) if low < -180 else ring for ring in outline])]
    need("pyogrio.raw", "gdal").write(
        text, shape, [], [], driver="GeoJSON", crs="EPSG:4326", geometry_type="Polygon", promote_to_multi=False,
        layer_options={"RFC7946": "YES", "COORDINATE_PRECISION": "12"}, layer="cut",
    )  # fmt: skip
    (feature,) = json.loads(text.getvalue())["features"]
    found = feature["geometry"]
    shapes = found.get("geometries", [found])  # of a polygon all round the earth there is a line too
    lists = [each["coordinates"] if each["type"] == "MultiPolygon" else [each["coordinates"]] for each in shapes
             if each["type"].endswith("Polygon")]  # fmt: skip
    parts = [[np.array(ring) for ring in part] for each in lists for part in each]
    parts = [part for part in parts if part and _plane(part) > 0]
    whole = np.isclose(sum(map(_plane, parts)), _plane(outline), rtol=1e-6, atol=0)
    return parts if whole else [outline]


def _plane(outline: list[Ring]) -> float:
    """The area of a polygon in its own units."""
    first, *holes = (abs(_twice_signed(ring)) / 2 for ring in outline)
    return first - sum(holes)


def _twice_signed(ring: Ring) -> float:
    """Twice the area of a ring; negative where its points go round clockwise."""
    x, y = (ring - ring[0]).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())


def _wound(ring: Ring, hole: bool) -> Ring:
    """A ring whose points go round as RFC 7946 wants: counterclockwise, and clockwise round holes."""
    return ring if (_twice_signed(ring) > 0) != hole else ring[::-1]

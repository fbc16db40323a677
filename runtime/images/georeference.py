"""Where an image lies on the ground: its own tags and the files beside it, in GDAL's order, as tags of a GeoTIFF.

GDAL's order (its GeoTIFF driver, GDAL_GEOREF_SOURCES): `.aux.xml`, the file's own tags, a MapInfo `.tab`, a world file.
Tags and world files need nothing installed; the other files are read by GDAL (rasterio, the extra [gdal]).
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import DeployError
from ..extras import need
from .tiff import is_tiff

Tag = tuple[int, int, int, Any]  # of a TIFF: code, type, count, value
Transform = tuple[float, float, float, float, float, float]  # a, b, c, d, e, f: x = a·column + b·row + c, y likewise
SCALE, TIEPOINTS, MATRIX, KEYS, RPC = 33550, 33922, 34264, 34735, 50844
# The tags of the GeoTIFF standard (OGC 19-008r4), and rational polynomial coefficients (RPCs in GeoTIFF).
GEOREFERENCE = (SCALE, TIEPOINTS, MATRIX, KEYS, 34736, 34737, RPC)
WORLD_FILES = ("TIFF", "JPEG", "PNG", "GIF", "BMP", "PPM")  # formats whose world files GDAL reads
DOUBLE = 12  # type of a tag
FAR = 0.25  # pixels, at a corner, from which on a world file contradicts the tags
TOLD_IN_XML = re.compile(r"<(GeoTransform|GCPList|SRS)\b|domain=\"RPC\"")


def beside(path: Path, kind: str) -> list[Path]:
    """The files beside an image that tell where it lies, those first that GDAL trusts most.

    Args:
        path: of the image.
        kind: its format, as of a Header.
    """
    if kind not in (*WORLD_FILES, "WEBP"):
        return []
    found = []
    if (xml := _first([path.with_name(f"{path.name}.aux.xml")])) is not None:
        with suppress(OSError):
            if TOLD_IN_XML.search(xml.read_text(errors="replace")):
                found.append(xml)
    if kind == "TIFF":
        stem = path.stem
        names = (f"{stem}_RPC.TXT", f"{stem}_rpc.txt", f"{stem}.RPB", f"{stem}.rpb")
        found += [each for each in [_first(path.with_name(name) for name in names)] if each]
    if kind in WORLD_FILES:
        tab = _first(_cased(path, ("tab",))) if kind != "PPM" else None
        found += [each for each in [tab, _world_file(path, kind)] if each]
    return found


def all_tags(
    path: Path, kind: str, size: tuple[int, int], own: tuple[Tag, ...], name: Callable[[str, str], None]
) -> tuple[Tag, ...]:
    """The tags that give a TIFF of this size the georeference that GDAL gives the image.

    Args:
        path: of the image.
        kind: its format, as of a Header.
        size: (height, width) in pixels.
        own: the tags it has itself.
        name: takes a kind of what looks wrong, and a line that says so.
    """
    files = beside(path, kind)
    others = [file for file in files if file.suffix.lower() in (".xml", ".txt", ".rpb", ".tab")]
    if others and find_spec("rasterio") is not None:
        tags = _by_gdal(path, own, others)
    else:
        tags = _with_world_file(own, files)
        if others:
            name(
                "georeference beside", f"{path} has its georeference in {others[0].name}, which is not read; "
                "run: pip install 'fcn-deploy[gdal]'",
            )  # fmt: skip
    world, told = next((file for file in files if file not in others), None), transform_of(tags)
    said = read_world_file(world) if world else None
    if world and said is None:
        name("world file", f"{world} does not hold the six numbers of a world file, and is ignored; mend or remove it")
    elif world and KEYS not in [tag[0] for tag in tags] and (system := _first(_cased(path, ("prj",)))):
        name(
            "prj", f"{path} lies where {world.name} says, and its coordinate system in {system.name} is not read, as "
            f"GDAL does not: give it to the results by gdal_edit -a_srs {system.name}",
        )  # fmt: skip
    if world and told and said and distance(said, told, size) > FAR:
        source = others[0].name if others and told != transform_of(own) else "its tags"
        name(
            "world file", f"{world} contradicts {source}, which say where {path.name} lies, by "
            f"{distance(said, told, size):.4g} pixels; they are followed, as GDAL does: remove the one that is wrong",
        )  # fmt: skip
    return tags


def own_tags(page: Any) -> tuple[Tag, ...]:
    """The tags of a page of tifffile that say where it lies."""
    found = (tag for tag in page.tags.values() if tag.code in GEOREFERENCE)
    return tuple((tag.code, int(tag.dtype), tag.count, tag.value) for tag in found)


def read_world_file(path: Path) -> Transform | None:
    """The transform of a world file, of the pixels' corners; None where it is none."""
    try:
        lines = [line.strip().replace(",", ".") for line in path.read_text(errors="replace").splitlines()]
        a, d, b, e, x, y = (float(line) for line in [line for line in lines if line][:6])
    except (OSError, ValueError):
        return None
    if not all(map(math.isfinite, (a, d, b, e, x, y))) or a * e - b * d == 0:
        return None
    return a, b, x - (a + b) / 2, d, e, y - (d + e) / 2  # it gives the centre of the first pixel


def transform_of(tags: Iterable[Tag]) -> Transform | None:
    """The transform that GeoTIFF tags give (OGC 19-008r4, annex B.6), of the pixels' corners; None: there is none."""
    # tifffile gives a tag of one number as that number.
    values = {code: value if isinstance(value, tuple) else (value,) for code, _, _, value in tags}
    if len(values.get(SCALE, ())) >= 2 and all(values[SCALE][:2]):  # of 0 there is none
        wide, high = values[SCALE][0], abs(values[SCALE][1])  # whose sign GDAL does not believe
        if len(values.get(TIEPOINTS, ())) < 6:
            return wide, 0.0, 0.0, 0.0, -high, 0.0
        column, row, _, x, y, _ = values[TIEPOINTS][:6]
        a, b, c, d, e, f = wide, 0.0, x - column * wide, 0.0, -high, y + row * high
    elif len(values.get(MATRIX, ())) == 16:
        a, b, _, c, d, e, _, f = values[MATRIX][:8]
    else:
        return None
    if _of_points(values.get(KEYS, ())):
        c, f = c - (a + b) / 2, f - (d + e) / 2
    return a, b, c, d, e, f


def _of_points(keys: Sequence[int]) -> bool:
    """Whether GeoTIFF keys set coordinates at the centres of pixels (GTRasterTypeGeoKey: PixelIsPoint)."""
    return (1025, 0, 1, 2) in zip(*(keys[i::4] for i in range(4)), strict=False)


def transform_tags(transform: Transform) -> tuple[Tag, ...]:
    """The tags of a transform, as GDAL writes them."""
    a, b, c, d, e, f = transform
    if b == d == 0 and e < 0:
        return (SCALE, DOUBLE, 3, (a, -e, 0.0)), (TIEPOINTS, DOUBLE, 6, (0.0, 0.0, 0.0, c, f, 0.0))
    matrix = (a, b, 0.0, c, d, e, 0.0, f, *(0.0,) * 4, *(0.0,) * 3, 1.0)
    return ((MATRIX, DOUBLE, 16, matrix),)


def dataset_tags(dataset: Any) -> tuple[Tag, ...]:
    """The tags that say in a GeoTIFF what the georeference of a raster of rasterio is."""
    import tifffile

    rasterio = need("rasterio", "gdal")
    (gcps, crs), options = dataset.gcps, {"driver": "GTiff", "height": 1, "width": 1, "count": 1, "dtype": "uint8"}
    if not dataset.transform.is_identity:
        options |= {"crs": dataset.crs or crs, "transform": dataset.transform}
    elif gcps:
        options |= {"crs": crs, "gcps": gcps}
    elif dataset.crs is not None:
        options["crs"] = dataset.crs
    with rasterio.MemoryFile() as memory:
        with memory.open(**options) as small:
            if dataset.rpcs is not None:
                small.rpcs = dataset.rpcs
        with tifffile.TiffFile(memory) as file:
            return own_tags(file.pages.first)


def _by_gdal(path: Path, own: tuple[Tag, ...], others: list[Path]) -> tuple[Tag, ...]:
    """As GDAL reads it; the image's own tags where the files beside it add nothing but RPCs."""
    import warnings

    rasterio = need("rasterio", "gdal")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path) as dataset:
                found = dataset_tags(dataset)
    except rasterio.errors.RasterioError as error:
        raise DeployError(f"cannot read the georeference of {path} in {others[0].name}: {error}; remove it") from error
    if any(file.suffix.lower() in (".xml", ".tab") for file in others) or transform_of(own) is None:
        return found
    return (*(tag for tag in own if tag[0] != RPC), *(tag for tag in found if tag[0] == RPC))


def _with_world_file(own: tuple[Tag, ...], files: list[Path]) -> tuple[Tag, ...]:
    """The image's own tags, and the transform of a world file where they have none."""
    transforms = (read_world_file(file) for file in files)
    said = next((each for each in transforms if each is not None), None)
    if said is None or transform_of(own) is not None:
        return own
    a, b, c, d, e, f = said
    if _of_points(
        {code: value for code, _, _, value in own}.get(KEYS, ())
    ):  # which are where pixels have their centres
        said = a, b, c + (a + b) / 2, d, e, f + (d + e) / 2
    return (*(tag for tag in own if tag[0] not in (SCALE, TIEPOINTS, MATRIX)), *transform_tags(said))


def transform_in(path: Path) -> Transform | None:
    """The transform in a TIFF's own tags; None: it has none, or is no TIFF. Raises what tifffile does."""
    import tifffile

    with path.open("rb") as file:
        if not is_tiff(file.read(4)):
            return None
    with tifffile.TiffFile(path) as stored:
        return transform_of(own_tags(stored.pages.first))


def distance(one: Transform, other: Transform, size: tuple[int, int]) -> float:
    """How far apart two transforms set the corners of an image of (height, width), in pixels of the second."""
    a, b, _, d, e, _ = other
    area = a * e - b * d
    most = 0.0
    for row in (0, size[0]):
        for column in (0, size[1]):
            dx, dy = (
                sum(p * q for p, q in zip(one[i : i + 3], (column, row, 1), strict=True))
                - sum(p * q for p, q in zip(other[i : i + 3], (column, row, 1), strict=True))
                for i in (0, 3)
            )
            most = max(most, math.hypot((e * dx - b * dy) / area, (a * dy - d * dx) / area) if area else math.inf)
    return most


def _world_file(path: Path, kind: str) -> Path | None:
    """The world file of an image, by GDAL's names of it: a.tfw, a.tifw or a.wld of a.tif, and a.wld alone of a.ppm."""
    suffix = path.suffix[1:]
    if kind == "PPM":
        return _first(_cased(path, ("wld",)))
    return _first(_cased(path, (f"{suffix[:1]}{suffix[-1:]}w", f"{suffix}w", "wld"))) if len(suffix) > 1 else None


def _cased(path: Path, suffixes: Iterable[str]) -> Iterable[Path]:
    return (path.with_suffix(f".{each}") for suffix in suffixes for each in (suffix.lower(), suffix.upper()))


def _first(paths: Iterable[Path]) -> Path | None:
    """The first of these that is a file."""
    return next((path for path in paths if path.is_file()), None)

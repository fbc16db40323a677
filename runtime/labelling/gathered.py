"""What is made of all images of a run together: polygons in one file, and statistics in another, wherever these lie."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..engine_format.model_card import ModelCard
from ..errors import DeployError, MisuseError
from ..extras import need
from ..files import WriteError, check_writable, refuse_existing
from ..images.results import ResultFile, open_result
from ..stream import said
from .ground import Ground, ground_of
from .jobs import Record
from .objects import is_address, parted, replacing_at
from .polygons import GeoJson, GeoPackage, open_polygons
from .products import POLYGONS, Products
from .statistics import StatisticsFile, open_statistics


@dataclass(frozen=True)
class Gathered:
    """Open files, to which images are added one after the other.

    Attributes:
        card: of the network.
        polygons, stats: of all images; None where they are not wanted.
    """

    card: ModelCard
    polygons: GeoPackage | GeoJson | None = None
    stats: StatisticsFile | None = None

    def add(self, image: str, result: ResultFile, ground: Ground, counts: Mapping[int, int]) -> None:
        """Add an image: its open result, where that lies, and the instances of some classes. Raises DeployError."""
        if self.stats:
            self.stats.add(image, result, ground, counts)
        if self.polygons:
            self.polygons.add(image, result, ground)

    def add_file(self, image: str, path: Path, record: Record) -> Record:
        """Add an image by its result's file; its record, with what is wrong where it cannot be added.

        Raises WriteError.
        """
        counts = {self.card.classes.index(name): count for name, count in record.get("instance_counts", {}).items()}
        try:
            with open_result(path) as result:
                self.add(image, result, ground_of(result), counts)
        except WriteError:
            raise
        except DeployError as error:
            return record | {"error": said(error, image).replace(str(path), image)}
        return record


@contextmanager
def gathering(products: Products, card: ModelCard) -> Iterator[Gathered]:
    """The files that are wanted; they get their names when the block ends well. Raises WriteError."""
    with ExitStack() as stack:
        polygons, stats = None, None
        if products.polygons:
            path = stack.enter_context(replacing_at(products.polygons))
            polygons = stack.enter_context(open_polygons(path, str(products.polygons), card))
        if products.stats:
            path = stack.enter_context(replacing_at(products.stats))
            stats = stack.enter_context(open_statistics(path, card, bool(products.instances)))
        yield Gathered(card, polygons, stats)


def check_gathered(products: Products, card: ModelCard, taken: Collection[str], replace: bool) -> None:
    """Before any work: whether the files can be made.

    Args:
        products: that are wanted.
        card: of the network.
        taken: paths and addresses of the run's images and results.
        replace: files that exist.

    Raises:
        MisuseError: it was asked for wrongly.
        DeployError: a package is missing, or a place cannot be written or reached.
    """
    asked = {"polygons": products.polygons, "stats": products.stats}
    if card.kind == "values" and any(asked.values()):
        option = next(name for name, place in asked.items() if place)
        raise MisuseError(f"--{option}: this model gives values, no classes; omit it")
    if products.polygons:
        need("rasterio", "gdal")
        if (suffix := _suffix(products.polygons)) not in POLYGONS:
            raise MisuseError(f"--polygons {products.polygons}; name a file that ends in {' or '.join(POLYGONS)}")
        if suffix == POLYGONS[0]:
            need("pyogrio", "gdal")
    if products.stats and _suffix(products.stats) != ".csv":
        raise MisuseError(f"--stats {products.stats}; name a file that ends in .csv")
    for place in filter(None, asked.values()):
        _check_place(str(place), taken, replace)


def _check_place(place: str, taken: Collection[str], replace: bool) -> None:
    store, name = parted(place) if is_address(place) else (None, "")
    if (str(Path(place).resolve()) if store is None else store.address(store.join(name))) in taken:
        raise MisuseError(f"{place} is an image or a result of this run; choose another name")
    if store is None:
        refuse_existing(place, replace)
        check_writable(place)
    elif not replace and name in store.listed():
        raise MisuseError(f"{place} exists already; choose another name, or pass --force to replace it")


def _suffix(place: str | Path) -> str:
    return PurePosixPath(str(place)).suffix.lower()

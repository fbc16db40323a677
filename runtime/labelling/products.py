"""What a user wants beside plain label files: Cloud-Optimized TIFFs, polygons, statistics, instances."""

from dataclasses import dataclass
from typing import Annotated

from ..engine_format.model_card import ModelCard
from ..errors import MisuseError
from ..options import option

SCREEN = 4096  # pixels: longest side of a picture, where no other is asked for
POLYGONS = (".gpkg", ".geojson")
SHOWN = 8  # names of classes in an error


@dataclass(frozen=True)
class Products:
    """What is made of the labels, or masks, of all images of a run, and how.

    Attributes:
        overlay_side: of overlays, in pixels, at most: rows and columns are left out of larger ones.
        cog: TIFFs are Cloud-Optimized GeoTIFFs, labels too, region by region.
        polygons: path or address of a GeoPackage or GeoJSON.
        stats: of a CSV.
        instances: names or indices of classes, with commas between.
        connectivity: of instances: 4, by sides, or 8, by corners too.
    """

    overlay_side: Annotated[
        int, option(min=1, metavar="PIXELS", help="Longest side of overlays; larger ones are reduced.")
    ] = SCREEN
    cog: Annotated[
        bool, option("--cog", help="Write Cloud-Optimized GeoTIFFs, with overviews, of images of any kind.")
    ] = False
    polygons: Annotated[
        str | None,
        option(metavar="FILE", help="Write polygons of the classes of all images into a .gpkg or .geojson."),
    ] = None
    stats: Annotated[
        str | None,
        option(metavar="FILE", help="Write pixels, share and area of each class in each image as a .csv."),
    ] = None
    instances: Annotated[
        str | None,
        option(
            metavar="CLASS,…", help="Number, count and measure the separate objects of these classes: a TIFF and a CSV."
        ),
    ] = None
    connectivity: Annotated[
        int, option(metavar="4|8", help="Pixels of an object touch by their sides (4), or by corners too (8).")
    ] = 4

    @property
    def derived(self) -> bool:
        """Whether anything is made of label files once they are written."""
        return bool(self.polygons or self.stats or self.instances is not None)

    def classes(self, card: ModelCard) -> list[int]:
        """The classes of which instances are wanted. Raises MisuseError for one that the card does not have."""
        found: list[int] = []
        for given in () if self.instances is None else self.instances.split(","):
            name = given.strip()
            if name in card.classes:
                found.append(card.classes.index(name))
            elif name.isdecimal() and int(name) < len(card.classes):
                found.append(int(name))
            else:
                shown = ", ".join(card.classes[:SHOWN]) + (", …" if len(card.classes) > SHOWN else "")
                raise MisuseError(f"--instances {name!r}; name classes of this model ({shown}), or their indices")
            if found[-1] in found[:-1]:
                raise MisuseError(f"--instances names {name!r} twice; name each class once")
        return found

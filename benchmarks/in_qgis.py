"""Label files and polygons as QGIS opens them, by its own Python (Debian's python3-qgis), beside the images.

    label-images scenes.engine scenes -o out --cog --polygons out/polygons.gpkg
    QT_QPA_PLATFORM=offscreen /usr/bin/python3 benchmarks/in_qgis.py scenes out

Every label file must lie where QGIS sees its image, have its coordinate system, a no-data value, and a renderer by
classes with the names of the attribute table beside it; layers of polygons must have these names, and valid
shapes within the extents of the files. Exit 1 where something is not so. Needs nothing of this project.
"""

import sys
from pathlib import Path
from typing import Any

from qgis.core import QgsApplication, QgsDataProvider, QgsPalettedRasterRenderer, QgsRasterLayer, QgsVectorLayer

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jp2", ".vrt")


def wrong_in_labels(labels: Any, image: Any) -> list[str]:
    """What is not as it should be of a label file, an open layer, beside its image's."""
    if not labels.isValid() or not image.isValid():
        return ["cannot be opened"]
    renderer, provider = labels.renderer(), labels.dataProvider()
    classes = renderer.classes() if isinstance(renderer, QgsPalettedRasterRenderer) else []
    named = any(each.label != f"{each.value:g}" for each in classes)  # colours beyond the classes have their numbers
    found = {
        "lies elsewhere": labels.extent() != image.extent(),
        "has another size": (labels.width(), labels.height()) != (image.width(), image.height()),
        "has another coordinate system": labels.crs() != image.crs(),
        "has no no-data value": not provider.sourceHasNoDataValue(1),
        "has no named classes": not named,
    }
    return [what for what, so in found.items() if so]


def wrong_in_polygons(path: Path, names: set[str]) -> list[str]:
    """What is not as it should be of a file of polygons, whose classes are called so."""
    first = QgsVectorLayer(str(path), "polygons", "ogr")
    if not first.isValid():
        return ["cannot be opened"]
    wrong = []
    for listed in first.dataProvider().subLayers():
        name = listed.split(QgsDataProvider.sublayerSeparator())[1]
        layer = QgsVectorLayer(f"{path}|layername={name}", name, "ogr")
        features = list(layer.getFeatures())
        broken = sum(not each.geometry().isGeosValid() for each in features)
        strange = {each["name"] for each in features} - names
        wrong += [f"{name}: {broken} of {len(features)} shapes are not valid"] if broken else []
        wrong += [f"{name}: classes {sorted(strange)} are in no label file"] if strange else []
        print(f"{path.name}, {name}: {len(features)} polygons in {layer.crs().authid() or 'no system'}")
    return wrong


def all_is_well(images: Path, results: Path) -> bool:
    """Look at every file, and say what is wrong; layers must be gone before QGIS is."""
    wrong: dict[str, list[str]] = {}
    names: set[str] = set()
    for path in sorted(results.glob("*.tif")):
        image = next((each for each in sorted(images.glob(f"{path.stem}.*")) if each.suffix in SUFFIXES), None)
        if image is None:
            continue
        labels = QgsRasterLayer(str(path), "labels", "gdal")
        wrong[path.name] = wrong_in_labels(labels, QgsRasterLayer(str(image), "image", "gdal"))
        if isinstance(labels.renderer(), QgsPalettedRasterRenderer):
            names |= {each.label for each in labels.renderer().classes()}
    for path in sorted([*results.glob("*.gpkg"), *results.glob("*.geojson")]):
        wrong[path.name] = wrong_in_polygons(path, names)
    for name, found in wrong.items():
        print(f"{name}: {', '.join(found) or 'as it should be'}")
    return bool(wrong) and not any(wrong.values())


def main() -> None:
    application = QgsApplication([], False)
    application.initQgis()
    well = all_is_well(*map(Path, sys.argv[1:]))
    application.exitQgis()
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# rasterio.features.shapes ignores transform= where its source is a Band, and gives map coordinates where pixels are said.
#
# Seen with rasterio 1.4.4, numpy 2.4.6. The documentation of `shapes` takes an array or a Band, and says of `transform`:
# "If not provided, feature coordinates will be generated based on pixel coordinates". The same raster, the same call:
#                            array            Band of the open file
#   no transform             (2, 1)           (500020, 4999990): the file's own map coordinates
#   transform=A              A × (2, 1)       (500020, 4999990): A is ignored
# There is no error and no warning: both are valid polygons.
#
# Why it matters: a Band is what is passed for a raster that does not fit into memory, so the switch from an array to a
# Band, with nothing else changed, moves all polygons. Code that multiplies pixel coordinates by the transform afterwards
# applies it twice; areas that were pixel counts become square metres; a transform of a window or another grid is lost.
# Remedy: open the file for `shapes` with GEOREF_SOURCES="NONE" (then a Band is in pixels), and apply the transform after.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 rasterio==1.4.4
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import numpy as np, rasterio
from rasterio import features
from rasterio.transform import Affine

print(f"rasterio {version('rasterio')}, numpy {version('numpy')}")
path = f"{sys.argv[1]}/labels.tif"
labels = np.zeros((4, 6), np.uint8)
labels[1:3, 2:5] = 1
with rasterio.open(path, "w", driver="GTiff", width=6, height=4, count=1, dtype="uint8", crs="EPSG:32633",
                   transform=Affine(10, 0, 500000, 0, -10, 5000000)) as file:
    file.write(labels, 1)


def corner(source, **options):
    return next(shape["coordinates"][0][0] for shape, value in features.shapes(source, **options) if value == 1)


other = {"transform": Affine(2, 0, 7, 0, 2, 7)}
with rasterio.open(path) as file:
    band = rasterio.band(file, 1)
    found = [(corner(labels), corner(band)), (corner(labels, **other), corner(band, **other))]
with rasterio.open(path, GEOREF_SOURCES="NONE") as file:
    remedy = corner(rasterio.band(file, 1))
for name, (array, banded) in zip(("no transform", "a transform"), found):
    print(f"{name}: array {array}, Band {banded}")
print(f"Band without its georeference: {remedy}")
if found != [((2, 1), (500020, 4999990)), ((11, 9), (500020, 4999990))] or remedy != (2, 1):
    sys.exit("not seen any more: an array and a Band have the same coordinates")
EOF

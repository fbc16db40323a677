#!/usr/bin/env bash
# rasterio.merge takes class 0 of a label map for a hole, and lets the neighbour's class show through.
#
# Seen with rasterio 1.4.4. Two uint8 label maps without a no-data tag overlap by four columns: class 0 in the first,
# class 7 in the second. Of the overlap, merge gives
#   method first (the default)           7 instead of 0
#   method min                           7, as the smaller of 0 and 7
#   method last, the files turned round  0: right
# With a no-data tag of 255 in the files all three give 0. A missing tag counts as 0, without a word.
#
# Why it matters: labels of large scenes are made in tiles and merged. Class 0 is road, background or "other": wherever
# tiles overlap it disappears, in strips along the seams, more so the larger the overlap.
# Remedy: write label rasters with a no-data tag that is no class, also where no pixel has it; or pass merge(nodata=255).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 rasterio==1.4.4
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import numpy as np, rasterio
from rasterio.merge import merge
from rasterio.transform import from_origin

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__)


def write(name, labels, left, nodata):
    path = f"{sys.argv[1]}/{name}.tif"
    with rasterio.open(path, "w", driver="GTiff", height=8, width=8, count=1, dtype="uint8", crs="EPSG:32633",
                       transform=from_origin(left, 100, 1, 1), nodata=nodata) as target:
        target.write(labels, 1)
    return path


found = {}
for nodata in (None, 255):
    first = write("first", np.zeros((8, 8), np.uint8), 0, nodata)
    second = write("second", np.full((8, 8), 7, np.uint8), 4, nodata)
    for title, files, method in (("first", [first, second], "first"), ("last", [second, first], "last"),
                                 ("min", [first, second], "min")):
        row = merge(files, method=method)[0][0, 0]
        found[nodata, title] = int(row[5])
        print(f"no-data tag {nodata}, method {method}: {row.tolist()}, in the overlap {row[5]} instead of 0")
if [found[None, method] for method in ("first", "last", "min")] != [7, 0, 7]:
    sys.exit("not seen any more: merge keeps class 0 of files without a no-data tag")
if [found[255, method] for method in ("first", "last", "min")] != [0, 0, 0]:
    sys.exit("not seen any more: a no-data tag no longer helps")
EOF

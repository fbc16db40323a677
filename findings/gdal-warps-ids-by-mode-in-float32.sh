#!/usr/bin/env bash
# Warping label ids by their most frequent value ("mode") in GDAL rounds them to float32: 16777217 becomes 16777216.
#
# Seen with rasterio 1.4.4 (GDAL 3.10.3). A raster of one id, 2^24 + 1, halved in both directions, by resampling:
#                                       nearest     mode
#   warp of uint32, int32, float64      16777217    16777216
#   warp of int64, uint64               16777217    16777216
#   read(out_shape=...)                 16777217    16777217
#   overviews                           16777217    16777217
# The result has the type of the raster, and there is no error and no warning: an id comes out that was never stored.
#
# Why it matters: mode is what label maps are warped by when they get coarser, and ids of objects, parcels and
# "class * 2^24 + object" exceed 16.7 million. Neighbouring ids merge into one, and joins with a table of ids fail for
# every second object. That overviews of the same raster are right hides it.
# Remedy: warp by nearest; or number the ids from 0 (numpy.unique, return_inverse), warp these, and look the ids up.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 rasterio==1.4.4
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import numpy as np, rasterio
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__)
label, fine, coarse = 2**24 + 1, Affine(10, 0, 0, 0, -10, 80), Affine(20, 0, 0, 0, -20, 80)
both = {"src_crs": "EPSG:32633", "dst_crs": "EPSG:32633", "src_transform": fine, "dst_transform": coarse}
for dtype in ("uint32", "int32", "int64", "uint64", "float64"):
    ids = np.full((8, 8), label, dtype)
    warped = {}
    for how in (Resampling.nearest, Resampling.mode):
        warped[how.name] = np.zeros((4, 4), dtype)
        reproject(ids, warped[how.name], resampling=how, **both)
    path = f"{sys.argv[1]}/{dtype}.tif"
    with rasterio.open(path, "w", driver="GTiff", width=8, height=8, count=1, dtype=dtype, transform=fine) as file:
        file.write(ids, 1)
    with rasterio.open(path, "r+") as file:
        read = file.read(1, out_shape=(4, 4), resampling=Resampling.mode)
        file.build_overviews([2], Resampling.mode)
    with rasterio.open(path, overview_level=0) as file:
        overview = file.read(1)
    found = [int(each[0, 0]) for each in (warped["nearest"], warped["mode"], read, overview)]
    print(f"{dtype:8} warp nearest {found[0]}, warp mode {found[1]}, read mode {found[2]}, overview mode {found[3]}")
    if found != [label, label - 1, label, label]:
        sys.exit(f"not seen any more: ids of {dtype} are {found}")
    few = np.unique(ids, return_inverse=True)
    small = np.zeros((4, 4), np.int32)
    reproject(few[1].reshape(ids.shape).astype(np.int32), small, resampling=Resampling.mode, **both)
    if not np.all(few[0][small] == label):
        sys.exit("not seen any more: the remedy does not help")
EOF

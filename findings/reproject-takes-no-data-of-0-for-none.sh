#!/usr/bin/env bash
# rasterio.warp.reproject(dst_nodata=0) does not write 0 outside the source: it writes the source's no-data value.
#
# Seen with rasterio 1.4.4 (GDAL 3.10.3), odc-geo 0.5.3, numpy 2.4.6. The classes 0, 1, 2 and 255 (no data) in uint8,
# moved by a column, nearest neighbour; what the column that has no source and the pixels without data become:
#                                       dst_nodata=7    dst_nodata=0
#   reproject, src_nodata=255           7               255
#   reproject, src_nodata=254           7               254: a value that was neither in the source nor asked for
#   odc.reproject of odc-geo            7               255, in a result that is tagged nodata = 0
#   WarpedVRT(src_nodata=255, nodata=)  7               0
# The documentation of dst_nodata: it is what the destination is filled with; where it is not given, src_nodata. A 0 that
# is given counts as not given. Nothing warns.
#
# Why it matters: 0 as "nothing here" is the usual choice for the result of a warp, and who asks for it tags the file with
# nodata=0. There class 255 (254) now is data, in wedges along the edges of every warped scene: it is counted, trained on,
# or out of range for a table of classes, while a test with any other number passes.
# Remedy: WarpedVRT; or warp to a number other than 0 and replace it; or a destination filled with 0, and
# init_dest_nodata=False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 rasterio==1.4.4 \
    odc-geo==0.5.3 xarray==2026.9.0 dask==2026.8.0
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import numpy as np, odc.geo, odc.geo.xr, rasterio, xarray
from odc.geo.geobox import GeoBox
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import Resampling, reproject

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__, "odc-geo", odc.geo.__version__)
labels = np.tile(np.array([0, 1, 2, 255], np.uint8), (4, 2))
here = Affine(10, 0, 500000, 0, -10, 5000000)
moved = here * Affine.translation(-1, 0)
path = sys.argv[1] + "/labels.tif"
with rasterio.open(path, "w", driver="GTiff", width=8, height=4, count=1, dtype="uint8", crs="EPSG:32633",
                   transform=here) as file:
    file.write(labels, 1)


def warped(src_nodata, dst_nodata, start=9, **options):
    result = np.full_like(labels, start)
    reproject(labels, result, src_crs="EPSG:32633", dst_crs="EPSG:32633", src_transform=here, dst_transform=moved,
              src_nodata=src_nodata, dst_nodata=dst_nodata, resampling=Resampling.nearest, **options)
    return result[0].tolist()


def vrt(dst_nodata):
    with rasterio.open(path) as file, WarpedVRT(
            file, crs="EPSG:32633", transform=moved, width=8, height=4, src_nodata=255, nodata=dst_nodata) as view:
        return view.read(1)[0].tolist()


def by_odc(dst_nodata):
    places = {"y": 5000000 - 10 * np.arange(4) - 5.0, "x": 500000 + 10 * np.arange(8) + 5.0}
    array = xarray.DataArray(labels, dims=("y", "x"), coords=places, attrs={"nodata": 255}).odc.assign_crs("EPSG:32633")
    result = array.odc.reproject(GeoBox((4, 8), moved, "EPSG:32633"), resampling="nearest", dst_nodata=dst_nodata)
    print("odc-geo: tagged", result.attrs["nodata"])
    return result.values[0].tolist()


for title, found, expected in (
    ("reproject, 255 to 7", warped(255, 7), [7, 0, 1, 2, 7, 0, 1, 2]),
    ("reproject, 255 to 0", warped(255, 0), [255, 0, 1, 2, 255, 0, 1, 2]),
    ("reproject, 254 to 7", warped(254, 7), [7, 0, 1, 2, 255, 0, 1, 2]),
    ("reproject, 254 to 0", warped(254, 0), [254, 0, 1, 2, 255, 0, 1, 2]),
    ("odc-geo, 255 to 7", by_odc(7), [7, 0, 1, 2, 7, 0, 1, 2]),
    ("odc-geo, 255 to 0", by_odc(0), [255, 0, 1, 2, 255, 0, 1, 2]),
    ("WarpedVRT, 255 to 7", vrt(7), [7, 0, 1, 2, 7, 0, 1, 2]),
    ("WarpedVRT, 255 to 0", vrt(0), [0, 0, 1, 2, 0, 0, 1, 2]),
    ("reproject into zeros, init_dest_nodata=False", warped(255, 0, 0, init_dest_nodata=False), [0, 0, 1, 2, 0, 0, 1, 2]),
):
    print(title, found)
    if found != expected:
        sys.exit(f"not seen any more: {title} was {expected}")
EOF

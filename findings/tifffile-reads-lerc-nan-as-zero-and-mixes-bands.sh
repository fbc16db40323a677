#!/usr/bin/env bash
# LERC GeoTIFFs whose floats hold NaN: tifffile reads zeros there, and where bands differ in it, other bands' values.
#
# Seen with tifffile 2026.3.3, imagecodecs 2026.3.6, rasterio 1.4.4, numpy 2.4.6. GDAL writes NaN
# into LERC's mask. A raster of 3 bands, 64×64, LERC, with NaN in 10 rows:
#                                         rasterio       tifffile
#   the same pixels in all bands          1920 NaN       no NaN, 1920 zeros
#   another place in each band            1280 NaN       no NaN, and most values are of other bands and pixels
# Neither warns. imagecodecs gives the mask only where it is asked for (masks=True), and in the second case bands that
# follow each other, [3, h, w], which tifffile takes for pixels, [h, w, 3].
#
# Why it matters: elevation and reflectance are stored so (COMPRESS=LERC_ZSTD). Zeros are data to a network: no-data areas
# get classes, and statistics for normalisation are pulled to 0. In the second case the picture is noise.
# Remedy: decode by lerc_decode(data, masks=True), write NaN where the mask is False, and look at the mask's shape.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tifffile==2026.3.3 imagecodecs==2026.3.6 \
    rasterio==1.4.4
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import numpy as np, rasterio, tifffile

print(*(f"{name} {version(name)}" for name in ("tifffile", "imagecodecs", "rasterio", "numpy")))
path = sys.argv[1] + "/scene.tif"
seen = []
for where in ("the same pixels in all bands", "another place in each band"):
    scene = np.random.default_rng(0).normal(size=(3, 64, 64)).astype(np.float32)
    if where.startswith("the same"):
        scene[:, :10] = np.nan
    else:
        scene[0, :10] = scene[1, 20:30] = np.nan
    options = {"height": 64, "width": 64, "count": 3, "dtype": "float32", "compress": "LERC", "nodata": np.nan}
    with rasterio.open(path, "w", driver="GTiff", tiled=True, blockxsize=64, blockysize=64, **options) as file:
        file.write(scene)
    with rasterio.open(path) as file:
        gdal = file.read()
    found = tifffile.imread(path).transpose(2, 0, 1)
    valid = ~np.isnan(scene)
    assert np.array_equal(gdal, scene, equal_nan=True), "GDAL reads what it wrote"
    row = (int(np.isnan(gdal).sum()), int(np.isnan(found).sum()), int((found == 0).sum()),
           round(float((found[valid] != scene[valid]).mean()), 2))
    print(f"{where}: rasterio {row[0]} NaN; tifffile {row[1]} NaN, {row[2]} zeros, {row[3]:.0%} of valid values wrong")
    seen.append(row)
if not (seen[0] == (1920, 0, 1920, 0.0) and seen[1][:3] == (1280, 0, 1280) and seen[1][3] > 0.5):
    sys.exit("not seen any more: tifffile reads NaN of LERC, or otherwise")
EOF

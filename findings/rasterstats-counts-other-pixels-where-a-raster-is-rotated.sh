#!/usr/bin/env bash
# rasterstats counts other pixels than those of the polygon where a raster is rotated or sheared, without a word.
#
# Seen with rasterstats 0.21.0, rasterio 1.4.4, exactextract 0.3.0, numpy 2.4.6. A label map of 64x64 pixels of 10 m, and
# a polygon around columns 20 to 44 and rows 20 to 40, which are 480 pixels. zonal_stats(categorical=True) gives, by class:
#                       north up (right)                      rotated by 20 degrees    sheared
#   rasterstats         {0: 160, 1: 80, 2: 96, 3: 96, 4: 48}  {1: 24}                  {0: 96, 1: 32, 2: 96, 3: 96}
#   rasterio.mask       the same                              the same as north up     the same as north up
#   exactextract        the same                              refuses                  refuses
# It takes columns and rows from the first and fifth number of the transform alone, as if the other two were 0.
#
# Why it matters: drones, aerial cameras and instruments deliver rasters that follow the flight and not the north, and
# labels are made on their grid. Areas by class are then those of another place, with plausible numbers, and one that
# falls outside the file is "no data".
# Remedy: rasterio.mask or rasterio.features.geometry_mask, which use the whole transform; or warp the labels north up
# (nearest) first; or exactextract, which says so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 rasterio==1.4.4 shapely==2.2.0 \
    rasterstats==0.21.0 exactextract==0.3.0
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import numpy as np, rasterio
from exactextract import exact_extract
from rasterio.features import geometry_mask
from rasterio.mask import mask
from rasterio.transform import Affine
from rasterstats import zonal_stats
from shapely.geometry import Polygon, mapping

print(*(f"{name} {version(name)}" for name in ("rasterstats", "rasterio", "exactextract")))
coarse = np.random.default_rng(0).integers(0, 5, (8, 8), np.uint8)
labels = coarse.repeat(8, 0).repeat(8, 1)
path = sys.argv[1] + "/labels.tif"
transforms = {
    "north up": Affine(10, 0, 1000, 0, -10, 5000),
    "rotated": Affine.translation(1000, 5000) * Affine.rotation(20) * Affine.scale(10, -10),
    "sheared": Affine(10, 2, 1000, 0, -10, 5000),
}


def by_class(pixels):
    return {int(label): int(count) for label, count in zip(*np.unique(pixels, return_counts=True))}


truth = by_class(labels[20:40, 20:44])
for title, transform in transforms.items():
    zone = mapping(Polygon([transform * corner for corner in ((20, 20), (44, 20), (44, 40), (20, 40))]))
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint8", crs="EPSG:32633",
                       transform=transform) as file:
        file.write(labels, 1)
    found = dict(sorted(zonal_stats([zone], path, categorical=True)[0].items()))
    by_mask = by_class(labels[geometry_mask([zone], labels.shape, transform, invert=True)])
    with rasterio.open(path) as file:
        masked = mask(file, [zone], nodata=255)[0]
    try:
        feature = {"type": "Feature", "properties": {}, "geometry": zone}
        exact = exact_extract(path, [feature], ["count"])[0]["properties"]["count"]
    except ValueError as error:
        exact = f"refused: {error}"
    print(f"{title}: rasterstats {found}, rasterio {by_mask}, pixels by exactextract {exact}")
    if not truth == by_mask == by_class(masked[masked < 255]):
        sys.exit(f"not seen any more: rasterio is not right about {title}")
    if (found == truth) != (title == "north up") or (exact == 480) != (title == "north up"):
        sys.exit(f"not seen any more: {title}")
EOF

#!/usr/bin/env bash
# Pillow gives the first bytes of a TIFF as pixels of the tiles and strips that a sparse one leaves out, without a word.
#
# Seen with pillow 13.0.0, tifffile 2026.3.3, rasterio 1.4.4 (GDAL 3.10.3). Of four tiles that are not compressed one is
# written, full of 3s. GDAL and tifffile give the values 3 and 0 (0, or the no-data value, is what is left out);
# Pillow gives 3, and 73, 73, 42, 0, 8, …: "II*" and the tags. The same with strips, and with no data of 255.
# Of compressed files it raises an error.
#
# Why it matters: GDAL writes such files on request (SPARSE_OK=TRUE), as do mosaics and rasterised labels that are
# mostly empty. A label mask of 150 classes read by Pillow, as most training code does, gets objects of class 73 and 42.
# Remedy: read GeoTIFFs by rasterio or tifffile, or write them again without SPARSE_OK.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tifffile==2026.3.3 pillow==13.0.0 \
    rasterio==1.4.4
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import numpy as np, rasterio, tifffile
from PIL import Image

print(*(f"{name} {version(name)}" for name in ("pillow", "tifffile", "rasterio")), "GDAL", rasterio.__gdal_version__)
path = sys.argv[1] + "/a.tif"
common = {"driver": "GTiff", "height": 512, "width": 512, "count": 1, "dtype": "uint8", "SPARSE_OK": True}
tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256}
for layout in (tiled, {"blockysize": 256}):
    for nodata in (None, 255):
        with rasterio.open(path, "w", nodata=nodata, **layout, **common) as file:
            file.write(np.full((256, 512), 3, np.uint8), 1, window=((0, 256), (0, 512)))
        with rasterio.open(path) as file:
            gdal = file.read(1)
        found, first = np.array(Image.open(path)), np.fromfile(path, np.uint8, 512)
        print("tiles" if "tiled" in layout else "strips", "no data", nodata, "| GDAL", np.unique(gdal), "| Pillow",
              np.unique(found)[:12], "… and row 256 begins", found[256, :8])
        if (tifffile.imread(path) != gdal).any() or (gdal[256:] != (nodata or 0)).any():
            sys.exit("another reader is wrong too")
        if (found[256, :256] != first[:256]).any():
            sys.exit("not seen any more: Pillow reads something else of what is left out")
EOF

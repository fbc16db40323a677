#!/usr/bin/env bash
# JPEG 2000 written by GDAL with REVERSIBLE=YES is lossy: 46 % of the labels come back as another class.
#
# Seen with rasterio 1.4.4 (GDAL 3.10.3, driver JP2OpenJPEG), pillow 13.0.0, imagecodecs 2026.3.6, numpy 2.4.6. Blocks of
# 8x8 pixels of 11 classes, 128x128 pixels, uint8 or uint16:
#   GDAL                               46 % of the pixels of another class, up to 2 off
#   GDAL, REVERSIBLE=YES               46 %, up to 2 off
#   GDAL, QUALITY=100                  46 %, 1 off: no odd class is left
#   GDAL, REVERSIBLE=YES, QUALITY=100  none
#   Pillow, imagecodecs                none, unasked
# "Reversible" names the wavelet; QUALITY, the share of the size to keep, is 25 where it is not given, and cuts the result
# all the same. The two settings that sound lossless are so only together. How much is lost depends on the map: of 256x256
# pixels of the same blocks 0.2 %, with REVERSIBLE=YES. Nothing warns, and the map looks right.
#
# Why it matters: label maps and masks are stored beside Sentinel-2's and Pléiades' scenes in their own format. Classes
# move by one or two, to ones that exist, so no check of the range finds it: it looks like noisy annotation.
# Remedy: REVERSIBLE=YES with QUALITY=100; or a GeoTIFF with DEFLATE; compare a written file with what went into it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 rasterio==1.4.4 pillow==13.0.0 \
    imagecodecs==2026.3.6
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import imagecodecs, numpy as np, PIL, rasterio
from PIL import Image

print("rasterio", rasterio.__version__, "GDAL", rasterio.__gdal_version__, "pillow", PIL.__version__, "imagecodecs",
      imagecodecs.__version__)
blocks = np.random.default_rng(0).integers(0, 11, (16, 16), np.uint8)
labels = blocks.repeat(8, 0).repeat(8, 1)
path = sys.argv[1] + "/labels.jp2"


def gdal(labels, **options):
    height, width = labels.shape
    with rasterio.open(path, "w", driver="JP2OpenJPEG", height=height, width=width, count=1, dtype=labels.dtype, **options) as file:
        file.write(labels, 1)


ways = {
    "GDAL": gdal,
    "GDAL, REVERSIBLE=YES": lambda labels: gdal(labels, REVERSIBLE="YES"),
    "GDAL, QUALITY=100": lambda labels: gdal(labels, QUALITY=100),
    "GDAL, REVERSIBLE=YES, QUALITY=100": lambda labels: gdal(labels, REVERSIBLE="YES", QUALITY=100),
    "Pillow": lambda labels: Image.fromarray(labels).save(path),
    "imagecodecs": lambda labels: open(path, "wb").write(imagecodecs.jpeg2k_encode(labels)),
}
for dtype in (np.uint8, np.uint16):
    for title, write in ways.items():
        write(labels.astype(dtype))
        with rasterio.open(path) as file:
            back = file.read(1)
        changed = (back != labels).mean()
        print(f"{dtype.__name__}: {title}: {changed:.0%} changed, up to {abs(back.astype(int) - labels).max()} off, classes",
              *np.unique(back))
        lossy = title.startswith("GDAL") and title != "GDAL, REVERSIBLE=YES, QUALITY=100"
        if (changed > 0.4) != lossy or (changed == 0) == lossy:
            sys.exit(f"not seen any more: {title}")
large = np.random.default_rng(0).integers(0, 11, (32, 32), np.uint8).repeat(8, 0).repeat(8, 1)
gdal(large, REVERSIBLE="YES")
with rasterio.open(path) as file:
    changed = (file.read(1) != large).mean()
print(f"256x256, GDAL, REVERSIBLE=YES: {changed:.2%} changed")
if not 0 < changed < 0.01:
    sys.exit("not seen any more: 256x256")
EOF

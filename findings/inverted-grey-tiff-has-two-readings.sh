#!/usr/bin/env bash
# A grey TIFF whose 0 is white (MINISWHITE) is read inverted or not, depending on the library and on the bit depth.
#
# Seen with tifffile 2026.3.3, pillow 13.0.0, opencv-python-headless 5.0.0.93, rasterio 1.4.4, scikit-image 0.26.0. The
# stored value 40 (of 255), and 8000 of 16 bits:
#                                    8 bits    1 bit      16 bits
#   Pillow, OpenCV                   215       inverted   8000: not inverted
#   tifffile, scikit-image, GDAL     40        as stored  8000
# GDAL says MINISWHITE=YES in a metadata domain that few ask for; nobody warns.
#
# Why it matters: scanners, fax and X-ray software write such files. A document network trained through Pillow sees
# negatives when deployment reads by tifffile or GDAL (in tiles, as large scans are), and 16-bit X-rays are negatives of
# 8-bit ones of the same machine. Label masks of one bit swap object and background.
# Remedy: read the photometric tag oneself and invert unsigned values in one place, for every reader and every depth.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tifffile==2026.3.3 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 rasterio==1.4.4 scikit-image==0.26.0
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import cv2, numpy as np, rasterio, skimage.io, tifffile
from PIL import Image

print(*(f"{name} {version(name)}" for name in
        ("tifffile", "pillow", "opencv-python-headless", "rasterio", "scikit-image")))
path = sys.argv[1] + "/scan.tif"
eight = np.tile(np.uint8([40, 200]), (16, 8))
kinds = {"8 bits": eight, "1 bit": eight > 100, "16 bits": eight.astype(np.uint16) * 200}
inverted = {}
for kind, stored in kinds.items():
    tifffile.imwrite(path, stored, photometric="miniswhite")
    with rasterio.open(path) as source:
        gdal, tag = source.read(1), source.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE")
    found = {
        "Pillow": np.array(Image.open(path)),
        "OpenCV": cv2.imread(path, cv2.IMREAD_UNCHANGED),
        "tifffile": tifffile.imread(path),
        "scikit-image": skimage.io.imread(path),
        "GDAL": gdal,
    }
    for who, read in found.items():
        inverted[kind, who] = bool(read[0, 0] > read[0, 1])
    print(f"{kind}: stored {stored[0, :2].tolist()}, GDAL's tag {tag};",
          ", ".join(f"{who} {read[0, :2].tolist()}" for who, read in found.items()))
expected = {(kind, who): who in ("Pillow", "OpenCV") and kind != "16 bits" for kind, who in inverted}
if inverted != expected:
    sys.exit("not seen any more: the readers agree about MINISWHITE, or part in another way")
EOF

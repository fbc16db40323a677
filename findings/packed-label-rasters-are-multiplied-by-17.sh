#!/usr/bin/env bash
# Label maps that GDAL packs into 4 or 2 bits come back times 17 or 85 from Pillow, OpenCV and scikit-image.
#
# Seen with rasterio 1.4.4, pillow 13.0.0, opencv-python-headless 5.0.0.93, scikit-image 0.26.0, tifffile 2026.3.3.
# GDAL's NBITS=4 stores 11 classes in half the bytes; what was stored as 0 1 2 3 is read as
#            PNG, 4 bits     TIFF, 4 bits    PNG, 2 bits      TIFF, 12 bits (480 540 600)
#   GDAL     0 1 2 3         0 1 2 3         0 1 2 3          480 540 600
#   tifffile -               0 1 2 3         -                480 540 600
#   Pillow   0 17 34 51      0 17 34 51      0 85 170 255     480 540 600
#   OpenCV   0 17 34 51      refused         0 85 170 255     7680 8640 9600: times 16
# All report 8 (16) bits and nothing of a factor. For pictures it is right: full white stays full white. For classes and
# for measured values it is not, and nothing in the array tells which of the two was meant.
#
# Why it matters: GIS tools write and read such rasters as class numbers, training code reads them by Pillow or OpenCV.
# With two bits, class 3 becomes 255, which everybody ignores: the class vanishes from loss and mIoU. 12-bit satellite
# scenes are 16 times brighter in OpenCV than in everything that made the normalisation.
# Remedy: for labels look at the file's own bit depth (Pillow tells it in the PNG header or the BitsPerSample tag) and
# divide by 255 / (2^bits - 1), or read labels by GDAL.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 rasterio==1.4.4 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 scikit-image==0.26.0 tifffile==2026.3.3 imagecodecs==2026.3.6
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import cv2, numpy as np, rasterio, skimage.io, tifffile
from PIL import Image

print(*(f"{name} {version(name)}" for name in
        ("rasterio", "pillow", "opencv-python-headless", "scikit-image", "tifffile")))
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def factors(driver, bits, stored):
    path = f"{sys.argv[1]}/labels-{bits}.{'png' if driver == 'PNG' else 'tif'}"
    with rasterio.open(path, "w", driver=driver, height=stored.shape[0], width=stored.shape[1], count=1,
                       dtype=stored.dtype, nbits=bits) as target:
        target.write(stored, 1)
    with rasterio.open(path) as source:
        found = {"GDAL": source.read(1)}
    found["Pillow"] = np.array(Image.open(path))
    found["OpenCV"] = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    if driver == "PNG":
        found["scikit-image"] = skimage.io.imread(path)
    else:
        found["tifffile"] = tifffile.imread(path)
    result = {}
    for who, read in found.items():
        whole = None if read is None else read.astype(int)
        result[who] = None if whole is None else int(whole.max()) / int(stored.max())
        print(f"{driver} {bits} bits, stored {stored[0, :4].tolist()}: {who} "
              f"{'refuses' if whole is None else whole[0, :4].tolist()}")
    return result


labels = (np.arange(64).reshape(8, 8) % 11).astype(np.uint8)
seen = factors("PNG", 4, labels) == {"GDAL": 1, "Pillow": 17, "OpenCV": 17, "scikit-image": 17}
seen &= factors("PNG", 2, labels % 4) == {"GDAL": 1, "Pillow": 85, "OpenCV": 85, "scikit-image": 85}
seen &= factors("GTiff", 4, labels) == {"GDAL": 1, "Pillow": 17, "OpenCV": None, "tifffile": 1}
seen &= factors("GTiff", 12, np.arange(480, 480 + 60 * 48, 60).reshape(6, 8).astype(np.uint16)) == {
    "GDAL": 1, "Pillow": 1, "OpenCV": 16, "tifffile": 1}
if not seen:
    sys.exit("not seen any more: packed rasters are read with other factors")
EOF

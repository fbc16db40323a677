#!/usr/bin/env bash
# Pillow reads a big-endian TIFF of int16, int32 or float32 with its bytes swapped, once it is compressed, without a word.
#
# Seen with pillow 13.0.0 (libtiff 4.7.2), tifffile 2026.3.3, rasterio 1.4.4, opencv-python-headless 5.0.0.93. The value 1:
#                              int16        int32          float32      uint16
#   stored plain, big-endian   1            1              1.0          1
#   compressed, big-endian     256          16777216       4.6e-41      1
#   compressed, little-endian  1            1              1.0          1
# tifffile, GDAL and OpenCV (where it reads the type) give 1 everywhere.
#
# Why it matters: programs on big-endian machines write such files, and GDAL (ENDIANNESS=BIG) and tifffile (byteorder=">")
# on request. Label masks with -9999 for no data get classes 256, 512, …; floats become so small that they look like zeros.
# Remedy: read TIFFs of more than 8 bits by tifffile or GDAL, or write them little-endian.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tifffile==2026.3.3 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 rasterio==1.4.4
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import cv2, numpy as np, rasterio, tifffile
from PIL import Image, features

print(*(f"{name} {version(name)}" for name in ("pillow", "tifffile", "rasterio", "opencv-python-headless")),
      "libtiff in Pillow", features.version("libtiff"))
path = sys.argv[1] + "/a.tif"
swapped = set()
for dtype in ("int16", "int32", "float32", "uint16"):
    for order in "<>":
        for compression in (None, "zlib"):
            stored = np.full((16, 16), 1, dtype)
            tifffile.imwrite(path, stored, byteorder=order, compression=compression)
            with rasterio.open(path) as source:
                others = [source.read(1), tifffile.imread(path)]
            if (read := cv2.imread(path, cv2.IMREAD_UNCHANGED)) is not None:
                others.append(read)
            found = np.array(Image.open(path))
            print(f"{dtype} {order} {compression or 'plain'}: Pillow {found[0, 0]:g}, others",
                  sorted({float(each[0, 0]) for each in others}))
            if any((each != stored).any() for each in others):
                sys.exit("another reader is wrong too")
            if (found != stored).any():
                if found.astype(dtype).byteswap()[0, 0] != 1:
                    sys.exit("Pillow is wrong in another way")
                swapped.add((dtype, order, compression))
if swapped != {(dtype, ">", "zlib") for dtype in ("int16", "int32", "float32")}:
    sys.exit("not seen any more: Pillow reads big-endian compressed TIFFs, or swaps others")
EOF

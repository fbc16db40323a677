#!/usr/bin/env bash
# A no-data value of -2**63 (int64's own least) that rasterio writes into a GeoTIFF is read back as -9; -10**17 as -1.
#
# Seen with rasterio 1.4.4 (GDAL 3.10.3), numpy 2.4.6, tifffile 2026.3.3:
#   given                    in the file's tag         read back    masked pixels
#   -9223372036854775808     -9.2233720368547758e+18   -9           those of -9, and none of those without data
#   -100000000000000000      -1e+17                    -1           those of -1, likewise
#   -1000000000000000        -1000000000000000         the same     right
# rasterio gives the number to GDAL as a double, which writes it with an exponent, and of an int64 band reads the
# digits before the point alone. There is neither an error nor a warning.
#
# Why it matters: the least value of the type is a usual choice (pandas.NaT is it),
# and -1 and -9 are usual ids and classes ("unlabelled"), which then vanish while the margin counts as data.
# Remedy: a value within ±10**15, such as -9999, or a mask (write_mask).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tifffile==2026.3.3 rasterio==1.4.4
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import logging, sys
from importlib.metadata import version
import numpy as np, rasterio, tifffile

logging.getLogger("tifffile").disabled = True  # it names tags that are no numbers of the type
print(*(f"{name} {version(name)}" for name in ("rasterio", "numpy", "tifffile")), "GDAL", rasterio.__gdal_version__)
path = sys.argv[1] + "/a.tif"
wrong = {}
for given in (-(2**63), -(10**17), -(10**15), -9999):
    pixels = np.array([[given, given, -9, -1, 0, 5]], np.int64)
    with rasterio.open(path, "w", driver="GTiff", height=1, width=6, count=1, dtype="int64", nodata=given) as file:
        file.write(pixels, 1)
    with tifffile.TiffFile(path) as file:
        tag = file.pages[0].tags.valueof(42113)
    with rasterio.open(path) as file:
        read, masked = file.nodata, pixels[0, file.read_masks(1)[0] == 0].tolist()
        if (file.read(1) != pixels).any():
            sys.exit("the pixels themselves differ")
    print(f"given {given}, tag {tag}, read back {read:.0f}, masked pixels {masked}")
    if masked != [given, given]:
        wrong[given] = masked
if wrong != {-(2**63): [-9], -(10**17): [-1]}:
    sys.exit("not seen any more: no-data values of int64 come back otherwise")
EOF

#!/usr/bin/env bash
# An uncompressed grey TIFF that is stored sideways (Orientation 5 to 8) is garbled when Pillow opens it by its name.
#
# Seen with pillow 13.0.0. Such a file of 30×40 pixels, Orientation 6, read by numpy.asarray(Image.open(…)):
#                              by its name                     from an open file
#   grey, not compressed       30×40, no pixel in its place    40×30, upright
#   grey, deflate              40×30, upright                  40×30, upright
# Pillow exchanges width and height when it reads the tags, and maps a file that is not compressed into memory with that
# exchanged size; what it turns afterwards is in rows of the wrong length. Nothing is said. Square images are right by chance.
#
# Why it matters: scanners and phones write Orientation 6 and 8. A label mask or a grey image of 8 or 16 bits becomes
# noise that trains or is labelled without a word, and a test with compressed files does not show it.
# Remedy: give Image.open a file that is open (then nothing is mapped), or read TIFFs by tifffile and turn them oneself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 tifffile==2026.3.3 pillow==13.0.0 \
    imagecodecs==2026.3.6
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
from importlib.metadata import version
import numpy as np, tifffile
from PIL import Image

print("pillow", version("pillow"))
name = f"{sys.argv[1]}/a.tif"
seen = []
stored = np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint8)
upright = np.rot90(stored, -1)
for compression in (None, "zlib"):
    tifffile.imwrite(name, stored, compression=compression, extratags=[(274, "H", 1, 6, True)])
    with open(name, "rb") as file:
        ways = {"by name": np.asarray(Image.open(name)), "open file": np.asarray(Image.open(file))}
    for way, found in ways.items():
        print(f"stored {stored.shape}, {compression or 'none':5} {way:10} {found.shape}", np.array_equal(found, upright))
        seen.append((compression, way, np.array_equal(found, upright), found.shape))
wrong = [each for each in seen if not each[2]]
if wrong != [(None, "by name", False, (30, 40))]:
    sys.exit("Pillow reads them right now, or fails elsewhere: look again")
EOF

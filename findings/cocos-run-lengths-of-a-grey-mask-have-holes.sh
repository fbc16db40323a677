#!/usr/bin/env bash
# pycocotools encodes a mask of 254 beside 255 as a hole, and of a label map every other class, without an error.
#
# Seen with pycocotools 2.0.11, numpy 2.4.6. mask.encode starts a new run wherever a value differs from the one before it,
# and calls every second run foreground; it never asks whether a value is 0. Encoded and decoded again:
#   0 255 255 255 255 0     0 1 1 1 1 0    right
#   0 255 254 254 255 0     0 1 0 0 1 0    a hole
#   0 1 2 3                 0 1 0 1        class 2 is background
#   0 2 2 0                 0 1 1 0        right
# Runs go on from column to column, and so does the mistake. A disc whose edge is smoothed, as a resize, a JPEG or a
# drawing tool leaves it, comes back with the background as foreground in stripes: an IoU of 0.40 with itself, at nearly
# the right area. iou(), area() and COCOeval believe it. (bool, and 0 beside one other value, are right.)
#
# Why it matters: masks of 0 and 255 are what tools write, and encode() is right about them until one goes through a
# resize with antialiasing or a lossy file. AP drops, and looks like a worse network.
# Remedy: encode(np.asfortranarray(mask > 127)), or mask == class; never encode an array of more than two values.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 pycocotools==2.0.11 pillow==13.0.0
"$work/venv/bin/python" - <<'EOF'
import sys
from importlib.metadata import version
import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco

print("pycocotools", version("pycocotools"), "numpy", np.__version__)


def again(mask):
    return coco.decode(coco.encode(np.asfortranarray(mask)))


for values, expected in (([0, 255, 255, 255, 255, 0], [0, 1, 1, 1, 1, 0]), ([0, 255, 254, 254, 255, 0], [0, 1, 0, 0, 1, 0]),
                         ([0, 1, 2, 3], [0, 1, 0, 1]), ([0, 2, 2, 0], [0, 1, 1, 0])):
    row = np.array([values], np.uint8)
    found = again(row)[0].tolist()
    print(*values, "→", *found)
    if found != expected:
        sys.exit(f"not seen any more: {values} was {expected}")
    if not np.array_equal(again(row > 0), row > 0):
        sys.exit("not seen any more: the remedy does not help")

disc = Image.new("L", (400, 400))
ImageDraw.Draw(disc).ellipse((40, 40, 360, 360), fill=255)
smooth = np.asarray(disc.resize((100, 100), Image.Resampling.BILINEAR))
wrong, right = again(smooth), again(smooth > 127)
iou = coco.iou([coco.encode(np.asfortranarray(smooth))], [coco.encode(np.asfortranarray(smooth > 0))], [0])[0, 0]
print(f"a smoothed disc: {wrong.sum()} pixels; where it is not 0: {(smooth > 0).sum()}; above 127: {right.sum()}; "
      f"IoU with what is not 0: {iou:.3f}; foreground where the mask is 0: {wrong[smooth == 0].sum()}")
if iou > 0.5 or wrong[smooth == 0].sum() < 1000 or not np.array_equal(right, smooth > 127):
    sys.exit("not seen any more: the smoothed disc")
EOF

#!/usr/bin/env bash
# A lossless PNG optimiser renumbers the classes of a label map.
#
# Seen with pyoxipng 9.1.1 at its default level, read by pillow 13.0.0 and rasterio 1.4.4. oxipng keeps what a viewer
# shows, not what is stored:
#   11 classes as 8-bit grey         becomes a palette of greys in another order: 91 % of the pixels that Pillow and GDAL
#                                    read are of another class
#   11 classes, a palette of colours the palette is sorted anew: 80 %
#   two classes of one colour        become one class
#   0 and 255 as 8-bit grey          become 1 bit: False and True, 0 and 1
# All of them look the same in every viewer, and OpenCV, which paints palettes, still reads the right greys.
#
# Why it matters: files of a data set, or labels made by a deployed network, pass through asset pipelines, hooks and web
# servers that run such optimisers. The values stay plausible class numbers, so that training, mIoU and maps go wrong
# without an error.
# Remedy: a grey palette whose entry i is not i has been through an optimiser: read its greys. With a coloured palette
# look the colours up in the class list, and never trust the index alone.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 pillow==13.0.0 pyoxipng==9.1.1 \
    rasterio==1.4.4 opencv-python-headless==5.0.0.93
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
from importlib.metadata import version
import cv2, numpy as np, oxipng, rasterio
from PIL import Image

print(*(f"{name} {version(name)}" for name in ("pyoxipng", "pillow", "rasterio", "opencv-python-headless")))
random = np.random.default_rng(0)
classes = np.kron(random.integers(0, 11, (12, 16)), np.ones((20, 20), int)).astype(np.uint8)
colours = random.integers(0, 256, (11, 3)).astype(np.uint8)
path, smaller = sys.argv[1] + "/labels.png", sys.argv[1] + "/optimised.png"


def try_it(title, labels, palette=None):
    picture = Image.fromarray(labels)
    if palette is not None:
        picture.putpalette(palette.ravel().tolist())
    picture.save(path)
    if not np.array_equal(np.array(Image.open(path)), labels):
        sys.exit("not seen any more: Pillow does not give back what it wrote")
    oxipng.optimize(path, smaller)
    after = Image.open(smaller)
    pillow = np.array(after)
    with rasterio.open(smaller) as source:
        gdal = source.read(1)
    shown = np.array_equal(np.array(after.convert("RGB")), np.array(picture.convert("RGB")))
    opencv = cv2.imread(smaller, cv2.IMREAD_GRAYSCALE)
    print(f"{title}: mode {picture.mode} -> {after.mode}, looks the same: {shown}; pixels of another value: "
          f"Pillow {np.mean(pillow != labels):.1%}, GDAL {np.mean(gdal != labels):.1%}, "
          f"OpenCV {np.mean(opencv != labels):.1%}; values {len(np.unique(labels))} -> {len(np.unique(pillow))}")
    return shown and np.mean(pillow != labels) > 0 and np.mean(gdal != labels) > 0, after, pillow


seen, after, indices = try_it("11 classes, grey", classes)
greys = np.array(after.getpalette()).reshape(-1, 3)[:, 0]
repaired = np.array_equal(greys[indices], classes)
print("read through its palette of greys:", "equal" if repaired else "not equal")
seen &= repaired
seen &= try_it("11 classes, coloured palette", classes, colours)[0]
seen &= try_it("11 classes, two of one colour", classes, np.r_[colours[:10], colours[:1]])[0]
seen &= try_it("classes 0 and 255, grey", (classes % 2 * 255).astype(np.uint8))[0]
if not seen:
    sys.exit("not seen any more: oxipng keeps the stored values of label maps")
EOF

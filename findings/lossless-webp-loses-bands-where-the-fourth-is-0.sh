#!/usr/bin/env bash
# Lossless WebP is not lossless for four bands: where the fourth is 0 the other three are replaced.
#
# Seen with pillow 13.0.0, imageio 2.38.1, opencv-python-headless 5.0.0.93, rasterio 1.4.4 (GDAL's WEBP driver),
# imagecodecs 2026.3.6. 64x64 pixels of random values, the fourth band 0 in the upper half:
#   Pillow lossless=True, imageio the same, OpenCV quality 101, GDAL LOSSLESS=YES     38 % of all values changed
#   Pillow with exact=True, imagecodecs, GeoTIFF with WEBP_LOSSLESS, PNG              none
# The fourth band is alpha to WebP, and what is transparent may be any colour unless the encoder is told "exact".
#
# Why it matters: four bands are red, green, blue and near infrared, which is 0 over water; or a picture with its no-data
# mask, or labels and instance numbers packed into RGBA. "Lossless" stops one from looking: the network sees invented
# values exactly in one class, and a test image without zeros in the fourth band passes.
# Remedy: exact=True in Pillow and imageio; otherwise PNG or GeoTIFF. Files already written cannot be repaired.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 pillow==13.0.0 \
    opencv-python-headless==5.0.0.93 imageio==2.38.1 rasterio==1.4.4 imagecodecs==2026.3.6
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import cv2, imagecodecs, imageio.v3 as imageio, numpy as np, PIL, rasterio
from PIL import Image

print("pillow", PIL.__version__, "opencv", cv2.__version__, "imagecodecs", imagecodecs.__version__, "rasterio",
      rasterio.__version__, "GDAL", rasterio.__gdal_version__)
image = np.random.default_rng(0).integers(1, 256, (64, 64, 4), np.uint8)
image[:32, :, 3] = 0


def pillow(path, **options):
    Image.fromarray(image).save(path, **options)


def gdal(path, **options):
    with rasterio.open(path, "w", height=64, width=64, count=4, dtype="uint8", **options) as target:
        target.write(image.transpose(2, 0, 1))


ways = {
    "Pillow": (".webp", lambda path: pillow(path, lossless=True), True),
    "imageio": (".webp", lambda path: imageio.imwrite(path, image, lossless=True), True),
    "OpenCV": (".webp", lambda path: cv2.imwrite(path, image[..., [2, 1, 0, 3]], [cv2.IMWRITE_WEBP_QUALITY, 101]), True),
    "GDAL": (".webp", lambda path: gdal(path, driver="WEBP", LOSSLESS="YES"), True),
    "Pillow, exact": (".webp", lambda path: pillow(path, lossless=True, exact=True), False),
    "imagecodecs": (".webp", lambda path: open(path, "wb").write(imagecodecs.webp_encode(image, lossless=True)), False),
    "GeoTIFF": (".tif", lambda path: gdal(path, driver="GTiff", compress="WEBP", WEBP_LOSSLESS=True, interleave="pixel"),
                False),
    "PNG": (".png", pillow, False),
}
for title, (suffix, write, lossy) in ways.items():
    path = sys.argv[1] + "/image" + suffix
    write(path)
    with rasterio.open(path) as source:
        back = source.read().transpose(1, 2, 0)
    changed = back != image
    print(f"{title}: {changed.mean():.0%} of the values changed, {changed[32:].mean():.0%} where the fourth band is not 0")
    if (changed.mean() > 0.3) != lossy or changed[32:].any() or changed[..., 3].any():
        sys.exit(f"not seen any more: {title}")
EOF

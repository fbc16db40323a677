#!/usr/bin/env bash
# A mask that goes into COCO as the polygon of cv2.findContours comes back one row and one column smaller, every time.
#
# Seen with opencv-python-headless 5.0.0.93, supervision 0.31.2, pycocotools 2.0.11, rasterio 1.4.4, scikit-image 0.26.0,
# pillow 13.0.0. OpenCV's contour runs through the middle of the outermost pixels; COCO, rasterio and GeoJSON measure from
# the corners of pixels. A square of 10x10 pixels, as a polygon and back:
#   findContours or supervision.mask_to_polygons, then pycocotools      9x9: IoU 0.81, and 25 of 100 after five round trips
#   the same, then rasterio.rasterize; its area in shapely              81
#   the same, then cv2.fillPoly, Pillow or skimage.draw                 100
#   rasterio.features.shapes, then pycocotools                          100
#   that polygon (0..10), by cv2.fillPoly, Pillow or skimage.draw       121
# A line one pixel wide is nothing afterwards. Nobody warns, since every polygon is valid.
#
# Why it matters: it is how converters, labelling tools and pre-annotation by a network make COCO files. Thin classes go
# first; objects move half a pixel up and to the left, on average; a network trained on these is judged against masks
# that are not (an IoU of 0.81 fails the stricter half of COCO's thresholds), and each round of correction shrinks again.
# Remedy: write RLE, which is exact; or polygons along the edges of pixels (rasterio.features.shapes), filled by
# pycocotools or rasterio and never by OpenCV.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 opencv-python-headless==5.0.0.93 \
    pycocotools==2.0.11 rasterio==1.4.4 shapely==2.2.0 supervision==0.31.2 scikit-image==0.26.0 pillow==13.0.0
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import cv2, numpy as np, PIL, rasterio, skimage, supervision
from PIL import Image, ImageDraw
from pycocotools import mask as coco
from rasterio.features import rasterize, shapes
from shapely.geometry import Polygon
from skimage.draw import polygon2mask

print("opencv", cv2.__version__, "supervision", supervision.__version__, "rasterio", rasterio.__version__, "skimage",
      skimage.__version__, "pillow", PIL.__version__)
square = np.zeros((20, 20), np.uint8)
square[3:13, 4:14] = 1


def by_contour(mask):
    return cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)[0][0].reshape(-1, 2)


def by_edges(mask):
    return np.array(next(shapes(mask, mask=mask > 0))[0]["coordinates"][0][:-1])


def from_coco(polygon):
    return coco.decode(coco.merge(coco.frPyObjects([polygon.astype(float).ravel().tolist()], 20, 20)))


def from_pillow(polygon):
    image = Image.new("L", (20, 20))
    ImageDraw.Draw(image).polygon([tuple(map(int, point)) for point in polygon], fill=1, outline=1)
    return np.array(image)


fills = {"pycocotools": from_coco, "rasterio": lambda polygon: rasterize([(Polygon(polygon), 1)], (20, 20)),
         "OpenCV": lambda polygon: cv2.fillPoly(np.zeros((20, 20), np.uint8), [polygon.astype(np.int32)], 1),
         "Pillow": from_pillow, "skimage": lambda polygon: polygon2mask((20, 20), polygon[:, ::-1])}
seen = {}
for way in (by_contour, lambda mask: supervision.mask_to_polygons(mask.astype(bool))[0], by_edges):
    polygon = way(square)
    pixels = {name: int(fill(polygon).sum()) for name, fill in fills.items()}
    title = ("cv2.findContours", "supervision", "rasterio.shapes")[len(seen)]
    seen[title] = [*pixels.values(), int(Polygon(polygon).area)]
    print(f"{title}: of 100 pixels {pixels}, area in shapely {Polygon(polygon).area:g}")
mask, trips = square, []
for _ in range(5):
    mask = from_coco(by_contour(mask))
    trips.append(int(mask.sum()))
line = np.zeros_like(square)
line[5, 2:18] = 1
print("five round trips by pycocotools:", trips, "; a line of 16 pixels:", int(from_coco(by_contour(line).repeat(2, 0)).sum()))
contour, edges = [81, 81, 100, 100, 100, 81], [100, 100, 121, 121, 121, 100]
if seen != {"cv2.findContours": contour, "supervision": contour, "rasterio.shapes": edges} or trips != [81, 64, 49, 36, 25]:
    sys.exit("not seen any more: other areas")
if from_coco(by_contour(line).repeat(2, 0)).any():
    sys.exit("not seen any more: a line survives")
EOF

#!/usr/bin/env bash
# A mask that albumentations resizes together with its picture ends up half an output pixel beside it, because "nearest"
# is another pixel in OpenCV than in Pillow and scikit-image.
#
# Seen with albumentations 2.0.8, opencv-python-headless 5.0.0.93, pillow 13.0.0, scikit-image 0.26.0.
# albumentations.Resize from 256 to 64 columns, picture and mask both holding the number of their column:
#   picture (linear)    column i shows 4i + 2, the middle of the four pixels
#   mask                column i shows 4i, the first of them: 2 pixels of the original to the left (and upwards)
# OpenCV's INTER_NEAREST is the cause, and its INTER_NEAREST_EXACT the cure; Pillow and scikit-image take the middle.
# Diagonal stripes 8 pixels wide, reduced by one way and the other, agree in an IoU of 0.33 only.
#
# Why it matters: a network trained on such pairs learns labels half a pixel off, and labels of a deployed network (which
# are aligned with the picture) are then blamed: boundary pixels count as errors, and thin classes lose most.
# Remedy: mask_interpolation=cv2.INTER_NEAREST_EXACT, or Pillow; compare predictions at the picture's own size.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 albumentations==2.0.8 albucore==0.0.24 \
    opencv-python-headless==5.0.0.93 pillow==13.0.0 scikit-image==0.26.0
NO_ALBUMENTATIONS_UPDATE=1 "$work/venv/bin/python" -W ignore - <<'EOF'
import sys
from importlib.metadata import version
import albumentations, cv2, numpy as np
from PIL import Image
from skimage.transform import resize

print(*(f"{name} {version(name)}" for name in
        ("albumentations", "opencv-python-headless", "pillow", "scikit-image")))
columns = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
picture = np.repeat(columns[..., None], 3, 2)


def by_albumentations(labels, **options):
    return albumentations.Resize(64, 64, **options)(image=np.repeat(labels[..., None], 3, 2), mask=labels)["mask"]


ways = {
    "albumentations": by_albumentations,
    "albumentations, INTER_NEAREST_EXACT": lambda m: by_albumentations(m, mask_interpolation=cv2.INTER_NEAREST_EXACT),
    "OpenCV INTER_NEAREST": lambda m: cv2.resize(m, (64, 64), interpolation=cv2.INTER_NEAREST),
    "OpenCV INTER_NEAREST_EXACT": lambda m: cv2.resize(m, (64, 64), interpolation=cv2.INTER_NEAREST_EXACT),
    "Pillow NEAREST": lambda m: np.array(Image.fromarray(m).resize((64, 64), Image.Resampling.NEAREST)),
    "scikit-image order 0": lambda m: resize(m, (64, 64), order=0, preserve_range=True).astype(m.dtype),
}
seen = albumentations.Resize(64, 64)(image=picture, mask=columns)["image"][0, :, 0].astype(float)
print("the picture, linear: columns 1 to 3 show", seen[1:4])
stripes = (np.add.outer(np.arange(256), np.arange(256)) // 8 % 3 == 0).astype(np.uint8)
middle = ways["Pillow NEAREST"](stripes)
shift = {}
for title, way in ways.items():
    read = way(columns)[0].astype(float)
    shift[title] = float(np.mean((read - seen)[2:-2]))
    mask = way(stripes)
    iou = np.sum((mask & middle) > 0) / np.sum((mask | middle) > 0)
    print(f"{title:36} columns 1 to 3 show {read[1:4]}, {shift[title]:+.2f} from the picture; "
          f"IoU of stripes with Pillow's {iou:.2f}")
corner = [shift[title] for title in ("albumentations", "OpenCV INTER_NEAREST")]
centre = [value for title, value in shift.items() if title not in ("albumentations", "OpenCV INTER_NEAREST")]
if max(corner) > -1.4 or max(abs(value) for value in centre) > 0.6:
    sys.exit("not seen any more: these libraries take the same pixel for nearest")
EOF

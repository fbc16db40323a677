#!/usr/bin/env bash
# OpenCV takes arrays of int64 and uint64, and keeps the lower 32 bits of every number: 2^32 is 0, and background.
#
# Seen with opencv-python-headless 5.0.0.93, numpy 2.4.6. Ids of objects as 2^32 + 5, 2^32, 2^40 + 7 and 3, int64:
#   flip, rotate, transpose, resize (nearest), copyMakeBorder, merge, warpAffine, remap    5, 0, 7, 3 as int32
#   countNonZero                                                                           2^32 is not counted
#   compare(ids, ids of another object that ends in the same 32 bits)                      equal
#   3000000000                                                                             -1294967296
# The arrays that come back are int32, without an error or a warning.
#
# Why it matters: int64 is NumPy's integer, so nobody looks at the type. Small labels survive. Ids with a class, a tile or
# an image in their upper half, 64-bit ids of connectomes and hashes do not: objects of different tiles become one, each
# first object of a tile (number 0) becomes background, and no value is out of range.
# Remedy: number the ids from 0 first (numpy.unique, return_inverse) and give OpenCV int32; or np.flip, np.rot90, np.pad.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 opencv-python-headless==5.0.0.93
"$work/venv/bin/python" - <<'EOF'
import sys
import cv2, numpy as np

print("opencv", cv2.__version__, "numpy", np.__version__)
identity = np.float32([[1, 0, 0], [0, 1, 0]])
x, y = np.meshgrid(np.arange(4, dtype=np.float32), np.arange(4, dtype=np.float32))
ways = {
    "flip": lambda ids: cv2.flip(ids, 0), "rotate": lambda ids: cv2.rotate(ids, cv2.ROTATE_180)[:, ::-1],
    "transpose": lambda ids: cv2.transpose(ids).T,
    "resize": lambda ids: cv2.resize(ids, (8, 8), interpolation=cv2.INTER_NEAREST)[:, ::2],
    "copyMakeBorder": lambda ids: cv2.copyMakeBorder(ids, 0, 2, 0, 0, cv2.BORDER_REPLICATE),
    "merge": lambda ids: cv2.merge([ids, ids])[..., 1],
    "warpAffine": lambda ids: cv2.warpAffine(ids, identity, (4, 4), flags=cv2.INTER_NEAREST),
    "remap": lambda ids: cv2.remap(ids, x, y, cv2.INTER_NEAREST),
}
for dtype in (np.int64, np.uint64):
    ids = np.array([[2**32 + 5, 2**32, 2**40 + 7, 3]], dtype).repeat(4, 0)
    for title, way in ways.items():
        found = way(ids)
        print(dtype.__name__, title, found.dtype, *found[0])
        if found.dtype != np.int32 or found[0].tolist() != [5, 0, 7, 3]:
            sys.exit(f"not seen any more: {title} of {dtype.__name__}")
    counted, other = cv2.countNonZero(ids), np.array([[5, 2**33, 7 + 2**50, 3]], dtype).repeat(4, 0)
    equal = cv2.compare(ids, other, cv2.CMP_EQ)
    print(dtype.__name__, "countNonZero", counted, "of", ids.size, "; equal to", *other[0], ":", *equal[0])
    if counted != 12 or not equal.all():
        sys.exit(f"not seen any more: countNonZero or compare of {dtype.__name__}")
large = cv2.flip(np.full((2, 2), 3_000_000_000), 0)[0, 0]
print("3000000000 →", large)
if large != -1294967296:
    sys.exit("not seen any more: 3000000000")
names, small = np.unique(ids, return_inverse=True)
if not np.array_equal(names[ways["flip"](small.reshape(ids.shape).astype(np.int32))], ids):
    sys.exit("not seen any more: the remedy does not help")
EOF

#!/usr/bin/env bash
# One prediction, one ground truth: their Hausdorff distance is 5, 14 or 15, and 5 does not see a hole in the object.
#
# Seen with medpy 0.5.2, surface-distance 0.1, SimpleITK 2.5.7, scikit-image 0.26.0, numpy 2.4.6. A square of 40x40
# pixels against the same with a hole of 10x10 in it, and against the same with a bar of 4x10 pixels on it:
#                                            hole     bar                  hole     bar
#   medpy hd                                 14       10         hd95      14       3
#   surface-distance, robust 100             15       10         robust 95 15       7
#   SimpleITK HausdorffDistanceImageFilter   5        10
#   scikit-image hausdorff_distance          5        10
#   means: medpy assd                        1.59     0.41
#          SimpleITK GetAverageHausdorffDistance  0.07  0.07
# SimpleITK and scikit-image take all pixels of the objects, so a pixel of one that lies inside the other is at distance
# 0, and of a hole only its half width counts; medpy and surface-distance take surfaces, in pixels and on the grid between
# pixels. "95 %" is of both directions in one pool in medpy, and the larger of two percentiles in surface-distance.
#
# Why it matters: a limit ("HD95 below 4 mm") passes or fails by the library, and so does a comparison with a paper that
# names none. A network that leaves holes is three times better by SimpleITK, and 23 times by its mean.
# Remedy: name the library and the version beside the number, and never compare numbers of two.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 medpy==0.5.2 surface-distance==0.1 \
    SimpleITK==2.5.7 scikit-image==0.26.0
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys
from importlib.metadata import version
import numpy as np, SimpleITK, surface_distance
from medpy.metric.binary import assd, hd, hd95
from skimage.metrics import hausdorff_distance

print(*(f"{name} {version(name)}" for name in ("medpy", "surface-distance", "SimpleITK", "scikit-image")))
square = np.zeros((64, 64), bool)
square[10:50, 10:50] = True
hole, bar = square.copy(), square.copy()
hole[25:35, 25:35] = False
bar[28:32, 50:60] = True
expected = {"hole": [14, 14, 1.59, 15, 15, 5, 0.07, 5], "bar": [10, 3, 0.41, 10, 7, 10, 0.07, 10]}
for title, other in (("hole", hole), ("bar", bar)):
    itk = SimpleITK.HausdorffDistanceImageFilter()
    itk.Execute(*(SimpleITK.GetImageFromArray(mask.astype(np.uint8)) for mask in (square, other)))
    surfaces = surface_distance.compute_surface_distances(square, other, (1, 1))
    robust = [surface_distance.compute_robust_hausdorff(surfaces, percent) for percent in (100, 95)]
    found = [hd(square, other), hd95(square, other), assd(square, other), *robust, itk.GetHausdorffDistance(),
             itk.GetAverageHausdorffDistance(), hausdorff_distance(square, other)]
    print(f"{title}: medpy hd {found[0]:g}, hd95 {found[1]:g}, assd {found[2]:.2f}; surface-distance {found[3]:g}, 95 % "
          f"{found[4]:g}; SimpleITK {found[5]:g}, mean {found[6]:.2f}; scikit-image {found[7]:g}")
    if np.round(found, 2).tolist() != expected[title]:
        sys.exit(f"not seen any more: {title} was {expected[title]}")
EOF

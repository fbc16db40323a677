#!/usr/bin/env bash
# MONAI's sliding window puts the scores of a strided network down in the wrong cells, or loses a row and a column of them.
#
# Seen with monai 1.6.1, torch 2.13.0. sliding_window_inference takes networks whose output is smaller than their input.
# Windows lie at round steps but for the last one, which ends at the image's edge; its offset divided by the stride is
# rounded to a cell. A stand-in for a network of stride 4 (the mean of 4x4 pixels) on a ramp, window 48x48, overlap 0.25:
#   width 128                       equal to the whole image
#   width 130                       the same shape; from the last window on the ramp is 1 and 2 too high: 2 pixels away
#   width 130, window 50x50         24x31 cells, where the whole image (and 48x48) has 25x32
# Nothing is raised, no warning. A window that is a multiple of the stride is not enough: the image must be one as well.
#
# Why it matters: scores at stride 4 or 8, upsampled once at the end, are what segmentation networks give, and images of
# any size are what sliding windows are for. The labels of the right and lower strip, as wide as a window, are shifted by
# up to half a stride and averaged with unshifted ones in the overlap; in the last case all labels are stretched.
# Remedy: pad the image to a multiple of the stride before, crop the labels after, and take window and window times
# (1 - overlap) as multiples of it; or upsample inside the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 torch==2.13.0 monai==1.6.1
"$work/venv/bin/python" - "$work" <<'EOF'
import sys, warnings
import monai, numpy as np, torch
from monai.inferers import sliding_window_inference

print("monai", monai.__version__, "torch", torch.__version__)
warnings.simplefilter("error")


def network(image):
    return torch.nn.functional.avg_pool2d(image, 4)


def compare(width, window):
    image = torch.arange(float(width)).repeat(100, 1)[None, None]
    whole, windows = network(image), sliding_window_inference(image, (window, window), 1, network, overlap=0.25)
    error = (windows - whole)[0, 0, 50 // 4].numpy() if whole.shape == windows.shape else None
    print(f"width {width}, window {window}: {tuple(whole.shape[2:])} in one piece, {tuple(windows.shape[2:])} in windows",
          "" if error is None else f"error of each column {np.round(error, 2).tolist()}")
    return windows.shape[2:], error


if np.abs(compare(128, 48)[1]).max() != 0:
    sys.exit("not seen any more: windows are wrong at a multiple of the stride too")
shape, error = compare(130, 48)
if error is None or not np.all(error[-2:] == 2) or np.any(error[:18] != 0):
    sys.exit("not seen any more: the last window is where it belongs")
if tuple(compare(130, 50)[0]) != (24, 31):
    sys.exit("not seen any more: a window that is no multiple of the stride keeps the size")
padded = torch.nn.functional.pad(torch.arange(130.0).repeat(100, 1)[None, None], (0, 2))
right = sliding_window_inference(padded, (48, 48), 1, network, overlap=0.25)
if not torch.equal(right, network(padded)):
    sys.exit("not seen any more: the remedy does not help")
print("padded to a multiple of 4: equal")
EOF

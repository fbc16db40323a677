#!/usr/bin/env bash
# Float labels saved under their scan's NIfTI header come back as 0.99999 or 2.99992, and as another class.
#
# Seen with nibabel 5.4.2. The usual line Nifti1Image(labels, scan.affine, scan.header) takes over the scan's int16. Where
# the labels are float (a sum of masks, an ensemble, a resampled map) nibabel spreads them over all of int16 and writes a
# slope: class 3 comes back from get_fdata() as 2.99992, and astype(uint8) makes it 2.
#   float32 labels, 11 classes     65 % of the voxels are of another class after get_fdata().astype(uint8)
#   uint8, int16, int32 or int64   none
# set_data_dtype(uint8) on a float map, which looks like the cure, does the same in 255 steps. No warning anywhere.
#
# Why it matters: it is how predictions of medical segmentation are written and read. Every other class moves down by
# one, which looks like a bad network.
# Remedy: cast labels to an integer type before the image is made; when reading, round, and refuse what is far from whole.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 nibabel==5.4.2
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import nibabel, numpy as np

print("nibabel", nibabel.__version__, "numpy", np.__version__)
random = np.random.default_rng(0)
path = sys.argv[1] + "/scan.nii"
scan = nibabel.Nifti1Image(random.normal(0, 300, (20, 30, 5)).astype(np.int16), np.eye(4))
nibabel.save(scan, path)
scan = nibabel.load(path)
labels = random.integers(0, 11, scan.shape)


def back(image):
    out = sys.argv[1] + "/labels.nii.gz"
    nibabel.save(image, out)
    return nibabel.load(out).get_fdata()


wrong = {}
for kind in ("float32", "float64", "uint8", "int32"):
    values = back(nibabel.Nifti1Image(labels.astype(kind), scan.affine, scan.header))
    wrong[kind] = np.mean(values.astype(np.uint8) != labels)
    print(f"{kind} labels, header of the scan: class 3 comes back as {values[labels == 3][0]:.5f}, "
          f"{wrong[kind]:.1%} of another class after astype(uint8), {np.mean(np.round(values) != labels):.1%} when rounded")
image = nibabel.Nifti1Image(labels.astype(np.float32), scan.affine)
image.set_data_dtype(np.uint8)
values = back(image)
wrong["asked for uint8"] = np.mean(values.astype(np.uint8) != labels)
print(f"float32 labels, set_data_dtype(uint8): class 3 comes back as {values[labels == 3][0]:.5f}, "
      f"{wrong['asked for uint8']:.1%} of another class")
if min(wrong["float32"], wrong["float64"], wrong["asked for uint8"]) < 0.1 or wrong["uint8"] or wrong["int32"]:
    sys.exit("not seen any more: float labels survive the header of an integer scan")
EOF

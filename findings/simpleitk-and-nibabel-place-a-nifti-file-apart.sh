#!/usr/bin/env bash
# One NIfTI file lies in two places: SimpleITK follows its qform where nibabel follows its sform, left and right included.
#
# Seen with SimpleITK 2.5.7, nibabel 5.4.2, numpy 2.4.6. NIfTI has room for two transforms, each with a code. The two here
# mirror each other in x; where voxel (1, 2, 3) lies, in RAS:
#   codes                                    nibabel         SimpleITK
#   sform 1 (scanner), qform 1               12, 24, 36      12, 24, 36      sform
#   sform 2 (aligned) or more, qform 1       12, 24, 36      14, 24, 36      sform; qform
#   sform 2 or more, qform 0                 12, 24, 36      12, 24, 36      sform
#   sform 0, qform 1                         14, 24, 36      14, 24, 36      qform
# Both transforms may stand in a valid file. SimpleITK takes the sform only if its code is 1, or if there is no qform.
# Neither warns.
#
# Why it matters: registration writes sform 2 to 4 and leaves the scanner's qform. Labels of a network that reads by
# SimpleITK lie elsewhere, or mirrored, in what reads by nibabel (nilearn and most Python code); of a symmetric organ
# nobody sees it, and Dice says "bad network".
# Remedy: before mixing the two, compare header.get_sform(coded=True) with get_qform(coded=True); where they differ,
# decide, and write one of them into both: image.set_qform(affine, 1) and image.set_sform(affine, 1).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 nibabel==5.4.2 SimpleITK==2.5.7
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import nibabel, numpy as np, SimpleITK

SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
print("SimpleITK", SimpleITK.Version_VersionString(), "nibabel", nibabel.__version__)
sform = np.array([[2, 0, 0, 10], [0, 2, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1.0]])
qform = np.array([[-2, 0, 0, 16], [0, 2, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1.0]])
voxel = (1, 2, 3)
path = sys.argv[1] + "/labels.nii"


def places(sform_code, qform_code, same=False):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), None)
    image.header.set_sform(sform, sform_code)
    image.header.set_qform(sform if same else qform, qform_code)
    nibabel.save(image, path)
    by_nibabel = (nibabel.load(path).affine @ [*voxel, 1])[:3]
    by_itk = np.array(SimpleITK.ReadImage(path).TransformIndexToPhysicalPoint(voxel)) * [-1, -1, 1]  # LPS to RAS
    print(f"sform code {sform_code}, qform code {qform_code}{', both the same' * same}:", *by_nibabel.round(3), "|",
          *by_itk.round(3))
    return by_nibabel[0].round(3), by_itk[0].round(3)


for sform_code in (0, 1, 2, 3, 4):
    for qform_code in (0, 1, 2):
        if sform_code or qform_code:
            expected = (12 if sform_code else 14, 14 if qform_code and sform_code != 1 else 12)
            if places(sform_code, qform_code) != expected:
                sys.exit(f"not seen any more: sform code {sform_code}, qform code {qform_code}")
if places(2, 1, same=True) != (12, 12):
    sys.exit("not seen any more: the remedy does not help")
EOF

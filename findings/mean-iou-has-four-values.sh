#!/usr/bin/env bash
# One prediction, one ground truth: the mean IoU of two libraries spreads from 0.31 to 0.79.
#
# Seen with torchmetrics 1.9.0, scikit-learn 1.8.0, torch 2.13.0. Four pictures, five classes; class 4 is nowhere, class 3
# is in one picture and missed. From the pixel counts the IoU is 0.87, 0.90, 0.79 and 0 for the classes that exist:
#   torchmetrics MulticlassJaccardIndex             0.639: mean over classes that exist
#   torchmetrics segmentation.MeanIoU               0.787: mean over pictures of the mean over each picture's classes
#   the mean of MeanIoU(per_class=True)             0.311: the absent class is reported as -1
#   the same without it                             0.639: not what per_class=False gives
#   scikit-learn jaccard_score, labels=range(5)     0.511: the absent class counts as 0
# Each is called mean IoU or macro Jaccard, and none says which it is.
#
# Why it matters: a gate such as "INT8 may cost half a point of mIoU" means nothing when the two numbers come from two
# libraries, and per-picture averaging hides the loss of a rare class (0.79 with one class of four gone).
# Remedy: sum the confusion matrix over the data set, leave out classes without a pixel, and look at each class.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 torch==2.13.0 torchmetrics==1.9.0 \
    scikit-learn==1.8.0
"$work/venv/bin/python" -W ignore - <<'EOF'
import sys
import numpy as np, sklearn, torch, torchmetrics
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

print("torchmetrics", torchmetrics.__version__, "scikit-learn", sklearn.__version__, "torch", torch.__version__)
random = np.random.default_rng(0)
truth = np.zeros((4, 64, 64), int)
truth[:, :32], truth[:, 40:50], truth[3, 60:62, 0:4] = 1, 2, 3
found = truth.copy()
flipped = random.random(truth.shape) < 0.1
found[flipped] = random.integers(0, 3, flipped.sum())
found[3, 60:62, 0:4] = 0
counts = np.bincount((truth * 5 + found).ravel(), minlength=25).reshape(5, 5)
both, union = np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts)
print("by class, from the counts:", np.round(both[union > 0] / union[union > 0], 3))
p, t = torch.tensor(found), torch.tensor(truth)
by_class = MeanIoU(num_classes=5, per_class=True, input_format="index")(p, t)
values = {
    "from the counts": float((both[union > 0] / union[union > 0]).mean()),
    "torchmetrics MulticlassJaccardIndex": float(MulticlassJaccardIndex(5)(p, t)),
    "torchmetrics MeanIoU": float(MeanIoU(num_classes=5, input_format="index")(p, t)),
    "mean of MeanIoU(per_class=True)": float(by_class.mean()),
    "the same, classes that exist": float(by_class[by_class >= 0].mean()),
    "scikit-learn jaccard_score": float(
        jaccard_score(truth.ravel(), found.ravel(), labels=range(5), average="macro", zero_division=0)),
}
print("MeanIoU(per_class=True):", by_class.numpy().round(3))
for title, value in values.items():
    print(f"{title:38} {value:.3f}")
if abs(values["torchmetrics MulticlassJaccardIndex"] - values["from the counts"]) > 1e-4:
    sys.exit("not seen any more: MulticlassJaccardIndex is no longer the mean over the classes that exist")
if values["torchmetrics MeanIoU"] - values["from the counts"] < 0.1 or by_class[4] != -1:
    sys.exit("not seen any more: MeanIoU no longer averages over pictures, or absent classes are no longer -1")
if values["from the counts"] - values["scikit-learn jaccard_score"] < 0.1:
    sys.exit("not seen any more: scikit-learn leaves out the absent class")
EOF

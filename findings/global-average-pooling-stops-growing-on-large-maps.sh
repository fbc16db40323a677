#!/usr/bin/env bash
# The mean of a large map stops growing: ONNX Runtime's GlobalAveragePool says 119 of pixels whose mean is 127, and
# PyTorch's avg_pool2d says 30.
#
# Seen with onnxruntime 1.32.0, torch 2.13.0 (CPU). Random bytes as float32, whose mean is 127.5 whatever the size:
#                                               6000x6000    12000x12000
#   F.avg_pool2d(x, size of x)                  119.3        29.8
#   F.adaptive_avg_pool2d(x, 2), each quarter   127.5        119.3
#   onnxruntime, GlobalAveragePool              127.5        119.3
#   onnxruntime, ReduceMean                     127.5        127.5
#   torch's mean, adaptive_avg_pool2d(x, 1)     127.5        127.5
# Values are added one by one in float32 (ONNX Runtime: in four sums). A sum of 2^24 times a value no longer feels that
# value, so it stays where it is, and is divided by the number of pixels all the same. The scale of values does not
# matter; nothing overflows and nothing warns.
#
# Why it matters: squeeze-and-excitation, DeepLab's image pooling and PSPNet's pyramid take such means, of features at
# full size in networks for remote sensing, microscopy and matting. A crop or a tile is right, the whole scene is not,
# and the more cells the less is left of the mean. F.avg_pool2d is how an adaptive pooling is "made exportable".
# Remedy: take the mean along rows, then along columns (x.mean(3, keepdim=True).mean(2, keepdim=True)), or ReduceMean.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 torch==2.13.0
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import numpy as np, onnxruntime as ort, torch
import torch.nn.functional as F
from onnx import TensorProto as T, helper as h, numpy_helper as nh

print("onnxruntime", ort.__version__, "torch", torch.__version__)


def session(op):
    given = [nh.from_array(np.array([2, 3]), "axes")] if op == "ReduceMean" else []
    node = h.make_node(op, ["x", *(each.name for each in given)], ["y"])
    graph = h.make_graph([node], "mean", [h.make_tensor_value_info("x", T.FLOAT, [1, 1, "H", "W"])],
                         [h.make_tensor_value_info("y", T.FLOAT, [1, 1, 1, 1])], given)
    return ort.InferenceSession(
        h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=8).SerializeToString())


for side in (6000, 12000):
    x = np.random.default_rng(0).integers(0, 256, (1, 1, side, side), dtype=np.uint8).astype(np.float32)
    t = torch.from_numpy(x)
    means = {
        "avg_pool2d": F.avg_pool2d(t, side).item(),
        "adaptive_avg_pool2d 2": F.adaptive_avg_pool2d(t, 2)[0, 0, 0, 0].item(),
        "adaptive_avg_pool2d 1": F.adaptive_avg_pool2d(t, 1).item(),
        "GlobalAveragePool": session("GlobalAveragePool").run(None, {"x": x})[0].item(),
        "ReduceMean": session("ReduceMean").run(None, {"x": x})[0].item(),
        "rows, then columns": t.mean(3, keepdim=True).mean(2, keepdim=True).item(),
    }
    exact = float(x.mean(dtype=np.float64))
    print(f"{side}x{side}: exact {exact:.3f};", ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
    off = {name for name, value in means.items() if abs(value - exact) > 1}
    expected = {"avg_pool2d"} | ({"adaptive_avg_pool2d 2", "GlobalAveragePool"} if side == 12000 else set())
    if off != expected:
        sys.exit(f"not seen any more: of {side}x{side} the means that are wrong are {sorted(off)}")
EOF

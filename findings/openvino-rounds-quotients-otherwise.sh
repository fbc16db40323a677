#!/usr/bin/env bash
# A Div of float32 in OpenVINO is often not the quotient nearest to the true one, and floors of such quotients are other
# cells: nearest neighbours read elsewhere than in PyTorch and ONNX Runtime.
#
# Seen with openvino 2026.4.1 (CPU), against onnxruntime 1.32.0 and numpy 2.4.6, which agree. a / b for all a and b from
# 1 to 256, both float32:
#   quotients that are not IEEE's                              16687 of 65536
#   the same with EXECUTION_MODE_HINT ACCURACY                 16687
#   quotients that are whole numbers, and come out as none     109
# And where pixel x of out pixels reads cell floor(x * (in / out)), as PyTorch's nearest does, for in and out from 1 to
# 128: other cells at 369 of 16384 pairs of sizes, each time a whole cell off.
#
# Why it matters: the last bit of a scale decides ties. Indices that a graph computes by dividing sizes (what
# interpolate(mode="nearest") becomes when it is written out, coordinates of grids, patches) are then off by one in
# OpenVINO alone, at a few image sizes, without a word, and scores there are another cell's.
# Remedy: divide whole numbers as integers where that is what is meant; compare at sizes that tie (117 or 82 pixels, not
# powers of two); run such graphs with ONNX Runtime.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1
"$work/venv/bin/python" - <<'EOF'
import sys
import numpy as np, onnx, onnxruntime as ort, openvino as ov
from onnx import TensorProto, helper

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0])
graph = helper.make_graph(
    [helper.make_node("Div", ["a", "b"], ["q"])], "quotients",
    [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "ab"],
    [helper.make_tensor_value_info("q", TensorProto.FLOAT, ["n"])])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
onnx.checker.check_model(model, full_check=True)
data = model.SerializeToString()
a, b = (side.ravel().astype(np.float32) for side in np.meshgrid(np.arange(1, 257), np.arange(1, 257)))
by_ort = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"a": a, "b": b})[0]
core, found = ov.Core(), {}
for title, options in {"default": {}, "accuracy": {"EXECUTION_MODE_HINT": "ACCURACY"}}.items():
    options = {"INFERENCE_PRECISION_HINT": "f32"} | options
    compiled = core.compile_model(core.read_model(data), "CPU", options)
    found[title] = compiled([a, b])[compiled.output(0)].copy()
    wrong = found[title] != a / b
    print(f"OpenVINO, {title}: {wrong.sum()} of {len(a)} quotients are not float32's; "
          f"ONNX Runtime: {(by_ort != a / b).sum()}; "
          f"of whole ones {(wrong & (a % b == 0)).sum()}")
ratio = dict(zip(zip(a.astype(int), b.astype(int)), found["default"]))
pairs = [(old, new) for old in range(1, 129) for new in range(1, 129)]


def cells(new, scale):
    return np.floor(np.arange(new, dtype=np.float32) * scale)


moved = [pair for pair in pairs
         if not np.array_equal(cells(pair[1], ratio[pair]), cells(pair[1], np.float32(pair[0]) / np.float32(pair[1])))]
print(f"floor(x * (in / out)) reads other cells at {len(moved)} of {len(pairs)} pairs (in, out), as {moved[:4]}")
if (by_ort != a / b).any() or not (found["default"] != a / b).any() or not moved:
    sys.exit("not seen any more: OpenVINO's quotients are float32's")
EOF

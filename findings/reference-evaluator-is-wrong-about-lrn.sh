#!/usr/bin/env bash
# onnx's own reference evaluator computes LRN wrongly in every channel but the first, so it condemns right runtimes.
#
# Seen with onnx 1.23.2, against onnxruntime 1.32.0, openvino 2026.4.1, opencv-python-headless 5.0.0.93, tract 0.23.9 and
# the formula in NumPy. LRN over 5 of 8 channels:
#   onnxruntime, OpenVINO, OpenCV, tract    the formula, up to rounding
#   onnx.reference.ReferenceEvaluator       equal in channel 0 only; elsewhere 2 to 3.7 off, of values up to 4.1
# The evaluator's result has the right shape, and there is no warning.
#
# Why it matters: the reference evaluator is what one compares an engine with when two runtimes disagree, and AlexNet and
# other nets of the first fully convolutional generation have LRN. Taken as the judge it sends people after a fault in
# their own export.
# Remedy: for parity compare runtimes with each other, or ONNX Runtime with optimisation off.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 opencv-python-headless==5.0.0.93 tract==0.23.9
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import cv2, numpy as np, onnx, onnxruntime as ort, openvino as ov, tract
from importlib.metadata import version
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0],
      "opencv", cv2.__version__, "tract", version("tract"))
x = 3 * np.random.default_rng(0).standard_normal((1, 8, 5, 5)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("LRN", ["x"], ["y"], size=5, alpha=0.1, beta=0.75, bias=1.0)], "lrn",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
onnx.checker.check_model(model, full_check=True)
squares = np.stack([(x[:, max(0, c - 2) : c + 3] ** 2).sum(1) for c in range(8)], 1)
formula = x / (1.0 + 0.1 / 5 * squares) ** 0.75
path = sys.argv[1] + "/model.onnx"
onnx.save(model, path)
core = ov.Core()
compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
net = cv2.dnn.readNetFromONNX(path)
net.setInput(x)
found = {
    "onnxruntime": ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0],
    "openvino": compiled([x])[compiled.output(0)],
    "opencv": net.forward(),
    "tract": tract.onnx().load(path).into_model().into_runnable().run([x])[0].to_numpy(),
    "reference evaluator": ReferenceEvaluator(model).run(None, {"x": x})[0],
}
off = {who: abs(y - formula).max(axis=(0, 2, 3)) for who, y in found.items()}
for who, by_channel in off.items():
    print(f"{who:20} off by channel, of values up to {abs(formula).max():.1f}:", np.round(by_channel, 3))
wrong = off.pop("reference evaluator")
if wrong.max() < 0.1:
    sys.exit("not seen any more: the reference evaluator computes LRN as the formula")
if max(by_channel.max() for by_channel in off.values()) > 1e-3:
    sys.exit("not seen any more: one of the runtimes no longer computes LRN as the formula")
EOF

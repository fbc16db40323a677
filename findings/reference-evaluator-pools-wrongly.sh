#!/usr/bin/env bash
# onnx's reference evaluator pools wrongly: averages with ceil_mode are wrong everywhere, MaxPool with SAME_LOWER has
# another size, and an L1 norm forgets the signs.
#
# Seen with onnx 1.23.2 (onnx.reference.ReferenceEvaluator), against onnxruntime 1.32.0 and openvino 2026.4.1, which agree
# with each other and, for the first, with the means of the windows in NumPy. On 4 channels of 7x9:
#   AveragePool 3x3, stride 3, ceil_mode=1            same size, every value another, up to 2.4 off
#   MaxPool 3x3, stride 2, auto_pad=SAME_LOWER        3x4 instead of 4x5
#   LpNormalization, p=1, axis=1                      divides by the sum of the signed values: 103 instead of 0.7
# There is no error and no warning.
#
# Why it matters: the evaluator is what converters and passes are held against, and what decides between two runtimes
# that disagree. Here it condemns the right ones, at the odd sizes where ceil_mode matters.
# Remedy: hold results against PyTorch or two runtimes, and against the evaluator only where these agree with it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import numpy as np, onnx, onnxruntime as ort, openvino as ov
from onnx import TensorProto as T, helper as h
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0])
x = np.random.default_rng(0).normal(size=(1, 4, 7, 9)).astype(np.float32)
core = ov.Core()


def results(op, **attributes):
    graph = h.make_graph([h.make_node(op, ["x"], ["y"], **attributes)], op,
                         [h.make_tensor_value_info("x", T.FLOAT, [1, 4, "H", "W"])],
                         [h.make_tensor_value_info("y", T.FLOAT, [1, 4, "h", "w"])])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    raw = model.SerializeToString()
    compiled = core.compile_model(core.read_model(raw), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = ort.InferenceSession(raw).run(None, {"x": x})[0], compiled(x)[0], ReferenceEvaluator(model).run(None, {"x": x})[0]
    print(f"{op:16} onnxruntime {found[0].shape}, reference {found[2].shape}")
    if found[0].shape != found[1].shape or np.abs(found[0] - found[1]).max() > 1e-4:
        sys.exit(f"not seen any more: onnxruntime and OpenVINO disagree about {op}")
    return found[0], found[2]


runtime, reference = results("AveragePool", kernel_shape=[3, 3], strides=[3, 3], ceil_mode=1)
windows = np.stack([[x[:, :, i : i + 3, j : j + 3].mean((2, 3)) for j in (0, 3, 6)] for i in (0, 3, 6)])
exact = windows.transpose(2, 3, 0, 1)
print("  off the means of the windows: onnxruntime", np.abs(runtime - exact).max(), "reference", np.abs(reference - exact).max())
if np.abs(runtime - exact).max() > 1e-5 or reference.shape != exact.shape or (np.abs(reference - exact) < 1e-3).mean() > 0.05:
    sys.exit("not seen any more: the reference averages with ceil_mode rightly")
runtime, reference = results("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_LOWER")
if runtime.shape != (1, 4, 4, 5) or reference.shape != (1, 4, 3, 4):
    sys.exit("not seen any more: MaxPool with SAME_LOWER has one size")
runtime, reference = results("LpNormalization", axis=1, p=1)
print("  largest: onnxruntime", np.abs(runtime).max(), "reference", np.abs(reference).max())
if np.abs(runtime - x / np.abs(x).sum(1, keepdims=True)).max() > 1e-5 or np.abs(reference - x / x.sum(1, keepdims=True)).max() > 1e-3:
    sys.exit("not seen any more: the reference divides by the sum of absolute values")
EOF

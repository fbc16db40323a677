#!/usr/bin/env bash
# OpenVINO stretches where the Resize says to keep the aspect ratio.
#
# Seen with openvino 2026.4.1, against onnxruntime 1.32.0, the reference evaluator of onnx 1.23.2 and tensorrt-rtx-cu13
# 1.7.1.116. A Resize to 64x64 with keep_aspect_ratio_policy, on 48x96:
#                            not_larger    not_smaller
#   onnxruntime, reference   32x64         64x128
#   OpenVINO                 64x64         64x64, no error, no warning
#   TensorRT for RTX         refuses       refuses
#
# Why it matters: this is how a letterbox is put into a model. In OpenVINO every picture that is not square reaches the
# network distorted: labels come out, of a plausible size, and worse.
# Remedy: compute the sizes outside the model, or refuse the attribute for OpenVINO.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 tensorrt-rtx-cu13==1.7.1.116
"$work/venv/bin/python" - <<'EOF'
import sys
import numpy as np, onnx, onnxruntime as ort, openvino as ov, tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0],
      "tensorrt_rtx", trt.__version__)
x = np.random.default_rng(0).random((1, 3, 48, 96)).astype(np.float32)
seen = {}
for policy in ("not_larger", "not_smaller"):
    graph = helper.make_graph(
        [helper.make_node("Resize", ["x", "", "", "size"], ["y"], mode="linear", axes=[2, 3],
                          keep_aspect_ratio_policy=policy)], "letterbox",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, "h", "w"])],
        [numpy_helper.from_array(np.int64([64, 64]), "size")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    seen[policy] = [session.run(None, {"x": x})[0].shape[2:], ReferenceEvaluator(model).run(None, {"x": x})[0].shape[2:],
                    compiled([x])[compiled.output(0)].shape[2:]]
    print(f"{policy}: onnxruntime {seen[policy][0]}, reference {seen[policy][1]}, openvino {seen[policy][2]}, "
          f"tensorrt_rtx {'takes it' if parser.parse(model.SerializeToString()) else 'refuses it'}")
if seen != {"not_larger": [(32, 64), (32, 64), (64, 64)], "not_smaller": [(64, 128), (64, 128), (64, 64)]}:
    sys.exit("not seen any more: OpenVINO keeps the aspect ratio, or the others do not")
EOF

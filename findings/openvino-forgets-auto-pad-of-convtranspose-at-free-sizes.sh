#!/usr/bin/env bash
# OpenVINO forgets auto_pad of a ConvTranspose once height and width are free: larger maps, scores in other places.
#
# Seen with openvino 2026.4.1, against onnxruntime 1.32.0, tract 0.23.9, tensorrt-rtx-cu13 1.7.1.116 and the reference
# evaluator of onnx 1.23.2. A ConvTranspose with auto_pad SAME_UPPER or SAME_LOWER (no pads, no output_shape) must give
# input times stride. On 12x16 with a 4x4 kernel and stride 2:
#   onnxruntime, tract, TensorRT for RTX, reference    24x32
#   OpenVINO, the input declared as 1x3x12x16          24x32, equal
#   OpenVINO, the input declared as 1x3xHxW            26x34: nothing cut off, so that the others are the middle of it
# No error, no warning. Where kernel and stride are equal nothing is to be cut, and all agree. OpenCV 5.0.0 gives 23x31.
#
# Why it matters: freeing the sizes of a checked model is what segmentation users do, and it is what changes the answer.
# If the rest of the graph crops or resizes to the image, labels are shifted by (kernel - stride) / 2 and nothing tells.
# Remedy: write the pads out before OpenVINO reads the model: total = kernel - stride, SAME_UPPER puts the odd one at the end.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 opencv-python-headless==5.0.0.93 tract==0.23.9 tensorrt-rtx-cu13==1.7.1.116
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import cv2, numpy as np, onnx, onnxruntime as ort, openvino as ov, tensorrt_rtx as trt, tract
from importlib.metadata import version
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0],
      "opencv", cv2.__version__, "tract", version("tract"), "tensorrt_rtx", trt.__version__)
x = np.random.default_rng(0).standard_normal((1, 3, 12, 16)).astype(np.float32)


def network(kernel, stride, sizes=("H", "W"), **pads):
    weight = np.random.default_rng(1).standard_normal((3, 5, kernel, kernel)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[stride, stride], **pads)], "up",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, *sizes])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, None, None])],
        [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def by_onnxruntime(model):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def by_openvino(model):
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[compiled.output(0)]


def by_opencv(model):
    net = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
    net.setInput(x)
    return net.forward()


def by_tract(model):
    path = sys.argv[1] + "/model.onnx"
    onnx.save(model, path)
    return tract.onnx().load(path).into_model().into_runnable().run([x])[0].to_numpy()


def trt_shape(model):
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    return tuple(network.get_output(0).shape) if parser.parse(model.SerializeToString()) else "refused"


seen = True
for auto in ("SAME_UPPER", "SAME_LOWER"):
    for kernel, stride in ((4, 2), (3, 2), (2, 2)):
        free = network(kernel, stride, auto_pad=auto)
        fixed = network(kernel, stride, (12, 16), auto_pad=auto)
        right, at_fixed, at_free = by_onnxruntime(free), by_openvino(fixed), by_openvino(free)
        more = kernel - stride
        first = more // 2 if auto == "SAME_UPPER" else more - more // 2
        middle = at_free[:, :, first : first + right.shape[2], first : first + right.shape[3]]
        same = middle.shape == right.shape and np.allclose(middle, right, atol=1e-4)
        peers = [right.shape, ReferenceEvaluator(free).run(None, {"x": x})[0].shape, trt_shape(fixed)]
        peers += [by_tract(fixed).shape] if more else []
        print(f"{auto} {kernel}x{kernel} stride {stride}: onnxruntime, reference, tensorrt_rtx, tract", {p[2:] for p in peers},
              f"opencv {by_opencv(fixed).shape[2:]}; openvino with fixed sizes {at_fixed.shape[2:]}, equal: "
              f"{np.allclose(at_fixed, right, atol=1e-4)}; with free sizes {at_free.shape[2:]}, its middle equal: {same}")
        seen &= len(set(peers)) == 1 and np.allclose(at_fixed, right, atol=1e-4)
        seen &= same and at_free.shape[2] == right.shape[2] + more
        explicit = by_openvino(network(kernel, stride, pads=[first, first, more - first, more - first]))
        seen &= explicit.shape == right.shape and np.allclose(explicit, right, atol=1e-4)
if not seen:
    sys.exit("not seen any more: OpenVINO treats auto_pad alike for fixed and free sizes, or a peer changed")
print("with explicit pads and free sizes OpenVINO equals onnxruntime")
EOF

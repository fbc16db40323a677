#!/usr/bin/env bash
# A Resize by 1.3 makes 13 columns of 10 in the runtimes, 12 in shape inference; and of 90 it makes 116, or 117 in OpenVINO.
#
# Seen with onnx 1.23.2, onnxruntime 1.32.0, openvino 2026.4.1, opencv-python-headless 5.0.0.93, torch 2.13.0. ONNX says
# floor(size x scale) and keeps scales as float32, and nobody says in which precision to multiply:
#                                         10 x 1.3    90 x 1.3
#   onnxruntime, OpenCV (float32)         13          116
#   OpenVINO                              13          117
#   onnx.shape_inference, reference       12          116   (1.3 as float32 is 1.29999995)
#   PyTorch, the model's author           13          117   (1.3 as double)
# Over ten scales between 0.1 and 1.7 and every multiple of 5 below 500, shape inference and onnxruntime disagree at one
# size of five, OpenVINO and onnxruntime at one of ninety. The checker with full_check passes, nothing warns.
#
# Why it matters: pyramids and decoders scale by 1.5, 1.25 or 0.7. The map is one row longer or shorter than in training
# at some sizes only, so labels are stretched by a pixel, or a Concat with a skip connection fails for one user's images.
# A buffer allocated by the inferred shape is a row too small.
# Remedy: give sizes, computed from Shape in integers (size x 13 / 10), or scales that are sums of powers of two.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 opencv-python-headless==5.0.0.93 torch==2.13.0
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import cv2, numpy as np, onnx, onnxruntime as ort, openvino as ov, torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0], "opencv",
      cv2.__version__, "torch", torch.__version__)


def network(scale, width="W"):
    graph = helper.make_graph(
        [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="nearest", coordinate_transformation_mode="asymmetric",
                          nearest_mode="floor")], "resize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, "w"])],
        [numpy_helper.from_array(np.float32([1, 1, 1, scale]), "s")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def inferred(scale, width):
    model = network(scale, width)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model).graph.output[0].type.tensor_type.shape.dim[3].dim_value


seen, apart, sizes = {}, {}, 0
core = ov.Core()
for scale in (0.1, 0.3, 0.6, 0.7, 1.1, 1.2, 1.3, 1.4, 1.6, 1.7):
    model = network(scale)
    onnx.checker.check_model(model, full_check=True)
    session, evaluator = ort.InferenceSession(model.SerializeToString()), ReferenceEvaluator(model)
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU").create_infer_request()
    net = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
    for width in range(10, 500, 5):
        x = np.zeros((1, 1, 2, width), np.float32)
        net.setInput(x)
        lengths = {"onnxruntime": session.run(None, {"x": x})[0].shape[3], "opencv": net.forward().shape[3],
                   "openvino": request.infer([x])[0].shape[3], "reference": evaluator.run(None, {"x": x})[0].shape[3],
                   "inference": inferred(scale, width),
                   "torch": torch.nn.functional.interpolate(torch.tensor(x), scale_factor=(1, scale)).shape[3]}
        sizes += 1
        seen[scale, width] = lengths
        for name, length in lengths.items():
            apart[name] = apart.get(name, 0) + (length != lengths["onnxruntime"])
for case in ((1.3, 10), (1.3, 90)):
    print(case, seen[case])
print("other than onnxruntime, of", sizes, "sizes:", apart)
if list(seen[1.3, 10].values()) != [13, 13, 13, 12, 12, 13] or list(seen[1.3, 90].values()) != [116, 116, 117, 116, 116, 117]:
    sys.exit("not seen any more: the lengths at 10 or 90 columns are others")
if apart["opencv"] or apart["openvino"] < 5 or apart["inference"] < 100 or apart["reference"] != apart["inference"]:
    sys.exit("not seen any more: the programs agree more, or less, than they did")
EOF

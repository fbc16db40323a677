#!/usr/bin/env bash
# A padded MaxPool with ceil_mode has one more row and column in OpenVINO, OpenCV and TensorRT for RTX, filled with -3.4e38.
#
# Seen with openvino 2026.4.1, opencv-python-headless 5.0.0.93, tensorrt-rtx-cu13 1.7.1.116, against onnxruntime 1.32.0,
# tract 0.23.9 and onnx 1.23.2. ONNX says that a last window which would start in the padding at the end is left out, as
# PyTorch does. MaxPool 3x3, stride 3, pads 1, ceil_mode=1 on 47x65:
#   reference evaluator, onnxruntime, tract                      16x22
#   OpenVINO, OpenCV, TensorRT for RTX                           17x23
#   onnx.shape_inference, and the checker that relies on it      17x23 (onnxruntime warns, and goes on with 16x22)
# The extra cells hold the lowest float32, since nothing but padding was under the window. A 3x3 convolution behind it
# makes infinities or NaN of them at the border. At two sizes out of three here all agree, so a test at one shows nothing.
#
# Why it matters: VGG, SegNet and other nets that came by way of Caffe pool with ceil_mode; the size of the map decides
# where a skip connection or the final Resize puts each label, and the last rows of the picture turn to one class.
# Remedy: write such a pooling as Pad and a MaxPool without ceil_mode, cut to the size that ONNX gives; or accept only
# sizes at which the last window does not start in the padding.
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


def network(height, width, behind):
    nodes = [helper.make_node("MaxPool", ["x"], ["pool"], kernel_shape=[3, 3], strides=[3, 3], pads=[1] * 4, ceil_mode=1)]
    weight = []
    if behind:
        nodes.append(helper.make_node("Conv", ["pool", "w"], ["y"], pads=[1] * 4))
        weight = [numpy_helper.from_array(np.full((2, 2, 3, 3), 0.5, np.float32), "w")]
    result = "y" if behind else "pool"
    graph = helper.make_graph(
        nodes, "pooling", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, height, width])],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, [1, 2, None, None])], weight)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def by_onnxruntime(model, x):
    ort.set_default_logger_severity(4)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def by_reference(model, x):
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def by_openvino(model, x):
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[compiled.output(0)]


def by_opencv(model, x):
    net = cv2.dnn.readNetFromONNX(np.frombuffer(model.SerializeToString(), np.uint8))
    net.setInput(x)
    return net.forward()


def by_tract(model, x):
    path = sys.argv[1] + "/model.onnx"
    onnx.save(model, path)
    return tract.onnx().load(path).into_model().into_runnable().run([x])[0].to_numpy()


def trt_shape(model):
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        sys.exit("not seen any more: TensorRT for RTX refuses the pooling")
    return tuple(network.get_output(0).shape)


x = -1 - np.random.default_rng(0).random((1, 2, 47, 65)).astype(np.float32)
model = network(47, 65, False)
inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output[0].type.tensor_type.shape
print("shape inference", [d.dim_value for d in inferred.dim])
maps = {f.__name__: f(model, x) for f in (by_reference, by_onnxruntime, by_tract, by_openvino, by_opencv)}
for who, found in maps.items():
    print(f"{who:15} {found.shape}, last column from {found[..., -1].min():.4g} to {found[..., -1].max():.4g}")
rtx = trt_shape(model)
print(f"tensorrt_rtx    {rtx}")
behind = network(47, 65, True)
print("behind a convolution: openvino's last row", by_openvino(behind, x)[0, 0, -1, :3],
      "onnxruntime's", by_onnxruntime(behind, x)[0, 0, -1, :3])
even = network(48, 66, False)
larger = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))
print("at 48x66: onnxruntime", by_onnxruntime(even, larger).shape, "openvino", by_openvino(even, larger).shape,
      "tensorrt_rtx", trt_shape(even))
right, more = (1, 2, 16, 22), (1, 2, 17, 23)
if any(maps[who].shape != right for who in ("by_reference", "by_onnxruntime", "by_tract")):
    sys.exit("not seen any more: those that were right no longer give 16x22")
if rtx != more or any(maps[who].shape != more for who in ("by_openvino", "by_opencv")):
    sys.exit("not seen any more: OpenVINO, OpenCV and TensorRT for RTX do not all add a row and a column")
if maps["by_openvino"][..., -1].max() > -3e38 or maps["by_opencv"][..., -1].max() > -3e38:
    sys.exit("not seen any more: the added cells are not the lowest float32")
EOF

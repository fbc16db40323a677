#!/usr/bin/env bash
# A Softmax of opset 12 or older gives other probabilities in OpenVINO and OpenCV than in ONNX Runtime and TensorRT.
#
# Seen with onnxruntime 1.32.0, tract 0.23.9, tensorrt-rtx-cu13 1.7.1.116, openvino 2026.4.1, opencv-python-headless
# 5.0.0.93, onnx 1.23.2. Until opset 12 Softmax flattens: axis=1 on NxCxHxW means over C*H*W. On 3 classes at 13x17:
#   onnxruntime, tract (and TensorRT for RTX, which adds the two reshapes)   the whole map sums to 1, largest 0.020
#   OpenVINO, OpenCV, and onnx's reference evaluator                         every pixel sums to 1, largest 0.913
# OpenCV's Hardmax and LogSoftmax of that age part likewise; OpenVINO's do not. From opset 13 on all agree.
#
# Why it matters: labels by argmax are the same, so comparing labels shows nothing. Thresholds, confidences, reject
# options and averages over models are meaningless in one half of the runtimes, and depend on the image's size there;
# attention inside a network changes the labels too.
# Remedy: raise the opset with onnx's converter, which writes the flattening out; where the author meant the classes, say
# so by Softmax 13.
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
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0],
      "opencv", cv2.__version__, "tract", version("tract"), "tensorrt_rtx", trt.__version__)
x = np.random.default_rng(0).standard_normal((1, 3, 13, 17)).astype(np.float32)


def network(operator, opset):
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], axis=1)], "last",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    onnx.checker.check_model(model, full_check=True)
    return model


def by_onnxruntime(model):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def by_reference(model):
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


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


def rtx_layer(model):
    """The shape over which TensorRT takes its Softmax."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parser.parse(model.SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return next(tuple(layer.get_output(0).shape) for layer in layers if layer.type == trt.LayerType.SOFTMAX)


def softmax(values):
    high = np.exp(values - values.max())
    return high / high.sum()


flat = softmax(x)
each = np.exp(x) / np.exp(x).sum(1, keepdims=True)
runtimes = (by_onnxruntime, by_tract, by_openvino, by_opencv, by_reference)
for opset in (11, 13):
    found = {f.__name__: f(network("Softmax", opset)) for f in runtimes}
    for who, y in found.items():
        over = "C*H*W" if np.allclose(y, flat, atol=1e-5) else "C" if np.allclose(y, each, atol=1e-5) else "?"
        print(f"opset {opset}: {who:15} over {over:6} sum {y.sum():7.3f} largest {y.max():.3f}, "
              f"labels as the scores': {np.array_equal(y.argmax(1), x.argmax(1))}")
    print(f"opset {opset}: tensorrt_rtx    its Softmax works on {rtx_layer(network('Softmax', opset))}")
    if opset == 11:
        whole = [np.allclose(found[who], flat, atol=1e-5) for who in ("by_onnxruntime", "by_tract")]
        pixel = [np.allclose(found[who], each, atol=1e-5) for who in ("by_openvino", "by_opencv")]
        if not (all(whole) and all(pixel) and rtx_layer(network("Softmax", 11)) == (1, x.size)):
            sys.exit("not seen any more: the runtimes agree on an old Softmax, or part in another way")
    elif not all(np.allclose(y, each, atol=1e-5) for y in found.values()):
        sys.exit("not seen any more: the runtimes no longer agree from opset 13 on")
for operator in ("Hardmax", "LogSoftmax"):
    model = network(operator, 11)
    one = by_onnxruntime(model)
    print(operator, 11, "equal to onnxruntime's: openvino", np.allclose(by_openvino(model), one, atol=1e-4),
          "opencv", np.allclose(by_opencv(model), one, atol=1e-4))
EOF

#!/usr/bin/env bash
# quantize_dynamic makes the labels of an image depend on its neighbours in the batch, and on its far corners.
#
# Seen with onnxruntime 1.32.0, onnx 1.23.2. DynamicQuantizeLinear takes one range over all of its tensor: all images of a
# batch, the whole height and width. Two 3x3 convolutions, 6 classes, random scores:
#   the image alone, INT8 against float32                                  1 % of its labels differ
#   the same image beside one eight times as bright                        5 % of its labels differ
#   a 4x4 corner twenty times as bright: labels 10 and more pixels away    6 % change (float32: none)
# A network of convolutions only is translation-equivariant and treats images alone; this one is neither.
#
# Why it matters: quantize_dynamic is the INT8 that needs no data. Tiles with a halo of the receptive field no longer
# equal the whole image and show seams; a server that batches requests gives each user labels that depend on the others;
# an evaluation in batches is not the deployment's. It is also slow: the ranges are computed at every call.
# Remedy: quantize_static. Where a model has DynamicQuantizeLinear: one image at a time, and never in tiles.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 sympy==1.14.0
"$work/venv/bin/python" - "$work" <<'EOF'
import logging, sys
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

logging.disable(logging.WARNING)
print("onnx", onnx.__version__, "onnxruntime", ort.__version__)
random = np.random.default_rng(0)
weights = {name: (random.standard_normal(shape) * 0.3).astype(np.float32)
           for name, shape in (("w0", (8, 3, 3, 3)), ("w1", (6, 8, 3, 3)))}
graph = helper.make_graph(
    [helper.make_node("Conv", ["x", "w0"], ["c"], pads=[1] * 4, name="first"),
     helper.make_node("Relu", ["c"], ["r"], name="relu"),
     helper.make_node("Conv", ["r", "w1"], ["y"], pads=[1] * 4, name="second")],
    "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, "H", "W"])],
    [numpy_helper.from_array(value, name) for name, value in weights.items()])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
onnx.checker.check_model(model, full_check=True)
plain, small = sys.argv[1] + "/plain.onnx", sys.argv[1] + "/small.onnx"
onnx.save(model, plain)
quantize_dynamic(plain, small)
sessions = {path: ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (plain, small)}


def labels(path, x):
    return sessions[path].run(None, {"x": x})[0].argmax(1)


image = random.standard_normal((1, 3, 64, 64)).astype(np.float32)
pair = np.concatenate([image, 8 * image])
corner = image.copy()
corner[..., 60:, 60:] *= 20
alone = np.mean(labels(plain, image) != labels(small, image))
beside = np.mean(labels(plain, image) != labels(small, pair)[:1])
far = np.mean(labels(small, corner)[..., :50, :50] != labels(small, image)[..., :50, :50])
far_float = np.mean(labels(plain, corner)[..., :50, :50] != labels(plain, image)[..., :50, :50])
print(f"INT8 labels that are not float32's: alone {alone:.1%}, beside a brighter image {beside:.1%}")
print(f"labels that a bright corner changes from afar: INT8 {far:.1%}, float32 {far_float:.1%}")
if beside < alone + 0.02 or far < 0.02 or far_float:
    sys.exit("not seen any more: dynamically quantised convolutions treat images and places apart")
EOF

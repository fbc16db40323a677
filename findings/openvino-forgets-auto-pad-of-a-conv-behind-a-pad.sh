#!/usr/bin/env bash
# OpenVINO forgets auto_pad of a Conv that stands behind a Pad once height and width are free: smaller, shifted maps.
#
# Seen with openvino 2026.4.1, against onnxruntime 1.32.0, tract 0.23.9 and the reference evaluator of onnx 1.23.2. A Pad
# of one zero on every side, then a 3x3 Conv of stride 2 with auto_pad SAME_UPPER, on 12x16 (14x18 behind the Pad):
#   onnxruntime, tract, reference                       7x9
#   OpenVINO, the input declared as 1x3x12x16           7x9, equal
#   OpenVINO, the input declared as 1x3xHxW             6x8: the Conv ran as if auto_pad were VALID, the Pad its only padding
# With stride 1 it is 12x16 instead of 14x18; SAME_LOWER is forgotten as well. No error, no warning. It is the fusion of
# the Pad into the Conv, which writes the Pad's numbers into the Conv: with the Pad alone or the auto_pad alone all agree.
#
# Why it matters: Keras' ZeroPadding2D before a "same" convolution becomes these two nodes, and freeing the sizes of a
# checked model is what segmentation users do. Where a Resize to the image's size follows, every label is shifted and
# stretched; where a skip connection of another width follows, an error far away is what one sees.
# Remedy: write the padding of such a Conv out (for stride 1 it is the kernel's own); with a stride, compute it before a
# Pad and drop auto_pad, or declare the sizes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    openvino==2026.4.1 tract==0.23.9
"$work/venv/bin/python" - "$work" <<'EOF'
import sys
import numpy as np, onnx, onnxruntime as ort, openvino as ov, tract
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "openvino", ov.__version__.split("-")[0])
random = np.random.default_rng(0)
x = random.normal(size=(1, 3, 12, 16)).astype(np.float32)


def network(sizes, pad, auto_pad, stride):
    kernel = numpy_helper.from_array(random.normal(size=(5, 3, 3, 3)).astype(np.float32), "w")
    border = numpy_helper.from_array(np.int64([0, 0, pad, pad, 0, 0, pad, pad]), "p")
    nodes = [helper.make_node("Pad", ["x", "p"], ["z"]),
             helper.make_node("Conv", ["z", "w"], ["y"], auto_pad=auto_pad, strides=[stride, stride])]
    graph = helper.make_graph(nodes, "padded", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, *sizes])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5, "h", "w"])], [border, kernel])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def openvino(model):
    core = ov.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return compiled([x])[0]


def others(model):
    onnx.save(model, sys.argv[1] + "/model.onnx")
    return {"onnxruntime": ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0],
            "reference": ReferenceEvaluator(model).run(None, {"x": x})[0],
            "tract": tract.onnx().load(sys.argv[1] + "/model.onnx").into_model().into_runnable().run([x])[0].to_numpy()}


for auto_pad, stride, right, wrong in (("SAME_UPPER", 2, (7, 9), (6, 8)), ("SAME_LOWER", 2, (7, 9), (6, 8)),
                                       ("SAME_UPPER", 1, (14, 18), (12, 16))):
    free, fixed = network(("H", "W"), 1, auto_pad, stride), network((12, 16), 1, auto_pad, stride)
    expected = others(free)
    if any(y.shape[2:] != right or not np.allclose(y, expected["reference"], atol=1e-4) for y in expected.values()):
        sys.exit("not seen any more: onnxruntime, tract and the reference do not agree")
    if not np.allclose(openvino(fixed), others(fixed)["onnxruntime"], atol=1e-4):
        sys.exit("not seen any more: OpenVINO is wrong at declared sizes too")
    got = openvino(free).shape[2:]
    print(f"Pad, {auto_pad}, stride {stride}: the others {right}, OpenVINO {got} at free sizes, equal at declared ones")
    if got != wrong:
        sys.exit("not seen any more: OpenVINO keeps auto_pad behind a Pad at free sizes")
model = network(("H", "W"), 0, "SAME_UPPER", 2)
if not np.allclose(openvino(model), others(model)["onnxruntime"], atol=1e-4):
    sys.exit("not seen any more: OpenVINO is wrong without padding in the Pad")
print("a Pad of nothing: all agree")
EOF

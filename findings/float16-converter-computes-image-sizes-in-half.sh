#!/usr/bin/env bash
# ONNX Runtime's float16 converter computes image sizes in half precision too, and only TensorRT shows it.
#
# Seen with onnxruntime 1.32.0 (onnxruntime.transformers.float16), onnx 1.23.2, tensorrt-rtx-cu13 1.7.1.116. Exporters
# write the size of an interpolation as Shape, Cast to float, Mul by the scale, Floor, Cast to int64. The converter turns
# that Cast and Mul into float16, which holds whole numbers up to 2048 only. Size of a Resize by 1.5, width 2051 / 4097:
#   float32 model, anywhere                          3076 / 6145
#   converted, in onnxruntime's CPU                  3076 / 6145: it takes the casts out again and computes in float32
#   converted, in TensorRT for RTX, strongly typed   3078 / 6144
# A test of the converted model on a CPU therefore passes.
#
# Why it matters: pictures wider than 2048 pixels are common in segmentation. Two pixels too many or one too few is either
# a failing Concat deep in an engine or, at the end, labels of a size that is not the image's.
# Remedy: keep every node that computes on sizes in float32 (node_block_list), or use constant scales.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    tensorrt-rtx-cu13==1.7.1.116
"$work/venv/bin/python" - <<'EOF'
import copy, sys
import numpy as np, onnx, onnxruntime as ort, tensorrt_rtx as trt
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "tensorrt_rtx", trt.__version__)
node = helper.make_node
graph = helper.make_graph(
    [
        node("Conv", ["x", "w"], ["scores"], pads=[1] * 4, name="conv"),
        node("Shape", ["x"], ["shape"], name="shape", start=2, end=4),
        node("Cast", ["shape"], ["size"], to=TensorProto.FLOAT, name="to_float"),
        node("Mul", ["size", "scale"], ["scaled"], name="mul"),
        node("Floor", ["scaled"], ["floored"], name="floor"),
        node("Cast", ["floored"], ["whole"], to=TensorProto.INT64, name="to_int"),
        node("Concat", ["front", "whole"], ["wanted"], axis=0, name="concat"),
        node("Resize", ["scores", "", "", "wanted"], ["y"], mode="linear", name="resize"),
    ],
    "interpolate",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "H", "W"])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, "H2", "W2"])],
    [
        numpy_helper.from_array(np.full((2, 3, 3, 3), 0.1, np.float32), "w"),
        numpy_helper.from_array(np.float32(1.5), "scale"),
        numpy_helper.from_array(np.int64([1, 2]), "front"),
    ],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
onnx.checker.check_model(model, full_check=True)
converted = convert_float_to_float16(copy.deepcopy(model), keep_io_types=True)


def on_cpu(of, width):
    session = ort.InferenceSession(of.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.zeros((1, 3, 4, width), np.float32)})[0].shape[3]


def by_tensorrt(of, width):
    """The width of the result, which the parsed network knows where the input's size is fixed."""
    of = copy.deepcopy(of)
    for axis, size in ((2, 4), (3, width)):
        of.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(of.SerializeToString()):
        sys.exit("not seen any more: TensorRT for RTX refuses the model: " + parser.get_error(0).desc())
    return network.get_output(0).shape[3]


wrong = 0
for width in (1000, 2051, 4097):
    found = [f(of, width) for f in (on_cpu, by_tensorrt) for of in (model, converted)]
    print(f"width {width}: onnxruntime float32 {found[0]}, converted {found[1]}; TensorRT for RTX float32 {found[2]}, "
          f"converted {found[3]}")
    if not found[0] == found[1] == found[2]:
        sys.exit("not seen any more: the CPU's or the float32 model's answer changed")
    wrong += found[3] != found[0]
if wrong != 2:
    sys.exit("not seen any more: sizes beyond 2048 come out right from the converted model")
EOF

#!/usr/bin/env bash
# OpenVINO does much of its integer arithmetic in float32: 16777217 equals 16777216, and a remainder is negative.
#
# Seen with openvino 2026.4.1 (CPU, hint f32), against onnxruntime 1.32.0 and tract 0.23.9, which are exact. Tensors of
# int32 (int64 and uint32 likewise):
#                                             exact         OpenVINO
#   16777217 == 16777216                      False         True
#   16777217 % 3                              2             1
#   50331651 % 3                              0             -4
#   50331651 / 3                              16777217      16777218
#   ReduceMax of 16777217, 1                  16777217      16777216
#   pixels of a class in 4099x4101, counted   16809999      16809984
# Add, Sub, Mul, Max, Min, Where, Neg are exact. ONNX gives these operators integer types, the checker passes, and
# the outputs have the type that was asked for: nothing warns. The sizes of a Shape are not touched.
#
# Why it matters: label maps are put together in the model: class * 2^24 + object, ids of parcels, colours with alpha as
# one number, pixels counted for a report. From 16.8 million on, ids merge (Equal), or are split into wrong parts
# (Div, Mod), and counts of images of more than 16 megapixels are off by a few.
# Remedy: leave such arithmetic to NumPy, behind the model; or split ids into two maps below 2^24.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 openvino==2026.4.1 tract==0.23.9
"$work/venv/bin/python" -W ignore - "$work" <<'EOF'
import sys
import numpy as np, onnxruntime as ort, openvino as ov, tract
from onnx import TensorProto as T, checker, helper as h, numpy_helper as nh

print("openvino", ov.__version__.split("-")[0], "onnxruntime", ort.__version__)
core = ov.Core()


def results(nodes, x, given, out=T.INT32):
    kind = h.np_dtype_to_tensor_dtype(x.dtype)
    graph = h.make_graph(nodes, "ids", [h.make_tensor_value_info("x", kind, [*"HW"[: x.ndim]])],
                         [h.make_tensor_value_info("y", out, [*"ab"[: x.ndim]])], [nh.from_array(v, k) for k, v in given.items()])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=8)
    checker.check_model(model)
    raw, path = model.SerializeToString(), f"{sys.argv[1]}/m.onnx"
    open(path, "wb").write(raw)
    compiled = core.compile_model(core.read_model(raw), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = tract.onnx().load(path).into_model().into_runnable().run([x])[0].to_numpy()
    return [np.ravel(v).tolist() for v in (ort.InferenceSession(raw).run(None, {"x": x})[0], found, compiled(x)[0])]


big, all_axes = 2**24 + 1, np.array([0, 1])
cases = {
    "Equal": (results([h.make_node("Equal", ["x", "k"], ["y"])], np.int32([big, 5]), {"k": np.int32(2**24)}, T.BOOL),
              [False, False], [True, False]),
    "Mod": (results([h.make_node("Mod", ["x", "k"], ["y"])], np.int32([big, 50331651]), {"k": np.int32(3)}),
            [2, 0], [1, -4]),
    "Div": (results([h.make_node("Div", ["x", "k"], ["y"])], np.int32([50331651, 12]), {"k": np.int32(3)}),
            [big, 4], [big + 1, 4]),
    "ReduceMax": (results([h.make_node("ReduceMax", ["x", "k"], ["y"])], np.int32([big, 1]), {"k": np.array([0])}),
                  [big], [2**24]),
    "Add": (results([h.make_node("Add", ["x", "k"], ["y"])], np.int32([big, 1]), {"k": np.int32(2)}),
            [big + 2, 3], [big + 2, 3]),
    "count": (results([h.make_node("Equal", ["x", "k"], ["e"]), h.make_node("Cast", ["e"], ["c"], to=T.INT32),
                       h.make_node("ReduceSum", ["c", "a"], ["y"])], np.ones((4099, 4101), np.uint8),
                      {"k": np.uint8(1), "a": all_axes}), [16809999], [16809984]),
}
for name, ((onnxruntime, other, openvino), exact, seen) in cases.items():
    print(f"{name:10} onnxruntime {onnxruntime}, tract {other}, openvino {openvino}")
    if onnxruntime != exact or other != exact or openvino != seen:
        sys.exit(f"not seen any more: {name} is {openvino} in OpenVINO")
EOF

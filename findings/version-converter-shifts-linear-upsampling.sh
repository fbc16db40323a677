#!/usr/bin/env bash
# onnx's version converter moves every bilinear upsampling of an old model by half a cell.
#
# Seen with onnx 1.23.2, run by onnxruntime 1.32.0. Upsample (opset 7 to 9) and Resize of opset 10 read cells from the
# corner (what is called "asymmetric" since opset 11). convert_version(model, 11 or newer) writes a Resize without
# coordinate_transformation_mode, whose default is half_pixel. For linear interpolation that is another result:
#   linear, 2x    the map differs by 1.3 where its range is 4.4, 27 % of the labels change; a ramp 0 1 2 3 becomes
#                 0 .25 .75 1.25 ... instead of 0 .5 1 1.5 ...
#   nearest, 2x   equal, which is why tests with nearest pass
# No error, no warning; the checker passes. Downsampling by 0.5 differs as well.
#
# Why it matters: old segmentation networks are full of linear Upsample, and tools ask for opset 13 or newer. The score
# map shifts by half a coarse cell: at a factor of 8, four pixels along every border between classes.
# Remedy: after converting from below opset 11, write "asymmetric" (and nearest_mode "floor") into every Resize.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$work/venv/bin/python" - <<'EOF'
import sys
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper, version_converter

print("onnx", onnx.__version__, "onnxruntime", ort.__version__)


def upsampling(opset, operator, mode, factor):
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "scales"], ["y"], mode=mode)],
        "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, "H", "W"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, "H2", "W2"])],
        [numpy_helper.from_array(np.float32([1, 1, factor, factor]), "scales")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    onnx.checker.check_model(model)
    return model


def run(model, x):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


scores = np.random.default_rng(0).standard_normal((1, 4, 6, 8)).astype(np.float32)
ramp = np.broadcast_to(np.arange(4, dtype=np.float32), (1, 4, 4, 4)).copy()
differ = {}
for opset, operator in ((9, "Upsample"), (10, "Resize")):
    for mode, factor in (("nearest", 2), ("linear", 2), ("linear", 0.5)):
        if operator == "Upsample" and factor < 1:
            continue
        old = upsampling(opset, operator, mode, factor)
        new = version_converter.convert_version(old, 18)
        onnx.checker.check_model(new, full_check=True)
        off = float(abs(run(old, scores) - run(new, scores)).max())
        differ[operator, mode, factor] = off
        print(f"{operator} {opset} -> Resize 18, {mode} x{factor}: largest difference {off:.3f}", end="")
        print(f" of a range of {np.ptp(scores):.1f}; labels changed "
              f"{np.mean(run(old, scores).argmax(1) != run(new, scores).argmax(1)):.1%}")
old = upsampling(9, "Upsample", "linear", 2)
print("a ramp, before", run(old, ramp)[0, 0, 0], "after", run(version_converter.convert_version(old, 18), ramp)[0, 0, 0])
linear = [off for (_, mode, _), off in differ.items() if mode == "linear"]
if min(linear) < 0.1 or differ["Upsample", "nearest", 2] > 1e-6:
    sys.exit("not seen any more: the converter keeps where linear Upsample reads its cells")
EOF

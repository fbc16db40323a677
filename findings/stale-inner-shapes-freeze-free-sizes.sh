#!/usr/bin/env bash
# A network with free height and width answers at its old size, because shapes noted inside the file are believed.
#
# Seen with onnx 1.23.2, onnxruntime 1.32.0, onnxslim 0.1.98, onnxsim 0.8.1, onnxscript 0.7.2, onnx-graphsurgeon 0.6.1.
# A model of a fixed 64x64 went through shape inference, then its input and output were given free sizes: the common way
# to "make it dynamic". The shapes of the tensors between (value_info) still say 32x32. The checker, with full_check,
# passes. At 32x48 the feature map that a Resize should give is 16x24:
#   onnxruntime, optimisation off; the reference evaluator; OpenVINO and OpenCV likewise     1x4x16x24
#   onnxruntime as it runs by default (BASIC and above)                                      1x4x32x32, no warning
#   after onnxslim, onnxsim, onnxscript's optimizer or graphsurgeon's fold_constants         1x4x32x32, for good
# Constant folding takes Shape from the noted shape and makes a constant of it.
#
# Why it matters: every way of freeing a static segmentation network by hand edits the ends of the graph. Labels come out
# at a size that is not the image's, and which tool errs first decides whether removing value_info still helps.
# Remedy: clear graph.value_info before anything else reads the model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 onnxslim==0.1.98 \
    onnxsim==0.8.1 onnxscript==0.7.2 onnx-graphsurgeon==0.6.1
"$work/venv/bin/python" - <<'EOF'
import copy, sys
import numpy as np, onnx, onnxruntime as ort, onnxscript, onnxsim, onnxslim
import onnx_graphsurgeon as gs
import onnxscript.optimizer
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "onnxslim", onnxslim.__version__,
      "onnxsim", onnxsim.__version__, "onnxscript", onnxscript.__version__, "onnx-graphsurgeon", gs.__version__)
node = helper.make_node
weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
graph = helper.make_graph(
    [
        node("Conv", ["image", "w"], ["fine"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("MaxPool", ["fine"], ["coarse"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", ["fine"], ["size"]),
        node("Resize", ["coarse", "", "", "size"], ["scores"], mode="linear"),
    ],
    "static",
    [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 64, 64])],
    [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 4, 32, 32])],
    [numpy_helper.from_array(weight, "w")],
)
model = onnx.shape_inference.infer_shapes(
    helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
)
for value in (*model.graph.input, *model.graph.output):  # sizes freed at both ends
    for axis, letter in ((2, "H"), (3, "W")):
        value.type.tensor_type.shape.dim[axis].dim_param = f"{letter}_{value.name}"
onnx.checker.check_model(model, full_check=True)
image = np.zeros((1, 3, 32, 48), np.float32)


def run(of, optimise):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(of.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"image": image}
    )[0].shape


cleared = copy.deepcopy(model)
del cleared.graph.value_info[:]
shapes = {
    "reference evaluator": ReferenceEvaluator(model).run(None, {"image": image})[0].shape,
    "onnxruntime, optimisation off": run(model, False),
    "onnxruntime, default": run(model, True),
    "onnxruntime, default, value_info cleared": run(cleared, True),
    "onnxslim, then optimisation off": run(onnxslim.slim(copy.deepcopy(model)), False),
    "onnxsim, then optimisation off": run(onnxsim.simplify(model)[0], False),
    "onnxscript optimizer, then optimisation off": run(onnxscript.optimizer.optimize(copy.deepcopy(model)), False),
    "graphsurgeon fold_constants, then optimisation off": run(
        gs.export_onnx(gs.import_onnx(model).fold_constants().cleanup()), False
    ),
}
for who, shape in shapes.items():
    print(f"{who:52} {shape}")
right, wrong = (1, 4, 16, 24), (1, 4, 32, 32)
if [shape for shape in shapes.values()] != [right, right, wrong, right, wrong, wrong, wrong, wrong]:
    sys.exit("not seen any more: stale value_info no longer freezes sizes in all of these tools")
EOF

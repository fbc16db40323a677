#!/usr/bin/env bash
# onnxscript's version converter stamps an old model as opset 18 without converting it.
#
# Seen with onnxscript 0.7.2, onnx-ir 1.1.0, onnx 1.23.2, onnxruntime 1.32.0. convert_version(model of opset 11, 18), with
# its default, changes the number and leaves the nodes as they were:
#   Softmax axis=1 on NxCxHxW    valid before and after; over C*H*W before, over C after: other values, no error
#   Split in two, ReduceMean     refused by the runtime afterwards, as their attributes became inputs in between
# With fallback=True, onnx's own converter is used and writes Shape, Flatten, Softmax, Reshape: equal. A target below 18 is
# refused with a message; a source below 18 is not.
#
# Why it matters: it is the converter that torch's exporter and the newer tools build on. What fails to load is found at
# once; attention maps and probabilities of an old segmentation network change without a sign.
# Remedy: onnx.version_converter (or fallback=True) up to opset 18, and compare scores, not labels, before and after.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    onnxscript==0.7.2 onnx-ir==1.1.0
"$work/venv/bin/python" - <<'EOF'
import logging, sys
import numpy as np, onnx, onnx_ir, onnxruntime as ort, onnxscript, onnxscript.version_converter
from onnx import TensorProto, helper

logging.disable(logging.WARNING)
print("onnxscript", onnxscript.__version__, "onnx-ir", onnx_ir.__version__, "onnx", onnx.__version__,
      "onnxruntime", ort.__version__)
x = np.random.default_rng(0).standard_normal((1, 4, 6, 8)).astype(np.float32)


def network(operator, outputs, **attributes):
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], outputs, **attributes)], "old",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4) for name in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def converted(model, **options):
    model = onnx_ir.from_proto(model)
    onnxscript.version_converter.convert_version(model, 18, **options)
    return onnx_ir.to_proto(model)


old = network("Softmax", ["y"], axis=1)
new, right = converted(old), converted(old, fallback=True)
off = {"default": abs(run(new) - run(old)).max(), "fallback=True": abs(run(right) - run(old)).max()}
for title, model in (("default", new), ("fallback=True", right)):
    onnx.checker.check_model(model, full_check=True)
    print(f"Softmax 11 -> {model.opset_import[0].version}, {title}: {[node.op_type for node in model.graph.node]}, "
          f"largest difference {off[title]:.3f}")
refused = 0
for operator, outputs, attributes in (("Split", ["y", "z"], {"axis": 1}), ("ReduceMean", ["y"], {"axes": [2, 3], "keepdims": 1})):
    model = converted(network(operator, outputs, **attributes))
    try:
        run(model)
    except Exception as error:
        refused += 1
        print(f"{operator} 11 -> {model.opset_import[0].version}, default: refused: {str(error).splitlines()[0][:110]}")
if off["default"] < 0.1 or off["fallback=True"] > 1e-6 or refused != 2:
    sys.exit("not seen any more: an old model is converted, or refused, by onnxscript's version converter")
EOF

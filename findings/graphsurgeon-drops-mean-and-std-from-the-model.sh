#!/usr/bin/env bash
# onnx-graphsurgeon and onnx.utils.extract_model lose a model's metadata: mean, std and class names are gone.
#
# Seen with onnx-graphsurgeon 0.6.1, onnx 1.23.2, onnxruntime 1.32.0, onnxslim 0.1.98, onnxsim 0.8.1. A model that carries
# its normalisation in metadata_props (where exporters, detectors' tools and GIS plug-ins keep it) is read and written
# back without any change:
#   graphsurgeon import_onnx, export_onnx    no metadata_props, no doc strings
#   onnx.utils.extract_model                 no metadata_props, no doc string
#   onnxslim, onnxsim, onnx.version_converter, onnx.compose, onnxruntime's quantiser     kept
# There is no warning, and the graph itself is right, so the result passes every numerical comparison.
#
# Why it matters: those two are what people cut heads off and fold constants with before TensorRT. The program that reads
# the result normalises by its defaults instead, and a segmentation network loses part of its mIoU with no error anywhere.
# Remedy: carry metadata_props over by hand; a program that reads models should say aloud which normalisation it assumes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0 \
    onnx-graphsurgeon==0.6.1 onnxslim==0.1.98 onnxsim==0.8.1 sympy==1.14.0
"$work/venv/bin/python" - "$work" <<'EOF'
import copy, logging, sys
import numpy as np, onnx, onnx.compose, onnx.utils, onnxruntime as ort, onnxsim, onnxslim
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnxruntime.quantization import CalibrationDataReader, quantize_static

logging.disable(logging.WARNING)
print("onnx", onnx.__version__, "onnxruntime", ort.__version__, "onnx-graphsurgeon", gs.__version__,
      "onnxslim", onnxslim.__version__, "onnxsim", onnxsim.__version__)


def network(name):
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Conv", [f"{name}x", "w"], ["c"], pads=[1] * 4, name="conv"),
         helper.make_node("Relu", ["c"], [f"{name}y"], name="relu")],
        "net", [helper.make_tensor_value_info(f"{name}x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info(f"{name}y", TensorProto.FLOAT, ["N", 4, "H", "W"])],
        [numpy_helper.from_array(weight, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


model = network("")
helper.set_model_props(model, {"mean": "123.675,116.28,103.53", "std": "58.4,57.12,57.38"})
onnx.checker.check_model(model, full_check=True)
source, target = sys.argv[1] + "/a.onnx", sys.argv[1] + "/b.onnx"
onnx.save(model, source)


class Photographs(CalibrationDataReader):
    def __init__(self):
        self.left = iter([{"x": np.random.default_rng(0).random((1, 3, 8, 8)).astype(np.float32)}])

    def get_next(self):
        return next(self.left, None)


def extracted():
    onnx.utils.extract_model(source, target, ["x"], ["y"])
    return onnx.load(target)


def quantised():
    quantize_static(source, target, Photographs())
    return onnx.load(target)


def merged():
    head = onnx.compose.add_prefix(network("head_"), "b_")
    head.graph.node[0].input[1] = "b_w"
    del head.graph.node[0]
    head.graph.node[0].input[0] = head.graph.input[0].name
    head.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 4
    return onnx.compose.merge_models(model, head, io_map=[("y", head.graph.input[0].name)])


def run(of, x):
    return ort.InferenceSession(of.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


tools = {
    "onnx-graphsurgeon": lambda: gs.export_onnx(gs.import_onnx(model)),
    "onnx.utils.extract_model": extracted,
    "onnxslim": lambda: onnxslim.slim(copy.deepcopy(model)),
    "onnxsim": lambda: onnxsim.simplify(model)[0],
    "onnx.version_converter": lambda: version_converter.convert_version(model, 20),
    "onnx.compose.merge_models": merged,
    "onnxruntime quantize_static": quantised,
}
kept = {}
x = np.random.default_rng(1).random((1, 3, 8, 8)).astype(np.float32)
for title, tool in tools.items():
    result = tool()
    found = {entry.key: entry.value for entry in result.metadata_props}
    kept[title] = "mean" in found and "std" in found
    print(f"{title:28} mean and std: {'kept' if kept[title] else 'gone'}; "
          f"largest difference of the scores {abs(run(result, x) - run(model, x)).max():.1e}")
if kept.pop("onnx-graphsurgeon") or kept.pop("onnx.utils.extract_model"):
    sys.exit("not seen any more: graphsurgeon or extract_model keeps metadata_props")
if not all(kept.values()):
    sys.exit("not seen any more: of the others, some lose metadata_props now")
EOF

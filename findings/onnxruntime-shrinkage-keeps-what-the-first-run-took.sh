#!/usr/bin/env bash
# ONNX Runtime's arena never gives back the first memory that it took: shrinkage after a large first run gives nothing.
#
# Seen with onnxruntime 1.32.0 (onnx 1.23.2) on Linux: anonymous memory over that of the open session, MB, of a convolution
# to 16 channels. Each session runs 2000x2000 pixels, then 64x64 with memory.enable_memory_arena_shrinkage = cpu:0:
#                                            after 2000x2000   after shrinkage
#   2000x2000 is the session's first run           516               516
#   64x64 was run before                           517                 1
#
# Why it matters: a service that shrinks its arena after unusually large inputs, as the documentation advises, holds the
# memory of the very first input for ever, so that what it holds depends on which request happened to come first.
# Remedy: one run of the smallest input when a session is opened (warming up with the largest is the worst that can be
# done), or arena_extend_strategy kSameAsRequested, whose first region is given back, and which takes more by itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cat > "$work/held.py" <<'PY'
import sys
import numpy as np, onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

nodes = [helper.make_node("Conv", ["x", "w"], ["a"], pads=[1] * 4), helper.make_node("Relu", ["a"], ["b"]),
         helper.make_node("ReduceMean", ["b"], ["y"], axes=[1, 2, 3], keepdims=0)]
graph = helper.make_graph(nodes, "net", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, "H", "W"])],
                          [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
                          [numpy_helper.from_array(np.ones((16, 3, 3, 3), np.float32), "w")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
options = ort.SessionOptions()
options.enable_mem_pattern, options.intra_op_num_threads = False, 1
session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
small, large = (np.ones((1, 3, side, side), np.float32) for side in (64, 2000))
held = lambda: next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = held()
if sys.argv[1] == "small":
    session.run(None, {"x": small})
session.run(None, {"x": large})
after = held()
shrink = ort.RunOptions()
shrink.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
session.run(None, {"x": small}, shrink)
print(round(after - before), round(held() - before))
PY
"$work/venv/bin/python" - "$work/held.py" <<'PY'
import subprocess, sys
import onnxruntime
print("onnxruntime", onnxruntime.__version__)
held = {}
for first in ("large", "small"):
    words = [sys.executable, sys.argv[1], first]
    held[first] = [int(word) for word in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()]
    print(f"{first} image first: {held[first][0]} MB after the large one, {held[first][1]} MB after shrinkage")
if not (held["large"][1] > 0.8 * held["large"][0] and held["small"][1] < 0.2 * held["small"][0]):
    sys.exit("not seen any more: what is given back does not depend on the first run")
PY

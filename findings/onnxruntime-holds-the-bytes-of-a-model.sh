#!/usr/bin/env bash
# ONNX Runtime's Python session holds the bytes that it was opened from as long as it lives, as much as its weights again.
#
# Seen with onnxruntime 1.32.0 (onnx 1.23.2) on Linux: anonymous memory of an open session, MB, of a product with a matrix
# of 64 MB, when the caller has let go of the bytes:
#   opened from a path    opened from bytes    the same, its private _model_bytes set to None
#           67                  132                                67
#
# Why it matters: models that come out of archives, databases and object stores are opened from bytes, and take twice the
# memory; no option prevents it. They are there to open the session anew if set_providers() or the fallback asks for it.
# Remedy: a path; or disable_fallback() and _model_bytes = None, where providers are never changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
cat > "$work/make.py" <<'PY'
import sys
import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4096, 4096)).astype(np.float32), "w")
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "net",
                          [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4096])],
                          [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4096])], [weights])
save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), sys.argv[1])
PY
cat > "$work/held.py" <<'PY'
import ctypes, sys
import onnxruntime as ort

path, how = sys.argv[1:]
held = lambda: next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("RssAnon"))
before = held()
source = path if how == "path" else open(path, "rb").read()
session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
del source
if how == "dropped":
    session._model_bytes = None
ctypes.CDLL("libc.so.6").malloc_trim(0)
print(round(held() - before))
PY
"$work/venv/bin/python" "$work/make.py" "$work/m.onnx"
"$work/venv/bin/python" - "$work/held.py" "$work/m.onnx" <<'PY'
import subprocess, sys
import onnxruntime
print("onnxruntime", onnxruntime.__version__)
held = {}
for how in ("path", "bytes", "dropped"):
    words = [sys.executable, *sys.argv[1:], how]
    held[how] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    print(f"{how}: {held[how]} MB")
if not (held["bytes"] > held["path"] + 55 and held["dropped"] < held["path"] + 10):
    sys.exit("not seen any more: a session does not hold the bytes that it was opened from")
PY

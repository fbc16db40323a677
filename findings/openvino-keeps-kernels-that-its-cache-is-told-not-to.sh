#!/usr/bin/env bash
# OpenVINO keeps the kernels of sizes that are gone, though CPU_RUNTIME_CACHE_CAPACITY is 0 and release_memory() was called.
#
# Seen with openvino 2026.4.1 on Linux, x86-64: anonymous memory over that of the compiled network after 64x64 pixels, MB,
# of 40 convolutions, run at 48 more sizes with that capacity, then release_memory() and malloc_trim():
#   as it comes    with ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 in the environment
#       14                       3
# They are in oneDNN's own cache of 1024 primitives for all of the process, of which no property of OpenVINO speaks; a
# network of 58 layers (EfficientNet-Lite0 FCN-8s) had 60 MB in it.
#
# Why it matters: who bounds memory over changing sizes by the documented property stays over the bound, for good: nothing
# gives this memory back before the process ends.
# Remedy: that variable, set before OpenVINO first runs anything; networks that come back to a size are then as fast as
# CPU_RUNTIME_CACHE_CAPACITY makes them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 openvino==2026.4.1
cat > "$work/held.py" <<'PY'
import ctypes
import numpy as np, openvino as ov, openvino.opset13 as op

image = op.parameter([1, 8, -1, -1], np.float32)
made, random = image.output(0), np.random.default_rng(0)
for layer in range(40):
    side = 1 + 2 * (layer % 3)
    weights = op.constant(random.normal(size=(8, 8, side, side)).astype(np.float32))
    made = op.relu(op.convolution(made, weights, [1, 1], [side // 2] * 2, [side // 2] * 2, [1, 1])).output(0)
options = {"CPU_RUNTIME_CACHE_CAPACITY": "0", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
network = ov.Core().compile_model(ov.Model([made], [image]), "CPU", options)

def held():
    network.release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("RssAnon"))

request = network.create_infer_request()
def run(side):
    request.infer([np.ones((1, 8, side, side), np.float32)])

run(64)
before = held()
for side in range(66, 66 + 2 * 48, 2):
    run(side)
run(64)
print(round(held() - before))
PY
"$work/venv/bin/python" - "$work/held.py" <<'PY'
import os, subprocess, sys
kept = {}
for name, more in (("as it comes", {}), ("without oneDNN's cache", {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"})):
    done = subprocess.run([sys.executable, sys.argv[1]], env={**os.environ, **more}, capture_output=True, text=True, check=True)
    kept[name] = int(done.stdout)
    print(f"{name}: {kept[name]} MB more after 48 sizes")
if not kept["as it comes"] > 5 + 2 * kept["without oneDNN's cache"]:
    sys.exit("not seen any more: kernels of sizes that are gone are not kept")
PY

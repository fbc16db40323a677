#!/usr/bin/env bash
# Triton's Python backend hands a model the first pixel repeated, in place of the image, where NumPy 2 is installed.
#
# Seen with Triton 2.51 (nvidia-pytriton 0.7.0, of PyPI) and numpy 2.4.6; right with 1.26.4. The stub was built before
# NumPy 2, in whose array descriptors the size of an item lies elsewhere, and it reads 0 for it. A request of the values
# 5 to 64 to a model that gives their sum as float64 in a text:
#   numpy 1.26.4   2070, of values 5 to 64
#   numpy 2.4.6    300, of values 5 to 5: 60 times the first; shape and dtype are right
# (Arrays that go out have no bytes, with status 200; so the sum goes out in a text of one word here.)
#
# Why it matters: an input of the right shape and type passes every check that a model makes, and what it answers is
# that of a plain surface. Nothing is logged, and the server says that it is ready.
# Remedy: numpy<2 where the stub's Python looks. Ask at start whether a tensor reads back as it was:
#   Tensor.from_dlpack("probe", Tensor("probe", array).to_dlpack()).as_numpy()
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check 'tritonclient[http]==2.62.0'
for version in 1.26.4 2.4.6; do
  "$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$work/numpy-$version" "numpy==$version"
done
"$work/venv/bin/pip" download --quiet --disable-pip-version-check --no-deps -d "$work" nvidia-pytriton==0.7.0
"$work/venv/bin/python" -m zipfile -e "$work"/nvidia_pytriton-*.whl "$work/wheel"
"$work/venv/bin/python" - "$work" <<'EOF'
import os, shutil, socket, subprocess, sys, sysconfig, time
from pathlib import Path
import numpy as np, tritonclient.http as http

work = Path(sys.argv[1])
server = work / "wheel/pytriton/tritonserver"
stub = server / "python_backend_stubs/{}.{}/triton_python_backend_stub".format(*sys.version_info)
shutil.copy(stub, server / "backends/python")
for program in (server / "backends/python" / stub.name, server / "bin/tritonserver"):
    program.chmod(0o755)
model = work / "models/sum"
(model / "1").mkdir(parents=True)
(model / "config.pbtxt").write_text(
    'name: "sum" backend: "python" max_batch_size: 0\n'
    'input [ { name: "image", data_type: TYPE_UINT8, dims: [ -1, -1, 3 ] } ]\n'
    'output [ { name: "none", data_type: TYPE_UINT8, dims: [ 1 ] } ]\n')
CODE = """
import sys
sys.path.insert(0, {packages!r})
class TritonPythonModel:
    def execute(self, requests):
        import numpy, triton_python_backend_utils as pb
        x = pb.get_input_tensor_by_name(requests[0], "image").as_numpy()
        said = f"numpy {{numpy.__version__}}: {{x.dtype}} {{x.shape}}, values {{x.min()}} to {{x.max()}}, sum {{x.sum()}}"
        return [pb.InferenceResponse(output_tensors=[], error=pb.TritonError(said))]
"""
image = np.arange(5, 65, dtype=np.uint8).reshape(4, 5, 3)
said = {}
for version in ("1.26.4", "2.4.6"):
    (model / "1/model.py").write_text(CODE.format(packages=str(work / f"numpy-{version}")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = [sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
    words = ["--allow-grpc=false", "--allow-metrics=false", "--http-address=127.0.0.1", f"--http-port={port}"]
    running = subprocess.Popen(
        [server / "bin/tritonserver", f"--model-repository={work / 'models'}", f"--backend-directory={server / 'backends'}",
         *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"LD_LIBRARY_PATH": ":".join(filter(None, paths))})
    client = http.InferenceServerClient(f"127.0.0.1:{port}")
    for _ in range(600):
        try:
            if client.is_server_ready():
                break
        except OSError:
            pass
        time.sleep(0.1)
    given = http.InferInput("image", image.shape, "UINT8")
    given.set_data_from_numpy(image)
    try:
        client.infer("sum", [given])
    except http.InferenceServerException as error:
        said[version] = str(error)
    client.close()
    running.terminate()
    running.wait()
    print(said.get(version))
print("sent: uint8", image.shape, f"values {image.min()} to {image.max()}, sum {image.sum()}")
right, wrong = (f"sum {value}" in said.get(version, "") for version, value in (("1.26.4", 2070), ("2.4.6", 300)))
if not (right and wrong):
    sys.exit("this server reads arrays otherwise now")
EOF

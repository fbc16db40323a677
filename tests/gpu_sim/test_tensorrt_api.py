"""TensorRT's API as it really is: NVIDIA's own bindings of several versions have every name that we use."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata

import onnx
import pytest
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.importer.import_model import import_model
from gpu_engines import ROOT
from helpers import needs

from gpu_sim import build, signatures

# Where TensorRT is called.
SOURCES = (
    "runtime/backends/tensorrt/device_network.py",
    "runtime/backends/tensorrt/device.py",
    "export/build/targets/tensorrt/process.py",
    "export/build/targets/tensorrt/timing_cache.py",
)
# Called where a library has it, and only there.
RTX_ALONE = {
    "create_runtime_config", "create_runtime_cache", "set_runtime_cache", "deserialize", "num_compute_capabilities",
    "ComputeCapability", "set_compute_capability", "cuda_graph_strategy", "CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE",
    "NONE", "EAGER", "DynamicShapesKernelSpecializationStrategy", "dynamic_shapes_kernel_specialization_strategy",
    "set_execution_context_allocation_strategy", "DISABLED", "is_stream_capturable",
}  # fmt: skip
WHEELS = {
    "10.12": "tensorrt-cu12-bindings==10.12.0.36",
    "10": "tensorrt-cu13-bindings<11",
    "11": "tensorrt-cu13-bindings",
}


def used_names():
    """Attributes that the sources take of anything."""
    trees = [ast.parse((ROOT / source).read_text()) for source in SOURCES]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def in_its_own_process(*words):
    needs("tensorrt_rtx")
    files = {file.name: file.locate() for file in metadata.files("tensorrt_rtx_cu13_libs") or []}
    rtx = {"RTX_LIBRARY": "libtensorrt_rtx.so.1", "RTX_PARSER": "libtensorrt_onnxparser_rtx.so.1"}
    environment = os.environ | {name: str(files[file]) for name, file in rtx.items()}
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "gpu_sim" / "real_bindings.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
    """Version → (folder of the bindings, folder of the libraries that they are linked to)."""
    compiler = shutil.which("cc") or pytest.skip("a C compiler is missing; install gcc")
    found = {}
    for version, requirement in WHEELS.items():
        folder = tmp_path_factory.mktemp("bindings")
        done = build.pip("download", "--no-deps", "--dest", str(folder), requirement)
        wheel = next(folder.glob("*.whl"), None)
        if wheel is None:
            pytest.skip(f"{requirement} cannot be fetched ({build.last_line(done.stderr)[:100]}); let pip reach PyPI")
        zipfile.ZipFile(wheel).extractall(folder / "site")
        (folder / "lib").mkdir()
        major = version.split(".")[0]
        for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            name = f"lib{library}.so.{major}"
            source = ROOT / "tests" / "gpu_sim" / "forward.c"
            options = ["-shared", "-fPIC", "-o", folder / "lib" / name, f"-Wl,-soname,{name}", "-ldl"]
            subprocess.run([compiler, source, *options], check=True)
        found[version] = folder / "site", folder / "lib"
    return found


@pytest.fixture(scope="module")
def rtx_api():
    return in_its_own_process("tensorrt_rtx", "-", "api")


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
def test_every_name_that_we_use_is_there_with_the_arguments_that_we_pass(bindings, rtx_api, version):
    """What TensorRT for RTX has of our names, which the builder runs for real, TensorRT has as well."""
    api = in_its_own_process(*bindings[version], "api")
    known = {member for members in rtx_api.values() for member in members} | {*rtx_api}
    used = (used_names() & known) - RTX_ALONE - {*dir(dict), *dir(str), *dir(io.BufferedRandom)}
    assert len(used) > 40  # the names are found at all
    missing = used - {member for members in api.values() for member in members} - {*api}
    assert not missing
    differing = {
        f"{kind}.{member}": (rtx_api[kind][member], api[kind][member])
        for kind in rtx_api.keys() & api.keys()
        for member in used & rtx_api[kind].keys()
        if member in api[kind] and rtx_api[kind][member]
        and not any(overload in api[kind][member] for overload in rtx_api[kind][member])
    }  # fmt: skip
    assert not differing


@pytest.mark.slow
@pytest.mark.parametrize("version", WHEELS)
def test_the_stand_ins_are_made_of_what_the_bindings_say(bindings, version):
    found, kept = in_its_own_process(*bindings[version], "signatures"), signatures.read(version)
    if found["version"] != kept["version"]:  # never of 10.12
        pytest.skip(
            f"{found['version']} is newer than signatures.json's {kept['version']}; README.md says how to renew it"
        )
    assert found == kept


@pytest.mark.slow
def test_our_builder_builds_a_plan_by_the_bindings_of_tensorrt_11(bindings, exports, tmp_path):
    core = optimise_offline(core_of(import_model(exports / "narrow.onnx")).model)
    onnx.save(core, tmp_path / "core.onnx")
    built = in_its_own_process(*bindings["11"], "build", tmp_path / "core.onnx")
    assert built["version"].startswith("11.") and built["bytes"] > 100_000
    assert built["activations"][0] > 0 and built["layers"] >= 50

"""What installs where there is a GPU: extras that resolve, and wheels that bring the libraries that they need."""

import json
import subprocess
import sys
from importlib import metadata

import pytest

from benchmarks.wheels import GPU_EXTRAS, ROOT, contradictions, libraries, needs, requirements, tensorrt_of, used


def test_every_extra_that_runs_on_a_gpu_is_looked_at():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    gpu = ("tensorrt", "nvidia", "cuda", "onnxruntime-gpu", "onnxruntime-ep")
    del extras["dev"]  # has a disassembler
    assert {name for name, items in extras.items() if any(item.startswith(gpu) for item in items)} == set(GPU_EXTRAS)


@pytest.mark.slow
def test_the_extra_that_builds_plans_resolves(tmp_path):
    """The others are gigabytes, which pip fetches to resolve them: `make wheels` does, and fails where one does not."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", report]
    done = subprocess.run([*command, *requirements("rtx")], capture_output=True, text=True)
    if done.returncode and any(word in done.stderr for word in ("NewConnectionError", "No matching distribution")):
        pytest.skip("the package index is out of reach; run this where pip can fetch packages")
    assert done.returncode == 0, done.stderr[-1000:]
    found = {item["metadata"]["name"].replace("_", "-") for item in json.loads(report.read_text())["install"]}
    assert {"tensorrt-rtx-cu13-libs", "cuda-bindings", "nvidia-cuda-nvrtc"} <= found
    assert contradictions(found) == []


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tensorrt-cu13", "nvidia-cuda-nvrtc-cu12"], "CUDA 12 and 13 at once"),
        (["onnxruntime", "onnxruntime-gpu"], "onnxruntime and onnxruntime-gpu overwrite each other"),
    ],
)
def test_packages_that_cannot_be_together_are_said(names, said):
    assert contradictions(names) == [said]


def test_the_wheels_of_rtx_that_are_installed_need_nothing_that_they_do_not_bring():
    wheels = {}
    for name in ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings", "nvidia-cuda-nvrtc", "cuda-bindings"):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed; pip install 'fcn-deploy[rtx]'")
        read = {str(file): file.locate().read_bytes() for file in files if ".so" in file.name}
        wheels[name] = libraries(read)
    assert any(needed for _, needed in wheels.values())
    missing = [need for need in needs(wheels) if not need.provider]
    assert not missing


def test_a_library_that_no_wheel_brings_is_said():
    wheels = {
        "provider": ({"libprovider.so"}, {"libnvinfer.so.10", "libcudart.so.13", "libcuda.so.1", "libc.so.6"}),
        "runtime": ({"libcudart.so.13"}, set()),
    }
    assert {need.library: need.provider for need in needs(wheels)} == {
        "libnvinfer.so.10": "",
        "libcudart.so.13": "runtime",
        "libcuda.so.1": "NVIDIA's driver",
        "libc.so.6": "the system",
    }
    newest = tensorrt_of(["tensorrt_cu13_bindings-11.4.0.106-cp311-none-manylinux_2_28_x86_64.whl"])
    assert [need.library for need in needs(wheels | newest) if not need.provider] == ["libnvinfer.so.10"]
    ten = tensorrt_of(["tensorrt_cu13_bindings-10.16.1.11-cp311-none-manylinux_2_28_x86_64.whl"])
    assert not [need for need in needs(wheels | ten) if not need.provider]
    assert used("ort-cuda", {"libonnxruntime_providers_tensorrt.so": b""}) == {}

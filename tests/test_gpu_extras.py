"""What installs where there is a GPU: extras that resolve, and wheels that bring the libraries that they need."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import pytest

from benchmarks.wheels import GPU_EXTRAS, ROOT, contradictions, libraries, needs, of_wheels, tensorrt_of, used


def test_every_extra_that_runs_on_a_gpu_is_looked_at():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    gpu = ("tensorrt", "nvidia", "cuda", "onnxruntime-gpu", "onnxruntime-ep")
    del extras["dev"]  # has a disassembler
    assert {name for name, items in extras.items() if any(item.startswith(gpu) for item in items)} == set(GPU_EXTRAS)


@pytest.fixture(scope="module")
def resolved(tmp_path_factory):
    """Extra → versions by name of what pip would install; of a pip that fetches no wheels to say so: gigabytes."""
    folder = tmp_path_factory.mktemp("pip")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "--target", folder / "pip", "pip>=25.1"], capture_output=True, text=True)
    if done.returncode and any(word in done.stderr for word in ("NewConnectionError", "No matching distribution")):
        pytest.skip("the package index is out of reach; run this where pip can fetch packages")
    assert done.returncode == 0, done.stderr[-1000:]

    def resolve(extra):
        report = folder / f"{extra}.json"
        command = [*pip, "--dry-run", "--ignore-installed", "--report", report, *of_wheels(extra)]
        newest = os.environ | {"PYTHONPATH": str(folder / "pip")}
        done = subprocess.run(command, capture_output=True, text=True, env=newest)
        assert done.returncode == 0, done.stderr[-1000:]
        items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        return {item["name"].lower().replace("_", "-"): item["version"] for item in items}

    with ThreadPoolExecutor(len(GPU_EXTRAS)) as pool:
        return dict(zip(GPU_EXTRAS, pool.map(resolve, GPU_EXTRAS), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ("rtx", {"tensorrt-rtx-cu13-libs": None, "cuda-bindings": 13, "nvidia-cuda-nvrtc": 13}),
        ("tensorrt", {"tensorrt-cu13-bindings": None, "cuda-bindings": 13, "nvidia-cuda-nvrtc": 13}),
        ("tensorrt-cu12", {"tensorrt-cu12-bindings": None, "cuda-bindings": 12, "nvidia-cuda-nvrtc-cu12": 12}),
        ("ort-cuda", {"onnxruntime-gpu": None, "nvidia-cudnn-cu13": 9, "nvidia-cublas": 13}),
        ("ort-tensorrt", {"onnxruntime-gpu": None, "nvidia-cudnn-cu13": 9, "tensorrt-cu13-bindings": 10}),
        ("ort-rtx", {"onnxruntime": None, "onnxruntime-ep-nv-tensorrt-rtx-cu13": None}),
    ],
)
def test_every_extra_for_gpus_resolves_to_what_its_libraries_are_linked_to(resolved, extra, names):
    """Of TensorRT the bindings stand for its libraries, whose wheel fetches them from NVIDIA as it installs."""
    found = resolved[extra]
    for name, major in names.items():
        assert name in found and (major is None or found[name].split(".")[0] == str(major)), name
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

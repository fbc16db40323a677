"""ONNX Runtime's GPU providers, by stand-ins for their wheels: what is loaded first, and what is said where not."""

import re
import sys
import types

import numpy as np
import onnxruntime
import pytest
from fcn_deploy.runtime.backends import ORT_TARGETS, onnxruntime_gpu
from fcn_deploy.runtime.backends.onnxruntime import OnnxRuntimeSession, session
from fcn_deploy.runtime.backends.onnxruntime_gpu import PLUGIN, gpu_providers, not_loaded, plugin_devices

from fcn_deploy import DeployError, MisuseError


@pytest.fixture
def with_gpu(monkeypatch):
    """An onnxruntime that says it has every provider; the names of what was called."""
    called = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*ORT_TARGETS.values()])
    monkeypatch.setattr(
        onnxruntime, "preload_dlls", lambda: (print("a library was not found"), called.append("preload")), raising=False
    )
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    return called


def test_cudas_libraries_are_loaded_before_the_session_and_nothing_is_printed(with_gpu, capsys):
    assert gpu_providers("ort-cuda", 1, "m.engine") == [
        ("CUDAExecutionProvider", {"device_id": 1}),
        "CPUExecutionProvider",
    ]
    assert with_gpu == ["preload"] and capsys.readouterr().out == ""


def test_the_tensorrt_provider_finds_the_library_of_its_wheel_and_falls_back_to_cuda(with_gpu, monkeypatch):
    monkeypatch.setattr(onnxruntime_gpu, "import_module", lambda name: with_gpu.append(name))
    names = [name if isinstance(name, str) else name[0] for name in gpu_providers("ort-tensorrt", 0, "m.engine")]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert with_gpu == ["preload", "tensorrt"]


def test_an_onnxruntime_without_the_provider_names_the_extra(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeployError, match=r"has no CUDAExecutionProvider; run: .*pip install 'fcn-deploy\[ort-cuda\]'"):
        gpu_providers("ort-cuda", 0, "m.engine")


@pytest.mark.parametrize(
    ("target", "missing", "remedy"),
    [
        ("ort-cuda", "libcudnn.so.9", r"pip install 'fcn-deploy\[ort-cuda\]'"),
        ("ort-tensorrt", "libnvinfer.so.10", r"pip install 'fcn-deploy\[ort-tensorrt\]'"),
        ("ort-cuda", "libcuda.so.1", "install NVIDIA's driver"),
    ],
)
def test_a_provider_that_cannot_be_loaded_names_the_library_it_lacks(monkeypatch, target, missing, remedy):
    def load(path, mode=0):
        if "shared" not in path:
            raise OSError(f"{missing}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(onnxruntime_gpu.ctypes, "CDLL", load)
    said = str(not_loaded(target, "m.engine"))
    assert f"cannot be loaded ({missing}: cannot open shared object file" in said and len(said) <= 300
    assert re.search(remedy, said)


def test_a_provider_that_loads_without_a_gpu_says_so(with_gpu, gpu, monkeypatch):
    """ONNX Runtime falls back to the CPU, or refuses the session, as the provider decides."""
    gpu.set_devices(0)
    monkeypatch.setattr(onnxruntime_gpu.ctypes, "CDLL", lambda path, mode=0: gpu.library())
    said = (
        r"cannot be loaded \(there is no GPU that the driver can use: cuInit gives 100\); run it on the GPU's machine"
    )
    with pytest.raises(DeployError, match=said):
        OnnxRuntimeSession(_identity(), target="ort-cuda")

    def refused(*arguments, **words):
        raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refused)
    with pytest.raises(DeployError, match=said):
        OnnxRuntimeSession(_identity(), target="ort-cuda")
    gpu.set_devices(1)
    gpu.set_driver(12040)
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    with pytest.raises(DeployError, match=r"\(the driver here is of CUDA 12.4, and it of CUDA 13\); update the driver"):
        OnnxRuntimeSession(_identity(), target="ort-cuda")
    gpu.set_driver(13000)
    with pytest.raises(DeployError, match="CUDA failure 100"):  # of something else
        OnnxRuntimeSession(_identity(), target="ort-cuda")
    gpu.clear()


def test_a_run_that_fails_on_a_gpu_is_said_and_not_repeated_on_the_cpu(with_gpu, capsys):
    """ONNX Runtime's Python class would start a session on the CPU, print that, and go on there for good."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    opened = session(_identity(), providers=[("CPUExecutionProvider", {})])
    real = opened._sess

    class Failing:
        def run(self, *arguments):
            raise EPFail("CUDA failure 2: out of memory")

        def __getattr__(self, name):
            return getattr(real, name)

    opened._sess = Failing()
    with pytest.raises(EPFail):
        opened.run(["out"], {"image": np.zeros((1, 3, 4, 4), np.float32)})
    assert capsys.readouterr().out == ""


class Plugin:
    """Stands for the package of the provider for TensorRT for RTX, and for what ONNX Runtime knows of plugins."""

    def __init__(self, monkeypatch, gpus, refuses=""):
        self.registered, self.gpus, self.refuses = [], gpus, refuses
        module = types.ModuleType(PLUGIN)
        module.get_ep_name, module.get_library_path = lambda: ORT_TARGETS["ort-rtx"], lambda: "/somewhere/plugin.so"
        monkeypatch.setitem(sys.modules, PLUGIN, module)
        monkeypatch.setattr(onnxruntime, "register_execution_provider_library", self.register, raising=False)
        monkeypatch.setattr(onnxruntime, "get_ep_devices", self.devices, raising=False)

    def register(self, name, path):
        if self.refuses:
            raise RuntimeError(self.refuses)
        assert not self.registered, "a name is registered once"
        self.registered.append((name, path))

    def devices(self):
        found = [types.SimpleNamespace(ep_name="CPUExecutionProvider")]
        if self.registered:
            found += [types.SimpleNamespace(ep_name=ORT_TARGETS["ort-rtx"], number=n) for n in range(self.gpus)]
        return found


def test_the_rtx_plugin_is_registered_once_and_gives_the_gpu_asked_for(monkeypatch):
    plugin = Plugin(monkeypatch, 2)
    assert [plugin_devices(number, "m.engine")[0].number for number in (0, 1, 0)] == [0, 1, 0]
    assert plugin.registered == [("NvTensorRTRTXExecutionProvider", "/somewhere/plugin.so")]
    with pytest.raises(MisuseError, match=r"cuda:2: NvTensorRTRTXExecutionProvider offers 2 GPUs here"):
        plugin_devices(2, "m.engine")


def test_an_ort_rtx_session_is_opened_on_the_plugins_device(monkeypatch):
    Plugin(monkeypatch, 1)
    added = []

    class Options(onnxruntime.SessionOptions):
        def add_provider_for_devices(self, devices, options):
            added.append((devices[0].ep_name, options))

    monkeypatch.setattr(onnxruntime, "SessionOptions", Options)
    run = OnnxRuntimeSession(_identity(), target="ort-rtx")
    assert added == [("NvTensorRTRTXExecutionProvider", {})]
    assert run.name == "onnxruntime, NvTensorRTRTXExecutionProvider"


@pytest.mark.parametrize(
    ("gpus", "refuses", "said"),
    [
        (0, "", r"takes no GPU here; it wants an RTX GPU \(compute capability 8.0 or newer\)"),
        (0, "Failed to load: libcuda.so.1: cannot open shared object file", "no NVIDIA driver is installed here"),
        (0, "a symbol is missing", r"its provider cannot be loaded \(a symbol is missing\)"),
    ],
)
def test_an_rtx_plugin_that_cannot_serve_says_why(monkeypatch, gpus, refuses, said):
    Plugin(monkeypatch, gpus, refuses)
    with pytest.raises(DeployError, match=said):
        plugin_devices(0, "m.engine")


def test_the_missing_rtx_plugin_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with pytest.raises(DeployError, match=r"not installed; run: pip install 'fcn-deploy\[ort-rtx\]'"):
        plugin_devices(0, "m.engine")


def _identity():
    from onnx import TensorProto, helper

    image, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in ("image", "out"))
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["out"])], "same", [image], [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()

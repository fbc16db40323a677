"""A GPU that others in the same process use too: another Segmenter, a framework on the default stream."""

import re
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.runtime.backends.tensorrt import device
from fcn_deploy.runtime.backends.tensorrt.cuda_graphs import Graph
from fcn_deploy.runtime.backends.tensorrt.device import cache_path, logger_of, open_library
from fcn_deploy.runtime.engine_format.manifest import GpuPlan, Profile
from helpers import needs, photo

from fcn_deploy import DeployError, Segmenter


def captured(net):
    lanes = net.network.backend.lanes
    return [batch for lane in lanes for batch, graph in lane.graphs.items() if isinstance(graph, Graph)]


def during_capture(monkeypatch, net, action, times=1):
    """Do something in another thread while the Segmenter captures a graph, so many times."""
    network, done = net.network.backend.network, []
    real = network.execute

    def execute(context, stream):
        import gpu_sim

        if gpu_sim.library().gpusim_stream(stream.handle) == 1 and len(done) < times:
            done.append(None)
            thread = threading.Thread(target=action)
            thread.start()
            thread.join(20)
        real(context, stream)

    monkeypatch.setattr(network, "execute", execute)
    return done


def test_a_segmenter_labels_while_another_captures_a_graph(tensorrt_engine, gpu, monkeypatch):
    image, found = photo(60, 90), []
    with Segmenter(tensorrt_engine) as one, Segmenter(tensorrt_engine) as other:
        expected = other(image)
        done = during_capture(monkeypatch, one, lambda: found.append(other(image)))
        for _ in range(4):
            np.testing.assert_array_equal(one(image), expected)
        np.testing.assert_array_equal(found[0], expected)
        assert done and captured(one) and not gpu.misuse()


def test_closing_or_opening_a_segmenter_leaves_another_ones_capture_alone(tensorrt_engine, gpu, monkeypatch):
    image = photo(60, 90)
    other = Segmenter(tensorrt_engine)
    other(image)

    def replaced():
        other.close()
        with Segmenter(tensorrt_engine) as third:
            third(image)

    with Segmenter(tensorrt_engine) as net:
        done = during_capture(monkeypatch, net, replaced)
        for _ in range(4):
            net(image)
        assert done and captured(net) and not gpu.misuse()


def test_a_framework_on_the_default_stream_works_beside_a_capture(tensorrt_engine, gpu, monkeypatch):
    import pycuda.driver as cuda

    context = cuda.Device(0).retain_primary_context()
    copied, image = np.zeros(100, np.uint8), photo(60, 90)

    def framework():
        context.push()
        try:
            memory = cuda.mem_alloc(100)
            cuda.memcpy_htod(memory, np.full(100, 7, np.uint8))  # on the legacy null stream, and waits for it
            cuda.memcpy_dtoh(copied, memory)
            memory.free()
        finally:
            cuda.Context.pop()

    with Segmenter(tensorrt_engine) as net:
        done = during_capture(monkeypatch, net, framework)
        for _ in range(4):
            net(image)
        assert done and captured(net) and (copied == 7).all() and not gpu.misuse()
    context.detach()


def test_a_capture_that_another_library_spoils_is_tried_again_and_said(tensorrt_engine, gpu, monkeypatch, caplog):
    import pycuda.driver as cuda

    context = cuda.Device(0).retain_primary_context()

    def synchronising():
        context.push()
        try:
            with pytest.raises(cuda.Error):
                cuda.Context.synchronize()  # the driver refuses it, and ends the capture
        finally:
            cuda.Context.pop()

    image = photo(60, 90)
    caplog.set_level("INFO")
    with Segmenter(tensorrt_engine) as net:
        expected = net(image)
        done = during_capture(monkeypatch, net, synchronising)
        for _ in range(6):
            np.testing.assert_array_equal(net(image), expected)
        assert done and captured(net)
        assert "no CUDA graph could be captured at 64×96 (1 of 3 times)" in caplog.text
    gpu.clear()
    context.detach()


def test_our_calls_do_not_spoil_what_another_thread_captures(tensorrt_engine, gpu):
    """As PyTorch captures: in the global mode, in which other threads may not even allocate."""
    import ctypes

    import pycuda.driver as cuda

    image, driver = photo(60, 90), gpu.library()
    with Segmenter(tensorrt_engine) as net:
        context = cuda.Device(0).retain_primary_context()
        context.push()
        stream, graph = cuda.Stream(1), ctypes.c_void_p()
        handle = ctypes.c_void_p(stream.handle)
        assert driver.cuStreamBeginCapture_v2(handle, 0) == 0
        thread = threading.Thread(target=lambda: net(image))
        thread.start()
        thread.join(20)
        assert driver.cuStreamEndCapture(handle, ctypes.byref(graph)) == 0 and not gpu.misuse()
        driver.cuGraphDestroy(graph)
        del stream
        cuda.Context.pop()
        context.detach()


@pytest.mark.parametrize("refused", ["copy", "kernel"])
def test_an_error_within_a_capture_costs_that_capture_alone(tensorrt_engine, gpu, monkeypatch, caplog, refused):
    image, done = photo(60, 90), []
    caplog.set_level("INFO")
    with Segmenter(tensorrt_engine) as net:
        expected, lane = net(image), net.network.backend.lanes[0]
        cuda, kernels = lane._cuda, lane._kernels

        def failing(real):
            def call(*arguments):
                if gpu.library().gpusim_stream(lane.stream.handle) == 1 and not done:
                    done.append(None)
                    raise cuda.Error("refused")
                return real(*arguments)

            return call

        if refused == "kernel":
            monkeypatch.setattr(kernels, "label", failing(kernels.label))
        else:
            monkeypatch.setattr(cuda, "memcpy_htod_async", failing(cuda.memcpy_htod_async))
        for _ in range(6):
            np.testing.assert_array_equal(net(image), expected)
        assert done and captured(net) and not gpu.misuse()
        assert "no CUDA graph could be captured at 64×96 (1 of 3 times)" in caplog.text


def test_a_network_that_cannot_be_captured_runs_without_graphs(gpu_engine, gpu, monkeypatch, caplog):
    image = photo(60, 90)
    caplog.set_level("INFO")
    with Segmenter(gpu_engine) as net:
        network, expected = net.network.backend.network, net(image)
        monkeypatch.setattr(network, "can_capture", lambda context, stream: False)
        net.warmup([(60, 90)])
        for _ in range(9):
            np.testing.assert_array_equal(net(image), expected)
        assert not captured(net) and not network.captures and "(3 of 3 times)" in caplog.text
        gpu.log()
        np.testing.assert_array_equal(net(image), expected)
        assert len(gpu.calls("gpusim_launch_task")) == 1 and not gpu.calls("cuStreamBeginCapture")
        gpu.log(False)
        if network._config is not None:  # TensorRT for RTX captures the network by itself then
            assert network._config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert not gpu.misuse() and gpu.counts()["allocations"] == 0


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_a_call_that_is_interrupted_leaves_the_engine_usable(tensorrt_engine, gpu, monkeypatch, moment):
    image = photo(60, 90)
    with Segmenter(tensorrt_engine) as net, Segmenter(tensorrt_engine) as other:
        expected = other(image)
        network, calls = net.network.backend.network, []
        real = network.execute

        def execute(context, stream):
            real(context, stream)
            calls.append(None)
            if len(calls) == moment:
                raise KeyboardInterrupt

        monkeypatch.setattr(network, "execute", execute)
        interrupted = 0
        for _ in range(6):
            try:
                np.testing.assert_array_equal(net(image), expected)
            except KeyboardInterrupt:
                interrupted += 1
        # A fourth run comes by the graph, which nothing here interrupts.
        assert interrupted == (moment < 4) and captured(net) and not gpu.misuse()
        np.testing.assert_array_equal(other(image), expected)
    assert gpu.counts()["allocations"] == gpu.counts()["pinned"] == 0


def test_after_warming_up_nothing_is_captured_any_more(tensorrt_engine, gpu):
    with Segmenter(tensorrt_engine) as net:
        net.warmup([(40, 50), (60, 90)])
        assert len(captured(net)) == 4  # in each of two lanes
        gpu.log()
        net(photo(60, 90))
        net(photo(40, 50))
        assert not gpu.calls("cuStreamBeginCapture") and len(gpu.calls("cuGraphLaunch")) == 2
        gpu.log(False)


# TensorRT for RTX


def test_kernels_are_not_specialised_for_every_size(rtx_engine):
    with Segmenter(rtx_engine) as net:
        config = net.network.backend.network._config
        assert config.dynamic_shapes_kernel_specialization_strategy.name == "NONE"


def test_what_was_compiled_is_kept_before_the_segmenter_is_closed(rtx_engine, tmp_path):
    net = Segmenter(rtx_engine)
    net(photo(40, 50))
    (cache,) = (tmp_path / "cache" / "fcn-deploy").iterdir()
    assert cache.stat().st_size > 0
    before = cache.stat().st_mtime_ns
    net(photo(40, 50))
    assert cache.stat().st_mtime_ns == before  # not at every call
    net.close()


def test_a_user_without_a_home_opens_engines(rtx_engine, monkeypatch):
    def homeless(cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(homeless))
    with Segmenter(rtx_engine) as net:
        assert net(photo(40, 50)).shape == (40, 50)
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")  # as the fixture set it
    assert cache_path(b"", _Sm89()) is not None


class _Sm89:
    def compute_capability(self):
        return 8, 9


DRIVER = types.SimpleNamespace(get_driver_version=lambda: 12040)


def test_without_a_driver_one_line_says_so(monkeypatch):
    cuda = pytest.importorskip(
        "fcn_deploy.runtime.backends.tensorrt.cuda_bindings", reason="cuda-bindings is not installed"
    )

    def called(*words):
        raise RuntimeError('"cuda" is an NVIDIA driver library and can only be found via system search. Ensure …')

    monkeypatch.setattr(cuda, "_called", called)
    monkeypatch.setattr(device, "driver_module", lambda: cuda)
    said = r"an engine for sm89, and no NVIDIA GPU can be used here \(no NVIDIA driver is installed here\); run it"
    with pytest.raises(DeployError, match=said):
        device.open_driver("m.engine", ("sm89",))


def test_one_logger_serves_all_engines_of_a_process():
    """TensorRT keeps a pointer to the first that it is given; each thread is told of its own failures, once."""
    rtx = needs("tensorrt_rtx")
    logger = logger_of(rtx)
    assert logger_of(rtx) is logger
    runtimes = [rtx.Runtime(logger) for _ in range(2)]
    assert runtimes[1].deserialize_cuda_engine(b"no plan" * 100) is None
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(logger.said()))
    thread.start()
    thread.join()
    assert elsewhere == ["no reason given"]
    assert logger.said() != "no reason given" and logger.said() == "no reason given"


PLAN = GpuPlan("tensorrt", "10.16.1.11", ("sm89",), (Profile((1, 1), (64, 64), (96, 96)),))


@pytest.mark.parametrize(
    ("built_by", "compatible", "installed", "loads"),
    [
        ("10.16.1.11", False, "10.16.1.12", True), ("10.16.1.11", False, "10.16.2", False),
        ("10.13.0.35", True, "10.16.1.11", True), ("10.16.1.11", True, "11.4.0.106", True),
        ("11.4.0.106", True, "11.3.0.99", False), ("11.0.0.114", True, "10.16.1.11", False),
        ("10.16.1.11", True, "12.0.0", False), ("10.13.3.9.post1", False, "10.13.3.9", True),
    ],
)  # fmt: skip
def test_plans_for_later_versions_are_taken_by_those_alone(monkeypatch, built_by, compatible, installed, loads):
    module = types.ModuleType("tensorrt")
    module.__version__ = installed
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    plan = replace(PLAN, version=built_by, version_compatible=compatible)
    if loads:
        assert open_library(DRIVER, plan, "m.engine") is module
    else:
        with pytest.raises(DeployError, match=f"was built by tensorrt {built_by}, and {installed} is installed"):
            open_library(DRIVER, plan, "m.engine")


@pytest.mark.parametrize(
    ("library", "platform", "runs"),
    [
        ("tensorrt_rtx", "linux-x86_64", True), ("tensorrt_rtx", "windows-x86_64", True),
        ("tensorrt_rtx", "linux-aarch64", False), ("tensorrt", "linux-x86_64", True),
        ("tensorrt", "windows-x86_64", False), ("tensorrt", "", True),
    ],
)  # fmt: skip
def test_a_plan_is_refused_on_a_platform_that_it_is_not_for(gpu, monkeypatch, library, platform, runs):
    import pycuda.driver as cuda
    from fcn_deploy.runtime.backends.tensorrt import device

    monkeypatch.setattr(device, "platform_name", lambda: "linux-x86_64")
    plan = replace(PLAN, library=library, platform=platform)
    if runs:
        assert device.open_device(cuda, 0, plan, "m.engine").name() == "Simulated GPU"
    else:
        with pytest.raises(
            DeployError,
            match=f"has a plan for {platform}, and this is linux-x86_64: it does not run here; run on this machine: "
            "build-engine MODEL.onnx --target cuda",
        ):
            device.open_device(cuda, 0, plan, "m.engine")


@pytest.mark.parametrize(
    ("library", "wheels", "driver", "said"),
    [
        ("tensorrt", ["tensorrt-cu13"], 12040, r"is of CUDA 13 \(tensorrt-cu13\), and the driver here of CUDA 12.4; "
         r"update the driver \(580 or newer\), or run: pip uninstall tensorrt-cu13; pip install "
         r"'fcn-deploy\[tensorrt-cu12\]'$"),
        ("tensorrt_rtx", ["tensorrt-rtx-cu13"], 12080, r"the driver here of CUDA 12.8; update the driver \(580 or "),
        ("tensorrt", ["tensorrt-cu13"], 13000, ""), ("tensorrt", ["tensorrt-cu12"], 12040, ""),
        ("tensorrt", ["tensorrt-cu12", "tensorrt-cu13"], 12040, ""), ("tensorrt", [], 12040, ""),
    ],
)  # fmt: skip
def test_a_wheel_of_a_newer_cuda_than_the_drivers_is_said_with_both_versions(
    monkeypatch, library, wheels, driver, said
):
    from fcn_deploy.runtime.backends.tensorrt import device

    module = types.ModuleType(library)
    module.__version__ = "10.16.1.11"
    monkeypatch.setitem(sys.modules, library, module)
    monkeypatch.setattr(device, "_installed", lambda package: package in wheels)
    cuda, plan = types.SimpleNamespace(get_driver_version=lambda: driver), replace(PLAN, library=library)
    if not said:
        assert open_library(cuda, plan, "m.engine") is module
    else:
        with pytest.raises(DeployError, match=said) as raised:
            open_library(cuda, plan, "m.engine")
        assert len(str(raised.value)) <= 300


@pytest.mark.parametrize(
    ("library", "wheels", "package"),
    [("tensorrt", ["tensorrt-cu12"], "tensorrt-cu12"), ("tensorrt", ["tensorrt-cu13"], "tensorrt-cu13"),
     ("tensorrt", [], "tensorrt"), ("tensorrt_rtx", [], "tensorrt-rtx-cu13")],
)  # fmt: skip
def test_the_version_that_a_plan_needs_is_named_by_the_wheel_that_is_here(monkeypatch, library, wheels, package):
    from fcn_deploy.runtime.backends.tensorrt import device

    module = types.ModuleType(library)
    module.__version__ = "11.4.0.106"
    monkeypatch.setitem(sys.modules, library, module)
    monkeypatch.setattr(device, "_installed", lambda name: name in wheels)
    with pytest.raises(DeployError, match=rf"run pip install '{package}==10.16.1.11', or build it again"):
        open_library(DRIVER, replace(PLAN, library=library, version="10.16.1.11"), "m.engine")


def test_a_library_that_cannot_start_is_said_with_the_drivers_version(rtx_engine, gpu, monkeypatch):
    """As where the driver is older than a minor version of CUDA that the library wants."""

    def refused(log):
        log.log(log.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "Runtime", refused)
    said = r"tensorrt_rtx 1.7.1.116 cannot start \(CUDA init.* error: 35\); the driver here is of CUDA 13.0: update it"
    with pytest.raises(DeployError, match=said):
        Segmenter(rtx_engine)
    assert gpu.counts()["contexts"] == 0


def test_a_library_that_is_installed_and_does_not_load_is_not_called_absent(monkeypatch):
    from fcn_deploy.runtime import extras

    def broken(name):
        raise ImportError("libnvinfer.so.11: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(extras, "import_module", broken)
    with pytest.raises(DeployError, match=r"tensorrt cannot be loaded \(libnvinfer.so.11: cannot open .*\); run: pip"):
        open_library(DRIVER, replace(PLAN, library="tensorrt"), "m.engine")


def test_a_library_that_is_absent_is_named_in_the_version_and_of_the_cuda_that_fit(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for driver, line in (
        (12040, "'fcn-deploy[tensorrt-cu12]' 'tensorrt-cu12==10.16.1.11'"),
        (13000, "'fcn-deploy[tensorrt]' 'tensorrt-cu13==10.16.1.11'"),
    ):
        with pytest.raises(DeployError, match=re.escape(f"tensorrt is not installed; run: pip install {line}")):
            open_library(types.SimpleNamespace(get_driver_version=lambda: driver), PLAN, "m.engine")  # noqa: B023


def test_a_driver_too_old_for_the_kernels_is_said_with_both_versions(rtx_engine, gpu, tmp_path, monkeypatch):
    """PTX of a newer toolkit, and no machine code for this GPU."""
    from fcn_deploy.runtime.backends import KERNELS_PTX
    from fcn_deploy.runtime.backends.tensorrt import device
    from gpu_engines import changed

    def newer(members):
        kept = {name: data for name, data in members.items() if "cubin" not in name}
        return kept | {KERNELS_PTX: kept[KERNELS_PTX].replace(b".version 8.0", b".version 9.5")}

    monkeypatch.setattr(device, "_installed", lambda package: False)
    with pytest.raises(DeployError, match=r"PTX 9.5 by a driver of CUDA 13.0; update the driver, or build it with"):
        Segmenter(changed(rtx_engine, tmp_path / "x.engine", members=newer))
    gpu.clear()

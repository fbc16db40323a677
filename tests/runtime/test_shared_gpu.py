"""A GPU that others in the same process use too: another Segmenter, a framework on the default stream."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.runtime.backends.device import cache_path, open_library
from fcn_deploy.runtime.backends.graphs import Graph
from fcn_deploy.runtime.manifest import GpuPlan, Profile
from helpers import photo

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
        net.warmup([(60, 90), (40, 50)])
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
    import sys
    import types

    module = types.ModuleType("tensorrt")
    module.__version__ = installed
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    plan = replace(PLAN, version=built_by, version_compatible=compatible)
    if loads:
        assert open_library(plan, "m.engine") is module
    else:
        with pytest.raises(DeployError, match=f"was built by tensorrt {built_by}, and {installed} is installed"):
            open_library(plan, "m.engine")


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
    from fcn_deploy.runtime.backends import device

    monkeypatch.setattr(device, "platform_name", lambda: "linux-x86_64")
    plan = replace(PLAN, library=library, platform=platform)
    if runs:
        assert device.open_device(cuda, 0, plan, "m.engine").name() == "Simulated GPU"
    else:
        with pytest.raises(
            DeployError, match=f"built on {platform}, and this is linux-x86_64: its plan does not run here"
        ):
            device.open_device(cuda, 0, plan, "m.engine")

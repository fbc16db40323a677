"""The stand-in for TensorRT: its results against ONNX Runtime, its names against the real module, its rules."""

import ctypes
import inspect
import json
import math
import operator
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from helpers import needs
from onnx import helper, numpy_helper

TESTS = Path(__file__).resolve().parents[1]


def network(dtype=np.float32, quantized=False) -> bytes:
    """[N, 3, H, W] → [N, 4, H/2, W/2]: a convolution and a ReLU, in float32, float16, or with a Q/DQ pair."""
    weights = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, initializers, image = [], [numpy_helper.from_array(weights, "weights")], "image"
    if quantized:
        initializers += [numpy_helper.from_array(np.array(0.02, dtype), "scale")]
        initializers += [numpy_helper.from_array(np.array(0, np.int8), "zero")]
        nodes += [helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["quantized"])]
        nodes += [helper.make_node("DequantizeLinear", ["quantized", "scale", "zero"], ["rounded"])]
        image = "rounded"
    nodes += [
        helper.make_node("Conv", [image, "weights"], ["sums"], strides=[2, 2], pads=[1, 1, 0, 0]),
        helper.make_node("Relu", ["sums"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes, "network",
        [helper.make_tensor_value_info("image", kind, ["N", 3, "H", "W"])],
        [helper.make_tensor_value_info("scores", kind, ["N", 4, "h", "w"])],
        initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()


PROFILES = [
    {"image": ((1, 3, 2, 2), (1, 3, 32, 32), (1, 3, 64, 64))},
    {"image": ((1, 3, 66, 66), (1, 3, 96, 96), (4, 3, 128, 128))},
]


def reference(core: bytes, image: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(core, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]


@pytest.fixture
def trt(gpu, cuda):
    with gpu.tensorrt() as module:
        yield module


class Log:
    """Messages of a logger, and the logger."""

    def __init__(self, trt) -> None:
        messages = self.messages = []

        class Kept(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity, message: str) -> None:
                messages.append((severity, message))

        self.logger = Kept()


def engine_of(trt, core=None, plan=b"a plan", logger=None):
    from gpu_sim import tensorrt_sim

    core = core or network()
    tensorrt_sim.register(plan, core, PROFILES)
    engine = trt.Runtime(logger or trt.Logger(trt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(plan)
    assert engine is not None
    return engine


class Bound:
    """An execution context with buffers for one size, on a stream of its own."""

    def __init__(self, cuda, engine, size=(1, 3, 16, 24), context=None, seed=0) -> None:
        self.cuda, self.stream = cuda, cuda.Stream()
        self.context = context or engine.create_execution_context()
        dtype = {1: np.float16}.get(int(engine.get_tensor_dtype("image")), np.float32)
        assert self.context.set_input_shape("image", size)
        self.image = cuda.pagelocked_empty(size, dtype)
        self.image[...] = np.random.default_rng(seed).normal(size=size)
        self.scores = cuda.pagelocked_empty(tuple(self.context.get_tensor_shape("scores")), dtype)
        self.scores[...] = -1
        self.memory = {"image": cuda.mem_alloc(self.image.nbytes), "scores": cuda.mem_alloc(self.scores.nbytes)}
        for name, memory in self.memory.items():
            assert self.context.set_tensor_address(name, int(memory))

    def enqueue(self, stream=None) -> bool:
        stream = stream or self.stream
        self.cuda.memcpy_htod_async(self.memory["image"], self.image, stream)
        accepted = self.context.execute_async_v3(stream.handle)
        self.cuda.memcpy_dtoh_async(self.scores, self.memory["scores"], stream)
        return accepted


def refused(gpu, *words):
    found = gpu.misuse()
    gpu.clear()
    assert len(found) == 1 and all(word in found[0] for word in words), found


# ----------------------------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("core", [network(), network(np.float16), network(quantized=True)], ids=["f32", "f16", "qdq"])
def test_results_are_those_of_onnxruntime_at_every_size_and_profile(cuda, trt, core):
    engine = engine_of(trt, core, plan=core[:100])
    sizes = {0: [(1, 3, 2, 2), (1, 3, 31, 64), (1, 3, 64, 64)], 1: [(1, 3, 66, 128), (4, 3, 97, 99)]}
    for profile, shapes in sizes.items():
        context, stream = engine.create_execution_context(), cuda.Stream()
        assert context.active_optimization_profile == 0
        if profile:
            assert context.set_optimization_profile_async(profile, stream.handle)
            stream.synchronize()
        assert context.active_optimization_profile == profile
        for size in shapes:
            bound = Bound(cuda, engine, size, context)
            assert context.infer_shapes() == [] and context.all_binding_shapes_specified
            assert bound.enqueue()
            assert (bound.scores == -1).all()  # nothing has run yet
            bound.stream.synchronize()
            np.testing.assert_allclose(bound.scores, reference(core, bound.image), rtol=1e-3, atol=1e-3)


def test_shapes_and_addresses_are_those_of_the_moment_of_enqueueing(cuda, trt):
    engine = engine_of(trt)
    bound = Bound(cuda, engine)
    bound.enqueue()
    other = cuda.mem_alloc(1 << 16)
    bound.context.set_input_shape("image", (1, 3, 64, 64))
    bound.context.set_tensor_address("scores", int(other))
    bound.stream.synchronize()
    np.testing.assert_array_equal(bound.scores, reference(network(), bound.image))


def test_a_graph_replays_the_network_on_new_contents(gpu, cuda, trt):
    engine, library = engine_of(trt), gpu.library()
    bound = Bound(cuda, engine)
    stream, graph, executable = ctypes.c_void_p(bound.stream.handle), ctypes.c_void_p(), ctypes.c_void_p()
    assert not bound.context.is_stream_capturable(bound.stream.handle)
    assert bound.enqueue()
    bound.stream.synchronize()
    assert bound.context.is_stream_capturable(bound.stream.handle)
    assert library.cuStreamBeginCapture_v2(stream, 1) == 0
    assert bound.enqueue()
    assert library.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert library.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)) == 0
    assert library.cuGraphDestroy(graph) == 0
    for value in (1, 2):
        bound.image[...] = value
        assert library.cuGraphLaunch(executable, stream) == 0
        bound.stream.synchronize()
        np.testing.assert_array_equal(bound.scores, reference(network(), bound.image))
    assert library.cuGraphExecDestroy(executable) == 0


def test_work_of_dropped_graphs_is_forgotten(gpu, cuda, trt):
    from gpu_sim import tensorrt_sim

    bound = Bound(cuda, engine_of(trt))
    for _ in range(50):
        bound.enqueue()
        bound.stream.synchronize()
    assert len(tensorrt_sim._work) <= 3


def test_engine_facts(gpu, cuda, trt):
    engine = engine_of(trt)
    assert engine.num_io_tensors == 2 and [engine.get_tensor_name(index) for index in range(2)] == ["image", "scores"]
    assert engine.get_tensor_mode("image") == trt.TensorIOMode.INPUT
    assert engine.get_tensor_mode("scores") == trt.TensorIOMode.OUTPUT
    assert engine.get_tensor_dtype("image") == trt.DataType.FLOAT
    assert trt.nptype(engine.get_tensor_dtype("image")) is np.float32
    assert engine.get_tensor_shape("image") == (-1, 3, -1, -1)
    assert engine.num_optimization_profiles == 2
    assert engine.get_tensor_profile_shape("image", 1)[2] == (4, 3, 128, 128)
    assert engine.device_memory_size_v2 == engine.get_device_memory_size_for_profile_v2(1)
    assert engine.get_device_memory_size_for_profile_v2(0) < engine.get_device_memory_size_for_profile_v2(1)


def test_unknown_and_damaged_plans_give_none_and_a_logged_error(cuda, trt):
    log = Log(trt)
    engine = engine_of(trt, plan=b"another plan", logger=log.logger)
    assert log.messages == []
    for plan in (b"another plaN", b"another", b""):
        assert trt.Runtime(log.logger).deserialize_cuda_engine(plan) is None
    assert len(log.messages) == 3 and all(severity == trt.ILogger.ERROR for severity, _ in log.messages)
    del engine


def test_plans_come_from_a_folder_in_other_processes(gpu, cuda, trt, tmp_path):
    from gpu_sim import tensorrt_sim

    tensorrt_sim.save(tmp_path, b"a saved plan", network(), PROFILES)
    (tmp_path / "use_it.py").write_text(
        "import sys, json, pycuda.driver as cuda, tensorrt_rtx as trt\n"
        "cuda.init(); context = cuda.Device(0).make_context()\n"
        "engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(b'a saved plan')\n"
        "print(json.dumps([sys.argv[1:], [list(s) for s in engine.get_tensor_profile_shape('image', 1)]]))\n"
        "del engine; context.pop()\n"
        "if sys.argv[1] == 'bad': cuda.Stream()\n"
    )
    paths = os.pathsep.join(map(str, (TESTS, tmp_path)))
    for word in ("good", "bad"):
        done = subprocess.run(
            [sys.executable, "-m", "gpu_sim", "use_it", word], capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": paths, "FCN_GPU_SIM_PLANS": str(tmp_path)},
        )  # fmt: skip
        words, shapes = json.loads(done.stdout)
        assert words == [word] and shapes == [list(shape) for shape in PROFILES[1]["image"]]
        assert done.returncode == (word == "bad"), done.stderr


# ------------------------------------------------------------------------------------------------------------- names


def test_every_name_is_the_real_modules():
    real = needs("tensorrt_rtx")
    from gpu_sim import tensorrt_sim

    simulated = tensorrt_sim.module()
    for name in (*tensorrt_sim._NAMES, *tensorrt_sim._RTX_NAMES):
        ours, theirs = getattr(simulated, name), getattr(real, name)
        for attribute in [one for one in vars(ours) if not one.startswith("_")] if inspect.isclass(ours) else []:
            assert hasattr(theirs, attribute), f"{name}.{attribute}"
            value, documented = vars(ours)[attribute], getattr(theirs, attribute).__doc__ or ""
            if inspect.isfunction(value) and "*args" not in documented.split("\n")[0]:
                for parameter in list(inspect.signature(value).parameters)[1:]:
                    assert f"{parameter}:" in documented or "arg0" in documented, f"{name}.{attribute}({parameter})"
        if hasattr(theirs, "__members__") and hasattr(ours, "__members__"):
            for member, value in ours.__members__.items():
                assert int(value) == int(theirs.__members__[member]), f"{name}.{member}"
    assert {name: int(one) for name, one in simulated.ILogger.Severity.__members__.items()} == {
        name: int(one) for name, one in real.ILogger.Severity.__members__.items()
    }


@pytest.mark.parametrize("version", ["10.12", "10", "11"])
def test_tensorrts_stand_in_has_the_names_and_arguments_of_nvidias_bindings_alone(version):
    from gpu_sim import signatures, tensorrt_sim

    known, checked = signatures.read(version)["classes"], 0
    simulated = tensorrt_sim.module("tensorrt")
    for name in (*tensorrt_sim._NAMES, "ILogger.Severity"):
        kind = operator.attrgetter(name)(simulated)
        if name not in known or name == "IHostMemory":  # a buffer, for which bytes stand in
            continue
        if known[name]["members"]:
            assert {m: int(v) for m, v in kind.__members__.items()}.items() <= known[name]["members"].items(), name
        for attribute in [one for one in dir(kind) if not one.startswith("_") and not known[name]["members"]]:
            if attribute in ("Severity", *known["ILogger.Severity"]["members"]):
                continue
            value = inspect.getattr_static(kind, attribute)
            if isinstance(value, tensorrt_sim._RtxAlone):
                assert not hasattr(kind, attribute)
                continue
            assert attribute in known[name]["methods"] or attribute in known[name]["properties"], f"{name}.{attribute}"
            if not inspect.isfunction(value) or attribute not in known[name]["methods"]:
                continue
            ours, checked = list(inspect.signature(value).parameters)[1:], checked + 1
            takes = [[each for each, *_ in overload] for overload, _ in known[name]["methods"][attribute]]
            assert ours in takes or all([one] in takes for one in ours), f"{name}.{attribute}{ours}"
    assert checked > 20
    tensorrt_sim.module("tensorrt_rtx")


def test_dims_compare_as_the_real_ones():
    real = needs("tensorrt_rtx")
    from gpu_sim import tensorrt_sim

    for dims in (real.Dims, tensorrt_sim.Dims):
        assert dims((1, 2)) == (1, 2) and dims((1, 2)) == [1, 2] and tuple(dims((1, 2))) == (1, 2)
        with pytest.raises(TypeError):
            dims((1, 2)) == dims((1, 2))  # noqa: B015


def test_tensorrt_lacks_what_only_rtx_has(gpu):
    with gpu.tensorrt("tensorrt") as module:
        import tensorrt

        assert tensorrt is module and hasattr(tensorrt, "Runtime")
        assert not hasattr(tensorrt, "IRuntimeCache") and not hasattr(tensorrt, "CudaGraphStrategy")
    assert sys.modules.get("tensorrt") is not module


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("size", [(1, 3, 1, 2), (1, 3, 65, 64), (2, 3, 64, 64), (1, 4, 64, 64), (1, 3, 64)])
def test_shapes_outside_the_profile_are_refused(gpu, cuda, trt, size):
    log = Log(trt)
    context = engine_of(trt, logger=log.logger).create_execution_context()
    assert not context.set_input_shape("image", size)
    refused(gpu, "outside profile 0")
    assert len(log.messages) == 1 and "outside profile" in log.messages[0][1]


def test_output_shapes_are_unknown_before_the_inputs(gpu, cuda, trt):
    context = engine_of(trt).create_execution_context()
    assert context.infer_shapes() == ["image"] and not context.all_binding_shapes_specified
    assert context.get_tensor_shape("scores") == (-1, 4, -1, -1)
    refused(gpu, "before the shape of 'image' was set")
    assert not context.execute_async_v3(cuda.Stream().handle)
    refused(gpu, "the shape of 'image' is not set")


def test_a_new_profile_forgets_the_shapes(gpu, cuda, trt):
    bound = Bound(cuda, engine_of(trt))
    assert bound.context.set_optimization_profile_async(1, bound.stream.handle)
    assert bound.context.infer_shapes() == ["image"]
    bound.stream.synchronize()
    assert not bound.context.set_optimization_profile_async(2, bound.stream.handle)
    refused(gpu, "no profile 2")


def test_addresses_must_be_set_alive_aligned_and_large_enough(gpu, cuda, trt):
    engine = engine_of(trt)
    context = engine.create_execution_context()
    context.set_input_shape("image", (1, 3, 16, 16))
    assert not context.execute_async_v3(cuda.Stream().handle)
    refused(gpu, "address of 'image' is not set")
    assert not context.set_tensor_address("labels", 4096)
    refused(gpu, "no tensor 'labels'")

    bound = Bound(cuda, engine)
    small = cuda.mem_alloc(bound.scores.nbytes - 1)
    bound.context.set_tensor_address("scores", int(small))
    assert not bound.context.execute_async_v3(bound.stream.handle)
    refused(gpu, "'scores'", "too small")
    small.free()
    assert not bound.context.execute_async_v3(bound.stream.handle)
    refused(gpu, "'scores'", "no live device memory")
    bound.context.set_tensor_address("scores", int(bound.memory["scores"]) + 4)
    refused(gpu, "not aligned")
    bound.context.set_tensor_address("scores", bound.image.ctypes.data // 256 * 256 + (1 << 40))
    assert not bound.context.execute_async_v3(bound.stream.handle)
    refused(gpu, "no live device memory")


def test_a_context_on_two_streams_needs_an_order(gpu, cuda, trt):
    bound, other, event = Bound(cuda, engine_of(trt)), cuda.Stream(), cuda.Event()
    bound.enqueue()
    bound.enqueue(other)
    refused(gpu, "another stream while")
    cuda.Context.synchronize()
    bound.enqueue()
    event.record(bound.stream)
    other.wait_for_event(event)
    bound.enqueue(other)  # ordered by the event
    bound.enqueue(other)  # and by its own stream
    other.synchronize()
    bound.enqueue()  # nothing is pending
    bound.stream.synchronize()


def test_switching_the_profile_with_work_pending_is_noticed(gpu, cuda, trt):
    bound = Bound(cuda, engine_of(trt))
    bound.enqueue()
    bound.context.set_optimization_profile_async(1, bound.stream.handle)
    refused(gpu, "switched with work pending")
    bound.stream.synchronize()


def test_two_threads_in_one_context_are_noticed(gpu, cuda, trt, monkeypatch):
    bound, current = Bound(cuda, engine_of(trt)), ctypes.c_void_p()
    gpu.library().cuCtxGetCurrent(ctypes.byref(current))
    inside, go_on = threading.Event(), threading.Event()
    ordered = bound.context._ordered

    def slowly(*arguments):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go_on.wait(10)
        return ordered(*arguments)

    monkeypatch.setattr(bound.context, "_ordered", slowly)

    def enqueue():
        gpu.library().cuCtxPushCurrent_v2(current)
        bound.context.execute_async_v3(bound.stream.handle)
        gpu.library().cuCtxPopCurrent_v2(None)

    thread = threading.Thread(target=enqueue)
    thread.start()
    assert inside.wait(10)
    bound.context.execute_async_v3(bound.stream.handle)
    go_on.set()
    thread.join()
    refused(gpu, "two threads at once")
    bound.stream.synchronize()


def user_managed(trt, engine):
    return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def test_user_managed_memory_must_be_set_alive_and_large_enough(gpu, cuda, trt):
    engine = engine_of(trt)
    bound = Bound(cuda, engine, context=user_managed(trt, engine))
    assert not bound.context.execute_async_v3(bound.stream.handle)
    refused(gpu, "none is set")
    needed = bound.context.update_device_memory_size_for_shapes()
    assert 0 < needed < engine.get_device_memory_size_for_profile_v2(0)
    memory = cuda.mem_alloc(needed)
    bound.context.set_device_memory(int(memory), needed - 256)
    assert not bound.context.execute_async_v3(bound.stream.handle)
    refused(gpu, "are needed")
    bound.context.set_device_memory(int(memory), needed + 1)
    refused(gpu, "not device memory")
    bound.context.set_device_memory(int(memory), needed)
    assert bound.enqueue()
    bound.stream.synchronize()
    np.testing.assert_array_equal(bound.scores, reference(network(), bound.image))
    memory.free()
    assert not bound.context.execute_async_v3(bound.stream.handle)
    refused(gpu, "is freed")
    plain = engine.create_execution_context()
    plain.set_device_memory(int(bound.memory["image"]), 256)
    refused(gpu, "USER_MANAGED")


def test_memory_shared_by_contexts_must_be_used_in_turn(gpu, cuda, trt):
    engine = engine_of(trt)
    first, second = (Bound(cuda, engine, context=user_managed(trt, engine)) for _ in range(2))
    size = engine.device_memory_size_v2
    memory, event = cuda.mem_alloc(size), cuda.Event()
    for bound in (first, second):
        bound.context.set_device_memory(int(memory), size)
    first.enqueue()
    second.enqueue()
    refused(gpu, "in use by another context's pending work")
    cuda.Context.synchronize()
    first.enqueue()
    event.record(first.stream)
    second.stream.wait_for_event(event)
    second.enqueue()
    cuda.Context.synchronize()


def test_contexts_take_memory_by_their_strategy(gpu, cuda, trt):
    engine, strategies = engine_of(trt), trt.ExecutionContextAllocationStrategy
    taken = {}
    for strategy in (strategies.STATIC, strategies.ON_PROFILE_CHANGE, strategies.USER_MANAGED):
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        before = gpu.counts()["bytes"]
        context = engine.create_execution_context(config)
        taken[strategy] = gpu.counts()["bytes"] - before
        del context
        assert gpu.counts()["bytes"] == before
    assert taken == {
        strategies.STATIC: engine.device_memory_size_v2,
        strategies.ON_PROFILE_CHANGE: engine.get_device_memory_size_for_profile_v2(0),
        strategies.USER_MANAGED: 0,
    }


def test_a_full_gpu_gives_none_and_a_logged_error(gpu, cuda, trt):
    log = Log(trt)
    engine = engine_of(trt, logger=log.logger)
    gpu.set_memory(gpu.counts()["bytes"] + 100)
    assert engine.create_execution_context() is None
    assert trt.Runtime(log.logger).deserialize_cuda_engine(b"a plan") is None
    assert ["out of memory" in message for _, message in log.messages] == [True, True]


def test_capturing_before_the_first_run_fails_and_spoils_the_capture(gpu, cuda, trt):
    bound, library, graph = Bound(cuda, engine_of(trt)), gpu.library(), ctypes.c_void_p()
    stream = ctypes.c_void_p(bound.stream.handle)
    assert library.cuStreamBeginCapture_v2(stream, 1) == 0
    assert not bound.context.execute_async_v3(bound.stream.handle)
    assert any("before it had run once" in line for line in gpu.misuse())
    gpu.clear()
    assert library.cuStreamEndCapture(stream, ctypes.byref(graph)) == 901


def test_without_the_engines_context_nothing_runs(gpu, cuda, trt):
    bound, library, current = Bound(cuda, engine_of(trt)), gpu.library(), ctypes.c_void_p()
    popped = []
    while current.value or not popped:  # what was current below it too
        library.cuCtxPopCurrent_v2(ctypes.byref(current))
        popped.append(ctypes.c_void_p(current.value))
        library.cuCtxGetCurrent(ctypes.byref(current))
    try:
        assert not bound.context.execute_async_v3(bound.stream.handle)
        refused(gpu, "not current")
        assert trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR)).deserialize_cuda_engine(b"a plan") is None
        refused(gpu, "no CUDA context is current")
        assert bound.context.engine.create_execution_context() is None
        refused(gpu, "not current")
    finally:
        library.cuCtxPushCurrent_v2(popped[0])
    assert not bound.context.execute_async_v3(bound.stream.handle + 1)
    refused(gpu, "no stream of this context")


def test_what_is_freed_too_early_is_noticed(gpu, cuda, trt):
    context = cuda.Device(0).make_context()
    engine = engine_of(trt)
    bound = Bound(cuda, engine)
    bound.enqueue()
    bound.context = None
    assert gpu.misuse()[0] == "IExecutionContext: freed with work pending"
    gpu.clear()
    bound = None
    context.pop()
    context.detach()
    gpu.clear()
    del engine
    assert any("after the CUDA context" in line for line in gpu.misuse())
    gpu.clear()


def test_memory_freed_before_a_graph_runs_is_noticed(gpu, cuda, trt):
    context = cuda.Device(0).make_context()
    bound, library = Bound(cuda, engine_of(trt)), gpu.library()
    stream, graph, executable = ctypes.c_void_p(bound.stream.handle), ctypes.c_void_p(), ctypes.c_void_p()
    bound.enqueue()
    bound.stream.synchronize()
    library.cuStreamBeginCapture_v2(stream, 1)
    assert bound.context.execute_async_v3(bound.stream.handle)
    library.cuStreamEndCapture(stream, ctypes.byref(graph))
    library.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
    bound.memory["scores"].free()
    library.cuGraphLaunch(executable, stream)
    assert library.cuStreamSynchronize(stream) == 700
    refused(gpu, "'scores' is freed")
    bound = None
    context.pop()
    context.detach()
    gpu.clear()


def test_the_runtime_cache_travels(cuda, trt):
    engine = engine_of(trt)
    config = engine.create_runtime_config()
    cache = config.create_runtime_cache()
    assert config.set_runtime_cache(cache)
    empty = bytes(cache.serialize())
    bound = Bound(cuda, engine, context=engine.create_execution_context(config))
    bound.enqueue()
    bound.stream.synchronize()
    saved = cache.serialize()
    assert saved.nbytes == len(bytes(saved)) > len(empty)
    other = config.create_runtime_cache()
    assert other.deserialize(bytes(saved)) and bytes(other.serialize()) == bytes(saved)
    assert not other.deserialize(b"of another kind")


def test_the_error_recorder_is_told(gpu, cuda, trt):
    reports = []

    class Recorder(trt.IErrorRecorder):
        def report_error(self, code, description):
            reports.append((code, description))
            return True

    context = engine_of(trt).create_execution_context()
    context.error_recorder = Recorder()
    assert not context.set_input_shape("image", (1, 3, 1000, 1000))
    assert reports[0][0] == trt.ErrorCodeTRT.INVALID_ARGUMENT and "outside profile" in reports[0][1]
    gpu.clear()


def test_nothing_is_left_behind(gpu, cuda, trt):
    before = gpu.counts()
    bound = Bound(cuda, engine_of(trt))
    bound.enqueue()
    bound.stream.synchronize()
    assert gpu.counts()["bytes"] > before["bytes"] + math.prod(bound.scores.shape)
    del bound
    assert gpu.counts() == before

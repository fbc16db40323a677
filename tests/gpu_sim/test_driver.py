"""The simulated driver, through the real pycuda: what it computes, what it defers, what it refuses."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

# The simulator runs the .cu, compiled for the host; of the PTX it reads entries and parameters alone.
SOURCE = """
#include <cuda_fp16.h>
struct Affine { float scale; float offset[2]; };

extern "C" __global__ void affine(const float* __restrict__ in, float* __restrict__ out, int n, Affine f) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index < n) out[index] = in[index] * f.scale + f.offset[min(index, 1)];
}
extern "C" __global__ void to_half(const float* in, __half* out, int n) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index < n) out[index] = __float2half(in[index]);
}
extern "C" __global__ void overrun(unsigned char* out, int n) { out[n + threadIdx.x] = 1; }
extern "C" __global__ void changed(float* out, double more) { out[0] = more; }
"""
PTX = b"""//
.version 8.0
.target sm_75
.address_size 64
.visible .entry affine(
\t.param .u64 affine_param_0,
\t.param .u64 .ptr .align 1 affine_param_1,
\t.param .u32 affine_param_2,
\t.param .align 4 .b8 affine_param_3[12]
)
{ ret; }
.visible .entry to_half(.param .u64 a, .param .u64 b, .param .u32 c) { ret; }
.visible .entry overrun(.param .u64 a, .param .u32 b) { ret; }
.visible .entry changed(.param .u64 a) { ret; }
.visible .entry unheard_of(.param .u64 a) { ret; }
"""


class Affine(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_float), ("offset", ctypes.c_float * 2))


@pytest.fixture
def module(gpu, cuda, tmp_path):
    (tmp_path / "kernels.cu").write_text(SOURCE)
    gpu.load_kernels(tmp_path / "kernels.cu")
    return cuda.module_from_buffer(PTX)


def upload(cuda, array):
    memory = cuda.mem_alloc(array.nbytes)
    cuda.memcpy_htod(memory, array)
    return memory


def download(cuda, memory, like):
    array = np.empty_like(like)
    cuda.memcpy_dtoh(array, memory)
    return array


def pinned(cuda, array):
    copy = cuda.pagelocked_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def refused(gpu, *words):
    """The call before was remembered as misuse, in words that tell why."""
    found = gpu.misuse()
    gpu.clear()
    assert len(found) == 1 and all(word in found[0] for word in words), found


def handle(stream):
    return ctypes.c_void_p(stream.handle)


NUMBERS = np.arange(1000, dtype=np.float32)


# ------------------------------------------------------------------------------------------------------- the device


def test_the_device_is_what_the_test_says(gpu, cuda):
    device = cuda.Device(0)
    assert device.name() == "Simulated GPU" and cuda.Device.count() == 1
    assert device.compute_capability() == (8, 9) and device.total_memory() == 8 << 30
    gpu.set_capability(7, 5)
    gpu.set_memory(1 << 20)
    assert device.compute_capability() == (7, 5) and cuda.mem_get_info() == (1 << 20, 1 << 20)
    assert device.get_attribute(cuda.device_attribute.MAX_THREADS_PER_BLOCK) == 1024
    gpu.set_devices(0)
    with pytest.raises(cuda.Error, match="no CUDA-capable device"):
        cuda.init()


def test_memory_ends_where_the_test_says(gpu, cuda):
    gpu.set_memory(1 << 20)
    held = cuda.mem_alloc(900_000)
    assert cuda.mem_get_info()[0] == (1 << 20) - 900_000
    with pytest.raises(cuda.MemoryError, match="out of memory"):
        cuda.mem_alloc(200_000)
    held.free()
    cuda.mem_alloc(1 << 20).free()
    assert gpu.counts()["bytes"] == 0


@pytest.mark.parametrize("size", [1, 1000, 10_000_000])
def test_new_memory_holds_garbage(cuda, size):
    memory = cuda.mem_alloc(size)
    assert int(memory) % 256 == 0
    found = download(cuda, memory, np.zeros(size, np.uint8))
    assert (found == 0xCD).all()
    assert (cuda.pagelocked_empty(size, np.uint8) == 0xCD).all()


def test_gigabytes_cost_nothing_until_they_are_used(cuda):
    memory = [cuda.mem_alloc(2 << 30) for _ in range(3)]
    tail = np.zeros(8, np.uint8)
    cuda.memcpy_dtoh(tail, int(memory[2]) + (2 << 30) - 8)
    assert (tail == 0xCD).all()


# ----------------------------------------------------------------------------------------------------------- kernels


def test_a_kernel_runs_by_every_way_to_launch_it(gpu, cuda, module):
    source, target = upload(cuda, NUMBERS), cuda.mem_alloc(NUMBERS.nbytes)
    affine, stream = module.get_function("affine"), cuda.Stream()
    expected = NUMBERS * np.float32(3) + np.float32(2)
    expected[0] = 1
    value = Affine(3, (1, 2))

    affine.prepare([np.intp, np.intp, np.int32, "12s"])
    affine.prepared_async_call((8, 1), (128, 1, 1), stream, int(source), int(target), 1000, bytes(value))
    stream.synchronize()
    np.testing.assert_array_equal(download(cuda, target, NUMBERS), expected)

    cuda.memset_d8(target, 0, NUMBERS.nbytes)
    record = np.frombuffer(bytes(value), np.dtype([("scale", "f4"), ("offset", "f4", 2)]))[0]
    affine(source, target, np.int32(1000), record, grid=(4, 1), block=(250, 1, 1))
    np.testing.assert_array_equal(download(cuda, target, NUMBERS), expected)

    cuda.memset_d8(target, 0, NUMBERS.nbytes)
    library, function = gpu.library(), ctypes.c_void_p()
    module_handle = ctypes.c_void_p()
    assert library.cuModuleLoadData(ctypes.byref(module_handle), PTX) == 0
    assert library.cuModuleGetFunction(ctypes.byref(function), module_handle, b"affine") == 0
    arguments = [ctypes.c_uint64(int(source)), ctypes.c_uint64(int(target)), ctypes.c_int(1000), value]
    array = (ctypes.c_void_p * 4)(*(ctypes.addressof(argument) for argument in arguments))
    assert library.cuLaunchKernel(function, 8, 1, 1, 128, 1, 1, 0, handle(stream), array, None) == 0
    stream.synchronize()
    np.testing.assert_array_equal(download(cuda, target, NUMBERS), expected)
    assert library.cuModuleUnload(module_handle) == 0

    cuda.memset_d8(target, 0, NUMBERS.nbytes)
    affine._set_block_shape(100, 1, 1)
    packed = int(source).to_bytes(8, "little") + int(target).to_bytes(8, "little") + (1000).to_bytes(4, "little")
    affine._param_setv(0, packed + bytes(value))
    affine._param_set_size(32)
    affine._launch_grid(10, 1)
    np.testing.assert_array_equal(download(cuda, target, NUMBERS), expected)


def test_half_precision_rounds_as_numpy_does(cuda, module):
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    ties = (np.arange(0x8000, dtype=np.uint32) << 13) + 0x1000  # halfway between neighbours, where it is normal
    edges = np.array([65504, 65519.996, 65520, 1e-8, 2**-25, 2**-24, 6.1e-5, 0, -0.0], np.float32)
    values = np.concatenate([bits.view(np.float32), ties.view(np.float32) * np.float32(2**-112), edges])
    values = values[~np.isnan(values)]
    source, target = upload(cuda, values), cuda.mem_alloc(values.size * 2)
    kernel = module.get_function("to_half").prepare([np.intp, np.intp, np.int32])
    kernel.prepared_call((-(-values.size // 256), 1), (256, 1, 1), int(source), int(target), values.size)
    found = download(cuda, target, np.empty(values.size, np.float16))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found.view(np.uint16), values.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("image", [b"not a module at all, surely", b"\x7fELF" + bytes(100), b""])
def test_only_images_of_modules_are_loaded(gpu, cuda, image):
    with pytest.raises(cuda.Error, match="image is invalid"):
        cuda.module_from_buffer(image + b"\0")
    refused(gpu, "neither PTX")


def test_ptx_for_a_newer_gpu_is_refused(gpu, cuda):
    with pytest.raises(cuda.Error, match="PTX JIT"):
        cuda.module_from_buffer(PTX.replace(b"sm_75", b"sm_120"))
    refused(gpu, "sm_120")


def test_ptx_of_a_newer_toolkit_is_refused(gpu, cuda):
    cuda.module_from_buffer(PTX)
    gpu.set_driver(11080)
    assert cuda.get_driver_version() == 11080
    with pytest.raises(cuda.Error, match="toolchain"):
        cuda.module_from_buffer(PTX)
    refused(gpu, "PTX 8.0 is newer than the driver's CUDA 11.8")


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing", "no kernel"), ("unheard_of", "no host kernel"), ("changed", "other parameters")],
)
def test_a_kernel_that_is_not_there_is_not_found(gpu, cuda, module, name, why):
    with pytest.raises(cuda.Error, match="not found"):
        module.get_function(name)
    refused(gpu, why)


@pytest.mark.parametrize(
    ("grid", "block"),
    [((1, 1), (1025, 1, 1)), ((1, 1), (32, 33, 1)), ((1, 1), (1, 1, 65)), ((0, 1), (1, 1, 1)), ((1, 70000), (1, 1, 1))],
)
def test_launches_beyond_the_limits_are_refused(gpu, cuda, module, grid, block):
    memory = cuda.mem_alloc(64)
    kernel = module.get_function("overrun").prepare([np.intp, np.int32])
    with pytest.raises(cuda.Error, match="invalid argument"):
        kernel.prepared_call(grid, block, int(memory), 0)
    refused(gpu, "overrun")


@pytest.mark.parametrize("extra", [0, 2])
def test_a_wrong_number_of_parameters_is_refused(gpu, cuda, module, extra):
    kernel = module.get_function("overrun").prepare([np.intp, *[np.int64] * extra])
    with pytest.raises(cuda.Error, match="invalid argument"):
        kernel.prepared_call((1, 1), (1, 1, 1), 0, *[0] * extra)
    refused(gpu, "bytes of parameters")


@pytest.mark.parametrize("kind", ["unknown", "freed"])
def test_a_kernel_with_a_wrong_pointer_ends_its_context(gpu, cuda, kind):
    context = cuda.Device(0).make_context()
    try:
        memory = cuda.mem_alloc(64)
        address = int(memory)
        if kind == "freed":
            memory.free()
        kernel = cuda.module_from_buffer(PTX).get_function("overrun").prepare([np.intp, np.int32])
        kernel.prepared_call((1, 1), (1, 1, 1), address if kind == "freed" else 0x1000, 0)
        with pytest.raises(cuda.Error, match="illegal memory access"):
            cuda.Context.synchronize()
        refused(gpu, "overrun: argument 0", "freed device memory" if kind == "freed" else "no live")
        assert gpu.library().cuStreamSynchronize(None) == 700  # CUDA_ERROR_ILLEGAL_ADDRESS, from now on
        del kernel
    finally:
        context.pop()


def test_a_write_past_the_end_is_noticed_when_the_memory_is_freed(gpu, cuda, module):
    memory = cuda.mem_alloc(100)
    kernel = module.get_function("overrun").prepare([np.intp, np.int32])
    kernel.prepared_call((1, 1), (4, 1, 1), int(memory), 96)
    cuda.Context.synchronize()
    memory.free()
    assert gpu.misuse() == []
    memory = cuda.mem_alloc(100)
    kernel.prepared_call((1, 1), (4, 1, 1), int(memory), 97)
    memory.free()
    refused(gpu, "wrote", "past the end of an allocation of 100")


# ------------------------------------------------------------------------------------------------ deferred execution


def test_results_are_there_only_after_synchronising(gpu, cuda):
    stream, memory = cuda.Stream(), cuda.mem_alloc(NUMBERS.nbytes)
    source, result = pinned(cuda, NUMBERS), pinned(cuda, NUMBERS * 0)
    cuda.memcpy_htod_async(memory, source, stream)
    cuda.memcpy_dtoh_async(result, memory, stream)
    assert not result.any() and gpu.counts()["pending"] == 2
    stream.synchronize()
    np.testing.assert_array_equal(result, NUMBERS)
    assert gpu.counts()["pending"] == 0


def test_a_staging_buffer_reused_too_early_uploads_the_later_contents(cuda):
    stream, memory, source = cuda.Stream(), cuda.mem_alloc(NUMBERS.nbytes), pinned(cuda, NUMBERS)
    cuda.memcpy_htod_async(memory, source, stream)
    source[:] = 7
    stream.synchronize()
    assert (download(cuda, memory, NUMBERS) == 7).all()


def test_pageable_memory_is_staged_and_told_in_the_log(gpu, cuda):
    stream, memory = cuda.Stream(), cuda.mem_alloc(NUMBERS.nbytes)
    source, result = NUMBERS.copy(), np.zeros_like(NUMBERS)
    gpu.log()
    cuda.memcpy_htod_async(memory, source, stream)
    source[:] = 7
    cuda.memcpy_dtoh_async(result, memory, stream)
    np.testing.assert_array_equal(result, NUMBERS)
    assert [call.detail for call in gpu.calls("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")] == ["pageable"] * 2


@pytest.mark.parametrize("wait", [True, False])
def test_streams_are_ordered_by_events_alone(cuda, wait):
    first, second, event = cuda.Stream(), cuda.Stream(), cuda.Event()
    memory, result = cuda.mem_alloc(4), pinned(cuda, np.zeros(1, np.uint32))
    cuda.memset_d32(memory, 1, 1)
    cuda.Context.synchronize()
    cuda.memset_d32_async(memory, 2, 1, first)
    event.record(first)
    cuda.memset_d32_async(memory, 3, 1, first)
    if wait:
        second.wait_for_event(event)
    cuda.memcpy_dtoh_async(result, memory, second)
    second.synchronize()
    assert result[0] == (2 if wait else 1)
    first.synchronize()


@pytest.mark.parametrize("blocking", [True, False])
def test_the_null_stream_follows_blocking_streams_alone(gpu, cuda, blocking):
    library, stream = gpu.library(), ctypes.c_void_p()
    assert library.cuStreamCreate(ctypes.byref(stream), 0 if blocking else 1) == 0
    memory, result = cuda.mem_alloc(4), np.zeros(1, np.uint32)
    cuda.memset_d32(memory, 1, 1)
    cuda.Context.synchronize()
    assert library.cuMemsetD32Async(ctypes.c_uint64(int(memory)), 2, ctypes.c_size_t(1), stream) == 0
    cuda.memcpy_dtoh(result, memory)
    assert result[0] == (2 if blocking else 1)
    assert library.cuStreamDestroy_v2(stream) == 0
    assert (download(cuda, memory, result) == 2).all()  # destroying a stream loses no work


def test_events_are_not_ready_at_first_and_keep_time(cuda):
    stream, start, end = cuda.Stream(), cuda.Event(), cuda.Event()
    memory = cuda.mem_alloc(1 << 20)
    start.record(stream)
    cuda.memset_d8_async(memory, 1, 1 << 20, stream)
    end.record(stream)
    assert not end.query() and not stream.is_done()
    while not end.query():
        pass
    assert start.time_till(end) > 0 and stream.is_done()


def test_memory_is_freed_after_the_work_that_uses_it(gpu, cuda):
    stream, memory = cuda.Stream(), cuda.mem_alloc(NUMBERS.nbytes)
    source, result = pinned(cuda, NUMBERS), pinned(cuda, NUMBERS * 0)
    cuda.memcpy_htod_async(memory, source, stream)
    cuda.memcpy_dtoh_async(result, memory, stream)
    del source
    memory.free()
    np.testing.assert_array_equal(result, NUMBERS)


def test_a_long_queue_runs_by_itself(gpu, cuda):
    stream, memory = cuda.Stream(), cuda.mem_alloc(4)
    for value in range(3000):
        cuda.memset_d32_async(memory, value, 1, stream)
    assert gpu.counts()["pending"] <= 1024
    stream.synchronize()
    assert (download(cuda, memory, np.zeros(1, np.uint32)) == 2999).all()


# ------------------------------------------------------------------------------------------------------------ graphs


class Graph:
    """A CUDA graph through ctypes, as pycuda has no API for them."""

    def __init__(self, gpu, stream):
        self.library, self.stream = gpu.library(), handle(stream)
        self.graph, self.executable = ctypes.c_void_p(), ctypes.c_void_p()

    def begin(self, mode=0):
        return self.library.cuStreamBeginCapture_v2(self.stream, mode)

    def end(self):
        return self.library.cuStreamEndCapture(self.stream, ctypes.byref(self.graph))

    def instantiate(self):
        return self.library.cuGraphInstantiateWithFlags(
            ctypes.byref(self.executable), self.graph, ctypes.c_ulonglong(0)
        )

    def launch(self):
        return self.library.cuGraphLaunch(self.executable, self.stream)

    def free(self):
        return self.library.cuGraphExecDestroy(self.executable) or self.library.cuGraphDestroy(self.graph)


def test_a_graph_replays_what_was_captured(gpu, cuda, module):
    stream, memory, target = cuda.Stream(), cuda.mem_alloc(NUMBERS.nbytes), cuda.mem_alloc(NUMBERS.nbytes)
    source, result = pinned(cuda, NUMBERS), pinned(cuda, NUMBERS * 0)
    affine = module.get_function("affine").prepare([np.intp, np.intp, np.int32, "12s"])
    graph = Graph(gpu, stream)
    assert graph.begin() == 0
    cuda.memcpy_htod_async(memory, source, stream)
    affine.prepared_async_call((8, 1), (128, 1, 1), stream, int(memory), int(target), 1000, bytes(Affine(2, (0, 0))))
    cuda.memcpy_dtoh_async(result, target, stream)
    assert graph.end() == 0 and graph.instantiate() == 0
    stream.synchronize()
    assert not result.any()  # capturing runs nothing
    for value in (1, 5):
        source[:] = value
        assert graph.launch() == 0
        assert not (result == 2 * value).any()
        stream.synchronize()
        assert (result == 2 * value).all()
    assert gpu.counts()["graphs"] == gpu.counts()["graph_execs"] == 1
    assert graph.free() == 0
    assert gpu.counts()["graphs"] == gpu.counts()["graph_execs"] == 0


def test_launches_of_one_graph_follow_each_other(gpu, cuda):
    first, second, memory = cuda.Stream(), cuda.Stream(), cuda.mem_alloc(4)
    source, result = pinned(cuda, np.array([1], np.uint32)), pinned(cuda, np.zeros(1, np.uint32))
    graph = Graph(gpu, first)
    assert graph.begin() == 0
    cuda.memcpy_htod_async(memory, source, first)
    assert graph.end() == 0 and graph.instantiate() == 0
    cuda.memcpy_dtoh_async(result, memory, first)
    assert graph.launch() == 0  # pending in the first stream, after the download
    graph.stream = handle(second)
    assert graph.launch() == 0
    second.synchronize()  # needs the first launch, and so what is before it in its stream
    assert result[0] == 0xCDCDCDCD
    assert gpu.counts()["pending"] == 0 and graph.free() == 0


def test_a_graph_that_outlives_its_memory_is_noticed(gpu, cuda):
    context = cuda.Device(0).make_context()
    stream, memory = cuda.Stream(), cuda.mem_alloc(64)
    graph = Graph(gpu, stream)
    graph.begin()
    cuda.memset_d8_async(memory, 1, 64, stream)
    assert graph.end() == 0 and graph.instantiate() == 0
    memory.free()
    assert graph.launch() == 0
    with pytest.raises(cuda.Error, match="illegal memory access"):
        stream.synchronize()
    refused(gpu, "when it ran", "freed device memory")
    context.pop()


UNSUPPORTED, INVALIDATED, UNJOINED, ISOLATION, IMPLICIT, WRONG_THREAD = 900, 901, 904, 905, 906, 908


@pytest.mark.parametrize(
    "call", ["stream sync", "stream query", "context sync", "allocate", "free", "pin", "copy", "event query", "load"]
)
def test_what_a_capture_does_not_survive(gpu, cuda, call):
    stream, other, event, memory = cuda.Stream(), cuda.Stream(), cuda.Event(), cuda.mem_alloc(64)
    event.record(other)
    host = np.zeros(16, np.float32)
    calls = {
        "stream sync": stream.synchronize,
        "stream query": stream.is_done,
        "context sync": cuda.Context.synchronize,
        "allocate": lambda: cuda.mem_alloc(64),
        "pin": lambda: cuda.pagelocked_empty(4, np.uint8),
        "copy": lambda: cuda.memcpy_htod(memory, host),
        "event query": event.query,
        "load": lambda: cuda.module_from_buffer(PTX),
    }
    graph = Graph(gpu, stream)
    assert graph.begin() == 0
    if call == "free":
        assert gpu.library().cuMemFree_v2(ctypes.c_uint64(int(memory))) == UNSUPPORTED
    else:
        with pytest.raises(cuda.Error, match="captur"):
            calls[call]()
    refused(gpu)
    assert graph.end() == INVALIDATED
    assert graph.begin() == 0 and graph.end() == 0  # and the stream is usable again
    gpu.library().cuGraphDestroy(graph.graph)


@pytest.mark.parametrize(("mode", "spoiled"), [(0, True), (1, False), (2, False)])
def test_other_threads_disturb_a_capture_in_global_mode_alone(gpu, cuda, mode, spoiled):
    stream, codes = cuda.Stream(), []
    library, current = gpu.library(), ctypes.c_void_p()
    assert library.cuCtxGetCurrent(ctypes.byref(current)) == 0
    graph = Graph(gpu, stream)
    assert graph.begin(mode) == 0

    def allocate():
        memory = ctypes.c_uint64()
        library.cuCtxPushCurrent_v2(current)
        codes.append(library.cuMemAlloc_v2(ctypes.byref(memory), 64))
        if not codes[0]:
            codes.append(library.cuMemFree_v2(memory))
        library.cuCtxPopCurrent_v2(None)

    thread = threading.Thread(target=allocate)
    thread.start()
    thread.join()
    assert graph.end() == (INVALIDATED if spoiled else 0)
    assert codes == ([UNSUPPORTED] if spoiled else [0, 0])
    if spoiled:
        refused(gpu, "capturing")
    else:
        gpu.library().cuGraphDestroy(graph.graph)


def test_captures_across_streams_join_by_events(gpu, cuda):
    stream, other, fork, join, before = cuda.Stream(), cuda.Stream(), cuda.Event(), cuda.Event(), cuda.Event()
    memory, result = cuda.mem_alloc(4), pinned(cuda, np.zeros(1, np.uint32))
    before.record(other)
    graph = Graph(gpu, stream)
    graph.begin()
    fork.record(stream)
    other.wait_for_event(fork)
    cuda.memset_d32_async(memory, 42, 1, other)
    join.record(other)
    stream.wait_for_event(join)
    cuda.memcpy_dtoh_async(result, memory, stream)
    assert graph.end() == 0 and graph.instantiate() == 0 and graph.launch() == 0
    stream.synchronize()
    assert result[0] == 42 and graph.free() == 0

    graph.begin()
    fork.record(stream)
    other.wait_for_event(fork)
    cuda.memset_d32_async(memory, 42, 1, other)
    assert graph.end() == UNJOINED
    refused(gpu, "did not come back")

    graph.begin()
    with pytest.raises(cuda.Error, match="uncaptured work"):
        stream.wait_for_event(before)
    refused(gpu, "not captured")
    assert graph.end() == INVALIDATED

    graph.begin()
    codes = []
    current = ctypes.c_void_p()
    gpu.library().cuCtxGetCurrent(ctypes.byref(current))

    def end():
        gpu.library().cuCtxPushCurrent_v2(current)
        codes.append(graph.end())
        gpu.library().cuCtxPopCurrent_v2(None)

    thread = threading.Thread(target=end)
    thread.start()
    thread.join()
    assert codes == [WRONG_THREAD]
    refused(gpu, "another thread")
    assert graph.end() == INVALIDATED


# ------------------------------------------------------------------------------------------------------------ misuse


def test_copies_outside_live_memory_are_refused(gpu, cuda):
    memory, host = cuda.mem_alloc(64), np.zeros(16, np.float32)
    small = cuda.pagelocked_empty(8, np.uint8)
    for call, why in [
        (lambda: cuda.memcpy_htod(int(memory) + 4, host), "beyond their allocation of 64"),
        (lambda: cuda.memcpy_dtoh(host, int(memory) + 1), "beyond their allocation of 64"),
        (lambda: cuda.memcpy_htod(0x1234, host), "in no live device allocation"),
        (lambda: cuda.memcpy_dtod(int(memory), int(memory) + 32, 33), "beyond"),
        (lambda: cuda.memset_d8(memory, 0, 65), "beyond"),
    ]:
        with pytest.raises(cuda.Error, match="invalid argument"):
            call()
        refused(gpu, why)
    library = gpu.library()
    sizes = ctypes.c_uint64(int(memory)), ctypes.c_void_p(small.ctypes.data), ctypes.c_size_t(64)
    assert library.cuMemcpyHtoD_v2(*sizes) == 1
    refused(gpu, "pinned allocation of 8")


def test_freeing_twice_or_inside_is_refused(gpu, cuda):
    library, memory = gpu.library(), ctypes.c_uint64()
    assert library.cuMemAlloc_v2(ctypes.byref(memory), 64) == 0
    assert library.cuMemFree_v2(ctypes.c_uint64(memory.value + 8)) == 1
    refused(gpu, "not the start")
    assert library.cuMemFree_v2(memory) == 0
    assert library.cuMemFree_v2(memory) == 1
    refused(gpu, "freed before")
    assert library.cuMemFreeHost(memory) == 1
    refused(gpu, "pinned")
    assert library.cuMemAlloc_v2(ctypes.byref(memory), 0) == 1
    refused(gpu, "0 bytes")


def test_without_a_current_context_nothing_works(gpu, cuda):
    library, memory, stack = gpu.library(), ctypes.c_uint64(), []
    # What other tests left on this thread's stack goes too, until it is empty.
    while library.cuCtxPopCurrent_v2(ctypes.byref(current := ctypes.c_void_p())) == 0:
        stack.append(current)
    gpu.clear()
    assert stack
    try:
        assert library.cuMemAlloc_v2(ctypes.byref(memory), 64) == 201  # CUDA_ERROR_INVALID_CONTEXT
        refused(gpu, "no context is current")
        assert library.cuCtxSynchronize() == 201
        refused(gpu, "no context is current")
    finally:
        library.cuCtxPushCurrent_v2(stack[0])
    codes = []
    thread = threading.Thread(target=lambda: codes.append(library.cuCtxSynchronize()))  # contexts are per thread
    thread.start()
    thread.join()
    assert codes == [201]
    refused(gpu, "no context is current")


def test_what_belongs_to_another_context_is_refused(gpu, cuda, module):
    stream, event, memory = cuda.Stream(), cuda.Event(), cuda.mem_alloc(64)
    kernel = module.get_function("overrun").prepare([np.intp, np.int32])
    context = cuda.Device(0).make_context()
    try:
        host = np.zeros(16, np.float32)
        for call, why in [
            (stream.synchronize, "stream belongs"),
            (event.query, "event belongs"),
            (lambda: cuda.memcpy_htod(memory, host), "memory belongs"),
            (lambda: kernel.prepared_call((1, 1), (1, 1, 1), int(memory), 0), "function belongs"),
            (lambda: module.get_function("affine"), "module belongs"),
        ]:
            with pytest.raises(cuda.Error, match="invalid"):
                call()
            refused(gpu, why)
    finally:
        context.pop()


def test_destroyed_handles_are_refused(gpu, cuda):
    library, stream, event = gpu.library(), ctypes.c_void_p(), ctypes.c_void_p()
    library.cuStreamCreate(ctypes.byref(stream), 0)
    library.cuEventCreate(ctypes.byref(event), 0)
    assert library.cuStreamDestroy_v2(stream) == 0 and library.cuEventDestroy_v2(event) == 0
    assert library.cuStreamSynchronize(stream) == 400  # CUDA_ERROR_INVALID_HANDLE
    refused(gpu, "no live stream")
    assert library.cuEventRecord(event, None) == 400
    refused(gpu, "no live event")
    assert library.cuEventDestroy_v2(event) == 400
    refused(gpu, "no live event")
    assert library.cuGraphLaunch(event, None) == 400
    refused(gpu, "no live executable graph")


def test_what_a_context_leaves_behind_is_counted(gpu, cuda):
    library, memory, stream = gpu.library(), ctypes.c_uint64(), ctypes.c_void_p()
    before = gpu.counts()
    context = cuda.Device(0).make_context()
    library.cuMemAlloc_v2(ctypes.byref(memory), 64)
    library.cuStreamCreate(ctypes.byref(stream), 0)
    assert gpu.counts()["allocations"] == before["allocations"] + 1
    context.pop()
    context.detach()
    assert gpu.counts() == {**before, "abandoned": 2}
    assert gpu.misuse() == []


def test_the_primary_context_lives_while_it_is_retained(gpu, cuda):
    contexts = gpu.counts()["contexts"]
    first = cuda.Device(0).retain_primary_context()
    second = cuda.Device(0).retain_primary_context()
    assert first == second and gpu.counts()["contexts"] == contexts + 1
    first.push()
    memory = cuda.mem_alloc(64)
    del memory
    cuda.Context.pop()
    first.detach()
    assert gpu.counts()["contexts"] == contexts + 1
    second.detach()
    assert gpu.counts()["contexts"] == contexts


def test_host_functions_may_not_call_the_driver(gpu, cuda):
    library, codes = gpu.library(), []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def call(_):
        codes.append(library.cuCtxSynchronize())

    assert library.cuLaunchHostFunc(None, call, None) == 0 and codes == []
    cuda.Context.synchronize()
    assert codes == [800]  # CUDA_ERROR_NOT_PERMITTED
    refused(gpu, "host function")


def test_what_is_not_simulated_says_so(gpu, cuda):
    with pytest.raises(cuda.Error, match="not supported"):
        cuda.managed_empty(4, np.float32, mem_flags=cuda.mem_attach_flags.GLOBAL)
    refused(gpu, "not simulated")


def test_calls_are_recorded_while_the_log_is_on(gpu, cuda):
    cuda.mem_alloc(8).free()
    assert gpu.calls() == []
    gpu.log()
    stream = cuda.Stream()
    memory = cuda.mem_alloc(64)
    cuda.memset_d8_async(memory, 0, 64, stream)
    stream.synchronize()
    made, allocated, filled, waited = gpu.calls()
    assert (made.name, allocated.name, waited.name) == ("cuStreamCreate", "cuMemAlloc", "cuStreamSynchronize")
    assert allocated.bytes == 64 and allocated.pointer == int(memory) == filled.pointer
    assert filled.stream == stream.handle and filled.thread == threading.get_ident() and filled.result == 0
    gpu.log(False)
    gpu.clear()
    stream.synchronize()
    assert gpu.calls() == []


# ----------------------------------------------------------------------------------------------------------- threads


# Waits that pycuda makes with the GIL held must let go of it: the work they wait for, on another thread, wants it.
HOLDING = """
import ctypes, faulthandler, sys, threading, time
faulthandler.dump_traceback_later(20, exit=True)  # a deadlock ends with everyone's traceback
sys.path.insert(0, {tests!r})
import gpu_sim
library = gpu_sim.install()
import pycuda.driver as cuda

cuda.init()
context = cuda.Device(0).make_context()
stream, memory, event = cuda.Stream(), cuda.mem_alloc(64), cuda.Event()
inside = threading.Event()

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def host(_):
    inside.set()
    time.sleep(0.2)  # gives the GIL away, and wants it back

def synchronize():
    context.push()
    stream.synchronize()
    cuda.Context.pop()

for wait in (memory.free, lambda: event.query() or event.query(), lambda: stream.is_done() or stream.is_done()):
    library.cuLaunchHostFunc(ctypes.c_void_p(stream.handle), host, None)
    event.record(stream)
    inside.clear()
    thread = threading.Thread(target=synchronize)
    thread.start()
    inside.wait()
    wait()
    thread.join()
del memory, event, stream
context.pop()
print(gpu_sim.misuse())
"""

HAMMER = """
import ctypes, faulthandler, random, sys, threading
faulthandler.dump_traceback_later(60, exit=True)  # a deadlock ends with everyone's traceback
sys.path.insert(0, {tests!r})
import gpu_sim
library = gpu_sim.install()
import numpy as np
import pycuda.driver as cuda

cuda.init()
context = cuda.Device(0).make_context()
shared = cuda.Stream()
context.pop()
called, wrong = [], []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def host(_):
    called.append(sum(range(200)))  # wants the GIL, and loses it now and then

sys.setswitchinterval(1e-5)

def work(seed):
    chance = random.Random(seed)
    try:
        context.push()
        own, event = cuda.Stream(), cuda.Event()
        for turn in range(60):
            values = np.full(chance.randrange(1, 5000), seed * 1000 + turn, np.int32)
            source, result = (cuda.pagelocked_empty(values.shape, np.int32) for _ in range(2))
            source[:] = values
            memory = cuda.mem_alloc(values.nbytes)
            stream = chance.choice([own, shared])
            cuda.memcpy_htod_async(memory, source, stream)
            library.cuLaunchHostFunc(ctypes.c_void_p(stream.handle), host, None)
            event.record(stream)
            other = chance.choice([own, shared])
            other.wait_for_event(event)
            cuda.memcpy_dtoh_async(result, memory, other)
            end = chance.randrange(4)
            if end == 0:
                memory.free()  # keeps the GIL while it waits for everyone's work
            elif end == 1:
                event.record(other)
                while not event.query():
                    pass
            elif end == 2:
                cuda.Context.synchronize()
            else:
                other.synchronize()
            if not (result == values).all():
                wrong.append((seed, turn))
        del own, event, memory, source, result, stream, other
    except BaseException as error:
        wrong.append(repr(error))
    finally:
        cuda.Context.pop()

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong[:5]
assert len(called) == 480, len(called)
print(gpu_sim.misuse(), flush=True)
import os
os._exit(0)  # pycuda's own clean-up across threads is not what is tested
"""


def run_apart(program: str) -> None:
    """A deadlock cannot be interrupted, so what might deadlock runs in a process of its own."""
    program = program.format(tests=str(Path(__file__).resolve().parents[1]))
    # What hangs is a deadlock: on a slow machine it takes seconds.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "[]", done.stdout[-3000:]


def test_waiting_with_the_gil_held_does_not_deadlock(gpu):
    run_apart(HOLDING)


def test_eight_threads_do_not_deadlock_or_mix_their_data(gpu):
    run_apart(HAMMER)

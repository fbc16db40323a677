"""A simulated GPU: the real pycuda on a simulated CUDA driver, and TensorRT engines run by ONNX Runtime.

    import gpu_sim

    gpu_sim.install()  # before pycuda is imported
    gpu_sim.load_kernels("runtime/backends/tensorrt/kernels.cu")
    with gpu_sim.tensorrt():  # `import tensorrt_rtx` gives the stand-in
        ...
    assert gpu_sim.misuse() == []

Work is deferred until something synchronises, so that a missing synchronisation shows. The driver refuses misuse as
the real one does, and remembers it. What is simulated, and how it differs, is said in driver.cpp and tensorrt_sim.py.
"""

import ctypes
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from gpu_sim import build

TOTAL = 8 << 30
CAPABILITY = (8, 9)
DRIVER = 13000  # CUDA 13.0: the oldest that TensorRT for RTX runs with, so that nothing newer is needed unnoticed

_library: ctypes.CDLL | None = None
_settings = {"devices": 1, "total": TOTAL, "capability": CAPABILITY, "version": DRIVER}


class Call(NamedTuple):
    """One call of the driver's API. `result` is its CUresult; `pointer` is the device's or pinned address, or 0."""

    name: str
    thread: int  # threading.get_ident()
    stream: int  # its handle; 0: the null stream, or none
    pointer: int
    bytes: int
    result: int
    detail: str  # a kernel's name and grid; "pageable" for an asynchronous copy from or to memory that is not pinned


def missing() -> str:
    """Why tests on the simulated GPU cannot run here, with the remedy; empty where they can."""
    if not build.have_pycuda():
        return f"pycuda is not installed; {build.REMEDY}"
    try:
        build.driver()
    except build.MissingError as error:
        return f"{error}; then {build.REMEDY}"
    return ""


def install() -> ctypes.CDLL:
    """Load the simulated driver, so that pycuda finds it. Call it before pycuda is imported; again does nothing.

    Raises:
        build.MissingError: this machine cannot compile the driver.
        RuntimeError: pycuda is loaded already, on another driver.
    """
    global _library
    if _library is None:
        if "pycuda._driver" in sys.modules:
            raise RuntimeError("pycuda was imported before gpu_sim.install(), on another driver")
        # The dynamic linker does not load a second library of the same SONAME: pycuda's libcuda.so.1 is this one.
        library = ctypes.CDLL(str(build.driver()), mode=ctypes.RTLD_GLOBAL)
        library.gpusim_text.restype = ctypes.c_void_p
        library.gpusim_release.argtypes = [ctypes.c_void_p]
        library.gpusim_load_kernels.restype = ctypes.c_char_p
        library.gpusim_misuse.argtypes = [ctypes.c_char_p]
        library.gpusim_current.restype = ctypes.c_uint64
        library.gpusim_released.restype = ctypes.c_size_t
        library.gpusim_check.argtypes = [ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint64]
        library.gpusim_ordered.argtypes = [ctypes.c_uint64] * 3
        library.gpusim_ended.argtypes = [ctypes.c_uint64] * 2
        library.gpusim_stream.argtypes = [ctypes.c_uint64]
        library.gpusim_configure.argtypes = [ctypes.c_int, ctypes.c_size_t, *[ctypes.c_int] * 3]
        library.cuMemAlloc_v2.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        library.cuMemFree_v2.argtypes = [ctypes.c_uint64]
        _library = library
        _configure()
    return _library


def library() -> ctypes.CDLL:
    """The simulated libcuda.so.1, for what pycuda does not wrap, such as CUDA graphs."""
    if _library is None:
        raise RuntimeError("gpu_sim.install() comes first")
    return _library


def load_kernels(*sources: str | Path, contract: str = "off") -> None:
    """Make the kernels of .cu files known: modules loaded from now on find them by name. See build.kernels."""
    path = build.kernels([Path(source) for source in sources], contract)
    if error := library().gpusim_load_kernels(str(path).encode()):
        raise RuntimeError(f"{path} cannot be loaded: {error.decode()}")


def tensorrt(name: str = "tensorrt_rtx") -> AbstractContextManager:
    """While it lasts, `import NAME` (tensorrt_rtx or tensorrt) gives the stand-in of tensorrt_sim.py."""
    from gpu_sim import tensorrt_sim

    return tensorrt_sim.installed(name)


def log(on: bool = True) -> None:
    """Keep a record of every call, or stop to."""
    library().gpusim_log(int(on))


def calls(*names: str) -> list[Call]:
    """The calls recorded since the log was switched on or cleared, or those named (as in cuda.h, without _v2)."""
    found = []
    for line in _text(0):
        name, thread, stream, pointer, size, result, detail = line.split("\t", 6)
        if not names or name in names:
            found.append(Call(name, int(thread), int(stream), int(pointer), int(size), int(result), detail))
    return found


def misuse() -> list[str]:
    """What was wrong, a sentence each: refused calls, overruns noticed when memory was freed, TensorRT's rules."""
    return _text(1)


def counts() -> dict[str, int]:
    """How many of each thing are alive, bytes of device and pinned memory, operations pending.

    `abandoned` counts what was still alive when its context was destroyed.
    """
    return {name: int(value) for name, value in (line.split("\t") for line in _text(2))}


def clear() -> None:
    """Forget calls, misuse and what was abandoned."""
    library().gpusim_clear()


def drain() -> None:
    """Run all that is queued."""
    library().gpusim_drain()


def set_memory(total_bytes: int) -> None:
    """The GPU's memory; allocations beyond it fail with out of memory."""
    _configure(total=total_bytes)


def set_capability(major: int, minor: int) -> None:
    _configure(capability=(major, minor))


def set_devices(count: int) -> None:
    """With 0, cuInit says that there is no device."""
    _configure(devices=count)


def set_driver(version: int) -> None:
    """The driver's CUDA version, as 12040 for 12.4. PTX of a newer toolkit is refused."""
    _configure(version=version)


def reset() -> None:
    """Run what is queued, forget what was recorded, and go back to one GPU of 8 GB and compute capability 8.9.

    What is alive stays: it belongs to Python objects, which free it.
    """
    drain()
    log(False)
    clear()
    _configure(devices=1, total=TOTAL, capability=CAPABILITY, version=DRIVER)


def _configure(**settings) -> None:
    _settings.update(settings)
    library().gpusim_configure(_settings["devices"], _settings["total"], *_settings["capability"], _settings["version"])


def _text(what: int) -> list[str]:
    pointer = library().gpusim_text(what)
    try:
        return ctypes.string_at(pointer).decode().splitlines()
    finally:
        library().gpusim_release(pointer)

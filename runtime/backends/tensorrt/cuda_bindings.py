"""NVIDIA's own `cuda.bindings` under the names of pycuda's driver that the backend uses.

A wheel, where pycuda wants a compiler and CUDA's headers; `device.open_driver` takes the one that is installed. Only
what the backend calls is here, with pycuda's meaning: a context is current while it is pushed, and objects give back
what they hold when Python forgets them.
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda.bindings import driver  # type: ignore[import-not-found, import-untyped, unused-ignore]

from ...arrays import AnyArray


class Error(Exception):
    """What CUDA refused."""


class MemoryError(Error):
    """CUDA is out of memory."""


def _called(name: str, *arguments: Any) -> Any:
    """What a function of the driver gives. Raises Error, or MemoryError, with the driver's own words."""
    code, *found = getattr(driver, name)(*arguments)
    if code != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(code)
        kind = MemoryError if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY else Error
        raise kind(f"{name} failed: {text.decode() if text else code.name}")
    return found[0] if len(found) == 1 else tuple(found)


def init() -> None:
    """Raises Error where there is no GPU, or no driver."""
    try:
        _called("cuInit", 0)
    except RuntimeError as error:  # no libcuda, said at length
        raise Error("no NVIDIA driver is installed here") from error


def get_driver_version() -> int:
    return int(_called("cuDriverGetVersion"))


def mem_get_info() -> tuple[int, int]:
    free, total = _called("cuMemGetInfo")
    return free, total


class Context:
    """The primary context of a device."""

    def __init__(self, device: Any) -> None:
        self._device, self._handle = device, _called("cuDevicePrimaryCtxRetain", device)

    def push(self) -> None:
        _called("cuCtxPushCurrent", self._handle)

    @staticmethod
    def pop() -> None:
        _called("cuCtxPopCurrent")

    def detach(self) -> None:
        _called("cuDevicePrimaryCtxRelease", self._device)


class Device:
    def __init__(self, index: int) -> None:
        self._device = _called("cuDeviceGet", index)

    @staticmethod
    def count() -> int:
        return int(_called("cuDeviceGetCount"))

    def name(self) -> str:
        return str(_called("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode())

    def compute_capability(self) -> tuple[int, int]:
        kind = driver.CUdevice_attribute
        major, minor = (
            int(_called("cuDeviceGetAttribute", attribute, self._device))
            for attribute in (
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return major, minor

    def retain_primary_context(self) -> Context:
        return Context(self._device)


class Allocation:
    """Memory on the GPU."""

    def __init__(self, size: int) -> None:
        self._pointer: int | None = int(_called("cuMemAlloc", size))

    def __int__(self) -> int:
        assert self._pointer is not None, "it was freed"
        return self._pointer

    def free(self) -> None:
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            _called("cuMemFree", pointer)

    def __del__(self) -> None:
        with suppress(Exception):
            self.free()


def mem_alloc(size: int) -> Allocation:
    return Allocation(size)


class Pinned:
    """Memory of the host that the GPU copies from and to; the base of arrays."""

    def __init__(self, size: int, dtype: npt.DTypeLike) -> None:
        bytes_ = size * np.dtype(dtype).itemsize
        self._pointer: int | None = int(_called("cuMemHostAlloc", bytes_, 0))
        self.__array_interface__ = {
            "shape": (size,),
            "typestr": np.dtype(dtype).str,
            "data": (self._pointer, False),
            "version": 3,
        }

    def free(self) -> None:
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            _called("cuMemFreeHost", pointer)

    def __del__(self) -> None:
        with suppress(Exception):
            self.free()


def pagelocked_empty(size: int, dtype: npt.DTypeLike) -> AnyArray:
    array: AnyArray = np.asarray(Pinned(size, dtype))
    return array


class Stream:
    def __init__(self, flags: int = 0) -> None:
        self._stream = _called("cuStreamCreate", flags)
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        _called("cuStreamSynchronize", self._stream)

    def wait_for_event(self, event: "Event") -> None:
        _called("cuStreamWaitEvent", self._stream, event.event, 0)

    def __del__(self) -> None:
        with suppress(Exception):
            _called("cuStreamDestroy", self._stream)


event_flags = SimpleNamespace(BLOCKING_SYNC=1, DISABLE_TIMING=2)


class Event:
    def __init__(self, flags: int = 0) -> None:
        self.event = _called("cuEventCreate", flags)

    def record(self, stream: Stream) -> None:
        _called("cuEventRecord", self.event, stream.handle)

    def synchronize(self) -> None:
        _called("cuEventSynchronize", self.event)

    def __del__(self) -> None:
        with suppress(Exception):
            _called("cuEventDestroy", self.event)


def memcpy_htod_async(destination: Allocation, source: AnyArray, stream: Stream) -> None:
    _called("cuMemcpyHtoDAsync", int(destination), source.ctypes.data, source.nbytes, stream.handle)


def memcpy_dtoh_async(destination: AnyArray, source: Allocation, stream: Stream) -> None:
    _called("cuMemcpyDtoHAsync", destination.ctypes.data, int(source), destination.nbytes, stream.handle)


_TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float, "d": ctypes.c_double}


class Function:
    """A kernel."""

    def __init__(self, module: "Module", function: Any) -> None:
        self._module, self._function = module, function  # the module lives as long as its kernels
        self._types: tuple[Any, ...] = ()

    def prepare(self, types: str) -> None:
        self._types = tuple(_TYPES[letter] for letter in types)

    def prepared_async_call(
        self, grid: Sequence[int], block: Sequence[int], stream: Stream | None, *arguments: Any
    ) -> None:
        _called(
            "cuLaunchKernel", self._function, *grid, *block, 0, 0 if stream is None else stream.handle,
            (tuple(arguments), self._types), 0,
        )  # fmt: skip

    def prepared_call(self, grid: Sequence[int], block: Sequence[int], *arguments: Any) -> None:
        self.prepared_async_call(grid, block, None, *arguments)


class Module:
    def __init__(self, image: bytes) -> None:
        self._module = _called("cuModuleLoadData", image + b"\0")  # PTX is text that ends with a zero

    def get_function(self, name: str) -> Function:
        return Function(self, _called("cuModuleGetFunction", self._module, name.encode()))

    def __del__(self) -> None:
        with suppress(Exception):
            _called("cuModuleUnload", self._module)


def module_from_buffer(image: bytes) -> Module:
    return Module(image)

"""CUDA graphs: what a network queues, captured once and launched as one."""

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..errors import DeployError

THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads go on as if nothing were captured


class Graph:
    """A captured CUDA graph, and the context it lives by. pycuda has none, so the driver itself is called."""

    def __init__(self, executable: ctypes.c_void_p, context: Any) -> None:
        self._executable, self._context = executable, context

    @classmethod
    def capture(cls, stream: Any, context: Any, work: Callable[[], None]) -> "Graph | None":
        """What `work` makes `context` queue on `stream`, without running it; None where it cannot be captured."""
        driver, handle = libcuda(), ctypes.c_void_p(stream.handle)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if driver.cuStreamBeginCapture_v2(handle, THREAD_LOCAL):
            return None
        failed = True
        try:
            with suppress(DeployError):
                work()
                failed = False
        finally:  # the stream could not be used again
            code = driver.cuStreamEndCapture(handle, ctypes.byref(graph))
        if code or failed or not graph:
            if graph:
                driver.cuGraphDestroy(graph)
            return None
        code = driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        driver.cuGraphDestroy(graph)
        return None if code else cls(executable, context)

    def launch(self, stream: Any) -> None:
        """Queue it on a stream. Raises DeployError."""
        if code := libcuda().cuGraphLaunch(self._executable, ctypes.c_void_p(stream.handle)):
            raise DeployError(f"CUDA did not launch a graph (error {code}); please report this")

    def destroy(self) -> None:
        """Give it back. It may not be in flight."""
        libcuda().cuGraphExecDestroy(self._executable)
        self._context = None


def libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")

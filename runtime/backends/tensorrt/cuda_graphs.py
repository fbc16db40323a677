"""CUDA graphs: what a call queues, captured once and launched as one."""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from ...errors import DeployError

THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads go on as if nothing were captured

_capturing = threading.Lock()


class Graph:
    """A captured CUDA graph, and the context it lives by. pycuda has none, so the driver itself is called."""

    def __init__(self, executable: ctypes.c_void_p, context: Any) -> None:
        self._executable, self._context = executable, context

    @classmethod
    def capture(cls, stream: Any, context: Any, work: Callable[[], None], refused: type[Exception]) -> "Graph | None":
        """What `work` queues on `stream`, without running it; None where it cannot be captured.

        Args:
            context: that it runs in, which the graph keeps.
            refused: what the driver's refusals raise.
        """
        driver, handle = libcuda(), ctypes.c_void_p(stream.handle)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        failed = True
        # What a library does for the first time in a capture may disturb another one of this process.
        with _capturing:
            if driver.cuStreamBeginCapture_v2(handle, THREAD_LOCAL):
                return None
            try:
                with suppress(DeployError, refused):
                    work()
                    failed = False
            finally:  # the stream could not be used again
                code = driver.cuStreamEndCapture(handle, ctypes.byref(graph))
                if graph and (code or failed):
                    driver.cuGraphDestroy(graph)
        if code or failed or not graph:
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
        executable, self._executable = self._executable, ctypes.c_void_p()
        if executable:
            libcuda().cuGraphExecDestroy(executable)
        self._context = None


@contextmanager
def beside_other_captures() -> Iterator[None]:
    """In it this thread neither heeds nor spoils what other threads capture: PyTorch's graphs, say."""
    mode = ctypes.c_int(THREAD_LOCAL)
    libcuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
    try:
        yield
    finally:
        libcuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def end_capture(stream: Any) -> None:
    """End what captures a stream, if anything does, and forget what was captured."""
    handle, status, graph = ctypes.c_void_p(stream.handle), ctypes.c_int(), ctypes.c_void_p()
    if not libcuda().cuStreamIsCapturing(handle, ctypes.byref(status)) and status.value:
        libcuda().cuStreamEndCapture(handle, ctypes.byref(graph))
        if graph:
            libcuda().cuGraphDestroy(graph)


@cache
def libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")

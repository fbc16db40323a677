"""Memory on a GPU and beside it, in buffers that only grow."""

from contextlib import suppress
from typing import Any

import numpy as np

from ...arrays import AnyArray

ALIGNMENT = 256  # bytes, of what is allocated
# CU_STREAM_NON_BLOCKING: neither waits for the null stream, which others in the process may use, nor spoils it.
NON_BLOCKING = 1


class Buffer:
    """Device memory that only grows.

    Args:
        cuda: the driver, by cuda.bindings or pycuda.

    Attributes:
        pointer: the driver's, None before the first `reserve`.
        size: in bytes.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.pointer: Any = None
        self.size = 0

    def reserve(self, size: int) -> None:
        """At least `size` bytes. Nothing queued may use it. Raises the driver's MemoryError."""
        if size > self.size or self.pointer is None:
            self.release()
            size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
            self.pointer = self._cuda.mem_alloc(size)
            self.size = size

    def release(self) -> None:
        """Give it back. Nothing queued may use it."""
        pointer, self.pointer, self.size = self.pointer, None, 0
        if pointer is not None:
            with suppress(self._cuda.Error):
                pointer.free()


class Pinned:
    """Host memory that a GPU copies from and to, which only grows.

    Attributes:
        array: uint8; empty before the first `reserve`.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.array: AnyArray = np.empty(0, np.uint8)

    def reserve(self, size: int) -> None:
        """At least `size` bytes. Nothing queued may use it. Raises the driver's MemoryError."""
        if size > self.array.size:
            self.release()
            self.array = self._cuda.pagelocked_empty(-(-size // ALIGNMENT) * ALIGNMENT, np.uint8)

    def release(self) -> None:
        """Give it back. Nothing queued may use it."""
        owner: Any = self.array.base
        self.array = np.empty(0, np.uint8)
        if owner is not None:
            with suppress(self._cuda.Error):
                owner.free()

"""Memory on a GPU and beside it: buffers that only grow, and what one image in flight has to itself."""

from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays import AnyArray

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


class Slot:
    """What one image in flight has to itself: pinned memory, its image and labels on the GPU, a stream, events.

    Attributes:
        places: where each row and column of the labels lies in the scores.
        placed: what `places` was computed for; None: nothing.
    """

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self.image, self.labels, self.places = Buffer(cuda), Buffer(cuda), Buffer(cuda)
        self.placed: Any = None
        self.host_in: Any = None
        self.host_out: Any = None
        self.stream = cuda.Stream(NON_BLOCKING)
        quiet = cuda.event_flags.DISABLE_TIMING
        self.uploaded, self.computed = cuda.Event(quiet), cuda.Event(quiet)
        # A waiting thread sleeps: the CPU has images to decode.
        self.done = cuda.Event(quiet | cuda.event_flags.BLOCKING_SYNC)

    def reserve(self, image: int, labels: int, places: int = 0) -> None:
        """Bytes for an image, its labels and their places. The slot is not in use: nothing queued has the old ones."""
        self.image.reserve(image)
        self.labels.reserve(labels)
        if places > self.places.size:
            self.placed = None
            self.places.reserve(places)
        for name, size in (("host_in", image), ("host_out", labels)):
            array = getattr(self, name)
            if array is None or array.size < size:
                setattr(self, name, None)
                if array is not None:
                    array.base.free()
                size = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
                setattr(self, name, self._cuda.pagelocked_empty(size, np.uint8))

    def put(self, image: AnyArray) -> None:
        """Copy an image into pinned memory."""
        view = self.host_in[: image.nbytes].view(image.dtype).reshape(image.shape)
        np.copyto(view, image)

    def upload(self, size: int, compute: Any) -> None:
        """Queue the copy of so many bytes to the GPU; `compute`, a stream, goes on when they are there."""
        self._cuda.memcpy_htod_async(self.image.pointer, self.host_in[:size], self.stream)
        self.uploaded.record(self.stream)
        compute.wait_for_event(self.uploaded)

    def download(self, size: int, compute: Any) -> None:
        """Queue the copy of so many bytes of labels back, after what `compute` has queued; `done` tells the end."""
        self.computed.record(compute)
        self.stream.wait_for_event(self.computed)
        self._cuda.memcpy_dtoh_async(self.host_out[:size], self.labels.pointer, self.stream)
        self.done.record(self.stream)

    def taken(self, size: int, dtype: npt.DTypeLike) -> AnyArray:
        """A copy of the labels that came down: so many bytes, flat."""
        labels: AnyArray = self.host_out[:size].view(dtype).copy()
        return labels

    def release(self) -> None:
        """Give all of it back. Nothing queued may use it."""
        for buffer in (self.image, self.labels, self.places):
            buffer.release()
        for array in (self.host_in, self.host_out):
            if array is not None:
                with suppress(self._cuda.Error):
                    array.base.free()
        self.host_in = self.host_out = self.stream = self.uploaded = self.computed = self.done = None

"""One of the ways through a GPU: a stream, and all that a batch in flight has to itself.

Lanes share the weights and nothing else, so that calls of two threads overlap, copies and kernels alike, and neither
waits for the other. All of a call is one sequence on one stream: the images go up, are prepared, run and labelled, and
the labels come down. Of a size that comes again the sequence is one CUDA graph.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import AnyArray, Image, size_of
from .buffers import NON_BLOCKING, Buffer, Pinned
from .cuda_graphs import Graph, end_capture
from .device_network import DeviceNetwork, Scores
from .kernels import Kernels, Layout

log = logging.getLogger(__name__)

GRAPHS = 16  # CUDA graphs kept by a lane; each has a context of its own
CAPTURES = 3  # failures in a row, after which no more graphs are captured
SHAPES = 1024  # batches whose memory and scores' shape are remembered
RUNS = 3  # of a batch, until its graph is there: as it is, in a context of its own, and captured
MOST_PIXELS = (1 << 31) - 1  # of a padded image, and cells of its scores: kernels.cu counts them in 32 bits


@dataclass(frozen=True)
class Batch:
    """What is run at once.

    Attributes:
        profile: of the plan.
        count: of images.
        padded: (height, width) that all of them are padded to.
    """

    profile: int
    count: int
    padded: tuple[int, int]


@dataclass(frozen=True)
class Needs:
    """What is known of the network for a batch: bytes of its working memory, and (K, h, w) of an image's scores."""

    memory: int
    scores: Scores


class Lane:
    """A stream, with memory of its own for one batch at a time. One thread at a time may call it.

    Args:
        cuda: the driver, with the GPU's context current.
        network, kernels: that it runs.
        graphs: CUDA graphs kept at most; 0: none.

    Attributes:
        stream: that all is queued on.
        graphs: None: seen once; a context: ready to be captured; a graph.
        contexts: by profile, of batches that have no graph.
        scores: buffer that the network writes.
    """

    def __init__(self, cuda: Any, network: DeviceNetwork, kernels: Kernels, graphs: int = GRAPHS) -> None:
        self._cuda, self._network, self._kernels, self._graph_limit = cuda, network, kernels, graphs
        self._failures = 0  # of captures, in a row
        self.graphs: OrderedDict[Batch, Any] = OrderedDict()
        self.contexts: dict[int, Any] = {}
        self._set: dict[int, tuple[Batch, Needs]] = {}  # profile → what its context is set to
        self._known: OrderedDict[Batch, Needs] = OrderedDict()
        self._placed: tuple[Scores, Layout] | None = None  # whose places are in pinned memory
        self._memory, self._input, self.scores, self._best, self._upload, self._labels = (
            Buffer(cuda) for _ in range(6)
        )
        self._host_in, self._host_out = Pinned(cuda), Pinned(cuda)
        self.stream = cuda.Stream(NON_BLOCKING)
        # A waiting thread sleeps: the CPU has images to decode.
        self._done = cuda.Event(cuda.event_flags.DISABLE_TIMING | cuda.event_flags.BLOCKING_SYNC)

    # Memory

    @property
    def held(self) -> int:
        """Bytes of the GPU's memory."""
        return sum(buffer.size for buffer in self._buffers)

    @property
    def _buffers(self) -> tuple[Buffer, ...]:
        return self._memory, self._input, self.scores, self._best, self._upload, self._labels

    def needs(self, batch: Batch) -> Needs:
        """What the network needs for a batch."""
        found = self._known.get(batch)
        if found is None:
            with self._network.lock:
                found = self._known[batch] = self._ready(batch)[1]
            if len(self._known) > SHAPES:
                self._known.popitem(last=False)
        return found

    def reserve(self, batch: Batch) -> None:
        """Make sure that all buffers are large enough for a batch. Raises the driver's MemoryError."""
        needs, layout = self.needs(batch), self._kernels.layout(batch.count, batch.padded)
        classes, rows, columns = needs.scores
        cells, input_type, score_type = batch.count * rows * columns, self._network.input_type, self._network.score_type
        inputs = batch.count * self._network.channels * layout.area
        sizes = (
            needs.memory, inputs * np.dtype(input_type).itemsize, cells * classes * np.dtype(score_type).itemsize,
            cells * layout.label, layout.upload, layout.download,
        )  # fmt: skip
        pinned = (self._host_in, layout.upload), (self._host_out, layout.download)
        device = tuple(zip(self._buffers, sizes, strict=True))
        if any(size > buffer.size for buffer, size in device) or any(size > host.array.size for host, size in pinned):
            self._drop_graphs()  # they have the old addresses in them
            for buffer, size in device:
                buffer.reserve(size)
            for host, size in pinned:
                if size > host.array.size:
                    self._placed = None
                    host.reserve(size)

    def trim(self) -> None:
        """Give back all that grows: the buffers, and the graphs on them. Nothing is queued."""
        self._drop_graphs()
        self._placed = None
        for buffer in self._buffers:
            buffer.release()
        for pinned in (self._host_in, self._host_out):
            pinned.release()

    def settle(self) -> None:
        """Wait for all that is queued, after an error or an interruption; a capture that was cut off is ended first."""
        end_capture(self.stream)
        self.stream.synchronize()

    def release(self) -> None:
        """Give everything back. Nothing is queued."""
        self.trim()
        self._set.clear()
        self.contexts.clear()
        self.stream = self._done = None

    # Running

    def put(self, batch: Batch, images: Sequence[Image]) -> None:
        """Write images where they are copied from. `reserve` has seen the batch."""
        layout, scores = self._kernels.layout(batch.count, batch.padded), self.needs(batch).scores
        host = self._host_in.array
        if self._placed != (scores, layout):
            self._placed = None
            table = self._kernels.places(scores[1:], batch.padded)
            host[layout.places : layout.images] = table.view(np.uint8)
            self._placed = scores, layout
        host[: 8 * batch.count].view(np.int32)[:] = np.array([size_of(image) for image in images]).ravel()
        each = layout.area * layout.pixel
        for index, image in enumerate(images):
            start = layout.images + index * each
            np.copyto(host[start : start + image.nbytes].view(image.dtype).reshape(image.shape), image)

    def labels(self, batch: Batch) -> None:
        """Queue all of a call on what `put` has written, by its graph where there is one; `wait` for it.

        A batch that comes a second time is worth a graph. It gets a context of its own, since a graph is valid only as
        long as the context that it was captured from keeps its state (TensorRT's guide, "CUDA Graphs"). That context
        first runs as usual, and what comes next is captured: the first run after a change of shape may do work that
        must not be.
        """
        known = self.graphs.get(batch)
        if isinstance(known, Graph):
            self.graphs.move_to_end(batch)
            known.launch(self.stream)
        else:
            with self._network.lock:
                if known is None or not self._network.captures or not self._captured(batch, known):
                    self._queue(batch, self._next_context(batch))
        self._done.record(self.stream)

    def wait(self) -> None:
        """Wait for what `labels` has queued."""
        self._done.synchronize()

    def taken(self, batch: Batch, index: int, size: tuple[int, int], dtype: str) -> AnyArray:
        """A copy of the labels of one image that came down, [height, width]."""
        layout = self._kernels.layout(batch.count, batch.padded)
        start = index * layout.area * layout.label
        count = size[0] * size[1] * layout.label
        found: AnyArray = self._host_out.array[start : start + count].view(dtype).reshape(size).copy()
        return found

    def score(self, batch: Batch) -> Scores:
        """Queue the upload and the network alone, whose results stay in `scores`: (K, h, w) of each."""
        with self._network.lock:
            context, needs = self._ready(batch)
            self._bind(context)
            self._forward(batch, context)
        return needs.scores

    def execute(self, batch: Batch) -> None:
        """Queue the bare network, on whatever its input holds: what a call is measured against."""
        with self._network.lock:
            context, _ = self._ready(batch)
            self._bind(context)
            self._network.execute(context, self.stream)

    def _bind(self, context: Any) -> None:
        self._network.bind(context, self._memory, self._input, self.scores)

    def _forward(self, batch: Batch, context: Any) -> Layout:
        layout = self._kernels.layout(batch.count, batch.padded)
        self._cuda.memcpy_htod_async(self._upload.pointer, self._host_in.array[: layout.upload], self.stream)
        self._kernels.prepare(layout, int(self._upload.pointer), int(self._input.pointer), self.stream)
        self._network.execute(context, self.stream)
        return layout

    def _queue(self, batch: Batch, context: Any) -> None:
        layout = self._forward(batch, context)
        self._kernels.label(
            layout, int(self._upload.pointer), int(self.scores.pointer), self.needs(batch).scores,
            int(self._best.pointer), int(self._labels.pointer), self.stream,
        )  # fmt: skip
        self._cuda.memcpy_dtoh_async(self._host_out.array[: layout.download], self._labels.pointer, self.stream)

    # Contexts and graphs

    def _next_context(self, batch: Batch) -> Any:
        """The context that runs a batch which has no graph, ready."""
        worth = self._graph_limit > 0 and self._network.captures
        if not worth or batch not in self.graphs:
            context = self._ready(batch)[0]
            if worth:
                self.graphs[batch] = None
                self._evict()
        else:
            context = self._network.new_context(batch.profile, self.stream)
            self._network.set_size(context, batch.count, batch.padded)
            self.graphs[batch] = context
            self.graphs.move_to_end(batch)
        self._bind(context)
        return context

    def _ready(self, batch: Batch) -> tuple[Any, Needs]:
        """The profile's context, set to a batch, and what it needs at that."""
        profile = batch.profile
        if profile not in self.contexts:
            self.contexts[profile] = self._network.new_context(profile, self.stream)
        context = self.contexts[profile]
        if profile not in self._set or self._set[profile][0] != batch:
            self._set.pop(profile, None)
            memory = self._network.set_size(context, batch.count, batch.padded)
            self._set[profile] = batch, Needs(memory, self._network.scores_of(context))
        return context, self._set[profile][1]

    def _captured(self, batch: Batch, context: Any) -> bool:
        """Capture a call in a context that has run once, and launch its graph; False where it cannot be captured."""
        self.graphs.move_to_end(batch)
        graph = None
        if self._network.can_capture(context, self.stream):
            graph = Graph.capture(self.stream, context, lambda: self._queue(batch, context), self._cuda.Error)
        if graph is not None:
            self.graphs[batch], self._failures = graph, 0
            graph.launch(self.stream)
            return True
        self.stream.synchronize()
        self._failures += 1
        self.graphs[batch] = None  # as if it came for the first time: its context may be in any state
        log.info(
            "%s: no CUDA graph could be captured at %d×%d (%d of %d times): something else in this process used the "
            "GPU meanwhile, or the network cannot be captured", self._network.source, *batch.padded, self._failures,
            CAPTURES,
        )  # fmt: skip
        if self._failures >= CAPTURES:
            self._network.give_up_captures()
            self._drop_graphs()
            self._set.clear()
            self.contexts.clear()
        return False

    def _evict(self) -> None:
        while len(self.graphs) > self._graph_limit:
            _, oldest = self.graphs.popitem(last=False)
            if isinstance(oldest, Graph):
                oldest.destroy()

    def _drop_graphs(self) -> None:
        """Forget all graphs and their contexts. Nothing queued may use them."""
        while self.graphs:  # one by one, lest an interruption leave one that is destroyed
            _, graph = self.graphs.popitem()
            if isinstance(graph, Graph):
                graph.destroy()

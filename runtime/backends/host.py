"""A core whose images are prepared and labelled by NumPy, in host memory, whatever library runs its stages."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import numpy as np

from ..arrays import AnyArray, Floats, Image, Labels, size_of
from ..engine_format.model_card import ModelCard
from ..engine_format.stage import Upsampling
from ..errors import DeployError
from ..head.heads import Heads
from ..pixels.prepare import Border, input_shape, prepare
from ..process_memory import give_back_freed
from . import Session


class HostBackend:
    """The stages of a core, each a session that takes what the one before gives.

    Args:
        sessions: of each stage.
        card: of the model.
        upsampling: what makes full-size scores of the core's.
        border, block: of a first stage that takes the image as it is (`Stage`).
        heads: whose scores these are, where they are of several; the card and upsampling are of the chosen one.
        one_arena: the sessions have one arena together, which is there after them.
    """

    batches = True
    first_runs = 1

    def __init__(
        self,
        sessions: Sequence[Session],
        card: ModelCard,
        upsampling: Upsampling,
        border: Border | None = None,
        block: int = 1,
        heads: Heads | None = None,
        one_arena: bool = False,
    ) -> None:
        self.name, self._one_arena = sessions[0].name, one_arena
        self._sessions, self._card, self._upsampling = tuple(sessions), card, upsampling
        self._border, self._block = border, block
        self.streams = max(session.streams for session in sessions)
        self._heads = heads or Heads(card, upsampling, (), None, self.name)
        self._buffers: list[AnyArray] = []  # that no call uses
        self._lending = threading.Lock()

    def scores(self, images: Sequence[Image]) -> Floats:
        """As `Backend` says."""
        if len(images) == 1:
            with self.prepared(images[0]) as prepared:
                return self.core(prepared)
        shape = input_shape(size_of(images[0]), self._card, self._border, self._block)
        batch = np.empty((len(images), *shape), self._input_dtype)
        for image, place in zip(images, batch, strict=True):
            prepare(image, self._card, place.reshape(-1), self._border, self._block)
        return self.core(batch)

    def labels(self, images: Sequence[Image]) -> list[Labels]:
        """As `Backend` says."""
        return self._heads.labels(self.scores(images), [size_of(image) for image in images])

    def warming(self) -> Iterator[None]:
        """As `Backend` says."""
        yield

    def run_stage(self, index: int, part: AnyArray) -> AnyArray:
        """As `Backend` says."""
        with self.prepared(part) if index == 0 else nullcontext(part) as given:
            result: AnyArray = self._sessions[index].run(given)[0]
        return self._usable(result) if index == len(self._sessions) - 1 else result

    @contextmanager
    def prepared(self, image: Image) -> Iterator[AnyArray]:
        """An image, or a part of one, as the first stage takes it, in memory that is for others afterwards."""
        count = math.prod(input_shape(size_of(image), self._card, self._border, self._block))
        # Buffers are kept, as a fresh one costs page faults on every call: as many as there were calls at once. One for
        # each thread would be more, where calls wait for each other.
        with self._lending:
            buffer = self._buffers.pop() if self._buffers else np.empty(0, self._input_dtype)
        if len(buffer) < count:
            buffer = np.empty(count, self._input_dtype)
        try:
            yield prepare(image, self._card, buffer, self._border, self._block)
        finally:
            with self._lending:
                self._buffers.append(buffer)

    def core(self, prepared: AnyArray) -> Floats:
        """All stages on what `prepared` gives, one image or several: float32 [N, K, h, w]."""
        for session in self._sessions:
            prepared = session.run(prepared)
        return self._usable(prepared)

    def release(self) -> None:
        """As `Backend` says: by one run of the smallest image, after which arenas shrink."""
        self._forget_buffers()
        self._release(self._sessions)
        give_back_freed()

    def close(self) -> None:
        """As `Backend` says."""
        first, *others = self._sessions
        for session in others:
            session.close()
        if self._one_arena:  # the weights of those that are closed lay in it, too, and no run of others shrinks it
            self._release([first])
        first.close()
        self._forget_buffers()

    def _release(self, sessions: Sequence[Session]) -> None:
        """Run the first of the stages on the smallest image, and have each give back what runs took."""
        smallest = (self._card.smallest, self._card.smallest)
        with suppress(DeployError):  # a plain ONNX may not take what its card does not forbid
            part: AnyArray = np.zeros((*smallest, self._card.channels), self._card.dtype)
            with self.prepared(part) as prepared:
                part = sessions[0].release(prepared)
            for session in sessions[1:]:
                part = session.release(part)

    def _forget_buffers(self) -> None:
        with self._lending:
            self._buffers = []

    def _usable(self, scores: Floats) -> Floats:
        return self._heads.usable(scores, interpolated=self._upsampling.mode == "linear")

    @property
    def _input_dtype(self) -> type[np.float32 | np.uint8]:
        return np.float32 if self._border is None else np.uint8

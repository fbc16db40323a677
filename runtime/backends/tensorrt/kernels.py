"""Our CUDA kernels, loaded from an engine: what they are called, and how a batch is laid out for them."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ...arrays import AnyArray
from ...engine_format.model_card import ModelCard
from ...engine_format.stage import Upsampling
from ...errors import DeployError
from .buffers import Buffer
from .places import PLACE, places

BLOCK = (32, 8, 1)  # threads of the kernels by pixels
THREADS = 256  # of the one by cells
UNIT = 16  # bytes: where a part of an upload begins

cached_places = lru_cache(maxsize=64)(places)


@dataclass(frozen=True)
class Layout:
    """What goes up at once: the images' sizes, where their labels lie in the scores, and the images.

    Attributes:
        count: of images.
        padded: (height, width) that all of them are padded to.
        pixel: bytes of a pixel of an image.
        label: bytes of a pixel of the labels.
    """

    count: int
    padded: tuple[int, int]
    pixel: int
    label: int

    @property
    def area(self) -> int:
        """Pixels of a padded image: each image, and its labels, have so much room."""
        return self.padded[0] * self.padded[1]

    @property
    def places(self) -> int:
        """Byte at which the places begin."""
        return -(-8 * self.count // UNIT) * UNIT

    @property
    def images(self) -> int:
        """Byte at which the images begin."""
        return self.places + PLACE.itemsize * sum(self.padded)

    @property
    def upload(self) -> int:
        """Bytes that go up."""
        return self.images + self.count * self.area * self.pixel

    @property
    def download(self) -> int:
        """Bytes of labels that come down."""
        return self.count * self.area * self.label


class Kernels:
    """The kernels of one network, and the factors that they normalise by, on the GPU.

    Args:
        cuda: the driver, with the GPU's context current.
        module: that holds the kernels.
        card, upsampling: of the network.
        types: of its input and its scores.
        source: names the engine in errors.

    Raises:
        DeployError: the module has kernels of another release.
    """

    def __init__(
        self, cuda: Any, module: Any, card: ModelCard, upsampling: Upsampling, types: tuple[str, str], source: str
    ) -> None:
        self._cuda, self._module, self._card, self._upsampling, self._source = cuda, module, card, upsampling, source
        self._prepare = self._function(f"prepare_batch_{card.dtype}_{types[0]}", "PPPPPiii")
        self._best = self._function(f"best_of_cells_{types[1]}_{card.label_dtype}", "PPiiif")
        self._label = self._function(f"label_batch_{types[1]}_{card.label_dtype}", "PPPPPiiiiiiif")
        std, mean = (np.asarray(values, np.float64) for values in (card.std, card.mean))
        # As prepare.py has it: image · (1 / std) - mean / std.
        factors = np.concatenate([1.0 / std, mean / std]).astype(np.float32)
        self._factors = Buffer(cuda)
        self._factors.reserve(factors.nbytes)
        stream = cuda.Stream(1)  # a copy that blocks is ordered with the null stream alone
        cuda.memcpy_htod_async(self._factors.pointer, factors, stream)
        stream.synchronize()

    def _function(self, name: str, types: str) -> Any:
        try:
            function = self._module.get_function(name)
        except self._cuda.Error as error:
            raise DeployError(
                f"{self._source} has GPU kernels of another release (there is no {name}); build it again with "
                "build-engine"
            ) from error
        function.prepare(types)
        return function

    def layout(self, count: int, padded: tuple[int, int]) -> Layout:
        """Of so many images of a padded size."""
        card = self._card
        return Layout(count, padded, card.channels * np.dtype(card.dtype).itemsize, np.dtype(card.label_dtype).itemsize)

    def places(self, cells: tuple[int, int], padded: tuple[int, int]) -> AnyArray:
        """Where labels of a padded size lie in scores of so many rows and columns: PLACE [H + W]."""
        return cached_places(self._upsampling, cells, padded)[0]

    def prepare(self, layout: Layout, upload: int, out: int, stream: Any) -> None:
        """Queue the kernel that makes the core's input of images that are at `upload`."""
        channels = self._card.channels
        self._prepare.prepared_async_call(
            _grid(layout), BLOCK, stream,
            upload, upload + layout.images, out,
            int(self._factors.pointer), int(self._factors.pointer) + 4 * channels, channels, *layout.padded,
        )  # fmt: skip

    def label(
        self, layout: Layout, upload: int, scores: int, shape: tuple[int, int, int], best: int, out: int, stream: Any
    ) -> None:
        """Queue the kernels that make labels of scores of a `shape`, (K, h, w); `best`: room for those of its cells."""
        classes, rows, columns = shape
        single = self._card.activation != "softmax"
        rule = int(single), self._card.score_threshold if single else 0.0
        self._best.prepared_async_call(
            (-(-rows * columns // THREADS), 1, layout.count), (THREADS, 1, 1), stream,
            scores, best, classes, rows * columns, *rule,
        )  # fmt: skip
        even = cached_places(self._upsampling, (rows, columns), layout.padded)[1]
        self._label.prepared_async_call(
            _grid(layout), BLOCK, stream,
            upload, upload + layout.places, scores, best, out, *shape, *layout.padded, int(even), *rule,
        )  # fmt: skip

    def release(self) -> None:
        """Give everything back. Nothing queued may use it."""
        self._factors.release()
        self._prepare = self._best = self._label = self._module = None


def _grid(layout: Layout) -> tuple[int, int, int]:
    height, width = layout.padded
    return -(-width // BLOCK[0]), -(-height // BLOCK[1]), layout.count

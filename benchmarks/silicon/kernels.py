"""The kernels of an engine against NumPy on a GPU: every type, every way to interpolate, and the largest images.

Of a large image three bands of rows are compared, the first, the middle and the last one: what a wrong index spoils is
there, and a whole image of 20000×20000 would take NumPy minutes.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from fcn_deploy.export.build.targets.tensorrt.kernels import compile_kernels
from fcn_deploy.runtime.backends.tensorrt.device import load_kernels, name_of
from fcn_deploy.runtime.backends.tensorrt.kernels import Kernels, Layout
from fcn_deploy.runtime.engine_format.stage import Upsampling
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import labels_from_scores
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import padded_size, prepare

from fcn_deploy import ModelCard

SIDES = (1, 37, 500)
PATTERN = 512  # pixels of noise, which larger images repeat
BAND = 32  # rows of a band that is compared
HEADS = {
    "even": Upsampling("linear", factor=(8.0, 8.0)),
    "fractional": Upsampling("linear", factor=(2.5, 3.3)),
    "align_corners": Upsampling("linear", "align_corners", factor=(8.0, 8.0)),
    "nearest": Upsampling("nearest", factor=(8.0, 8.0)),
    "none": Upsampling("none"),
}


def kernel_rows(cuda: Any, device: Any, largest: int) -> Iterator[dict[str, Any]]:
    """{"kernel", "size", "equal": or None, "skipped": why} of each case; images have `largest` a side at most."""
    module = load_kernels(cuda, compile_kernels([name_of(device)]), device, "the kernels")
    small = [(side, max(1, side * 3 // 4)) for side in SIDES if side <= largest]
    for dtype in ("uint8", "uint16", "int16", "float32"):
        for kind in ("float32", "float16"):
            for size in (*small, *([(largest, largest)] if dtype == "uint8" else ())):
                case = _Prepared(module, ModelCard(("a", "b"), dtype=dtype, size_multiple=32), kind)
                yield _case(cuda, f"prepare {dtype} → {kind}", size, case)
    for kind in ("float32", "float16"):
        for classes in (2, 300):
            for name, head in HEADS.items():
                for size in (*small, *([(largest, largest)] if (classes, name) == (2, "even") else ())):
                    card = ModelCard(tuple(map(str, range(classes))), size_multiple=8, stride=8)
                    case = _Labelled(module, card, kind, head)
                    yield _case(cuda, f"label {kind} → {card.label_dtype}, {name}", size, case)


def _case(cuda: Any, name: str, size: tuple[int, int], case: "_Case") -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": name, "size": list(size)}
    need, free = case.bytes(size), cuda.mem_get_info()[0]
    if need > 0.9 * free:
        return row | {"equal": None, "skipped": f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free"}
    try:
        return row | {"equal": case.run(cuda, size)}
    except cuda.MemoryError as error:
        return row | {"equal": None, "skipped": str(error)}


def bands(rows: int) -> list[tuple[int, int]]:
    """(first, after the last) row of what is compared of so many rows."""
    if rows <= 4 * BAND:
        return [(0, rows)]
    return [(start, start + BAND) for start in (0, rows // 2, rows - BAND)]


class _Case:
    """One kernel on one kind of data.

    Args:
        module: that holds the kernels.
        card: of the images.
        kind: `float32` or `float16`, of the core's input and scores.
        head: how scores become labels.
    """

    def __init__(self, module: Any, card: ModelCard, kind: str, head: Upsampling = HEADS["even"]) -> None:
        self.module, self.card, self.kind, self.head = module, card, kind, head

    def layout(self, size: tuple[int, int]) -> Layout:
        padded = padded_size(*size, self.card)
        each = self.card.channels * np.dtype(self.card.dtype).itemsize
        return Layout(1, padded, each, np.dtype(self.card.label_dtype).itemsize)

    def bytes(self, size: tuple[int, int]) -> int:
        """Of the GPU's memory."""
        raise NotImplementedError

    def run(self, cuda: Any, size: tuple[int, int]) -> bool:
        """Whether the GPU gives what NumPy does."""
        raise NotImplementedError

    def kernels(self, cuda: Any) -> Kernels:
        return Kernels(cuda, self.module, self.card, self.head, (self.kind, self.kind), "the kernels")


class _Device:
    """Arrays on the GPU for a while."""

    def __init__(self, cuda: Any, *sizes: int) -> None:
        self.cuda, self.stream = cuda, cuda.Stream(1)
        self.memories = []
        try:
            for size in sizes:
                self.memories.append(cuda.mem_alloc(size))
        except BaseException:
            self.free()
            raise

    def free(self) -> None:
        for memory in self.memories:
            memory.free()

    def up(self, index: int, array: np.ndarray) -> None:
        self.cuda.memcpy_htod_async(self.memories[index], np.ascontiguousarray(array), self.stream)
        self.stream.synchronize()

    def down(self, index: int, start: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        found = np.empty(shape, dtype)
        place = int(self.memories[index]) + start * found.itemsize
        self.cuda.memcpy_dtoh_async(found, place, self.stream)
        self.stream.synchronize()
        return found


def header(layout: Layout, size: tuple[int, int], table: np.ndarray) -> np.ndarray:
    """The first bytes of an upload of one image."""
    found = np.zeros(layout.images, np.uint8)
    found[:8].view(np.int32)[:] = size
    found[layout.places :] = table.view(np.uint8)
    return found


class _Prepared(_Case):
    """The kernel that prepares images, against `prepare`: equal bit for bit."""

    def bytes(self, size: tuple[int, int]) -> int:
        layout = self.layout(size)
        return layout.upload + layout.area * self.card.channels * np.dtype(self.kind).itemsize

    def run(self, cuda: Any, size: tuple[int, int]) -> bool:
        layout, channels = self.layout(size), self.card.channels
        pattern = natural_noise(min(size[0], PATTERN), min(size[1], PATTERN), self.card, 0)
        rows, columns = (np.arange(side) % least for side, least in zip(size, pattern.shape[:2], strict=True))
        image = pattern[rows][:, columns]
        kernels = self.kernels(cuda)
        device = _Device(cuda, layout.upload, layout.area * channels * np.dtype(self.kind).itemsize)
        try:
            whole = np.zeros(layout.upload, np.uint8)
            whole[: layout.images] = header(layout, size, kernels.places((1, 1), layout.padded))
            whole[layout.images : layout.images + image.nbytes] = image.reshape(-1).view(np.uint8)
            device.up(0, whole)
            kernels.prepare(layout, int(device.memories[0]), int(device.memories[1]), device.stream)
            height, width = layout.padded
            for first, stop in bands(height):
                part = image[first : min(stop, size[0])]
                expected = np.zeros((channels, stop - first, width), self.kind)
                if len(part):
                    expected[:, : len(part)] = prepare(part, self.card)[0][:, : len(part), :width].astype(self.kind)
                for channel in range(channels):
                    start = channel * layout.area + first * width
                    if not np.array_equal(device.down(1, start, (stop - first, width), self.kind), expected[channel]):
                        return False
            return True
        finally:
            device.free()
            kernels.release()


class _Labelled(_Case):
    """The kernels that label scores, against `labels_from_scores`: equal bit for bit."""

    def cells(self, size: tuple[int, int]) -> tuple[int, int]:
        padded = self.layout(size).padded
        factor = self.head.factor or (1.0, 1.0)
        return max(1, -(-padded[0] // int(factor[0]))), max(1, -(-padded[1] // int(factor[1])))

    def bytes(self, size: tuple[int, int]) -> int:
        layout, cells = self.layout(size), int(np.prod(self.cells(size)))
        return layout.images + cells * (len(self.card.classes) * np.dtype(self.kind).itemsize + layout.label) + (
            layout.download)  # fmt: skip

    def run(self, cuda: Any, size: tuple[int, int]) -> bool:
        layout, (rows, columns), classes = self.layout(size), self.cells(size), len(self.card.classes)
        pattern = np.random.default_rng(0).normal(size=(classes, min(rows, 64), min(columns, 64))).astype(self.kind)
        down, across = (np.arange(side) % least for side, least in zip((rows, columns), pattern.shape[1:], strict=True))
        scores = np.ascontiguousarray(pattern[:, down][:, :, across])
        kernels = self.kernels(cuda)
        device = _Device(cuda, layout.images, scores.nbytes, rows * columns * layout.label, layout.download)
        try:
            device.up(0, header(layout, size, kernels.places((rows, columns), layout.padded)))
            device.up(1, scores)
            places = [int(memory) for memory in device.memories]
            kernels.label(layout, places[0], places[1], (classes, rows, columns), places[2], places[3], device.stream)
            window = ScoreWindow.whole(scores, layout.padded, size)
            for first, stop in bands(size[0]):
                found = device.down(3, first * size[1], (stop - first, size[1]), self.card.label_dtype)
                part = window.part(self.head, (first, stop), (0, size[1])) if self.head.mode != "none" else (
                    window.of_rows(first, stop))  # fmt: skip
                if not np.array_equal(found, labels_from_scores(part, self.head, self.card)):
                    return False
            return True
        finally:
            device.free()
            kernels.release()

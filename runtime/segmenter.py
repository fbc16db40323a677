"""Segmenter: an engine opened, and labels for images of any size."""

import logging
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.backends import ORT_TARGETS
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.engine_file import CARD_KEY, EngineFile, Head, ModelCard, Stage
from runtime.errors import DeployError, MisuseError
from runtime.head import labels_from_scores
from runtime.plan import Plan, Tile, available_memory, plan_run
from runtime.prepare import check_image, padded_size, prepare

log = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.8  # of the memory that is free when an image arrives


class Segmenter:
    """Labels images of any size with an engine (or a plain ONNX model).

    Args:
        model: path of a `.engine`, or of an `.onnx` with float32 [N,C,H,W] in and logits [N,K,H,W] out.
        device: `auto`: what the engine is for; `cpu`; `cuda` or `cuda:1` for a GPU.
        threads: of one call on the CPU; None: one per physical core.
        memory: bytes one image may take on the CPU; None: 80 % of what is free.

    Thread-safe: many threads may call one Segmenter.

    Raises:
        MisuseError: an argument out of its range.
        DeployError: a file that is missing, damaged, of another version, or for another device.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        device: str = "auto",
        threads: int | None = None,
        memory: int | None = None,
    ) -> None:
        match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
        if match is None:
            raise MisuseError(f"device {device!r}; choose auto, cpu, cuda, or cuda:1 for the second GPU")
        if threads is not None and threads < 1:
            raise MisuseError(f"threads is {threads}; it must be at least 1, or None for one per core")
        if memory is not None and memory < 1:
            raise MisuseError(f"memory is {memory} bytes; it must be above 0, or None for what is free")
        self.path = Path(model)
        self.memory = memory
        self._buffers = threading.local()
        self._on_gpu = False
        if not self.path.is_file():
            raise DeployError(f"{self.path} does not exist or is not a file; name an .engine or an .onnx")
        if self.path.suffix.lower() == ".onnx":
            if device.startswith("cuda"):
                raise MisuseError(f"{self.path} is a plain ONNX, which runs on the CPU; make an engine: build-engine")
            self._backend = OnnxRuntimeBackend(self.path, threads=threads)
            self.card = _card_of_onnx(self._backend, self.path)
            self.head = Head()
            self.precision, self.bytes_per_pixel = "float32", 0.0
            self.manifest, self._stage = (
                None,
                Stage("", whole="a plain ONNX is not tiled; make an engine: build-engine"),
            )
        else:
            with EngineFile(self.path) as engine:
                engine.verify()
                self.manifest = engine.manifest
                target = self.manifest.target
                on_cpu, on_ort = target == "cpu", target in ("cpu", *ORT_TARGETS)
                if len(self.manifest.stages) != 1 or on_ort != (self.manifest.gpu is None):
                    raise DeployError(f"{self.path} is an engine of another release; build it again with build-engine")
                if device != "auto" and on_cpu != (device == "cpu"):
                    raise MisuseError(
                        f"device {device!r}, and {self.path} is an engine for {target}; leave the device "
                        "away, or build another engine"
                    )
                stage = self._stage = self.manifest.stages[0]
                index = int(match[1] or 0)
                if on_cpu and self.manifest.backend == "openvino":
                    from runtime.backends.openvino import open_or_fall_back

                    self._backend = open_or_fall_back(
                        engine.read(stage.file), stage.input, stage.output, threads, str(self.path)
                    )
                elif on_ort:
                    names = (stage.input, stage.output)
                    self._backend = OnnxRuntimeBackend(
                        engine.read(stage.file), *names, threads, target, index, str(self.path)
                    )
                else:
                    from runtime.backends.tensorrt import TensorRTBackend

                    kernels = {name: engine.read(name) for name in self.manifest.members if name.startswith("kernels")}
                    self._on_gpu = True
                    self._backend = TensorRTBackend(
                        self.manifest, engine.read(stage.file), kernels, index, str(self.path)
                    )
            self.card, self.head = self.manifest.card, self.manifest.head
            self.precision = self.manifest.precision
            self.bytes_per_pixel = self.manifest.bytes_per_pixel

    @property
    def backend(self) -> str:
        """Name of the library that runs the network."""
        return self._open().name

    def plan(self, height: int, width: int) -> Plan:
        """How an image of this size is run: whole, or in tiles. Raises OverBudgetError where memory is too small."""
        if self._on_gpu:
            # Of the GPU's own memory the backend takes what a size needs.
            plan = plan_run((height, width), self.card, self.bytes_per_pixel, sys.maxsize, self._stage)
            return replace(plan, profile=self._open().profile_for(plan.padded))
        memory = self.memory or int(available_memory() * DEFAULT_MEMORY_SHARE)
        return plan_run((height, width), self.card, self.bytes_per_pixel, memory, self._stage)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Labels of one image.

        Args:
            image: [H, W, 3] uint8 RGB, or the channels and dtype of the card; any H, W ≥ 1.

        Returns:
            [H, W] uint8, or uint16 for more than 256 classes.

        Raises:
            MisuseError: an array that the card does not allow.
            DeployError: the image exceeds the memory budget, or the network fails.
        """
        backend = self._open()
        image = check_image(image, self.card)
        plan = self.plan(*image.shape[:2])
        if self._on_gpu:
            return backend.labels(image, plan.padded)
        if plan.tiles and self.head.mode == "none":
            return self._labels_of_tiles(image, plan)
        scores = self._scores(image, plan)
        if self.manifest is None and scores.shape[1:] != plan.size:
            raise DeployError(
                f"{self.path} gives {scores.shape[1]}×{scores.shape[2]} scores for an image of {plan.size[0]}×"
                f"{plan.size[1]}; a plain ONNX must give one per pixel: make an engine of it with build-engine"
            )
        return labels_from_scores(scores, self.head, self.card, plan.padded, plan.size)

    def scores(self, image: np.ndarray) -> np.ndarray:
        """The core's own output for one image: float32 [K, h, w], uncropped (padding included)."""
        self._open()
        image = check_image(image, self.card)
        return self._scores(image, self.plan(*image.shape[:2]))

    def heatmap(self, image: np.ndarray) -> np.ndarray:
        """The coarse score map, cropped to the image: float32 [K, ⌈H/stride⌉, ⌈W/stride⌉].

        Raises:
            MisuseError: a plain ONNX, whose coarse scores are not marked; build-engine finds them.
        """
        if self.manifest is None:
            raise MisuseError(f"{self.path} is a plain ONNX without coarse scores; make an engine: build-engine")
        self._open()
        image = check_image(image, self.card)
        plan = self.plan(*image.shape[:2])
        scores = self._scores(image, plan)
        # Cells per padded pixel, from what came out: right for networks whose scores are full-size too.
        height, width = (-(-plan.size[axis] * scores.shape[1 + axis] // plan.padded[axis]) for axis in (0, 1))
        return scores[:, :height, :width].copy()

    def map(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Labels of a stream of images of mixed sizes, in order."""
        for image in images:
            yield self(image)

    def warmup(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Run once at each (height, width), so that later calls of these sizes meet no first-time cost."""
        for height, width in sizes:
            self(np.zeros((height, width, self.card.channels), self.card.dtype))

    def close(self) -> None:
        """Release the network. Calling the Segmenter afterwards raises MisuseError."""
        if self._backend is not None:
            self._backend.close()
            self._backend = None
            self._buffers = threading.local()

    def __enter__(self) -> "Segmenter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self):
        """The backend: OnnxRuntimeBackend, or TensorRTBackend where `_on_gpu`."""
        backend = self._backend
        if backend is None:
            raise MisuseError(f"the Segmenter of {self.path} is closed; open another one")
        return backend

    def _scores(self, image: np.ndarray, plan: Plan) -> np.ndarray:
        """The core's uncropped scores of a checked image, float32 [K, h, w]; those of tiles, put together."""
        if self._on_gpu:
            return self._open().scores(image, plan.padded)
        if not plan.tiles:
            return self._run(image)
        scores = None
        for tile, part in self._runs(image, plan):
            top, left, bottom, right = tile.inner
            if scores is None:
                step = (tile.outer[2] - tile.outer[0]) // part.shape[1]  # pixels of a cell: the same for every tile
                shape = (len(part), plan.padded[0] // step, plan.padded[1] // step)
                scores = np.empty(shape, np.float32)
            y, x = (top - tile.outer[0]) // step, (left - tile.outer[1]) // step
            rows, columns = (bottom - top) // step, (right - left) // step
            place = scores[:, top // step : bottom // step, left // step : right // step]
            place[:] = part[:, y : y + rows, x : x + columns]
        return scores

    def _labels_of_tiles(self, image: np.ndarray, plan: Plan) -> np.ndarray:
        """Labels of an image whose scores are full-size, and too many to be kept."""
        height, width = plan.size
        labels = np.empty((height, width), self.card.label_dtype)
        for tile, part in self._runs(image, plan):
            top, left, bottom, right = tile.inner
            bottom, right = min(bottom, height), min(right, width)
            y, x = top - tile.outer[0], left - tile.outer[1]
            inner = part[:, y : y + bottom - top, x : x + right - left]
            size = inner.shape[1:]
            labels[top:bottom, left:right] = labels_from_scores(inner, self.head, self.card, size, size)
        return labels

    def _runs(self, image: np.ndarray, plan: Plan) -> Iterator[tuple[Tile, np.ndarray]]:
        """Each tile and its scores, halo included."""
        for tile in plan.tiles:
            top, left, bottom, right = tile.outer
            # Beyond the image lies its padding, to which a tile at the edge comes by itself.
            yield tile, self._run(image[top:bottom, left:right])

    def _run(self, image: np.ndarray) -> np.ndarray:
        """Scores of an image, or of a part of one, padded to the card's multiple: float32 [K, h, w]."""
        padded = padded_size(*image.shape[:2], self.card.size_multiple)
        count = self.card.channels * padded[0] * padded[1]
        # One buffer per thread, kept: a fresh one costs page faults on every call.
        buffer = getattr(self._buffers, "data", None)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers.data = np.empty(count, np.float32)
        return self._open().run(prepare(image, self.card, buffer))[0]


def _card_of_onnx(backend: OnnxRuntimeBackend, path: Path) -> ModelCard:
    """The card in an ONNX model's metadata, or one assumed and said aloud; checks the model's interface.

    The card's `size_multiple` is dropped: a plain model is given each image at its own size.
    """
    inputs, outputs = backend.session.get_inputs(), backend.session.get_outputs()
    shape, result = inputs[0].shape, outputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or len(result) != 4 or inputs[0].type != "tensor(float)":
        raise DeployError(
            f"{path} takes {inputs[0].type} {shape} and gives {result}; a segmentation model takes "
            "float32 [N,C,H,W] and gives [N,K,H,W]"
        )
    text = backend.session.get_modelmeta().custom_metadata_map.get(CARD_KEY)
    if text is not None:
        card = ModelCard.from_json(text, str(path))
        check_card(card, shape[1], result[1], str(path))
        return replace(card, size_multiple=1, stride=1)
    if result[1] == 1:
        raise DeployError(
            f"{path} carries no model card, and whether its one score is a logit or a probability cannot be told "
            "from outside; make an engine of it with build-engine, which looks"
        )
    card = assumed_card(shape[1], result[1], str(path))
    log.warning("%s", describe_assumption(card, str(path)))
    return card


def check_card(card: ModelCard, channels: object, scores: object, source: str) -> None:
    """Raise DeployError where a card does not fit a model of these static channel counts, in and out."""
    for what, found, said in (("channels", channels, card.channels), ("scores", scores, card.scores)):
        if isinstance(found, int) and found != said:
            raise DeployError(f"{source} has {found} {what}, and its model card says {said}; mend the card")


def assumed_card(channels: object, scores: object, source: str, one_score: str = "sigmoid") -> ModelCard:
    """The card of a model that carries none: ImageNet's normalisation, classes without names.

    Args:
        channels, scores: static channel counts of the model's input and output.
        source: names the model in errors.
        one_score: `activation` of the card where there is one score alone.

    Raises:
        DeployError: one of them is not a number.
    """
    if not isinstance(channels, int) or not isinstance(scores, int):
        raise DeployError(
            f"{source} has no model card, and its channels ({channels} in, {scores} out) are not fixed "
            "numbers, so none can be assumed; export it with export-onnx"
        )
    # One score is a sigmoid's: background against something.
    count = max(scores, 2)
    rgb = channels == 3
    return ModelCard(
        classes=tuple(f"class {index}" for index in range(count)),
        channels=channels,
        mean=ModelCard.mean if rgb else (127.5,) * channels,
        std=ModelCard.std if rgb else (127.5,) * channels,
        activation=one_score if scores == 1 else "softmax",
    )


def describe_assumption(card: ModelCard, source: str) -> str:
    """One line that says aloud what was assumed."""
    mean, std = ([round(value, 2) for value in values] for values in (card.mean, card.std))
    return (
        f"{source} carries no model card; assuming {card.channels}-channel {card.dtype} images"
        f"{' (RGB)' if card.channels == 3 else ''}, mean {mean}, std {std}, {len(card.classes)} unnamed classes"
        f", labels by {_DECISIONS[card.activation]}"
    )


_DECISIONS = {
    "softmax": "argmax",
    "sigmoid": "its one score, a logit, above 0",
    "probability": "its one score, a probability, above 0.5",
}

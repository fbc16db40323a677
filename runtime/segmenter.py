"""Segmenter: an engine opened, and labels for images of any size."""

import logging
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.backends import ORT_TARGETS
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.engine_file import CARD_KEY, EngineFile, Head, ModelCard, Stage
from runtime.errors import DeployError, MisuseError, OverBudgetError
from runtime.head import labels_from_scores
from runtime.pipeline import CALLERS, Cost, Stream, overlapped
from runtime.plan import Plan, Span, available_memory, plan_profile, plan_run
from runtime.prepare import check_image, padded_size, prepare
from runtime.tiles import label_bands, score_bands

log = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.8  # of the memory that is free when an image arrives
BANDS_MEMORY = 2_000_000_000  # bytes; more makes `bands` no faster, and an image that is read by regions whole


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
        self._kept = 0  # bytes
        self.costs: dict[tuple[int, int], Cost] = {}  # padded size → what batches of it were measured to cost
        if not self.path.is_file():
            raise DeployError(f"{self.path} does not exist or is not a file; name an .engine or an .onnx")
        if self.path.suffix.lower() == ".onnx":
            if device.startswith("cuda"):
                raise MisuseError(f"{self.path} is a plain ONNX, which runs on the CPU; make an engine: build-engine")
            self._backends = [OnnxRuntimeBackend(self.path, threads=threads)]
            self.card = _card_of_onnx(self._backends[0], self.path)
            self.head, self.precision, self.manifest = Head(), "float32", None
            self._stages = (Stage("", whole="a plain ONNX is not tiled; make an engine: build-engine"),)
        else:
            with EngineFile(self.path) as engine:
                engine.verify()
                self.manifest = engine.manifest
                target = self.manifest.target
                on_cpu, on_ort = target == "cpu", target in ("cpu", *ORT_TARGETS)
                if on_ort != (self.manifest.gpu is None) or (not on_ort and len(self.manifest.stages) != 1):
                    raise DeployError(f"{self.path} is an engine of another release; build it again with build-engine")
                if device != "auto" and on_cpu != (device == "cpu"):
                    raise MisuseError(
                        f"device {device!r}, and {self.path} is an engine for {target}; leave the device "
                        "away, or build another engine"
                    )
                self._stages = self.manifest.stages
                index = int(match[1] or 0)
                if on_cpu and self.manifest.backend == "openvino":
                    from runtime.backends.openvino import openvino_or_fallback

                    kind = openvino_or_fallback(str(self.path))
                    self._backends = [
                        kind(engine.read(stage.file), stage.input, stage.output, threads, source=str(self.path))
                        for stage in self._stages
                    ]
                elif on_ort:
                    self._backends = [
                        OnnxRuntimeBackend(
                            engine.read(stage.file), stage.input, stage.output, threads, target, index, str(self.path)
                        )
                        for stage in self._stages
                    ]
                else:
                    from runtime.backends.tensorrt import TensorRTBackend

                    kernels = {name: engine.read(name) for name in self.manifest.members if name.startswith("kernels")}
                    self._on_gpu = True
                    plan = engine.read(self._stages[0].file)
                    self._backends = [TensorRTBackend(self.manifest, plan, kernels, index, str(self.path))]
            self.card, self.head = self.manifest.card, self.manifest.head
            self.precision = self.manifest.precision

    @property
    def backend(self) -> str:
        """Name of the library that runs the network."""
        return self._open()[0].name

    def plan(self, height: int, width: int, bands: bool = False) -> Plan:
        """How an image of this size is run: whole, or in tiles; by `bands`, at most BANDS_MEMORY is taken.

        Raises OverBudgetError where memory is too small.
        """
        size = (height, width)
        if self._on_gpu:
            # Of the GPU's own memory the backend takes what a size needs.
            padded = padded_size(*size, self.card)
            try:
                return Plan(size, padded, 0, self._open()[0].profile_for(padded))
            except OverBudgetError:
                plan = plan_profile(size, self.card, self._stages[0], self.manifest.gpu.profiles)
                if plan is None:
                    raise
                return plan
        # What an earlier image took is kept by the backends. One that takes no more needs no look at what is free,
        # which costs a quarter of a millisecond.
        memory = self._kept
        if self.memory is not None or self.bytes_per_pixel * math.prod(padded_size(*size, self.card)) > memory:
            memory = self.memory_budget()
        return plan_run(size, self.card, self._stages, min(memory, BANDS_MEMORY) if bands else memory)

    def memory_budget(self) -> int:
        """Bytes that one image may take now. What earlier ones took is kept by the backends, and there for the next."""
        return self.memory or int((available_memory() + self._kept) * DEFAULT_MEMORY_SHARE)

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
        self._open()
        image = check_image(image, self.card)
        return self.run(image, self.plan(*image.shape[:2]))

    def run(self, image: np.ndarray, plan: Plan) -> np.ndarray:
        """Labels of an image that was checked and planned."""
        self._kept = max(self._kept, plan.bytes)
        if plan.grids:
            labels = np.empty(plan.size, self.card.label_dtype)
            for top, band in self._label_bands(image, plan, 0):
                labels[top : top + len(band)] = band
            return labels
        if self._on_gpu:
            return self._open()[0].labels(image, plan.padded)
        return self._labels_of_scores(self._run(image), plan)

    def _labels_of_scores(self, scores: np.ndarray, plan: Plan) -> np.ndarray:
        if self.manifest is None and scores.shape[1:] != plan.size:
            raise DeployError(
                f"{self.path} gives {scores.shape[1]}×{scores.shape[2]} scores for an image of {plan.size[0]}×"
                f"{plan.size[1]}; a plain ONNX must give one per pixel: make an engine of it with build-engine"
            )
        return labels_from_scores(scores, self.head, self.card, plan.padded, plan.size)

    def bands(self, image, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Labels of an image too large to be held, from top to bottom.

        Args:
            image: an array as for a call, or anything with its `shape`, `dtype`, `ndim` and `image[top:bottom,
                left:right]`, of which only the tile at hand is read: a numpy.memmap, a reader of files.
            start: the first row wanted, to go on where a run ended.

        Yields:
            (first row, labels [rows, W]), each row once, exactly those of the call.

        Raises:
            MisuseError, DeployError: as for a call.
        """
        self._open()
        image = check_image(image, self.card, readers=True)
        if not 0 <= start < image.shape[0]:
            raise MisuseError(f"start is row {start}, and the image has rows 0 to {image.shape[0] - 1}")
        plan = self.plan(*image.shape[:2], bands=True)
        if plan.grids:
            return self._label_bands(image, plan, start)
        return iter([(start, self(np.asarray(image[:, :]))[start:])])

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

    def map(self, images: Iterable[np.ndarray], *, return_exceptions: bool = False) -> Iterator[np.ndarray | Exception]:
        """Labels of a stream of images of mixed sizes, in order; a few images are in work at once.

        Labels are those of single calls, bit for bit. Small images of equal padded size are run in batches of 8 where
        the stream measures that to be faster on this machine, and only if the backend's scores are equal then.

        Args:
            images: as for a call. Read in the caller's thread, up to 32 images or 64 megapixels ahead (less where
                memory is short). For a live source whose labels are wanted at once, call the Segmenter instead.
            return_exceptions: give the exception in place of an image's labels, and go on with the next.

        Raises:
            What a call raises, after the labels of the images before; and what `images` raises.
        """
        stream = Stream(self)
        outcomes = overlapped(
            images,
            lambda group: [each.outcome for each in stream.label(group)],
            workers=CALLERS,
            # What is no image is refused in its turn.
            pixels=lambda image: image.size if isinstance(image, np.ndarray) else 0,
            most=stream.pixels * self.card.channels,
            alike=lambda i: stream.alike(i.shape[:2]) if isinstance(i, np.ndarray) and i.ndim > 1 else None,
        )
        with closing(outcomes):
            for outcome in outcomes:
                if isinstance(outcome, Exception) and not return_exceptions:
                    raise outcome
                yield outcome

    @property
    def bytes_per_pixel(self) -> float:
        """Estimated working memory of the core for one pixel of padded image; 0 where it is not known."""
        return sum(stage.bytes_per_pixel for stage in self._stages)

    @property
    def can_batch(self) -> bool:
        """Whether images of one padded size can be given to the network at once."""
        return not self._on_gpu

    def scores_of_batch(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The core's output for images of one padded size, run as one batch: float32 [N, K, h, w], uncropped."""
        card = self.card
        padded = padded_size(*images[0].shape[:2], card)
        batch = np.empty((len(images), card.channels, *padded), np.float32)
        for image, place in zip(images, batch, strict=True):
            prepare(image, card, place.reshape(-1))
        return self._core(batch)

    def run_batch(self, images: Sequence[np.ndarray], plans: Sequence[Plan]) -> list[np.ndarray]:
        """Labels of checked images of one padded size, run whole as one batch."""
        return [self._labels_of_scores(s, plan) for s, plan in zip(self.scores_of_batch(images), plans, strict=True)]

    def warmup(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Run once at each (height, width), so that later calls of these sizes meet no first-time cost."""
        for height, width in sizes:
            self(np.zeros((height, width, self.card.channels), self.card.dtype))

    def close(self) -> None:
        """Release the network. Calling the Segmenter afterwards raises MisuseError."""
        if self._backends is not None:
            for backend in self._backends:
                backend.close()
            self._backends = None
            self._buffers = threading.local()

    def __enter__(self) -> "Segmenter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> list:
        """A backend per stage: OnnxRuntimeBackend, or one TensorRTBackend where `_on_gpu`."""
        backends = self._backends
        if backends is None:
            raise MisuseError(f"the Segmenter of {self.path} is closed; open another one")
        return backends

    def _scores(self, image: np.ndarray, plan: Plan) -> np.ndarray:
        """The core's uncropped scores of a checked image, float32 [K, h, w]; those of tiles, put together."""
        if plan.grids:
            return np.concatenate([band for *_, band in self._score_bands(image, plan, 0)], axis=1)
        if self._on_gpu:
            return self._open()[0].scores(image, plan.padded)
        return self._run(image)

    def _label_bands(self, image, plan: Plan, start: int) -> Iterator[tuple[int, np.ndarray]]:
        # Interpolation reads the score above a row, too.
        stride = self._stages[-1].stride[0]
        bands = self._score_bands(image, plan, max(0, start - 2 * stride))
        return label_bands(bands, stride, self.head, self.card, plan.padded, plan.size, start)

    def _score_bands(self, image, plan: Plan, start: int) -> Iterator[tuple[int, int, np.ndarray]]:
        backends = self._open()

        def first(rows: Span, columns: Span) -> np.ndarray:
            # Beyond the image lies its padding, to which a tile at the edge comes by itself.
            part = np.asarray(image[rows.outer_start : rows.outer_stop, columns.outer_start : columns.outer_stop])
            if self._on_gpu:
                part = np.ascontiguousarray(part)
                return backends[0].scores(part, padded_size(*part.shape[:2], self.card))
            return backends[0].run(self._prepared(part))[0]

        others = [lambda part, backend=backend: backend.run(part)[0] for backend in backends[1:]]
        return score_bands(plan.grids, [stage.stride for stage in self._stages], first, others, start)

    def _run(self, image: np.ndarray) -> np.ndarray:
        """Scores of an image that is run whole, padded to the card's multiple: float32 [K, h, w]."""
        return self._core(self._prepared(image))[0]

    def _core(self, features: np.ndarray) -> np.ndarray:
        """All stages on a prepared input: float32 [1, C, H, W] → [1, K, h, w]."""
        for backend in self._open():
            features = backend.run(features)
        return features

    def _prepared(self, image: np.ndarray) -> np.ndarray:
        """An image, or a part of one, as the first stage takes it; the next call on this thread reuses its memory."""
        padded = padded_size(*image.shape[:2], self.card)
        count = self.card.channels * padded[0] * padded[1]
        # One buffer per thread, kept: a fresh one costs page faults on every call.
        buffer = getattr(self._buffers, "data", None)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers.data = np.empty(count, np.float32)
        return prepare(image, self.card, buffer)


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
        return replace(card, size_multiple=1, smallest=1, stride=1)
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

"""Segmenter: an engine opened, and labels, masks, probabilities or values for images of any size."""

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

from .backends import ORT_TARGETS
from .backends.onnxruntime import OnnxRuntimeBackend
from .engine_file import EngineFile
from .errors import DeployError, MisuseError, OverBudgetError
from .manifest import Head, Stage
from .model_card import ACTIVATED_KEY, CARD_KEY, ModelCard, assumed_card, check_card, describe_assumption
from .pipeline import CALLERS, Cost, Stream, overlapped
from .plan import Plan, Span, available_memory, check_result, plan_profile, plan_run, plan_unbounded
from .prepare import check_image, input_shape, padded_size, prepare
from .refine import REACH, refined_labels, refusal
from .tiles import ready_rows, score_bands
from .upsampling import KINDS, new_result, result_bytes, result_from_scores

log = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.8  # of the memory that is free when an image arrives
BANDS_MEMORY = 2_000_000_000  # bytes; more makes `bands` no faster, and an image that is read by regions whole
BAND = 64_000_000  # bytes of a band's results, about
LABELS = ("labels",)
SUM_TOLERANCE = 1e-3  # how far the sum of a pixel's probabilities may be from one


class Segmenter:
    """Labels images of any size with an engine (or a plain ONNX model).

    Args:
        model: path of a `.engine`, or of an `.onnx` with float32 [N,C,H,W] in and logits [N,K,H,W] out.
        device: `auto`: what the engine is for; `cpu`; `cuda` or `cuda:1` for a GPU.
        threads: of one call on the CPU; None: one per physical core.
        memory: bytes one image may take on the CPU; None: 80 % of what is free.
        refine: let borders of labels follow those of the image (`runtime.refine`). Probabilities and values stay what
            the network gives.

    Thread-safe: many threads may call one Segmenter.

    Raises:
        MisuseError: an argument out of its range, or a network whose labels cannot be refined.
        DeployError: a file that is missing, damaged, of another version, or for another device.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        device: str = "auto",
        threads: int | None = None,
        memory: int | None = None,
        refine: bool = False,
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
        self.refine = refine
        self._buffers = threading.local()
        self._on_gpu = False
        self._kept = 0  # bytes
        self.costs: dict[tuple[int, int], Cost] = {}  # padded size → what batches of it were measured to cost
        if not self.path.is_file():
            raise MisuseError(f"{self.path} does not exist or is not a file; name an .engine or an .onnx")
        if self.path.suffix.lower() == ".onnx":
            if device.startswith("cuda"):
                raise MisuseError(f"{self.path} is a plain ONNX, which runs on the CPU; make an engine: build-engine")
            self._backends = [OnnxRuntimeBackend(self.path, threads=threads)]
            self.card = _card_of_onnx(self._backends[0], self.path)
            said = self._backends[0].session.get_modelmeta().custom_metadata_map
            self.head, self.precision, self.manifest = Head(activated=said.get(ACTIVATED_KEY) == "1"), "float32", None
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
                    from .backends.openvino import openvino_or_fallback

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
                    from .backends.tensorrt import TensorRTBackend

                    kernels = {name: engine.read(name) for name in self.manifest.members if name.startswith("kernels")}
                    self._on_gpu = True
                    plan = engine.read(self._stages[0].file)
                    self._backends = [TensorRTBackend(self.manifest, plan, kernels, index, str(self.path))]
            self.card, self.head = self.manifest.card, self.manifest.head
            self.precision = self.manifest.precision
        cell = self._stages[-1].stride
        if refine and (reason := refusal(self.card, self.head, cell)) is not None:
            instead = "leave --refine away" if self.manifest else "make an engine: build-engine"
            raise MisuseError(f"{self.path} cannot be refined: {reason}; {instead}")
        self._cell = int((self.head.factor or cell)[0])  # pixels between coarse scores

    @property
    def backend(self) -> str:
        """Name of the library that runs the network."""
        return self._open()[0].name

    @property
    def kind(self) -> str:
        """What this network gives, by its card: `labels`, `masks` or `values`."""
        return self.card.kind

    def plan(self, height: int, width: int, bands: bool = False, kinds: Sequence[str] = LABELS) -> Plan:
        """How an image of this size is run: whole, or in tiles; by `bands`, at most BANDS_MEMORY is taken.

        `kinds` are the results wanted: labels are small beside what the network takes, others are in the budget.

        Raises OverBudgetError where memory is too small.
        """
        size, result = (height, width), 0
        if not bands:
            result = height * width * sum(result_bytes(kind, self.card) for kind in kinds if kind != "labels")
        if self._on_gpu:
            # Of the GPU's own memory the backend takes what a size needs.
            if result:
                check_result(size, result, self.memory_budget())
            padded = padded_size(*size, self.card)
            try:
                return Plan(size, padded, result, self._open()[0].profile_for(padded), result=result)
            except OverBudgetError:
                plan = plan_profile(size, self.card, self._stages[0], self.manifest.gpu.profiles)
                if plan is None:
                    raise
                return replace(plan, bytes=result, result=result)
        # What an earlier image took is kept by the backends. One that takes no more needs no look at what is free,
        # which costs a quarter of a millisecond.
        memory = self._kept
        if result or self.memory is not None or plan_unbounded(size, self.card, self._stages).bytes > memory:
            memory = self.memory_budget()
        return plan_run(size, self.card, self._stages, min(memory, BANDS_MEMORY) if bands else memory, result)

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
            MisuseError: an array that the card does not allow, or a network of `masks` or `values`.
            DeployError: the image exceeds the memory budget, or the network fails.
        """
        return self.result(image, "labels")

    def probabilities(self, image: np.ndarray) -> np.ndarray:
        """Of each class at each pixel: float32 [K, H, W]; [1, H, W] of a network of one score, that of class 1.

        The network's scores interpolated, and then the softmax or sigmoid of them: in the network's own order.

        Raises:
            MisuseError: as a call, or a network of `values`.
            DeployError: as a call.
        """
        return self.result(image, "probabilities")

    def masks(self, image: np.ndarray) -> np.ndarray:
        """Where each class of a `multilabel` network is above its threshold: bool [K, H, W].

        Raises:
            MisuseError: as a call, or a network of any other activation.
            DeployError: as a call.
        """
        return self.result(image, "masks")

    def values(self, image: np.ndarray) -> np.ndarray:
        """The network's own output at full size: float32 [K, H, W]. A regression map (activation `none`), or logits.

        Where the network ends in a Softmax or Sigmoid that does not change labels, an engine gives what goes into it.

        Raises:
            MisuseError, DeployError: as for a call.
        """
        return self.result(image, "values")

    def result(self, image: np.ndarray, kind: str | None = None) -> np.ndarray:
        """`labels`, `probabilities`, `masks` or `values` of one image; None: what the network gives, its `kind`."""
        kinds = self.check_kinds(kind or self.kind)
        self._open()
        image = check_image(image, self.card)
        return self.run(image, self.plan(*image.shape[:2], kinds=kinds), kinds)[0]

    def check_kinds(self, *kinds: str) -> tuple[str, ...]:
        """Return them, or raise MisuseError where this network does not give one of them."""
        instead = {"labels": "call the Segmenter", "masks": "call masks()", "values": "call values()"}[self.kind]
        for kind in kinds:
            if kind not in KINDS:
                raise MisuseError(f"kind {kind!r}; choose {', '.join(KINDS)}")
            wrong = self.kind == "values" if kind == "probabilities" else kind != "values"
            if wrong and kind != self.kind:
                raise MisuseError(
                    f"{self.path} gives {self.kind} ({self.card.activation}), not {kind}; {instead}, or pass "
                    f"kind={self.kind!r}"
                )
        return kinds

    def run(self, image: np.ndarray, plan: Plan, kinds: Sequence[str] = LABELS) -> tuple[np.ndarray, ...]:
        """Results of each of `kinds` for an image that was checked and planned."""
        self._kept = max(self._kept, plan.bytes - plan.result)
        if plan.grids:
            results = [new_result(kind, self.card, *plan.size) for kind in kinds]
            for rows, scores, first, cells in self._ready_rows(image, plan, 0):
                where = scores, self.head, plan, rows, first, cells
                for kind, result in zip(kinds, results, strict=True):
                    self._result(kind, image, *where, out=result[..., slice(*rows), :])
            return tuple(results)
        if self._on_gpu and tuple(kinds) == LABELS and not self.refine:
            return (self._open()[0].labels(image, plan.padded),)
        return self._results_of_scores(image, self.scores_by(image, plan), plan, kinds)

    def _results_of_scores(
        self, image: np.ndarray, scores: np.ndarray, plan: Plan, kinds: Sequence[str]
    ) -> tuple[np.ndarray, ...]:
        head = self._head_of(scores, plan, kinds)
        full = self.head.mode == "none" and scores.shape[1:] == plan.size and scores.dtype == np.float32
        if full and scores.flags.writeable and tuple(kinds) in (("values",), ("probabilities",)):
            return (self._result(kinds[0], image, scores, head, plan, out=scores),)  # in place: no second copy
        return tuple(self._result(kind, image, scores, head, plan) for kind in kinds)

    def _result(
        self,
        kind: str,
        image,
        scores: np.ndarray,
        head: Head,
        plan: Plan,
        rows: tuple[int, int] | None = None,
        first: int = 0,
        cells: int | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """A result, or some rows of it; arguments as for `labels_from_scores`."""
        if kind == "labels" and self.refine:
            return refined_labels(scores, head, self.card, self._cell, plan.size, image, rows, first, out)
        return result_from_scores(kind, scores, head, self.card, plan.padded, plan.size, rows, first, cells, out)

    def _head_of(self, scores: np.ndarray, plan: Plan, kinds: Sequence[str]) -> Head:
        """The head of a whole image's scores; of a plain ONNX, after a look at what it gives. Raises DeployError."""
        if self.manifest is not None:
            return self.head
        if scores.shape[1:] != plan.size:
            raise DeployError(
                f"{self.path} gives {scores.shape[1]}×{scores.shape[2]} scores for an image of {plan.size[0]}×"
                f"{plan.size[1]}; a plain ONNX must give one per pixel: make an engine of it with build-engine"
            )
        if self.card.activation != "softmax" or "probabilities" not in kinds:
            return self.head
        # Nothing else tells whether it ends in its Softmax. Logits do not add up to one everywhere.
        return replace(self.head, activated=adds_up_to_one(scores))

    def bands(self, image, start: int = 0, kind: str = "labels") -> Iterator[tuple[int, np.ndarray]]:
        """Results of an image too large to be held, from top to bottom.

        Args:
            image: an array as for a call, or anything with its `shape`, `dtype`, `ndim` and `image[top:bottom,
                left:right]`, of which only the tile at hand is read: a numpy.memmap, a reader of files. To refine
                labels, their pixels are read once more, in blocks of some hundred a side.
            start: the first row wanted, to go on where a run ended.
            kind: `labels`, `probabilities`, `masks` or `values`.

        Yields:
            (first row, labels [rows, W], or of another kind [K, rows, W]), each row once, exactly those of the call.

        Raises:
            MisuseError, DeployError: as for a call.
        """
        return ((top, results[0]) for top, results in self.bands_of(image, start, kind))

    def bands_of(self, image, start: int, *kinds: str) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
        """`bands` of several kinds at once."""
        self.check_kinds(*kinds)
        self._open()
        image = check_image(image, self.card, readers=True)
        if not 0 <= start < image.shape[0]:
            raise MisuseError(f"start is row {start}, and the image has rows 0 to {image.shape[0] - 1}")
        plan = self.plan(*image.shape[:2], bands=True)
        self._kept = max(self._kept, plan.bytes)
        return self._bands(image, start, kinds, plan)

    def _bands(self, image, start: int, kinds: Sequence[str], plan: Plan):
        head = self.head
        if plan.grids:
            ready = self._ready_rows(image, plan, start)
        else:
            image = np.asarray(image[:, :])
            if self._on_gpu and kinds == LABELS and not self.refine:
                yield start, (self._open()[0].labels(image, plan.padded)[start:],)
                return
            whole = self.scores_by(image, plan)
            head, ready = self._head_of(whole, plan, kinds), [((start, plan.size[0]), whole, 0, None)]
        rows_of_band = max(1, BAND // (plan.size[1] * sum(result_bytes(kind, self.card) for kind in kinds)))
        for (first_row, stop), scores, first, cells in ready:
            made = {}
            if self.refine and "labels" in kinds:  # at once: a few rows would take as long as some cells of them
                made["labels"] = self._result("labels", image, scores, head, plan, (first_row, stop), first, cells)
            for top in range(first_row, stop, rows_of_band):
                rows = top, min(top + rows_of_band, stop)
                where = image, scores, head, plan, rows, first, cells
                part = slice(top - first_row, rows[1] - first_row)
                yield top, tuple(made[k][part] if k in made else self._result(k, *where) for k in kinds)

    def scores(self, image: np.ndarray) -> np.ndarray:
        """The core's own output for one image: float32 [K, h, w], uncropped (padding included)."""
        self._open()
        image = check_image(image, self.card)
        return self.scores_by(image, self.plan(*image.shape[:2]))

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
        scores = self.scores_by(image, plan)
        # Cells per padded pixel, from what came out: right for networks whose scores are full-size too.
        height, width = (-(-plan.size[axis] * scores.shape[1 + axis] // plan.padded[axis]) for axis in (0, 1))
        return scores[:, :height, :width].copy()

    def map(
        self, images: Iterable[np.ndarray], *, kind: str = "labels", return_exceptions: bool = False
    ) -> Iterator[np.ndarray | Exception]:
        """Labels of a stream of images of mixed sizes, in order; a few images are in work at once.

        Results are those of single calls, bit for bit. Small images of equal padded size are run in batches of 8 where
        the stream measures that to be faster on this machine, and only if the backend's scores are equal then.

        Args:
            images: as for a call. Read in the caller's thread, up to 32 images or 64 megapixels ahead (less where
                memory is short). For a live source whose labels are wanted at once, call the Segmenter instead.
            kind: `labels`, `probabilities`, `masks` or `values`.
            return_exceptions: give the exception in place of an image's labels, and go on with the next.

        Raises:
            What a call raises, after the labels of the images before; and what `images` raises.
        """
        return self._map(images, Stream(self, self.check_kinds(kind)), return_exceptions)

    def _map(self, images: Iterable[np.ndarray], stream: Stream, return_exceptions: bool):
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
                yield outcome if isinstance(outcome, Exception) else outcome[0]

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
        border = self._stages[0].border
        shape = input_shape(images[0].shape[:2], self.card, border)
        batch = np.empty((len(images), *shape), np.float32 if border is None else np.uint8)
        for image, place in zip(images, batch, strict=True):
            prepare(image, self.card, place.reshape(-1), border)
        return self._core(batch)

    def run_batch(
        self, images: Sequence[np.ndarray], plans: Sequence[Plan], kinds: Sequence[str] = LABELS
    ) -> list[tuple[np.ndarray, ...]]:
        """Results of checked images of one padded size, run whole as one batch."""
        scores = self.scores_of_batch(images)
        return [
            self._results_of_scores(image, each, plan, kinds)
            for image, each, plan in zip(images, scores, plans, strict=True)
        ]

    def warmup(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Run once at each (height, width), so that later calls of these sizes meet no first-time cost."""
        for height, width in sizes:
            self.result(np.zeros((height, width, self.card.channels), self.card.dtype))

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

    def scores_by(self, image: np.ndarray, plan: Plan) -> np.ndarray:
        """The core's uncropped scores of a checked image, float32 [K, h, w]; those of tiles, put together."""
        if plan.grids:
            return np.concatenate([band for *_, band in self._score_bands(image, plan, 0)], axis=1)
        if self._on_gpu:
            return self._open()[0].scores(image, plan.padded)
        return self._core(self.prepared(image))[0]

    def _ready_rows(self, image, plan: Plan, start: int) -> Iterator[tuple[tuple[int, int], np.ndarray, int, int]]:
        # Interpolation reads the score above a row, too.
        stride = self._stages[-1].stride[0]
        more = REACH if self.refine else 0
        bands = self._score_bands(image, plan, max(0, start - (2 + more) * stride))
        return ready_rows(bands, stride, self.head, plan.padded, plan.size, start, more)

    def _score_bands(self, image, plan: Plan, start: int) -> Iterator[tuple[int, int, np.ndarray]]:
        backends = self._open()

        def first(rows: Span, columns: Span) -> np.ndarray:
            # Beyond the image lies its padding, to which a tile at the edge comes by itself.
            part = np.asarray(image[rows.outer_start : rows.outer_stop, columns.outer_start : columns.outer_stop])
            if self._on_gpu:
                part = np.ascontiguousarray(part)
                return backends[0].scores(part, padded_size(*part.shape[:2], self.card))
            return backends[0].run(self.prepared(part))[0]

        others = [lambda part, backend=backend: backend.run(part)[0] for backend in backends[1:]]
        return score_bands(plan.grids, [stage.stride for stage in self._stages], first, others, start)

    def _core(self, features: np.ndarray) -> np.ndarray:
        """All stages on what `prepared` gives, one or several: → float32 [N, K, h, w]."""
        for backend in self._open():
            features = backend.run(features)
        return features

    def prepared(self, image: np.ndarray) -> np.ndarray:
        """An image, or a part of one, as the first stage takes it; the next call on this thread reuses its memory."""
        border = self._stages[0].border
        count = math.prod(input_shape(image.shape[:2], self.card, border))
        # One buffer per thread, kept: a fresh one costs page faults on every call.
        buffer = getattr(self._buffers, "data", None)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers.data = np.empty(count, np.float32 if border is None else np.uint8)
        return prepare(image, self.card, buffer, border)


def adds_up_to_one(scores: np.ndarray) -> bool:
    """Whether [K, h, w] scores are a distribution over K at every place."""
    return bool(scores.min() >= 0 and abs(scores.sum(0) - 1).max() < SUM_TOLERANCE)


def _card_of_onnx(backend: OnnxRuntimeBackend, path: Path) -> ModelCard:
    """The card in an ONNX model's metadata, or one assumed and said aloud; checks the model's interface.

    The card's `size_multiple` and `smallest` are dropped: a plain model is given each image at its own size.
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

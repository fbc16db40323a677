"""Network: an engine or an ONNX model opened; how an image is run by it, and what comes out."""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import AnyArray, Floats, Image, ImageSource, size_of
from .backends import Backend
from .backends.host import HostBackend
from .batch_cost import BatchCost
from .engine_file import EngineFile
from .errors import DeployError, MisuseError, OverBudgetError
from .heads import Heads, View
from .manifest import Manifest, Stage, Upsampling
from .model_card import ModelCard
from .no_data import HoleRecorder, Invalid, filled, marked
from .onnx_model import WHOLE, OnnxModelBackend, with_activation
from .open_engine import gpu_index_of, open_engine, open_fine
from .plan import (
    KeptRows,
    Plan,
    Span,
    available_memory,
    check_result,
    plan_fine,
    plan_on_gpu,
    plan_passes,
    plan_run,
    plan_unbounded,
)  # fmt: skip
from .pooled import PooledTiles
from .prepare import check_image, check_source
from .refine import REACH, refined_labels, refusal
from .tiles import Band, one_ahead, ready_windows, score_bands
from .upsampling import KINDS, LABEL_KINDS, PIXELS_AT_A_TIME, ScoreWindow, new_result, result_bytes, result_from_scores
from .value_range import InRange, Range, parse_range
from .working_memory import WorkingMemory

DEFAULT_MEMORY_SHARE = 0.8  # of the memory that is free when an image arrives
BANDS_MEMORY = 2_000_000_000  # bytes; more makes `bands` no faster, and an image that is read by regions whole
WORK_WORTH_A_PLAN = 1.1  # over that of the whole image: of less, other tiles would not save what it takes to find them
LABELLING_BYTES = 10  # of each pixel whose labels are made at a time, about: what they are made in
WEIGHTS_OPENED = 2  # times the weights' bytes: what a library keeps of them, in layouts of its own
BAND_BYTES = 4_000_000  # of a band's results, about
LABELS = ("labels",)


class Network:
    """What a Segmenter is made of, with all that our own commands use. Arguments and errors are those of `Segmenter`.

    Many threads may use one.

    Attributes:
        path: of the file.
        heads: of the model: results of others than the chosen one are named by it, `depth/values`.
        card: of the model, and of the chosen head.
        manifest: of an engine; None of an ONNX model.
        upsampling: what makes full-size scores of the core's.
        precision: the lowest in the graph: one of runtime.manifest.PRECISIONS.
        stages: the core, in order.
        memory: bytes one image may take on the CPU; None: 80 % of what is free.
        refine: whether borders of labels follow those of the image.
        input_range: which numbers of images are the network's 0 and 1; None: they are the network's own, whatever the
            card's `range` says of files.
        cell: pixels between coarse scores.
        batch_costs: padded size → what batches of it were measured to cost.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str = "auto",
        threads: int | None = None,
        memory: int | None = None,
        refine: bool = False,
        input_range: Range | str | None = None,
        output: str | None = None,
    ) -> None:
        gpu_index = gpu_index_of(device)
        self._threads = threads
        if threads is not None and threads < 1:
            raise MisuseError(f"threads is {threads}; it must be at least 1, or None for one per physical core")
        if memory is not None and memory < 1:
            raise MisuseError(f"memory is {memory} bytes; it must be above 0, or None for what is free")
        self.path = path = Path(model)
        self.memory, self.refine = memory, refine
        self.input_range = None if input_range is None else parse_range(input_range)
        if not path.is_file():
            raise MisuseError(f"{path} does not exist or is not a file; name an .engine or an .onnx")
        if path.suffix.lower() == ".onnx":
            if device.startswith("cuda"):
                raise MisuseError(f"{path} is a plain ONNX, which runs on the CPU; make an engine: build-engine")
            onnx = OnnxModelBackend(path, threads)
            self._take(onnx, Heads(onnx.card, onnx.upsampling, (), output, str(path)), (WHOLE,), "float32")
        else:
            backend, manifest, heads = open_engine(path, device, gpu_index, threads, output)
            self._take(backend, heads, manifest.stages, manifest.precision, manifest)
        if refine and (reason := refusal(self.card, self.upsampling, self.stages[-1].stride)) is not None:
            instead = "omit --refine" if self.manifest else "make an engine: build-engine"
            raise MisuseError(f"{path} cannot be refined: {reason}; {instead}")

    @classmethod
    def of(cls, backend: Backend, card: ModelCard, upsampling: Upsampling, stages: Sequence[Stage]) -> "Network":
        """One that no file holds: a core in float32, that `backend` runs in these stages."""
        net = cls.__new__(cls)
        net._threads = None
        net.path, net.memory, net.refine, net.input_range = Path(backend.name), None, False, None
        net._take(backend, Heads(card, upsampling, (), None, backend.name), tuple(stages), "float32")
        return net

    def _take(
        self,
        backend: Backend,
        heads: Heads,
        stages: tuple[Stage, ...],
        precision: str,
        manifest: Manifest | None = None,
    ) -> None:
        """Be the network that `backend` has opened."""
        self._backend: Backend | None = backend
        self.heads, self.card, self.upsampling, self.stages = heads, heads.card, heads.upsampling, stages
        self.precision, self.manifest = precision, manifest
        self.batch_costs: dict[tuple[int, int], BatchCost] = {}
        self._working = WorkingMemory(self._release)
        self._pooled: PooledTiles | None = None
        self._fine: HostBackend | None = None
        self._opening = threading.Lock()
        if manifest is not None and manifest.pooled is not None:
            self._pooled = PooledTiles(manifest.pooled, self.card, self._member, self._threads)
        self.cell = int((heads.upsampling.factor or stages[-1].stride)[0])

    @property
    def backend(self) -> Backend:
        """What runs it. Raises MisuseError once it is closed."""
        if self._backend is None:
            raise MisuseError(f"the Segmenter of {self.path} is closed; open another one")
        return self._backend

    @property
    def kind(self) -> str:
        """What this network gives, by its card: `labels`, `masks` or `values`."""
        return self.card.kind

    @property
    def on_gpu(self) -> bool:
        """Whether a plan runs it, on a GPU, whose memory is the backend's to share out."""
        return self.manifest is not None and self.manifest.gpu is not None

    def largest_batch(self, plan: Plan) -> int:
        """Images that the profile of a plan takes at once; 1 on the CPU, where any number goes."""
        if self.manifest is None or self.manifest.gpu is None or plan.profile is None:
            return 1
        return self.manifest.gpu.profiles[plan.profile].batch

    def working_memory(self, pixels: int) -> float:
        """Bytes that the core works with for a padded image of so many pixels; 0 where it is not known."""
        return sum(stage.working_memory(pixels) for stage in self.stages)

    def check_kinds(self, *kinds: str) -> tuple[str, ...]:
        """Return them, or raise MisuseError where this network does not give one of them."""
        calls = {"labels": "call the Segmenter", "masks": "call masks()", "values": "call values()"}
        for name in kinds:
            view = self.heads.view(name)
            kind, own, prefix = view.kind, view.card.kind, name[: name.rfind("/") + 1]
            if kind not in KINDS:
                raise MisuseError(f"kind {name!r}; choose {', '.join(KINDS)}")
            wrong = own == "values" if kind == "probabilities" else kind != "values"
            if wrong and kind != own:
                raise MisuseError(
                    f"{self.path} gives {prefix}{own} ({view.card.activation}), not {name}; "
                    f"{'call results()' if prefix else calls[own]}, or pass kind={prefix + own!r}"
                )
        return kinds

    def check_outputs(self, *kinds: str) -> tuple[str, ...]:
        """`check_kinds` of what `run` gives: `refined` and `scores` too.

        `refined` is labels whose borders follow the image's, whatever `refine` says; `scores` the coarse score map, as
        of `Segmenter.heatmap`.
        """
        for kind in kinds:
            view = self.heads.view(kind)
            if view.kind == "scores":
                self._check_coarse()
            elif view.kind == "refined":
                reason = refusal(view.card, view.upsampling, self.stages[-1].stride)
                if reason is not None:
                    raise MisuseError(f"{self.path} cannot be refined: {reason}; ask for {self.kind}")
            else:
                self.check_kinds(kind)
        return kinds

    # Planning

    def plan(
        self,
        height: int,
        width: int,
        bands: bool = False,
        kinds: Sequence[str] = LABELS,
        source: ImageSource | None = None,
        fine: bool = True,
    ) -> Plan:
        """How an image of this size is run: whole, or in tiles; by `bands`, at most BANDS_MEMORY is taken.

        `kinds` are the results wanted: labels are small beside what the network takes, others are in the budget.
        `source`: what the image is read from. `fine`: whether it may be by the engine's stages for tiles alone.

        Raises OverBudgetError where memory is too small.
        """
        size, result = (height, width), 0
        if not bands:
            large = [view for view in map(self.heads.view, kinds) if view.kind not in LABEL_KINDS]
            result = height * width * sum(result_bytes(view.kind, view.card) for view in large)
        if self.manifest is not None and self.manifest.gpu is not None:
            if result:
                check_result(size, result, self.memory_budget())
            return plan_on_gpu(size, self.card, self.stages[0], self.manifest.gpu.profiles, str(self.path), result)
        # What an earlier image took is kept by the backend. One that takes no more needs no look at what is free,
        # which costs a quarter of a millisecond.
        memory = self._working.held
        if result or self.memory is not None or plan_unbounded(size, self.card, self.stages).bytes > memory:
            memory = self.memory_budget()
            memory = min(memory, BANDS_MEMORY) if bands else memory
            # Labels, and what makes them, are beside what the network takes.
            labels = 0 if bands else height * width * result_bytes("labels", self.card)
            made = any(self.heads.view(kind).kind not in ("values", "probabilities", "scores") for kind in kinds)
            making = LABELLING_BYTES * min(height * width, PIXELS_AT_A_TIME) if made else 0
            memory = max(memory - labels - making, memory // 2)
        kept = KeptRows(getattr(source, "row_bytes", 0), getattr(source, "more_rows", 0))
        return self._planned(size, memory, result, kept, fine)

    def _planned(self, size: tuple[int, int], memory: float, result: int, kept: KeptRows, fine: bool) -> Plan:
        """By the stages of whole images where that is no more work, else by those for tiles, or in passes."""
        manifest, plan, over = self.manifest, None, None
        try:
            plan = plan_run(size, self.card, self.stages, memory, result, kept)
        except OverBudgetError as error:
            if manifest is None:
                raise
            over = error
        # Tiles that fit the caches are of the stages that they were measured with.
        whole = plan is not None and plan.grids == plan_unbounded(size, self.card, self.stages).grids
        much = plan is None or plan.overhead > WORK_WORTH_A_PLAN
        if fine and not whole and much and manifest is not None and manifest.fine:
            weights = sum(manifest.members[stage.file]["bytes"] for stage in manifest.stages)
            other = plan_fine(size, self.card, manifest.fine, memory, WEIGHTS_OPENED * weights, result, kept)
            if other is not None and (plan is None or other.overhead < plan.overhead):
                return other
        if plan is not None:
            return plan
        if manifest is None or manifest.pooled is None:
            assert over is not None, "as there is no plan"
            raise over
        return plan_passes(size, self.card, manifest.pooled, memory, result, kept)

    def memory_budget(self) -> int:
        """Bytes that one image may take now. What earlier ones took is kept by the backend, and there for the next."""
        return self.memory or int((available_memory() + self._working.held) * DEFAULT_MEMORY_SHARE)

    # Results

    def result(self, image: Image, kind: str | None = None) -> AnyArray:
        """`labels`, `probabilities`, `masks` or `values` of one image; None: what the network gives, its `kind`."""
        kinds = self.check_kinds(kind or self.kind)
        image = self.checked(image)
        return self.run(image, self.plan(*size_of(image), kinds=kinds), kinds)[0]

    def checked(self, image: object) -> Image:
        """An image as [H, W, C], in the card's numbers.

        Raises MisuseError where the card does not allow it, or the network is closed.
        """
        _ = self.backend
        if self.input_range is not None and isinstance(image, np.ndarray) and image.ndim > 1:
            image = InRange(image, self.input_range, self.card)[:, :]
        return check_image(image, self.card)

    def run(self, image: Image, plan: Plan, kinds: Sequence[str] = LABELS) -> tuple[AnyArray, ...]:
        """Results of each of `kinds`, which `check_outputs` has seen, for an image that was checked and planned."""
        image, invalid = filled(image, self.card)
        with self.taking(plan):
            results = self._run(image, plan, kinds)
        return self._marked(results, kinds, invalid)

    def _marked(
        self, results: Sequence[AnyArray], kinds: Sequence[str], invalid: Invalid | None
    ) -> tuple[AnyArray, ...]:
        """Results with no data where the image has none."""
        views = map(self.heads.view, kinds)
        return tuple(
            marked((result,), (view.kind,), invalid, view.card)[0] for result, view in zip(results, views, strict=True)
        )

    def result_bytes(self, kind: str) -> int:
        """Bytes of a result, per pixel."""
        view = self.heads.view(kind)
        return result_bytes(view.kind, view.card)

    def _run(self, image: Image, plan: Plan, kinds: Sequence[str]) -> tuple[AnyArray, ...]:
        """`run` of an image without holes."""
        views = [self.heads.view(kind) for kind in kinds]
        plain = {view.kind for view in views}
        if plan.grids and "scores" not in plain:
            results = [new_result(view.kind, view.card, *plan.size) for view in views]
            for window in self._ready_windows(image, plan, 0, self.refine or "refined" in plain):
                for view, result in zip(views, results, strict=True):
                    self._result(view, image, window, out=result[..., slice(*window.rows), :])
                del window  # or its scores would be in memory beside the next ones
            return tuple(results)
        if tuple(kinds) == LABELS and not self.refine:
            return (self.backend.labels([image])[0],)
        return self._results_of_scores(image, self.scores_by(image, plan), plan, views)

    def run_batch(
        self, images: Sequence[Image], plans: Sequence[Plan], kinds: Sequence[str] = LABELS
    ) -> list[tuple[AnyArray, ...]]:
        """Results of checked images of one padded size, run whole as one batch."""
        whole = [filled(image, self.card) for image in images]
        with self.taking(*plans):
            if tuple(kinds) == LABELS and not self.refine:
                labels = self.backend.labels([image for image, _ in whole])
                return [
                    marked((each,), kinds, invalid, self.card) for (_, invalid), each in zip(whole, labels, strict=True)
                ]
            scores = self.backend.scores([image for image, _ in whole])
        views = [self.heads.view(kind) for kind in kinds]
        return [
            self._marked(self._results_of_scores(image, each, plan, views), kinds, invalid)
            for (image, invalid), each, plan in zip(whole, scores, plans, strict=True)
        ]

    def bands_of(self, image: ImageSource, start: int, *kinds: str) -> Iterator[tuple[int, tuple[AnyArray, ...]]]:
        """`Segmenter.bands` of several kinds at once: (first row, a result of each kind)."""
        self.check_kinds(*kinds)
        _, source = self.backend, image
        if self.input_range is not None and getattr(image, "ndim", 0) > 1:
            image = InRange(image, self.input_range, self.card)
        image = check_source(image, self.card)
        if not 0 <= start < image.shape[0]:
            raise MisuseError(f"start is row {start}, and the image has rows 0 to {image.shape[0] - 1}")
        plan = self.plan(*size_of(image), bands=True, source=source)
        if not plan.passes:
            self._working.took(plan.bytes)
        recorder = HoleRecorder(image, self.card)

        def with_holes(band: tuple[int, tuple[AnyArray, ...]]) -> tuple[int, tuple[AnyArray, ...]]:
            top, results = band
            return top, self._marked(results, kinds, recorder.invalid(top, top + results[0].shape[-2]))

        ahead = not self.refine and getattr(image, "for_threads", False)
        return map(with_holes, self._bands(recorder, start, kinds, plan, ahead))

    def _bands(
        self, image: ImageSource, start: int, kinds: Sequence[str], plan: Plan, ahead: bool
    ) -> Iterator[tuple[int, tuple[AnyArray, ...]]]:
        """`ahead`: the network runs on while the caller is at work with a band, and reads the image in a thread."""
        views = [self.heads.view(kind) for kind in kinds]
        ready: Iterator[ScoreWindow]
        if plan.grids:
            stopping = threading.Event()
            ready = self._ready_windows(image, plan, start, self.refine, stopping)
            ready = one_ahead(ready, stopping) if ahead else ready
        else:
            image = np.asarray(image[:, :])
            if tuple(kinds) == LABELS and not self.refine:
                yield start, (self.backend.labels([image])[0][start:],)
                return
            whole = ScoreWindow.whole(self.scores_by(image, plan), plan.padded, plan.size)
            views, ready = self._as_found(whole.scores, views), iter([whole.of_rows(start, plan.size[0])])
        rows_of_band = max(1, BAND_BYTES // (plan.size[1] * sum(map(self.result_bytes, kinds))))
        for window in ready:
            made = {}
            for index, view in enumerate(views):
                if self.refine and view.kind == "labels":  # at once: a few rows would take as long as some cells
                    made[index] = self._result(view, image, window)
            first_row, stop = window.rows
            for top in range(first_row, stop, rows_of_band):
                bottom = min(top + rows_of_band, stop)
                part = slice(top - first_row, bottom - first_row)
                rows = window.of_rows(top, bottom)
                yield (
                    top,
                    tuple(
                        made[index][part] if index in made else self._result(view, image, rows)
                        for index, view in enumerate(views)
                    ),
                )
            del window, rows, made  # or its scores would be in memory beside the next ones

    def taking(self, *plans: Plan) -> AbstractContextManager[None]:
        """While it is open, runs by these plans are within the memory budget beside those of other threads."""
        needed = sum(plan.bytes - plan.result for plan in plans)
        shape = len(plans), plans[0].padded, plans[0].grids, plans[0].passes  # of other stages, grids are others
        # Tiles in passes give back what they took.
        return self._working.taking(needed, shape, self.memory_budget, keeps=not any(plan.passes for plan in plans))

    def _release(self) -> None:
        for backend in (self._backend, self._fine):
            if backend is not None:
                backend.release()

    # Scores

    def scores(self, image: Image) -> Floats:
        """The core's own output for one image: float32 [K, h, w], uncropped (padding included)."""
        image, _ = filled(self.checked(image), self.card)
        plan = self.plan(*size_of(image))
        with self.taking(plan):
            return self.scores_by(image, plan)

    def scores_by(self, image: ImageSource, plan: Plan) -> Floats:
        """The core's uncropped scores of a checked image, float32 [K, h, w]; those of tiles, put together."""
        if plan.grids:
            return np.concatenate([band for *_, band in self._score_bands(image, plan, 0)], axis=1)
        whole: Floats = self.backend.scores([np.asarray(image)])[0]
        return whole

    def heatmap(self, image: Image) -> Floats:
        """As `Segmenter.heatmap`."""
        self._check_coarse()
        image, _ = filled(self.checked(image), self.card)
        plan = self.plan(*size_of(image))
        with self.taking(plan):
            scores = self.scores_by(image, plan)
        return _cropped(self.own(ScoreWindow.whole(scores, plan.padded, plan.size)).scores, plan)

    def own(self, window: ScoreWindow) -> ScoreWindow:
        """A window of the core's scores with those of the chosen head alone."""
        return self.heads.view(self.kind).own(window)

    def _check_coarse(self) -> None:
        if self.manifest is None:
            raise MisuseError(f"{self.path} is a plain ONNX without coarse scores; make an engine: build-engine")

    def close(self) -> None:
        """Release it. Using it afterwards raises MisuseError."""
        backend, self._backend = self._backend, None
        if self._pooled is not None:
            self._pooled.close()
        if backend is not None:
            backend.close()
        with self._opening:
            fine, self._fine = self._fine, None
        if fine is not None:
            fine.close()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _results_of_scores(
        self, image: Image, scores: Floats, plan: Plan, views: Sequence[View]
    ) -> tuple[AnyArray, ...]:
        views, window = self._as_found(scores, views), ScoreWindow.whole(scores, plan.padded, plan.size)
        if len(views) == 1 and views[0].kind in ("values", "probabilities") and views[0].channels is None:
            full = views[0].upsampling.mode == "none" and scores.shape[1:] == plan.size
            if full and scores.dtype == np.float32 and scores.flags.writeable:
                return (self._result(views[0], image, window, out=scores),)  # in place: no second copy
        return tuple(
            _cropped(view.own(window).scores, plan) if view.kind == "scores" else self._result(view, image, window)
            for view in views
        )

    def _result(self, view: View, image: ImageSource, window: ScoreWindow, out: AnyArray | None = None) -> AnyArray:
        """A result of the window's rows, refined where it is of labels and that is wanted."""
        window = view.own(window)
        if view.kind == "refined" or (view.kind == "labels" and self.refine):
            return refined_labels(window, view.upsampling, view.card, self.cell, image, out)
        return result_from_scores(view.kind, window, view.upsampling, view.card, out)

    def _as_found(self, scores: Floats, views: Sequence[View]) -> list[View]:
        """What is to be done to a whole image's scores; of an ONNX model after a look at what it gives."""
        if self.manifest is not None or not any(view.kind == "probabilities" for view in views):
            return list(views)
        upsampling = with_activation(self.upsampling, self.card, scores)
        return [replace(view, upsampling=upsampling) for view in views]

    def _ready_windows(
        self, image: ImageSource, plan: Plan, start: int, refine: bool, stop: threading.Event | None = None
    ) -> Iterator[ScoreWindow]:
        # Interpolation reads the score above a row, too.
        stride = self._stages_of(plan)[-1].stride[0]
        more = REACH if refine else 0
        bands = self._score_bands(image, plan, max(0, start - (2 + more) * stride), stop)
        return ready_windows(bands, stride, self.upsampling, plan.padded, plan.size, start, more)

    def _score_bands(
        self, image: ImageSource, plan: Plan, start: int, stop: threading.Event | None = None
    ) -> Iterator[Band]:
        """`stop`: once it is set nobody wants them any more."""
        backend, stages = self._backend_of(plan), self._stages_of(plan)
        if plan.passes:
            assert self._pooled is not None, "as its plan says"
            for top, bottom, band in self._pooled.bands(image, plan, start):
                yield top, bottom, self.heads.usable(band, interpolated=self.upsampling.mode == "linear")
            return

        def first(rows: Span, columns: Span) -> AnyArray:
            # Beyond the image lies its padding, to which a tile at the edge comes by itself.
            part = image[rows.outer_start : rows.outer_stop, columns.outer_start : columns.outer_stop]
            return run(0, np.asarray(part))

        def later(index: int) -> Any:
            return lambda part, *_: run(index, part)

        def run(index: int, part: AnyArray) -> AnyArray:
            if stop is not None and stop.is_set():
                raise DeployError(f"{self.path}: the rest of the image is not wanted any more")
            return backend.run_stage(index, part)

        others = [later(index) for index in range(1, len(stages))]
        yield from score_bands(plan.grids, [stage.stride for stage in stages], first, others, start)

    def _stages_of(self, plan: Plan) -> tuple[Stage, ...]:
        """Those that a plan's grids are of."""
        if self.manifest is not None and plan.fine:
            return self.manifest.fine
        if self.manifest is not None and self.manifest.pooled is not None and plan.passes:
            return self.manifest.pooled.stages
        return self.stages

    def _backend_of(self, plan: Plan) -> Backend:
        """What runs a plan's stages."""
        return self.fine_backend if plan.fine else self.backend

    @property
    def fine_backend(self) -> Backend:
        """What runs the stages for tiles alone, of an engine that has them. Raises MisuseError once it is closed."""
        _ = self.backend
        assert self.manifest is not None and self.manifest.fine, "as plans say"
        with self._opening:
            if self._fine is None:
                self._fine = open_fine(self.manifest, self.heads, self._member, self._threads)
            return self._fine

    def _member(self, name: str) -> bytes:
        """A member of the engine's file, which is the one that was opened. Raises DeployError."""
        assert self.manifest is not None
        with EngineFile(self.path) as engine:
            if engine.manifest.members.get(name) != self.manifest.members[name]:
                raise DeployError(f"{self.path} was replaced since it was opened; open it again")
            return engine.read(name)


def _cropped(scores: Floats, plan: Plan) -> Floats:
    """Uncropped scores, [K, h, w], without the cells that lie in the padding alone; a copy."""
    # Cells per padded pixel, from what came out: right for networks whose scores are full-size too.
    height, width = (-(-plan.size[axis] * scores.shape[1 + axis] // plan.padded[axis]) for axis in (0, 1))
    return scores[:, :height, :width].copy()

"""Network: an engine or an ONNX model opened; how an image is run by it, and what comes out."""

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .arrays import AnyArray, Floats, Image, ImageSource, size_of
from .backends import Backend
from .engine_format.manifest import Manifest
from .engine_format.model_card import ModelCard
from .engine_format.stage import Stage, Upsampling
from .errors import MisuseError
from .head.heads import Heads
from .head.refine import REACH, refusal
from .head.score_window import ScoreWindow
from .head.upsampling import new_result, result_bytes
from .onnx_model import WHOLE, OnnxModelBackend
from .open_engine import gpu_index_of, open_engine
from .pixels.no_data import HoleRecorder, filled, marked
from .pixels.prepare import check_image, check_source
from .pixels.value_range import InRange, Range, parse_range
from .planning.batch_cost import BatchCost
from .planning.plan import Plan
from .planning.planner import LABELS, Planner
from .planning.working_memory import WorkingMemory
from .process_memory import bound_heap, give_back_freed, resident
from .result_maker import ResultMaker, cropped
from .tiling.tiled_scores import TiledScores
from .tiling.tiles import joined, one_ahead

log = logging.getLogger(__name__)

BAND_BYTES = 4_000_000  # of a band's results, about
SCORES = ("scores",)


class Network:
    """What a Segmenter is made of, with all that our own commands use. Arguments and errors are those of `Segmenter`.

    Many threads may use one.

    Attributes:
        path: of the file.
        heads: of the model: results of others than the chosen one are named by it, `depth/values`.
        card: of the model, and of the chosen head.
        manifest: of an engine; None of an ONNX model.
        upsampling: what makes full-size scores of the core's.
        precision: the lowest in the graph: one of runtime.engine_format.manifest.PRECISIONS.
        stages: the core, in order.
        refine: whether borders of labels follow those of the image.
        input_range: which numbers of images are the network's 0 and 1; None: they are the network's own, whatever the
            card's `range` says of files.
        cell: pixels between coarse scores.
        tiled: gives the scores of images in tiles.
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
        if threads is not None and threads < 1:
            raise MisuseError(f"threads is {threads}; it must be at least 1, or None for one per physical core")
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int | np.integer) or memory < 1):
            raise MisuseError(
                f"memory is {memory!r}; it must be a whole number of bytes above 0, or None for what is free"
            )
        self.path = path = Path(model)
        self.refine = refine
        if memory is not None:
            bound_heap()
        self.input_range = None if input_range is None else parse_range(input_range)
        if not path.is_file():
            raise MisuseError(f"{path} does not exist or is not a file; name an .engine or an .onnx")
        if path.suffix.lower() == ".onnx":
            if memory is not None:
                log.warning(
                    "memory of %.0f MB is not kept by %s: what a plain ONNX takes nobody has measured; make an engine: "
                    "build-engine", memory / 1e6, path,
                )  # fmt: skip
            if device.startswith("cuda"):
                raise MisuseError(f"{path} is a plain ONNX, which runs on the CPU; make an engine: build-engine")
            onnx = OnnxModelBackend(path, threads)
            self._take(
                onnx, Heads(onnx.card, onnx.upsampling, (), output, str(path)), (WHOLE,), "float32", memory=memory
            )
        else:
            backend, manifest, heads = open_engine(path, device, gpu_index, threads, output, memory)
            self._take(backend, heads, manifest.stages, manifest.precision, manifest, threads, memory)
        if refine and (reason := refusal(self.card, self.upsampling, self.stages[-1].stride)) is not None:
            instead = "omit --refine" if self.manifest else "make an engine: build-engine"
            raise MisuseError(f"{path} cannot be refined: {reason}; {instead}")

    @classmethod
    def of(cls, backend: Backend, card: ModelCard, upsampling: Upsampling, stages: Sequence[Stage]) -> "Network":
        """One that no file holds: a core in float32, that `backend` runs in these stages."""
        net = cls.__new__(cls)
        net.path, net.refine, net.input_range = Path(backend.name), False, None
        net._take(backend, Heads(card, upsampling, (), None, backend.name), tuple(stages), "float32")
        return net

    def _take(
        self,
        backend: Backend,
        heads: Heads,
        stages: tuple[Stage, ...],
        precision: str,
        manifest: Manifest | None = None,
        threads: int | None = None,
        memory: int | None = None,
    ) -> None:
        """Be the network that `backend` has opened."""
        self._backend: Backend | None = backend
        self.heads, self.card, self.upsampling, self.stages = heads, heads.card, heads.upsampling, stages
        self.precision, self.manifest = precision, manifest
        self.batch_costs: dict[tuple[int, int], BatchCost] = {}
        self._working = WorkingMemory(self._release, resident if not self.on_gpu else lambda: None)
        self._planner = Planner(heads, stages, manifest, self.path, backend.streams, self._working, memory)
        self.tiled = TiledScores(backend, heads, stages, manifest, self.path, threads)
        self.cell = int((heads.upsampling.factor or stages[-1].stride)[0])
        self._results = ResultMaker(heads, self.cell, self.refine, manifest is not None)

    @property
    def backend(self) -> Backend:
        """What runs it. Raises MisuseError once it is closed."""
        if self._backend is None:
            raise MisuseError(f"the Segmenter of {self.path} is closed; open another one")
        return self._backend

    @property
    def memory(self) -> int | None:
        """Bytes that the calls at work may take together on the CPU; None: 80 % of what is free."""
        return self._planner.memory

    @memory.setter
    def memory(self, memory: int | None) -> None:
        self._planner.memory = memory

    @property
    def fine_backend(self) -> Backend:
        """What runs the stages for tiles alone, of an engine that has them. Raises MisuseError once it is closed."""
        _ = self.backend
        return self.tiled.fine_backend

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

    def check_outputs(self, *kinds: str) -> tuple[str, ...]:
        """`Heads.check_kinds` of what `run` gives: `refined` and `scores` too.

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
                self.heads.check_kinds(kind)
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
        beside: int = 0,
    ) -> Plan:
        """`Planner.plan` of an image of this size."""
        return self._planner.plan((height, width), bands, kinds, source, fine, beside)

    def memory_budget(self) -> int:
        """Bytes that one image may take now. What earlier ones took is kept by the backend, and there for the next."""
        return self._planner.budget()

    # Results

    def result(self, image: Image, kind: str | None = None) -> AnyArray:
        """`labels`, `probabilities`, `masks` or `values` of one image; None: what the network gives, its `kind`."""
        kinds = self.heads.check_kinds(kind or self.kind)
        checked = self.checked(image)
        return self.run(checked, self.plan(*size_of(checked), kinds=kinds, source=checked), kinds)[0]

    def checked(self, image: object) -> ImageSource:
        """An image as [H, W, C]; one whose numbers become the card's where it is read.

        Raises MisuseError where the card does not allow it, or the network is closed.
        """
        _ = self.backend
        if self.input_range is not None and isinstance(image, np.ndarray) and image.ndim > 1:
            return check_source(InRange(image, self.input_range, self.card), self.card)
        return check_image(image, self.card)

    def run(self, image: ImageSource, plan: Plan, kinds: Sequence[str] = LABELS) -> tuple[AnyArray, ...]:
        """Results of each of `kinds`, which `check_outputs` has seen, for an image that was checked and planned."""
        recorder = HoleRecorder(image, self.card)
        with self.taking(plan):
            # In tiles it is read by tiles, and has no copy where it has holes or a range.
            results = self._run(recorder if plan.grids else recorder[:, :], plan, kinds)
        return self._results.marked(results, kinds, recorder.invalid(0, plan.size[0]))

    def result_bytes(self, kind: str) -> int:
        """Bytes of a result, per pixel."""
        view = self.heads.view(kind)
        return result_bytes(view.kind, view.card)

    def _run(self, image: ImageSource, plan: Plan, kinds: Sequence[str]) -> tuple[AnyArray, ...]:
        """`run` of an image without holes."""
        views = [self.heads.view(kind) for kind in kinds]
        plain = {view.kind for view in views}
        if plan.grids and "scores" not in plain:
            results = [new_result(view.kind, view.card, *plan.size) for view in views]
            for window in self._ready_windows(image, plan, 0, self.refine or "refined" in plain):
                for view, result in zip(views, results, strict=True):
                    self._results.of_window(view, image, window, out=result[..., slice(*window.rows), :])
                del window  # or its scores would be in memory beside the next ones
            return tuple(results)
        if tuple(kinds) == LABELS and not self.refine:
            return (self.backend.labels([np.asarray(image)])[0],)
        return self._results.of_scores(image, self.scores_by(image, plan), plan, views)

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
            self._results.marked(self._results.of_scores(image, each, plan, views), kinds, invalid)
            for (image, invalid), each, plan in zip(whole, scores, plans, strict=True)
        ]

    def bands_of(self, image: ImageSource, start: int, *kinds: str) -> Iterator[tuple[int, tuple[AnyArray, ...]]]:
        """`Segmenter.bands` of several kinds at once: (first row, a result of each kind)."""
        self.heads.check_kinds(*kinds)
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
            return top, self._results.marked(results, kinds, recorder.invalid(top, top + results[0].shape[-2]))

        ahead = not self.refine and hasattr(source, "expect")  # one that is read in threads of its own
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
            views, ready = self._results.as_found(whole.scores, views), iter([whole.of_rows(start, plan.size[0])])
        rows_of_band = max(1, BAND_BYTES // (plan.size[1] * sum(map(self.result_bytes, kinds))))
        for window in ready:
            made = {}
            for index, view in enumerate(views):
                if self.refine and view.kind == "labels":  # at once: a few rows would take as long as some cells
                    made[index] = self._results.of_window(view, image, window)
            first_row, stop = window.rows
            for top in range(first_row, stop, rows_of_band):
                bottom = min(top + rows_of_band, stop)
                part = slice(top - first_row, bottom - first_row)
                rows = window.of_rows(top, bottom)
                yield (
                    top,
                    tuple(
                        made[index][part] if index in made else self._results.of_window(view, image, rows)
                        for index, view in enumerate(views)
                    ),
                )
            del window, rows, made  # or its scores would be in memory beside the next ones

    @contextmanager
    def taking(self, *plans: Plan) -> Iterator[None]:
        """While it is open, runs by these plans are within the memory budget beside those of other threads."""
        needed = sum(plan.bytes - plan.result for plan in plans)
        shape = len(plans), plans[0].padded, plans[0].grids, plans[0].passes  # of other stages, grids are others
        # Tiles in passes give back what they took.
        keeps = not any(plan.passes for plan in plans)
        with self._working.taking(needed, shape, self.memory_budget, keeps):
            yield
        self.tiled.ran()
        if not keeps:
            give_back_freed()

    def rest(self) -> None:
        """Give back the memory that is kept for the next image, where none is in work."""
        self._working.rest()

    def _release(self) -> None:
        if self._backend is not None:
            self._backend.release()
        self.tiled.release()

    # Scores

    def scores(self, image: Image) -> Floats:
        """The core's own output for one image: float32 [K, h, w], uncropped (padding included)."""
        source = self.checked(image)
        plan = self.plan(*size_of(source), kinds=SCORES, source=source)
        with self.taking(plan):
            return self.scores_by(HoleRecorder(source, self.card), plan)

    def scores_by(self, image: ImageSource, plan: Plan) -> Floats:
        """The core's uncropped scores of a checked image, float32 [K, h, w]; those of tiles, put together."""
        backend = self.backend
        if plan.grids:
            last = self.tiled.stages_of(plan)[-1]
            return joined(self.tiled.bands(image, plan), plan.grids[-1].padded[0], last.short[0])
        whole: Floats = backend.scores([np.asarray(image[:, :])])[0]
        return whole

    def heatmap(self, image: Image) -> Floats:
        """As `Segmenter.heatmap`."""
        self._check_coarse()
        source = self.checked(image)
        plan = self.plan(*size_of(source), kinds=SCORES, source=source)
        with self.taking(plan):
            scores = self.scores_by(HoleRecorder(source, self.card), plan)
        return cropped(self.own(ScoreWindow.whole(scores, plan.padded, plan.size)).scores, plan)

    def own(self, window: ScoreWindow) -> ScoreWindow:
        """A window of the core's scores with those of the chosen head alone."""
        return self.heads.view(self.kind).own(window)

    def _check_coarse(self) -> None:
        if self.manifest is None:
            raise MisuseError(f"{self.path} is a plain ONNX without coarse scores; make an engine: build-engine")

    def close(self) -> None:
        """Release it. Using it afterwards raises MisuseError."""
        backend, self._backend = self._backend, None
        self.tiled.close()
        if backend is not None:
            backend.close()

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ready_windows(
        self, image: ImageSource, plan: Plan, start: int, refine: bool, stop: threading.Event | None = None
    ) -> Iterator[ScoreWindow]:
        _ = self.backend
        return self.tiled.windows(image, plan, start, REACH if refine else 0, stop)

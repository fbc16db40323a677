"""The scores of an image in tiles, by whichever stages of an engine its plan says: opened when they are needed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arrays import AnyArray, ImageSource
from ..backends import Backend
from ..backends.host import HostBackend
from ..engine_format.engine_file import EngineFile
from ..engine_format.manifest import Manifest
from ..engine_format.stage import Stage
from ..errors import DeployError
from ..head.heads import Heads
from ..head.score_window import ScoreWindow
from ..open_engine import open_fine
from ..planning.grid import Span
from ..planning.plan import Plan
from ..planning.working_memory import STEADY_RUNS
from ..process_memory import give_back_freed
from .tiles import Band, part_of, ready_windows, score_bands

if TYPE_CHECKING:
    from .pooled import PooledTiles


class TiledScores:
    """Gives the scores of images whose plans have tiles.

    Args:
        backend: runs the stages of whole images, and is closed by its owner.
        heads: of the model.
        stages: of whole images.
        manifest: of the engine, which tells of other stages; None where there are none.
        path: of its file.
        threads: of one run; None: one per physical core.
    """

    def __init__(
        self,
        backend: Backend,
        heads: Heads,
        stages: tuple[Stage, ...],
        manifest: Manifest | None,
        path: Path,
        threads: int | None,
    ) -> None:
        self._backend, self._heads, self._stages, self._manifest = backend, heads, stages, manifest
        self._path, self._threads = path, threads
        self._fine: HostBackend | None = None
        self._users, self._unused = 0, 0  # who has it, or the passes, now; and runs since anybody had
        self._opening = threading.RLock()  # bands that nobody reads on may end, collected, in a thread that has it
        self._pooled: PooledTiles | None = None
        if manifest is not None and manifest.pooled is not None:
            from . import pooled  # which most networks do not need

            self._pooled = pooled.PooledTiles(manifest.pooled, heads.card, self._member, threads)

    def windows(
        self, image: ImageSource, plan: Plan, start: int, reach: int = 0, stop: threading.Event | None = None
    ) -> Iterator[ScoreWindow]:
        """Rows of pixels from row `start` on, as soon as their scores are there; `reach` as of `ready_windows`.

        `stop`: once it is set nobody wants them any more.
        """
        last = self.stages_of(plan)[-1]
        stride, short = last.stride[0], last.short[0]
        seen = plan.grids[-1].padded[0]  # rows, which are those of a resized image where the network looks at one
        # Interpolation reads the score above a row, too; and one above that where scores are wider than their stride.
        above = (2 + (short > 0) + reach) * stride
        bands = self.bands(image, plan, max(0, start * seen // plan.padded[0] - above), stop)
        return ready_windows(bands, stride, self._heads.upsampling, plan.padded, plan.size, start, reach, seen, short)

    def bands(
        self, image: ImageSource, plan: Plan, start: int = 0, stop: threading.Event | None = None
    ) -> Iterator[Band]:
        """Scores from the row of tiles on that row `start` of what the network sees is in; `stop` as of `windows`."""

        def wanted() -> None:
            if stop is not None and stop.is_set():
                raise DeployError(f"{self._path}: the rest of the image is not wanted any more")

        with self._using() if plan.passes or plan.fine else nullcontext():
            if plan.passes:
                assert self._pooled is not None, "as its plan says"
                for top, bottom, band in self._pooled.bands(image, plan, start, wanted):
                    interpolated = self._heads.upsampling.mode == "linear"
                    yield top, bottom, self._heads.usable(band, interpolated=interpolated)
                return
            yield from self._by(self.fine_backend if plan.fine else self._backend, image, plan, start, wanted)

    def _by(
        self, backend: Backend, image: ImageSource, plan: Plan, start: int, wanted: Callable[[], None]
    ) -> Iterator[Band]:
        """As `bands`, in one pass."""
        stages = self.stages_of(plan)

        def first(rows: Span, columns: Span) -> AnyArray:
            wanted()
            return backend.run_stage(0, part_of(image, plan.grids[0], rows, columns))

        def later(index: int) -> Any:
            def run(part: AnyArray, *_: Span) -> AnyArray:
                wanted()
                return backend.run_stage(index, part)

            return run

        others = [later(index) for index in range(1, len(stages))]
        yield from score_bands(plan.grids, [stage.stride for stage in stages], first, others, start)

    @contextmanager
    def _using(self) -> Iterator[None]:
        """What was opened here stays open meanwhile."""
        with self._opening:
            self._users += 1
        try:
            yield
        finally:
            with self._opening:
                self._users, self._unused = self._users - 1, -1  # the run that had it is counted, too

    def ran(self) -> None:
        """An image was run. What STEADY_RUNS of them did not need is closed, as its weights are in memory once more."""
        with self._opening:
            self._unused += 1
            if self._users or self._unused != STEADY_RUNS:
                return
            unused, self._fine = self._fine, None
        if self._pooled is not None:
            self._pooled.forget()
        if unused is not None:
            unused.close()
        give_back_freed()

    @property
    def fine_backend(self) -> HostBackend:
        """What runs the stages for tiles alone, of an engine that has them."""
        assert self._manifest is not None and self._manifest.fine, "as plans say"
        with self._opening:
            if self._fine is None:
                self._fine = open_fine(self._manifest, self._heads, self._member, self._threads)
            return self._fine

    def release(self) -> None:
        """Give back the memory that no run uses, of what was opened here."""
        if (fine := self._fine) is not None:
            fine.release()

    def close(self) -> None:
        """Close what was opened here."""
        if self._pooled is not None:
            self._pooled.close()
        with self._opening:
            fine, self._fine = self._fine, None
        if fine is not None:
            fine.close()

    def stages_of(self, plan: Plan) -> tuple[Stage, ...]:
        """Those that a plan's grids are of."""
        if self._manifest is not None and plan.fine:
            return self._manifest.fine
        if self._manifest is not None and self._manifest.pooled is not None and plan.passes:
            return self._manifest.pooled.stages
        return self._stages

    def _member(self, name: str) -> bytes:
        """A member of the engine's file, which is the one that was opened. Raises DeployError."""
        assert self._manifest is not None
        with EngineFile(self._path) as engine:
            if engine.manifest.members.get(name) != self._manifest.members[name]:
                raise DeployError(f"{self._path} was replaced since it was opened; open it again")
            return engine.read(name)

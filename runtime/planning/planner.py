"""Plans of images for one network: what is wanted of each, and the memory that there is."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..arrays import ImageSource
from ..engine_format.manifest import Manifest
from ..engine_format.stage import Stage
from ..errors import OverBudgetError
from ..head.heads import Heads
from ..head.upsampling import LABEL_KINDS, result_bytes
from ..pixels.prepare import padded_size
from ..pixels.value_range import copied_bytes
from ..process_memory import available_memory
from .kept_rows import NOTHING_KEPT, KeptRows
from .plan import Beside, Plan, check_result, plan_bands, plan_engine, plan_unbounded
from .profiles import plan_on_gpu
from .working_memory import WorkingMemory

DEFAULT_MEMORY_SHARE = 0.8  # of the memory that is free when an image arrives
BANDS_MEMORY = 2_000_000_000  # bytes; more makes `bands` no faster, and an image that is read by regions whole
LABELLING_BYTES = 10  # of each pixel whose labels are made at a time, about: what they are made in
LABELS = ("labels",)


class Planner:
    """Plans images within the memory budget of one network.

    Args:
        heads: of the model.
        stages: the core, in order.
        manifest: of an engine; None of an ONNX model.
        path: names the network in errors.
        streams: of its backend.
        working: what its backend holds already.
        memory: bytes that the calls at work may take together on the CPU; None: 80 % of what is free.
    """

    def __init__(
        self,
        heads: Heads,
        stages: tuple[Stage, ...],
        manifest: Manifest | None,
        path: Path,
        streams: int,
        working: WorkingMemory,
        memory: int | None,
    ) -> None:
        self._heads, self._card, self._stages, self._manifest, self._path = heads, heads.card, stages, manifest, path
        self._streams, self._working, self.memory = streams, working, memory

    def budget(self) -> int:
        """Bytes that one image may take now. What earlier ones took is kept by the backend, and there for the next."""
        return self.memory or int((available_memory() + self._working.held) * DEFAULT_MEMORY_SHARE)

    def plan(
        self,
        size: tuple[int, int],
        bands: bool = False,
        kinds: Sequence[str] = LABELS,
        source: ImageSource | None = None,
        fine: bool = True,
        beside: int = 0,
    ) -> Plan:
        """How an image of `size` (height, width) is run: whole, or in tiles.

        Args:
            bands: its results are taken a few rows at a time, and at most BANDS_MEMORY is taken.
            kinds: results wanted: labels are small beside what the network takes, others are in the budget.
            source: what the image is read from.
            fine: whether it may be by the engine's stages for tiles alone.
            beside: bytes that its run holds besides.

        Raises:
            OverBudgetError: memory is too small.
        """
        result = 0 if bands else self._result_bytes(size, kinds)
        if self._manifest is not None and self._manifest.gpu is not None:
            if result:
                check_result(size, result, self.budget())
            profiles = self._manifest.gpu.profiles
            return plan_on_gpu(size, self._card, self._stages[0], profiles, str(self._path), result)
        copied = 0 if bands else copied_bytes(source, self._card)
        if not bands and any(self._heads.view(kind).kind == "scores" for kind in kinds):
            # There are all of the core's, too, of all heads.
            beside += math.ceil(math.prod(padded_size(*size, self._card)) * self._stages[-1].output_bytes)
        # What an earlier image took is kept by the backend. One that takes no more needs no look at what is free,
        # which costs a quarter of a millisecond.
        memory, making = float(self._working.held), 0
        needed = plan_unbounded(size, self._card, self._stages).bytes + beside + copied
        if result or self.memory is not None or needed > memory:
            memory = self._left_for_runs(size, bands, beside)
            made = any(self._heads.view(kind).kind not in ("values", "probabilities", "scores") for kind in kinds)
            making = LABELLING_BYTES if made else 0
        kept: KeptRows = getattr(source, "kept", NOTHING_KEPT)
        taken = Beside(result, kept, making, copied)
        try:
            if bands:
                return plan_bands(size, self._card, self._stages, self._manifest, memory, BANDS_MEMORY, taken, fine)
            plan = plan_engine(size, self._card, self._stages, self._manifest, memory, taken, fine)
            return replace(plan, bytes=plan.bytes + beside) if beside else plan
        except OverBudgetError as error:
            if self.memory is None or memory > 0.99 * self.memory:
                raise
            others = f" and for {self._streams - 1} more at once" if self._streams > 1 else ""
            given, what = f"{self.memory / 1e6:,.2f} MB", "labels and scores" if beside else "labels"
            raise OverBudgetError(f"{error}; of the {given} given, the rest is for its {what}{others}") from None

    def _result_bytes(self, size: tuple[int, int], kinds: Sequence[str]) -> int:
        """Of all results that are no labels."""
        views = [view for view in map(self._heads.view, kinds) if view.kind not in LABEL_KINDS]
        return math.prod(size) * sum(result_bytes(view.kind, view.card) for view in views)

    def _left_for_runs(self, size: tuple[int, int], bands: bool, beside: int) -> int:
        """Bytes of the budget without labels, which are beside what the network takes, and without what is `beside`."""
        budget = self.budget() // (self._streams if self.memory is not None else 1)
        labels = 0 if bands else math.prod(size) * result_bytes("labels", self._card)
        return max(max(budget - labels, budget // 2) - beside, 0)

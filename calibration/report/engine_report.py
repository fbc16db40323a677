"""report.json of an engine: what was found and measured when it was built. Written and read here alone."""

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fcn_deploy.calibration.report.json_values import read_value
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.sizes import Size

REPORT = "report.json"  # the member of an engine file
REPORT_VERSION = 1
LOW_PRECISIONS = ("int8", "fp8", "float16", "bf16")  # that an engine may be built in, the lowest first


@dataclass(frozen=True)
class Agreement:
    """What the float32 core gives against the model's own output.

    Attributes:
        kind: labels, masks or values.
        sizes: "HxW" of the images.
        pixels: of all labels, masks or maps together.
        labels_equal: share of pixels, of labels and masks.
        undecided: share of pixels whose two best scores (or score and threshold) are within rounding of a tie.
        wrong: differing pixels that are not.
        difference: largest of values, as a share of their range.
    """

    sizes: tuple[str, ...]
    pixels: int
    kind: str = "labels"
    labels_equal: float | None = None
    undecided: float | None = None
    wrong: int | None = None
    difference: float | None = None

    def __post_init__(self) -> None:
        if self.labels_equal is None and self.difference is None:
            raise ValueError("neither labels_equal nor difference is told")


@dataclass(frozen=True)
class Accuracy:
    """What low precision cost, as the accuracy gate measured it.

    Attributes:
        metric: `mIoU` where labels were given, else `agreement` with float32.
        float32: its value, 0 to 1; 1 of `agreement`.
        drop_points: hundredths of it that were lost.
        max_drop: that could be lost.
        calibration_images, images_judged: how many.
        judged_unseen: whether calibration did not see the images judged.
        layers: that could be in low precision.
        kept: layer → why it stays in higher precision.
        skipped: image → why it could not be read.
        method: of calibration's ranges; None: no INT8.
        int8, fp8, float16, bf16: its value, of the precision that was built.
        by_backend: library → value by its own kernels.
        max_class_drop: points of IoU that each class could lose, beyond its borders where nothing was labelled.
        class_drops: class → points of IoU that it lost, against the labels or else float32; of those that lost more.
    """

    metric: str
    float32: float
    drop_points: float
    max_drop: float
    calibration_images: int
    images_judged: int
    judged_unseen: bool
    layers: int
    kept: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    method: str | None = None
    int8: float | None = None
    float16: float | None = None
    fp8: float | None = None
    bf16: float | None = None
    by_backend: dict[str, float] = field(default_factory=dict)
    max_class_drop: float | None = None
    class_drops: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self._built:
            raise ValueError(f"none of {', '.join(LOW_PRECISIONS)} is told of")

    @property
    def precision(self) -> str:
        return self._built[0]

    @property
    def value(self) -> float:
        """Of the low precision."""
        return float(getattr(self, self.precision))

    @property
    def _built(self) -> list[str]:
        return [name for name in LOW_PRECISIONS if getattr(self, name) is not None]


@dataclass
class LayerPrecision:
    """A layer, and what low precision does to it.

    Attributes:
        name: its output.
        operator: of its node.
        sensitivity: error of the scores, relative to their power, with this layer alone in low precision; None: not
            measured.
        kept: why it stays in higher precision; "" where it does not.
    """

    name: str
    operator: str
    sensitivity: float | None = None
    kept: str = ""


@dataclass(frozen=True)
class StageReport:
    """How a stage of the core is run.

    Attributes:
        halo: (vertical, horizontal) in pixels; None: whole images only.
        tiles: `exact`, or `none: ` and why.
        bytes_per_pixel: working memory of a pixel; beside it `bytes_fixed`, and `bytes_per_pixel_squared` times the
            square of the pixels.
        output_bytes: handed on, per pixel.
        work: share of the core's.
        tile: side in pixels of tiles that run faster than larger wholes; None: none does.
    """

    halo: Size | None
    tiles: str
    bytes_per_pixel: float
    output_bytes: float
    work: float
    tile: int | None = None
    bytes_fixed: float = 0.0
    bytes_per_pixel_squared: float = 0.0


@dataclass(frozen=True)
class CandidateReport:
    """A library, precision and number of threads that were measured beside others.

    Attributes:
        backend, precision: what ran.
        threads: a number, or `one per core`, of which hyperthreads are none.
        latency_ms: "HxW" → median of one call; None where it was too large for the memory.
        against_chosen: its best time over the chosen candidate's, geometric mean over the sizes.
        rounds: measured at each size.
        refused: why it could not be chosen.
        chosen: whether the engine names it.
    """

    backend: str
    precision: str
    threads: int | str
    latency_ms: dict[str, float | None]
    against_chosen: float | None = None
    rounds: tuple[int, ...] = ()
    refused: str | None = None
    chosen: bool = False


@dataclass(frozen=True)
class ProfileReport:
    """An optimisation profile of a TensorRT plan.

    Attributes:
        profile: its number.
        min, opt, max: "HxW" of the network's input.
        batch: most images at once.
        images: it was planned for; None where the user gave the range.
        mean_log_ratio: mean |ln(area / area of OPT)| of these.
        activation_bytes: at `max`; None where TensorRT does not tell.
    """

    profile: int
    min: str
    opt: str
    max: str
    batch: int
    images: int | None = None
    mean_log_ratio: float | None = None
    activation_bytes: int | None = None


@dataclass(frozen=True)
class PlanLayer:
    """A layer of a plan, after TensorRT fused what it could.

    Attributes:
        name: of the first node in it, with TensorRT's own additions.
        kind: as TensorRT calls it: `correlation`, `kgen`.
        takes, gives: data types of its inputs (without weights) and outputs: `Half`.
    """

    name: str
    kind: str
    takes: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanReport:
    """How TensorRT built a plan.

    Attributes:
        module, version: Python module that built it.
        targets: compute capabilities.
        seconds: that it took.
        profiles: in the plan's order.
        notes: what the user should know, a line each.
        layers: in the order they run; none where the builder does not list them.
    """

    module: str
    version: str
    targets: tuple[str, ...]
    seconds: float
    profiles: tuple[ProfileReport, ...]
    notes: tuple[str, ...] = ()
    layers: tuple[PlanLayer, ...] = ()

    def __post_init__(self) -> None:
        if not self.profiles:
            raise ValueError("it has no profiles")


@dataclass(frozen=True)
class PlanCandidate:
    """A precision that a plan was built in, beside others (`--fastest`).

    Attributes:
        precision: the lowest in it.
        layers: of the plan, as the builder lists them; None where nothing was built, or is listed.
        float_layers: of these, that give floating point of 16 bits or more.
        convolutions: types in and out → how many.
        activation_bytes: of the profile that takes most; None where TensorRT does not tell.
        plan_bytes: of the plan.
        accuracy, drop_points: of the gate's metric, and what was lost of it; None of float32, which is the measure.
        latency_ms: "HxW" → median of one call on this machine's GPU; nothing without one.
        refused: why it could not be chosen.
        chosen: whether it is the engine's.
    """

    precision: str
    layers: int | None = None
    float_layers: int | None = None
    convolutions: dict[str, int] = field(default_factory=dict)
    activation_bytes: int | None = None
    plan_bytes: int | None = None
    accuracy: float | None = None
    drop_points: float | None = None
    latency_ms: dict[str, float | None] = field(default_factory=dict)
    refused: str | None = None
    chosen: bool = False


@dataclass
class EngineReport:
    """What was found and measured when an engine was built. What is not known, or does not apply, is None.

    Attributes:
        target, precision: what it was built for, and the lowest precision in it.
        head: mode of the upsampling that the runtime does; `none`: the network does it.
        stride: pixels of a cell of the scores.
        size_multiple, smallest: of the sides of its input, in pixels.
        fit: how the model was made to take every size; `none`: it takes them.
        threads: of the measurements: a number, or `one per core`, of which hyperthreads are none.
        machine: it was built on.
        notes: what was assumed of the model or changed in it, a line each.
        stages: of the core.
        fine: of the core, cut further for tiles alone; none where that brings nothing.
        passes: how tiles of a network are run that pools over the whole image, or why there are none.
        agreement: of the float32 core with the model, of the first output where there are several.
        further_agreements: name → that of each further output.
        accuracy: what low precision cost; None in float32.
        layers: what each costs in low precision, where it was measured.
        core_bytes: precision → bytes of the core network.
        builder: how TensorRT built the plan.
        backend: library that was measured fastest on this CPU.
        candidates: that were measured.
        plans, plans_reason: precisions that plans were built in, and why one of them was kept.
        latency_ms: "HxW" → median milliseconds of one call, image to labels; None in it: too large.
        latency_reason: why nothing was measured.
        float32_latency_ms: the same of the float32 core, where the engine is INT8.
        speedup: of INT8 over float32: geometric mean over the sizes.
        miou, miou_reason: on the user's labels, or why there is none.
        version: of this format; None: of before it had one.
        problems: parts that could not be read, each with the reason; not written.
    """

    target: str | None = None
    precision: str | None = None
    head: str | None = None
    stride: int | None = None
    size_multiple: int | None = None
    smallest: int | None = None
    fit: str | None = None
    threads: int | str | None = None
    machine: str | None = None
    notes: tuple[str, ...] = ()
    stages: tuple[StageReport, ...] = ()
    fine: tuple[StageReport, ...] = ()
    passes: str | None = None
    agreement: Agreement | None = None
    further_agreements: dict[str, Agreement] = field(default_factory=dict)
    accuracy: Accuracy | None = None
    layers: tuple[LayerPrecision, ...] | None = None
    core_bytes: dict[str, int] | None = None
    builder: PlanReport | None = None
    backend: str | None = None
    candidates: tuple[CandidateReport, ...] = ()
    plans: tuple[PlanCandidate, ...] = ()
    plans_reason: str | None = None
    latency_ms: dict[str, float | None] | None = None
    latency_reason: str | None = None
    float32_latency_ms: dict[str, float | None] | None = None
    speedup: float | None = None
    miou: float | None = None
    miou_reason: str | None = None
    version: int | None = REPORT_VERSION
    problems: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """What is written as JSON: the fields by their names, `version` first."""
        data = asdict(self)
        del data["problems"]
        return {"version": data.pop("version"), **data}

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "EngineReport | None":
        """Read a report, of other releases and hands too: what is absent is None, unknown parts are left out, and
        parts that are not as this release writes them are, with the reason in `problems`. None where it is no report.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return None
        return cls.from_dict(data) if isinstance(data, dict) else None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EngineReport":
        """As `from_json`, of what JSON holds."""
        report, problems = cls(version=None), []
        if not data:
            problems.append("it is empty")
        kinds = typing.get_type_hints(cls)
        for item in fields(cls):
            if data.get(item.name) is None or item.name == "problems":
                continue
            try:
                value = read_value(kinds[item.name], data[item.name])
                _check_numbers(item.name, value)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                problems.append(f"{item.name}: {error}")
            else:
                setattr(report, item.name, value)
        report.problems = tuple(problems)
        return report


def read_report(engine: Path) -> EngineReport | None:
    """The report of an engine; None where there is none. Raises DeployError where the file is damaged."""
    with EngineFile(engine) as file:
        return report_of(file)


def report_of(file: EngineFile) -> EngineReport | None:
    """The report of an open engine file; None where there is none. Raises DeployError where the member is damaged."""
    return EngineReport.from_json(file.read(REPORT)) if REPORT in file.manifest.members else None


def sizes_of(latency_ms: Mapping[str, float | None]) -> dict[Size, float | None]:
    """(height, width) → milliseconds, of "HxW" → milliseconds. Raises ValueError for what is neither."""
    found: dict[Size, float | None] = {}
    for size, ms in latency_ms.items():
        height, width = (int(side) for side in size.split("x"))
        if height < 1 or width < 1 or not (ms is None or 0 < ms < math.inf):
            raise ValueError(f"latency {ms!r} at {size!r}")
        found[height, width] = ms
    return found


def _check_numbers(name: str, value: Any) -> None:
    """Refuse numbers that nothing can be drawn from. Raises ValueError."""
    if name.endswith("latency_ms"):
        sizes_of(value)
    if name == "speedup" and not 0 < value < math.inf:
        raise ValueError(f"{value} is no factor")

"""A TensorRT plan in the precision that serves a network best: all are built that the accuracy gate lets through.

A GPU that runs them tells which is fastest. Without one the builder's own list of layers decides: what takes INT8 or
FP8 and gives float is set aside, since layers of their own lie between its convolutions; of the others the plan of
the least memory is kept, and of those that take as much, that with the fewest layers that give float.
"""

import logging
import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from fcn_deploy.calibration.report.engine_report import EngineReport, PlanCandidate, PlanReport
from fcn_deploy.export.build.autotune import Candidate, choose, measure
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.build.low_precision import lowered, tell
from fcn_deploy.export.build.targets.job import BuildJob
from fcn_deploy.export.build.targets.tensorrt import builder
from fcn_deploy.export.build.targets.tensorrt.layers import advice, convolutions_by_type, gives_float
from fcn_deploy.export.build.targets.tensorrt.plan import check_builder
from fcn_deploy.export.quantization.mixed_precision import BEYOND_FLOAT16, BudgetError
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.export.quantization.quantize import SCHEMES
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.latency import timed_sizes
from fcn_deploy.runtime.pixels.noise_image import natural_noise

log = logging.getLogger(__name__)

ORDER = ("float16", "bf16", "int8", "fp8", "float32")  # of equals the first is kept
AS_MUCH = 1.05  # times the least memory


@dataclass
class Trial:
    """A precision that was tried.

    Attributes:
        precision: the lowest in the plan.
        report: of an engine of it.
        draft: that engine; None where there is none.
        refused: why it cannot be chosen; "" where it can.
        overflows: whether layers of it are beyond float16's range.
        milliseconds: "HxW" → of a call, measured beside the others.
    """

    precision: str
    report: EngineReport
    draft: Draft | None = None
    refused: str = ""
    overflows: bool = False
    milliseconds: dict[str, float | None] = field(default_factory=dict)

    @property
    def plan(self) -> PlanReport:
        assert self.report.builder is not None
        return self.report.builder

    @property
    def memory(self) -> float:
        """Bytes of activations of the profile that takes most; infinite where TensorRT does not tell."""
        return max(math.inf if p.activation_bytes is None else p.activation_bytes for p in self.plan.profiles)

    @property
    def float_layers(self) -> int:
        return sum(map(gives_float, self.plan.layers))


def build(job: BuildJob, report: EngineReport) -> Draft:
    """The plan that is kept. Raises DeployError where none can be built, and as a build in one precision does."""
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder:
        ranges = job.config.quantization.ranges or Path(folder) / "ranges.json"  # INT8 and FP8 have the same
        trials: list[Trial] = []
        for precision in ORDER:
            if precision != "bf16" or trials[0].overflows:
                trials.append(_tried(job, replace(report, precision=precision), ranges))
    built = [trial for trial in trials if trial.draft is not None]
    if not built:
        raise DeployError("; ".join(f"{trial.precision}: {trial.refused}" for trial in trials))
    chosen, reason = _measured(job, built) or by_layers(built)
    for note in chosen.report.notes[len(report.notes) :]:
        log.warning(note)
    for item in fields(report):
        setattr(report, item.name, getattr(chosen.report, item.name))
    report.plans = tuple(_candidate(trial, trial is chosen) for trial in trials)
    report.plans_reason = reason
    assert chosen.draft is not None
    return chosen.draft


def _tried(job: BuildJob, report: EngineReport, ranges: Path) -> Trial:
    """A plan in the precision that a report is of, or why there is none."""
    assert report.precision is not None
    trial = Trial(report.precision, report)
    say = lambda line: job.say(f"{trial.precision}: {line}")  # noqa: E731
    try:
        config = _config(job, trial.precision, ranges)
        check_builder(config.tensorrt_options, config.gpu_types)
    except DeployError as error:  # a type that the GPUs, or the network, do not have
        trial.refused = str(error)
        return trial
    mixed = None
    try:
        if trial.precision != "float32":
            mixed = lowered(job.core, job.float_core, config, say)
            tell(report, mixed)
            trial.overflows = BEYOND_FLOAT16 in mixed.accuracy.kept.values()
        trial.draft = builder.build(replace(job, mixed=mixed, config=config, say=say), report)
    except BudgetError as error:
        trial.refused = str(error)
        trial.overflows = any(layer.kept == BEYOND_FLOAT16 for layer in error.layers)
    except MisuseError:
        raise
    except DeployError as error:
        if mixed is None and trial.precision != "float32":
            raise  # of the images or the labels, not of the precision
        trial.refused = str(error)
    return trial


def _config(job: BuildJob, precision: str, ranges: Path) -> BuildConfig:
    """The build in one precision. Raises MisuseError where the targets or the network have none of it."""
    given, quantized = job.config.quantization, precision in ("int8", "fp8")
    if precision == "fp8" and not SCHEMES["tensorrt-fp8"].quantized(job.float_core):
        raise MisuseError("the network has no convolution for FP8")
    options = QuantizationOptions()
    if precision != "float32":
        options = replace(
            given,
            fastest=False,
            int8=precision == "int8",
            fp8=precision == "fp8",
            fp16=precision != "bf16",
            bf16=precision == "bf16",
            method=given.method if precision == "int8" else options.method,
            ranges=ranges if quantized else None,
        )
    return replace(job.config, quantization=options, rank_layers=False)


def _measured(job: BuildJob, built: Sequence[Trial]) -> tuple[Trial, str] | None:
    """The fastest on this machine's GPU, and the reason; None where no GPU runs them."""
    first = built[0].draft  # all have the same profiles
    assert first is not None
    with ExitStack() as stack:
        calls, trials, refused = {}, {}, {}
        for trial in built:
            assert trial.draft is not None
            try:
                net = stack.enter_context(trial.draft.opened())
            except DeployError as error:
                refused[trial.precision] = f"it does not run here: {error}"
                continue
            candidate = Candidate(trial.plan.module, trial.precision)
            calls[candidate], trials[candidate] = net.result, trial
        if not calls:
            return None
        sizes = job.config.latency_sizes or timed_sizes(first.manifest)
        images = {f"{height}x{width}": natural_noise(height, width, job.core.card, 0) for height, width in sizes}
        job.say(f"timing {len(calls)} precisions")
        timings = measure(calls, images)
    for trial in built:
        trial.refused = refused.get(trial.precision, "")
    for candidate, timing in timings.items():
        trials[candidate].milliseconds = timing.milliseconds
    return trials[choose(timings)], "measured fastest on this machine's GPU"


def by_layers(built: Sequence[Trial]) -> tuple[Trial, str]:
    """The plan to keep by what the builder lists, and the reason."""
    for trial in built:
        trial.refused = advice(trial.plan.layers, trial.precision)
    held = [trial for trial in built if not trial.refused] or list(built)
    least = min(trial.memory for trial in held)
    near = [trial for trial in held if trial.memory <= AS_MUCH * least]
    chosen = min(near, key=lambda trial: (trial.float_layers, len(trial.plan.layers)))
    chosen.refused = ""
    reason = "least memory of activations" if len(near) == 1 else "fewest layers that give float, of the least memory"
    return chosen, f"{reason}, by the builder's list: no GPU here measured it"


def _candidate(trial: Trial, chosen: bool) -> PlanCandidate:
    if trial.draft is None:
        return PlanCandidate(trial.precision, refused=trial.refused)
    accuracy, layers = trial.report.accuracy, trial.plan.layers
    return PlanCandidate(
        precision=trial.precision,
        layers=len(layers) or None,
        float_layers=trial.float_layers if layers else None,
        convolutions=convolutions_by_type(layers),
        activation_bytes=None if trial.memory == math.inf else int(trial.memory),
        plan_bytes=trial.draft.core_bytes,
        accuracy=None if accuracy is None else accuracy.value,
        drop_points=None if accuracy is None else accuracy.drop_points,
        latency_ms=trial.milliseconds,
        refused=trial.refused or None,
        chosen=chosen,
    )

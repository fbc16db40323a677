"""What every target's builder is given, and gives: `build(job, report) → Draft`."""

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from fcn_deploy.calibration.report.engine_report import EngineReport
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.core import Core
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.importer.import_model import ImportedModel
from fcn_deploy.export.quantization.mixed_precision import MixedPrecision
from fcn_deploy.export.quantization.options import Say
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.golden_sample import GOLDEN, golden_difference
from fcn_deploy.runtime.latency import latency, timed_sizes
from onnx import ModelProto

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildJob:
    """An engine to build for a target: everything up to the core in the precision that was asked for.

    Attributes:
        model: the imported model that the engine is built from.
        core: of the model.
        float_core: the core, optimised offline.
        float_draft: an engine of the float core for CPUs, whose results were compared with the model's.
        mixed: the core in low precision; None: float32.
        config: what was asked for.
        say: called with a line when a phase begins.
    """

    model: ImportedModel
    core: Core
    float_core: ModelProto
    float_draft: Draft
    mixed: MixedPrecision | None
    config: BuildConfig
    say: Say

    @property
    def precision(self) -> str:
        """The lowest in the engine; float32 too where low precision was given up."""
        own = self.float_draft.manifest.precision
        return own if self.mixed is None else self.config.quantization.precision

    @property
    def lowest_core(self) -> ModelProto:
        """The core that the engine holds: quantized, or float."""
        return self.float_core if self.mixed is None else self.mixed.core

    @property
    def as_written(self) -> ModelProto:
        """A float32 graph of the engine's arithmetic, whose golden sample is the engine's."""
        return self.core.model if self.mixed is None else self.mixed.emulated


class TargetBuilder(Protocol):
    """Builds an engine for one kind of target, and adds what it measured to the report."""

    def __call__(self, job: BuildJob, report: EngineReport) -> Draft: ...


def measure_on_gpu(job: BuildJob, draft: Draft, report: EngineReport) -> None:
    """Latency on this machine's GPU, or why there is none.

    Raises:
        DeployError: the GPU runs it, and does not give the scores of its golden sample.
    """
    with ExitStack() as stack:
        try:
            net = stack.enter_context(draft.opened())
        except DeployError as error:
            log.info("not measured: %s", error)
            report.latency_reason = "no GPU here runs it: run verify-engine on the GPU's machine"
            return
        golden = golden_difference(net, draft.members[GOLDEN])
        if not golden.passed:
            wrong = [
                f"{height}×{width}"
                for (height, width), apart in golden.by_size.items()
                if apart is not None and not apart <= golden.tolerance
            ]
            raise DeployError(
                f"on this GPU its golden sample differs by {golden.difference:.1%} of the scores' range, at "
                f"{', '.join(wrong)}, where {golden.tolerance:.1%} is allowed; build it in another precision, and "
                "please report this with the GPU and the driver"
            )
        job.say(f"timing {job.precision}")
        report.latency_ms = latency(net, job.config.latency_sizes or timed_sizes(draft.manifest))

"""Engines that ONNX Runtime runs on GPUs: the core as it is, without a plan."""

from dataclasses import replace

from fcn_deploy.calibration.report.engine_report import EngineReport
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.build.golden import golden_sample
from fcn_deploy.export.build.targets.job import BuildJob, measure_on_gpu
from fcn_deploy.runtime.golden_sample import GOLDEN


def build(job: BuildJob, report: EngineReport) -> Draft:
    """The core in one stage, measured where a GPU is at hand."""
    manifest = replace(job.float_draft.manifest, target=job.config.target, precision=job.precision)
    members = {
        manifest.stages[0].file: job.lowest_core.SerializeToString(),
        GOLDEN: golden_sample([job.as_written], manifest.card, job.precision),
    }
    draft = Draft(manifest, members)
    report.core_bytes = {job.precision: draft.core_bytes}
    measure_on_gpu(job, draft, report)
    return draft

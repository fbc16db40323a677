"""Engines for NVIDIA GPUs: profiles planned, a plan built by TensorRT, kernels compiled."""

from dataclasses import replace

import numpy as np
from fcn_deploy.calibration.report.engine_report import EngineReport, PlanReport
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.build.golden import golden_sample
from fcn_deploy.export.build.report_parts import profile_reports
from fcn_deploy.export.build.targets.job import BuildJob, measure_on_gpu
from fcn_deploy.export.build.targets.tensorrt.kernels import compile_kernels
from fcn_deploy.export.build.targets.tensorrt.layers import advice
from fcn_deploy.export.build.targets.tensorrt.plan import activation_cost, build_plan
from fcn_deploy.export.build.targets.tensorrt.process import WIDENED, BuiltPlan
from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile, default_profiles, plan_profiles
from fcn_deploy.export.graph.edit import attributes, initializers, label
from fcn_deploy.runtime.backends.tensorrt.device import platform_name
from fcn_deploy.runtime.engine_format.manifest import GpuPlan, Profile
from fcn_deploy.runtime.golden_sample import GOLDEN
from fcn_deploy.runtime.stream import BATCH_PIXELS, TOGETHER
from onnx import ModelProto

PLAN_FILE = "stage-0.plan"
# Of nearest neighbours by a power of two these read the same cells, however positions are computed and rounded.
_SURE = {("asymmetric", "floor")} | {
    (centres, rounding)
    for centres in ("half_pixel", "pytorch_half_pixel")
    for rounding in ("round_prefer_floor", "round_prefer_ceil")
}


def build(job: BuildJob, report: EngineReport) -> Draft:
    """A plan with our kernels, measured where its GPU is at hand. Raises as `build_plan` and `compile_kernels`."""
    options = job.config.tensorrt_options
    profiles = _profiles(job)
    job.say(f"building for {', '.join(options.targets)} with TensorRT")
    built = build_plan(job.lowest_core, options, profiles, job.say)
    job.say("compiling the kernels")
    kernels = compile_kernels(built.targets)
    report.builder = _plan_report(job, built, profiles)
    before = job.float_draft.manifest
    manifest = replace(
        before,
        target=job.config.target,
        precision=job.precision,
        stages=(replace(before.stages[0], file=PLAN_FILE),),
        gpu=GpuPlan(
            built.module,
            built.version,
            built.targets,
            tuple(
                Profile(profile.min, profile.opt, profile.max, profile.batch, size)
                for profile, size in zip(profiles, built.activation_bytes, strict=True)
            ),
            portable=options.hardware != "none",
            version_compatible=options.version_compatible,
            # Of TensorRT for RTX the processor is what matters, which is that of the builder.
            platform=options.builds_for if built.module == "tensorrt" else platform_name(),
        ),
    )
    golden = golden_sample([job.as_written], manifest.card, job.precision, manifest.gpu)
    draft = Draft(manifest, {PLAN_FILE: built.plan, **kernels, GOLDEN: golden})
    report.core_bytes = {job.precision: draft.core_bytes}
    measure_on_gpu(job, draft, report)
    return draft


def _profiles(job: BuildJob) -> list[PlannedProfile]:
    """The profiles for the sizes that will come, within the budget of memory where one was given."""
    config, options, batch = job.config, job.config.tensorrt_options, job.config.largest_batch
    if config.batch is None and options.workspace is None:
        return [_with_room_for_small_images(profile) for profile in _within(job, batch)]
    return _within(job, batch)


def _with_room_for_small_images(profile: PlannedProfile) -> PlannedProfile:
    """A profile of images that streams run together takes as many of them at once: it is small."""
    small = profile.max[0] * profile.max[1] <= BATCH_PIXELS
    return replace(profile, batch=max(profile.batch, TOGETHER)) if small else profile


def _within(job: BuildJob, batch: int) -> list[PlannedProfile]:
    """The profiles for batches of one size, within the budget of memory."""
    config, card, options = job.config, job.core.card, job.config.tensorrt_options
    if config.sizes is None:
        return default_profiles(card, batch)
    if options.workspace is not None and not config.sizes.ranges:
        job.say("asking TensorRT for activation memory")
        cost = activation_cost(job.lowest_core, options, card, job.say)
        if cost is not None:
            return plan_profiles(config.sizes, card, config.profiles, options.workspace, cost, batch)
    return plan_profiles(config.sizes, card, config.profiles, batch=batch)


def _plan_report(job: BuildJob, built: BuiltPlan, profiles: list[PlannedProfile]) -> PlanReport:
    skipped = job.config.sizes.skipped.values() if job.config.sizes is not None else ()
    notes = (
        advice(built.layers, job.precision),
        shared_with_sm75(built, job.lowest_core),
        unseen_resize(job.lowest_core),
    )
    said = [note for note in notes if note]
    return PlanReport(
        module=built.module,
        version=built.version,
        targets=built.targets,
        seconds=built.seconds,
        profiles=profile_reports(profiles, built.activation_bytes),
        notes=(*built.notes, *said, *(f"skipped: {reason}" for reason in skipped)),
        layers=built.layers,
    )


def shared_with_sm75(built: BuiltPlan, core: ModelProto) -> str:
    """What to say of a plan whose depthwise convolutions are widened for sm75 on the other GPUs too; "" of another."""
    held = initializers(core)
    depthwise = any(
        node.op_type == "Conv"
        and attributes(node).get("group", 1) > 1
        and node.input[1] in held
        and held[node.input[1]].shape[1] == 1
        for node in core.graph.node
    )
    if not depthwise or built.module != "tensorrt_rtx" or WIDENED not in built.targets or len(built.targets) == 1:
        return ""
    return (
        f"in a plan with {WIDENED} every GPU multiplies eight times as much in depthwise convolutions; an engine for "
        f"{WIDENED} of its own spares the others that"
    )


def unseen_resize(core: ModelProto) -> str:
    """What to say of nearest neighbours whose cells a rounded position decides; "" where there are none."""
    held = initializers(core)
    for node in core.graph.node:
        given = attributes(node)
        if node.op_type != "Resize" or given.get("mode", "nearest") != "nearest":
            continue
        scales = held.get(node.input[2]) if len(node.input) > 2 else None
        centres = given.get("coordinate_transformation_mode", "half_pixel")
        sure = (centres, given.get("nearest_mode", "round_prefer_floor")) in _SURE
        if not sure or scales is None or not scales.size or np.any(np.log2(scales) % 1) or np.any(scales < 1):
            return (
                f"{label(node)} takes nearest neighbours whose places a rounding decides: which cells TensorRT takes "
                "has been seen on no GPU yet; verify-engine tells on yours, at an odd size of each profile too"
            )
    return ""

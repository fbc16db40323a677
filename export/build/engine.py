"""build-engine: from an imported model to an engine file, measured on the machine that builds it."""

import logging
import os
import platform
from dataclasses import replace
from importlib.metadata import version

from fcn_deploy.calibration.report.engine_report import REPORT, EngineReport
from fcn_deploy.export.analysis.branches import first_branching
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.core import Core, core_of, optimise_offline
from fcn_deploy.export.build.cut_passes import NO_PASSES, CutPasses, cut_passes
from fcn_deploy.export.build.cut_stages import cut_core, members_of
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.build.golden import golden_sample
from fcn_deploy.export.build.joined_heads import core_of_heads
from fcn_deploy.export.build.low_precision import mixed_as_asked
from fcn_deploy.export.build.openvino_differences import keeps_aspect_ratio, without_openvino_where_it_differs
from fcn_deploy.export.build.parity import compare_each
from fcn_deploy.export.build.report_parts import ONE_PER_CORE, stage_reports
from fcn_deploy.export.build.targets import cpu, onnxruntime_gpu
from fcn_deploy.export.build.targets.job import BuildJob, TargetBuilder
from fcn_deploy.export.build.targets.tensorrt import builder, fastest_plan
from fcn_deploy.export.build.targets.tensorrt.plan import check_builder
from fcn_deploy.export.graph.edit import check, label
from fcn_deploy.export.importer.import_model import ImportedModel
from fcn_deploy.export.passes.mean_in_steps import sums_at_once
from fcn_deploy.export.quantization.mixed_precision import write_precision_report
from fcn_deploy.export.quantization.options import Say
from fcn_deploy.runtime.backends.onnxruntime import physical_cores
from fcn_deploy.runtime.engine_format.engine_file import write_engine
from fcn_deploy.runtime.engine_format.manifest import Manifest
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.golden_sample import GOLDEN
from onnx import ModelProto

log = logging.getLogger(__name__)


def build_engine(
    model: ImportedModel,
    out: str | os.PathLike,
    config: BuildConfig | None = None,
    say: Say = lambda line: None,
) -> EngineReport:
    """Build an engine and return its report, which is in the file too.

    Args:
        model: as imported.
        out: the .engine file, replaced in one step.
        config: for what, and how; None: float32 for CPUs.
        say: called with a line when a phase begins.

    Raises:
        MisuseError: options that the model does not go with, or that this TensorRT does not have.
        DeployError: the model cannot be run, the engine's results are not the model's, the accuracy budget
            cannot be held, or TensorRT cannot build.
    """
    config = config or BuildConfig()
    options = config.quantization
    if model.quantised and (options.int8 or (options.bf16 and config.on_cpu)):
        given = "--bf16" if options.bf16 else "--fastest" if options.fastest else "--int8"
        raise MisuseError(
            f"the model is quantised already, by node {model.quantised}, and is built as it is, INT8; omit {given}, or "
            "start from the float32 model"
        )
    if config.on_cpu and options.bf16:
        cpu.check_bfloat16()
    if config.on_tensorrt:
        say("looking for TensorRT")
        check_builder(config.tensorrt_options, config.gpu_types)
    core = core_of_heads(model) if model.further else core_of(model)
    _check_for_tensorrt(core.model, config)
    config = without_openvino_where_it_differs(core.model, config, say)
    float_core = optimise_offline(core.model)
    own = "int8" if model.quantised else "float32"  # what the model is of, before anything is made of it
    float_draft, passes = _float_draft(core, float_core, config, own, say)
    core = replace(core, card=float_draft.manifest.card)
    report = _first_report(model, core, float_draft.manifest, config)
    report.passes = passes.reason or None
    if config.on_cpu and (lost := sums_at_once(core.model)):
        remedy = "; images beyond the memory budget are run in passes, summed in float64"
        report.notes = (*report.notes, lost + (remedy if passes.pooled is not None else ""))
        log.warning(report.notes[-1])
    say("comparing the float32 core with the model")
    # What is measured is a file, opened as a user opens it.
    with float_draft.opened(config.threads) as net:
        report.agreement, *further = compare_each(model, net)
        report.further_agreements = dict(zip((each.output for each in model.further), further, strict=True))
    mixed = None if config.fastest_plan else mixed_as_asked(core, float_core, config, report, say)
    job = BuildJob(model, core, float_core, float_draft, mixed, config, say)
    check(job.lowest_core, "the quantized core")
    engine = _builder(config)(job, report)
    report.core_bytes = {own: len(float_core.SerializeToString())} | (report.core_bytes or {})
    write_engine(out, engine.manifest, {**engine.members, REPORT: report.to_json().encode()})
    if config.precision_report is not None and mixed is not None:
        write_precision_report(config.precision_report, mixed.layers)
    return report


def _check_for_tensorrt(core: ModelProto, config: BuildConfig) -> None:
    """Raises DeployError where TensorRT is to run a Resize that keeps the aspect ratio, or branches."""
    if config.on_tensorrt and (chooses := first_branching(core)) is not None:
        raise DeployError(
            f"node {label(chooses)} chooses a branch by the image's size, and plans are built without branches; use "
            "--target cpu or ort-cuda, or export the model traced"
        )
    if config.on_tensorrt and (kept := keeps_aspect_ratio(core)) is not None:
        raise DeployError(
            f"node {label(kept.node)} {kept.asks}, which TensorRT refuses; {kept.instead}, or use --target cpu"
        )


def _builder(config: BuildConfig) -> TargetBuilder:
    if config.on_cpu:
        return cpu.build
    if config.on_ort_gpu:
        return onnxruntime_gpu.build
    return fastest_plan.build if config.fastest_plan else builder.build


def _float_draft(
    core: Core, float_core: ModelProto, config: BuildConfig, precision: str, say: Say
) -> tuple[Draft, CutPasses]:
    """The core in the precision that the model has as an engine for CPUs, and how it is tiled where it pools."""
    # GPUs have memory of their own, and a plan is one network.
    parts = cut_core(float_core, core.card, config.stages)
    whole = next((part.stage.whole for part in parts if part.stage.halo is None), core.card.whole)
    card, passes = replace(core.card, whole=whole), NO_PASSES
    if whole and config.on_cpu:
        say("looking for tiles of a network that pools over the whole image")
        passes = cut_passes(float_core, core.card)
    manifest = Manifest(
        card=card,
        target="cpu",
        precision=precision,
        upsampling=core.upsampling,
        stages=tuple(part.stage for part in parts),
        created_by=f"fcn-deploy {version('fcn-deploy')}",
        heads=core.heads,
        pooled=passes.pooled,
    )
    golden = {GOLDEN: golden_sample([core.model], card, precision)}
    return Draft(manifest, members_of(parts) | passes.members | golden), passes


def _first_report(model: ImportedModel, core: Core, manifest: Manifest, config: BuildConfig) -> EngineReport:
    """What is known before anything is measured."""
    return EngineReport(
        target=config.target,
        precision=manifest.precision if model.quantised else config.quantization.precision,
        head=core.upsampling.mode,
        stride=core.card.stride,
        size_multiple=core.card.size_multiple,
        smallest=core.card.smallest,
        fit=model.fit or "none",
        stages=stage_reports(manifest.stages),
        miou_reason="no labels were given",
        threads=config.threads or ONE_PER_CORE,
        machine=f"{platform.machine()}, {physical_cores()} cores",
        notes=tuple(model.notes),
    )

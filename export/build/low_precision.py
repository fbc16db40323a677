"""The core in the low precision that a build asks for, and what its report tells of that."""

import logging

from fcn_deploy.calibration.report.engine_report import EngineReport
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.core import Core
from fcn_deploy.export.passes.fuse_padding import fuse_padding
from fcn_deploy.export.passes.pooling_as_convolution import pooling_as_convolution
from fcn_deploy.export.quantization.mixed_precision import (
    BudgetError,
    MixedPrecision,
    mix_precision,
    to_be_judged,
    write_precision_report,
)
from fcn_deploy.export.quantization.options import GOLDEN_ALONE, Say
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto

log = logging.getLogger(__name__)

NOT_SEEN = "FP16: what overflows was looked for in the golden sample alone, and no photograph was judged; pass --calib"


def lowered(core: Core, float_core: ModelProto, config: BuildConfig, say: Say) -> MixedPrecision:
    """The core in the low precision that is asked for. Raises BudgetError where that cannot be held."""
    if config.on_cpu and config.quantization.bf16:
        return to_be_judged(float_core, core.upsampling, core.card, config.quantization, core.heads)
    return mix_precision(
        float_core,
        core.upsampling,
        core.card,
        "cpu" if config.on_cpu else "tensorrt",
        config.quantization,
        half_interface=config.on_tensorrt,
        rank=config.rank_layers or config.precision_report is not None,
        heads=core.heads,
        say=say,
    )


def mixed_as_asked(
    core: Core, float_core: ModelProto, config: BuildConfig, report: EngineReport, say: Say
) -> MixedPrecision | None:
    """The core in low precision, which the report tells of; None: float32, as asked for or as nothing else holds."""
    options = config.quantization
    if options.precision == "float32":
        return None
    if options.int8 and config.on_cpu:
        float_core = fuse_padding(pooling_as_convolution(float_core).model).model
    try:
        mixed = lowered(core, float_core, config, say)
    except BudgetError as error:
        if config.precision_report is not None:
            write_precision_report(config.precision_report, error.layers)
        if options.fastest:
            report.notes = (*report.notes, f"float32 is kept: {error}")
            report.precision = "float32"
            return None
        ranked = f"; {config.precision_report} ranks the layers" if config.precision_report is not None else ""
        raise DeployError(f"{error}{ranked}") from error
    if options.calib == GOLDEN_ALONE:
        log.warning(NOT_SEEN)
        report.notes = (*report.notes, NOT_SEEN)
    for note in mixed.notes:
        log.warning(note)
    tell(report, mixed)
    return mixed


def tell(report: EngineReport, mixed: MixedPrecision) -> None:
    """Add to a report what low precision cost."""
    report.accuracy = mixed.accuracy
    report.notes = (*report.notes, *mixed.notes)
    if any(layer.sensitivity is not None for layer in mixed.layers):
        report.layers = tuple(mixed.layers)
    if mixed.accuracy.metric == "mIoU":
        report.miou, report.miou_reason = mixed.accuracy.value, None

"""What build-engine tells of the engine it has built, as text."""

import math
from collections.abc import Sequence
from pathlib import Path

from fcn_deploy.calibration.report.engine_report import Accuracy, Agreement, EngineReport, StageReport
from fcn_deploy.export.build.autotune import NOISE
from fcn_deploy.export.build.report_parts import show_candidates, show_plans, show_profiles
from fcn_deploy.export.build.targets.tensorrt.layers import summary
from fcn_deploy.runtime.command import print_note
from fcn_deploy.runtime.latency import latency_rows, show_latency

SHOWN = 6  # classes
# Of a plan in float32, which nobody has chosen among others.
FP16_ADVISED = (
    "a plan in float32: --fp16, with --calib or --sizes FOLDER, builds one of half the activation memory, which uses "
    "tensor cores"
)
LITTLE = 1.2  # times as fast as float32


def show_build(model: Path, out: Path, report: EngineReport) -> None:
    """Print what was built and measured."""
    print(f"{model} → {out} ({out.stat().st_size / 1e6:.1f} MB) for {report.target}, {report.precision}")
    upsampling = "in the network" if report.head == "none" else "exact, outside the network"
    least = f", at least {report.smallest}" if report.smallest and report.smallest > 1 else ""
    print(
        f"upsampling: {upsampling}; scores at stride {report.stride}, sizes padded to multiples of "
        f"{report.size_multiple}{least}"
    )
    print(_tiles(report.stages, report.fine))
    if report.passes:
        print(f"where that does not suffice: {report.passes}")
    if report.agreement is not None:
        print(_agreement(report.agreement, report.accuracy is not None or report.precision == "float16", report.fit))
    for name, agreement in report.further_agreements.items():
        print(f"output {name}: {_agreement(agreement, False, report.fit)}")
    if report.accuracy is not None:
        print(_accuracy(report.accuracy, report.core_bytes or {}))
    if report.plans:
        print("plans in every precision (float: layers that give 16 bits or more of floating point):")
        print(show_plans(report.plans))
        print(f"{report.precision} is kept: {report.plans_reason}")
    if plan := report.builder:
        print(f"plan for {', '.join(plan.targets)} by {plan.module} {plan.version} in {plan.seconds:.1f} s; profiles:")
        print(show_profiles(plan.profiles))
        if plan.layers:
            print(summary(plan.layers))
        for note in plan.notes:
            print_note(note)
    _show_speed(report)
    if advice := low_precision_advice(report):
        print(advice)


def _show_speed(report: EngineReport) -> None:
    if report.latency_ms is None:
        print(f"latency: not measured ({report.latency_reason})")
        return
    if report.accuracy is not None and report.target == "cpu":
        print(_speedup(report))
    print("latency on this machine (median):")
    print(show_latency(latency_rows(report.latency_ms)))
    if len(report.candidates) > 1:
        print(f"run by {report.backend}; measured side by side (×: best time of a call over its best):")
        print(show_candidates(report.candidates))


def _tiles(stages: Sequence[StageReport], fine: Sequence[StageReport]) -> str:
    """How images beyond the memory budget are run."""
    if len(stages) == 1 and stages[0].halo is None:
        return f"it cannot be run in tiles ({stages[0].tiles.removeprefix('none: ')})"
    further = f"; where that is less work by {_halos(fine)}" if fine else ""
    return f"images beyond the memory budget are run in tiles, exactly: {_halos(stages)}{further}"


def _halos(stages: Sequence[StageReport]) -> str:
    halos = [
        f"{max(stage.halo)} pixels" if stage.halo is not None else f"whole ({stage.tiles.removeprefix('none: ')})"
        for stage in stages
    ]
    if len(stages) == 1:
        return f"one stage, halo {halos[0]}"
    if len(stages) > 2 and all(stage.halo is not None for stage in stages):
        return f"{len(stages)} stages, halos {', '.join(str(max(stage.halo or (0,))) for stage in stages)} pixels"
    return f"{len(stages)} stages, halos {' and '.join(halos)}"


def _agreement(agreement: Agreement, lowered: bool, fit: str | None) -> str:
    """How far the labels, masks or values of the core, before it was `lowered`, are the model's own."""
    whose = f"float32 {agreement.kind}" if lowered else agreement.kind
    # What is compared with is the model as it is delivered, which export-onnx writes.
    fitted = {"pad": ", images padded,", "resize": ", images resized,"}.get(fit or "", "")
    where = f"the model's{fitted} at {len(agreement.sizes)} sizes"
    if agreement.labels_equal is None:
        return f"{whose} differ from {where} by {agreement.difference:.1e} of their range at most"
    rest = "" if agreement.labels_equal == 1 else "; the others are within rounding of a tie"
    return f"{whose} equal to {where}: {agreement.labels_equal:.4%} of {agreement.pixels:,} pixels{rest}"


def _accuracy(accuracy: Accuracy, core_bytes: dict[str, int]) -> str:
    """What precision cost, in a few lines."""
    precision = accuracy.precision
    saw = " calibration did not see" if accuracy.judged_unseen else " calibration SAW TOO, as there were no others"
    saw = saw if accuracy.calibration_images else ""
    before, after = core_bytes["float32"], core_bytes[precision]
    lines = [
        f"{precision}: {accuracy.metric} {accuracy.value:.4f} against {accuracy.float32:.4f} of float32 on "
        f"{_count(accuracy.images_judged, 'image')}{saw} ({accuracy.drop_points:.2f} points lost, "
        f"{accuracy.max_drop} allowed)",
    ]
    if accuracy.calibration_images:
        lines.append(
            f"calibrated on {_count(accuracy.calibration_images, 'image')}; {before / 1e6:.1f} → {after / 1e6:.1f} MB; "
            f"{len(accuracy.kept)} of {accuracy.layers} layers kept higher"
        )
    if accuracy.class_drops:
        worst = list(accuracy.class_drops.items())[:SHOWN]
        named = ", ".join(f"{name} {lost:.1f}" for name, lost in worst)
        more = len(accuracy.class_drops) - len(worst)
        whom = "the labels" if accuracy.metric == "mIoU" else "float32"
        lines.append(f"classes that lose points of IoU against {whom}: {named}{f' and {more} more' if more else ''}")
    lines += [f"  kept: {name} ({reason})" for name, reason in accuracy.kept.items()]
    if accuracy.skipped:
        lines.append(f"{_count(len(accuracy.skipped), 'image')} could not be read, skipped")
    return "\n".join(lines)


def _speedup(report: EngineReport) -> str:
    """How fast low precision is; where it is slower, the last line tells."""
    speedup, low = report.speedup, "int8" if report.accuracy is None else report.accuracy.precision
    if speedup is None:
        return "speed against float32: not measured"
    if speedup < 1:
        return f"{low} takes {1 / speedup:.2f} times the time of float32 here (mean over the sizes)"
    return f"{low} is {speedup:.2f} times faster than float32 here (mean over the sizes)"


def low_precision_advice(report: EngineReport) -> str:
    """What to do instead where low precision wins nothing, or which was kept, and why; "": it is worth it."""
    speedup = math.nan if report.speedup is None else report.speedup
    slower = speedup < 1
    if report.precision == "float32":
        given_up = next((note for note in report.notes if note.startswith("float32 is kept")), "")
        if slower:
            return "float32 is kept, as it is the faster of the two here"
        return given_up or (FP16_ADVISED if report.builder is not None and not report.plans else "")
    if report.accuracy is None or report.precision not in ("int8", "bf16"):
        return ""
    low, kept, layers = report.precision, len(report.accuracy.kept), report.accuracy.layers
    most = low == "int8" and 2 * kept > layers
    stay = f"{kept} of {layers} layers stay float, as they would lose too much"
    if slower:
        why = f" ({stay})" if most else ""
        or_else = "" if low == "bf16" else ", or take --fastest, which keeps the faster of the two"
        slow = "SLOWER" if speedup * (1 + NOISE) < 1 else "no faster"
        return f"{low} is {slow} than float32 here{why}; omit --{low}{or_else}"
    if most and speedup > LITTLE:
        return f"{stay}; for more, calibrate on more images, or allow more by --max-drop"
    if most:
        return f"{stay}, so int8 wins little; calibrate on more images, allow more by --max-drop, or omit --int8"
    return ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

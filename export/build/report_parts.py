"""What a build measured, as parts of its report, and as text for a terminal."""

from collections.abc import Mapping, Sequence

from fcn_deploy.calibration.report.engine_report import CandidateReport, PlanCandidate, ProfileReport, StageReport
from fcn_deploy.export.build.autotune import Candidate, Timing
from fcn_deploy.export.build.targets.tensorrt.profiles import PlannedProfile
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.sizes import Size

ONE_PER_CORE = "one per core"  # threads, where their number was left open: of physical cores


def stage_reports(stages: Sequence[Stage]) -> tuple[StageReport, ...]:
    """How each stage is run."""
    work = sum(stage.cost for stage in stages)
    return tuple(
        StageReport(
            halo=stage.halo,
            tiles="exact" if stage.halo is not None else f"none: {stage.whole}",
            bytes_per_pixel=round(stage.bytes_per_pixel, 1),
            output_bytes=round(stage.output_bytes, 2),
            work=round(stage.cost / work, 3),
            tile=stage.tile,
            bytes_fixed=stage.bytes_fixed,
            bytes_per_pixel_squared=stage.bytes_per_pixel_squared,
        )
        for stage in stages
    )


def candidate_reports(timings: Mapping[Candidate, Timing], chosen: Candidate) -> tuple[CandidateReport, ...]:
    """What was measured of each candidate, beside the chosen one."""
    scale = timings[chosen].relative_time
    return tuple(
        CandidateReport(
            backend=candidate.backend,
            precision=candidate.precision,
            threads=candidate.threads or ONE_PER_CORE,
            latency_ms=timing.milliseconds,
            against_chosen=round(timing.relative_time / scale, 3)
            if timing.relative_time == timing.relative_time
            else None,
            rounds=tuple(timing.rounds),
            refused=timing.refused or None,
            chosen=candidate == chosen,
        )
        for candidate, timing in timings.items()
    )


def profile_reports(
    profiles: Sequence[PlannedProfile], activation_bytes: Sequence[int | None] | None = None
) -> tuple[ProfileReport, ...]:
    """What each profile is for. `activation_bytes`: of each; None where it is not known."""
    known = activation_bytes or [None] * len(profiles)
    return tuple(
        ProfileReport(
            profile=index,
            min=_spelled(profile.min),
            opt=_spelled(profile.opt),
            max=_spelled(profile.max),
            batch=profile.batch,
            images=profile.images or None,
            mean_log_ratio=round(profile.objective / profile.images, 4) if profile.images else None,
            activation_bytes=size,
        )
        for index, (profile, size) in enumerate(zip(profiles, known, strict=True))
    )


def _spelled(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def show_candidates(candidates: Sequence[CandidateReport]) -> str:
    """A table of what was measured."""
    sizes = list(max(candidates, key=lambda row: len(row.latency_ms)).latency_ms)
    lines = [f"{'backend':>13} {'precision':>9} {'threads':>12}" + "".join(f" {size:>10}" for size in sizes)]
    for row in candidates:
        line = f"{row.backend:>13} {row.precision:>9} {row.threads:>12}"
        if row.refused:
            lines.append(f"{line}  refused: {row.refused}")
            continue
        for size in sizes:
            ms = row.latency_ms.get(size)
            line += f" {'-':>10}" if ms is None else f" {ms:7.1f} ms"
        against = "chosen" if row.chosen else "" if row.against_chosen is None else f"× {row.against_chosen:.2f}"
        lines.append(f"{line}  {against}".rstrip())
    return "\n".join(lines)


def show_plans(plans: Sequence[PlanCandidate]) -> str:
    """A table of the precisions that plans were built in."""
    sizes = list(max(plans, key=lambda row: len(row.latency_ms)).latency_ms)
    lines = [
        f"{'precision':>9} {'layers':>7} {'float':>6} {'memory':>10} {'plan':>10} {'points lost':>12}"
        + "".join(f" {size:>10}" for size in sizes)
    ]
    for row in plans:
        layers = ["-" if count is None else f"{count:,}" for count in (row.layers, row.float_layers)]
        memory = "-" if row.activation_bytes is None else f"{row.activation_bytes / 2**20:,.0f} MiB"
        plan = "-" if row.plan_bytes is None else f"{row.plan_bytes / 1e6:,.1f} MB"
        lost = "-" if row.drop_points is None else f"{row.drop_points:.2f}"
        line = f"{row.precision:>9} {layers[0]:>7} {layers[1]:>6} {memory:>10} {plan:>10} {lost:>12}"
        for size in sizes:
            ms = row.latency_ms.get(size)
            line += f" {'-':>10}" if ms is None else f" {ms:7.1f} ms"
        state = "chosen" if row.chosen else f"refused: {row.refused}" if row.refused else ""
        lines.append(f"{line}  {state}".rstrip())
    return "\n".join(lines)


def show_profiles(profiles: Sequence[ProfileReport]) -> str:
    """A table of TensorRT's profiles."""
    lines = [
        f"{'profile':>7} {'min':>10} {'opt':>10} {'max':>10} {'batch':>5} {'images':>7} {'mean |ln|':>9} {'memory':>10}"
    ]
    for row in profiles:
        images = "-" if row.images is None else f"{row.images:,}"
        ratio = "-" if row.mean_log_ratio is None else f"{row.mean_log_ratio:.3f}"
        memory = "-" if row.activation_bytes is None else f"{row.activation_bytes / 2**20:,.0f} MiB"
        lines.append(
            f"{row.profile:>7} {row.min:>10} {row.opt:>10} {row.max:>10} {row.batch:>5} {images:>7} {ratio:>9} "
            f"{memory:>10}"
        )
    return "\n".join(lines)

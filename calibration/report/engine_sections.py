"""The sections on engines, from the reports that build-engine leaves in them, and latency against size."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from fcn_deploy.calibration.report.accuracy_sections import grouped, legend
from fcn_deploy.calibration.report.charts import Series, line_chart
from fcn_deploy.calibration.report.engine_report import (
    Accuracy,
    Agreement,
    CandidateReport,
    EngineReport,
    LayerPrecision,
    PlanCandidate,
    PlanReport,
    sizes_of,
)
from fcn_deploy.calibration.report.layout import (
    MINUS,
    NONE,
    Bars,
    Block,
    Chart,
    Number,
    Section,
    Table,
    counted,
    in_ms,
    in_points,
    percent,
    ratio,
)
from fcn_deploy.calibration.report.results import Entry
from fcn_deploy.runtime.sizes import Size

LINE_POINTS = 40  # on a line at most
LAYER_ROWS = 20  # of the layers that cost most


def sections_on_engines(entries: Sequence[Entry], notes: list[str]) -> list[Section]:
    """Latency against size, and a section for each engine that has a report; adds to the notes."""
    sections, timed = [], []
    for index, entry in enumerate(entries):
        timed += _latencies(index, entry)
    if sum(len(line.points) for line in timed) > 1:
        sections.append(_latency_section(entries, timed))
    for index, entry in enumerate(entries):
        if entry.report is None:
            continue
        notes += [f"{entry.name}: {line}" for line in _notes(entry.report)]
        sections.append(Section(f"build-{index}", f"How {entry.name} was built", _blocks(entry.report)))
    return sections


def _blocks(report: EngineReport) -> list[Block]:
    """All that a report tells."""
    blocks: list[Block] = [_facts(report), *_gate(report)]
    if report.candidates:
        blocks.append(_candidates(report.candidates))
    if report.plans:
        blocks += [_plans(report.plans), f"{report.precision} is kept: {report.plans_reason}."]
    if report.builder is not None:
        blocks += _plan(report.builder)
    blocks += _layers(report) + _kept(report)
    if report.stages:
        blocks += _tiles(report)
    return blocks


def _notes(report: EngineReport) -> list[str]:
    lines = [*report.notes, *(report.builder.notes if report.builder else ())]
    if report.accuracy is not None:
        lines += [f"skipped in calibration: {reason}" for reason in report.accuracy.skipped.values()]
    for problem in report.problems:
        lines.append(
            f"a part of its report.json is not as this release writes it, and is left out ({problem}); build it again "
            "with build-engine"
        )
    return lines


def _latencies(index: int, entry: Entry) -> list[Series]:
    """Megapixels and milliseconds: as evaluated, and as measured when it was built."""
    lines, report = [], entry.report
    if entry.evaluated is not None:
        results = [result for scale in entry.evaluated.results.values() for result in scale]
        points = []
        for group in grouped(results, LINE_POINTS):
            pixels = float(np.median([r.size[0] * r.size[1] for r in group])) / 1e6
            points.append((pixels, max(float(np.median([r.seconds for r in group])) * 1e3, 1e-3)))
        lines.append(Series(f"{entry.name}, evaluated", tuple(points), index))
    if report is None:
        return lines
    measured = [("when built", report.latency_ms)]
    if entry.evaluated is None and report.precision != "float32":
        measured.append(("its float32", report.float32_latency_ms))
    for place, (said, latency_ms) in enumerate(measured):
        sizes = sizes_of(latency_ms or {})
        if built := tuple(sorted((h * w / 1e6, ms) for (h, w), ms in sizes.items() if ms)):
            lines.append(Series(f"{entry.name}, {said}", built, index + place, entry.evaluated is not None))
    return lines


def _latency_section(entries: Sequence[Entry], timed: Sequence[Series]) -> Section:
    blocks: list[Block] = ["Median time of one call, from image to labels, one image at a time."]
    if any(line.dashed for line in timed):
        blocks.append("Dashed: when the engine was built, on the machine that built it. Solid: in this evaluation.")
    title = "latency against size: " + "; ".join(
        f"{line.name}, {line.points[0][1]:.3g} ms at {line.points[0][0]:.3g} megapixels to {line.points[-1][1]:.3g} ms "
        f"at {line.points[-1][0]:.3g}"
        for line in timed
    )
    chart = Chart(
        line_chart(timed, title, "megapixels", "milliseconds", log=True),
        "Latency against size, both axes logarithmic",
        legend(timed),
    )
    blocks.append(chart)
    columns = [(e.name, sizes_of(e.report.latency_ms)) for e in entries if e.report and e.report.latency_ms]
    if columns:
        blocks.append(_latency_table(columns))
    return Section("latency", "Latency against size", blocks)


def _latency_table(columns: Sequence[tuple[str, dict[Size, float | None]]]) -> Table:
    """Milliseconds when built, by size, of several engines."""
    sizes = sorted({size for _, found in columns for size in found}, key=lambda size: (size[0] * size[1], size))
    rows = []
    for size in sizes:
        row: list[Any] = [f"{size[0]}×{size[1]}"]
        for _, found in columns:
            row.append(Number("not measured") if size not in found else in_ms(found[size], "too large"))
        rows.append(row)
    headers = ["size", *(f"ms, {name}" for name, _ in columns)]
    return Table("When built, on the machine that built it", headers, rows)


def _facts(report: EngineReport) -> Table:
    rows: list[list[str | None]] = [
        ["target", report.target],
        ["precision", report.precision],
        ["run by", report.backend or "as the target says"],
    ]
    if report.head is not None:
        how = "in the network" if report.head == "none" else f"exact, outside the network ({report.head})"
        rows.append(["upsampling", how])
    if report.stride is not None:
        rows.append(["stride, size multiple", f"{report.stride}, {report.size_multiple}"])
    if report.agreement is not None:
        rows.append([f"{report.agreement.kind} against the model’s, float32", _agreement(report.agreement)])
    if report.core_bytes is not None:
        sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in report.core_bytes.items())
        rows.append(["core network", sizes])
    if (speedup := report.speedup) is not None:
        said = f"{speedup:.2f} times faster" if speedup >= 1 else f"{1 / speedup:.2f} times SLOWER"
        low = "int8" if report.accuracy is None else report.accuracy.precision
        rows.append([f"{low} against float32", f"{said}, mean over the sizes"])
    if report.latency_ms is None and report.latency_reason is not None:
        rows.append(["latency", f"not measured: {report.latency_reason}"])
    if report.miou is None and report.miou_reason is not None:
        rows.append(["mIoU", f"not measured: {report.miou_reason}"])
    if report.machine is not None:
        rows.append(["built on", f"{report.machine}; threads: {report.threads}"])
    return Table("The engine", [], [row for row in rows if row[1] is not None], "facts")


def _agreement(agreement: Agreement) -> str:
    where = f"at {len(agreement.sizes)} sizes"
    if agreement.labels_equal is None:
        return f"differ by {agreement.difference:.1e} of their range at most, {where}"
    return (
        f"{agreement.labels_equal:.4%} of {agreement.pixels:,} pixels equal {where}; {agreement.wrong or 0} wrong, "
        f"{agreement.undecided or 0:.2%} within rounding of a tie"
    )


def _gate(report: EngineReport) -> list[Block]:
    if (gate := report.accuracy) is None:
        return []
    seen = "calibration did not see" if gate.judged_unseen else "calibration SAW TOO, as there were no others"
    lost = Number(f"{MINUS if gate.drop_points > 0 else '+'}{abs(gate.drop_points):.2f}")
    rows = [["float32", ratio(gate.float32), Number(NONE)], [gate.precision, ratio(gate.value), lost]]
    for backend, value in gate.by_backend.items() if len(gate.by_backend) > 1 else ():
        rows.append([f"{gate.precision}, by {backend}", ratio(value), in_points(value - gate.float32)])
    text = (
        f"The gate compared the {gate.metric} of both on {counted(gate.images_judged, 'image')} that {seen}; "
        f"{gate.max_drop:g} points could be lost{_of_classes(gate)}. Calibrated on "
        f"{counted(gate.calibration_images, 'image')}"
        + (f" by {gate.method}" if gate.method else "")
        + (f"; {counted(len(gate.skipped), 'image')} could not be read" if gate.skipped else "")
        + "."
    )
    return [Table("What low precision cost", ["precision", gate.metric, "difference, points"], rows), text]


def _of_classes(gate: Accuracy) -> str:
    """What each class could lose, and which lost more, in words."""
    if gate.max_class_drop is None:
        return ""
    named = ", ".join(f"{name} {lost:.1f}" for name, lost in gate.class_drops.items())
    whom = "the labels" if gate.metric == "mIoU" else "float32, at their borders too"
    lost = f"; points of IoU lost against {whom}: {named}" if named else ""
    return f", and {gate.max_class_drop:g} of each class{lost}"


def _candidates(candidates: Sequence[CandidateReport]) -> Table:
    sizes = list(max(candidates, key=lambda row: len(row.latency_ms)).latency_ms)
    rows = []
    for row in candidates:
        state = "chosen" if row.chosen else f"refused: {row.refused}" if row.refused else ""
        times = [in_ms(row.latency_ms.get(size)) for size in sizes]
        against = Number(NONE if row.against_chosen is None else f"{row.against_chosen:.2f}")
        rows.append([row.backend, row.precision, str(row.threads), *times, against, state])
    headers = ["backend", "precision", "threads", *(f"ms at {s.replace('x', '×')}" for s in sizes)]
    headers += ["time over the chosen’s", ""]
    return Table("Candidates, measured side by side when it was built", headers, rows)


def _plans(plans: Sequence[PlanCandidate]) -> Table:
    sizes = list(max(plans, key=lambda row: len(row.latency_ms)).latency_ms)
    rows = []
    for row in plans:
        state = "chosen" if row.chosen else f"refused: {row.refused}" if row.refused else ""
        convolutions = ", ".join(f"{count} {types}" for types, count in row.convolutions.items()) or NONE
        figures = [_cell(each) for each in (row.layers, row.float_layers, row.activation_bytes, row.plan_bytes)]
        lost = NONE if row.drop_points is None else f"{row.drop_points:.2f}"
        times = [in_ms(row.latency_ms.get(size)) for size in sizes]
        rows.append([row.precision, convolutions, *figures, Number(lost), *times, state])
    headers = ["precision", "convolutions", "layers", "that give float", "activation bytes", "plan bytes"]
    headers += ["points lost", *(f"ms at {s.replace('x', '×')}" for s in sizes), ""]
    return Table("Plans in every precision", headers, rows)


def _plan(plan: PlanReport) -> list[Block]:
    text = f"Plan for {', '.join(plan.targets)} by {plan.module} {plan.version}, built in {plan.seconds:.1f} s."
    columns = ["profile", "min", "opt", "max", "batch", "images", "mean_log_ratio", "activation_bytes"]
    rows = [[_cell(getattr(profile, name)) for name in columns] for profile in plan.profiles]
    blocks: list[Block] = [text, Table("TensorRT profiles", columns, rows)]
    if plan.layers:
        shown = [[layer.name, layer.kind, ", ".join(layer.takes), ", ".join(layer.gives)] for layer in plan.layers]
        title = "Layers of the plan, after fusing"
        headers = ["layer", "kind", "takes", "gives"]
        blocks.append(Table(title, headers, shown[:LAYER_ROWS], "layers", shown[LAYER_ROWS:]))
    return blocks


def _cell(value: str | float | None) -> str:
    if value is None:
        return NONE
    return value if isinstance(value, str) else Number(f"{value:,}")


def _layers(report: EngineReport) -> list[Block]:
    if report.accuracy is None:
        return []
    if not report.layers:
        return ["Layers were not ranked by what they cost: build with --report or --precision-report."]
    ranked = sorted(report.layers, key=lambda layer: math.inf if layer.sensitivity is None else -layer.sensitivity)
    most = max((layer.sensitivity for layer in ranked if layer.sensitivity), default=1.0)
    rows = [_layer_row(layer, most) for layer in ranked]
    headers = ["layer", "operator", "error of the scores", "its root", "kept in higher precision"]
    text = (
        "The error is the squared error of the scores over their power, with that layer alone in low precision, on a "
        "few images."
    )
    title = "The layers that low precision hurts, the most sensitive first"
    return [Table(title, headers, rows[:LAYER_ROWS], "layers", rows[LAYER_ROWS:]), text]


def _layer_row(layer: LayerPrecision, most: float) -> list[Any]:
    """`most`: the largest sensitivity."""
    value, bar = Number(NONE), Bars([])
    if layer.sensitivity is not None:
        value = Number(f"{layer.sensitivity:.2e}")
        bar = Bars([(math.sqrt(layer.sensitivity / most), 0)] if most < math.inf else [])
    return [layer.name, layer.operator, value, bar, layer.kept or NONE]


def _kept(report: EngineReport) -> list[Block]:
    gate = report.accuracy
    if gate is None or not gate.kept or report.layers:  # which say it in their table
        return []
    rows = list(gate.kept.items())
    title = f"{len(rows)} of {gate.layers} layers are kept in higher precision"
    return [Table(title, ["layer", "why"], rows[:LAYER_ROWS], "", rows[LAYER_ROWS:])]


def _tiles(report: EngineReport) -> list[Block]:
    rows = []
    names = [f"stage {index}" for index in range(len(report.stages))]
    names += [f"for tiles alone, {index}" for index in range(len(report.fine))]
    for name, stage in zip(names, (*report.stages, *report.fine), strict=True):
        halo = NONE if stage.halo is None else f"{stage.halo[0]}×{stage.halo[1]}"
        row = [name, stage.tiles, Number(halo), Number(f"{stage.bytes_per_pixel:.0f}")]
        rows.append([*row, Number(f"{stage.output_bytes:.2f}"), percent(stage.work, 1)])
    headers = ["", "tiles", "halo, pixels", "working memory, bytes/pixel", "handed on, bytes/pixel", "share of work"]
    text = (
        "Images beyond the memory budget are run in tiles. The halo (vertical × horizontal) is what a tile's scores "
        "depend on around it, from the receptive field; exact tiles give the labels of the whole image."
    )
    return [Table("Receptive field and tiles", headers, rows), text]


def built_figures(report: EngineReport) -> list[tuple[str, str, str]]:
    """The few numbers of a report that stand at the top of a page: (name, value, remark)."""
    figures = []
    if report.precision is not None:
        figures.append(("precision", report.precision, f"for {report.target}"))
    if (agreement := report.agreement) is not None:
        name = f"{agreement.kind} against the model’s, float32"
        if agreement.labels_equal is None:
            figures.append((name, f"{agreement.difference:.1e}", "of their range apart at most"))
        else:
            figures.append((name, str(percent(agreement.labels_equal, 2)), "of the pixels equal"))
    if (gate := report.accuracy) is not None:
        change = in_points(gate.value - gate.float32)
        figures.append((gate.metric, str(ratio(gate.value)), f"{change} points against float32"))
    if report.speedup is not None:
        figures.append(("speed", f"{report.speedup:.2f} ×", "that of float32, mean over the sizes"))
    return figures

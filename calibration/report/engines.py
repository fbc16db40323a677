"""The sections on engines, from the report.json that build-engine leaves in them, and latency against size."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.report.accuracy import grouped, legend
from fcn_deploy.calibration.report.charts import Series, line_chart
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
from fcn_deploy.runtime.engine_file import EngineFile

REPORT = "report.json"
POINTS = 40  # on a line at most
LAYERS = 20  # rows of the layers that cost most


def read_report(engine: Path) -> dict[str, Any] | None:
    """report.json of an engine; None where there is none. Raises DeployError where the file is damaged."""
    with EngineFile(engine) as file:
        if REPORT not in file.manifest.members:
            return None
        try:
            report = json.loads(file.read(REPORT))
        except (ValueError, RecursionError):
            return None
    return report if isinstance(report, dict) else None


def sections_on_engines(entries: Sequence[Entry], notes: list[str]) -> list[Section]:
    """Latency against size, and a section for each engine that has a report; adds to the notes."""
    sections, timed = [], []
    for index, entry in enumerate(entries):
        for line in _latencies(index, entry, notes):
            timed.append(line)
    if sum(len(line.points) for line in timed) > 1:
        sections.append(_latency_section(entries, timed))
    for index, entry in enumerate(entries):
        if entry.report is None:
            continue
        blocks = []
        for draw in (_facts, _gate, _candidates, _profiles, _layers, _kept, _tiles):
            blocks += read(lambda draw=draw, entry=entry: draw(entry.report), entry, notes) or []
        said = read(lambda entry=entry: [f"{entry.name}: {line}" for line in _notes(entry.report)], entry, notes)
        notes += said or []
        sections.append(Section(f"build-{index}", f"How {entry.name} was built", blocks))
    return sections


def _notes(report: Mapping[str, Any]) -> list[str]:
    skipped = (report.get("accuracy") or {}).get("skipped", {})
    lines = [*report.get("notes", ()), *report.get("builder", {}).get("notes", ())]
    return [str(line) for line in (*lines, *(f"skipped in calibration: {reason}" for reason in skipped.values()))]


def read(draw: Callable[[], Any], entry: Entry, notes: list[str]) -> Any:
    """What `draw` makes of a report.json, which other releases and hands may have written; None where it is broken."""
    try:
        return draw()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        notes.append(
            f"{entry.name}: a part of its report.json is not as this release writes it, and is left out "
            f"({type(error).__name__}: {error}); build it again with build-engine"
        )
        return None


def _latencies(index: int, entry: Entry, notes: list[str]) -> list[Series]:
    """Megapixels and milliseconds: as evaluated, and as measured when it was built."""
    lines = []
    if entry.evaluated is not None:
        results = [result for scale in entry.evaluated.results.values() for result in scale]
        points = []
        for group in grouped(results, POINTS):
            pixels = float(np.median([r.size[0] * r.size[1] for r in group])) / 1e6
            points.append((pixels, max(float(np.median([r.seconds for r in group])) * 1e3, 1e-3)))
        lines.append(Series(f"{entry.name}, evaluated", tuple(points), index))
    if entry.report is not None:
        kinds = {"latency_ms": "when built"}
        if entry.evaluated is None and entry.report.get("precision") != "float32":
            kinds["float32_latency_ms"] = "its float32"
        for place, (which, said) in enumerate(kinds.items()):
            measured = (
                read(lambda which=which: _measured(entry.report, which), entry, notes)
                if which in entry.report
                else None
            )
            if points := sorted((h * w / 1e6, ms) for (h, w), ms in (measured or {}).items() if ms):
                dashed = entry.evaluated is not None
                lines.append(Series(f"{entry.name}, {said}", tuple(points), index + place, dashed))
    return lines


def _measured(report: Mapping[str, Any], which: str = "latency_ms") -> dict[tuple[int, int], float | None]:
    """Size → milliseconds of a report.json; None for sizes that were too large."""
    found = {}
    for size, ms in (report[which] or {}).items():
        height, width = (int(side) for side in size.split("x"))
        if height < 1 or width < 1 or not (ms is None or 0 < ms < math.inf):
            raise ValueError(f"latency {ms!r} at {size!r}")
        found[height, width] = ms
    return found


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
    silent: list[str] = []
    columns = [
        (e.name, found)
        for e in entries
        if e.report is not None and (found := read(lambda e=e: _measured(e.report), e, silent))
    ]
    if columns:
        sizes = sorted({size for _, found in columns for size in found}, key=lambda size: (size[0] * size[1], size))
        rows = []
        for size in sizes:
            row: list[Any] = [f"{size[0]}×{size[1]}"]
            for _, found in columns:
                row.append(Number("not measured") if size not in found else in_ms(found[size], "too large"))
            rows.append(row)
        headers = ["size", *(f"ms, {name}" for name, _ in columns)]
        blocks.append(Table("When built, on the machine that built it", headers, rows))
    return Section("latency", "Latency against size", blocks)


def _facts(report: Mapping[str, Any]) -> list[Block]:
    agreement = report["agreement"]
    head = "in the network" if report["head"] == "none" else f"exact, outside the network ({report['head']})"
    rows = [
        ["target", str(report["target"])],
        ["precision", str(report["precision"])],
        ["run by", str(report.get("backend", "as the target says"))],
        ["head", head],
        ["stride, size multiple", f"{report['stride']}, {report['size_multiple']}"],
        [f"{agreement.get('kind', 'labels')} against the model’s, float32", _agreement(agreement)],
    ]
    rows += [["core network", ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in report["core_bytes"].items())]]
    if (speedup := report.get("speedup")) is not None:
        said = f"{speedup:.2f} times faster" if speedup >= 1 else f"{1 / speedup:.2f} times SLOWER"
        rows.append(["int8 against float32", f"{said}, mean over the sizes"])
    if report["latency_ms"] is None:
        rows.append(["latency", f"not measured: {report['latency_reason']}"])
    if report["miou"] is None:
        rows.append(["mIoU", f"not measured: {report['miou_reason']}"])
    rows.append(["built on", f"{report['machine']}; threads: {report['threads']}"])
    return [Table("The engine", [], rows, "facts")]


def _agreement(agreement: Mapping[str, Any]) -> str:
    where = f"at {len(agreement['sizes'])} sizes"
    if "difference" in agreement:
        return f"differ by {agreement['difference']:.1e} of their range at most, {where}"
    return (
        f"{agreement['labels_equal']:.4%} of {agreement['pixels']:,} pixels equal {where}; {agreement['wrong']} wrong, "
        f"{agreement['undecided']:.2%} within rounding of a tie"
    )


def _gate(report: Mapping[str, Any]) -> list[Block]:
    if not (gate := report.get("accuracy")):
        return []
    precision = "int8" if "int8" in gate else "float16"
    seen = "calibration did not see" if gate["judged_unseen"] else "calibration SAW TOO, as there were no others"
    rows = [
        ["float32", ratio(gate["float32"]), Number(NONE)],
        [precision, ratio(gate[precision]), Number(f"{MINUS if gate['drop_points'] > 0 else '+'}"
                                                    f"{abs(gate['drop_points']):.2f}")],
    ]  # fmt: skip
    by_backend = gate.get("by_backend", {})
    for backend, value in by_backend.items() if len(by_backend) > 1 else ():
        rows.append([f"{precision}, by {backend}", ratio(value), in_points(value - gate["float32"])])
    text = (
        f"The gate compared the {gate['metric']} of both on {counted(gate['images_judged'], 'image')} that {seen}; "
        f"{gate['max_drop']:g} points could be lost. Calibrated on {counted(gate['calibration_images'], 'image')}"
        + (f" by {gate['method']}" if "method" in gate else "")
        + (f"; {counted(len(gate['skipped']), 'image')} could not be read" if gate.get("skipped") else "")
        + "."
    )
    return [Table("What low precision cost", ["precision", str(gate["metric"]), "difference, points"], rows), text]


def _candidates(report: Mapping[str, Any]) -> list[Block]:
    if not (candidates := report.get("candidates")):
        return []
    sizes = list(max((row["latency_ms"] for row in candidates), key=len))
    rows = []
    for row in candidates:
        state = "chosen" if row["chosen"] else f"refused: {row['refused']}" if row["refused"] else ""
        times = [in_ms(row["latency_ms"].get(size)) for size in sizes]
        against = Number(NONE if row["against_chosen"] is None else f"{row['against_chosen']:.2f}")
        rows.append([str(row["backend"]), str(row["precision"]), str(row["threads"]), *times, against, state])
    headers = ["backend", "precision", "threads", *(f"ms at {s.replace('x', '×')}" for s in sizes)]
    headers += ["time over the chosen’s", ""]
    return [Table("Candidates, measured side by side when it was built", headers, rows)]


def _profiles(report: Mapping[str, Any]) -> list[Block]:
    if not (builder := report.get("builder")):
        return []
    text = (
        f"Plan for {', '.join(map(str, builder['targets']))} by {builder['module']} {builder['version']}, built in "
        f"{builder['seconds']:.1f} s."
    )
    columns = list(builder["profiles"][0])
    rows = [[_cell(row[name]) for name in columns] for row in builder["profiles"]]
    return [text, Table("TensorRT profiles", columns, rows)]


def _cell(value: Any) -> str:
    """A value of a report.json, as text."""
    if value is None:
        return NONE
    if isinstance(value, list | tuple):
        return "×".join(map(str, value))
    return Number(f"{value:,}") if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _layers(report: Mapping[str, Any]) -> list[Block]:
    if not report.get("accuracy"):
        return []
    if not (layers := report.get("layers")):
        return ["Layers were not ranked by what they cost: build with --report or --precision-report."]
    ranked = sorted((layer for layer in layers if layer["sensitivity"] is not None), key=lambda x: -x["sensitivity"])
    ranked += [layer for layer in layers if layer["sensitivity"] is None]
    most = max((layer["sensitivity"] for layer in ranked if layer["sensitivity"]), default=1.0)
    rows = []
    for layer in ranked:
        known = layer["sensitivity"] is not None
        value = Number(f"{layer['sensitivity']:.2e}" if known else NONE)
        bar = Bars([(math.sqrt(layer["sensitivity"] / most), 0)] if known and most < math.inf else [])
        rows.append([str(layer["name"]), str(layer["operator"]), value, bar, str(layer["kept"] or NONE)])
    headers = ["layer", "operator", "error of the scores", "its root", "kept in higher precision"]
    text = (
        "The error is the squared error of the scores over their power, with that layer alone in low precision, on a "
        "few images."
    )
    title = "The layers that low precision hurts, the most sensitive first"
    return [Table(title, headers, rows[:LAYERS], "layers", rows[LAYERS:]), text]


def _kept(report: Mapping[str, Any]) -> list[Block]:
    gate = report.get("accuracy")
    if not gate or not gate["kept"] or report.get("layers"):  # which say it in their table
        return []
    rows = [[str(name), str(reason)] for name, reason in gate["kept"].items()]
    title = f"{len(rows)} of {gate['layers']} layers are kept in higher precision"
    return [Table(title, ["layer", "why"], rows[:LAYERS], "", rows[LAYERS:])]


def _tiles(report: Mapping[str, Any]) -> list[Block]:
    rows = []
    for index, stage in enumerate(report["stages"]):
        halo = NONE if stage["halo"] is None else f"{stage['halo'][0]}×{stage['halo'][1]}"
        row = [f"stage {index}", str(stage["tiles"]), Number(halo), Number(f"{stage['bytes_per_pixel']:.0f}")]
        rows.append([*row, Number(f"{stage['output_bytes']:.2f}"), percent(stage["work"], 1)])
    headers = ["", "tiles", "halo, pixels", "working memory, bytes/pixel", "handed on, bytes/pixel", "share of work"]
    text = (
        "Images beyond the memory budget are run in tiles. The halo (vertical × horizontal) is what a tile's scores "
        "depend on around it, from the receptive field; exact tiles give the labels of the whole image."
    )
    return [Table("Receptive field and tiles", headers, rows), text]


def built_figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    figures = [("precision", str(report["precision"]), f"for {report['target']}")]
    agreement = report["agreement"]
    name = f"{agreement.get('kind', 'labels')} against the model’s, float32"
    if "difference" in agreement:
        figures.append((name, f"{agreement['difference']:.1e}", "of their range apart at most"))
    else:
        figures.append((name, str(percent(agreement["labels_equal"], 2)), "of the pixels equal"))
    if gate := report.get("accuracy"):
        precision = "int8" if "int8" in gate else "float16"
        change = in_points(gate[precision] - gate["float32"])
        figures.append((str(gate["metric"]), str(ratio(gate[precision])), f"{change} points against float32"))
    if report.get("speedup") is not None:
        figures.append(("speed", f"{report['speedup']:.2f} ×", "that of float32, mean over the sizes"))
    return figures

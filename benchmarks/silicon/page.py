"""The page of `make silicon`: the record of a run for people, one file that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fcn_deploy.calibration.report.layout import Bars, Number, Section, Table
from fcn_deploy.calibration.report.page import machine, rendered
from fcn_deploy.calibration.report.results import About

Record = Mapping[str, Any]


def page(record: Record) -> str:
    """A record of `silicon.measure` as HTML."""
    found = record.get("machine", {})
    about = About(
        f"{found.get('gpu', 'a GPU')}: what only silicon tells", created=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
        machine=machine(), command="make silicon",
    )  # fmt: skip
    notes = [f"{name}: {_said(part)}" for name, part in record.items() if not part["ok"]]
    skipped = [name for name, part in record.items() if part.get("skipped")]
    lead = [
        "Kernels against NumPy, engines against the CPU, and times beside the bare network and PyTorch, as one run on "
        "this machine found them. What could not be run here is named, with the reason."
    ]
    figures = [
        ("verdict", "WRONG" if notes else "ok", f"{len(record) - len(skipped)} of {len(record)} parts were run"),
        ("GPU", str(found.get("gpu", "–")), str(found.get("target", ""))),
        ("driver", str(found.get("driver", "–")), ""),
    ]
    sections = [
        _verdicts(record),
        *([_kernels(record["kernels"])] if "rows" in record.get("kernels", {}) else []),
        *([_engines(record)] if _names(record) else []),
        *([_nearest(record)] if any("ways" in part for part in record.values()) else []),
        *([_times(record)] if _timed(record) else []),
        _machine(found, about),
    ]
    return rendered(about, lead, figures, notes, sections)


def _said(part: Record) -> str:
    """A verdict and why, in a line."""
    if part.get("skipped"):
        return f"skipped: {part['skipped']}"
    if part.get("error"):
        return f"error: {part['error']}"
    return "ok" if part["ok"] else "WRONG"


def _verdicts(record: Record) -> Section:
    rows = [
        [name, _said(part), _in_short(part), Number(f"{part['seconds']:.1f}" if "seconds" in part else "")]
        for name, part in record.items()
    ]
    return Section("verdicts", "Verdicts", [Table("Every part", ["part", "verdict", "found", "seconds"], rows)])


def _in_short(part: Record) -> str:
    if "images" in part:
        share = f"{part['share']:.2%} of labels differ ({part['worst']:.2%} at the worst)"
        miou = "; mIoU against what was drawn {:.4f}, the CPU's {:.4f}".format(*part["miou"]) if part["miou"] else ""
        return f"{part['images']} sizes; {share}, {part['allowed']:.2%} may{miou}"
    if "calls" in part:
        return (
            f"{part['calls']} calls in {part['of_threads']:g} s, {len(part['errors'])} errors; "
            f"{part['lost_mb']:.1f} MB of {part['free_before_mb']:.0f} MB free before are not free after"
        )
    if "tolerance" in part:
        return f"scores differ by {part['difference']:.1e} of their range, {part['tolerance']:.0e} is allowed"
    if "rows" in part and part["rows"] and "kernel" in part["rows"][0]:
        equal = sum(row["equal"] is True for row in part["rows"])
        return f"{equal} of {len(part['rows'])} cases are equal bit for bit"
    if "ways" in part:
        return f"{sum(said == 'equal' for said in part['ways'].values())} of {len(part['ways'])} ways as ONNX Runtime"
    if "said" in part:
        return " ".join(part["said"])
    return "; ".join(part.get("errors", [])) if isinstance(part.get("errors"), list) else ""


def _kernels(part: Record) -> Section:
    rows = [[row["kernel"], _size(row["size"]), _equal(row)] for row in part["rows"]]
    rows.sort(key=lambda row: (row[2] == "equal", row[2] != "DIFFERENT"))  # what is wrong or was skipped comes first
    text = "Of images larger than 128 rows three bands are compared: the first, the middle and the last 32 rows."
    table = Table("Kernels against NumPy", ["kernel", "size", "result"], rows[:24], more=rows[24:])
    return Section("kernels", "Kernels", [text, table])


def _equal(row: Record) -> str:
    if row["equal"] is None:
        return f"skipped: {row['skipped']}"
    return "equal" if row["equal"] else "DIFFERENT"


def _size(size: Sequence[int]) -> str:
    return "×".join(map(str, size))


def _names(record: Record) -> list[str]:
    """The engines of a record."""
    return [name.removeprefix("golden sample, ") for name in record if name.startswith("golden sample, ")]


def _engines(record: Record) -> Section:
    rows = []
    for name in _names(record):
        part = record[f"golden sample, {name}"]
        for row in part.get("sizes", []):
            apart = row["difference"]
            text = "not run: no memory" if apart is None else f"{apart:.1e}"
            rows.append([name, _size(row["size"]), Number(text), Number(f"{part['tolerance']:.0e}")])
    headers = ["engine", "size", "difference", "allowed"]
    text = "The largest difference of the scores from the builder's float32 reference, as a share of their range."
    table = Table("Golden samples at MIN, OPT, MAX and an odd size of every profile", headers, rows)
    return Section("engines", "Engines", [text, table])


def _nearest(record: Record) -> Section:
    rows = [
        [name.removeprefix("nearest neighbours, "), way, said]
        for name, part in record.items()
        for way, said in part.get("ways", {}).items()
    ]
    text = (
        "Where rounding decides which cell is taken, libraries may differ; an engine with a way that does is refused."
    )
    table = Table("Maps resized by no whole factor, beside ONNX Runtime", ["library", "way", "found"], rows)
    return Section("nearest", "Nearest neighbours", [text, table])


def _timed(record: Record) -> list[tuple[tuple[int, ...], str, float, int]]:
    """(size, what, milliseconds, colour) of all that was timed."""
    found = []
    for name in _names(record):
        for row in record.get(f"latency, {name}", {}).get("rows", []):
            found.append((tuple(row["size"]), f"{name}: a call", row["call_ms"], 0))
            if "network_ms" in row:
                found.append((tuple(row["size"]), f"{name}: the bare network", row["network_ms"], 1))
    for row in record.get("PyTorch", {}).get("rows", []):
        for name, value in row.items():
            if name not in ("size", "errors") and value is not None:
                found.append((tuple(row["size"]), f"PyTorch, {name}", value, 2))
    return sorted(found, key=lambda each: (each[0], each[2]))


def _times(record: Record) -> Section:
    timed = _timed(record)
    longest = {size: max(ms for other, _, ms, _ in timed if other == size) for size, *_ in timed}
    rows = [
        [_size(size), what, Number(f"{ms:.3f}"), Bars([(ms / longest[size], colour)])]
        for size, what, ms, colour in timed
    ]
    legend = [(Bars([(1.0, index)]), name) for index, name in enumerate(("a call", "the bare network", "PyTorch"))]
    text = (
        "Medians. A call goes from an image in host memory to labels in host memory, and so does PyTorch's; the bare "
        "network is what its library takes on inputs that are there already."
    )
    table = Table("Milliseconds by size, the fastest first", ["size", "what", "ms", ""], rows, legend=legend)
    failed = [
        f"PyTorch, {name}, at {_size(row['size'])}: {why}"
        for row in record.get("PyTorch", {}).get("rows", []) for name, why in row["errors"].items()
    ]  # fmt: skip
    return Section("times", "Times", [text, table, *failed])


def _machine(found: Record, about: About) -> Section:
    memory = found.get("memory_gb")
    values = {
        "GPU": found.get("gpu", ""), "target": found.get("target", ""), "driver": found.get("driver", ""),
        "memory": f"{memory[0]} of {memory[1]} GB free" if memory else "",
        **found.get("packages", {}), **about.machine, "when": about.created, "command": about.command,
    }  # fmt: skip
    rows = [[name, value] for name, value in values.items() if value]
    return Section("machine", "Machine and versions", [Table("Where and when this page was made", [], rows, "facts")])

"""The record of `inspect-model` as text: a name and what is said of it a line, wrapped to the terminal."""

import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from fcn_deploy.calibration.report.engine_report import PlanLayer
from fcn_deploy.calibration.report.layout import counted
from fcn_deploy.export.build.targets.tensorrt.layers import summary

WIDTH = 120  # columns of text, at most
MARGIN = 19  # columns of the names of what is told of an ONNX, which is printed in two parts

Row = tuple[str, list[str]]  # a name, and the parts of what is said of it; parts may be empty


def record_as_text(record: dict[str, Any]) -> str:
    """A record of inspect_file, for people to read: its file's name, and a row for each thing that it tells."""
    return f"{file_as_text(record)}\n{findings_as_text(record)}"


def file_as_text(record: dict[str, Any]) -> str:
    """Of a record what the file tells without being run."""
    return "\n".join([record["file"], *_rows(record, _file_rows, _operator_rows)])


def findings_as_text(record: dict[str, Any]) -> str:
    """Of a record what was found by running the file."""
    return "\n".join(_rows(record, _card_rows, _engine_rows, _target_rows, _run_rows, _remark_rows))


def _rows(record: dict[str, Any], *sections: Callable[[dict[str, Any]], Iterable[Row]]) -> Iterator[str]:
    rows = [(name, ", ".join(filter(None, parts))) for section in sections for name, parts in section(record)]
    return _wrapped([row for row in rows if row[1]])


def _wrapped(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    margin = max(MARGIN, *(len(name) + 2 for name, _ in rows))
    for name, text in rows:
        yield from textwrap.wrap(
            text, max(width, margin + 40), initial_indent=f"{name:<{margin}}", subsequent_indent=" " * margin,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip


def _file_rows(record: dict[str, Any]) -> Iterator[Row]:
    engine = record["kind"] == "engine"
    maker = record.get("created_by") or record.get("producer")
    yield (
        "file",
        [
            f"engine for {record['target']}" if engine else "ONNX",
            _bytes(record["bytes"]),
            f"{_count(record['parameters'])} parameters" if "parameters" in record else "",
            record["precision"],
            f"opset {record['opset']}" if "opset" in record else "",
            f"by {maker}" if maker else "",
        ],
    )
    for name in ("input", "output"):
        for value in record.get(f"{name}s", ()):
            yield name, [f"{value['name']}: {value['type']} {_shape(value['shape'])}"]
    if engine:
        yield "run by", [record["backend"]]


def _card_rows(record: dict[str, Any]) -> Iterator[Row]:
    if "card" not in record:
        return
    card = record["card"]
    own = "" if record["card_is_its_own"] else "assumed"
    mean, std = (" ".join(f"{value:g}" for value in np.round(card[name], 2)) for name in ("mean", "std"))
    rgb = " (RGB)" if card["channels"] == 3 else ""
    yield (
        "images",
        [f"{counted(card['channels'], 'channel')} of {card['dtype']}{rgb}", f"mean {mean}", f"std {std}", own],
    )
    names = card["classes"][:12] + (["…"] if len(card["classes"]) > 12 else [])
    yield "classes", [f"{len(card['classes'])}: {', '.join(names)}", f"by {card['activation']}", own]
    yield from _scores_rows(record["head"], card["stride"])
    yield from _size_rows(record["sizes"])
    if "reach" in record:
        yield from _reach_rows(record["reach"])


def _scores_rows(upsampling: dict[str, Any], stride: int) -> Iterator[Row]:
    factor = upsampling["factor"]
    by = "to the image's size" if factor is None else f"×{factor[0]:g} by ×{factor[1]:g}"
    how = f"{upsampling['mode']}, {upsampling['coordinates']}, {by}, outside the network"
    yield "upsampling", ["none is cut off; scores are full-size" if upsampling["mode"] == "none" else how]
    yield "stride", [f"scores at 1/{stride} of the image's size" if stride > 1 else "scores at full size"]


def _size_rows(sizes: dict[str, Any]) -> Iterator[Row]:
    how = {"pad": "padded with zeros", "resize": "resized to the nearest"}.get(sizes["fit"], "")
    yield (
        "takes",
        [
            f"multiples of {sizes['multiple']}" if sizes["multiple"] > 1 else "every height and width",
            f"from {sizes['smallest']} on" if sizes["smallest"] > 1 else "",
            f"others are {how}" if how else "",
        ],
    )


def _reach_rows(reach: dict[str, Any]) -> Iterator[Row]:
    if reach["whole"]:
        yield "reach", [f"the whole image ({reach['whole']})", "so that it is never run in tiles"]
        return
    field = "×".join(f"{side:g}" for side in reach["field"])
    halo = "×".join(map(str, reach["halo"]))
    yield (
        "reach",
        [f"{field} pixels around each score", f"tiles with a halo of {halo}", f"period {reach['period']}"],
    )


def _engine_rows(record: dict[str, Any]) -> Iterator[Row]:
    yield "outputs", [f"{name}: {kind}" for name, kind in record.get("heads", {}).items()]
    for stage in record.get("stages", ()):
        halo = stage["halo"]
        tiles = f"tiles with a halo of {halo[0]}×{halo[1]} pixels" if halo else stage["whole"]
        yield "stage", [f"{stage['file']} ({_bytes(stage['bytes'])})", tiles]
    if gpu := record.get("gpu"):
        where = f" on {gpu['platform']}" if gpu.get("platform") else ""
        if where and gpu["library"].startswith("tensorrt_rtx"):  # whose plans are of a processor, not of a system
            where = f" on {gpu['platform'].rpartition('-')[2]}, Linux or Windows"
        yield "plan", [f"by {gpu['library']} for {', '.join(gpu['targets'])}{where}"]
        for profile in gpu["profiles"]:
            ends = ":".join(f"{profile[corner][0]}x{profile[corner][1]}" for corner in ("min", "opt", "max"))
            yield "profile", [ends, f"batches of up to {profile['batch']}"]
    if layers := [PlanLayer(**layer) for layer in record.get("plan_layers", ())]:
        yield "layers", [summary(layers)]
        for layer in layers:
            yield "", [f"{layer.name} ({layer.kind}): {', '.join(layer.takes)} → {', '.join(layer.gives)}"]


def _operator_rows(record: dict[str, Any]) -> Iterator[Row]:
    yield "operators", [f"{name} {count}" for name, count in record.get("operators", {}).items()]


def _target_rows(record: dict[str, Any]) -> Iterator[Row]:
    for target, verdict in record.get("targets", {}).items():
        yield target, [f"refused: {verdict['problem']}" if verdict["problem"] else f"taken by {verdict['by']}"]
        for each in verdict["refused"]:
            yield "", [f"{each['node'] or 'a node'} ({each['operator']}): {each['reason']}"]


def _run_rows(record: dict[str, Any]) -> Iterator[Row]:
    if agreement := record.get("agreement"):
        what, equal = agreement["kind"], agreement["labels_equal"]
        apart = f"{what} differ from the model's by {agreement['difference'] or 0:.1e} of their range at most"
        yield "built", [apart if equal is None else f"{what} equal to the model's: {equal:.4%}"]
    for run in record.get("as_given", ()):
        yield "as given", [f"{_size(run['size'])}: {run['problem'] or 'gives ' + _shape(run['shape'])}"]
    yield "runs at", [_size(run["size"]) for run in record["runs"] if not run["problem"]]
    for run in record["runs"]:
        if run["problem"]:
            yield "FAILS at", [f"{_size(run['size'])}: {run['problem']}"]
    yield "not run", [record.get("not_run", "")]


def _remark_rows(record: dict[str, Any]) -> Iterable[Row]:
    yield "REFUSED", [record["problem"] or ""]
    for note in record["notes"]:
        yield "note", [note.removeprefix(f"{record['file']} ").removeprefix(f"{record['file']}: ")]


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}×{size[1]}"


def _shape(shape: Sequence[int | str | None] | None) -> str:
    return "of unknown rank" if shape is None else f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _count(number: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return str(number)


def _bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"

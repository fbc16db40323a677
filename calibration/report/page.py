"""report.html: what a build or an evaluation measured, as one page that needs nothing beside it.

Equal data give equal bytes. The page has no script and reaches for nothing: its policy forbids both, so that names of
classes and files, which come from elsewhere, are text and nothing else.
"""

import logging
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fcn_deploy.calibration.report.accuracy_sections import sections_on_accuracy
from fcn_deploy.calibration.report.charts import COLOURS
from fcn_deploy.calibration.report.engine_sections import built_figures, sections_on_engines
from fcn_deploy.calibration.report.layout import (
    Bars,
    Chart,
    Gallery,
    Number,
    Section,
    Shade,
    Swatch,
    Table,
    counted,
    in_ms,
    in_points,
    percent,
    ratio,
)
from fcn_deploy.calibration.report.results import About, Entry
from fcn_deploy.runtime.backends.onnxruntime import physical_cores
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.extras import need
from fcn_deploy.runtime.files import check_writable, refuse_existing, replacing

REPORTED_LIBRARIES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch",
    "onnx",
)


def write(path: str | os.PathLike[str], about: About, entries: Sequence[Entry]) -> None:
    """Write the page in one step. Raises DeployError where it cannot be written."""
    content = page(about, entries)
    with replacing(path) as temporary:
        # Names of files may hold bytes that are no text.
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))


def page(about: About, entries: Sequence[Entry]) -> str:
    """The page as HTML."""
    notes = [*about.notes]
    sections = [
        *sections_on_accuracy(entries),
        *sections_on_engines(entries, notes),
        _cards(entries),
        _method(about, entries),
    ]
    # Machines write notes too, more than once.
    notes = list(dict.fromkeys([*_warnings(entries), *notes]))
    lead = [about.data] if about.data else []
    if len(entries) > 1:
        lead.append(
            f"These figures are of {entries[-1].name}, the last of {len(entries)}; {entries[0].name} is the first."
        )
    return rendered(about, lead, _figures(entries), notes, sections)


def rendered(
    about: About,
    lead: Sequence[str],
    figures: Sequence[tuple[str, str, str]],
    notes: Sequence[str],
    sections: Sequence[Section],
) -> str:
    """A page of sections as HTML.

    Args:
        about: names it.
        lead: paragraphs below the title.
        figures: the most important ones: (name, value, remark).
        notes: warnings.
        sections: in order.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests |= {
        kind.__name__.lower(): (lambda value, kind=kind: isinstance(value, kind))
        for kind in (Number, Swatch, Bars, Shade, Table, Chart, Gallery)
    }
    return environment.get_template("page.html").render(
        about=about, lead=lead, figures=figures, notes=notes, sections=sections, colours=COLOURS
    )


def machine() -> dict[str, str]:
    """This machine and the versions of what runs networks on it, for `About`."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    values = {
        "processor": found[1].strip() if found else platform.processor() or platform.machine(),
        "cores": str(physical_cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "fcn-deploy": "",
        "Python": platform.python_version(),
    }
    for name in ("fcn-deploy", *REPORTED_LIBRARIES):
        try:
            values[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            values.pop(name, None)
    return values


def _cards(entries: Sequence[Entry]) -> Section:
    cards: dict[str, tuple[ModelCard, list[str]]] = {}
    for entry in entries:
        cards.setdefault(entry.card.to_json(), (entry.card, []))[1].append(entry.name)
    each = [card for card, _ in cards.values()]
    rows: list[list[Any]] = [
        ["image", *(_image(card) for card in each)],
        *([["range of values", *(_range(card) for card in each)]] if any(card.range for card in each) else []),
        ["mean", *(", ".join(f"{value:g}" for value in card.mean) for card in each)],
        ["standard deviation", *(", ".join(f"{value:g}" for value in card.std) for card in each)],
        ["stride of the scores", *(counted(card.stride, "pixel") for card in each)],
        ["sizes are multiples of", *(counted(card.size_multiple, "pixel") for card in each)],
        ["smallest size", *(counted(card.smallest, "pixel") for card in each)],
        ["sees the whole image", *(f"yes: {card.whole}" if card.whole else "no" for card in each)],
        ["an image’s result", *(_result(card) for card in each)],
    ]
    names = [" and ".join(names) for _, names in cards.values()]
    tables = [Table("Model card", ["", *names] if len(each) > 1 else [], rows, "facts")]
    first = each[0]
    swatches = [Swatch(name, color) for name, color in zip(first.classes, first.colors, strict=True)]
    tables.append(Table("Classes, in label order", [], [["labels", swatches]], "facts"))
    text = ["Stages differ in what they do themselves: a plain ONNX pads and upsamples in its graph."]
    return Section("card", "Model card", [*(text if len(each) > 1 else ()), *tables])


def _range(card: ModelCard) -> str:
    return f"{card.range[0]:g} to {card.range[1]:g}" if isinstance(card.range, tuple) else card.range or "as stored"


def _image(card: ModelCard) -> str:
    return f"{counted(card.channels, 'channel')}, {card.dtype}{' (RGB)' if card.channels == 3 else ''}"


def _result(card: ModelCard) -> str:
    if card.activation == "softmax":
        return "labels, by argmax"
    if card.activation == "none":
        return "values, as they are"
    each = card.threshold if isinstance(card.threshold, tuple) else (card.threshold,)
    what = "a mask per class, by sigmoid" if card.activation == "multilabel" else f"labels, by {card.activation}"
    return f"{what} above {', '.join(f'{value:g}' for value in each)}"


def _method(about: About, entries: Sequence[Entry]) -> Section:
    values = {**about.machine, "images": about.data, "when": about.created, "command": about.command}
    rows = [[name, value] for name, value in values.items() if value]
    table = Table("Where and when this page was made", [], rows, "facts")
    text = (
        "Images are labelled one at a time, without test-time augmentation; times are medians over the images, and "
        "what else ran on the machine is in them."
    )
    evaluated = any(entry.evaluated is not None for entry in entries)
    return Section("machine", "Machine and versions", [*([text] if evaluated else []), table])


def _warnings(entries: Sequence[Entry]) -> list[str]:
    """What the labels leave open."""
    for entry in entries:
        if entry.evaluated is not None:
            metrics, names = entry.evaluated.metrics, entry.card.classes
            if not entry.evaluated.confusion.any():
                return ["The labels of these images hold no counted pixel, so nothing is known of accuracy."]
            if metrics.absent:
                absent = [names[index] for index in metrics.absent]
                shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
                have = "class is" if len(absent) == 1 else "classes are"
                return [f"{len(absent)} {have} absent from the labels, and no mean counts them: {shown}."]
            return []
    return []


def _figures(entries: Sequence[Entry]) -> list[tuple[str, str, str]]:
    """The few numbers at the top of the page: (name, value, remark)."""
    last = entries[-1]
    size = (f"{last.bytes / 1e6:.1f} MB", "")
    if last.evaluated is not None:
        evaluated = [entry for entry in entries if entry.evaluated is not None]
        first, metrics = evaluated[0], last.evaluated.metrics
        several = len(evaluated) > 1
        lost = metrics.mean_iou - first.evaluation.metrics.mean_iou
        figures = [
            ("mIoU", str(ratio(metrics.mean_iou)), f"{in_points(lost)} points against {first.name}" if several else ""),
            ("pixel accuracy", str(ratio(metrics.pixel_accuracy)), ""),
            ("ms/image", str(in_ms(last.evaluated.milliseconds())), ""),
            ("file", *size),
        ]
        if several:
            figures[2] = (*figures[2][:2], f"{in_ms(first.evaluation.milliseconds())} by {first.name}")
            figures[3] = ("file", size[0], f"{first.bytes / 1e6:.1f} MB of {first.name}")
            if last.evaluated.equal is not None:
                figures.insert(1, ("labels as the first", str(percent(last.evaluated.equal, 2)), ""))
        return figures
    return [*(built_figures(last.report) if last.report is not None else ()), ("file", *size)]


def check_report(path: Path, force: bool, extra: str) -> None:
    """Refuse a page that cannot be written, before long work. Raises MisuseError or DeployError.

    Args:
        path: of the page.
        force: replace what is there.
        extra: of the package, which brings what draws it.
    """
    if path.suffix.lower() != ".html":
        raise MisuseError(f"{path} is not named .html; --report writes a page for browsers")
    refuse_existing(path, force)
    need("jinja2", extra)
    check_writable(path)


class NoteKeeper(logging.Handler):
    """Keeps what is warned of, so that the page says it too."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def about(command: str, title: str, data: str = "", notes: Sequence[str] = ()) -> About:
    """What holds for a page that `command` makes now, on this machine."""
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return About(title, data, created, machine(), tuple(notes), shlex.join([command, *sys.argv[1:]]))

"""eval-fcn: how good checkpoints, ONNX models and engines are on labelled images, side by side."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fcn_deploy.fcn.cli.options import Data, MaskColors, MaskValues
from fcn_deploy.runtime.command import (
    Force,
    InputRange,
    Json,
    NoData,
    Strict,
    Threads,
    log_to_stderr,
    print_record,
    run,
)
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.extras import need

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from fcn_deploy.calibration.datasets import LabelledImages
    from fcn_deploy.calibration.report.results import Entry
    from fcn_deploy.fcn.evaluate import OpenedModel
    from fcn_deploy.runtime.engine_format.model_card import ModelCard


@dataclass(frozen=True)
class ImageOptions:
    """Which labelled images, and at which sizes."""

    data: Data = "digits"
    mask_values: MaskValues = None
    mask_colors: MaskColors = None
    input_range: InputRange = None
    nodata: NoData = None
    strict: Strict = False
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to evaluate on.")] = "val"
    seed: Annotated[int, typer.Option(help="Seed of the digits that are drawn.")] = 0
    count: Annotated[int | None, typer.Option(min=1, help="Number of images to evaluate on, at most.")] = None
    image_scales: Annotated[
        str,
        typer.Option(
            metavar="SCALES",
            help="Evaluate on resized images and labels too: 0.5,0.75,1.5,2, or mixed: odd sizes, another for each "
            "image.",
        ),
    ] = "1"


@dataclass(frozen=True)
class Contestant:
    """A model that is evaluated.

    Attributes:
        path: of its file.
        name: in tables.
        model: opened.
        card: with the names that its classes have here.
        images: read as its card wants them.
    """

    path: Path
    name: str
    model: "OpenedModel"
    card: "ModelCard"
    images: "LabelledImages"


def eval_fcn(
    models: Annotated[
        list[Path],
        typer.Argument(
            help="A .safetensors, .onnx or .engine, or several to compare, the reference first.", metavar="MODELS"
        ),
    ],
    images: ImageOptions,
    refine: Annotated[
        bool, typer.Option("--refine", help="Evaluate the last model, an engine, with --refine too.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Page to write (.html): all of it, with pictures.")
    ] = None,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Measure pixel accuracy, mean accuracy, mean IoU and frequency-weighted IoU, with a table by class."""
    from fcn_deploy.calibration.report import page

    noted = page.NoteKeeper()
    log_to_stderr()
    logging.getLogger().addHandler(noted)
    if report is not None:
        page.check_report(report, force, "train")
    contestants = _opened(models, images, refine, threads)
    entries = _evaluated(contestants, images, pictures=report is not None)
    number, data = len(contestants[0].images), f"{images.data} ({images.split})"
    described = f"{number} image{'s' if number > 1 else ''} of {data}"
    if report is not None:
        what = models[0].name if len(entries) == 1 else f"{len(entries)} models"
        title = f"{what} on {Path(images.data).name} ({images.split})"
        page.write(report, page.about("eval-fcn", title, described, noted.lines), entries)
    if json_:
        for contestant, entry in zip(contestants, entries, strict=True):
            print_record("evaluation", {"file": str(contestant.path), "images": number} | _fields(entry))
        return
    _show(contestants, entries, described)
    if report is not None:
        print(f"\n→ {report}")


def _opened(models: Sequence[Path], images: ImageOptions, refine: bool, threads: int | None) -> list[Contestant]:
    """Open the models, and the images for each. Raises MisuseError where they do not go together."""
    from fcn_deploy.calibration.census import one_class
    from fcn_deploy.calibration.datasets import load_dataset, take_census
    from fcn_deploy.calibration.mask_options import MaskOptions
    from fcn_deploy.fcn.evaluate import open_model, parse_scales, same_classes
    from fcn_deploy.runtime.images.numbers import ReadOptions

    parse_scales(images.image_scales)
    reading = ReadOptions(input_range=images.input_range, no_data=images.nodata, strict=images.strict)
    for path in models:
        if not path.is_file():
            raise MisuseError(f"{path} does not exist or is not a file; name a checkpoint, an ONNX or an engine")
    if any(path.suffix in (".safetensors", ".pth", ".pt") for path in models):
        need("torch", "train")
    if images.data == "digits":
        need("sklearn", "train")
    named = [(path, path.name, open_model(path, threads)) for path in models]
    if refine:
        last = models[-1]
        named.append((last, f"{last.name} --refine", open_model(last, threads, refine=True)))
    cards = same_classes([path for path, _, _ in named], [model.card for _, _, model in named])
    contestants = []
    masks = MaskOptions(images.mask_values, images.mask_colors)
    for (path, name, model), card in zip(named, cards, strict=True):
        own = load_dataset(
            images.data, images.split, seed=images.seed, count=images.count, card=model.card, masks=masks,
            reading=reading,
        )  # fmt: skip
        if len(own.classes) != len(card.classes):
            raise MisuseError(f"{images.data} has {len(own.classes)} classes and {path} has {len(card.classes)}")
        contestants.append(Contestant(path, name, model, card, own))
    if images.data != "digits":
        first = contestants[0]
        census = take_census(first.images, images.split, enough=2)  # most often of one file
        if alone := one_class(census.pixels, first.card.classes, images.split):
            log.warning(alone)
    return contestants


def _evaluated(contestants: Sequence[Contestant], images: ImageOptions, pictures: bool) -> list["Entry"]:
    """Evaluate each; pictures, where they are wanted, are of the last, which is what is deployed."""
    from fcn_deploy.calibration.report.results import Entry
    from fcn_deploy.fcn.evaluate import WORST, evaluate_in_detail, parse_scales

    scales = parse_scales(images.image_scales)
    step = _bar(sum(len(each.images) for each in contestants) * len(scales))
    entries = []
    packed: list[bytes] | None = [] if len(contestants) > 1 else None
    for each in contestants:
        worst = WORST if pictures and each is contestants[-1] else 0
        evaluated = evaluate_in_detail(
            each.model.predict, each.images, len(each.card.classes), scales, packed, worst,
            done=step,
        )  # fmt: skip
        size = each.path.stat().st_size
        entries.append(Entry(each.name, each.model.kind, size, each.card, each.model.report, evaluated))
    return entries


def _bar(total: int) -> Callable[[], None]:
    """Show a bar; what is given moves it on by one."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    steps = iter(track(range(total), "evaluating", console=console, disable=not console.is_terminal))
    next(steps, None)

    def step() -> None:
        next(steps, None)

    return step


def _show(contestants: Sequence[Contestant], entries: Sequence["Entry"], described: str) -> None:
    """Print the tables."""
    from fcn_deploy.calibration.report.accuracy_sections import classes_table, scales_table, stages_table
    from fcn_deploy.fcn.evaluate import means_over, metrics_table

    first = entries[0].evaluated
    assert first is not None
    classes = contestants[0].card.classes
    if len(entries) == 1:
        print(f"{contestants[0].path} on {described}\n\n{metrics_table(first.metrics, classes)}")
    else:
        print(f"{described}\n\n{stages_table(entries).text()}\n\n{classes_table(entries).text()}")
        if absent := first.metrics.absent:
            print(means_over(len(classes) - len(absent)))
    if len(first.results) > 1:
        print(f"\n{scales_table(entries).text()}")


def _fields(entry: "Entry") -> dict[str, Any]:
    """What was measured of a model, for its record."""
    from fcn_deploy.calibration.report.results import metrics_of

    def plain(metrics: Any) -> dict[str, Any]:
        return {name: _without_nan(value) for name, value in asdict(metrics).items()}

    evaluated = entry.evaluated
    assert evaluated is not None
    return {
        "classes": entry.card.classes,
        **plain(evaluated.metrics),
        "kind": entry.kind,
        "bytes": entry.bytes,
        "milliseconds": evaluated.milliseconds(),
        "labels_as_first": evaluated.equal,
        "scales": {
            scale: plain(metrics_of(results)) | {"milliseconds": evaluated.milliseconds(scale)}
            for scale, results in evaluated.results.items()
        },
    }


def _without_nan(value: Any) -> Any:
    """A number or a tuple of them for JSON, which has no NaN."""
    if isinstance(value, tuple):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def main() -> None:
    run(eval_fcn, "eval-fcn", {"--scales": "--image-scales", "--scale": "--image-scales"})

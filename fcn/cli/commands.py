"""train-fcn and eval-fcn. Heavy modules load when they are used, so that --help is instant."""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from fcn_deploy.fcn.recipes import CLASS_WEIGHTS, RECIPES, SCHEDULES, described, named
from fcn_deploy.runtime.command import Debug, Force, Json, Threads, need, run
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.files import check_writable, refuse_existing

Data = Annotated[str, typer.Option(help="`digits`, or a folder: train/ + trainannot/, images/ + labels/, or VOC.")]


class Arch(StrEnum):
    fcn = "fcn"
    dilated8 = "dilated8"


Weighting = StrEnum("Weighting", {name: name for name in CLASS_WEIGHTS})
Schedule = StrEnum("Schedule", {name: name for name in SCHEDULES})
RecipeName = StrEnum("RecipeName", {name: name for name in RECIPES})


class UpsamplingKind(StrEnum):
    fixed = "fixed"
    learned = "learned"


def parse_size(text: str) -> tuple[int, int]:
    """`HxW` in pixels as (height, width). Raises MisuseError."""
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise MisuseError(f"size {text!r}; write HEIGHTxWIDTH in pixels, such as 256x320")
    return int(height), int(width)


def parse_scale(text: str) -> tuple[float, float]:
    """`LOW,HIGH` as two numbers. Raises MisuseError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise MisuseError(f"scale {text!r}; write SMALLEST,LARGEST, such as 0.7,1.5") from error
    return low, high


def train(
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint to write (.safetensors).")],
    data: Data = "digits",
    split: Annotated[str, typer.Option(help="Split to train on.")] = "train",
    val_split: Annotated[str, typer.Option(help="Split that chooses the best epoch.")] = "val",
    arch: Annotated[Arch, typer.Option(help="FCN with skips, or torchvision's dilated FCN.")] = Arch.fcn,
    backbone: Annotated[
        str, typer.Option(help="efficientnet-lite0, mobilenet-v2, resnet50, vgg16 or alexnet.")
    ] = "efficientnet-lite0",
    stride: Annotated[int, typer.Option(help="Of the finest scores: 32, 16 or 8.")] = 8,
    upsampling: Annotated[
        UpsamplingKind, typer.Option(help="Bilinear, or learned from bilinear.")
    ] = UpsamplingKind.fixed,
    width: Annotated[float, typer.Option(help="Multiplies the backbone's channels (no ImageNet weights).")] = 1.0,
    pretrained: Annotated[bool, typer.Option(help="Start from ImageNet weights (efficientnet-lite0).")] = True,
    backbone_weights: Annotated[
        Path | None, typer.Option(help="Classification weights in torchvision's layout (.pth, .safetensors).")
    ] = None,
    qat: Annotated[
        Path | None, typer.Option(help="Fine-tune this checkpoint for INT8: its network is rounded as an engine's.")
    ] = None,
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="Values of the options that follow; given ones win [default: digits for digits, or default]."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch: Annotated[int | None, typer.Option(help="Crops per step.")] = None,
    crop: Annotated[str | None, typer.Option(help="HxW of a crop in pixels.")] = None,
    rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    backbone_rate: Annotated[float | None, typer.Option(help="Times the rate, for the backbone.")] = None,
    schedule: Annotated[Schedule | None, typer.Option(help="Of the learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights; 0: none.")] = None,
    scale: Annotated[str | None, typer.Option(help="LOW,HIGH enlargement of crops.")] = None,
    flip: Annotated[bool | None, typer.Option(help="Mirror half of the crops.")] = None,
    turn: Annotated[bool | None, typer.Option(help="Also upside down and by quarter turns.")] = None,
    brightness: Annotated[float | None, typer.Option(help="Change of brightness and contrast, 0 to 1.")] = None,
    color: Annotated[float | None, typer.Option(help="Change of saturation and hue, 0 to 1.")] = None,
    blur: Annotated[float | None, typer.Option(help="Share of the crops that are blurred.")] = None,
    class_weights: Annotated[Weighting | None, typer.Option(help="Weigh rare classes up.")] = None,
    jaccard: Annotated[float | None, typer.Option(help="Weight of a soft Jaccard loss; 0: none.")] = None,
    hardest: Annotated[float | None, typer.Option(help="Share of the pixels that count, the hardest.")] = None,
    validate_every: Annotated[int | None, typer.Option(help="Epochs; the last tenth is always validated.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without gain; 0: never.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    count: Annotated[int | None, typer.Option(min=2, help="Train on so many images at most.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    force: Force = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    if out.suffix != ".safetensors":
        raise MisuseError(f"{out} is not named .safetensors; checkpoints are of that format")
    log, state = out.with_suffix(".log.jsonl"), out.with_name(out.name + ".state")
    if resume and not state.is_file():
        raise MisuseError(f"there is no {state} to resume from; start without --resume")
    if not resume:
        for path in (out, log):
            refuse_existing(path, force)
        if state.exists() and not force:
            raise MisuseError(f"{state} holds a run that was stopped; go on with --resume, or --force to start anew")
    torch = need("torch", "train")
    from fcn_deploy.calibration.datasets import class_pixels, load_dataset
    from fcn_deploy.fcn import checkpoint as checkpoints
    from fcn_deploy.fcn.architecture import Architecture
    from fcn_deploy.fcn.backbones.efficientnet_lite0 import published_weights
    from fcn_deploy.fcn.model import build_network
    from fcn_deploy.fcn.train import train as run_training

    if data == "digits":
        need("sklearn", "train")
    if threads:
        torch.set_num_threads(threads)
    how = named(
        recipe or ("digits" if data == "digits" else "default"), epochs=epochs, batch=batch,
        crop=parse_size(crop) if crop else None, rate=rate, backbone_rate=backbone_rate,
        schedule=schedule and schedule.value, weight_decay=weight_decay, ema=ema,
        scale=parse_scale(scale) if scale else None, flip=flip, turn=turn, brightness=brightness, color=color,
        blur=blur, class_weights=class_weights and class_weights.value, jaccard=jaccard, hardest=hardest,
        validate_every=validate_every, patience=patience, seed=seed, qat=qat is not None,
    )  # fmt: skip
    images = load_dataset(data, split, seed=seed, count=count)
    validation = load_dataset(data, val_split, seed=seed)
    if tuple(images.classes) != tuple(validation.classes):
        raise MisuseError(f"{split} and {val_split} of {data} have different classes; add a classes.txt")
    torch.manual_seed(seed)
    start = "random weights"
    if qat is not None:
        begun = checkpoints.load_checkpoint(qat)
        model, card, architecture = begun.model, begun.card, begun.model.architecture
        if card.classes != tuple(images.classes):
            raise MisuseError(f"{qat} has other classes than {data}; fine-tune on the data it was trained on")
        backbone, stride = architecture.backbone, architecture.stride
        start = f"{qat}, rounded as in INT8"
    else:
        architecture = Architecture(len(images.classes), arch.value, backbone, stride, upsampling.value, width)
        model = build_network(architecture)
        card = checkpoints.card_for(architecture, tuple(images.classes), tuple(images.colors))
        if backbone_weights is not None:
            model.backbone.load_classification(checkpoints.load_state(backbone_weights))
            start = str(backbone_weights)
        elif pretrained and backbone == "efficientnet-lite0" and width == 1:
            model.backbone.load_classification(published_weights())
            start = "ImageNet weights"
    if data != "digits":  # drawn, and right by construction
        seen, judged = (class_pixels(split_images, len(images.classes)) for split_images in (images, validation))
        _say_absent(seen, images.classes, split, "they cannot be learned")
        _say_absent(judged, images.classes, val_split, f"mIoU is over the {(judged > 0).sum()} classes present")
    check_writable(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{f'FCN-{stride}s' if architecture.arch == 'fcn' else architecture.arch} {backbone}, {parameters / 1e6:.1f} M "
        f"parameters, from {start}; {len(images)} images to train on, {len(validation)} to validate",
        flush=True,
    )
    if words := described(how):
        print(f"recipe {how.name}: {words}", flush=True)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training")

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=steps, description=f"loss {loss:.3f}")

        def on_epoch(record: dict) -> None:
            judged = "" if record["val_miou"] is None else f"val mIoU {record['val_miou']:.4f}  "
            print(
                f"epoch {record['epoch']:>3}/{how.epochs}  loss {record['loss']:.4f}  {judged}"
                f"{record['seconds']:.0f} s{'  best' if record['best'] else ''}",
                flush=True,
            )

        training = {"data": data, "split": split}
        progress = run_training(
            checkpoints.Checkpoint(model, card, training), images, validation, how, out,
            resume=resume, on_step=on_step, on_epoch=on_epoch,
        )  # fmt: skip
    print(f"best epoch {progress.best_epoch}: val mIoU {progress.best_miou:.4f} → {out}; log: {log}")


train.__doc__ = "\n\n".join((
    "Train an FCN on images of mixed sizes; the best epoch by validation mIoU is kept.",
    f"Recipe default: {described(RECIPES['default'], None)}.",
    "The others, where they differ from it:",
    *(f"{name}: {described(RECIPES[name])}." for name in RECIPES if name != "default"),
))  # fmt: skip


def _say_absent(pixels, classes: Sequence[str], split: str, so: str) -> None:
    """Say which classes a split holds no pixel of. Raises DeployError where it holds none of any."""
    if not pixels.any():
        raise DeployError(f"the labels of {split} hold no counted pixel; mend them, or choose another split")
    absent = [name for name, count in zip(classes, pixels, strict=True) if not count]
    if absent:
        print(f"{split} holds no pixel of {', '.join(absent)}: {so}", file=sys.stderr, flush=True)


def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="A .safetensors, .onnx or .engine, or several to compare, the reference first.")
    ],
    data: Data = "digits",
    split: Annotated[str, typer.Option(help="Split to evaluate on.")] = "val",
    seed: Annotated[int, typer.Option(help="Of digits.")] = 0,
    count: Annotated[int | None, typer.Option(min=1, help="Evaluate on so many images at most.")] = None,
    scales: Annotated[
        str, typer.Option(help="Resize images and labels too: 0.5,0.75,1.5,2, or mixed: odd sizes, each its own.")
    ] = "1",
    refine: Annotated[bool, typer.Option("--refine", help="Evaluate the last, an engine, with --refine too.")] = False,
    report: Annotated[Path | None, typer.Option(help="Page to write (.html): all of it, with pictures.")] = None,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Pixel accuracy, mean accuracy, mean IoU and frequency-weighted IoU, with a table by class."""
    from fcn_deploy.calibration.report import page

    noted = page.NoteKeeper()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger().addHandler(noted)
    if report is not None:
        page.check_report(report, force, "train")
    from fcn_deploy.calibration.datasets import load_dataset
    from fcn_deploy.calibration.report.accuracy import classes_table, scales_table, stages_table
    from fcn_deploy.calibration.report.results import Entry
    from fcn_deploy.fcn.evaluate import WORST, measure, open_model, parse_scales, same_classes, table

    wanted = parse_scales(scales)
    if any(model.suffix in (".safetensors", ".pth", ".pt") for model in models):
        need("torch", "train")
    if data == "digits":
        need("sklearn", "train")
    opened = [open_model(model, threads) for model in models]
    names = [model.name for model in models]
    if refine:
        models = [*models, models[-1]]
        opened.append(open_model(models[-1], threads, refine=True))
        names.append(f"{models[-1].name} --refine")
    named = same_classes(models, [model.card for model in opened])
    collections = [load_dataset(data, split, seed=seed, count=count, card=model.card) for model in opened]
    for model, card, images in zip(models, named, collections, strict=True):
        if len(images.classes) != len(card.classes):
            raise MisuseError(f"{data} has {len(images.classes)} classes and {model} has {len(card.classes)}")
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    total = sum(map(len, collections)) * len(wanted)
    steps = iter(track(range(total), "evaluating", console=console, disable=not console.is_terminal))
    next(steps, None)
    entries = []
    packed: list[bytes] | None = [] if len(models) > 1 else None
    for name, path, model, card, images in zip(names, models, opened, named, collections, strict=True):
        # The pictures are of the last, which is what is deployed.
        worst = WORST if report is not None and model is opened[-1] else 0
        evaluated = measure(
            model.predict, images, len(card.classes), wanted, packed, worst, done=lambda: next(steps, None)
        )
        entries.append(Entry(name, model.kind, path.stat().st_size, card, model.report, evaluated))
    described = f"{len(collections[0])} image{'s' if len(collections[0]) > 1 else ''} of {data} ({split})"
    if report is not None:
        title = f"{models[0].name} on {Path(data).name} ({split})"
        if len(models) > 1:
            title = f"{len(models)} models on {Path(data).name} ({split})"
        page.write(report, page.about("eval-fcn", title, described, noted.lines), entries)
    if json_:
        for path, entry in zip(models, entries, strict=True):
            print(json.dumps({"model": str(path), "images": len(collections[0]), **_for_json(entry)}))
        return
    if len(entries) == 1:
        print(f"{models[0]} on {described}\n\n{table(entries[0].evaluated.metrics, named[0].classes)}")
    else:
        print(f"{described}\n\n{stages_table(entries).text()}\n\n{classes_table(entries).text()}")
        if absent := entries[0].evaluated.metrics.absent:
            print(f"(means are over the {len(named[0].classes) - len(absent)} classes present)")
    if len(wanted) > 1:
        print(f"\n{scales_table(entries).text()}")
    if report is not None:
        print(f"\n→ {report}")


def _for_json(entry) -> dict:
    """What was measured of a model, for machines."""
    from fcn_deploy.calibration.report.results import metrics_of

    def plain(metrics) -> dict:
        return {name: _without_nan(value) for name, value in asdict(metrics).items()}

    evaluated = entry.evaluated
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


def _without_nan(value):
    """A number or a tuple of them for JSON, which has no NaN."""
    if isinstance(value, tuple):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def train_fcn() -> None:
    run(train, "train-fcn")


def eval_fcn() -> None:
    run(evaluate, "eval-fcn")

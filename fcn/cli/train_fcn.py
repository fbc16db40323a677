"""train-fcn: a network trained on labelled images of mixed sizes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from fcn_deploy.fcn.cli.options import Data, MaskColors, MaskValues
from fcn_deploy.fcn.recipes import CLASS_WEIGHTS, RECIPES, SCHEDULES, Recipe, described, named
from fcn_deploy.runtime.command import Force, InputRange, NoData, Strict, Threads, print_note, run
from fcn_deploy.runtime.engine_format.model_card import DTYPES
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.extras import need
from fcn_deploy.runtime.files import check_writable, refuse_existing

if TYPE_CHECKING:
    from fcn_deploy.calibration.datasets import LabelledImages
    from fcn_deploy.fcn.architecture import AnySize, Architecture
    from fcn_deploy.fcn.checkpoint import Checkpoint
    from fcn_deploy.runtime.engine_format.model_card import ModelCard

LITE0 = "efficientnet-lite0"


class Arch(StrEnum):
    fcn = "fcn"
    dilated8 = "dilated8"


class UpsamplingKind(StrEnum):
    fixed = "fixed"
    learned = "learned"


class Weighting(StrEnum):
    none, sqrt, median = CLASS_WEIGHTS


class Dtype(StrEnum):
    uint8, uint16, int16, float32 = DTYPES


class Schedule(StrEnum):
    one_cycle, cosine, poly = SCHEDULES


@dataclass(frozen=True)
class DataOptions:
    """Which labelled images."""

    data: Data = "digits"
    split: Annotated[str, typer.Option(metavar="NAME", help="Split to train on.")] = "train"
    channels: Annotated[int | None, typer.Option(min=1, help="Bands of the images [default: 3].")] = None
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the images' numbers [default: uint8].")] = None
    input_range: InputRange = None
    nodata: NoData = None
    strict: Strict = False
    class_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Names of the classes, one a line and with a colour if you like."),
    ] = None
    mask_values: MaskValues = None
    mask_colors: MaskColors = None
    val_split: Annotated[str, typer.Option(metavar="NAME", help="Split that chooses the best epoch.")] = "val"
    count: Annotated[int | None, typer.Option(min=2, help="Number of images to train on, at most.")] = None
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0


@dataclass(frozen=True)
class NetworkOptions:
    """Which network, and what its training begins from."""

    arch: Annotated[Arch, typer.Option(help="Architecture: FCN with skips, or torchvision's dilated FCN.")] = Arch.fcn
    backbone: Annotated[
        str, typer.Option(metavar="NAME", help="efficientnet-lite0, mobilenet-v2, resnet50, vgg16 or alexnet.")
    ] = LITE0
    stride: Annotated[int, typer.Option(help="Pixels between the finest scores: 32, 16 or 8.")] = 8
    upsampling: Annotated[
        UpsamplingKind, typer.Option(help="Upsampling of scores: bilinear, or learned from bilinear.")
    ] = UpsamplingKind.fixed
    width: Annotated[
        float, typer.Option(help="Factor of the backbone's channels; other than 1 without ImageNet weights.")
    ] = 1.0
    pretrained: Annotated[bool, typer.Option(help="Begin from ImageNet weights (efficientnet-lite0).")] = True
    backbone_weights: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Classification weights in torchvision's layout (.pth, .safetensors)."),
    ] = None
    qat: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fine-tune this checkpoint for INT8: its network is rounded as an engine's."),
    ] = None


@dataclass(frozen=True)
class RecipeOptions:
    """How to train; what is given wins over the recipe."""

    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Values of the options that follow, where they are not given: {', '.join(RECIPES)} "
            "[default: digits for digits, or default].",
        ),
    ] = None
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None
    crops_per_megapixel: Annotated[
        float | None, typer.Option(help="Crops that a pass takes of each megapixel; one of an image at least.")
    ] = None
    batch: Annotated[int | None, typer.Option(help="Crops in a step.")] = None
    crop: Annotated[str | None, typer.Option(metavar="HxW", help="Size of a crop in pixels.")] = None
    rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None
    backbone_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the backbone, as a multiple of --rate.")
    ] = None
    schedule: Annotated[Schedule | None, typer.Option(help="Schedule of the learning rate.")] = None
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW.")] = None
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average of the weights; 0: none.")] = None
    crop_scale: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Range by which crops are made smaller or larger.")
    ] = None
    flip: Annotated[bool | None, typer.Option(help="Mirror half of the crops.")] = None
    turn: Annotated[bool | None, typer.Option(help="Turn crops upside down and by quarter turns too.")] = None
    brightness: Annotated[float | None, typer.Option(help="Change of brightness and contrast, 0 to 1.")] = None
    color: Annotated[float | None, typer.Option(help="Change of saturation and hue, 0 to 1.")] = None
    blur: Annotated[float | None, typer.Option(help="Share of the crops that are blurred.")] = None
    class_weights: Annotated[Weighting | None, typer.Option(help="How rare classes are weighed up.")] = None
    jaccard: Annotated[float | None, typer.Option(help="Weight of a soft Jaccard loss; 0: none.")] = None
    hardest: Annotated[float | None, typer.Option(help="Share of the pixels that count: the hardest.")] = None
    validate_every: Annotated[
        int | None, typer.Option(help="Epochs between validations; the last tenth is always validated.")
    ] = None
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs without gain; 0: never.")] = None

    def chosen(self, data: DataOptions, qat: bool) -> Recipe:
        """The recipe with what was given. Raises MisuseError."""
        usual = "digits" if data.data == "digits" else "default"
        changes = vars(self) | {
            "crop": parse_size(self.crop) if self.crop else None,
            "crop_scale": parse_range(self.crop_scale) if self.crop_scale else None,
            "schedule": self.schedule and self.schedule.value,
            "class_weights": self.class_weights and self.class_weights.value,
        }
        del changes["recipe"]
        return named(self.recipe or usual, **changes, seed=data.seed, qat=qat)


def parse_size(text: str) -> tuple[int, int]:
    """`HxW` in pixels as (height, width). Raises MisuseError."""
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise MisuseError(f"size {text!r}; write HEIGHTxWIDTH in pixels, such as 256x320")
    return int(height), int(width)


def parse_range(text: str) -> tuple[float, float]:
    """`LOW,HIGH` as two numbers. Raises MisuseError."""
    try:
        low, high = map(float, text.split(","))
    except ValueError as error:
        raise MisuseError(f"crop scale {text!r}; write SMALLEST,LARGEST, such as 0.7,1.5") from error
    return low, high


def train_fcn(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Checkpoint to write (.safetensors).")],
    data: DataOptions,
    network: NetworkOptions,
    recipe: RecipeOptions,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    force: Force = False,
    threads: Threads = None,
) -> None:
    _check_files(out, network, resume, force)
    torch = need("torch", "train")
    if data.data == "digits":
        need("sklearn", "train")
    from fcn_deploy.calibration.datasets import look_at_values
    from fcn_deploy.fcn.train import log_path, train

    if threads:
        torch.set_num_threads(threads)
    how = recipe.chosen(data, qat=network.qat is not None)
    images, validation = _loaded(data)
    torch.manual_seed(data.seed)
    checkpoint, start = _begun(network, images, data)
    images, validation = (_read_as(checkpoint.card, split) for split in (images, validation))
    if data.strict:
        look_at_values(images)
        look_at_values(validation)
    # Digits are drawn, and right by construction.
    judged = _say_what_is_absent(images, validation, data) if data.data != "digits" else len(images.classes)
    check_writable(out)
    print(f"{_described(checkpoint.model, start)}; {len(images)} images to train on, {len(validation)} to validate")
    if words := described(how):
        print(f"recipe {how.name}: {words}")
    card = checkpoint.card
    if (card.channels, card.dtype) != (3, "uint8"):
        shown = (", ".join(f"{value:g}" for value in values) for values in (card.mean, card.std))
        print("images of {} bands of {}, mean {}, std {}".format(card.channels, card.dtype, *shown), flush=True)
    with _progress(how) as (on_step, on_epoch):
        progress = train(checkpoint, images, validation, how, out, resume=resume, on_step=on_step, on_epoch=on_epoch)
    found = [each["val_class_iou"] for each in progress.history if each["val_class_iou"] is not None]
    # What was counted: labels of pixels without data are not.
    judged = min([judged, *(sum(iou is not None for iou in each.values()) for each in found)])
    alone = " over a single class, which says nothing of the others" if judged == 1 else ""
    of = "" if how.validate_every == 1 else f" of {len(found)} validated"
    best = f"best epoch{of}: {progress.best_epoch}," if of else f"best epoch {progress.best_epoch}:"
    print(f"{best} val mIoU {progress.best_miou:.4f}{alone} → {out}; log: {log_path(out)}")


train_fcn.__doc__ = "\n\n".join((
    "Train an FCN on images of mixed sizes; the best epoch by validation mIoU is kept.",
    f"Recipe default: {described(RECIPES['default'], None)}.",
    "The others, where they differ from it:",
    *(f"{name}: {described(RECIPES[name])}." for name in RECIPES if name != "default"),
))  # fmt: skip


def _check_files(out: Path, network: NetworkOptions, resume: bool, force: bool) -> None:
    """Refuse, before any work, what would be lost and what is not there."""
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
    for weights in (network.qat, network.backbone_weights):
        if weights is not None and not weights.is_file():
            raise MisuseError(f"{weights} does not exist or is not a file; name a file of weights")


def _loaded(data: DataOptions) -> tuple["LabelledImages", "LabelledImages"]:
    """What to train on and what to validate on. Raises MisuseError where they do not go together."""
    from fcn_deploy.calibration.datasets import load_dataset
    from fcn_deploy.calibration.mask_options import MaskOptions
    from fcn_deploy.runtime.images.numbers import ReadOptions
    from fcn_deploy.runtime.pixels.value_range import parse_range

    if data.data == "digits" and not (data.channels in (None, 3) and data.dtype in (None, Dtype.uint8)):
        raise MisuseError("digits are RGB of 8 bits; --channels and --dtype are of files: omit them")
    if data.data == "digits" and data.input_range is not None:
        raise MisuseError("digits are of the range 0 to 255; --input-range is of files: omit it")
    if data.input_range is not None:
        parse_range(data.input_range)
    masks = MaskOptions(data.mask_values, data.mask_colors)
    reading = ReadOptions(no_data=data.nodata, strict=data.strict)
    images, validation = (
        load_dataset(
            data.data, split, seed=data.seed, count=count, masks=masks, reading=reading, class_file=data.class_file
        )
        for split, count in ((data.split, data.count), (data.val_split, None))
    )
    if tuple(images.classes) != tuple(validation.classes):
        raise MisuseError(f"{data.split} and {data.val_split} of {data.data} have different classes; add a classes.txt")
    return images, validation


def _read_as(card: "ModelCard", data: "LabelledImages") -> "LabelledImages":
    """The same images, read as a card wants them. Raises MisuseError where the first is of other bands or type."""
    from fcn_deploy.calibration.datasets import FilePairs

    if not isinstance(data, FilePairs):
        return data
    data = replace(data, card=card)
    try:
        data.image(0)
    except MisuseError as error:
        raise MisuseError(f"{error}; or say by --channels and --dtype what the network shall take") from error
    return data


def _card_of(architecture: "Architecture", images: "LabelledImages", data: DataOptions) -> "ModelCard":
    """The card of a network to be trained; of others than 8-bit RGB, normalised by what the images hold."""
    from fcn_deploy.calibration.datasets import FilePairs
    from fcn_deploy.calibration.normalisation import measure_normalisation
    from fcn_deploy.fcn.checkpoint import card_for
    from fcn_deploy.runtime.pixels.value_range import parse_range

    card = card_for(architecture, tuple(images.classes), tuple(images.colors))
    dtype = "uint8" if data.dtype is None else data.dtype.value
    limits = None if data.input_range is None else parse_range(data.input_range)
    bands = architecture.channels
    card = replace(card, dtype=dtype, range=limits)
    if not isinstance(images, FilePairs) or (bands, dtype) == (3, "uint8"):
        return card
    raw = replace(card, mean=(0.0,) * bands, std=(1.0,) * bands)  # of which no value looks wrong
    mean, std = measure_normalisation(cast(FilePairs, _read_as(raw, images)), raw)
    return replace(card, mean=mean, std=std)


def _begun(network: NetworkOptions, images: "LabelledImages", data: DataOptions) -> tuple["Checkpoint", str]:
    """The network that training begins from, and what its weights are."""
    from fcn_deploy.fcn import checkpoint as checkpoints
    from fcn_deploy.fcn.architecture import Architecture
    from fcn_deploy.fcn.backbones.efficientnet_lite0 import published_weights
    from fcn_deploy.fcn.model import build_network

    classes, training = tuple(images.classes), {"data": data.data, "split": data.split}
    if network.qat is not None:
        begun = checkpoints.load_checkpoint(network.qat)
        if begun.card.classes != classes:
            raise MisuseError(
                f"{network.qat} has other classes than {data.data}; fine-tune on the data it was trained on"
            )
        for name, said in (("channels", data.channels), ("dtype", data.dtype), ("range", data.input_range)):
            if said is not None and str(said) != str(getattr(begun.card, name)):
                raise MisuseError(
                    f"--qat goes on with {network.qat}, whose {name} is {getattr(begun.card, name)}; omit "
                    f"--{'input-range' if name == 'range' else name}"
                )
        return checkpoints.Checkpoint(begun.model, begun.card, training), f"{network.qat}, rounded as in INT8"
    architecture = Architecture(
        len(classes), network.arch.value, network.backbone, network.stride, network.upsampling.value, network.width,
        data.channels or 3,
    )  # fmt: skip
    card = _card_of(architecture, images, data)
    model, start = build_network(architecture), "random weights"
    if network.backbone_weights is not None:
        model.backbone.load_classification(checkpoints.load_state(network.backbone_weights))
        start = str(network.backbone_weights)
    elif network.pretrained and network.backbone == LITE0 and network.width == 1:
        model.backbone.load_classification(published_weights())
        start = "ImageNet weights"
    if start != "random weights" and architecture.channels != 3:
        start += f", the first layer brought to {architecture.channels} bands"
    return checkpoints.Checkpoint(model, card, training), start


def _described(model: "AnySize", start: str) -> str:
    """A network in words."""
    architecture = model.architecture
    name = f"FCN-{architecture.stride}s" if architecture.arch == "fcn" else architecture.arch
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return f"{name} {architecture.backbone}, {parameters / 1e6:.1f} M parameters, from {start}"


def _say_what_is_absent(images: "LabelledImages", validation: "LabelledImages", data: DataOptions) -> int:
    """Say which classes have no pixels, and give how many the validation has.

    Raises:
        DeployError: a split has no pixel of any class.
        MisuseError: it cannot be told what the values of its labels mean.
    """
    from fcn_deploy.calibration.census import one_class
    from fcn_deploy.calibration.datasets import FilePairs, take_census
    from fcn_deploy.calibration.metrics import IGNORE

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    classes = images.classes
    taken = [
        (split, where, take_census(split, where))
        for split, where in ((images, data.split), (validation, data.val_split))
    ]
    for split, where, census in taken:
        if not census.present:
            hidden = census.values - census.nodata - {IGNORE}
            why = "where their labels are counted, the images have no data (alpha, --nodata, NaN, tags)"
            raise DeployError(
                f"no pixel of {where} is counted: {why if hidden else 'their labels hold none'}; mend them, or choose "
                "another split"
            )
        if isinstance(split, FilePairs):
            for hint in census.hints(split.label_map, where):
                say(hint)
    (_, _, learned), (_, where, judged) = taken
    if absent := learned.absent(classes):
        say(f"{data.split} holds no pixel of {', '.join(absent)}: they cannot be learned{learned.uncounted()}")
    if alone := one_class(judged.pixels, classes, where):
        say(alone)
    elif absent := judged.absent(classes):
        say(f"{where} holds no pixel of {', '.join(absent)}: mIoU is over the {len(judged.present)} classes present")
    return len(judged.present)


@contextmanager
def _progress(recipe: "Recipe") -> Iterator[tuple[Callable[[int, int, float], None], Callable[[dict[str, Any]], None]]]:
    """What is called after each step and each epoch: a bar, a line, and one note where validation takes longer."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training")

        def on_step(step: int, steps: int, loss: float) -> None:
            bar.update(task, completed=step, total=steps, description=f"loss {loss:.3f}")

        def on_epoch(record: dict[str, Any]) -> None:
            judged = "" if record["val_miou"] is None else f"val mIoU {record['val_miou']:.4f}  "
            print(
                f"epoch {record['epoch']:>3}/{recipe.epochs}  loss {record['loss']:.4f}  {judged}"
                f"{record['seconds']:.0f} s{'  best' if record['best'] else ''}",
                flush=True,
            )
            if record["epoch"] == recipe.validate_every:  # the first that is validated
                advise(record)

        def advise(record: dict[str, Any]) -> None:
            validating = record["val_seconds"]
            training = recipe.validate_every * (record["seconds"] - validating)
            if fewer := recipe.fewer_validations(training, validating):
                print_note(
                    f"validation took {validating:.1f} s and the training before it {training:.1f} s; with "
                    f"--validate-every {fewer} they would take about as long (and the best epoch be one of fewer)"
                )

        yield on_step, on_epoch


def main() -> None:
    run(train_fcn, "train-fcn", {"--scale": "--crop-scale"})

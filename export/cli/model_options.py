"""Groups of options that commands of export share, and the checks that go with them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from fcn_deploy.runtime.command import InputRange
from fcn_deploy.runtime.errors import MisuseError

if TYPE_CHECKING:
    from fcn_deploy.export.importer.options import ImportOptions

Said = TypeVar("Said")
# Options of earlier releases, and what they are called now.
RENAMED = {"--mean": "--input-mean", "--std": "--input-std", "--scale": "--input-scale"}


class Activation(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"
    probability = "probability"
    multilabel = "multilabel"
    none = "none"


@dataclass(frozen=True)
class ModelOptions:
    """What the user says of a model from elsewhere, which carries no card."""

    classes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Names of the classes, with commas between them or one a line in a file. Of several outputs, once for "
            "each.",
        ),
    ] = None
    input_mean: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Per-channel mean, subtracted after --input-scale: in the model's order of channels, or one number.",
        ),
    ] = None
    input_std: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Per-channel divisor: the network sees (image · scale - mean) / std.",
        ),
    ] = None
    input_scale: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Factor by which the image is multiplied first, such as 0.00392157."),
    ] = None
    input_range: InputRange = None
    bgr: Annotated[
        bool, typer.Option("--bgr", help="The model was trained on BGR images. The engine takes RGB all the same.")
    ] = False
    output: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which of several outputs has the scores: its name; of a PyTorch module, a key, field or index. "
            "NAME,NAME makes an engine of several outputs.",
        ),
    ] = None
    activation: Annotated[
        list[Activation] | None,
        typer.Option(
            metavar="KIND",
            help="What the scores mean: softmax (labels by argmax), sigmoid (one logit), probability (one, its sigmoid "
            "taken already), multilabel (a mask for each class), none (values: depth, a matte). Of several outputs, "
            "once for each, or once for all.",
        ),
    ] = None
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NUMBERS",
            help="Probability from which on a pixel is meant; of masks, one per class. Of several outputs, once for "
            "each, or once for all.",
        ),
    ] = None
    card: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with fields of the model card (docs: formats).")
    ] = None
    fit: Annotated[
        str | None,
        typer.Option(
            metavar="FIT",
            help="What is done with images for a model that takes only multiples of some size: pad them, or resize "
            "them to the nearest [default: pad, but resize where the network looks at the whole image]. HxW: resize "
            "all to that one size, for a model that takes no other.",
        ),
    ] = None

    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NODE=KIND",
            help="Of an ONNX of one size: the numbers in a node are fixed at every size, or global, of the image's "
            "size. May be repeated.",
        ),
    ] = None

    def said(self) -> "ImportOptions":
        """The same as the importer takes it. Raises MisuseError."""
        from fcn_deploy.export.importer.options import ImportOptions, read_card_file
        from fcn_deploy.runtime.pixels.value_range import parse_range

        outputs: list[str | None] = [None] if self.output is None else [each.strip() for each in self.output.split(",")]
        count = len(outputs)
        if "" in outputs or len(set(outputs)) < count:
            raise MisuseError(f"--output {self.output}; name each output once, with commas between them")
        if self.classes and count > 1 and len(self.classes) == 1:
            raise MisuseError(f"--classes is given once for {count} outputs; give it once for each, in their order")
        classes = _for_each("--classes", self.classes, count)
        activations = _for_each("--activation", self.activation, count)
        thresholds = _for_each("--threshold", self.threshold, count)
        limits = [_numbers("--threshold", each, "one, or one per class") for each in thresholds]
        first, *further = (
            ImportOptions(
                mean=_numbers("--input-mean", self.input_mean, "one per channel"),
                std=_numbers("--input-std", self.input_std, "one per channel"),
                scale=self.input_scale,
                bgr=self.bgr,
                classes=None if said is None else _names(said),
                output=output,
                activation=None if activation is None else activation.value,
                threshold=limit[0] if limit is not None and len(limit) == 1 else limit,
                range=None if self.input_range is None else parse_range(self.input_range),
                card=None if self.card is None else read_card_file(self.card),
                fit=self.fit,
                assume=None if not self.assume else dict(_assumption(each) for each in self.assume),
            )
            for output, said, activation, limit in zip(outputs, classes, activations, limits, strict=True)
        )
        return replace(first, further=tuple(further))


def _for_each(option: str, said: Sequence[Said] | None, count: int) -> Sequence[Said | None]:
    """What an option that may be repeated says of each of so many outputs. Raises MisuseError."""
    if not said:
        return [None] * count
    if len(said) not in (1, count):
        outputs = f"{count} outputs" if count > 1 else "1 output"
        raise MisuseError(f"{option} is given {len(said)} times for {outputs}; give it once, or once for each")
    return said if len(said) == count else [said[0]] * count


def _assumption(text: str) -> tuple[str, str]:
    """(node, kind) of --assume. Raises MisuseError."""
    node, equals, kind = text.rpartition("=")
    if not equals or not node:
        raise MisuseError(f"--assume {text!r}; write NODE=fixed or NODE=global")
    return node, kind


def check_model(path: Path, what: str = "an .onnx model") -> None:
    """Raise MisuseError where there is no such file: before anything heavy is loaded."""
    if not path.is_file():
        raise MisuseError(f"{path} does not exist or is not a file; name {what}")


def check_files_differ(model: Path, outputs: Mapping[str, Path | None]) -> None:
    """Raise MisuseError where two of the options (name → file that is written) name one file, or the model's."""
    seen = {model.resolve(): "the model itself"}
    for option, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in seen:
            raise MisuseError(f"{path} is {seen[path.resolve()]}; choose another {option}")
        seen[path.resolve()] = f"also {option}"


def _names(classes: str) -> tuple[str, ...]:
    """Names of classes, from the option or the file it names. Raises MisuseError."""
    if "," in classes:
        text = classes.split(",")
    else:
        try:
            text = Path(classes).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MisuseError(f"--classes {classes}: {error}; give names with commas, or a file of them") from error
    return tuple(name.strip() for name in text if name.strip())


def _numbers(option: str, text: str | None, rule: str) -> tuple[float, ...] | None:
    """An option's numbers; None where it was not given. Raises MisuseError."""
    try:
        return None if text is None else tuple(float(value) for value in text.split(","))
    except ValueError as error:
        raise MisuseError(f"{option} {text!r}; write numbers with commas, {rule}") from error

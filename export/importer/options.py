"""What a user says of a model that carries no card: options of the command line, and card files."""

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fcn_deploy.runtime.engine_format.model_card import ACTIVATIONS, ModelCard
from fcn_deploy.runtime.errors import MisuseError, one_line
from fcn_deploy.runtime.pixels.value_range import Range, parse_range

# What a card file may say; the rest of a card is found by running the model.
CARD_FIELDS = ("classes", "colors", "channels", "dtype", "mean", "std", "activation", "threshold", "range")
# How images are fitted to a network that does not take every size.
FITS = ("pad", "resize")
# What the numbers in a node are: the same at every size, or of the image's size.
ASSUMPTIONS = ("fixed", "global")


@dataclass(frozen=True)
class ImportOptions:
    """What a user says of a model that carries no card.

    Attributes:
        mean, std: per channel in the order of the model's channels, or one for all, of the image times `scale`.
        scale: by which the image is multiplied first: 1/255, say.
        bgr: the model was trained on BGR; the engine takes RGB as all do.
        classes: names, in label order.
        output: name of the output to use.
        activation: as the card's.
        threshold: as the card's.
        card: fields of a card file: see CARD_FIELDS.
        range: which numbers of files are the network's 0 and 1, as the card's; also of a model that carries a card.
        fit: how images are fitted to the sizes that the network takes: one of FITS, or HxW, the one size that all are
            resized to; None: as choose_fit says.
        assume: node → what its numbers are in a model of one size: one of ASSUMPTIONS.
        further: the same of further outputs, each of which is a head of the engine.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    bgr: bool = False
    classes: tuple[str, ...] | None = None
    output: str | None = None
    activation: str | None = None
    threshold: float | tuple[float, ...] | None = None
    card: Mapping[str, Any] | None = None
    range: Range | str | None = None
    fit: str | None = None
    assume: Mapping[str, str] | None = None
    further: tuple["ImportOptions", ...] = ()

    def __post_init__(self) -> None:
        if self.range is not None:
            object.__setattr__(self, "range", parse_range(self.range))
            if "range" in (self.card or {}):
                raise MisuseError("--input-range is in the card file too; say it once")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise MisuseError(f"--input-scale {self.scale}; it must be a number above 0, such as 0.00392157 for 1/255")
        if self.fit is not None and self.fit not in FITS and self.fit_size is None:
            raise MisuseError(
                f"--fit {self.fit}; choose {', '.join(FITS)}, or one size for all images, such as 512x512"
            )
        for node, said in (self.assume or {}).items():
            if said not in ASSUMPTIONS:
                raise MisuseError(f"--assume {node}={said}; say {' or '.join(ASSUMPTIONS)}: NODE=fixed")
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise MisuseError(f"--activation {self.activation}; choose one of {', '.join(ACTIVATIONS)}")
        if twice := [name for name in self.said() if name.removeprefix("input-") in (self.card or {})]:
            raise MisuseError(f"--{twice[0]} is in the card file too; say it once")
        if self.scale is not None and {"mean", "std"} & set(self.card or {}):
            raise MisuseError(
                "--input-scale goes with --input-mean and --input-std; a card file's are of the image as it is"
            )

    @property
    def fit_size(self) -> tuple[int, int] | None:
        """(height, width) that all images are resized to; None: --fit names none."""
        match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", self.fit or "")
        return (int(match[1]), int(match[2])) if match else None

    @property
    def fit_kind(self) -> str | None:
        """How images are fitted: one of FITS; None: as choose_fit says."""
        return "resize" if self.fit_size is not None else self.fit

    def said(self) -> list[str]:
        """The options in use that say what a card says, as they are written on the command line."""
        names = {"mean": "input-mean", "std": "input-std", "scale": "input-scale"}
        kept = ("mean", "std", "scale", "bgr", "classes", "activation", "threshold")
        return [names.get(name, name) for name in kept if getattr(self, name) not in (None, False)]

    def with_range(self, card: ModelCard, note: Callable[[str], None]) -> ModelCard:
        """The card with the range that was said; `note` is told where that replaces another."""
        if self.range is None:
            return card
        if card.range not in (None, self.range):
            note(f"--input-range takes the place of the card's range, {card.range}")
        return replace(card, range=self.range)

    def refuse_several(self, why: str) -> None:
        """Raise MisuseError where several outputs are named; `why` that cannot be."""
        if self.further:
            names = ",".join(str(each.output) for each in (self, *self.further))
            raise MisuseError(
                f"--output {names}: {why}; name one, or give build-engine an ONNX that has them all (torch.onnx.export)"
            )

    def refuse_beside_card(self, name: str, what: str = "models") -> None:
        """Raise MisuseError where something is said of a model that has a card; `what` kind of thing it is."""
        if said := [*self.said(), *(["card"] if self.card else [])]:
            raise MisuseError(f"{name} has a model card; --{said[0]} is for {what} without one")


def read_card_file(path: str | os.PathLike) -> dict[str, Any]:
    """The fields of a TOML card file. Raises MisuseError."""
    try:
        with Path(path).open("rb") as file:
            data = tomllib.load(file)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise MisuseError(f"--card {path}: {reason}; write TOML: docs/reference/formats.md") from error
    if unknown := [key for key in data if key not in CARD_FIELDS]:
        raise MisuseError(f"--card {path} has {unknown[0]!r}; a card file may have {', '.join(CARD_FIELDS)}")
    return data

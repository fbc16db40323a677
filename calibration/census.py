"""What the labels of a collection hold, and a question in one line where it cannot be told what they mean."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.label_map import LabelMap, ReadLabels
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.errors import MisuseError
from numpy.typing import NDArray


@dataclass
class Census:
    """What the labels of a split hold.

    Attributes:
        pixels: counted, of each class: int64 [classes].
        values: in files of one channel.
        nodata: values that the files' tags say are no labels.
        binary: a file that holds 0 and 255 alone, and how many there are.
        others: whether 1 was met in a file without 255.
    """

    pixels: NDArray[np.int64]
    values: set[int] = field(default_factory=set)
    nodata: set[int] = field(default_factory=set)
    binary: list[Path] = field(default_factory=list)
    others: bool = False

    def add(self, read: ReadLabels, path: Path) -> None:
        """Count a label file."""
        self.count(read.labels)
        self.values |= read.values
        if read.nodata is not None:
            self.nodata.add(read.nodata)
        if read.values == {0, IGNORE}:
            self.binary.append(path)
        self.others |= 1 in read.values and IGNORE not in read.values

    def count(self, labels: NDArray[Any]) -> None:
        """Count labels."""
        classes = len(self.pixels)
        self.pixels += np.bincount(labels.ravel(), minlength=classes)[:classes]  # IGNORE lies beyond

    @property
    def present(self) -> list[int]:
        """Classes with counted pixels."""
        return [int(index) for index in np.flatnonzero(self.pixels)]

    def absent(self, classes: Sequence[str]) -> list[str]:
        """The names of classes without a counted pixel."""
        return [name for name, count in zip(classes, self.pixels, strict=True) if not count]

    def uncounted(self) -> str:
        """Words on values which are not counted, and may be of a class that is absent; or none."""
        found = sorted(self.values & (self.nodata | {IGNORE}))
        return f" ({' and '.join(map(str, found))} in labels is not counted; --mask-values would)" if found else ""

    def check(self, label_map: LabelMap, where: str) -> None:
        """Ask what values mean where one class at most is counted and others may be hidden in what is not.

        Raises:
            MisuseError: with the option that answers.
        """
        if label_map.by_color or len(self.present) > 1 or len(label_map.classes) < 2:
            return
        hidden = sorted(self.values & (self.nodata | {IGNORE}) - set(label_map.values or ()))
        if not hidden:
            return
        values = sorted(self.values)
        why = "no-data by the files' own tag" if hidden[0] in self.nodata else "not counted"
        left = f"only {label_map.name_of(self.present[0])!r} is left" if self.present else "no class is left"
        if label_map.values is not None:
            raise MisuseError(
                f"the labels of {where} hold {hidden[0]} too, which is {why}, so {left}; add {hidden[0]}=CLASS to "
                f"--mask-values, or {hidden[0]}=void where it is no label"
            )
        listed = ",".join(map(str, values))
        fits = len(values) == len(label_map.classes)
        every = listed if fits else ",".join(f"{value}=CLASS" for value in values)
        void = ",".join(f"{value}={'void' if value in hidden else _word(label_map.classes, value)}" for value in values)
        meaning = f"{hidden[0]} is {label_map.classes[values.index(hidden[0])]!r}" if fits else "they are classes"
        raise MisuseError(
            f"the labels of {where} hold the value{'s' if len(values) > 1 else ''} {' and '.join(map(str, values))} "
            f"alone, and {hidden[0]} is {why}, so {left}; pass --mask-values {every} where {meaning}"
            + (f", or --mask-values {void} where it is no label" if self.present else "")
        )

    def hints(self, label_map: LabelMap, where: str) -> list[str]:
        """What is worth a line though it may be right."""
        hints = []
        if self.binary and self.others and label_map.values is None and len(label_map.classes) == 2:
            hints.append(
                f"{len(self.binary)} labels of {where} hold 0 and 255 alone and others 1 ({self.binary[0]} is the "
                "first): 255 is not counted in them; write them again where it is a class"
            )
        unused = sorted(set(label_map.values or ()) - self.values)
        if self.values and unused:
            hints.append(f"no label of {where} holds {', '.join(map(str, unused))}, which --mask-values names")
        return hints


def one_class(pixels: NDArray[Any], classes: Sequence[str], where: str) -> str:
    """A line that says that labels judge nothing, since they are of one class; empty where they are not."""
    present = np.flatnonzero(pixels)
    if len(present) != 1 or len(classes) < 2:
        return ""
    name = classes[int(present[0])]
    return f"{where} has labels of {name!r} alone, and a network that never finds another class has an mIoU of 1 there"


def _word(classes: Sequence[str], index: int) -> str:
    """A class as --mask-values takes it without quotes."""
    return classes[index] if index < len(classes) and re.fullmatch(r"[\w-]+", classes[index]) else str(index)

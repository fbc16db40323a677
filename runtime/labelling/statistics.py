"""Statistics of label files: of each image and class the pixels, their share and their area, in one CSV."""

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..images.results import ResultFile
from .ground import Ground, significant

COLUMNS = ("image", "class", "name", "pixels", "valid_pixels", "share", "area_m2")


def counts_of(result: ResultFile, card: ModelCard) -> NDArray[np.int64]:
    """Pixels of each class in each row of an open file of labels or masks: [H, K]."""
    classes = len(card.classes)
    counts = np.zeros((result.size[0], classes), np.int64)
    for top, rows in result.strips():
        if card.kind == "masks":
            counts[top : top + rows.shape[1]] = np.count_nonzero(rows, axis=2).T
            continue
        for row, labels in enumerate(rows[0]):
            counts[top + row] = np.bincount(labels, minlength=classes)[:classes]  # beyond them: no data
    return counts


@dataclass
class StatisticsFile:
    """A CSV that grows by an image at a time, with a row for each class.

    Args:
        text: what it is written to.
        card: of the network.
        instances: whether they are counted too.
    """

    text: IO[str]
    card: ModelCard
    instances: bool

    def __post_init__(self) -> None:
        self._table = csv.writer(self.text)
        self._table.writerow((*COLUMNS, "instances") if self.instances else COLUMNS)

    def add(self, image: str, result: ResultFile, ground: Ground, instances: Mapping[int, int]) -> None:
        """Write the rows of an image; `instances` of the classes that were looked for."""
        counts = counts_of(result, self.card)
        pixels = counts.sum(0)
        # Of masks, which may overlap, and do not say where there is no data, all pixels are valid.
        valid = int(pixels.sum()) if self.card.kind == "labels" else result.size[0] * result.size[1]
        areas = None if ground.areas is None else np.diff(ground.areas) @ counts
        for index, name in enumerate(self.card.classes):
            share = round(int(pixels[index]) / valid, 9) if valid else ""
            area = "" if areas is None else significant(areas[index])
            row = [image, index, name, pixels[index], valid, share, area]
            self._table.writerow([*row, instances.get(index, "")] if self.instances else row)


@contextmanager
def open_statistics(path: Path, card: ModelCard, instances: bool) -> Iterator[StatisticsFile]:
    """A CSV to write statistics into."""
    with path.open("w", newline="", encoding="utf-8") as text:
        yield StatisticsFile(text, card, instances)

"""What pages are made of: sections of tables, charts and pictures, and how numbers are written."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

MINUS, NONE = "−", "–"
WORDS, HEADER = 18, 9  # characters of a line in a column of words and above one of numbers, in a terminal


class Number(str):
    """A cell that is aligned to the right."""


@dataclass(frozen=True)
class Swatch:
    """A cell with a class's colour before its name."""

    text: str
    color: tuple[int, int, int]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Bars:
    """A cell of bars: shares of the longest, with the colour of each."""

    shares: Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Shade:
    """A cell of a heat map: text, and strength 0 to 20; `right` where it is on the diagonal."""

    text: str
    strength: int
    right: bool


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its header.

    Attributes:
        caption: what it shows, in a few words.
        headers: of the columns; none where the rows' own say all.
        rows: of text, Number, Swatch (or a list of them), Bars or Shade.
        kind: a class of the style sheet.
        more: rows that are shown when asked for.
        legend: of the bars: (key, name).
    """

    caption: str
    headers: Sequence[Any]
    rows: Sequence[Sequence[Any]]
    kind: str = ""
    more: Sequence[Sequence[Any]] = ()
    legend: Sequence[tuple[Any, str]] = ()

    def text(self) -> str:
        """For a terminal, without bars: headers and words are broken into lines, so that several models fit."""
        shown = [i for i, _ in enumerate(self.headers) if not any(isinstance(row[i], Bars) for row in self.rows)]
        columns = [[row[i] for row in self.rows] for i in shown]
        right = [bool(column) and isinstance(column[0], Number) for column in columns]
        widths = [
            max([HEADER, *map(len, map(str, column))]) if number else WORDS
            for column, number in zip(columns, right, strict=True)
        ]
        widths[:1] = [len(max(map(str, columns[0]), key=len, default=""))]  # names stay whole
        rows = [[self.headers[i] for i in shown], *zip(*columns, strict=True)]
        broken = [[_broken(str(cell), width) for cell, width in zip(row, widths, strict=True)] for row in rows]
        widths = [max(len(line) for cell in column for line in cell) for column in zip(*broken, strict=True)]
        return "\n".join(
            "  ".join(
                line.rjust(width) if number else line.ljust(width)
                for line, width, number in zip(lines, widths, right, strict=True)
            ).rstrip()
            for row in broken
            for lines in zip_longest(*row, fillvalue="")
        )


def _broken(text: str, width: int) -> list[str]:
    """Text in lines of so many characters where it can be broken: after spaces, and dots and the like in names."""
    lines = [""]
    for piece in re.findall(r".+?(?:[ ._/-](?=[^ .,_/-])|$)", text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


@dataclass(frozen=True)
class Chart:
    """A drawing, what it shows, and its legend: (key, name)."""

    svg: Any
    caption: str
    legend: Sequence[tuple[Any, str]] = ()


@dataclass(frozen=True)
class Gallery:
    """Pictures in rows: (heading, [(data URI, alternative text, caption)])."""

    rows: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]
    legend: Sequence[tuple[Any, str]] = ()


Block = str | Table | Chart | Gallery  # text is a paragraph


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    blocks: Sequence[Block] = ()


def ratio(value: float) -> Number:
    return Number(NONE if math.isnan(value) else f"{value:.4f}")


def in_points(difference: float) -> Number:
    """A difference of shares in hundredths, with its sign."""
    if math.isnan(difference):
        return Number(NONE)
    text = f"{abs(difference) * 100:.2f}"
    return Number(text if float(text) == 0 else (MINUS if difference < 0 else "+") + text)


def percent(value: float | None, digits: int) -> Number:
    """A share as a percentage; one that is not whole never reads 100 %."""
    if value is None or math.isnan(value):
        return Number(NONE)
    text = f"{value * 100:.{digits}f}"
    if value < 1 and float(text) == 100:
        text = f"> {100 - 10.0**-digits:.{digits}f}"
    return Number(f"{text} %")


def in_ms(value: float | None, missing: str = NONE) -> Number:
    return Number(missing if value is None else f"{value:.1f}" if value >= 10 else f"{value:.2f}")


def counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"

"""Files that name classes: lines of text, CSV or JSON, with the classes' numbers and colours where they have them."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fcn_deploy.calibration.label_palettes import Color
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.errors import DeployError, MisuseError

VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled", "__ignore__")

# In use: `0: road`, `0=road`, `0. road`, `0,road,128,64,128`, `road 128 64 128`, `128 64 128 road`, `road #804080`,
# `road,0`, and with opacity `0,128,64,128,255,road` (QGIS's export of a colour map).
_NUMBER = r"^(?:(?P<number>\d+)\s*(?:(?:->|[:=,;]|[.)-](?=\s)|\s)\s*))?"
_TRIPLE = r"(?P<red>\d+)[\s,;]+(?P<green>\d+)[\s,;]+(?P<blue>\d+)"
_LINES = tuple(
    re.compile(pattern)
    for pattern in (
        _NUMBER + r"(?P<name>[^\s\d#].*?)[\s,;:=]+" + _TRIPLE + r"$",
        _NUMBER + _TRIPLE + r"[\s,;:]+(?P<name>[^\s\d#].*)$",
        r"^(?P<number>\d+)[\s,;]+" + _TRIPLE + r"[\s,;]+\d+[\s,;]+(?P<name>[^\s\d#].*)$",
        _NUMBER + r"(?P<name>[^\s\d#].*?)[\s,;:=]+#(?P<hex>[0-9a-fA-F]{6})$",
        r"^(?P<name>[^\s\d].*?)\s*[,;:=\t]\s*(?P<number>\d+)$",
        _NUMBER + r"(?P<name>.+)$",
    )
)
_BRACKETED = re.compile(r"[(\[]\s*(\d+[\s,;]+\d+[\s,;]+\d+)\s*[)\]]")  # a colour
_YAML = re.compile(r"\w+\s*:\s*[\[{]|names\s*:$|[A-Za-z_]\w*:\s+[^\s\d#]")  # a list below its first line, or settings
_FOURTH = re.compile(r"[,;\t]\s*\d+$")  # a number that is left in a name, beside those of a colour
# What is left in a name of a line that has more than was understood: numbers beside each other, a colour, or code.
_UNREAD = re.compile(
    r"[\d.]\s*[,;\t]\s*[\d.]|^[\d.]+[\s:]+[\d.]|^-\d|(\s[\d.]+){2}$|#[0-9a-fA-F]{3,8}$|^<|[{}]|=\s*[\[(]"
)
_SETTING = "INTERPOLATION:"  # of QGIS
_NAME_COLUMNS = ("name", "names", "class", "classes", "classname", "label", "labels", "labelname", "category")
_NUMBER_COLUMNS = (
    "id", "ids", "idx", "index", "value", "pixelvalue", "pixel", "dn", "code", "gray", "grey", "classid", "labelid",
    "class", "label", "trainid", "",
)  # fmt: skip
_COLOR_COLUMNS = ("color", "colour", "colors", "rgb", "hex", "hexcolor", "colorhex")
_CHANNELS = (("r", "g", "b"), ("red", "green", "blue"))
_HEADINGS = frozenset((*_NAME_COLUMNS, *_NUMBER_COLUMNS, *_COLOR_COLUMNS, *_CHANNELS[0], *_CHANNELS[1])) - {""}
_NAMED = ("name", "label", "class", "title")  # keys of JSON objects
_NUMBERED = ("id", "index", "value", "trainId")
_COLORED = ("color", "colour", "rgb")
_ENDS = ("---", "...")
_LISTS = ("categories", "classes", "names", "labels", "pathClasses", "tools", "id2label")


@dataclass(frozen=True)
class NamedClass:
    """A class as a file names it.

    Attributes:
        name: of it.
        color: that the file gives it, or None.
        number: that stands beside the name, or None.
    """

    name: str
    color: Color | None = None
    number: int | None = None


def read_classes(path: Path) -> list[NamedClass]:
    """The classes of a file, in its order.

    Raises:
        MisuseError: no such file.
        DeployError: not such a file, nothing in it, or a colour that is none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MisuseError(f"{path} does not exist or is no file; name one with a class a line") from error
    except UnicodeDecodeError as error:
        raise DeployError(f"{path} is no text in UTF-8; write a class a line") from error
    if text.lstrip()[:1] in ("[", "{"):
        found = _from_json(text, path)
    elif (table := _table(lines := _lines(text))) is not None:
        found = [_from_row(row, table[0], path) for row in table[1:]]
    else:
        found = [_parsed(line, path) for line in _listed(lines)]
    if (nameless := next((place for place, each in enumerate(found) if not each.name.strip()), None)) is not None:
        raise DeployError(f"{path} has no name for its class at place {nameless}, counted from 0; give each class one")
    return found


def in_label_order(found: Sequence[NamedClass], path: Path) -> list[NamedClass]:
    """Classes by the numbers that a file gives them; of none, in its order.

    Raises MisuseError where the numbers are not those of labels, 0, 1, …, or where some have none and the others are
    not where their numbers say.
    """
    found = [each for each in found if each.number != IGNORE or each.name.lower() not in VOID_NAMES]
    if found and found[0].name == "__ignore__":  # labelme's -1
        found = found[1:]
    numbers = [each.number for each in found if each.number is not None]
    if len(numbers) < len(found):
        moved = next((each for place, each in enumerate(found) if each.number not in (None, place)), None)
        if moved is None:
            return found
        raise MisuseError(
            f"{path} numbers {moved.name[:60]!r} {moved.number}, which stands at place {found.index(moved)}, counted "
            "from 0, and gives others no number: number all of them, or none (a name that begins with one: NUMBER,NAME)"
        )
    ordered = sorted(found, key=lambda each: each.number or 0)
    if [each.number for each in ordered] == list(range(len(ordered))):
        return ordered
    listed = ", ".join(map(str, numbers[:4])) + (", …" if len(numbers) > 4 else "")
    first = ",".join(f"{each.number}={each.name}" for each in found[:2])
    raise MisuseError(
        f"{path} numbers its classes {listed}, which are no labels 0 to {len(found) - 1}; pass --mask-values {first},… "
        "where label files hold these numbers, or leave them out where lines are in label order"
    )


def read_colors(path: Path) -> list[tuple[str, Color]]:
    """(name, colour) of a file with `NAME R G B`, `R G B NAME` or `NAME #RRGGBB` a line, void ones among them.

    Raises:
        MisuseError: no such file.
        DeployError: not such a file, or a colour twice.
    """
    found: list[tuple[str, Color]] = []
    for each in read_classes(path):
        if each.color is None:
            raise DeployError(f"{path} has the class {each.name!r} without a colour; write NAME R G B a line")
        found.append((each.name, each.color))
    if not found:
        raise DeployError(f"{path} is empty; write NAME R G B a line")
    if again := twice([color for _, color in found]):
        raise DeployError(f"{path} has the colour {again[0]} twice; give each class its own")
    return found


def twice(items: Sequence[Any]) -> list[Any]:
    """The items that stand before already, in order."""
    return [item for index, item in enumerate(items) if item in items[:index]]


def _lines(text: str) -> list[str]:
    """Without what is empty, a comment, or a setting."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line.strip(":") and not line.startswith(("#", _SETTING)) and line not in _ENDS]


def _listed(lines: Sequence[str]) -> list[str]:
    """The lines that name a class: those of a list without its heading, or the parts of a single line."""
    lines = [line.replace('"', "").removeprefix("- ") for line in lines]
    words = [_column(word) for word in lines[0].split()] if lines else []
    if words and _HEADINGS.issuperset(words) and (len(words) > 1 or lines[0].endswith(":")):
        lines = lines[1:]
    if len(lines) == 1 and not any(pattern.match(lines[0]) for pattern in _LINES[:4]):  # no network has one class
        return [part.strip() for part in lines[0].split(",") if part.strip(" :")]
    return lines


def _table(lines: Sequence[str]) -> list[list[str]] | None:
    """The rows of a table whose first line is a heading of columns, such as `id,name,r,g,b`; None: it has none."""
    mark = next((mark for mark in "\t;," if lines and mark in lines[0]), None)
    if mark is None:
        return None
    rows = list(csv.reader(lines, delimiter=mark))
    rows[0] = [_column(column) for column in rows[0]]
    names = [column for column in _NAME_COLUMNS if column in rows[0]]
    return rows if len(rows) > 1 and names and (_HEADINGS - {names[0]}) & set(rows[0]) else None


def _column(heading: str) -> str:
    """Such as `classname` of `Class_Name`."""
    return re.sub(r"[^a-z]", "", heading.lower())


def _from_row(row: Sequence[str], heading: Sequence[str], path: Path) -> NamedClass:
    """A class of a row of a table. Raises DeployError."""
    said = ",".join(row)
    if len(row) != len(heading):
        raise DeployError(
            f"{path} has the line {said[:60]!r} of {len(row)} columns, and its heading has {len(heading)}; mend it, or "
            "write a class a line"
        )
    cells = {column: cell.strip() for column, cell in zip(reversed(heading), reversed(row), strict=True)}
    # `Class` is the number beside a `Name`, and the name beside a `Value`.
    name = next(column for column in _NAME_COLUMNS if column in cells)
    number = next((cells[column] for column in _NUMBER_COLUMNS if column in cells and column != name), None)
    if number is not None and not number.isdigit():
        raise DeployError(
            f"{path} has the line {said[:60]!r}, whose {number!r} is no value of labels; write NUMBER,NAME"
        )
    channels = next((each for each in _CHANNELS if cells.keys() >= set(each)), None)
    color: Any = [cells[channel] for channel in channels] if channels else None
    if color is None and (text := next((cells[column] for column in _COLOR_COLUMNS if column in cells), None)):
        color = re.findall(r"[\d.]+", text) if not re.fullmatch("#?[0-9a-fA-F]{6}", text) else text
    return NamedClass(
        cells[name], None if color is None else _color(color, said, path), None if number is None else int(number)
    )


def _parsed(line: str, path: Path) -> NamedClass:
    if _YAML.match(line):
        raise DeployError(f"{path} has the line {line[:60]!r}, as YAML of more than classes has; write a class a line")
    line = _BRACKETED.sub(r", \1", line.rstrip(":")).strip(", ")  # CVAT's labelmap.txt has more columns, mostly empty
    match = next(match for pattern in _LINES if (match := pattern.match(line)))
    found = match.groupdict()
    color = found.get("hex") or [found[key] for key in ("red", "green", "blue") if found.get(key)]
    number = None if found.get("number") is None else int(found["number"])
    name = found["name"].strip()
    by_blanks = not re.search(r"[,;:=\t]", line)
    if color and (_FOURTH.search(name) or (by_blanks and re.search(r"\s\d+$", name))):
        raise DeployError(f"{path} has the line {line[:60]!r} of four numbers; write NUMBER,NAME,R,G,B a line")
    if _UNREAD.search(name):
        raise DeployError(
            f"{path} has the line {line[:60]!r}, which is more than a name and not understood; write "
            "NUMBER,NAME,R,G,B a line, or a heading of such columns"
        )
    return NamedClass(name, _color(color, line, path) if color else None, number)


def _color(given: Any, said: object, path: Path) -> Color:
    """A colour of three numbers, or of six hexadecimal digits."""
    if isinstance(given, str) and re.fullmatch("#?[0-9a-fA-F]{6}", given):
        given = bytes.fromhex(given.removeprefix("#"))
    try:
        if any(isinstance(value, float) and not value.is_integer() for value in given):  # shares of 1
            raise ValueError
        red, green, blue = (int(value) for value in given)
    except (TypeError, ValueError):
        red = green = blue = -1
    if not 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
        raise DeployError(f"{path} has the line {said!r}; colours are three numbers from 0 to 255")
    return red, green, blue


def _from_json(text: str, path: Path) -> list[NamedClass]:
    """Of a list of names or of objects, or of an object of names and numbers, as tools write them."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DeployError(f"{path} is no JSON ({error}); write a class a line") from error
    if isinstance(given, dict):
        given = next((given[key] for key in _LISTS if isinstance(given.get(key), list | dict)), given)
    items = [_of_pair(*item, path) for item in given.items()] if isinstance(given, dict) else given
    return [item if isinstance(item, NamedClass) else _of_item(item, path) for item in items]


def _of_pair(key: str, value: Any, path: Path) -> NamedClass:
    """`"0": "road"`, `"road": 0`, `"road": [128, 64, 128]` or `"0": {"name": "road"}`."""
    if isinstance(value, str | dict):
        found = _of_item(value, path)
        if key.isdigit():
            return replace(found, number=int(key))
        return found if isinstance(value, dict) else _strange(path)
    if isinstance(value, list) and not any(isinstance(each, dict | list) for each in value):
        return NamedClass(key, _color(value, key, path))
    return NamedClass(key, None, value) if type(value) is int else _strange(path)


def _of_item(item: Any, path: Path) -> NamedClass:
    if isinstance(item, str):
        return NamedClass(item)
    if not isinstance(item, dict):
        return _strange(path)
    name, number, color = (
        next((item[key] for key in keys if key in item), None) for keys in (_NAMED, _NUMBERED, _COLORED)
    )
    if not isinstance(name, str) or not (number is None or type(number) is int):
        return _strange(path)
    return NamedClass(name, None if color is None else _color(color, name, path), number)


def _strange(path: Path) -> NamedClass:
    raise DeployError(f"{path} is JSON that does not list names of classes; write a class a line")

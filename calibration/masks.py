"""What label files mean: their values or colours as classes, and a question in one line where that cannot be told."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.label_files import VOC_COUNT, Color, StoredLabels, read_labels
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.images.find import IMAGE_SUFFIXES
from fcn_deploy.runtime.model_card import ModelCard, voc_palette
from numpy.typing import NDArray

VOID_NAMES = ("void", "ignore", "ignored", "unlabeled", "unlabelled")
VOC_BORDER = (224, 224, 192)
CHUNK = 1 << 20  # pixels
NO_CLASS = 65535  # of a colour, in a table of all

# `0: road`, `0,road,128,64,128`, `road 128 64 128`, `128 64 128 road` and `road #804080` are all in use.
_NUMBER = r"^(?:\d+\s*[:,;\s]\s*)?"
_TRIPLE = r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)"
_LINES = (
    re.compile(_NUMBER + r"(?P<name>[^\s\d#].*?)[\s,;:]+" + _TRIPLE + r"$"),
    re.compile(_NUMBER + _TRIPLE + r"[\s,;:]+(?P<name>[^\s\d#].*)$"),
    re.compile(_NUMBER + r"(?P<name>[^\s\d#].*?)[\s,;:]+#(?P<hex>[0-9a-fA-F]{6})$"),
)
_HEADING = re.compile(r"^\W*(?:name|class|label)\w*[\s,;]+r(?:ed)?[\s,;]", re.IGNORECASE)


@dataclass(frozen=True)
class MaskOptions:
    """What a user says of label files; None: nothing.

    Attributes:
        values: `0,255`, the values of classes 0, 1, …; or `1=road,2=water,0=void`.
        colors: a file with a name and a colour a line.
    """

    values: str | None = None
    colors: Path | None = None

    def __bool__(self) -> bool:
        return self.values is not None or self.colors is not None


@dataclass(frozen=True)
class LabelMap:
    """How label files write the classes.

    Attributes:
        classes: names, in label order.
        colors: of the classes; by them a palette that was renumbered is told.
        void: a value that is not counted, beside 255; None: there is none.
        values: value → class, or IGNORE; None: a value is its class.
        table: colour → class, or IGNORE, of files with colours; None: nobody said.
        by_color: a palette's colours are the labels, and not its indices.
    """

    classes: Sequence[str]
    colors: Sequence[Color]
    void: int | None = None
    values: Mapping[int, int] | None = None
    table: Mapping[Color, int] | None = None
    by_color: bool = False

    def read(self, path: Path) -> "ReadLabels":
        """The classes of a label file. Raises DeployError where it is none, or holds what is no class's."""
        stored = read_labels(path, self.colors, self.by_color)
        single = stored.single
        if stored.values.ndim == 3 and (single is None or self.by_color or self._has_greys(single)):
            return ReadLabels(self._by_color(stored, path))
        assert single is not None
        return self._by_value(stored, single, path)

    @cached_property
    def _greys(self) -> dict[int, int]:
        """Class by the value of a colour that is a grey."""
        return {red: label for (red, green, blue), label in (self.table or {}).items() if red == green == blue}

    @property
    def _named(self) -> Mapping[int, int] | None:
        """What the values of files of one channel are said to mean; None: a value is its class."""
        return self.values if self.values is not None else self._greys if self.by_color else None

    def _has_greys(self, values: NDArray[Any]) -> bool:
        return self.values is None and self._greys.keys() >= set(present_values(values))

    def _by_value(self, stored: StoredLabels, values: NDArray[Any], path: Path) -> "ReadLabels":
        present = present_values(values, stored.missing)
        meant = self._meant(present, stored.nodata)
        if any(meant[value] is None for value in present) and set(present) <= stored.shown.keys():
            shown = {value: stored.shown[value] for value in present}
            again = self._meant(list(shown.values()), stored.nodata) if self._named is not None else {}
            if again and None not in again.values():  # black and white, stored as 0 and 1
                meant = {value: again[grey] for value, grey in shown.items()}
        unknown = [value for value in present if meant[value] is None]
        if unknown:
            raise DeployError(self._of_no_class(unknown[0] if unknown[0] < 0 else unknown[-1], path))
        labels = _looked_up(values, {value: label for value, label in meant.items() if label is not None})
        if stored.missing is not None:
            labels[stored.missing] = IGNORE
        nodata = stored.nodata if stored.nodata in meant and meant[stored.nodata] == IGNORE else None
        return ReadLabels(labels, frozenset(present), nodata)

    def _meant(self, present: Sequence[int], nodata: int | None) -> dict[int, int | None]:
        """Value → class or IGNORE; None: it means nothing."""
        meant: dict[int, int | None] = {}
        named = self._named
        for value in present:
            if named is not None and value in named:
                meant[value] = named[value]
            elif value in (IGNORE, nodata) or (named is None and value == self.void):
                meant[value] = IGNORE
            else:
                meant[value] = value if named is None and 0 <= value < len(self.classes) else None
        return meant

    def _of_no_class(self, value: int, path: Path) -> str:
        if path.suffix.lower() in (".jpg", ".jpeg", ".jpe"):
            return f"{path} holds value {value}, which is no class's: JPEG changes values; write labels as PNG or TIFF"
        if self.values is not None:
            return (
                f"{path} holds value {value}, which --mask-values does not name; add {value}=CLASS to it, or "
                f"{value}=void"
            )
        if self.by_color:
            return f"{path} holds value {value}, a grey of no class; add it to the colours, or as void"
        count = len(self.classes)
        return (
            f"{path} holds class {value}, and there are {count} classes (0 to {count - 1}; {IGNORE} is ignored); mend "
            "the label, name more classes in classes.txt, or say what values mean: --mask-values VALUE=CLASS,…"
        )

    def _by_color(self, stored: StoredLabels, path: Path) -> NDArray[np.uint8]:
        if self.table is None:
            raise DeployError(
                f"{path} has colours, and nobody said of which class each is; pass --mask-colors FILE with a line "
                "`NAME R G B` for each class, or write class indices in one channel"
            )
        red, green, blue = (stored.values[:, :, band] for band in range(3))
        codes = red.astype(np.uint32) << 16 | green.astype(np.uint32) << 8 | blue
        labels = self._all_colors[codes]
        if stored.missing is not None:
            labels[stored.missing] = IGNORE
        strange = labels == NO_CLASS
        if strange.any():
            code = int(codes[strange][0])
            color = (code >> 16, code >> 8 & 255, code & 255)
            lossy = path.suffix.lower() in (".jpg", ".jpeg", ".jpe")
            remedy = "JPEG changes colours; write labels as PNG" if lossy else "say what it is by --mask-colors FILE"
            raise DeployError(f"{path} has the colour {color} in {int(strange.sum())} pixels, of no class; {remedy}")
        found: NDArray[np.uint8] = labels.astype(np.uint8)
        return found

    @cached_property
    def _all_colors(self) -> NDArray[np.uint16]:
        """Class by colour, R·65536 + G·256 + B."""
        labels = np.full(1 << 24, NO_CLASS, np.uint16)
        for (red, green, blue), label in (self.table or {}).items():
            labels[red << 16 | green << 8 | blue] = label
        return labels


@dataclass(frozen=True)
class ReadLabels:
    """A label file, read.

    Attributes:
        labels: [H, W] uint8: classes, and IGNORE where there is none.
        values: that the file holds, where it has one channel.
        nodata: the value that its tag says is no label, where that was believed.
    """

    labels: NDArray[np.uint8]
    values: frozenset[int] = frozenset()
    nodata: int | None = None


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
        left = f"only {label_map.classes[self.present[0]]!r} is left" if self.present else "no class is left"
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


def label_map_of(
    classes: Sequence[str],
    colors: Sequence[Color],
    masks: MaskOptions,
    *,
    chosen: Mapping[str, Color] | None = None,
    void: int | None = None,
) -> LabelMap:
    """How label files write `classes`.

    Args:
        classes, colors: in label order.
        masks: what the user says.
        chosen: colours by name, of a file that names the classes; void ones may be among them.
        void: a value that is not counted.

    Raises:
        MisuseError: what the user says contradicts itself or the classes.
        DeployError: a damaged file of colours.
    """
    values = parse_values(masks.values, classes)[0] if masks.values is not None else None
    table: dict[Color, int] | None = None
    if masks.colors is not None:
        table = _table(read_colors(masks.colors), classes, masks.colors)
    elif chosen:
        table = {color: _class_of(name, classes) for name, color in chosen.items()}
    elif tuple(colors) != voc_palette(len(colors)) or len(colors) == VOC_COUNT:
        unique = len(set(colors)) == len(colors)
        table = {(c[0], c[1], c[2]): index for index, c in enumerate(colors)} if unique else None
        if table is not None and len(colors) == VOC_COUNT:
            table.setdefault(VOC_BORDER, IGNORE)
    return LabelMap(classes, colors, void, values, table, masks.colors is not None)


def label_map_for(card: ModelCard, masks: MaskOptions) -> LabelMap:
    """How label files write the classes of a model; the value after the last class is void."""
    return label_map_of(card.classes, card.colors, masks, void=len(card.classes))


def parse_values(text: str, classes: Sequence[str] | None) -> tuple[dict[int, int], tuple[str, ...]]:
    """`0,255` or `1=road,2=water,0=void` as value → class or IGNORE, and the names of the classes.

    Args:
        text: of --mask-values.
        classes: that there are; None: those that the text names, in its order.

    Raises:
        MisuseError: not such a text, an unknown class, or a value or class twice.
    """
    said = f"--mask-values {text!r}"
    values, words = _split(text)
    if again := twice(values):
        raise MisuseError(f"{said} has the value {again[0]} twice; name each once")
    if words is None and classes is not None and len(classes) != len(values):
        raise MisuseError(
            f"{said} lists {len(values)} values, and there are {len(classes)} classes "
            f"({', '.join(classes[:4])}{', …' if len(classes) > 4 else ''}); write VALUE=CLASS for those there are"
        )
    listed = [str(index) for index in range(len(values))]
    names = tuple(classes) if classes is not None else _names_of(words or listed)
    if len(names) < 2:
        raise MisuseError(f"{said} names fewer than two classes; a network tells two or more apart")
    if words is None:
        return {value: index for index, value in enumerate(values)}, names
    meant = {value: _class_of(word, names, said) for value, word in zip(values, words, strict=True)}
    if again := twice([label for label in meant.values() if label != IGNORE]):
        both = [str(value) for value, label in meant.items() if label == again[0]]
        raise MisuseError(f"{said} names {names[again[0]]!r} twice, for {' and '.join(both)}; a class has one value")
    return meant, names


def _split(text: str) -> tuple[list[int], list[str] | None]:
    """The values of a map and the words after them; None: it is a list of values. Raises MisuseError."""
    pairs = [part.strip().partition("=") for part in text.split(",")]
    numbers, words = [value.strip() for value, _, _ in pairs], [word.strip() for _, _, word in pairs]
    listed = not any(separator for _, separator, _ in pairs)
    if not (listed or all(words)) or not all(re.fullmatch(r"-?\d{1,10}", number) for number in numbers):
        raise MisuseError(
            f"--mask-values {text!r}; write the values of classes 0, 1, … such as 0,255, or VALUE=CLASS with commas, "
            "such as 1=road,2=water,0=void"
        )
    return [int(number) for number in numbers], None if listed else words


def _names_of(words: Sequence[str]) -> tuple[str, ...]:
    """The classes that a map speaks of, where nothing else names them."""
    own = [word for word in words if word.lower() not in VOID_NAMES]
    if own and all(word.isdigit() for word in own):
        return tuple(f"class {index}" for index in range(min(max(map(int, own)), IGNORE - 1) + 1))
    return tuple(dict.fromkeys(own))


def _class_of(word: str, classes: Sequence[str], where: str = "") -> int:
    """The class that a name or number means, or IGNORE. Raises MisuseError."""
    lower = [name.lower() for name in classes]
    if word in classes:
        return list(classes).index(word)
    if word.lower() in lower:
        return lower.index(word.lower())
    if word.lower() in VOID_NAMES:
        return IGNORE
    if word.isdigit() and int(word) < len(classes):
        return int(word)
    known = ", ".join(classes[:8]) + (", …" if len(classes) > 8 else "")
    raise MisuseError(
        f"{where} names {word!r}, which is no class; the classes are {known} (or their numbers), and void"
    )


def read_colors(path: Path) -> list[tuple[str, Color]]:
    """(name, colour) of a file with `NAME R G B`, `R G B NAME` or `NAME #RRGGBB` a line, void ones among them.

    Raises:
        MisuseError: no such file.
        DeployError: not such a file, or a colour twice.
    """
    found: list[tuple[str, Color]] = []
    for line in class_lines(path):
        name, color = parse_class(line, path)
        if color is None:
            raise DeployError(f"{path} has the line {line!r} without a colour; write NAME R G B a line")
        found.append((name, color))
    if not found:
        raise DeployError(f"{path} is empty; write NAME R G B a line")
    if again := twice([color for _, color in found]):
        raise DeployError(f"{path} has the colour {again[0]} twice; give each class its own")
    return found


def class_lines(path: Path) -> list[str]:
    """The lines of a file of classes that name one."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MisuseError(f"{path} does not exist or is no file; name one with a class a line") from error
    except UnicodeDecodeError as error:
        raise DeployError(f"{path} is no text in UTF-8; write a class a line") from error
    lines = [line for line in lines if line]
    return lines[1:] if lines and _HEADING.match(lines[0]) else lines


def parse_class(line: str, path: Path) -> tuple[str, Color | None]:
    """The name of a line of classes.txt, and its colour where it has one. Raises DeployError."""
    for pattern in _LINES:
        if match := pattern.match(line):
            found = match.groupdict()
            if code := found.get("hex"):
                return found["name"], (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16))
            red, green, blue = (int(text) for text in match.groups() if text.isdigit())
            if max(red, green, blue) > 255:
                raise DeployError(f"{path} has the line {line!r}; colours are three numbers from 0 to 255")
            return found["name"], (red, green, blue)
    return re.sub(r"^\d+\s*[:,\s]\s*", "", line), None


def _table(pairs: Sequence[tuple[str, Color]], classes: Sequence[str], path: Path) -> dict[Color, int]:
    """Colour → class or IGNORE. Raises MisuseError for an unknown class, or one that has two colours."""
    table = {color: _class_of(name, classes, str(path)) for name, color in pairs}
    if again := twice([label for label in table.values() if label != IGNORE]):
        raise MisuseError(f"{path} names {classes[again[0]]!r} twice; a class has one colour")
    return table


def label_files(folder: Path) -> dict[str, Path]:
    """The label files of a folder, by stem. Raises DeployError where an image would have two."""
    by_stem: dict[str, Path] = {}
    for file in sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        if by_stem.setdefault(file.stem, file) != file:
            raise DeployError(f"{by_stem[file.stem]} and {file} are labels of one image; remove one")
    return by_stem


def present_values(values: NDArray[Any], missing: NDArray[np.bool_] | None = None) -> list[int]:
    """The values that occur, in order; of those without a label, none."""
    if missing is not None:
        values = values[~missing]
    if values.dtype in (np.uint8, np.uint16):
        seen, flat = np.zeros(np.iinfo(values.dtype).max + 1, bool), values.ravel()
        for start in range(0, flat.size, CHUNK):  # indices are copied as 64-bit numbers
            seen[flat[start : start + CHUNK]] = True
        return [int(value) for value in np.flatnonzero(seen)]
    return [int(value) for value in np.unique(values)]


def _looked_up(values: NDArray[Any], meant: Mapping[int, int]) -> NDArray[np.uint8]:
    """Each value's label, uint8; IGNORE where there is none."""
    if values.dtype == np.uint8 and all(value == label for value, label in meant.items()):
        return values.copy()
    if values.dtype in (np.uint8, np.uint16):
        table = np.full(np.iinfo(values.dtype).max + 1, IGNORE, np.uint8)
        table[list(meant)] = list(meant.values())
        direct: NDArray[np.uint8] = table[values]
        return direct
    labels = np.full(values.shape, IGNORE, np.uint8)
    for value, label in meant.items():
        labels[values == value] = label
    return labels


def twice(items: Sequence[Any]) -> list[Any]:
    """What was there before."""
    return [item for index, item in enumerate(items) if item in items[:index]]


def _word(classes: Sequence[str], index: int) -> str:
    """A class as --mask-values takes it without quotes."""
    return classes[index] if index < len(classes) and re.fullmatch(r"[\w-]+", classes[index]) else str(index)

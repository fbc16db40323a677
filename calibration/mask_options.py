"""What a user says of label files: values or colours of the classes, as options have them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fcn_deploy.calibration.class_files import VOID_NAMES, twice
from fcn_deploy.calibration.metrics import IGNORE
from fcn_deploy.runtime.errors import MisuseError


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
    names = names_said(text) if classes is None else tuple(classes)
    if len(names) < 2:
        raise MisuseError(f"{said} names fewer than two classes; a network tells two or more apart")
    if words is None:
        return {value: index for index, value in enumerate(values)}, names
    meant = {value: class_of(word, names, said) for value, word in zip(values, words, strict=True)}
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


def names_said(text: str) -> tuple[str, ...]:
    """The names of the classes that a text of --mask-values names, in its order; numbers, where it lists values alone.

    Raises:
        MisuseError: not such a text.
    """
    values, words = _split(text)
    return _names_of(words or [str(index) for index in range(len(values))])


def _names_of(words: Sequence[str]) -> tuple[str, ...]:
    """The classes that a map speaks of, where nothing else names them."""
    own = [word for word in words if word.lower() not in VOID_NAMES]
    if own and all(word.isdigit() for word in own):
        return tuple(f"class {index}" for index in range(min(max(map(int, own)), IGNORE - 1) + 1))
    return tuple(dict.fromkeys(own))


def class_of(word: str, classes: Sequence[str], where: str = "") -> int:
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

"""Options of command lines: how they are declared, and a parser of lines that use them in the plainest way.

Typer, which explains them, takes every other way of writing and refuses what is wrong, is loaded for that alone: with
what it brings it takes as long as an image.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from .errors import DeployError

KNOWN = {"help", "metavar", "min", "parser"}  # settings whose meaning `plainly` knows
NUMBERS = {int: r"\d{1,18}", float: r"\d{1,15}(\.\d{1,15})?"}


@dataclass(frozen=True)
class Declared:
    """What Typer is told of a parameter: words and settings of its Option, or else its Argument."""

    option: bool
    words: tuple[str, ...]
    settings: Mapping[str, Any]

    def for_typer(self) -> Any:
        """As Typer declares it."""
        import typer

        return (typer.Option if self.option else typer.Argument)(*self.words, **self.settings)


def option(*words: str, **settings: Any) -> Any:
    """An option, as typer.Option takes it."""
    return Declared(True, words, settings)


def argument(**settings: Any) -> Any:
    """An argument, as typer.Argument takes it."""
    return Declared(False, (), settings)


@dataclass(frozen=True)
class _Parameter:
    """One that `plainly` takes: its name, the type of its values, whether it takes several, and what is declared."""

    name: str
    kind: type
    several: bool
    declared: Declared

    def value(self, text: str) -> Any:
        """Of one word. Raises ValueError, or DeployError, where it is for Typer to take or to refuse."""
        text.encode()  # names of files may be no text
        if not text or (text == "-" and self.kind is Path):
            raise ValueError(text)
        if (parser := self.declared.settings.get("parser")) is not None:
            return parser(text)
        if self.kind in NUMBERS and re.fullmatch(NUMBERS[self.kind], text, re.ASCII) is None:
            raise ValueError(text)
        value = self.kind(text)
        if (least := self.declared.settings.get("min")) is not None and value < least:
            raise ValueError(text)
        return value


def plainly(parameters: Iterable[inspect.Parameter], words: Sequence[str]) -> dict[str, Any] | None:
    """The values of all parameters, as Typer would give them; None where that is for Typer to tell.

    Args:
        parameters: annotated as `Annotated[type, option(...)]`.
        words: of the command line, behind the program's name. Plain are options spelled in full or by one letter, with
            their value in the next word, and switches; and arguments.
    """
    values: dict[str, Any] = {}
    spelled: dict[str, tuple[_Parameter, bool | None]] = {}
    arguments: list[_Parameter] = []
    for given in parameters:
        found = _known(given)
        if found is None:
            return None
        whole = found.kind is float and isinstance(given.default, int)
        values[given.name] = float(given.default) if whole else given.default
        known = found.declared.settings.keys() <= KNOWN
        if known and found.declared.option:
            spelled |= {word: (found, switch) for word, switch in _spellings(found)}
        elif known:
            arguments.append(found)
        elif not found.declared.option:  # which takes whatever is written
            return None
    rest, behind = iter(words), []
    try:
        for word in rest:
            if not word.startswith("-") or word == "-":
                behind.append(word)
                continue
            parameter, switch = spelled[word]
            text = "" if switch is not None else next(rest)
            if text.startswith("-") and text != "-":
                return None
            values[parameter.name] = parameter.value(text) if switch is None else switch
        for place, parameter in enumerate(arguments, 1):
            count = len(behind) - (len(arguments) - place) if parameter.several else 1
            taken, behind = [parameter.value(text) for text in behind[:count]], behind[count:]
            values[parameter.name] = taken if parameter.several else taken[0]
            if not taken:
                return None
    except (KeyError, IndexError, StopIteration, ValueError, DeployError):
        return None
    return None if behind or inspect.Parameter.empty in values.values() else values


def _known(given: inspect.Parameter) -> _Parameter | None:
    """The parameter as `plainly` takes it; None where it does not."""
    kind, declared = get_args(given.annotation)[:2] if get_origin(given.annotation) is Annotated else (None, None)
    if not isinstance(declared, Declared):
        return None
    if get_origin(kind) in (Union, UnionType):
        kinds = [each for each in get_args(kind) if each is not NoneType]
        kind = kinds[0] if len(kinds) == 1 else None
    several = get_origin(kind) is list and not declared.option
    kind = get_args(kind)[0] if several else kind
    return _Parameter(given.name, kind, several, declared) if kind in (bool, int, float, str, Path) else None


def _spellings(parameter: _Parameter) -> Iterator[tuple[str, bool | None]]:
    """Each word that names an option, and what it switches it to; None where a value follows."""
    words = parameter.declared.words or (f"--{parameter.name.replace('_', '-')}",)
    for word in words:
        if parameter.kind is not bool:
            yield word, None
        elif parameter.declared.words:  # else Typer makes up a second one
            on, _, off = word.partition("/")
            yield on, True
            if off:
                yield off, False

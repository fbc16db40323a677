"""Writes docs/reference/commands.md from the commands themselves: `python docs/commands.py` (`make docs` does)."""

import enum
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from unittest import mock

import typer

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "commands.md"
START = """\
<!-- Written by docs/commands.py from the commands' own help: change that, then run `make docs`. -->
# Commands

Every command has the [options at the end of this page](#options-of-every-command), and tells misuse from failure by its
[exit code](exit-codes.md). `python -m runtime.infer` is `label-images`.
"""
SHARED = ("debug", "version")  # options of every command, told once
HELP = "| `--help` | Show the help and exit. |"
NAMES = {Path: "PATH", int: "N", float: "X", str: "TEXT"}


def commands() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Each console script of pyproject.toml, and the function that Typer makes its command of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, target in project["scripts"].items():
        module, function = target.split(":")
        start = getattr(importlib.import_module(module), function)
        apps: list[typer.Typer] = []
        # A script makes its app and calls it; the call is taken down instead.
        with (
            mock.patch.object(typer.Typer, "__call__", lambda app, *_, apps=apps, **__: apps.append(app)),
            mock.patch.object(sys, "argv", [name]),
        ):
            try:
                start()
            except SystemExit as ended:
                assert not ended.code, ended
        yield name, apps[0].registered_commands[0].callback


def page() -> str:
    """The whole page."""
    parts, shared = [START], {}
    for name, command in commands():
        options, usage = [], [name]
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            spelled, meaning, required = _told(parameter)
            row = f"| `{spelled}` | {_marked(meaning)} |"
            if parameter.name in SHARED:
                shared[parameter.name] = row
            else:
                options.append(row)
            if required:
                usage.append(re.sub(r"^-\w, ", "", spelled))
        help_ = _marked(inspect.getdoc(command) or "", paragraphs=True)
        parts += [f"## {name}\n", f"```\n{' '.join(usage)} [OPTIONS]\n```\n", help_ + "\n", _table(options)]
    parts += ["## Options of every command\n", _table([*shared.values(), HELP])]
    return "\n".join(parts)


def _told(parameter: inspect.Parameter) -> tuple[str, str, bool]:
    """How an option or argument is written, what it means, and whether it must be given."""
    kind, info = get_args(parameter.annotation)[:2] if get_origin(parameter.annotation) is Annotated else (str, None)
    default = parameter.default if parameter.default is not inspect.Parameter.empty else ...
    required = default is ...
    meaning = " ".join((getattr(info, "help", None) or "").split())
    plain = _without_none(kind)
    if isinstance(info, typer.models.ArgumentInfo):
        many = get_origin(plain) in (list, tuple)
        return (info.metavar or parameter.name.upper()) + ("..." if many else ""), meaning, required
    # Typer takes the first name for a default value, until it makes the command.
    names = [name for name in (getattr(info, "default", None), *(getattr(info, "param_decls", None) or ())) if name]
    names = [name for name in names if isinstance(name, str) and name.startswith("-")]
    written = "--" + parameter.name.strip("_").replace("_", "-")
    if plain is bool:
        names = names or [f"{written} / --no-{written[2:]}"]
        default = written if default is True else None
    spelled = ", ".join(names or [written])
    if plain is not bool:
        spelled += f" {getattr(info, 'metavar', None) or _name(plain)}"
    meaning += _range(info)
    if required:
        meaning += " Required."
    elif default not in (None, "", ()) and "[default" not in meaning:
        meaning += f" [default: {getattr(default, 'value', default)}]"
    return spelled, meaning, required


def _without_none(kind: Any) -> Any:
    """X of X | None."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not NoneType)
    return kind


def _name(kind: Any) -> str:
    """What a value of a type is called: its choices, or what it is."""
    choices: list[str] = []
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
    elif inspect.isclass(kind) and issubclass(kind, enum.Enum):
        choices = [str(choice.value) for choice in kind]
    if choices:
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    return NAMES.get(kind, "TEXT")


def _range(info: Any) -> str:
    low, high = getattr(info, "min", None), getattr(info, "max", None)
    if low is None and high is None:
        return ""
    return f" From {low}." if high is None else f" At most {high}." if low is None else f" From {low} to {high}."


def _marked(text: str, paragraphs: bool = False) -> str:
    """Help in Markdown: a bar would end a cell, angle brackets would be a tag, square ones a link."""
    parts = re.split(r"\n\s*\n", text.replace("\b", "")) if paragraphs else [text]
    text = "\n\n".join(" ".join(part.split()) for part in parts)
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _table(rows: list[str]) -> str:
    return "\n".join(["| option | meaning |", "|---|---|", *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())

"""What every command line shares: how it starts, takes options, fails and prints records.

Exit codes, the same for all:
    0    what was asked for is done.
    1    failure: it was asked for in the right way and could not be done: a broken file, a full disk, a package that is
         not installed, an engine that is not accurate enough, some of many images that could not be labelled.
    2    misuse: it cannot be done as it was asked for: an unknown option, a value out of its range, options that
         contradict each other, an input that does not exist, an output that exists and no --force.
    130  interrupted.
"""

import copy
import dataclasses
import gc
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

from .errors import MOST, DeployError, MisuseError, brief
from .options import Declared, option, plainly

FAILURE, MISUSE, INTERRUPTED = 1, 2, 130  # the last is what a shell says of a program that SIGINT has ended
SCHEMA = 1  # of the records of --json; a field that is renamed or changes its meaning makes it one more

Force = Annotated[bool, option("--force", help="Replace outputs that exist already.")]
Json = Annotated[bool, option("--json", help="Print records of JSON instead of text.")]
Threads = Annotated[int | None, option(min=1, help="CPU threads of one run [default: one per physical core].")]


def parse_memory(text: str | int) -> int:
    """Bytes of an amount of memory: `2GB`, `600MB`, or a number of GB (10⁹ bytes). Raises MisuseError."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(GB|MB|G|M)?", str(text).strip().upper())
    amount = float(match[1]) * (1e6 if (match[2] or "G").startswith("M") else 1e9) if match else 0
    if not 1e6 <= amount <= 1e15:
        raise MisuseError(f"memory {text!r}; write an amount from 1MB on, such as 600MB or 2GB, or a number of GB")
    return int(amount)


Memory = Annotated[
    int | None,
    option(
        parser=parse_memory, metavar="GB", help="Memory that images in work may take together, such as 2GB or 600MB."
    ),
]


InputRange = Annotated[
    str | None,
    option(
        metavar="LO,HI",
        help="Values in the files that are the network's 0 and 255 (65535 of uint16, 32767 of int16, 1 of float32), or "
        "percentile: the 1st and 99th of each file [default: as the model's card says, or numbers as they are].",
    ),
]


Strict = Annotated[bool, option("--strict", help="Refuse a file whose values do not look like the network's.")]

NoData = Annotated[
    float | None,
    option(metavar="V", help="Value in the files that is no data (nan too), instead of their own tag."),
]


def run(command: Callable[..., int | None], name: str, renamed: Mapping[str, str] | None = None) -> NoReturn:
    """Run `command` as the program `name` and exit with 0, or what it returns; see above for errors.

    Every command takes --debug and --version too. A parameter whose type is a dataclass stands for an option for each
    of its fields. Errors are one line on standard error; a traceback is shown with --debug only.

    Args:
        command: its annotations say what it takes, by `option` and `argument`, or as Typer does.
        name: as the user calls it.
        renamed: options of earlier releases → what they are called now.
    """
    # What is loaded stays until the end. Looking through it for garbage, at the very end too, is a tenth of the time
    # that one image takes.
    gc.freeze()
    flat = _flattened(command, name)
    debug = "--debug" in sys.argv
    try:
        values = plainly(inspect.signature(flat).parameters.values(), sys.argv[1:])
        code = _by_typer(flat, name) if values is None else flat(**values)
    except KeyboardInterrupt:
        code = fail(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone: `... | head`
        sys.stderr.close()
        code = FAILURE
    except Exception as error:
        usage = hasattr(error, "format_message")  # Typer's own errors (unknown options, bad values): never a traceback
        if debug and not usage:
            raise
        code = fail(name, *_told(error, name, renamed or {}))
    sys.exit(code or 0)


def _by_typer(flat: Callable[..., int | None], name: str) -> int | None:
    """Have Typer parse the command line, and call the command or show its help. Its own errors have format_message."""
    import typer

    given = inspect.signature(flat).parameters.values()
    flat.__signature__ = inspect.Signature([_for_typer(each) for each in given])  # type: ignore[attr-defined]
    flat.__annotations__ = {name: each.annotation for name, each in inspect.signature(flat).parameters.items()}
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(flat)
    try:
        code: int | None = app(prog_name=name, standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:  # Typer has caught the KeyboardInterrupt, and says nothing
        raise KeyboardInterrupt
    return code


def _for_typer(given: inspect.Parameter) -> inspect.Parameter:
    if get_origin(given.annotation) is not Annotated or not isinstance(given.annotation.__metadata__[0], Declared):
        return given
    kind, declared = get_args(given.annotation)[:2]
    return given.replace(annotation=Annotated[kind, declared.for_typer()])


def _told(error: Exception, name: str, renamed: Mapping[str, str]) -> tuple[str, int]:
    """What the user is told of an error, and the exit code."""
    if isinstance(error, DeployError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory; use smaller images or a machine with more", FAILURE
    if hasattr(error, "format_message"):
        option = str(getattr(error, "option_name", ""))
        if option in renamed:
            return f"{option} is called {renamed[option]} now (see {name} --help)", MISUSE
        return f"{error.format_message()} (see {name} --help)", MISUSE
    return f"{type(error).__name__}: {error} (run again with --debug for details)", FAILURE


def fail(name: str, message: str, code: int) -> int:
    """Print one line of MOST characters at most on standard error, and return the exit code."""
    start = f"{name}: error: "
    print(start + brief(" ".join(message.split()), MOST - len(start)), file=sys.stderr)
    return code


def print_note(note: str) -> None:
    """Print what is to be known beside a result, a line of MOST characters at most, on standard error."""
    start = "note: "
    print(start + brief(" ".join(note.split()), MOST - len(start)), file=sys.stderr)


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Show what the packages log, a line each, of MOST characters at most."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Brief("%(levelname)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _Brief(logging.Formatter):
    """Lines as errors are; tracebacks are shown of this package alone, whose they are a fault of."""

    def format(self, record: logging.LogRecord) -> str:
        if not record.name.startswith("fcn_deploy"):
            record = copy.copy(record)
            record.exc_info = record.exc_text = record.stack_info = None
        return super().format(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return brief(super().formatMessage(record))


def print_record(kind: str, fields: Mapping[str, Any]) -> None:
    """Print a record of --json, a line: the schema, what it is of, and its fields (docs/reference/json.md)."""
    print(json.dumps({"schema": SCHEMA, "record": kind} | {**fields}), flush=True)


def _flattened(command: Callable[..., int | None], name: str) -> Callable[..., int | None]:
    """The command with a parameter for each option: dataclasses of options as their fields, --debug and --version."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type, list[str]]] = {}  # parameter → its dataclass and the fields
    parameters: list[inspect.Parameter] = []
    for given in inspect.signature(command).parameters.values():
        kind = hints[given.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(given.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(kind, type)
        types = get_type_hints(kind, include_extras=True)
        fields = dataclasses.fields(kind)
        groups[given.name] = kind, [field.name for field in fields]
        parameters += [_keyword(field.name, types[field.name], field.default) for field in fields]

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"{name} (fcn-deploy {version()})")
            raise SystemExit(0)

    debug = Annotated[bool, option("--debug", help="Show a traceback where something fails.")]
    shown = Annotated[
        bool, option("--version", help="Show the version and exit.", is_eager=True, callback=show_version)
    ]
    parameters += [_keyword("debug", debug, False), _keyword("version", shown, False)]

    @wraps(command)
    def flat(**values: Any) -> int | None:
        del values["debug"], values["version"]
        for parameter, (kind, names) in groups.items():
            values[parameter] = kind(**{each: values.pop(each) for each in names})
        return command(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def version() -> str:
    """Of this package."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of

    try:
        return version_of("fcn-deploy")
    except PackageNotFoundError:  # a clone that is run without being installed
        return "not installed"

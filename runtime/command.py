"""What every command line shares: how it starts, fails and shows tables."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from .errors import DeployError

INTERRUPTED = 130  # what a shell says of a program that SIGINT has ended

Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback where something fails.")]
Force = Annotated[bool, typer.Option("--force", help="Replace outputs that exist already.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads [default: one per core].")]


def run(command: Callable[..., int | None], name: str) -> None:
    """Run `command` as the program `name` and exit: 0, or what it returns; 2 for misuse; 1 for failure.

    Errors are one line on standard error; a traceback is shown with --debug only.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(command)
    debug = "--debug" in sys.argv
    try:
        code = app(prog_name=name, standalone_mode=False)
        if code == INTERRUPTED:  # Typer has caught the KeyboardInterrupt, and says nothing
            fail(name, "interrupted", code)
    except (KeyboardInterrupt, typer.Abort):
        code = fail(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has gone: `... | head`
        sys.stderr.close()
        code = 1
    except DeployError as error:
        if debug:
            raise
        code = fail(name, str(error), error.exit_code)
    except MemoryError:
        if debug:
            raise
        code = fail(name, "out of memory; use smaller images or a machine with more", 1)
    except Exception as error:
        # Typer's own errors (unknown options, bad values) know how to present themselves.
        if debug and not hasattr(error, "format_message"):
            raise
        if hasattr(error, "format_message"):
            code = fail(name, f"{error.format_message()} (see {name} --help)", 2)
        else:
            code = fail(name, f"{type(error).__name__}: {error} (run again with --debug for details)", 1)
    sys.exit(code or 0)


def fail(name: str, message: str, code: int) -> int:
    """Print one line on standard error and return the exit code."""
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def need(module: str, extra: str):
    """Import a module of an extra, or raise DeployError with the line that installs it."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise DeployError(f"{module} is not installed; run: pip install 'fcn-deploy[{extra}]'") from error

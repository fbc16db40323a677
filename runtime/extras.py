"""Modules that come with an extra of the package."""

from importlib import import_module
from types import ModuleType

from .errors import DeployError, one_line


def need(module: str, extra: str) -> ModuleType:
    """Import a module of an extra. Raises DeployError with the line that installs it."""
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        there = isinstance(error, OSError) or (str(error) != "" and not isinstance(error, ModuleNotFoundError))
        what = f"cannot be loaded ({one_line(error, 120)})" if there else "is not installed"
        raise DeployError(f"{module} {what}; run: pip install 'fcn-deploy[{extra}]'") from error

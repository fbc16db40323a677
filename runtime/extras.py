"""Modules that come with an extra of the package."""

from importlib import import_module
from types import ModuleType

from .errors import DeployError


def need(module: str, extra: str) -> ModuleType:
    """Import a module of an extra. Raises DeployError with the line that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DeployError(f"{module} is not installed; run: pip install 'fcn-deploy[{extra}]'") from error

"""Whole numbers in the code that a module runs: near them it may do otherwise, where its questions are not noted."""

import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from fcn_deploy.export.from_torch.sizes_asked import LARGEST_SIDE, OF_PYTORCH

LEAST, MOST = 16, 40  # a number that may be a size; of more of them the larger ones are looked at
OTHERS = (OF_PYTORCH, f"{sysconfig.get_paths()['stdlib']}/")
SCRIPTED = (torch.jit.ScriptModule, torch.jit.ScriptFunction)


Code = Mapping[CodeType, Mapping[str, Any]]  # functions, with the names that each knows


def numbers_in_code(module: torch.nn.Module, code: Code) -> list[int]:
    """Numbers of LEAST to LARGEST_SIDE in the code that a module runs, in what that names, and in what it holds."""
    found = set(_numbers(value for part in module.modules() for value in vars(part).values()))
    for each in code:
        found.update(_numbers(each.co_consts))
    found.update(_numbers(_named(code)))
    found.update(_numbers(scripted(module, code)))
    return sorted(found)[-MOST:]


def scripted(module: torch.nn.Module, code: Code) -> list[Any]:
    """What of a module, of what it holds, and of what its code names, is scripted code that chooses, as by an `if`."""
    held = [each for part in module.modules() for each in (part, *vars(part).values())]
    return [each for each in (*held, *_named(code)) if isinstance(each, SCRIPTED) and _chooses(each)]


def _named(code: Code) -> list[Any]:
    """The values of the names that code knows and asks for."""
    values = [names.get(name) for each, names in code.items() for name in each.co_names]
    return [value for value in values if not isinstance(value, type)]


def _chooses(code: Any) -> bool:
    try:
        return "prim::If" in str(code.inlined_graph)
    except (RuntimeError, AttributeError):  # a container without a method
        return False


def code_of(run: Callable[[], object]) -> Code:
    """The functions that are called, but those of PyTorch, Python and this project."""
    called: dict[CodeType, Mapping[str, Any]] = {}
    before = sys.getprofile()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code not in called:
            called[frame.f_code] = frame.f_globals

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return {code: names for code, names in called.items() if _is_the_modules(code.co_filename, names)}


def _is_the_modules(file: str, names: Mapping[str, Any]) -> bool:
    of_ours = str(names.get("__name__", "")).split(".")[0] == "fcn_deploy"
    return (
        not of_ours and ("site-packages" in file or not file.startswith(OTHERS[1])) and not file.startswith(OTHERS[0])
    )


def _numbers(values: Iterable[Any], depth: int = 2) -> Iterator[int]:
    """The numbers among these, in what they hold, and in scripted code."""
    for value in values:
        if isinstance(value, str) and value.isdecimal() and len(value) < 6:
            value = int(value)
        if type(value) in (int, float) and LEAST <= value <= LARGEST_SIDE:
            yield int(value)
        elif isinstance(value, SCRIPTED) and _chooses(value):
            yield from _numbers(re.findall(r"value=(\d+)\D", str(value.inlined_graph)))
        elif isinstance(value, Mapping | tuple | list | set | frozenset) and depth and len(value) < 1000:
            yield from _numbers(value, depth - 1)

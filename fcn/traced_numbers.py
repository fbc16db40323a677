"""Python's own numbers and functions of numbers, which a module's code makes of sizes, kept in a trace."""

import functools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch


def is_traced(number: object) -> bool:
    """Whether it is a size, or made of sizes, in a trace."""
    return isinstance(number, torch.Tensor) and number.ndim == 0 and torch.jit.is_tracing()


class _LikeNumber(type):
    """Of what stands for a type of number: so are numbers of that type."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__bases__[0])

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[0]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[0])


class _Int(int, metaclass=_LikeNumber):
    def __new__(cls, *given, **base):
        if given and is_traced(given[0]):
            return given[0].to(torch.int64)
        # Numbers with a method `like`, which notes what is made of them (export/from_torch/sizes_asked.py).
        return given[0].like(given[0].__trunc__()) if given and hasattr(given[0], "like") else int(*given, **base)


class _Float(float, metaclass=_LikeNumber):
    def __new__(cls, *given):
        if given and is_traced(given[0]):
            return given[0].to(torch.float32)
        return given[0].like(given[0] * 1.0) if given and hasattr(given[0], "like") else float(*given)


def _round(number, ndigits=None):
    if not is_traced(number):
        return round(number, ndigits)
    return torch.round(number).to(torch.int64) if ndigits is None else torch.round(number, decimals=ndigits)


def _len(value):
    traced = isinstance(value, torch.Tensor) and value.ndim and torch.jit.is_tracing()
    return value.shape[0] if traced else len(value)


def _of_several(plain: Callable, traced: Callable) -> Callable:
    def most(*numbers, **options):
        if options or len(numbers) < 2 or not any(map(is_traced, numbers)):
            return plain(*numbers, **options)
        return functools.reduce(traced, (torch.as_tensor(number) for number in numbers))

    return most


NUMBERS: dict[str, Callable] = {"int": _Int, "float": _Float}
IN_TRACES: dict[str, Callable] = {
    **NUMBERS, "round": _round,
    "len": _len, "max": _of_several(max, torch.maximum), "min": _of_several(min, torch.minimum),
}  # fmt: skip


def _names_of_packages(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The names that the modules of Python know, of the packages that a module's code is in."""
    packages = {kind.__module__.split(".")[0] for part in model.modules() for kind in type(part).__mro__}
    packages -= {"torch", "fcn_deploy", *sys.stdlib_module_names}
    modules = [each for name, each in sys.modules.copy().items() if name.split(".")[0] in packages]
    return [vars(each) for each in modules if isinstance(each, ModuleType)]


def _method(function: Callable) -> Callable:
    return lambda number, *digits: function(number).to(torch.int64)


OF_TENSORS: dict[str, Callable] = {
    "__round__": _method(torch.round), "__ceil__": _method(torch.ceil), "__floor__": _method(torch.floor),
    "__trunc__": _method(torch.trunc), "__divmod__": lambda number, by: (number // by, number % by),
}  # fmt: skip


@contextmanager
def numbers_of_sizes(model: torch.nn.Module) -> Iterator[None]:
    """While it is entered, `int(h)`, `round(h / 2)`, `max(h, 8)`, `math.ceil(h / 2)` stay functions of h in a trace.

    Python makes of a traced size the number that it is in the trace. So in the packages that a module's code is in,
    these names stand for functions that keep it, and tensors have the methods that `math` calls.
    """
    methods = [name for name in OF_TENSORS if name not in vars(torch.Tensor)]
    with standing_for(model, IN_TRACES, {}):
        try:
            for name in methods:
                setattr(torch.Tensor, name, OF_TENSORS[name])
            yield
        finally:
            for name in methods:
                delattr(torch.Tensor, name)


@contextmanager
def standing_for(
    model: torch.nn.Module, names: Mapping[str, Callable], functions: Mapping[Callable, Callable]
) -> Iterator[None]:
    """While it is entered, other functions are called by the code of a module, in the packages that it is in.

    Args:
        names: of Python's own functions → what stands for them where the code has no others of this name.
        functions: of `math` → what stands for them there, by whatever name they are called.
    """
    found = _names_of_packages(model)
    replaced: list[tuple[dict[str, Any], str, Any]] = []

    def put(place: dict[str, Any], name: str, other: Any) -> None:
        replaced.append((place, name, place.get(name)))
        place[name] = other

    try:
        for place in found:
            for name, other in names.items():
                if name not in place:
                    put(place, name, other)
        if functions:
            for place in (vars(math), *found):
                for name, value in list(place.items()):
                    if type(value) is BuiltinFunctionType and value in functions:
                        put(place, name, functions[value])
        yield
    finally:
        for place, name, before in reversed(replaced):
            if before is None:
                place.pop(name, None)
            else:
                place[name] = before

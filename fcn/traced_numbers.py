"""Python's own numbers and functions of numbers, which a module's code makes of sizes, kept in a trace."""

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

LARGEST_SIDE = 1 << 14  # of images, at which numbers made of sizes are compared


def is_traced(number: object) -> bool:
    """Whether it is a size, or made of sizes, in a trace."""
    return isinstance(number, torch.Tensor) and number.ndim == 0 and torch.jit.is_tracing()


def _backwards(function: Callable) -> Callable:
    return lambda number, other: function(other, number)


OPERATIONS: dict[str, Callable] = {
    "add": operator.add, "radd": operator.add, "sub": operator.sub, "rsub": _backwards(operator.sub),
    "mul": operator.mul, "rmul": operator.mul, "div": operator.truediv, "truediv": operator.truediv,
    "rdiv": _backwards(operator.truediv), "rtruediv": _backwards(operator.truediv),
    "floordiv": operator.floordiv, "rfloordiv": _backwards(operator.floordiv), "remainder": operator.mod,
    "pow": operator.pow, "rpow": _backwards(operator.pow), "neg": operator.neg, "float": lambda number: number,
}  # fmt: skip
# Traced numbers that were computed, by their ids: themselves, how, and of what.
_computed: dict[int, tuple[torch.Tensor, str, Sequence[Any]]] = {}


def remember(name: str, given: Sequence[Any], result: object) -> None:
    """Note how a traced number was computed, for `rounded`; anything else is left."""
    name = name.strip("_")
    if is_traced(result) and name in OPERATIONS and all(type(g) in (int, float) or is_traced(g) for g in given):
        _computed[id(result)] = result, name, tuple(given)  # type: ignore[assignment]


def forget() -> None:
    """Drop what was remembered of a trace."""
    _computed.clear()


def rounded(number: torch.Tensor, how: str, size: int | None = None) -> torch.Tensor:
    """A traced number as a whole one; int64, without axes.

    It is rounded in double precision, as Python does, where single gives another at some size: 0.29 · 100 is 28.999…,
    and 29 in single precision.

    Args:
        number: that is traced.
        how: `trunc`, `floor`, `ceil` or `round`.
        size: of a map that is the same for every image, of which the number may be made too.
    """
    if not number.is_floating_point():
        return number.to(torch.int64)
    function = (lambda each: each) if how == "trunc" else getattr(torch, how)  # whole numbers are cut off so anyway
    if _rounds_alike(number, getattr(np, how), size):
        return function(number).to(torch.int64)
    return function(_in_double(number, {})).to(torch.int64).select(0, 0)


def floor_of_product(size: Any, factor: torch.Tensor | float, known: int | None = None) -> Any:
    """A length of so many times a size; `known`: as in `rounded`."""
    length = torch.as_tensor(size * factor)
    remember("mul", (size, factor), length)  # a mode is not called for what it calls itself
    return rounded(length, "floor", known)


@functools.cache
def is_right_in_single(factor: float) -> bool:
    """Whether each size times a factor has the same whole part in single and in double precision."""
    sizes = np.arange(1, LARGEST_SIDE + 1)
    single = (sizes.astype(np.float32) * np.float32(factor)).astype(np.int64)
    return np.array_equal(single, (sizes * factor).astype(np.int64))


def _rounds_alike(number: torch.Tensor, whole: Callable, known: int | None) -> bool:
    """Whether a number comes to the same whole one in single and in double precision, at every size."""
    if id(number) not in _computed:
        return True
    leaves = _leaves(number)
    free = [each for each, leaf in leaves.items() if int(leaf) != known] or list(leaves)
    if len(free) > 1:
        return False
    sizes = dict.fromkeys(leaves, known or 0) | {free[0]: np.arange(1, LARGEST_SIDE + 1)}
    single, double = (
        whole(_computed_of(number, kind, {leaf: np.asarray(side).astype(kind) for leaf, side in sizes.items()}))
        for kind in (np.float32, np.float64)
    )
    return np.array_equal(single, double)


# Each part of a number is computed once: `h = h + -h % 8`, written once for each block, has as many as 2 to the blocks.


def _leaves(number: torch.Tensor) -> dict[int, torch.Tensor]:
    """The sizes that a number was computed of, by their ids."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    waiting: list[Any] = [number]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen and isinstance(each, torch.Tensor):
            seen.add(id(each))
            if id(each) in _computed:
                waiting += _computed[id(each)][2]
            else:
                found[id(each)] = each
    return found


def _computed_of(number: Any, kind: type, known: dict[int, Any]) -> Any:
    """What a number comes to in single or double precision, of what is `known` of others, to which it is added."""
    if not isinstance(number, torch.Tensor):
        return np.asarray(number).astype(kind)
    if id(number) not in known:
        _, name, given = _computed[id(number)]
        known[id(number)] = OPERATIONS[name](*(_computed_of(each, kind, known) for each in given))
    return known[id(number)]


def _in_double(number: Any, known: dict[int, torch.Tensor]) -> torch.Tensor:
    """Computed again, float64 [1]: without an axis, the older exporter would write it in single precision."""
    if id(number) not in _computed:
        return torch.as_tensor(number, dtype=torch.float64).reshape(1)
    if id(number) not in known:
        _, name, given = _computed[id(number)]
        known[id(number)] = OPERATIONS[name](*(_in_double(each, known) for each in given))
    return known[id(number)]


class _LikeNumber(type):
    """Of what stands for a type of number: so are numbers of that type, and it has that type's name."""

    def __new__(cls, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> type:
        return super().__new__(cls, bases[0].__name__, bases, names | {"__module__": "builtins"})

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__bases__[0])

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.__bases__[0])

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__bases__[0]

    def __hash__(cls) -> int:
        return hash(cls.__bases__[0])


class _Int(int, metaclass=_LikeNumber):
    def __new__(cls, *given, **base):
        if given and is_traced(given[0]):
            return rounded(given[0], "trunc")
        # Numbers with a method `like`, which notes what is made of them (export/from_torch/sizes_asked.py).
        return given[0].like(given[0].__trunc__()) if given and hasattr(given[0], "like") else int(*given, **base)


class _Float(float, metaclass=_LikeNumber):
    def __new__(cls, *given):
        if given and is_traced(given[0]):
            number = given[0].to(torch.float32)
            remember("float", given, number)
            return number
        return given[0].like(given[0] * 1.0) if given and hasattr(given[0], "like") else float(*given)


class _LikeType(type):
    """Of what stands for `type`: so are all types."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, type)

    def __call__(cls, *given, **options):
        made = type(*given, **options)
        return STANDING_FOR.get(made, made) if len(given) == 1 else made


class _Type(type, metaclass=_LikeType):
    """`type`, by which a number is of what stands for its type, as in `type(value) is int`."""


STANDING_FOR: dict[type, type] = {int: _Int, float: _Float}


def _round(number, ndigits=None):
    if not is_traced(number):
        return round(number, ndigits)
    return rounded(number, "round") if ndigits is None else torch.round(number, decimals=ndigits)


def _len(value):
    traced = isinstance(value, torch.Tensor) and value.ndim and torch.jit.is_tracing()
    return value.shape[0] if traced else len(value)


def _of_several(plain: Callable, traced: Callable) -> Callable:
    def most(*numbers, **options):
        if options or len(numbers) < 2 or not any(map(is_traced, numbers)):
            return plain(*numbers, **options)
        return functools.reduce(traced, (torch.as_tensor(number) for number in numbers))

    return most


NUMBERS: dict[str, Callable] = {"int": _Int, "float": _Float, "type": _Type}
IN_TRACES: dict[str, Callable] = {
    **NUMBERS, "round": _round,
    "len": _len, "max": _of_several(max, torch.maximum), "min": _of_several(min, torch.minimum),
}  # fmt: skip


OTHERS = {"torch", "numpy", "fcn_deploy", *sys.stdlib_module_names} - {"__main__"}


def names_of_packages(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The names that the modules of Python know, of the packages that a module's code is in.

    And of those whose functions a module or its class holds, or which are named there, as a helper that is imported is.
    """
    kinds = {
        kind for part in model.modules() for kind in type(part).__mro__ if package_of(kind.__module__) not in OTHERS
    }
    packages = {package_of(kind.__module__) for kind in kinds}
    modules = [each for name, each in sys.modules.copy().items() if package_of(name) in packages]
    waiting = [vars(each) for each in modules if isinstance(each, ModuleType)]
    waiting += [dict(vars(each)) for each in (*model.modules(), *kinds)]
    found: dict[int, dict[str, Any]] = {}
    while waiting:
        names = waiting.pop()
        if "__builtins__" in names:  # of a module of Python, and not of what a network holds
            found[id(names)] = names
        for value in list(names.values()):
            for other in names_known_to(value):
                if id(other) not in found and package_of(str(other.get("__name__", ""))) not in OTHERS:
                    found[id(other)] = other
                    waiting.append(other)
    return list(found.values())


def names_known_to(value: Any) -> Iterator[dict[str, Any]]:
    """Of a module of Python, and of a function, and those that it wraps, binds or closes over."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        kind = type(value)  # `isinstance` would ask objects that stand for others, some of which raise
        if kind is FunctionType and id(value) not in seen:
            seen.add(id(value))
            yield value.__globals__
            waiting += [cell.cell_contents for cell in value.__closure__ or () if is_filled(cell)]
        elif kind is MethodType:
            waiting.append(value.__func__)
        elif kind is functools.partial:
            waiting += [value.func, *value.args, *value.keywords.values()]
        elif issubclass(kind, ModuleType):
            yield vars(value)


def is_filled(cell: Any) -> bool:
    """Whether a cell of a closure holds something."""
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def package_of(name: str) -> str:
    """The package of a module of Python."""
    return name.split(".")[0]


OF_NO_TYPE = {name: function for name, function in IN_TRACES.items() if name not in NUMBERS}


def _method(how: str) -> Callable:
    return lambda number, *digits: rounded(number, how)


OF_TENSORS: dict[str, Callable] = {
    "__round__": _method("round"), "__ceil__": _method("ceil"), "__floor__": _method("floor"),
    "__trunc__": _method("trunc"), "__divmod__": lambda number, by: (number // by, number % by),
}  # fmt: skip


@contextmanager
def numbers_of_sizes(model: torch.nn.Module, types: bool = True) -> Iterator[None]:
    """While it is entered, `int(h)`, `round(h / 2)`, `max(h, 8)`, `math.ceil(h / 2)` stay functions of h in a trace.

    Python makes of a traced size the number that it is in the trace. So in the packages that a module's code is in, and
    in those that they import, these names stand for functions that keep it, and tensors have the methods that `math`
    calls. `types`: `int` and `float` too, which PyTorch then takes for no `dtype`.
    """
    methods = [name for name in OF_TENSORS if name not in vars(torch.Tensor)]
    with standing_for(model, IN_TRACES if types else OF_NO_TYPE, {}):
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
    """While it is entered, other functions are called by the code of a module, and of what that imports.

    Args:
        names: of Python's own functions → what stands for them where the code has no others of this name.
        functions: of `math` → what stands for them there, by whatever name they are called.
    """
    found = names_of_packages(model)
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

"""The sizes that a module's code asks about, as `if h > 512` does: at which others such comparisons come out otherwise.

While a module is followed, the sizes that it asks its tensors for are numbers that note what they are compared with,
and so are numbers that are computed of them, by `int`, `math` and NumPy too. From each comparison follows where it
turns, one side of the image being what it is; there the module is followed again, and asks about more. What else is
made of a size, such as a key or a text, is noted as lost.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fcn_deploy.fcn.traced_numbers import LARGEST_SIDE, NUMBERS, standing_for
from torch.overrides import TorchFunctionMode

Size = tuple[int, int]


class Asked(dict[tuple[Any, ...], tuple[float, float]]):
    """Place in the code, number that is compared with, and how often that was done there before → (number that was made
    of sizes, what it is compared with).

    Attributes:
        lost: place in the code → what was made of a size there, of which no comparison can be noted.
        chose: places at which a number that was made of sizes chose by being 0 or not.
        rests: place in the code → (number that was divided there, what by, the rests that are asked for).
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost: dict[tuple[Any, ...], str] = {}
        self.chose: set[tuple[Any, ...]] = set()
        self.rests: dict[tuple[Any, ...], tuple[int, int, set[int]]] = {}


COMPUTED = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__rfloordiv__", "__truediv__",
    "__rtruediv__", "__mod__", "__rmod__", "__pow__", "__rpow__", "__neg__", "__abs__", "__round__", "__ceil__",
    "__floor__", "__trunc__", "__divmod__", "__rdivmod__", "__and__", "__rand__", "__or__", "__ror__", "__xor__",
    "__rxor__", "__rshift__", "__rrshift__", "__lshift__", "__rlshift__", "__pos__", "__invert__", "bit_length",
    "bit_count", "conjugate",
)  # fmt: skip
DIVIDED = ("__floordiv__", "__mod__", "__divmod__", "__rshift__")  # by a larger number: another result from there on
COMPARED = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
RESTS = ("__mod__", "__divmod__", "__and__")
MOST_REST = 1024  # that rests are looked for of
OF_TENSORS = ("size", "numel", "nelement", "stride", "nbytes")  # what tensors are asked for, that is made of sizes
LOST = {
    "__int__": "int() or an array", "__float__": "float()", "__hash__": "a key", "__str__": "a text",
    "__repr__": "a text", "__format__": "a text",
}  # fmt: skip
OF_MATH = (
    "sqrt", "isqrt", "cbrt", "log", "log2", "log10", "log1p", "exp", "exp2", "pow", "hypot", "dist", "gcd", "lcm",
    "fmod", "fabs", "prod", "fsum", "ldexp", "sin", "cos", "tan", "atan", "atan2", "tanh",
)  # fmt: skip
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
TIMES = 4  # that one place in the code is noted: both sides may be compared there, and maps of several strides
OF_PYTORCH = f"{torch.__path__[0]}{os.sep}"
OURS = str(Path(__file__).parent)


class _Number:
    """A number that was computed of sizes."""

    asked: Asked

    def like(self, number: Any) -> Any:
        """Another that was made of it."""
        return _noting(number, self.asked)

    def __array_ufunc__(self, function, method, *given, **options):
        result = getattr(function, method)(*map(_plain, given), **options)
        return self.like(result.item()) if getattr(result, "ndim", None) == 0 else result


class _Whole(_Number, int):
    """A size, or a whole number that was computed of sizes.

    Attributes:
        rest: the place in `asked.rests` of the division that it is the rest of; None: it is none.
    """

    rest: tuple[Any, ...] | None = None
    real = numerator = property(lambda self: self)


class _Part(_Number, float):
    """A number that was computed of sizes, as by a division."""


def _plain(number: Any) -> Any:
    """A number of Python itself; anything else as it is."""
    if isinstance(number, _Whole):
        return int.__int__(number)
    return float.__float__(number) if isinstance(number, _Part) else number


def _place(depth: int = 2) -> tuple[Any, ...] | None:
    """Where the code is that calls; None: in PyTorch, or here."""
    frame = sys._getframe(depth)
    name = frame.f_code.co_filename
    return None if name.startswith((OF_PYTORCH, OURS)) else (frame.f_code, frame.f_lasti)


def _noting(number: Any, asked: Asked) -> Any:
    """A number that notes what it, and what is computed of it, is compared with; anything else as it is."""
    if type(number) is tuple:
        return tuple(_noting(each, asked) for each in number)
    kind = {int: _Whole, float: _Part}.get(type(number))
    if kind is None:
        return number
    made = kind(number)
    made.asked = asked
    return made


def _computed(kind: type, name: str) -> Callable:
    plain = getattr(kind, name)

    def method(self, *others):
        if name in DIVIDED and isinstance(others[0], int | float) and (place := _place()) is not None:
            by = _plain(others[0])
            by = 2**by if name == "__rshift__" else by
            if 0 < plain_value(self) < by:
                self.asked.setdefault((*place, "by", by), (plain_value(self), by))
        result = plain(self, *others)
        if result is NotImplemented and others and isinstance(others[0], float):
            result = getattr(float, name)(plain_value(self), *others)
        result = _noting(result, self.asked)
        if name in RESTS and isinstance(others[0], int) and (place := _place()) is not None:
            by = int.__add__(others[0], name == "__and__")
            if 1 < by <= MOST_REST:
                rest = result[1] if name == "__divmod__" else result
                rest.rest = (*place, by)
                self.asked.rests.setdefault(rest.rest, (_plain(self), by, {0}))
        return result

    return method


def plain_value(number: Any) -> float:
    """The number alone, as a float."""
    return float(_plain(number))


def _compared(kind: type, name: str) -> Callable:
    plain = getattr(kind, name)

    def method(self, other):
        if isinstance(other, int | float) and (place := _place()) is not None:
            if (rest := getattr(self, "rest", None)) is not None and math.isfinite(plain_value(other)):
                _, by, rests = self.asked.rests[rest]
                rests.update(int(plain_value(other) + beside) % by for beside in (-1, 0, 1))
            constant = None if isinstance(other, _Number) else other
            for before in range(TIMES):
                if (*place, constant, before) not in self.asked:
                    self.asked[*place, constant, before] = (plain_value(self), plain_value(other))
                    break
        return plain(self, other)

    return method


def _lost(kind: type, name: str) -> Callable:
    plain = getattr(kind, name)

    def method(self, *given):
        if (place := _place()) is not None:
            self.asked.lost.setdefault(place, LOST[name])
        return plain(self, *given)

    return method


def _chosen(kind: type) -> Callable:
    plain: Callable = kind.__bool__  # type: ignore[attr-defined]

    def method(self):
        if (place := _place()) is not None:
            self.asked.chose.add(place)
        return plain(self)

    return method


for _kind, _of in ((_Whole, int), (_Part, float)):
    for _names, _made in ((COMPUTED, _computed), (COMPARED, _compared), (LOST, _lost)):
        for _name in _names:
            if hasattr(_of, _name):
                setattr(_kind, _name, _made(_of, _name))
    _kind.__bool__ = _chosen(_of)  # type: ignore[method-assign]


def _of_math(function: Callable) -> Callable:
    """A function of `math` whose result notes, where it is given a number that does."""

    def kept(*given, **options):
        numbers = [each for group in given for each in (group if isinstance(group, tuple | list) else (group,))]
        noting = next((each for each in numbers if isinstance(each, _Number)), None)
        if noting is None:
            return function(*given, **options)
        plain = (type(g)(map(_plain, g)) if isinstance(g, tuple | list) else _plain(g) for g in given)
        return noting.like(function(*plain, **options))

    return kept


NOTING = {getattr(math, name): _of_math(getattr(math, name)) for name in OF_MATH if hasattr(math, name)}


def _length(value: Any) -> Any:
    """`len`, whose result notes, where that is of a tensor, or of the tensors that one was taken apart into."""
    if isinstance(value, torch.Tensor) and value.ndim:
        return value.shape[0]
    first = value[0] if type(value) in (tuple, list) and value else None
    side = first.shape[0] if isinstance(first, torch.Tensor) and first.ndim else None
    return side.like(len(value)) if isinstance(side, _Number) else len(value)


@contextmanager
def numbers_noted(model: torch.nn.Module, types: bool = True) -> Iterator[None]:
    """While it is entered, numbers that a module's code makes of sizes by `int`, `float`, `len` and `math` note, too.

    `types`: by `int` and `float`, too, which PyTorch then takes for no `dtype`.
    """
    with standing_for(model, {**(NUMBERS if types else {}), "len": _length}, NOTING):
        yield


class Asking(TorchFunctionMode):
    """While it is entered, what a module compares sizes with is noted, and recurrent layers give shapes alone.

    PyTorch refuses those where weights are on another device than the image.

    Attributes:
        asked: the comparisons, in order; the first few of each place in the code.
    """

    def __init__(self, note: Callable[[str, Sequence[Any]], None]) -> None:
        """`note`: called with the name of a recurrent layer's function and its arguments."""
        super().__init__()
        self.asked = Asked()
        self._note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in RECURRENT and len(args) == 9:  # not packed
            self._note(name, args)
            return _recurrent(*args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Size):
            return torch.Size(_noting(side, self.asked) for side in result)
        asked_for = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
        return _noting(result, self.asked) if asked_for in OF_TENSORS else result


def _recurrent(image, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first) -> Any:
    """What a recurrent layer gives: a result for each step, and its last state."""
    last = state[0] if isinstance(state, tuple | list) else state
    result = image.new_empty(*image.shape[:-1], last.shape[-1] * (2 if bidirectional else 1))
    return (result, *(state if isinstance(state, tuple | list) else (state,)))


def constant(traces: Sequence[Mapping[tuple[Any, ...], Any]]) -> set[tuple[Any, ...]]:
    """Places in the code where numbers were the same at all sizes, as those of channels are."""
    places = set.intersection(*(set(asked) for asked in traces))
    return {place for place in places if len({asked[place] for asked in traces}) == 1}


def where_it_turns(size: Size, asked: Iterable[tuple[float, float]], multiple: int, unit: int) -> Iterator[Size]:
    """Sizes at and beside which comparisons that were made at a size come out otherwise, one side staying what it is.

    Args:
        size: (height, width) of the image.
        asked: at that size.
        multiple: that sides are of.
        unit: a multiple of it, of which some sides are too.
    """
    for value, other in asked:
        if not (0 < value < math.inf and 0 < other < math.inf) or value == other:
            continue
        for axis, side in enumerate(size):
            turn, stride = side * other / value, max(round(side / value), 1)
            for step in (multiple, unit):
                near = {step * round((turn + by) / step) for by in (-stride, 0, stride)}
                near |= {step * (math.floor(turn / step) + by) for by in (-1, 0, 1, 2)}
                for each in sorted(near):
                    if 0 < each <= LARGEST_SIDE:
                        yield (each, size[1]) if axis == 0 else (size[0], each)


def where_rests_are(size: Size, rests: Iterable[tuple[int, int, Iterable[int]]], multiple: int) -> Iterator[Size]:
    """Sizes, beyond one at which numbers were divided, at which the rests are those that are asked for.

    Args:
        size: (height, width) of the image.
        rests: at that size: (number, what it is divided by, the rests).
        multiple: that sides are of.
    """
    for number, by, wanted in rests:
        for rest in sorted(wanted):
            sides = [
                next(
                    (
                        beyond
                        for beyond in range(side + multiple, side + (by + 1) * multiple, multiple)
                        if round(number * beyond / side) % by == rest
                    ),
                    None,
                )
                for side in size
            ]
            if sides[0] is not None:
                yield sides[0], size[1]
            if sides[1] is not None:
                yield size[0], sides[1]
            if sides[0] is not None and sides[1] is not None:
                yield sides[0], sides[1]

"""The sizes that a module's code asks about, as `if h > 512` does: at which others such comparisons come out otherwise.

While a module is followed, the sizes that it asks its tensors for are numbers that note what they are compared with,
and so are numbers that are computed of them. From each comparison follows where it turns, one side of the image being
what it is; there the module is followed again, and asks about more.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Size = tuple[int, int]
# Place in the code, number that is compared with, and how often that was done there before → (number that was made of
# sizes, what it is compared with).
Asked = dict[tuple[Any, ...], tuple[float, float]]

COMPUTED = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__floordiv__", "__rfloordiv__", "__truediv__",
    "__rtruediv__", "__mod__", "__rmod__", "__pow__", "__neg__", "__abs__", "__round__", "__ceil__", "__floor__",
)  # fmt: skip
COMPARED = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
TIMES = 4  # that one place in the code is noted: both sides may be compared there, and maps of several strides
LARGEST_SIDE = 1 << 14
OF_PYTORCH = f"{torch.__path__[0]}{os.sep}"


class _Whole(int):
    """A size, or a whole number that was computed of sizes."""

    asked: Asked
    __hash__ = int.__hash__


class _Part(float):
    """A number that was computed of sizes, as by a division."""

    asked: Asked
    __hash__ = float.__hash__


def _noting(number: Any, asked: Asked) -> Any:
    """A number that notes what it, and what is computed of it, is compared with; anything else as it is."""
    kind = {int: _Whole, float: _Part}.get(type(number))
    if kind is None:
        return number
    made = kind(number)
    made.asked = asked
    return made


def _computed(kind: type, name: str) -> Callable:
    plain = getattr(kind, name)

    def method(self, *others):
        result = plain(self, *others)
        if result is NotImplemented and others and isinstance(others[0], float):
            result = getattr(float, name)(float(self), *others)
        return _noting(result, self.asked)

    return method


def _compared(kind: type, name: str) -> Callable:
    plain = getattr(kind, name)

    def method(self, other):
        frame = sys._getframe(1)
        if isinstance(other, int | float) and not frame.f_code.co_filename.startswith(OF_PYTORCH):
            constant = None if isinstance(other, _Whole | _Part) else other
            for before in range(TIMES):
                place = (frame.f_code, frame.f_lasti, constant, before)
                if place not in self.asked:
                    self.asked[place] = (float(self), float(other))
                    break
        return plain(self, other)

    return method


for _kind, _plain in ((_Whole, int), (_Part, float)):
    for _name in COMPUTED:
        setattr(_kind, _name, _computed(_plain, _name))
    for _name in COMPARED:
        setattr(_kind, _name, _compared(_plain, _name))


class Asking(TorchFunctionMode):
    """While it is entered, what a module compares sizes with is noted, and recurrent layers give shapes alone.

    PyTorch refuses those where weights are on another device than the image.

    Attributes:
        asked: the comparisons, in order; the first few of each place in the code.
    """

    def __init__(self, note: Callable[[str, Sequence[Any]], None]) -> None:
        """`note`: called with the name of a recurrent layer's function and its arguments."""
        super().__init__()
        self.asked: Asked = {}
        self._note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in RECURRENT and len(args) == 9:  # not packed
            self._note(name, args)
            return _recurrent(*args)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Size):
            return torch.Size(_noting(side, self.asked) for side in result)
        return _noting(result, self.asked) if name in ("size", "numel") else result


def _recurrent(image, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first) -> Any:
    """What a recurrent layer gives: a result for each step, and its last state."""
    last = state[0] if isinstance(state, tuple | list) else state
    result = image.new_empty(*image.shape[:-1], last.shape[-1] * (2 if bidirectional else 1))
    return (result, *(state if isinstance(state, tuple | list) else (state,)))


def constant(traces: Sequence[Mapping[tuple[Any, ...], tuple[float, float]]]) -> set[tuple[Any, ...]]:
    """Places in the code where numbers were the same at all sizes, as those of channels are."""
    places = {place for asked in traces for place in asked}
    return {place for place in places if len({asked[place] for asked in traces if place in asked}) == 1}


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

"""What a module does at other sizes than it is compared at: another path, or other numbers, and it is compared there.

A module is followed without computing anything, on PyTorch's meta device, where an image of 4224×4224 takes
milliseconds. The operators that it calls, and the weights and numbers that it gives them, are written down at some
sizes. At a larger one, and at those that its code asks about, operators and weights are to be the same, and each number
what it was or what its growth by H, W and H·W makes of it.
Where something else is seen, as of `if h > 512`, the exported graph is run beside the module at that size.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, run_quietly
from fcn_deploy.export.from_torch.network import Network
from fcn_deploy.export.from_torch.sizes_asked import Asked, Asking, constant, where_it_turns
from fcn_deploy.export.from_torch.verify import VERIFIED_SIZES, ExpectedScores
from fcn_deploy.export.tolerances import EXPORTED_MODEL
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError, one_line
from torch.utils._python_dispatch import TorchDispatchMode

Size = tuple[int, int]

UNIT = 32  # pixels, or the network's multiple, that sizes are counted in: maps of most strides are whole
USUAL = ((2, 3), (3, 2), (2, 5), (4, 3), (5, 4), (3, 7))  # units
LARGER = 4224  # pixels of a side, with the other short or equal: beyond the numbers that code asks for
LARGER_UNFOLLOWED = 1056  # the same of a module that cannot be followed, and is computed there
SHORT = 2  # units
MOST_FOLLOWED, MOST_KINDS = 300, 8  # sizes that are looked at because code asks about them, and that are compared
SAID = 60  # characters of why a module cannot be followed
MOST_PIXELS = 1_500_000  # of an image that is run to be compared
MOST_BYTES = 400e6  # of its largest tensor, of which several are held at once
TIMES_LONGER = 50  # a module that calls so many times the operators loops over places; that is seen elsewhere
ACTIVATIONS = ("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "silu")
STRENGTHS = (0.03, 0.3, 30.0, 1000.0)  # of noise, for what looks at the values of the image


class _ValuesReadError(Exception):
    """A module makes a number of Python of its image's values."""


class _Called(TorchDispatchMode):
    """While it is entered, operators are noted and run without values: tensors are moved to the meta device.

    Attributes:
        operators: their names, in order, and of what they were given the kind of each number, which weights, and all
            else, such as a mode.
        numbers: that they were given, in order.
        largest: bytes of the largest tensor that they gave.
    """

    def __init__(self, image: torch.Tensor, most: float, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.numbers: list[float] = []
        self.largest = 0
        self._most, self._weights = most, weights
        self._moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps what it moved, so that ids stay theirs
        self._of_image = {id(image): image}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would load its compiler, a second long, to keep that from looking in here

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = [*_leaves(args), *_leaves((kwargs or {}).values())]
        of_image = any(id(leaf) in self._of_image for leaf in leaves)
        if func is torch.ops.aten._local_scalar_dense.default:
            if of_image:
                raise _ValuesReadError
            return args[0].item() if args[0].device.type != "meta" else func(*args)
        self.note(str(func), leaves)
        args, kwargs = self._on_meta(args), {name: self._on_meta(value) for name, value in (kwargs or {}).items()}
        result = _known_shapes(func, args)
        result = func(*args, **kwargs) if result is None else result
        tensors = [leaf for leaf in _leaves((result,)) if isinstance(leaf, torch.Tensor)]
        self.largest = max((self.largest, *(each.numel() * each.element_size() for each in tensors)))
        if of_image:
            self._of_image |= {id(each): each for each in tensors}
        return result

    def note(self, name: str, leaves: Sequence[Any]) -> None:
        """Write an operator down, with what it is given."""
        self.operators.append(name)
        if len(self.operators) > self._most:
            raise DeployError("a loop over places")
        for leaf in _leaves(leaves):
            if isinstance(leaf, bool | int | float):
                self.numbers.append(float(leaf))
                self.operators.append("number")
            elif isinstance(leaf, torch.Tensor):
                self.operators.append("" if leaf.device.type == "meta" else self._weights.get(leaf.data_ptr(), ""))
            elif not isinstance(leaf, torch.device):
                self.operators.append(str(leaf))

    def _on_meta(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(self._on_meta, value))
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, torch.Tensor) or value.device.type == "meta":
            return value
        if id(value) not in self._moved:
            self._moved[id(value)] = value, _like(value)
        return self._moved[id(value)][1]


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What is in the arguments of an operator, lists of tensors and of numbers among them."""
    for value in values:  # PyTorch's tree_flatten takes a third of the time of following a module
        if isinstance(value, tuple | list):
            yield from _leaves(value)
        else:
            yield value


def _known_shapes(func, args: Sequence[Any]) -> Any:
    """What operators give for whose shapes PyTorch runs Python, and loads its compiler; None: another operator."""
    name = func.overloadpacket.__name__
    if name.startswith("upsample_") and isinstance(args[1], list | tuple):
        return args[0].new_empty((*args[0].shape[:2], *args[1]))
    if name in ACTIVATIONS:
        return _like(args[0])
    if name.removesuffix("_") in ACTIVATIONS:
        return args[0]
    if name == "cat":
        maps, axis = args[0], args[1] if len(args) > 1 else 0
        if len({each.ndim for each in maps}) == 1 and len({each.dtype for each in maps}) == 1:
            shape = list(maps[0].shape)
            shape[axis] = sum(each.shape[axis] for each in maps)
            return maps[0].new_empty(shape)
    if name in ("native_batch_norm", "native_layer_norm", "native_group_norm"):
        return _like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
    return None


def _like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@dataclass(frozen=True)
class _Trace:
    """What a module did at a size: its operators, the numbers that they were given, the largest tensor in bytes, and
    what its code compared sizes with.
    """

    size: Size
    operators: tuple[str, ...]
    numbers: np.ndarray
    largest: int
    asked: Asked


class _Law:
    """What a module does at usual sizes: the operators, and each number as a + b·H + c·W + d·H·W, where it is so."""

    def __init__(self, traces: Sequence[_Trace]) -> None:
        self.longest = max(len(trace.operators) for trace in traces)
        self._paths: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray] | None] = {}
        for operators in dict.fromkeys(trace.operators for trace in traces):
            same = [trace for trace in traces if trace.operators == operators]
            self._paths[operators] = _fitted(same)

    def holds(self, trace: _Trace) -> bool:
        """Whether a module does the same at another size."""
        if trace.operators not in self._paths:
            return False
        found = self._paths[trace.operators]
        if found is None:
            return True
        terms, known = found
        expected = _terms(trace.size) @ terms
        return bool(_are_equal(expected, trace.numbers)[known].all())


class _Known:
    """What a module did at all sizes that are known: the operators, and numbers that were the same at all of them."""

    def __init__(self, traces: Sequence[_Trace]) -> None:
        self._paths: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
        for operators in dict.fromkeys(trace.operators for trace in traces):
            numbers = np.stack([trace.numbers for trace in traces if trace.operators == operators])
            self._paths[operators] = numbers[0], (numbers == numbers[0]).all(axis=0)

    def constants(self, trace: _Trace) -> tuple[float, ...]:
        """The numbers of a trace that were the same at all known sizes; () where its path is not known."""
        found = self._paths.get(trace.operators)
        return () if found is None else tuple(trace.numbers[found[1]])

    def holds(self, trace: _Trace) -> bool:
        """Whether a module does the same at another size, but for numbers that change with the size."""
        found = self._paths.get(trace.operators)
        return found is not None and np.array_equal(found[0][found[1]], trace.numbers[found[1]])


def _fitted(traces: Sequence[_Trace]) -> tuple[np.ndarray, np.ndarray] | None:
    """(coefficients [4, numbers], which numbers go by them) of traces of one path; None: they are too few to tell."""
    if len(traces) <= len(_terms((1, 1))):
        return None
    terms = np.stack([_terms(trace.size) for trace in traces])
    numbers = np.stack([trace.numbers for trace in traces])
    with np.errstate(invalid="ignore"):
        found = np.linalg.lstsq(terms, np.nan_to_num(numbers, posinf=0, neginf=0), rcond=None)[0]
        return found, np.all(_are_equal(terms @ found, numbers), axis=0)


def _terms(size: Size) -> np.ndarray:
    height, width = size
    return np.array([1.0, height, width, height * width])


def _are_equal(numbers: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.abs(numbers - others) <= 1e-6 * np.maximum(1, np.abs(others))


def compare_at_larger_sizes(
    network: Network, graph: onnx.ModelProto, expected: ExpectedScores, sizes: AcceptedSizes
) -> list[str]:
    """Run a graph beside its module at larger sizes where that does otherwise than at those that were compared.

    Args:
        network: the module, on the CPU.
        graph: that takes every size, as it was compared.
        expected: of the module, at every size.
        sizes: that the graph runs the module at.

    Returns:
        What could not be compared, a line each.

    Raises:
        DeployError: they differ: names the size.
    """
    if network.ours or sizes.only is not None:
        return []
    try:
        followed = _Followed(network, sizes)
    except _ValuesReadError:
        _compare_other_values(network, graph, expected)
        return []
    except Exception as error:
        return [_compare_unfollowed(network, graph, expected, sizes, one_line(error, SAID))]
    for first, size in followed.larger():
        if not followed.can_be_run(first):
            return [f"{network.name} does otherwise from {_text(first)} on; it was not compared there"]
        run = session(graph.SerializeToString())
        for each in dict.fromkeys(other for other in (first, size) if followed.can_be_run(other)):
            _compare_at(each, network, run, expected, "smaller sizes")
    apart = followed.where_asked()
    run = session(graph.SerializeToString()) if apart else None
    beyond = _larger(_unit(sizes)) if apart else ()  # a range may end in the module alone
    for each in filter(followed.can_be_run, (*apart, *beyond)):
        _compare_at(each, network, run, expected, "other sizes")
    return [
        f"{network.name} does otherwise at {_text(each)}; it was not compared there"
        for each in apart
        if not followed.can_be_run(each)
    ][:1]


def _compare_at(size: Size, network: Network, run, expected: ExpectedScores, others: str) -> None:
    """Raise DeployError where a graph differs from its module at a size at which that does otherwise than at others."""
    apart = _apart(run, expected, network.image(*size).numpy())
    if not apart <= EXPORTED_MODEL:
        raise DeployError(
            f"{network.name} does otherwise at {_text(size)} than at {others}, as an `if` on them makes it, and its "
            f"ONNX does not ({apart:.1e} of the scores' range): leave that out, or let every image be resized to one "
            "smaller size, inexactly (--fit HxW)"
        )


def _compare_unfollowed(
    network: Network, graph: onnx.ModelProto, expected: ExpectedScores, sizes: AcceptedSizes, why: str
) -> str:
    """Of a module that cannot be followed: compare at some larger sizes; says that no others were looked at."""
    run, unit = session(graph.SerializeToString()), _unit(sizes)
    short, side = SHORT * unit, unit * -(-LARGER_UNFOLLOWED // unit)
    for size in ((short, side), (side, short), (side // 2, side // 2)):
        if math.prod(size) <= MOST_PIXELS:
            _compare_at(size, network, run, expected, "smaller sizes")
    return (
        f"{network.name} cannot be followed without computing it ({why}); it was compared up to {side} pixels a side, "
        "and not looked through for code that does otherwise at some sizes"
    )


class _Followed:
    """A module that is followed at any size, without computing it.

    Raises (at creation):
        _ValuesReadError: it makes numbers of its image's values.
        Exception: whatever it does without values.
    """

    def __init__(self, network: Network, sizes: AcceptedSizes) -> None:
        self._trace, self._sizes = _tracer(network), sizes
        self._unit = _unit(sizes)
        self._usual = [self._trace((rows * self._unit, columns * self._unit), math.inf) for rows, columns in USUAL]
        self._law = _Law(self._usual)

    def _at(self, size: Size) -> _Trace | None:
        """What the module does at a size; None: it refuses that by itself."""
        try:
            return self._trace(size, TIMES_LONGER * self._law.longest)
        except Exception:  # of whatever it is
            return None

    def _differs(self, size: Size) -> bool:
        trace = self._at(size)
        return trace is not None and not self._law.holds(trace)

    def can_be_run(self, size: Size) -> bool:
        """Whether an image of this size may be computed."""
        return math.prod(size) <= MOST_PIXELS and self._trace(size, math.inf).largest <= MOST_BYTES

    def larger(self) -> Iterator[tuple[Size, Size]]:
        """Larger sizes at which the module does otherwise: the least on the way to each, and that."""
        for size in _larger(self._unit):
            if self._differs(size):
                yield _first_on_the_way(size, self._unit, self._differs), size

    def where_asked(self) -> list[Size]:
        """Sizes at which the module does otherwise because of what its code asks about sizes, one of each kind."""
        waiting, asked = [self._usual[0]], constant([trace.asked for trace in self._usual])
        found: dict[tuple[Any, ...], Size] = {}
        seen, known = {trace.size for trace in self._usual}, _Known(self._usual)
        while waiting and len(seen) < MOST_FOLLOWED:
            trace = waiting.pop(0)
            new = [numbers for place, numbers in trace.asked.items() if place not in asked]
            asked |= trace.asked.keys()
            if new and trace is self._usual[0]:
                known = _Known([*self._usual, *filter(None, map(self._at, self._verified()))])
            for size in where_it_turns(trace.size, new, self._sizes.multiple, self._unit):
                if size in seen or min(size) < self._sizes.smallest or (other := self._at(size)) is None:
                    continue
                seen.add(size)
                waiting.append(other)
                whole = not any(side % self._unit for side in size)
                if not known.holds(other) or (whole and not self._law.holds(other)):
                    found.setdefault((other.operators, *known.constants(other)), size)
        return list(found.values())[:MOST_KINDS]

    def _verified(self) -> Iterator[Size]:
        """The sizes that a graph was compared at, as the module was run there."""
        multiple, smallest = self._sizes.multiple, self._sizes.smallest
        for size in VERIFIED_SIZES:
            height, width = (-(-max(side, smallest) // multiple) * multiple for side in size)
            yield height, width


def _compare_other_values(network: Network, graph: onnx.ModelProto, expected: ExpectedScores) -> None:
    """Raise DeployError where other images have other scores in ONNX, of a module that looks at their values."""
    run, noise = session(graph.SerializeToString()), network.image(SHORT * UNIT, SHORT * UNIT + 1).numpy()
    for image in (np.float32(strength) * part for part in (noise, np.abs(noise)) for strength in STRENGTHS):
        apart = _apart(run, expected, image)
        if not apart <= EXPORTED_MODEL:
            raise DeployError(
                f"{network.name} looks at the values of its image, as `if x.max() > 1` does, and its ONNX does what "
                f"that came to for one ({apart:.1e} of the scores' range apart for another): use torch.where, or "
                "leave it out and say --input-mean and --input-std"
            )


def _apart(run, expected: ExpectedScores, image: np.ndarray) -> float:
    """As a share of the scores' range; 0 of an image that the module does not take, or that overflows in it."""
    try:
        scores = expected.of(image)
    except DeployError:
        return 0.0
    if not np.isfinite(scores).all():
        return 0.0
    ours = run_quietly(run, image)[0]
    return float(np.abs(ours - scores).max() / max(np.ptp(scores), 1e-6)) if ours.shape == scores.shape else math.inf


def _tracer(network: Network) -> Callable[[Size, float], _Trace]:
    module = network.module
    restored: Callable[[], AbstractContextManager[None]] = nullcontext
    # A copy keeps what a module keeps of a run, such as a grid by the image's size: without values, here.
    try:
        module = copy.deepcopy(module, {id(value): value for value in _held_by(module)})
    except Exception:  # it holds a lock, a file, or a tensor that is computed of others
        restored = partial(_restored, module)
    weights = {value.data_ptr(): f"weights {index}" for index, value in enumerate(_held_by(module))}

    def trace(size: Size, most: float) -> _Trace:
        image = torch.empty(1, network.channels, *size, device="meta")
        with torch.no_grad(), restored(), _Called(image, most, weights) as called, Asking(called.note) as asking:
            module(image)
        return _Trace(size, tuple(called.operators), np.array(called.numbers), called.largest, asking.asked)

    return trace


@contextmanager
def _restored(module: torch.nn.Module) -> Iterator[None]:
    """After it, modules hold what they held, and not what they keep of a run."""
    held = [(vars(each), dict(vars(each))) for each in module.modules()]
    kept = [(each, copy.copy(each)) for _, values in held for each in values.values() if isinstance(each, dict | list)]
    try:
        yield
    finally:
        for now, before in (*kept, *held):
            now.clear()
            if isinstance(now, dict):
                now.update(before)
            else:
                now.extend(before)


def _held_by(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    held = (
        value
        for each in module.modules()
        for value in (*each.parameters(False), *each.buffers(False), *vars(each).values())
    )
    return [value for value in held if isinstance(value, torch.Tensor)]


def _unit(sizes: AcceptedSizes) -> int:
    """Pixels that sides are counted in."""
    return sizes.multiple * -(-max(UNIT, sizes.smallest) // sizes.multiple)


def _larger(unit: int) -> tuple[Size, Size, Size]:
    """Larger sizes, those of few pixels first."""
    short, side = SHORT * unit, unit * -(-LARGER // unit)
    return (short, side), (side, short), (side, side)


def _first_on_the_way(size: Size, unit: int, differs: Callable[[Size], bool]) -> Size:
    """The least size, on the way to one at which a module does otherwise, at which it does."""

    def at(count: int) -> Size:
        return min(size[0], count * unit), min(size[1], count * unit)

    low, high = SHORT, max(size) // unit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if differs(at(middle)) else (middle, high)
    return at(high)


def _text(size: Size) -> str:
    return "×".join(map(str, size))

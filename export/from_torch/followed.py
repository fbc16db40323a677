"""What a module does at a size of its image, found without computing anything.

It is run on PyTorch's meta device, where an image of 4224×4224 takes milliseconds. The operators that it calls, and the
weights and numbers that it gives them, are written down, and what its code compares sizes with.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fcn_deploy.export.from_torch.network import Network
from fcn_deploy.export.from_torch.sizes_asked import Asked, Asking
from fcn_deploy.fcn.foreign import ScoresModule
from fcn_deploy.fcn.programs import functions_uncompiled
from fcn_deploy.runtime.errors import DeployError
from torch.utils._python_dispatch import TorchDispatchMode

Size = tuple[int, int]

FEW = 64  # values of a tensor that is computed all the same, where the image and the weights have no part in it
ACTIVATIONS = ("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "silu")


class ValuesReadError(Exception):
    """A module makes a number of Python of its image's values."""


class _Called(TorchDispatchMode):
    """While it is entered, operators are noted and run without values: tensors are moved to the meta device.

    Attributes:
        operators: their names, in order, and of what they were given the kind of each number, which weights, and all
            else, such as a mode.
        numbers: that they were given, in order.
        largest: bytes of the largest tensor that they gave.
        read: whether a number of Python was made of a tensor that was made of sizes.
    """

    def __init__(self, image: torch.Tensor, most: float, weights: Mapping[int, str]) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.numbers: list[float] = []
        self.largest, self.read = 0, False
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
                raise ValuesReadError
            self.read |= args[0].device.type == "cpu" and args[0].data_ptr() not in self._weights
            return func(*args)
        self.note(str(func), leaves)
        if not self._is_known(leaves):
            args, kwargs = self._on_meta(args), {name: self._on_meta(value) for name, value in (kwargs or {}).items()}
        result = _known_shapes(func, args)
        result = func(*args, **(kwargs or {})) if result is None else result
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

    def _is_known(self, leaves: Sequence[Any]) -> bool:
        """Whether an operator is given a few numbers in tensors, as of a size, and neither the image nor weights."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return bool(tensors) and all(
            each.device.type == "cpu" and each.numel() <= FEW and each.data_ptr() not in self._weights
            for each in tensors
        )

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
class Trace:
    """What a module did at a size: its operators, the numbers that they were given, the largest tensor in bytes, and
    what its code compared sizes with.
    """

    size: Size
    operators: tuple[str, ...]
    numbers: np.ndarray
    largest: int
    asked: Asked


class Law:
    """What a module does at usual sizes: the operators, and each number as a + b·H + c·W + d·H·W, where it is so."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self.longest = max(len(trace.operators) for trace in traces)
        self._paths: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray] | None] = {}
        for operators in dict.fromkeys(trace.operators for trace in traces):
            same = [trace for trace in traces if trace.operators == operators]
            self._paths[operators] = _fitted(same)

    def holds(self, trace: Trace) -> bool:
        """Whether a module does the same at another size."""
        if trace.operators not in self._paths:
            return False
        found = self._paths[trace.operators]
        if found is None:
            return True
        terms, known = found
        expected = _terms(trace.size) @ terms
        return bool(_are_equal(expected, trace.numbers)[known].all())


class Known:
    """What a module did at all sizes that are known: the operators, and numbers that were the same at all of them."""

    def __init__(self, traces: Sequence[Trace]) -> None:
        self._paths: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
        for operators in dict.fromkeys(trace.operators for trace in traces):
            numbers = np.stack([trace.numbers for trace in traces if trace.operators == operators])
            self._paths[operators] = numbers[0], (numbers == numbers[0]).all(axis=0)

    def constants(self, trace: Trace) -> tuple[float, ...]:
        """The numbers of a trace that were the same at all known sizes; () where its path is not known."""
        found = self._paths.get(trace.operators)
        return () if found is None else tuple(trace.numbers[found[1]])

    def holds(self, trace: Trace) -> bool:
        """Whether a module does the same at another size, but for numbers that change with the size."""
        found = self._paths.get(trace.operators)
        return found is not None and np.array_equal(found[0][found[1]], trace.numbers[found[1]])


def _fitted(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray] | None:
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


def tracer(network: Network) -> Callable[[Size, float], Trace]:
    """What follows a network: (height, width) of an image and the most operators → what it does.

    `numbers_noted` is to be entered meanwhile. That raises ValuesReadError where the network makes numbers of its
    image's values, and whatever the network raises without values.
    """
    module = network.module
    kept = module.kept.restored if isinstance(module, ScoresModule) else nullcontext
    if isinstance(module, ScoresModule):
        module.kept.restore()
    held = _held_by(module)  # as long as they are, no other tensor takes their place in memory
    weights = {value.data_ptr(): f"weights {index}" for index, value in enumerate(held)}

    def trace(size: Size, most: float) -> Trace:
        image = torch.empty(1, network.channels, *size, device="meta")
        called = _Called(image, most, weights)
        with torch.no_grad(), functions_uncompiled(), kept(), called, Asking(called.note) as asking:
            module(image)
        if called.read:
            asking.asked.lost[("item",)] = "a tensor, and that a number"
        return Trace(size, tuple(called.operators), np.array(called.numbers), called.largest, asking.asked)

    return trace


def _held_by(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    held = (
        value
        for each in module.modules()
        for value in (*each.parameters(False), *each.buffers(False), *vars(each).values())
    )
    return [value for value in held if isinstance(value, torch.Tensor)]

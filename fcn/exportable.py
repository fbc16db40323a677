"""Functions of PyTorch that its exporters refuse at changing sizes, in terms of those that they take."""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from fcn_deploy.fcn.traced_numbers import floor_of_product, forget, is_right_in_single, is_traced, remember
from torch.overrides import TorchFunctionMode


class Exportable(TorchFunctionMode):
    """While it is entered, what exporters refuse or bake in at changing sizes is respelled.

    That is pooling to a grid or by a kernel of the image's size, unpooling, patches, affine grids, resizing by factors
    that are made of sizes, and tensors of sizes.

    The results are equal, but for rounding. `respelled` collects the names of the functions that were.

    Raises RuntimeError where a module goes on after a function has failed in a trace: the tracer has lost its place
    by then, and would end the process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.respelled: set[str] = set()
        self._failed = ""

    def __exit__(self, *raised) -> None:
        super().__exit__(*raised)
        forget()
        failed, self._failed = self._failed, ""
        if failed and not any(raised):
            raise _goes_on(failed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self._failed:
            raise _goes_on(self._failed)
        tracing = torch.jit.is_tracing()
        try:
            return self._call(func, args, kwargs)
        except Exception:
            if tracing and not torch.jit.is_tracing():
                self._failed = getattr(func, "__name__", str(func))
            raise

    def _call(self, func, args, kwargs):
        other = _RESPELLED.get(func)
        result = None if other is None else other(*args, **(kwargs or {}))
        if result is None:
            result = func(*args, **(kwargs or {}))
            remember(getattr(func, "__name__", ""), args, result)
            return result
        self.respelled.add(func.__name__)
        return result


def _goes_on(failed: str) -> RuntimeError:
    return RuntimeError(f"it goes on after {failed} has failed (try … except), which cannot be traced")


@contextmanager
def without_autocast() -> Iterator[list[torch.autocast]]:
    """While it is entered, autocast does nothing: what a network would compute in half, it computes in float32.

    Gives the autocasts that did nothing. In other threads they go on as they are.
    """
    enter, leave, skipped = torch.autocast.__enter__, torch.autocast.__exit__, []
    thread = threading.get_ident()

    def skip(self: torch.autocast) -> torch.autocast:
        if threading.get_ident() != thread:
            return enter(self)
        skipped.append(self)
        return self

    def stay(self: torch.autocast, *raised: Any) -> Any:
        return None if threading.get_ident() == thread else leave(self, *raised)

    torch.autocast.__enter__, torch.autocast.__exit__ = skip, stay  # type: ignore[method-assign]
    try:
        yield skipped
    finally:
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]


class InSingle(TorchFunctionMode):
    """While it is entered, what a network would cast to half or bfloat16, as by `x.half()`, is float32.

    Attributes:
        casts: whether anything was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.casts = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        if func in (torch.Tensor.half, torch.Tensor.bfloat16):
            func = torch.Tensor.float
        elif any(each in HALVES for each in (*args, *given.values()) if type(each) is torch.dtype):
            args = tuple(_in_single(each) for each in args)
            given = {name: _in_single(each) for name, each in given.items()}
        else:
            return func(*args, **given)
        self.casts = True
        return func(*args, **given)


HALVES = (torch.float16, torch.bfloat16)


def _in_single(value: Any) -> Any:
    return torch.float32 if type(value) is torch.dtype and value in HALVES else value


Cells = int | Sequence[int | None] | None


def adaptive_avg_pool2d(input: torch.Tensor, output_size: Cells) -> torch.Tensor | None:
    """Means over a grid of cells, as a matrix product per axis."""
    rows, columns = _pair(output_size)
    if rows == columns == 1:
        return None  # a global mean, which exporters take
    if rows is not None:
        input = _shares(input, -2, rows) @ input
    return input if columns is None else input @ _shares(input, -1, columns).T


def adaptive_max_pool2d(input: torch.Tensor, output_size: Cells, return_indices: bool = False) -> torch.Tensor | None:
    """Maxima over a grid of cells, axis by axis."""
    rows, columns = _pair(output_size)
    if return_indices:
        return None
    lowest = input.new_full((), -torch.inf)
    if rows is not None:
        inside = _inside(input, -2, rows)[:, :, None]  # [cells, H, 1]
        input = torch.where(inside, input.unsqueeze(-3), lowest).amax(-2)
    if columns is not None:
        inside = _inside(input, -1, columns)  # [cells, W]
        input = torch.where(inside, input.unsqueeze(-2), lowest).amax(-1)
    return input


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor | None:
    """The mean of the whole image, where the kernel is its size: a tracer would take that for constants."""
    kernel = _pair(kernel_size)
    plain = padding in (0, (0, 0), [0, 0]) and divisor_override is None
    if not plain or any(type(side) is int for side in kernel) or tuple(kernel) != tuple(input.shape[-2:]):
        return None
    return input.mean((-2, -1), keepdim=True)


def conv_transpose2d(
    input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1
) -> torch.Tensor | None:
    """To the size of a skip, as `output_size` asks for: cropped from the largest."""
    added = _pair(output_padding)
    if not any(map(is_traced, added)):
        return None
    most = tuple(step - 1 for step in _pair(stride))
    largest = torch.conv_transpose2d(input, weight, bias, stride, padding, most, groups, dilation)
    rows, columns = (side - more + wanted for side, more, wanted in zip(largest.shape[-2:], most, added, strict=True))
    return largest[..., :rows, :columns]


def max_unpool2d(
    input: torch.Tensor,
    indices: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    output_size: Sequence[int] | None = None,
) -> torch.Tensor | None:
    """Values back where the maxima were, by a scatter."""
    if input.ndim != 4:
        return None
    batch, channels = input.shape[:2]
    if output_size is None:
        step = _pair(stride or kernel_size)
        amounts = zip(input.shape[-2:], step, _pair(padding), _pair(kernel_size), strict=True)
        height, width = ((side - 1) * by - 2 * pad + kernel for side, by, pad, kernel in amounts)
    else:
        height, width = output_size[-2:]
    empty = input.new_zeros(batch, channels, height * width)
    # Axes are counted from the front: the older exporter takes the traced size for those from the back.
    return empty.scatter(2, indices.flatten(2), input.flatten(2)).reshape(batch, channels, height, width)


def interpolate(
    input: torch.Tensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    *more,
    **others,
) -> torch.Tensor | None:
    """Means over a grid, which `area` is another name for; or by factors that are made of sizes."""
    if size is None and input.ndim == 4 and any(map(is_traced, factors := _pair(scale_factor))):
        aligned = others.get("align_corners", more[0] if more else None) or others.get("recompute_scale_factor")
        if mode not in ("bilinear", "bicubic") or aligned or others.get("antialias"):
            return None
        down, across = (_taps(input, axis, by, mode) for axis, by in zip((-2, -1), factors, strict=True))
        return down @ input @ across.T
    if size is None and input.ndim == 4 and torch.jit.is_tracing() and mode in ("nearest", "bilinear", "bicubic"):
        factors = _pair(scale_factor)
        if any(type(each) is float and not is_right_in_single(each) for each in factors) and not others.get(
            "antialias"
        ):
            return _of_whole_length(input, factors, mode, *more, **others)
    if mode != "area" or size is None or input.ndim != 4:
        return None
    if tuple(_pair(size)) == (1, 1):
        return input.mean((-2, -1), keepdim=True)
    return adaptive_avg_pool2d(input, size)


def _of_whole_length(
    input: torch.Tensor, factors: Sequence[float], mode: str, align_corners=None, recompute_scale_factor=None, **others
) -> torch.Tensor:
    """Resized by factors whose lengths come out otherwise in single precision: 0.29 · 100 is 28.999…, and not 29."""
    lengths = [floor_of_product(side, by) for side, by in zip(input.shape[-2:], factors, strict=True)]
    if align_corners or recompute_scale_factor:
        return F.interpolate(input, size=lengths, mode=mode, align_corners=align_corners)
    # From a map with its border repeated it is the same but for its end, whichever of both lengths it has there.
    down, across = (math.ceil(1 / by) + 2 for by in factors)
    longer = F.pad(input, (0, across, 0, down), mode="replicate")
    resized = F.interpolate(longer, scale_factor=tuple(factors), mode=mode, align_corners=align_corners)
    return resized[..., : lengths[0], : lengths[1]]


def unfold(
    input: torch.Tensor,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> torch.Tensor | None:
    """Patches side by side, [N, C, H, W] → [N, C·h·w, patches], by reshapes."""
    kernel = _side_by_side(kernel_size, dilation, padding, stride)
    if kernel is None or input.ndim != 4:
        return None
    batch, channels = input.shape[:2]
    rows, columns = (side // length for side, length in zip(input.shape[-2:], kernel, strict=True))
    whole = input[..., : rows * kernel[0], : columns * kernel[1]]
    cells = whole.reshape(batch, channels, rows, kernel[0], columns, kernel[1])
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, channels * kernel[0] * kernel[1], rows * columns)


def fold(
    input: torch.Tensor,
    output_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    stride: int | Sequence[int] = 1,
) -> torch.Tensor | None:
    """Patches side by side, put together again: [N, C·h·w, patches] → [N, C, H, W], by reshapes."""
    kernel, size = _side_by_side(kernel_size, dilation, padding, stride), _pair(output_size)
    if kernel is None or input.ndim != 3:
        return None
    rows, columns = (side // length for side, length in zip(size, kernel, strict=True))
    channels = input.shape[1] // (kernel[0] * kernel[1])
    cells = input.reshape(input.shape[0], channels, *kernel, rows, columns).permute(0, 1, 4, 2, 5, 3)
    whole = cells.reshape(input.shape[0], channels, rows * kernel[0], columns * kernel[1])
    # Cells that no patch reaches are 0.
    return F.pad(whole, (0, size[1] - columns * kernel[1], 0, size[0] - rows * kernel[0]))


def _side_by_side(kernel_size, dilation, padding, stride) -> tuple[int, int] | None:
    """The kernel, where patches neither overlap nor leave pixels between them, nor reach beyond the image."""
    kernel = _pair(kernel_size)
    plain = _pair(dilation) == (1, 1) and _pair(padding) == (0, 0)
    return kernel if plain and _pair(stride) == kernel else None


def squeeze(input: torch.Tensor, *dims: int, **named: int) -> torch.Tensor | None:
    """Without an axis of one: exporters branch there, where they do not know that it is."""
    (dim,) = (*dims, *named.values()) if len(dims) + len(named) == 1 else (None,)
    if type(dim) is not int or dim % max(input.ndim, 1) == 0 or input.shape[dim] != 1:
        return None
    return input.select(dim, 0)


def linspace(start, end, steps, **options) -> torch.Tensor | None:
    """As many numbers as a size says, in equal steps: exporters divide by 0 where there is one."""
    if not is_traced(steps):
        return None
    place, step = torch.arange(steps), (end - start) / torch.clamp(steps - 1, min=1)
    # Counted from both ends, as PyTorch does, whose numbers are symmetric.
    numbers = torch.where(
        place < torch.clamp(steps // 2, min=1), start + step * place, end - step * (steps - 1 - place)
    )
    return numbers.to(options.get("dtype") or torch.float32)


def affine_grid(theta: torch.Tensor, size: Sequence[int], align_corners: bool | None = None) -> torch.Tensor | None:
    """Where an affine transformation puts the pixels of an image: a matrix product."""
    if len(size) != 4:
        return None
    height, width = size[2], size[3]
    ends = (torch.as_tensor(1.0), torch.as_tensor(1.0))
    if not align_corners:
        ends = ((width - 1) / torch.as_tensor(width), (height - 1) / torch.as_tensor(height))
    across, down = (
        (2.0 * torch.arange(side) / torch.clamp(torch.as_tensor(side) - 1, min=1) - 1.0) * end * (side > 1)
        for side, end in zip((width, height), ends, strict=True)
    )
    x, y = across[None].expand(height, width), down[:, None].expand(height, width)
    places = torch.stack((x, y, torch.ones_like(x)), -1).reshape(1, height * width, 3).to(theta.dtype)
    return (places @ theta.transpose(1, 2)).reshape(theta.shape[0], height, width, 2)


def tensor(data: object, **options) -> torch.Tensor | None:
    """A tensor of sizes, which a tracer would take for constants."""
    if isinstance(data, torch.Tensor) or not any(map(is_traced, _leaves(data))):
        return None
    floats = any(torch.as_tensor(each).is_floating_point() for each in _leaves(data))
    kind = options.get("dtype") or (torch.float32 if floats else torch.int64)

    def made(value: object) -> torch.Tensor:
        if isinstance(value, list | tuple | torch.Size):
            return torch.stack([made(each) for each in value])
        return torch.as_tensor(value).to(kind)

    return made(data)


def _leaves(data: object) -> Iterator[Any]:
    if isinstance(data, list | tuple):
        for each in data:
            yield from _leaves(each)
    else:
        yield data


def _taps(image: torch.Tensor, axis: int, factor: torch.Tensor | float, mode: str) -> torch.Tensor:
    """What each place of a resized axis takes of those of the image, [resized, places], as PyTorch does by a factor."""
    size, factor = image.shape[axis], torch.as_tensor(factor)
    wanted = floor_of_product(size, factor, known=int(size))
    count: torch.Tensor = torch.arange(wanted)  # a traced size
    place = (count + 0.5) / factor - 0.5
    if mode == "bilinear":  # which copies where the sides are equal, whatever the factor
        place = torch.where(wanted == size, count, torch.clamp(place, min=0))
    first = torch.floor(place)
    part, a = place - first, -0.75
    near, far = part + 1, 2 - part  # how far the outer two of four places are
    taps = (
        ((0, 1 - part), (1, part))
        if mode == "bilinear"
        else (
            (-1, ((a * near - 5 * a) * near + 8 * a) * near - 4 * a),
            (0, ((a + 2) * part - (a + 3)) * part * part + 1),
            (1, ((a + 2) * (1 - part) - (a + 3)) * (1 - part) * (1 - part) + 1),
            (2, ((a * far - 5 * a) * far + 8 * a) * far - 4 * a),
        )
    )
    columns = torch.arange(size)[None]
    rows = [
        torch.where(torch.clamp(first + by, 0, size - 1).to(torch.int64)[:, None] == columns, weight[:, None], 0.0)
        for by, weight in taps
    ]
    return functools.reduce(torch.add, rows).to(image.dtype)


_RESPELLED: dict[Callable, Callable] = {
    F.affine_grid: affine_grid,
    torch.linspace: linspace,
    torch.squeeze: squeeze,
    torch.Tensor.squeeze: squeeze,
    torch.tensor: tensor,
    torch.as_tensor: tensor,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.adaptive_max_pool2d: adaptive_max_pool2d,
    F.avg_pool2d: avg_pool2d,
    F.conv_transpose2d: conv_transpose2d,
    F.fold: fold,
    F.interpolate: interpolate,
    F.max_unpool2d: max_unpool2d,
    F.unfold: unfold,
}


def _pair(value):
    return tuple(value) if isinstance(value, Sequence) else (value, value)


def _inside(image: torch.Tensor, axis: int, cells: int) -> torch.Tensor:
    """Which places along an axis belong to which cell: bool [cells, places]. Cells may overlap by a place."""
    size = image.shape[axis]
    cell, place = torch.arange(cells)[:, None], torch.arange(size)[None]
    return (place >= cell * size // cells) & (place < ((cell + 1) * size + cells - 1) // cells)


def _shares(image: torch.Tensor, axis: int, cells: int) -> torch.Tensor:
    """The weight of each place in the mean of each cell, [cells, places]."""
    inside = _inside(image, axis, cells).to(image.dtype)
    return inside / inside.sum(1, keepdim=True)

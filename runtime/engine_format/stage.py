"""A stage: one network of an engine, what it needs of an image, and how its scores are upsampled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]

MODES = ("none", "linear", "nearest")
COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
PYTORCH = "pytorch"  # a rounding that ONNX has not


def pixels(name: str, given: Sequence[Any], count: int, least: int = 0) -> tuple[int, ...]:
    """So many whole numbers of pixels as a tuple, none below `least`; or ValueError."""
    values = tuple(given)
    if len(values) != count or not all(type(value) is int and value >= least for value in values):
        raise ValueError(f"{name} {values}; it must be {count} whole numbers of pixels of at least {least}")
    return values


@dataclass(frozen=True)
class Upsampling:
    """How coarse scores become full-size scores: the network's last Resize, as ONNX Runtime runs it.

    Attributes:
        mode: `linear`, `nearest`, or `none` where the scores are full-size already.
        coordinates: `half_pixel`, `pytorch_half_pixel`, `asymmetric` or `align_corners`.
        factor: output over input size, (vertical, horizontal); None: the output has the padded image's size.
        rounding: of `nearest`: `round_prefer_floor`, `round_prefer_ceil`, `floor` or `ceil`; or `pytorch`, with
            `asymmetric`: `floor`, and ties as PyTorch's arithmetic has them.
        activated: the network takes its Softmax or Sigmoid before its Resize, so the scores are probabilities already.
        fades: the Resize stands for a bilinear transposed convolution, in which scores fade towards zero beyond the
            centres of the outermost cells. Labels are the same.
    """

    mode: str = "none"
    coordinates: str = "half_pixel"
    factor: tuple[float, float] | None = None
    rounding: str = "round_prefer_floor"
    activated: bool = False
    fades: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("mode", MODES), ("coordinates", COORDINATES), ("rounding", (*ROUNDINGS, PYTORCH))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.factor is not None:
            factor = tuple(float(value) for value in self.factor)
            if len(factor) != 2 or not all(math.isfinite(value) and value > 0 for value in factor):
                raise ValueError(f"factor {self.factor}; it must be two numbers above 0")
            object.__setattr__(self, "factor", factor)
        for name in ("activated", "fades"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} {getattr(self, name)!r}; it must be true or false")
        if self.rounding == PYTORCH and (self.mode, self.coordinates, self.factor) != ("nearest", "asymmetric", None):
            raise ValueError("the rounding pytorch is of nearest, asymmetric, to the padded image's size")
        if self.fades and (self.mode, self.coordinates, self.factor is None) != ("linear", "half_pixel", False):
            raise ValueError("fades is of linear interpolation by a factor, half_pixel")


@dataclass(frozen=True)
class Stage:
    """One network of an engine: the core, or a part of it that takes the result of the part before.

    Attributes:
        file: the member that holds it.
        input, output: their names in it.
        halo: (vertical, horizontal) in pixels: around a tile, what its scores depend on; None: it cannot be tiled.
        period: in pixels: tiles that begin at its multiples give the scores of the whole image.
        whole: why it cannot be tiled: the operator that makes it depend on the whole image.
        stride: (vertical, horizontal) in pixels of the image: of a cell of its result.
        short: (vertical, horizontal): of an image of n pixels its result has ⌈(n − short) / stride⌉ cells. It is 0
            where sides are rounded up, and stride − 1 where they are rounded down.
        bytes_fixed, bytes_per_pixel, bytes_per_pixel_squared: working memory of a run by its pixels p of padded image,
            fixed + per_pixel · p + per_pixel_squared · p²: measured by build-engine in the library that runs it, or
            estimated from its graph. What attends from each pixel to each takes memory by the square.
        output_bytes: of its result, per pixel of padded image.
        cost: its share of the core's work.
        tile: side in pixels, without halo, of the tiles that it runs fastest in, which fit the processor's caches; an
            image of more pixels is run in tiles of at most that even where memory holds it whole. None: whole.
        border: of a first stage that takes the image as it is, uint8 [N, H, W, C]: pixels of padding around the padded
            image, (top, left, bottom, right), of the card's mean like all padding. None: it takes a normalised image,
            float32 [N, C, H, W].
        block: with a border: side in pixels of the squares whose pixels it takes as channels, row by row. The padded
            image with its border is cut to whole ones: uint8 [N, H / block, W / block, block² · C].
    """

    file: str
    input: str = "image"
    output: str = "scores"
    halo: tuple[int, int] | None = None
    period: int = 1
    whole: str = "its engine does not tell its receptive field; build it again"
    stride: tuple[int, int] = (1, 1)
    short: tuple[int, int] = (0, 0)
    bytes_fixed: float = 0.0
    bytes_per_pixel: float = 0.0
    bytes_per_pixel_squared: float = 0.0
    output_bytes: float = 0.0
    cost: float = 1.0
    tile: int | None = None
    border: tuple[int, int, int, int] | None = None
    block: int = 1

    def __post_init__(self) -> None:
        if self.border is not None:
            object.__setattr__(self, "border", pixels("border", self.border, 4))
        if self.halo is not None:
            object.__setattr__(self, "halo", pixels("halo", self.halo, 2))
        object.__setattr__(self, "stride", pixels("stride", self.stride, 2, least=1))
        object.__setattr__(self, "short", pixels("short", self.short, 2))
        if any(short >= stride for short, stride in zip(self.short, self.stride, strict=True)):
            raise ValueError(f"short {self.short} with stride {self.stride}; it must be less")
        tile = 1 if self.tile is None else self.tile
        for name, value in (("period", self.period), ("tile", tile), ("block", self.block)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {value!r}; it must be a whole number above 0")
        if self.block > 1 and (self.border is None or any(side % self.block for side in self.border[:2])):
            raise ValueError(f"block {self.block} with border {self.border}; it must divide that at the top and left")
        for name in ("bytes_fixed", "bytes_per_pixel", "bytes_per_pixel_squared", "output_bytes", "cost"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} {value!r}; it must be a number of at least 0")

    @overload
    def working_memory(self, pixels: int) -> float: ...

    @overload
    def working_memory(self, pixels: Numbers) -> Numbers: ...

    def working_memory(self, pixels: int | Numbers) -> float | Numbers:
        """Bytes that a run of so many pixels of padded image works with, its input and result included."""
        return self.bytes_fixed + pixels * (self.bytes_per_pixel + pixels * self.bytes_per_pixel_squared)


def stages_of(given: Sequence[Any]) -> tuple[Stage, ...]:
    """Stages as JSON has them, or as they are."""
    return tuple(stage if isinstance(stage, Stage) else Stage(**stage) for stage in given)

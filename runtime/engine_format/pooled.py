"""Networks that pool over the whole image: the passes that take its statistics, before tiles give the scores."""

from dataclasses import dataclass, replace

from .model_card import ModelCard
from .stage import Stage, Upsampling, pixels, stages_of


@dataclass(frozen=True)
class Interpolation:
    """Where the cells of a Resize read that goes to the size of another map: it differs with the size of the image.

    A network in tiles is told by inputs of its own, for the rows or columns of the tile: `first` and `second`, int64
    [n], are the cells that each lies between, and `weight`, float32, is the second's; `nearest` has the first alone.

    Attributes:
        name: of the inputs: `{name}/first`, `{name}/second`, `{name}/weight`.
        axis: 0: rows, 1: columns.
        how: the Resize; its `factor` is None.
        stride: pixels of a cell of its result.
        source: pixels of a cell of what it resizes, or 0 where that is a grid of pooled values.
        cells: of that grid.
        short, source_short: of its result and of what it resizes, as of Stage.
    """

    name: str
    axis: int
    how: Upsampling
    stride: int
    source: int = 0
    cells: int = 0
    short: int = 0
    source_short: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.how, Upsampling):
            object.__setattr__(self, "how", Upsampling(**self.how))
        numbers = (self.axis, self.stride, self.source, self.cells, self.short, self.source_short)
        if not all(type(number) is int and number >= 0 for number in numbers) or self.axis > 1 or self.stride < 1:
            raise ValueError(f"axis, stride, source, cells and what they are short of {numbers} of {self.name!r}")
        if (self.source > 0) == (self.cells > 0) or self.how.factor is not None:
            raise ValueError(f"{self.name!r} resizes neither a map nor a grid")
        if self.short >= self.stride or self.source_short > max(self.source - 1, 0):
            raise ValueError(f"{self.name!r} is short of whole cells")


@dataclass(frozen=True)
class Statistic:
    """What a network takes of a whole map, [1, C, h, w]: means over its cells.

    Attributes:
        name: of the input that it is given to the network by.
        kind: `mean`, or `variance` (of all cells, by their number).
        cells: (rows, columns) of the grid of means, as of adaptive pooling: of row i the cells from ⌊i·h/rows⌋ to
            before ⌈(i + 1)·h/rows⌉.
    """

    name: str
    kind: str = "mean"
    cells: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", pixels("cells", self.cells, 2, least=1))
        if type(self.name) is not str or self.kind not in ("mean", "variance"):
            raise ValueError(f"statistic {self.name!r} of kind {self.kind!r}")
        if self.kind == "variance" and self.cells != (1, 1):
            raise ValueError(f"the variance {self.name!r} of a grid")


@dataclass(frozen=True)
class Pass:
    """A run over all tiles of an image for statistics of one map, before the scores are computed.

    Attributes:
        stages: up to the map; each has a halo.
        statistics: of it.
    """

    stages: tuple[Stage, ...]
    statistics: tuple[Statistic, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", stages_of(self.stages))
        given = (s if isinstance(s, Statistic) else Statistic(**s) for s in self.statistics)
        object.__setattr__(self, "statistics", tuple(given))


@dataclass(frozen=True)
class Pooled:
    """How a network that pools over the whole image is run in tiles all the same.

    Pooled values are inputs of its networks. A pass over the image gives those of each map, in order, as later ones may
    depend on earlier; then the scores are computed in tiles.

    Attributes:
        passes: in order.
        stages: that give the scores; each has a halo. They share their files with the passes.
        interpolations: inputs of any of the networks.
        resized: (multiple, least side) where the network looks at the image resized bilinearly (half-pixel centres), as
            `nearest_multiple` says: tiles, halos and strides are in pixels of that. None: at the image as it is.
    """

    passes: tuple[Pass, ...]
    stages: tuple[Stage, ...]
    interpolations: tuple[Interpolation, ...] = ()
    resized: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(p if isinstance(p, Pass) else Pass(**p) for p in self.passes))
        object.__setattr__(self, "stages", stages_of(self.stages))
        given = (i if isinstance(i, Interpolation) else Interpolation(**i) for i in self.interpolations)
        object.__setattr__(self, "interpolations", tuple(given))
        if any(not chain or any(stage.halo is None for stage in chain) for chain in self.chains):
            raise ValueError("its passes have a stage without a halo, or none")
        if self.resized is not None:
            object.__setattr__(self, "resized", pixels("resized", self.resized, 2, least=1))

    def card(self, card: ModelCard) -> ModelCard:
        """The model's card, with the sizes that these networks are run at."""
        if self.resized is None:
            return card
        return replace(card, size_multiple=self.resized[0], smallest=self.resized[1])

    def padded(self, size: tuple[int, int], padded: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of what these networks look at; `padded`: what an image of `size` is padded to otherwise."""
        if self.resized is None:
            return padded
        return nearest_multiple(size[0], *self.resized), nearest_multiple(size[1], *self.resized)

    @property
    def chains(self) -> tuple[tuple[Stage, ...], ...]:
        """The stages of each pass, and those of the scores last."""
        return (*(each.stages for each in self.passes), self.stages)


def nearest_multiple(side: int, multiple: int, least: int) -> int:
    """What a side of an image is resized to: the nearest multiple, halves up, and `least` at least."""
    return max((side + multiple // 2) // multiple * multiple, least)

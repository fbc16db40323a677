"""The manifest: what an engine says of itself before anything of it is loaded."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ..backends import CPU_BACKENDS
from ..errors import DeployError
from .model_card import ModelCard

# 6: stages for tiles alone; 5: blocks of pixels as channels, networks that pool in passes, several heads; 4: memory of
# stages by a law of pixels; 3: by pixels alone
ENGINE_VERSION = 6
READ_VERSIONS = (3, 4, 5, ENGINE_VERSION)
REMEDY = "build it again with build-engine"

Numbers = npt.NDArray[np.float64]

MODES = ("none", "linear", "nearest")
COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
PYTORCH = "pytorch"  # a rounding that ONNX has not
PRECISIONS = ("float32", "bf16", "float16", "fp8", "int8")


def _pixels(name: str, given: Sequence[Any], count: int, least: int = 0) -> tuple[int, ...]:
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
            object.__setattr__(self, "border", _pixels("border", self.border, 4))
        if self.halo is not None:
            object.__setattr__(self, "halo", _pixels("halo", self.halo, 2))
        object.__setattr__(self, "stride", _pixels("stride", self.stride, 2, least=1))
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
    """

    name: str
    axis: int
    how: Upsampling
    stride: int
    source: int = 0
    cells: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.how, Upsampling):
            object.__setattr__(self, "how", Upsampling(**self.how))
        numbers = (self.axis, self.stride, self.source, self.cells)
        if not all(type(number) is int and number >= 0 for number in numbers) or self.axis > 1 or self.stride < 1:
            raise ValueError(f"axis, stride, source and cells {numbers} of {self.name!r}")
        if (self.source > 0) == (self.cells > 0) or self.how.factor is not None:
            raise ValueError(f"{self.name!r} resizes neither a map nor a grid")


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
        object.__setattr__(self, "cells", _pixels("cells", self.cells, 2, least=1))
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
        object.__setattr__(self, "stages", _stages(self.stages))
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
        object.__setattr__(self, "stages", _stages(self.stages))
        given = (i if isinstance(i, Interpolation) else Interpolation(**i) for i in self.interpolations)
        object.__setattr__(self, "interpolations", tuple(given))
        if any(not chain or any(stage.halo is None for stage in chain) for chain in self.chains):
            raise ValueError("its passes have a stage without a halo, or none")
        if self.resized is not None:
            object.__setattr__(self, "resized", _pixels("resized", self.resized, 2, least=1))

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


def _stages(given: Sequence[Any]) -> tuple[Stage, ...]:
    return tuple(stage if isinstance(stage, Stage) else Stage(**stage) for stage in given)


@dataclass(frozen=True)
class Profile:
    """An optimisation profile of a TensorRT plan: the sizes of core input that it runs.

    Attributes:
        min, opt, max: (height, width) in pixels.
        batch: most images at once.
        bytes: of working memory at `max`; None where the builder did not tell.
    """

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]
    batch: int = 1
    bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("min", "opt", "max"):
            object.__setattr__(self, name, _pixels(name, getattr(self, name), 2, least=1))
        if self.bytes is not None and type(self.bytes) is not int:
            raise ValueError(f"bytes {self.bytes!r}; it must be a whole number")

    def holds(self, size: tuple[int, int]) -> bool:
        return all(low <= side <= high for low, side, high in zip(self.min, size, self.max, strict=True))


@dataclass(frozen=True)
class GpuPlan:
    """What a TensorRT plan needs, checked before it is loaded.

    Attributes:
        library: Python module that runs it: `tensorrt` or `tensorrt_rtx`.
        version: of that module when the plan was built.
        targets: compute capabilities it is for: `sm89`.
        profiles: in the plan's order.
        portable: built to run on other GPUs too (hardware compatibility).
        version_compatible: built to run in later versions of the library.
        platform: system and processor it is for: `linux-x86_64`; empty in engines of older releases.
    """

    library: str
    version: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    portable: bool = False
    version_compatible: bool = False
    platform: str = ""

    def __post_init__(self) -> None:
        if self.library not in ("tensorrt", "tensorrt_rtx"):
            raise ValueError(f"library {self.library!r}; it must be tensorrt or tensorrt_rtx")
        if not all(type(text) is str for text in (self.version, self.platform, *self.targets)):
            raise ValueError("its version, platform and targets must be texts")
        profiles = tuple(p if isinstance(p, Profile) else Profile(**p) for p in self.profiles)
        if not profiles:
            raise ValueError("it has no profile")
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "profiles", profiles)


@dataclass(frozen=True)
class Head:
    """One of several outputs of a network: what its channels of the scores mean. What images are is in the card.

    Attributes:
        name: of the output.
        classes, colors, activation, threshold: as the card's.
        activated: as the upsampling's.
    """

    name: str
    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    activation: str
    threshold: float | tuple[float, ...] = 0.5
    activated: bool = False

    def __post_init__(self) -> None:
        if type(self.name) is not str or not self.name or not self.name.isprintable():
            raise ValueError(f"an output is called {self.name!r}; it must have a name")
        if type(self.activated) is not bool:
            raise ValueError(f"activated {self.activated!r}; it must be true or false")

    @classmethod
    def of(cls, name: str, card: ModelCard, activated: bool) -> "Head":
        """The head of a network of this card."""
        return cls(name, card.classes, card.colors, card.activation, card.threshold, activated)

    def card(self, network: ModelCard) -> ModelCard:
        """The card of this head of a network. Raises ValueError where it makes none."""
        return replace(
            network, classes=self.classes, colors=self.colors, activation=self.activation, threshold=self.threshold
        )


@dataclass(frozen=True)
class Manifest:
    """What an engine is: written by build-engine, read by the runtime before anything is loaded.

    Attributes:
        card: of the model.
        target: `cpu`, or the GPUs the plan is for: `sm86,sm89`.
        precision: the lowest in the graph, of PRECISIONS.
        upsampling: what turns the core's scores into full-size ones.
        stages: the core network, in order.
        fine: the same in more stages, for images that memory does not hold: opened when one comes. Their weights are in
            the files of `stages`, and memory that one of them took is there for the others. None: there are no such.
        created_by: name and version of the builder.
        gpu: what the plan needs, in engines for GPUs.
        backend: of engines for the CPU, the library that was measured fastest: `onnxruntime` or `openvino`.
        heads: of a network of several outputs, whose scores are theirs one after the other; the card is the first's.
        pooled: how tiles of a network are run that pools over the whole image; None: it does not, or has none.
        members: name → {"bytes", "sha256"} of every other member of the file.
    """

    card: ModelCard
    target: str
    precision: str
    upsampling: Upsampling
    stages: tuple[Stage, ...]
    created_by: str
    gpu: GpuPlan | None = None
    backend: str = "onnxruntime"
    heads: tuple[Head, ...] = ()
    pooled: Pooled | None = None
    fine: tuple[Stage, ...] = ()
    members: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("it has no stages")
        if any(stage.halo is None for stage in self.fine):
            raise ValueError("one of its stages for tiles has no halo")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}; this release knows {', '.join(PRECISIONS)}")
        if self.backend not in CPU_BACKENDS:
            raise ValueError(f"backend {self.backend!r}; this release knows {', '.join(CPU_BACKENDS)}")
        self._check_heads()
        for value in (self.target, *(n for stage in self.all_stages for n in (stage.file, stage.input, stage.output))):
            if type(value) is not str:
                raise ValueError(f"{value!r} where a name belongs")

    @property
    def all_stages(self) -> tuple[Stage, ...]:
        """Those of whole images, those for tiles alone, and those of passes."""
        chains = self.pooled.chains if self.pooled is not None else ()
        return (*self.stages, *self.fine, *(stage for chain in chains for stage in chain))

    def _check_heads(self) -> None:
        """Raise ValueError where they contradict each other, or the card."""
        if not self.heads:
            return
        if len({head.name for head in self.heads}) < len(self.heads):
            raise ValueError("two outputs have one name")
        if self.heads[0].card(self.card) != self.card:
            raise ValueError("its card is not that of its first output")
        for head in self.heads[1:]:
            head.card(self.card)

    def to_json(self) -> str:
        """The manifest's text. What is `upsampling` here stands under `head` there, as in engines built before."""
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        data["card"] = json.loads(self.card.to_json())
        del data["upsampling"]
        data["head"] = asdict(self.upsampling)
        data["stages"] = [asdict(stage) for stage in self.stages]
        data["fine"] = [asdict(stage) for stage in self.fine]
        data["gpu"] = self.gpu and asdict(self.gpu)
        data["members"] = dict(self.members)
        data["heads"] = [asdict(head) for head in self.heads]
        data["pooled"] = self.pooled and asdict(self.pooled)
        return json.dumps({"format": "fcn-deploy engine", "version": ENGINE_VERSION} | data, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> "Manifest":
        """Parse a manifest. `source` names the file in errors. Raises DeployError."""
        try:
            data = json.loads(text)
            if data.pop("format") != "fcn-deploy engine":
                raise ValueError("it is not one of an fcn-deploy engine")
            version = data.pop("version")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DeployError(f"{source} has no manifest of an engine: {error!r}; {REMEDY}") from error
        if version not in READ_VERSIONS:
            raise DeployError(
                f"{source} is an engine of version {version}, and this release reads versions "
                f"{READ_VERSIONS[0]} to {ENGINE_VERSION}; upgrade fcn-deploy, or {REMEDY}"
            )
        try:
            data["card"] = ModelCard.from_json(json.dumps(data["card"]), source)
            data["upsampling"] = Upsampling(**data.pop("head"))
            data["stages"] = tuple(Stage(**stage) for stage in data["stages"])
            data["fine"] = _stages(data.get("fine", ()))
            data["gpu"] = GpuPlan(**data["gpu"]) if data.get("gpu") else None
            data["heads"] = tuple(_head(**head) for head in data.get("heads", ()))
            data["pooled"] = Pooled(**data["pooled"]) if data.get("pooled") else None
            data["members"] = {
                str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for name, entry in data["members"].items()
            }
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DeployError(f"{source} has a damaged manifest: {error!r}; {REMEDY}") from error


def _head(classes: Sequence[Any], colors: Sequence[Any], threshold: Any, **others: Any) -> Head:
    """A head as JSON has it, whose lists are tuples here."""
    threshold = tuple(threshold) if isinstance(threshold, list) else threshold
    return Head(classes=tuple(classes), colors=tuple(map(tuple, colors)), threshold=threshold, **others)

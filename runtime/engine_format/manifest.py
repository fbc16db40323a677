"""The manifest: what an engine says of itself before anything of it is loaded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..backends import CPU_BACKENDS
from ..errors import DeployError
from .model_card import ModelCard
from .pooled import Pooled
from .stage import Stage, Upsampling, pixels, stages_of

# 6: stages for tiles alone; 5: blocks of pixels as channels, networks that pool in passes, several heads; 4: memory of
# stages by a law of pixels; 3: by pixels alone
ENGINE_VERSION = 6
READ_VERSIONS = (3, 4, 5, ENGINE_VERSION)
REMEDY = "build it again with build-engine"

PRECISIONS = ("float32", "bf16", "float16", "fp8", "int8")


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
            object.__setattr__(self, name, pixels(name, getattr(self, name), 2, least=1))
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
            data["fine"] = stages_of(data.get("fine", ()))
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

"""The model card, the manifest, and the engine file that holds them: write, read, verify.

An engine is one uncompressed zip. Its first member, `manifest.json`, names every other member with its
length and SHA-256, and the zip's comment holds the manifest's own, so a damaged, truncated or edited file is
noticed when it is opened. Checksums are not authenticity: open engines from people you trust only.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from runtime.backends import CPU_BACKENDS
from runtime.errors import DeployError
from runtime.files import replacing

ENGINE_VERSION = 3  # 3: stages that take the image as it is
CARD_VERSION = 2  # 2: smallest, whole, and networks that give masks or values instead of labels
CARD_KEY = "fcn_deploy.card"  # the key of the card in ONNX and safetensors metadata
ACTIVATED_KEY = "fcn_deploy.activated"  # in ONNX metadata, "1": the scores of `multilabel` are probabilities already
DTYPES = ("uint8", "uint16", "float32")
MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20  # bytes; a manifest is a few kB, so a larger one is not ours

MODES = ("none", "linear", "nearest")
COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
PRECISIONS = ("float32", "float16", "int8")
ACTIVATIONS = ("softmax", "sigmoid", "probability", "multilabel", "none")

IMAGENET_MEAN = (123.675, 116.28, 103.53)  # of RGB in 0..255
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class ModelCard:
    """What a network expects and what its scores mean.

    Attributes:
        classes: names, in label order.
        colors: one RGB triple (0..255) per class, for palettes and overlays.
        channels: bands of the image; 3 is RGB.
        dtype: of the image: uint8, uint16 or float32.
        mean, std: per channel, in the image's own units; the network sees (image - mean) / std.
        stride: pixels per cell of the coarse scores (8 for FCN-8s).
        size_multiple: H and W of the core network's input are multiples of it (32 for FCN-8s).
        activation: what the scores mean: `softmax` (labels by argmax), `sigmoid` (one score, a logit; label 1
            where its sigmoid is above `threshold`), `probability` (the same, its sigmoid taken already), `multilabel`
            (a logit per class, each with a mask of its own where its sigmoid is above its threshold), or `none` (the
            values are the answer: depth, a matte; `classes` names the maps).
        threshold: a probability, of one score and of masks; for `multilabel` also a tuple of one per class.
        smallest: least H and W of the core network's input, in pixels.
        whole: the operator that makes every score depend on the whole image, so that it is never run in tiles; "" where
            scores depend on what is around them.
    """

    classes: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...] = ()
    channels: int = 3
    dtype: str = "uint8"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stride: int = 1
    size_multiple: int = 1
    activation: str = "softmax"
    threshold: float | tuple[float, ...] = 0.5
    smallest: int = 1
    whole: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.classes, list | tuple):
            raise ValueError(f"classes {self.classes!r}; they are a list of names")
        set_ = object.__setattr__
        set_(self, "classes", tuple(str(name) for name in self.classes))
        set_(self, "colors", tuple(tuple(color) for color in self.colors) or voc_palette(len(self.classes)))
        for name in ("mean", "std"):
            values = getattr(self, name)
            # A string is a sequence too, and true a number.
            if isinstance(values, str) or any(isinstance(value, str | bool) for value in values):
                raise ValueError(f"{name} {values!r}; it is a list of numbers, one per channel")
            set_(self, name, tuple(float(value) for value in values))
        if isinstance(self.threshold, list | tuple):
            set_(self, "threshold", tuple(self.threshold))
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        if not 1 <= len(self.classes) <= 65536:
            return f"{len(self.classes)} classes; a card needs 1 to 65536"
        if len(self.colors) != len(self.classes):
            return f"{len(self.colors)} colors for {len(self.classes)} classes; give one each"
        if any(len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in self.colors):
            return "a color is not three numbers in 0..255"
        for name in ("channels", "stride", "size_multiple", "smallest"):
            if type(getattr(self, name)) is not int:
                return f"{name} {getattr(self, name)!r}; it must be a whole number"
        if self.dtype not in DTYPES:
            return f"dtype {self.dtype!r}; it must be one of {', '.join(DTYPES)}"
        if self.channels < 1 or len(self.mean) != self.channels or len(self.std) != self.channels:
            return f"{len(self.mean)} means and {len(self.std)} stds for {self.channels} channels"
        if not all(math.isfinite(value) for value in self.mean + self.std) or min(self.std) <= 0:
            return "mean and std must be finite, and std above 0"
        if self.stride < 1 or self.size_multiple < 1:
            return f"stride {self.stride} and size_multiple {self.size_multiple} must be at least 1"
        if self.smallest < 1:
            return f"smallest {self.smallest}; it must be at least 1 pixel"
        if type(self.whole) is not str or not self.whole.isprintable():
            return f"whole {self.whole!r}; it must be the name of an operator, or empty"
        if self.activation not in ACTIVATIONS:
            return f"activation {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
        if self.activation in ("sigmoid", "probability") and len(self.classes) != 2:
            return f"{len(self.classes)} classes with activation {self.activation}; one score has two classes"
        return self._problem_of_threshold()

    def _problem_of_threshold(self) -> str | None:
        each = isinstance(self.threshold, tuple)
        if each and self.activation != "multilabel":
            return f"several thresholds with activation {self.activation}; only multilabel takes one per class"
        if each and len(self.threshold) != len(self.classes):
            return f"{len(self.threshold)} thresholds for {len(self.classes)} classes; give one each, or one number"
        for value in self.threshold if each else (self.threshold,):
            if type(value) not in (int, float) or not 0 < value < 1:
                return f"threshold {value!r}; it must be a number between 0 and 1"
        return None

    @property
    def label_dtype(self) -> str:
        """`uint8`, or `uint16` for more than 256 classes."""
        return "uint8" if len(self.classes) <= 256 else "uint16"

    @property
    def scores(self) -> int:
        """Channels of the network's output."""
        return 1 if self.activation in ("sigmoid", "probability") else len(self.classes)

    @property
    def score_names(self) -> tuple[str, ...]:
        """A name for each score; one score is that of class 1."""
        return self.classes[-self.scores :]

    @property
    def kind(self) -> str:
        """What the network gives: `labels`, one a pixel; `masks`, which may overlap (multilabel); `values` (none)."""
        return {"multilabel": "masks", "none": "values"}.get(self.activation, "labels")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """A probability for each score."""
        return self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * self.scores

    @property
    def score_thresholds(self) -> tuple[float, ...]:
        """What each score is compared with: its threshold, as a logit where scores are logits."""
        if self.activation == "probability":
            return self.thresholds
        return tuple(math.log(value / (1 - value)) for value in self.thresholds)

    @property
    def score_threshold(self) -> float:
        """`score_thresholds` of a single score."""
        return self.score_thresholds[0]

    def to_json(self) -> str:
        return json.dumps({"version": CARD_VERSION} | asdict(self))

    @classmethod
    def from_json(cls, text: str, source: str) -> "ModelCard":
        """Parse a card. `source` names the file in errors. Raises DeployError."""
        try:
            data = json.loads(text)
            version = data.pop("version")
            if type(version) is not int or not 1 <= version <= CARD_VERSION:
                raise ValueError(f"version {version}, and this release reads versions 1 to {CARD_VERSION}")
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DeployError(
                f"{source} has a model card that cannot be used: {error}; export the model again"
            ) from error


def voc_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """The Pascal VOC colour map: distinct colours for `count` classes, the first black."""
    colors = []
    for index in range(count):
        red = green = blue = 0
        value = index
        for bit in range(7, -1, -1):
            red |= (value & 1) << bit
            green |= (value >> 1 & 1) << bit
            blue |= (value >> 2 & 1) << bit
            value >>= 3
        colors.append((red, green, blue))
    return tuple(colors)


@dataclass(frozen=True)
class Head:
    """How coarse scores become full-size scores: the network's last Resize, as ONNX defines it.

    Attributes:
        mode: `linear`, `nearest`, or `none` where the scores are full-size already.
        coordinates: `half_pixel`, `pytorch_half_pixel`, `asymmetric` or `align_corners`.
        factor: output over input size, (vertical, horizontal); None: the output has the padded image's size.
        rounding: of `nearest`: `round_prefer_floor`, `round_prefer_ceil`, `floor` or `ceil`.
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
        for name, allowed in (("mode", MODES), ("coordinates", COORDINATES), ("rounding", ROUNDINGS)):
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
        bytes_per_pixel: working memory for one pixel of padded image, estimated from its graph.
        output_bytes: of its result, per pixel of padded image.
        cost: its share of the core's work.
        tile: side in pixels, without halo, of the tiles that it runs fastest in, which fit the processor's caches; an
            image of more pixels is run in tiles of at most that even where memory holds it whole. None: whole.
        border: of a first stage that takes the image as it is, uint8 [N, H, W, C]: pixels of padding around the padded
            image, (top, left, bottom, right), of the card's mean like all padding. None: it takes a normalised image,
            float32 [N, C, H, W].
    """

    file: str
    input: str = "image"
    output: str = "scores"
    halo: tuple[int, int] | None = None
    period: int = 1
    whole: str = "its engine does not tell its receptive field; build it again"
    stride: tuple[int, int] = (1, 1)
    bytes_per_pixel: float = 0.0
    output_bytes: float = 0.0
    cost: float = 1.0
    tile: int | None = None
    border: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.border is not None:
            object.__setattr__(self, "border", tuple(self.border))
            if len(self.border) != 4 or not all(type(side) is int and side >= 0 for side in self.border):
                raise ValueError(f"border {self.border}; it must be four whole numbers of pixels")
        if self.halo is not None:
            halo = tuple(self.halo)
            if len(halo) != 2 or not all(type(side) is int and side >= 0 for side in halo):
                raise ValueError(f"halo {halo}; it must be two whole numbers of pixels")
            object.__setattr__(self, "halo", halo)
        object.__setattr__(self, "stride", tuple(self.stride))
        if len(self.stride) != 2 or not all(type(side) is int and side > 0 for side in self.stride):
            raise ValueError(f"stride {self.stride}; it must be two whole numbers of pixels, above 0")
        for name, value in (("period", self.period), ("tile", 1 if self.tile is None else self.tile)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} {value!r}; it must be a whole number above 0")
        for name in ("bytes_per_pixel", "output_bytes", "cost"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{name} {value!r}; it must be a number of at least 0")


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
            size = tuple(getattr(self, name))
            if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
                raise ValueError(f"{name} {size}; it must be a height and a width")
            object.__setattr__(self, name, size)
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
    """

    library: str
    version: str
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    portable: bool = False
    version_compatible: bool = False

    def __post_init__(self) -> None:
        if self.library not in ("tensorrt", "tensorrt_rtx"):
            raise ValueError(f"library {self.library!r}; it must be tensorrt or tensorrt_rtx")
        if type(self.version) is not str or not all(type(target) is str for target in self.targets):
            raise ValueError("its version and targets must be texts")
        profiles = tuple(p if isinstance(p, Profile) else Profile(**p) for p in self.profiles)
        if not profiles:
            raise ValueError("it has no profile")
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "profiles", profiles)


@dataclass(frozen=True)
class Manifest:
    """What an engine is: written by build-engine, read by the runtime before anything is loaded.

    Attributes:
        card: of the model.
        target: `cpu`, or the GPUs the plan is for: `sm86,sm89`.
        precision: the lowest in the graph: `float32`, `float16` or `int8`.
        head: what turns the core's scores into full-size ones.
        stages: the core network, in order.
        created_by: name and version of the builder.
        gpu: what the plan needs, in engines for GPUs.
        backend: of engines for the CPU, the library that was measured fastest: `onnxruntime` or `openvino`.
        members: name → {"bytes", "sha256"} of every other member of the file.
    """

    card: ModelCard
    target: str
    precision: str
    head: Head
    stages: tuple[Stage, ...]
    created_by: str
    gpu: GpuPlan | None = None
    backend: str = "onnxruntime"
    members: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("it has no stages")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}; this release knows {', '.join(PRECISIONS)}")
        if self.backend not in CPU_BACKENDS:
            raise ValueError(f"backend {self.backend!r}; this release knows {', '.join(CPU_BACKENDS)}")
        for value in (self.target, *(n for stage in self.stages for n in (stage.file, stage.input, stage.output))):
            if type(value) is not str:
                raise ValueError(f"{value!r} where a name belongs")

    def to_json(self) -> str:
        data = {item.name: getattr(self, item.name) for item in fields(self)}
        data["card"] = json.loads(self.card.to_json())
        data["head"] = asdict(self.head)
        data["stages"] = [asdict(stage) for stage in self.stages]
        data["gpu"] = self.gpu and asdict(self.gpu)
        data["members"] = dict(self.members)
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
            raise DeployError(f"{source} has no manifest of an engine: {error!r}; {_REMEDY}") from error
        if version != ENGINE_VERSION:
            raise DeployError(
                f"{source} is an engine of version {version}, and this release reads version "
                f"{ENGINE_VERSION}; upgrade fcn-deploy, or {_REMEDY}"
            )
        try:
            data["card"] = ModelCard.from_json(json.dumps(data["card"]), source)
            data["head"] = Head(**data["head"])
            data["stages"] = tuple(Stage(**stage) for stage in data["stages"])
            data["gpu"] = GpuPlan(**data["gpu"]) if data.get("gpu") else None
            data["members"] = {
                str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for name, entry in data["members"].items()
            }
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DeployError(f"{source} has a damaged manifest: {error!r}; {_REMEDY}") from error


_REMEDY = "build it again with build-engine"


def write_engine(path: str | os.PathLike, manifest: Manifest, members: Mapping[str, bytes]) -> Manifest:
    """Write an engine atomically and return its manifest with the members' checksums filled in.

    Args:
        path: replaced as one step; what was there stays whole if writing fails.
        manifest: its `members` are computed here.
        members: name → content of the stages, golden sample and report.
    """
    digests = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in members.items()
    }
    manifest = replace(manifest, members=digests)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        text = manifest.to_json().encode()
        archive.comment = hashlib.sha256(text).hexdigest().encode()
        for name, content in {MANIFEST: text, **members}.items():
            # A fixed date: the same build gives the same bytes.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return manifest


class EngineFile:
    """An engine opened for reading. Every member is checked against the manifest when it is read.

    Raises:
        DeployError: no such file, not an engine, truncated, edited, or of another version.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                magic = file.read(4)
            if magic != b"PK\x03\x04":
                raise DeployError(f"{path} is not an engine (it does not start as one); {_REMEDY}")
            self._archive = zipfile.ZipFile(self.path)
        except FileNotFoundError as error:
            raise DeployError(f"{path} does not exist; check the path, or {_REMEDY}") from error
        except OSError as error:
            raise DeployError(f"cannot read {path}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:  # of a version, or names, that are none
            raise DeployError(f"{path} is truncated or damaged ({error}); copy it again or {_REMEDY}") from error
        try:
            text = self._read(MANIFEST, MANIFEST_LIMIT)
            self.manifest = Manifest.from_json(text, str(path))
            if self._archive.comment != hashlib.sha256(text).hexdigest().encode():
                raise DeployError(f"{path} is damaged or was edited: its manifest fails its checksum; {_REMEDY}")
            for stage in self.manifest.stages:
                if stage.file not in self.manifest.members:
                    raise DeployError(f"{path}: the manifest does not list its stage {stage.file}; {_REMEDY}")
        except BaseException:
            self.close()
            raise

    def _read(self, name: str, limit: int) -> bytes:
        try:
            info = self._archive.getinfo(name)
            # Stored as is, so a small file cannot unpack into a large one.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
                raise DeployError(f"{self.path}: member {name} is packed or too long for an engine; {_REMEDY}")
            return self._archive.read(name)
        except KeyError as error:
            raise DeployError(f"{self.path} is not an engine (it has no {name}); {_REMEDY}") from error
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            raise DeployError(
                f"{self.path} is damaged at member {name} ({error}); copy it again or {_REMEDY}"
            ) from error

    def read(self, name: str) -> bytes:
        """The content of a member named in the manifest, after its length and SHA-256 were checked."""
        if name not in self.manifest.members:
            raise DeployError(f"{self.path} has no member {name}; {_REMEDY}")
        entry = self.manifest.members[name]
        content = self._read(name, entry["bytes"])
        if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DeployError(
                f"{self.path} is damaged or was edited: member {name} does not match its checksum; "
                f"copy it again or {_REMEDY}"
            )
        return content

    def verify(self) -> None:
        """Check every member; raises DeployError at the first that differs from the manifest."""
        for name in self.manifest.members:
            self.read(name)

    def close(self) -> None:
        self._archive.close()

    def __enter__(self) -> "EngineFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""The model card: what a network expects of an image, and what its scores mean. One JSON text wherever it is stored."""

import json
import math
from dataclasses import asdict, dataclass

from ..errors import DeployError

CARD_VERSION = 3  # 3: range and alone; 2: smallest, whole, and networks that give masks or values instead of labels
CARD_KEY = "fcn_deploy.card"  # the key of the card in ONNX and safetensors metadata
ACTIVATED_KEY = "fcn_deploy.activated"  # in ONNX metadata, "1": the scores of `multilabel` are probabilities already
DTYPES = ("uint8", "uint16", "int16", "float32")
PERCENTILE = "percentile"  # as a range: the 1st and 99th of each image's values
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
        dtype: of the image: uint8, uint16, int16 or float32.
        mean: per channel, in the image's own units; the network sees (image - mean) / std.
        std: likewise.
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
        range: (LO, HI): the numbers of files, and of arrays of any type, that are the network's 0 and the largest of
            `dtype` (1 of float32); `percentile`: the 1st and 99th of each image's values; None: numbers as they are.
        alone: the operator that makes an image's scores depend on what else is in its batch, so that images are run one
            at a time; "" where there is none.
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
    range: tuple[float, float] | str | None = None
    alone: str = ""

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
        if isinstance(self.range, list | tuple):
            set_(self, "range", tuple(self.range))
        problem = self._problem()
        if problem:
            raise ValueError(problem)

    def _problem(self) -> str | None:
        """What is wrong with it, or None."""
        return (
            self._problem_of_classes()
            or self._problem_of_numbers()
            or self._problem_of_range()
            or self._problem_of_threshold()
        )

    def _problem_of_classes(self) -> str | None:
        if not 1 <= len(self.classes) <= 65536:
            return f"{len(self.classes)} classes; a card needs 1 to 65536"
        if len(self.colors) != len(self.classes):
            return f"{len(self.colors)} colors for {len(self.classes)} classes; give one each"
        if any(len(color) != 3 or not all(0 <= value <= 255 for value in color) for color in self.colors):
            return "a color is not three numbers in 0..255"
        if self.activation not in ACTIVATIONS:
            return f"activation {self.activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
        if self.activation in ("sigmoid", "probability") and len(self.classes) != 2:
            return f"{len(self.classes)} classes with activation {self.activation}; one score has two classes"
        return None

    def _problem_of_numbers(self) -> str | None:
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
        for name in ("whole", "alone"):
            said = getattr(self, name)
            if type(said) is not str or not said.isprintable():
                return f"{name} {said!r}; it must be the name of an operator, or empty"
        return None

    def _problem_of_range(self) -> str | None:
        said = self.range
        if said is None or said == PERCENTILE:
            return None
        if not isinstance(said, tuple) or len(said) != 2 or any(type(value) not in (int, float) for value in said):
            return f"range {said!r}; it must be two numbers, {PERCENTILE!r} or null"
        if not -math.inf < said[0] < said[1] < math.inf:
            return f"range {said[0]:g} to {said[1]:g}; the first number must be below the second, and both finite"
        return None

    def _problem_of_threshold(self) -> str | None:
        several = self.threshold if isinstance(self.threshold, tuple) else None
        if several is not None and self.activation != "multilabel":
            return f"several thresholds with activation {self.activation}; only multilabel takes one per class"
        if several is not None and len(several) != len(self.classes):
            return f"{len(several)} thresholds for {len(self.classes)} classes; give one each, or one number"
        for value in (self.threshold,) if several is None else several:
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
                return f"threshold {value!r}; it must be a number between 0 and 1"
        return None

    @property
    def label_dtype(self) -> str:
        """`uint8`, or `uint16` for more than 256 classes."""
        return "uint8" if len(self.classes) <= 256 else "uint16"

    @property
    def no_data(self) -> int | None:
        """The label of pixels that are no image: 255, or 65535 for more than 255 classes; None where it is a class."""
        last = 255 if self.label_dtype == "uint8" else 65535
        return last if len(self.classes) <= last else None

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
        """The card's text, as `from_json` reads it."""
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


def check_card(card: ModelCard, channels: object, scores: object, source: str) -> None:
    """Raise DeployError where a card does not fit a model of these static channel counts, in and out."""
    for what, found, said in (("channels", channels, card.channels), ("scores", scores, card.scores)):
        if isinstance(found, int) and found != said:
            raise DeployError(f"{source} has {found} {what}, and its model card says {said}; mend the card")


def assumed_card(channels: object, scores: object, source: str, one_score: str = "sigmoid") -> ModelCard:
    """The card of a model that carries none: ImageNet's normalisation, classes without names.

    Args:
        channels, scores: static channel counts of the model's input and output.
        source: names the model in errors.
        one_score: `activation` of the card where there is one score alone.

    Raises:
        DeployError: one of them is not a number.
    """
    if not isinstance(channels, int) or not isinstance(scores, int):
        raise DeployError(
            f"{source} has no model card, and its channels ({channels} in, {scores} out) are not fixed "
            "numbers, so none can be assumed; export it with export-onnx"
        )
    # One score is a sigmoid's: background against something.
    count = max(scores, 2)
    rgb = channels == 3
    return ModelCard(
        classes=tuple(f"class {index}" for index in range(count)),
        channels=channels,
        mean=ModelCard.mean if rgb else (127.5,) * channels,
        std=ModelCard.std if rgb else (127.5,) * channels,
        activation=one_score if scores == 1 else "softmax",
    )

"""How to train: what a recipe is, and the named ones. Without torch, so that `train-fcn --help` lists them at once."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from fcn_deploy.runtime.errors import MisuseError

CLASS_WEIGHTS = ("none", "sqrt", "median")
SCHEDULES = ("one-cycle", "cosine", "poly")
WORTH = 60.0  # seconds that a run may lose to validation without a word


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training images.
        crops_per_megapixel: that a pass takes of an image, one at least.
        batch: crops per step.
        crop: (height, width) in pixels.
        rate: highest learning rate, of AdamW.
        backbone_rate: times `rate`, for the backbone, which starts from weights that are good already.
        schedule: of the learning rate: `one-cycle` (Smith, 2018); `cosine` (Loshchilov and Hutter, 2017) and `poly`
            (power 0.9; Chen et al., 2018), both after a linear warm-up over the first twentieth.
        weight_decay: of AdamW.
        ema: decay of a moving average of the weights, which is then what is validated and kept (Tarvainen and
            Valpola, 2017); 0: none.
        crop_scale: range by which crops are made smaller or larger.
        flip, turn, brightness, color, blur: see `fcn.augment.augment`.
        class_weights: `none`; `median` (median frequency over a class's own, as Eigen and Fergus, 2015);
            `sqrt` (its square root).
        jaccard: weight of a soft Jaccard loss beside the cross-entropy: 1 − IoU of probabilities, over the classes of
            the batch (Rahman and Wang, 2016). It counts a thin class as much as a large one, as mIoU does.
        hardest: share of the counted pixels that the cross-entropy is taken over, those of highest loss
            (Wu et al., 2016: bootstrapping); 1: all.
        validate_every: epochs from one validation to the next. The last tenth of the epochs is validated throughout.
        patience: stop after so many epochs without a better validation mIoU; 0: never.
        seed: of everything random.
        qat: round weights and activations as INT8 does (fcn.quantization), in training and validation.
        name: of the recipe it was made from.
    """

    epochs: int = 25
    crops_per_megapixel: float = 4.0
    batch: int = 8
    crop: tuple[int, int] = (224, 224)
    rate: float = 3e-3
    backbone_rate: float = 1.0
    schedule: str = "one-cycle"
    weight_decay: float = 1e-2
    ema: float = 0.0
    crop_scale: tuple[float, float] = (0.7, 1.5)
    flip: bool = True
    turn: bool = False
    brightness: float = 0.25
    color: float = 0.0
    blur: float = 0.0
    class_weights: str = "none"
    jaccard: float = 0.0
    hardest: float = 1.0
    validate_every: int = 1
    patience: int = 0
    seed: int = 0
    qat: bool = False
    name: str = "default"

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch", 2), ("validate_every", 1), ("patience", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise MisuseError(f"{_said(name)} is {getattr(self, name)}; it must be at least {low}")
        for name, low, high in (("brightness", 0, 1), ("color", 0, 1), ("blur", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise MisuseError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")
        for name in ("rate", "backbone_rate", "crops_per_megapixel"):
            if not 0 < getattr(self, name) < float("inf"):
                raise MisuseError(f"{_said(name)} is {getattr(self, name)}; it must be above 0")
        for name in ("weight_decay", "jaccard"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise MisuseError(f"{_said(name)} is {getattr(self, name)}; it must be 0 or more")
        if min(self.crop) < 32:
            raise MisuseError(f"crop {self.crop[0]}x{self.crop[1]}; both sides must be at least 32 pixels")
        smallest, largest = self.crop_scale
        if not 0 < smallest <= largest < 100:
            raise MisuseError(f"crop scale {smallest} to {largest}; it goes from smallest to largest, above 0")
        if not 0 <= self.ema < 1:
            raise MisuseError(f"ema is {self.ema}; a decay is from 0 (none) to below 1, such as 0.997")
        if not 0 < self.hardest <= 1:
            raise MisuseError(f"hardest is {self.hardest}; a share of the pixels is above 0 and at most 1")
        if self.class_weights not in CLASS_WEIGHTS:
            raise MisuseError(f"class weights {self.class_weights!r}; choose one of {', '.join(CLASS_WEIGHTS)}")
        if self.schedule not in SCHEDULES:
            raise MisuseError(f"schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")

    def validates(self, epoch: int) -> bool:
        """Whether the network is validated after an epoch, counted from 1."""
        return epoch % self.validate_every == 0 or epoch > self.epochs - max(1, self.epochs // 10)

    def fewer_validations(self, training: float, validating: float) -> int | None:
        """The `validate_every` at which validation takes about as long as training; None where it is worth no word.

        Args:
            training: seconds from one validation to the next.
            validating: seconds of one.
        """
        fewer = min(self.epochs, self.validate_every * math.ceil(validating / max(training, 0.1)))
        lost = (validating - training) * self.epochs / self.validate_every
        return fewer if fewer > self.validate_every and lost > WORTH else None


def _said(name: str) -> str:
    return name.replace("_", " ")


# The keys are the names; times are of EfficientNet-Lite0 on 2 CPU cores.
_VALUES = {
    "default": Recipe(),
    # Mirrored digits are none.
    "digits": Recipe(flip=False),
    # An hour: nearly whole photographs, and one scale below and above those that validation sees.
    "camvid": Recipe(
        epochs=90, crop=(320, 416), backbone_rate=0.5, ema=0.997, crop_scale=(0.6, 2.0), color=0.3, blur=0.1,
        jaccard=0.5, validate_every=5,
    ),
    # Minutes, to compare networks by.
    "camvid-short": Recipe(
        epochs=16, crop=(256, 320), backbone_rate=0.5, ema=0.99, crop_scale=(0.6, 2.0), color=0.3, blur=0.1,
        jaccard=0.5, validate_every=5,
    ),
    # Whole validation images of up to a megapixel cost more than the training.
    "nuclei": Recipe(
        epochs=60, crop=(256, 256), ema=0.99, crop_scale=(0.5, 2.0), turn=True, color=0.3, blur=0.1, validate_every=5,
        crops_per_megapixel=1,
    ),
}  # fmt: skip
RECIPES = {name: replace(recipe, name=name) for name, recipe in _VALUES.items()}


def named(name: str, **changes: Any) -> Recipe:
    """A recipe by name, with the values of `changes` that are not None in the place of its own.

    Raises:
        MisuseError: no such recipe, or a value that makes no sense.
    """
    if name not in RECIPES:
        raise MisuseError(f"recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], **{key: value for key, value in changes.items() if value is not None})


def described(recipe: Recipe, base: Recipe | None = RECIPES["default"]) -> str:
    """A recipe in words, as `epochs 40, crop 256x320`: what of it differs from `base`, or all of it."""
    words = []
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name in ("name", "seed", "qat") or (base is not None and value == getattr(base, field.name)):
            continue
        if isinstance(value, bool):
            words.append(field.name if value else f"no {field.name}")
            continue
        if isinstance(value, tuple):
            value = ("x" if field.name == "crop" else " to ").join(map(str, value))
        words.append(f"{_said(field.name)} {value}")
    return ", ".join(words)

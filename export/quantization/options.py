"""Which precisions a build may use, and what it may cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fcn_deploy.calibration.mask_options import MaskOptions
from fcn_deploy.calibration.ranges import METHODS
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.images.numbers import COMMON, ReadOptions

GOLDEN_ALONE = "the golden sample"  # as `calib`: no photographs, noise as that of the golden sample; for FP16 alone
Say = Callable[[str], None]  # called with a line when a phase begins


@dataclass(frozen=True)
class QuantizationOptions:
    """What low precision is asked for, how it is calibrated, and how much accuracy it may cost.

    Attributes:
        int8, fp8: whether convolutions may be INT8, or E4M3.
        fp16, bf16: whether the others may be FP16, or BF16; all layers, where no convolution is INT8 or FP8.
        fastest: on the CPU INT8 is tried, and kept only where it is faster than float32; of TensorRT's plans all
            precisions are. Sets `int8`.
        calib: source of images (see calibration.stream.open_stream): a folder, glob, list or data set; or
            GOLDEN_ALONE.
        reading: what the numbers of these images mean, where their files and the card do not say.
        count: of images to calibrate on, at most.
        method: how ranges are chosen: minmax, percentile, entropy or mse.
        labels: folder of labels named as the images; None: the gate compares with float32's labels.
        masks: what the values or colours of labels mean.
        max_drop: points of mIoU (or of agreement) that may be lost.
        max_class_drop: points of IoU that each class may lose; None: 2, or `max_drop` where that is more.
        ranges: file to read, or to write where it does not exist.
        seed: of the sample of images.

    Raises:
        MisuseError: options that contradict each other, or that nothing uses.
    """

    int8: bool = False
    fp8: bool = False
    fp16: bool = False
    bf16: bool = False
    fastest: bool = False
    calib: str | None = None
    reading: ReadOptions = field(default_factory=lambda: COMMON)
    count: int = 100
    method: str = "mse"
    labels: Path | None = None
    masks: MaskOptions = MaskOptions()  # noqa: RUF009 (frozen)
    max_drop: float = 0.5
    max_class_drop: float | None = None
    ranges: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.fastest:
            if self.calib is None:
                raise MisuseError("--fastest tries INT8, which needs real images to calibrate on: pass --calib FOLDER")
            object.__setattr__(self, "int8", True)
        if self.method not in METHODS:
            raise MisuseError(f"method {self.method!r}; choose one of {', '.join(METHODS)}")
        for first, second in (("int8", "fp8"), ("fp16", "bf16")):
            if getattr(self, first) and getattr(self, second):
                raise MisuseError(f"--{first} and --{second} are for the same layers; pass one of them")
        if self.quantized and self.calib in (None, GOLDEN_ALONE):
            raise MisuseError(f"--{self.precision} needs real images to calibrate on: pass --calib FOLDER")
        if self.fp16 and self.calib is None:
            raise MisuseError("--fp16 needs real images to find what overflows: pass --calib FOLDER (or --sizes)")
        if self.bf16 and self.calib is None:
            raise MisuseError("--bf16 needs real images to be judged by: pass --calib FOLDER (or --sizes)")
        self._check_use()
        if self.count < 1:
            raise MisuseError(f"--calib-count {self.count}; calibrate on 1 image or more")
        if not self.max_drop >= 0:
            raise MisuseError(f"--max-drop {self.max_drop}; give points of 0 or more")
        if self.max_class_drop is not None and not self.max_class_drop >= 0:
            raise MisuseError(f"--max-class-drop {self.max_class_drop}; give points of 0 or more")
        if self.labels is not None and not self.labels.is_dir():
            raise MisuseError(f"{self.labels} is not a folder; --labels names one with a label of each image's name")

        if self.masks and self.labels is None:
            raise MisuseError("--mask-values and --mask-colors say what --labels mean; pass --labels FOLDER")

    def _check_use(self) -> None:
        """Refuse what says how to do something that is not done."""
        changed = {name for name in self.__dataclass_fields__ if getattr(self, name) != _DEFAULTS[name]}
        if self.precision == "float32":
            for name, option in _OF_LOW_PRECISION.items():
                if name in changed:
                    raise MisuseError(f"{option} is for low precision; pass --int8, --fp8, --fp16 or --bf16")
        if not self.quantized and "ranges" in changed:
            raise MisuseError("--ranges is for --int8 and --fp8; pass one of them")
        if not self.int8 and "method" in changed:
            raise MisuseError(
                "--calib-method is for --int8 (FP8's range is that of the images); omit it or pass --int8"
            )

    @property
    def class_drop(self) -> float:
        """Points of IoU that each class may lose."""
        return max(CLASS_DROP, self.max_drop) if self.max_class_drop is None else self.max_class_drop

    @property
    def precision(self) -> str:
        """The lowest that is asked for: `int8`, `fp8`, `float16`, `bf16` or `float32`."""
        asked = {"int8": self.int8, "fp8": self.fp8, "float16": self.fp16, "bf16": self.bf16, "float32": True}
        return next(name for name, wanted in asked.items() if wanted)

    @property
    def quantized(self) -> bool:
        """Whether convolutions get Q/DQ, for which activations are calibrated."""
        return self.int8 or self.fp8

    @property
    def range_method(self) -> str:
        """How ranges are chosen. E4M3 is as fine near 0 whatever its largest value is: clipping gains nothing."""
        return "minmax" if self.fp8 else self.method


CLASS_DROP = 2.0  # points
_OF_LOW_PRECISION = {
    "calib": "--calib",
    "count": "--calib-count",
    "labels": "--labels",
    "max_drop": "--max-drop",
    "max_class_drop": "--max-class-drop",
}
_DEFAULTS = {item.name: item.default for item in QuantizationOptions.__dataclass_fields__.values()}

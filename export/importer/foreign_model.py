"""A model as it was given, run by ONNX Runtime at its own conventions: what everything made of it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.analysis.channel_layout import Channels, channels_of_input
from fcn_deploy.export.analysis.decision import Decision
from fcn_deploy.export.analysis.float_types import other_floats
from fcn_deploy.export.graph.edit import dims, label
from fcn_deploy.export.passes.as_float32 import as_float32
from fcn_deploy.export.tolerances import (
    DECISION_MARGIN,
    SIGMOID_ROUNDING,
    STANDARD_FORM,
    STANDARD_FORM_OF_HALF,
    TIED_PIXELS,
)
from fcn_deploy.runtime.backends.onnxruntime import one_line, session
from fcn_deploy.runtime.errors import DeployError
from onnx import ModelProto, TensorProto

IMAGE_TYPES = {
    TensorProto.FLOAT: "uint8", TensorProto.UINT8: "uint8", TensorProto.UINT16: "uint16", TensorProto.INT32: "uint8",
    TensorProto.INT64: "uint8",
}  # fmt: skip  # type of the input → dtype of the images that are assumed
WHOLE = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT32, TensorProto.INT64)
NUMPY = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(int32)": np.int32, "tensor(int64)": np.int64,
}  # fmt: skip  # ONNX Runtime's names of types
# Tried where a model declares no size: those that networks are made for, the small ones first.
TRIED_SIZES = (
    (64, 96), (64, 64), (128, 192), (224, 224), (256, 256), (256, 512), (320, 320), (384, 384), (416, 416), (480, 640),
    (512, 512), (513, 513), (473, 473), (640, 640), (512, 1024), (1024, 1024), (448, 768), (576, 576), (800, 800),
    (960, 960),
)  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """What the original's output was, and how it is told from the standard form's scores.

    Attributes:
        decision: that was cut off; None where it gave scores.
        background: it gave the second of two channels alone.
        argmax: labels alone are the same.
    """

    decision: Decision | None = None
    background: bool = False
    argmax: bool = False

    def agrees(self, expected: np.ndarray, scores: np.ndarray, tolerance: float, size: tuple[int, int]) -> bool:
        """Whether what the original gave is what these scores, [1,K,h,w], say."""
        rows, columns, _ = follows(expected.shape, size)
        if (expected.shape[rows], expected.shape[columns]) != scores.shape[2:]:
            return False
        # [K, h, w]: K axes are before or behind, and of one but for one.
        planes = np.moveaxis(expected, (rows, columns), (-2, -1)).reshape(-1, *scores.shape[2:])
        spread = float(np.ptp(scores)) or 1.0
        close = DECISION_MARGIN if tolerance == STANDARD_FORM else tolerance
        if self.decision is not None and self.decision.kind == "threshold":
            if planes.shape != scores[0].shape or len(np.unique(planes)) > 2:  # rounded values of many
                return False
            apart = scores[0] - self.decision.threshold
            wrong, ties = (planes > 0) != (apart > 0), apart == 0
            return not wrong[np.abs(apart) > close * spread].any() and (wrong & ties).mean() <= TIED_PIXELS
        if self.decision is not None or self.argmax:
            best = np.sort(scores[0], axis=0)[-2:]
            clear = best[1] - best[0] > close * spread if len(best) > 1 else np.ones(scores.shape[2:], bool)
            labels = planes[0] / self.decision.factor if self.decision is not None else planes.argmax(0)
            return not (labels != scores[0].argmax(0))[clear].any()
        wanted = scores[0][1:2] if self.background else scores[0]
        if planes.shape != wanted.shape or not np.isfinite(planes).all():
            return False
        spread = float(np.ptp(planes)) or 1.0
        return float(np.abs(planes - wanted).max()) <= tolerance * spread + SIGMOID_ROUNDING


class Original:
    """A model as it was given, run at its own conventions, at a size that it takes.

    Attributes:
        model: as read.
        name: of it, in errors.
        output: name of the output that is used.
        axis: of the channels in its input, 1 or 3.
        channels: of its input.
        kind: the input's type.
        size: (height, width) of an image that it takes.
    """

    def __init__(self, model: ModelProto, name: str, notes: list[str]) -> None:
        self.model, self.name = model, name
        self._read_input(notes)
        try:
            self._run = session(model.SerializeToString(), optimise=False)
            native = self._run.get_inputs()[0].type in NUMPY
        except DeployError:
            if not other_floats(model):
                raise
            native = False
        if not native:  # ONNX Runtime has no convolutions of double, and NumPy no bfloat16
            self._run = session(as_float32(model).model.SerializeToString(), optimise=False)
        self._random = np.random.default_rng(0)
        self.size, results = self._size_and_results()
        self.output, self.result = self._choose(results, notes)
        self.half = bool({"float16", "bfloat16"} & set(other_floats(model)))

    def _read_input(self, notes: list[str]) -> None:
        inputs, name = self.model.graph.input, self.name
        if len(inputs) > 1:
            names = ", ".join(value.name for value in inputs)
            raise DeployError(f"{name} has {len(inputs)} inputs ({names}); a segmentation model has one, the image")
        image = inputs[0]
        if image.type.WhichOneof("value") != "tensor_type":
            raise DeployError(
                f"{name}: input {image.name} is a {image.type.WhichOneof('value')}, and an image is a tensor"
            )
        self.kind = image.type.tensor_type.elem_type
        found = TensorProto.DataType.Name(self.kind).lower()
        shape = [dim if not isinstance(dim, int) or dim > 0 else None for dim in dims(image)]
        if len(shape) != 4:
            raise DeployError(
                f"{name}: input {image.name} is {found} {dims(image)}, which is no image; a segmentation model takes "
                "[N,C,H,W] or [N,H,W,C]"
            )
        if self.kind not in IMAGE_TYPES and self.kind not in (
            TensorProto.FLOAT16,
            TensorProto.DOUBLE,
            TensorProto.BFLOAT16,
        ):
            raise DeployError(f"{name}: input {image.name} is {found}; images are float, uint8, uint16 or int32")
        seen = channels_of_input(self.model)
        self.axis, self.channels = _layout(shape, seen, image.name, name, notes)
        sides = (2, 3) if self.axis == 1 else (1, 2)
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.declared = tuple(shape[side] if isinstance(shape[side], int) else None for side in sides)
        if self.axis == 3:
            notes.append(f"{name} takes [N,H,W,{self.channels}]; its input and output are brought into [N,C,H,W]")
        if self.kind != TensorProto.FLOAT:
            notes.append(f"{name} takes {found}; the engine gives it the image's numbers, from float32")

    @property
    def static(self) -> bool:
        """Whether a side of the image, or their number, is declared as one number."""
        return self.declared != (None, None) or self.batch is not None

    @property
    def normalises(self) -> bool:
        """Whether it takes the image's own whole numbers."""
        return self.kind in WHOLE

    def images(self, size: tuple[int, int] | None = None, count: int | None = None) -> np.ndarray:
        """Random images in the standard form, float32 [count,C,H,W]; as many as it takes at once."""
        shape = (count or self.batch or 1, self.channels, *(size or self.size))
        if self.normalises:
            return self._random.integers(0, 256, shape).astype(np.float32)
        return self._random.standard_normal(shape, dtype=np.float32)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output that is a tensor, by name, for images in the standard form; of the first of them."""
        if self.axis == 3:
            images = images.transpose(0, 2, 3, 1)
        images = images.astype(NUMPY[self._run.get_inputs()[0].type])
        names = [
            value.name for value in self.model.graph.output if value.type.WhichOneof("value") in (None, "tensor_type")
        ]
        if not names:
            value = self.model.graph.output[0]
            raise DeployError(f"{self.name}: output {value.name} is a {value.type.WhichOneof('value')}, not a tensor")
        results = run_quietly(self._run, images, names)
        return {
            name: result[:1] if len(images) > 1 and result.ndim and len(result) == len(images) else result
            for name, result in zip(names, results, strict=True)
        }

    def _size_and_results(self) -> tuple[tuple[int, int], dict[str, np.ndarray]]:
        """A size at which some output follows the image, and what the model gives there."""
        height, width = self.declared
        tried = [(height or rows, width or columns) for rows, columns in TRIED_SIZES]
        if height is None and width is None:
            tried = list(TRIED_SIZES)
        reason, last = None, {}
        for size in dict.fromkeys(tried):
            try:
                results = self.run(self.images(size))
            except DeployError:
                raise
            except Exception as error:
                reason = reason or one_line(error)[:300]
                continue
            if any(follows(result.shape, size) for result in results.values()):
                return size, results
            last = last or results
            # A size that is baked in is that of the output.
            for result in results.values():
                if result.ndim == 4 and self.declared == (None, None):
                    for own in (result.shape[2:], result.shape[1:3]):
                        if own not in tried and min(own) >= 8 and max(own) <= 2048:
                            tried.append(own)
        if last:
            raise DeployError(f"{self.name} {_no_scores(self.model, last)}")
        raise DeployError(
            f"{self.name} runs at none of the sizes that were tried ({len(dict.fromkeys(tried))}, from "
            f"{'×'.join(map(str, tried[0]))} on): {reason}"
        )

    def _choose(self, results: Mapping[str, np.ndarray], notes: list[str]) -> tuple[str, np.ndarray]:
        """The output that is used: the largest in H and W, scores before labels before a single map, the first."""

        def rank(item: tuple[int, str]) -> tuple:
            index, name = item
            result = results[name]
            rows, columns, factor = follows(result.shape, self.size)
            channels = result.size // (result.shape[rows] * result.shape[columns])
            whole = result.dtype.kind in "iub"
            kind = 1 if whole else (0 if channels > 1 else 2)
            return factor, "aux" in name.lower(), kind, index

        following = [name for name, result in results.items() if follows(result.shape, self.size)]
        chosen = min(enumerate(following), key=rank)[1]
        others = [value.name for value in self.model.graph.output if value.name != chosen]
        if others:
            notes.append(
                f"{self.name} has several outputs; {chosen} is used, and {', '.join(others)} left out (the largest, "
                "scores before labels, the first; --output names another)"
            )
        return chosen, results[chosen]

    def compare(self, model: ModelProto, cut: Cut, bgr: bool) -> None:
        """Raise DeployError where the standard form does not give what the model gives, at the size that it takes."""
        image = self.images()
        expected = self.run(image)[self.output]
        if np.isnan(expected).any():
            raise DeployError(
                f"{self.name} gives NaN for an image of noise; check its weights, and how it was exported"
            )
        run = session(model.SerializeToString(), optimise=False)
        fed = np.ascontiguousarray(image[:, ::-1]) if bgr else image
        try:
            scores = run_quietly(run, fed)[0]
        except Exception as error:
            raise DeployError(f"{self.name}, brought into [N,C,H,W], does not run: {one_line(error)[:300]}") from error
        tolerance = STANDARD_FORM_OF_HALF if self.half else STANDARD_FORM
        if not cut.agrees(expected, scores[:1], tolerance, self.size):
            raise DeployError(
                f"{self.name}, brought into [N,C,H,W], does not give what it gave at {self.size[0]}×{self.size[1]}; "
                "please report the model"
            )


def _layout(
    shape: Sequence[int | str | None], seen: Channels | None, image: str, name: str, notes: list[str]
) -> tuple[int, int]:
    """(axis of the channels, how many) of an input of this shape, whose first operators were `seen`."""
    if seen is not None and seen.axis in (1, 3):
        declared = shape[seen.axis]
        count = declared if isinstance(declared, int) else seen.count
        if seen.count is not None and count != seen.count:
            raise DeployError(
                f"{name}: input {image} is declared as {list(shape)}, and node {label(seen.node)} reads {seen.count} "
                f"channels on axis {seen.axis}"
            )
        if count is None:
            raise DeployError(f"{name} takes images of {declared} channels, which is no fixed number; export it again")
        return seen.axis, count
    if seen is not None:
        raise DeployError(f"{name}: node {label(seen.node)} reads axis {seen.axis} of input {image} as its channels")
    first, last = shape[1], shape[3]
    if isinstance(first, int) and (not isinstance(last, int) or last > 4 or first <= 4):
        return 1, first
    if isinstance(last, int):
        notes.append(f"{name}: no operator tells where its {last} channels are; they are taken for the last axis")
        return 3, last
    raise DeployError(f"{name} takes images of {first} channels, which is no fixed number; export it again")


def follows(shape: Sequence[int], size: tuple[int, int]) -> tuple[int, int, float] | None:
    """(axis of H, axis of W, factor) of an output of this shape, whose cells are `factor` pixels; None: it has none."""
    places = {4: ((2, 3), (1, 2)), 3: ((1, 2), (0, 1)), 2: ((0, 1),)}.get(len(shape), ())
    for rows, columns in places:
        height, width = shape[rows], shape[columns]
        if min(height, width) < 1:
            continue
        factor = max(1, round(size[0] / height))
        if all(
            side in (-(-whole // factor), whole // factor) for side, whole in zip((height, width), size, strict=True)
        ):
            return rows, columns, factor
    return None


def _no_scores(model: ModelProto, results: Mapping[str, np.ndarray]) -> str:
    """Why none of these outputs can be scores of an image's pixels."""
    shapes = ", ".join(f"{name} {list(result.shape)}" for name, result in results.items())
    detector = next((node for node in model.graph.node if node.op_type == "NonMaxSuppression"), None)
    if detector is not None:
        return f"gives {shapes}, found by node {label(detector)}: boxes, not a score per pixel"
    if all(result.ndim <= 2 for result in results.values()):
        return (
            f"gives {shapes}: a classifier's scores, not one per pixel; a segmentation network gives scores [N,K,H,W] "
            "(a classifier's dense layer after Flatten becomes a convolution by fcn_deploy.fcn.convolutionalize)"
        )
    return (
        f"labels no images of changing size: it gives {shapes} whatever the size. A segmentation network gives scores "
        "[N,K,H,W]; usual causes are boxes instead of scores, or interpolate(size=<int>)"
    )

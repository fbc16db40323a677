"""A foreign model as its file holds it, run by ONNX Runtime at its own conventions: what an import is compared with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fcn_deploy.export.analysis.accepted_sizes import run_quietly
from fcn_deploy.export.analysis.channel_layout import Channels, channels_of_input, channels_of_output
from fcn_deploy.export.analysis.float_types import other_floats
from fcn_deploy.export.dynamic_shapes.compare_with_source import Known
from fcn_deploy.export.graph.edit import Names, clone, dims, label
from fcn_deploy.export.importer.flattened import flattened_by, unflattened
from fcn_deploy.export.importer.output_kind import Shapes, kind_of_output, refusal_of
from fcn_deploy.export.importer.score_map import OutputChange, find_map_axes, may_be_either
from fcn_deploy.export.passes.as_float32 import as_float32
from fcn_deploy.export.tolerances import STANDARD_FORM, STANDARD_FORM_OF_HALF
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError, MisuseError, one_line
from fcn_deploy.runtime.process_memory import available_memory, forget_highest, highest, resident
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

# Type of the input → dtype of the images that are assumed.
IMAGE_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "uint8",
    TensorProto.UINT8: "uint8",
    TensorProto.UINT16: "uint16",
    TensorProto.INT16: "int16",
    TensorProto.INT32: "uint8",
    TensorProto.INT64: "uint8",
}
WHOLE_NUMBERS = (TensorProto.UINT8, TensorProto.UINT16, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64)
OTHER_FLOATS = (TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
# ONNX Runtime's names of types.
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16, "tensor(int16)": np.int16,
    "tensor(int32)": np.int32, "tensor(int64)": np.int64,
}  # fmt: skip
# Tried where a model declares no size: those that networks are made for, the small ones first.
TRIED_SIZES = (
    (64, 96), (64, 64), (128, 192), (224, 224), (256, 256), (256, 512), (320, 320), (384, 384), (416, 416), (480, 640),
    (512, 512), (513, 513), (473, 473), (640, 640), (512, 1024), (1024, 1024), (448, 768), (576, 576), (800, 800),
    (960, 960),
)  # fmt: skip

MEMORY_SHARE, MOST_MEMORY = 1 / 4, 2e9  # of what is free, and bytes, that a run at a size that is only tried may take
LEAST_TOLD = 128 * 128  # pixels, from which on a run tells how memory grows

Size = tuple[int, int]


class ForeignModel:
    """A model as its file holds it, run at its own conventions, at a size that it takes.

    Attributes:
        model: as read.
        name: of it, in errors.
        output: name of the output that is used.
        result: that output for one image of noise.
        channels_axis: of its input: 1 or 3.
        channels: of its input.
        batch: how many images it takes, where that is declared as a number.
        declared: (height, width) of its input, None where it is no number.
        input_type: a number of TensorProto.
        size: (height, width) of an image that it takes.
        half: whether weights or values in it are of fewer bits than float32's.
        flat: outputs whose pixels are flattened → factor of the image's size to their map's; they are read as maps.
        notes: what was found and chosen, a line each.

    Raises (at creation):
        DeployError: it takes no image, runs at no size, or gives nothing that follows the image.
    """

    def __init__(
        self,
        model: ModelProto,
        name: str,
        kinds: bool = False,
        dropped: Shapes | None = None,
        only: Size | None = None,
    ) -> None:
        """Of a model as read; `kinds`: outputs that are no scores of classes are refused, also by the shapes of those
        that were `dropped` from the model. `only`: the one size that it is run at.
        """
        self.model, self.name = model, name
        self._kinds, self._dropped = kinds, dict(dropped or {})
        self.flat: dict[str, int] = {}
        self.notes: list[str] = []
        self._read_input()
        self._only = only
        if only is not None and any(side not in (None, given) for side, given in zip(self.declared, only, strict=True)):
            own = "x".join(str(side or given) for side, given in zip(self.declared, only, strict=True))
            raise MisuseError(f"--fit {only[0]}x{only[1]}, and {name} takes {own} alone; say --fit {own}, or omit it")
        try:
            # Without an arena: large images that are run a few times are not to keep what they took.
            self._session = session(model.SerializeToString(), optimise=False, arena=False)
            self._native = self._session.get_inputs()[0].type in NUMPY_TYPES
        except DeployError:
            if not other_floats(model):
                raise
            self._native = False
        if not self._native:  # ONNX Runtime has no convolutions of double, and NumPy no bfloat16
            self._session = session(as_float32(model).model.SerializeToString(), optimise=False, arena=False)
        self._random = np.random.default_rng(0)
        self.size, self._image_run, results = self._find_size()
        results = self._channels_first(results)
        self.output = self._choose_output(results)
        self.result = results[self.output]
        self.half = bool({"float16", "bfloat16"} & set(other_floats(model)))

    def _read_input(self) -> None:
        image, name = self._image(), self.name
        self.input_type: int = image.type.tensor_type.elem_type
        type_name = TensorProto.DataType.Name(image.type.tensor_type.elem_type).lower()
        shape = [dim if not isinstance(dim, int) or dim > 0 else None for dim in dims(image)]
        if len(shape) != 4:
            raise DeployError(
                f"{name}: input {image.name} is {type_name} {dims(image)}, which is no image; a segmentation model "
                "takes [N,C,H,W] or [N,H,W,C]"
            )
        if self.input_type not in IMAGE_TYPES and self.input_type not in OTHER_FLOATS:
            raise DeployError(
                f"{name}: input {image.name} is {type_name}; images are float, uint8, uint16, int16 or int32"
            )
        self.channels_axis, self.channels = self._channels(shape, channels_of_input(self.model), image.name)
        height, width = shape[2:] if self.channels_axis == 1 else shape[1:3]
        self.batch = shape[0] if isinstance(shape[0], int) else None
        self.declared = (height if isinstance(height, int) else None, width if isinstance(width, int) else None)
        if self.channels_axis == 3:
            self.notes.append(f"{name} takes [N,H,W,{self.channels}]; its input and output are brought into [N,C,H,W]")
        if self.input_type != TensorProto.FLOAT:
            self.notes.append(f"{name} takes {type_name}; the engine gives it the image's numbers, from float32")

    def _image(self) -> ValueInfoProto:
        inputs = self.model.graph.input
        if len(inputs) > 1:
            names = ", ".join(value.name for value in inputs)
            raise DeployError(
                f"{self.name} has {len(inputs)} inputs ({names}); a segmentation model has one, the image"
            )
        if (kind := inputs[0].type.WhichOneof("value")) != "tensor_type":
            raise DeployError(f"{self.name}: input {inputs[0].name} is a {kind}, and an image is a tensor")
        return inputs[0]

    def _channels(self, shape: Sequence[int | str | None], seen: Channels | None, image: str) -> tuple[int, int]:
        """(axis of the channels, how many) of an input of this shape, whose first operators were `seen`."""
        name = self.name
        if seen is not None and seen.axis in (1, 3):
            declared = shape[seen.axis]
            count = declared if isinstance(declared, int) else seen.count
            if seen.count is not None and count != seen.count:
                raise DeployError(
                    f"{name}: input {image} is declared as {list(shape)}, and node {label(seen.node)} reads "
                    f"{seen.count} channels on axis {seen.axis}"
                )
            if count is None:
                raise _varying_channels(name, declared)
            return seen.axis, count
        if seen is not None:
            raise DeployError(
                f"{name}: node {label(seen.node)} reads axis {seen.axis} of input {image} as its channels"
            )
        first, last = shape[1], shape[3]
        if isinstance(first, int) and (not isinstance(last, int) or last > 4 or first <= 4):
            return 1, first
        if isinstance(last, int):
            self.notes.append(
                f"{name}: no operator tells where its {last} channels are; they are taken for the last axis"
            )
            return 3, last
        raise _varying_channels(name, first)

    @property
    def static(self) -> bool:
        """Whether a side of the image, or their number, is declared as one number."""
        return self.declared != (None, None) or self.batch is not None

    @property
    def takes_whole_numbers(self) -> bool:
        """Whether it takes the image's own whole numbers, and so normalises them by itself."""
        return self.input_type in WHOLE_NUMBERS

    def images(self, size: Size | None = None, count: int | None = None) -> np.ndarray:
        """Random images in the standard form, float32 [count,C,H,W]; as many as it takes at once."""
        shape = (count or self.batch or 1, self.channels, *(size or self.size))
        if self.takes_whole_numbers:
            return self._random.integers(0, 256, shape).astype(np.float32)
        return self._random.standard_normal(shape, dtype=np.float32)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Every output that is a tensor, by name, for images float32 [N,C,H,W]; of the first of them.

        Raises whatever ONNX Runtime raises, and DeployError where no output is a tensor.
        """
        if self.channels_axis == 3:
            images = images.transpose(0, 2, 3, 1)
        images = images.astype(NUMPY_TYPES[self._session.get_inputs()[0].type])
        names = [
            value.name for value in self.model.graph.output if value.type.WhichOneof("value") in (None, "tensor_type")
        ]
        if not names:
            value = self.model.graph.output[0]
            raise DeployError(f"{self.name}: output {value.name} is a {value.type.WhichOneof('value')}, not a tensor")
        results = run_quietly(self._session, images, names)
        size = (images.shape[2], images.shape[3]) if self.channels_axis == 1 else (images.shape[1], images.shape[2])
        results = [
            unflattened(result, size, self.flat[name]) if name in self.flat else result
            for name, result in zip(names, results, strict=True)
        ]
        return {
            name: result[:1] if len(images) > 1 and result.ndim and len(result) == len(images) else result
            for name, result in zip(names, results, strict=True)
        }

    def _find_size(self) -> tuple[Size, np.ndarray, dict[str, np.ndarray]]:
        """A size at which some output follows the image, images of it, and what the model gives for them."""
        height, width = self.declared
        tried = list(dict.fromkeys((height or rows, width or columns) for rows, columns in TRIED_SIZES))
        tried = tried if self._only is None else [self._only]
        reason: str | None = None
        ran: dict[Size, dict[str, np.ndarray]] = {}
        most, by_square, before = min(available_memory() * MEMORY_SHARE, MOST_MEMORY), 0.0, resident() or 0
        for size in tried:
            pixels = math.prod(size)
            if by_square * pixels**2 > most:  # attention: it would tell no more, and end the process
                continue
            forget_highest()
            try:
                images = self.images(size)
                results = self.run(images)
            except DeployError:
                raise
            except Exception as error:  # of ONNX Runtime, which has no base class of errors
                reason = reason or one_line(error, 300)
                continue
            finally:
                if pixels > LEAST_TOLD:
                    by_square = max(by_square, ((highest(before) or before) - before) / pixels**2)
            if any(find_map_axes(result.shape, size) for result in results.values()):
                return size, images, results
            flat = {name: flattened_by(self.model, name, result.shape, size) for name, result in results.items()}
            if any(flat.values()):
                self.flat = {name: factor for name, factor in flat.items() if factor}
                return size, images, self.run(images)
            ran[size] = results
        if ran:
            raise DeployError(f"{self.name} {_why_no_scores(self.model, ran)}")
        raise DeployError(
            f"{self.name} runs at none of the sizes that were tried ({len(tried)}, from "
            f"{'×'.join(map(str, tried[0]))} on): {reason}"
        )

    def _channels_first(self, results: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The results, with outputs [N,H,W,K] of as many classes as columns turned to [N,K,H,W]: shapes do not tell."""
        either = [name for name, result in results.items() if may_be_either(result.shape, self.size)]
        told = {name: channels_of_output(self.model, name) or self.channels_axis for name in either}
        turned = [name for name in either if told[name] == 3]
        if not turned:
            return results
        self.model = with_channels_first(self.model, turned)
        model = self.model if self._native else as_float32(self.model).model
        self._session = session(model.SerializeToString(), optimise=False, arena=False)
        return {name: result.transpose(0, 3, 1, 2) if name in turned else result for name, result in results.items()}

    def _choose_output(self, results: Mapping[str, np.ndarray]) -> str:
        """The output that is used: the largest in H and W, scores before labels before a single map, the first."""

        def order(item: tuple[int, str]) -> tuple[Any, ...]:
            index, name = item
            result = results[name]
            axes = find_map_axes(result.shape, self.size)
            assert axes is not None
            channels = result.size // (result.shape[axes.rows] * result.shape[axes.columns])
            kind = 1 if result.dtype.kind in "iub" else (0 if channels > 1 else 2)
            return axes.factor, "aux" in name.lower(), kind, index

        maps = [name for name, result in results.items() if find_map_axes(result.shape, self.size)]
        ranked = [name for _, name in sorted(enumerate(maps), key=order)]
        chosen = self._first_of_scores(ranked, results) if self._kinds else ranked[0]
        others = [value.name for value in self.model.graph.output if value.name != chosen]
        if others:
            self.notes.append(
                f"{self.name} has several outputs; {chosen} is used, and {', '.join(others)} left out (the largest, "
                "scores before labels, the first; --output names another, or several: a,b)"
            )
        return chosen

    def _first_of_scores(self, ranked: Sequence[str], results: Mapping[str, np.ndarray]) -> str:
        """The first of some outputs that may be scores of classes. Raises DeployError where none is."""
        kinds = {}
        for name in ranked:
            others = {other: result.shape for other, result in results.items() if other != name} | self._dropped
            others.pop(name, None)
            kinds[name] = kind = kind_of_output(self.model, name, results[name], self.size, others)
            if kind is None:
                return name
            if kind.asked:
                raise refusal_of(kind, self.name, name, results[name].shape)
        name, kind = next(iter(kinds.items()))
        assert kind is not None
        raise refusal_of(kind, self.name, name, results[name].shape)

    def known(self, change: OutputChange, bgr: bool) -> Known | None:
        """What it gave for the images that it was run on, as the standard form would; None: in another form, or of
        several images at once. Arguments as of compare.
        """
        same = self.input_type == TensorProto.FLOAT and self.channels_axis == 1 and not self.half and not self.flat
        if not same or change != OutputChange() or self.result.ndim != 4 or len(self._image_run) != 1:
            return None
        axes = find_map_axes(self.result.shape, self.size)
        if axes is None or (axes.rows, axes.columns) != (2, 3) or not np.isfinite(self.result).all():
            return None
        return Known(_reversed(self._image_run) if bgr else self._image_run, self.result)

    def compare(self, imported: ModelProto, change: OutputChange, bgr: bool, scores: np.ndarray | None = None) -> None:
        """Raise DeployError where the imported model does not give what this one gives, at the size that it takes.

        Args:
            imported: float32 [N,C,H,W] → scores [N,K,h,w].
            change: what its scores are to this model's output.
            bgr: its channels are in reverse.
            scores: what it gives for the known images; None: it is run.
        """
        image, expected = self._image_run, self.result
        if scores is None and image.shape[2:] != self.size:
            image = self.images()
            expected = self.run(image)[self.output]
        if np.isnan(expected).any():
            raise DeployError(
                f"{self.name} gives NaN for an image of noise; check its weights, and how it was exported"
            )
        if np.isinf(expected).any():
            raise DeployError(
                f"{self.name} gives infinite scores for an image of noise, which cannot be interpolated or compared; "
                "put a number in their place, such as -1e9 for a class that is never wanted, and export it again"
            )
        if scores is None:
            run = session(imported.SerializeToString(), optimise=False, arena=False)
            try:
                scores = run_quietly(run, _reversed(image) if bgr else image)[0]
            except Exception as error:
                raise DeployError(
                    f"{self.name}, brought into [N,C,H,W], does not run: {one_line(error, 300)}"
                ) from error
        tolerance = STANDARD_FORM_OF_HALF if self.half else STANDARD_FORM
        if not change.agrees(expected, scores[:1], tolerance, self.size):
            raise DeployError(
                f"{self.name}, brought into [N,C,H,W], does not give what it gave at {self.size[0]}×{self.size[1]}; "
                "please report the model"
            )


def with_channels_first(model: ModelProto, names: Sequence[str]) -> ModelProto:
    """A model whose outputs of these names are [N,K,H,W] where they were [N,H,W,K]."""
    model = clone(model)
    for name in names:
        last = Names(model)(f"{name}/channels_last")
        for node in model.graph.node:
            for place, each in enumerate(node.output):
                if each == name:
                    node.output[place] = last
            for place, each in enumerate(node.input):
                if each == name:
                    node.input[place] = last
        first = helper.make_node("Transpose", [last], [name], name=f"{name}/channels_first", perm=[0, 3, 1, 2])
        model.graph.node.append(first)
        output = next(value for value in model.graph.output if value.name == name)
        output.type.tensor_type.ClearField("shape")
    return model


def _reversed(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images[:, ::-1])


def _varying_channels(name: str, declared: object) -> DeployError:
    return DeployError(f"{name} takes images of {declared} channels, which is no fixed number; export it again")


def _why_no_scores(model: ModelProto, ran: Mapping[Size, Mapping[str, np.ndarray]]) -> str:
    """Why none of the outputs, at the sizes at which they were had, can be scores of an image's pixels."""
    (size, results), *more = ran.items()
    shapes = ", ".join(f"{name} {list(result.shape)}" for name, result in results.items())
    detector = next((node for node in model.graph.node if node.op_type == "NonMaxSuppression"), None)
    if detector is not None:
        return f"gives {shapes}, found by node {label(detector)}: boxes, not a score per pixel"
    pixels = [math.prod(-(-side // by) for side in size) for by in (1, 2, 4, 8)]
    if any(result.ndim in (1, 2) and set(result.shape) & set(pixels) for result in results.values()):
        return (
            f"gives {shapes}: the pixels of an image of {size[0]}×{size[1]} are flattened with its batch or its "
            "classes; export it with scores [N,K,H,W], or [N, H·W, K]"
        )
    if all(result.ndim <= 2 for result in results.values()):
        return (
            f"gives {shapes}: a classifier's scores, not one per pixel; a segmentation network gives scores [N,K,H,W] "
            "(a classifier's dense layer after Flatten becomes a convolution by fcn_deploy.fcn.convolutionalize)"
        )
    where = f"gives {shapes} for an image of {size[0]}×{size[1]}"
    other = more[0][1] if more else {}
    if other and all(other[name].shape == result.shape for name, result in results.items()):
        return (
            f"labels no images of changing size: it gives {shapes} whatever the size; usual causes are boxes instead "
            "of scores, or interpolate(size=<int>)"
        )
    maps = [result.shape for result in results.values() if result.ndim == 4]
    if any(min(shape[2] / size[0], shape[3] / size[1]) > 1 for shape in maps):
        return (
            f"{where}, more than one value per pixel, as super-resolution does; one for each pixel at most is read: "
            "leave out what enlarges beyond the image"
        )
    if maps:
        return (
            f"{where}, which is no whole share of it: convolutions without padding lose its edges, or a size is baked "
            "in; pad them (padding=k//2), and export it again"
        )
    return f"{where}; a segmentation network gives scores [N,K,H,W], and these may be boxes instead of scores"

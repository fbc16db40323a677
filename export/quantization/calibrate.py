"""What the activations of a core are on real images: ranges for INT8, magnitudes for FP16."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from fcn_deploy.calibration.ranges import Ranges, collect_histograms
from fcn_deploy.calibration.stream import ImageStream
from fcn_deploy.export.graph.edit import clone
from fcn_deploy.export.quantization.half import MAGNITUDE_OF, with_magnitudes
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.export.quantization.quantize import Range, measured_tensors
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.errors import DeployError, one_line
from fcn_deploy.runtime.pixels.no_data import filled
from fcn_deploy.runtime.pixels.prepare import prepare
from onnx import ModelProto

MOST_GROWTH = 2  # of images over the one that an arena began with: it then holds 1.12 times what one run takes


@dataclass(frozen=True)
class Activations:
    """What a core's activations were on the calibration images.

    Attributes:
        ranges: tensor → (low, high) to quantize.
        means: tensor → mean per channel, float.
    """

    ranges: dict[str, Range]
    means: dict[str, np.ndarray]

    @classmethod
    def of(cls, found: Ranges, method: str, symmetric: bool) -> "Activations":
        """The ranges that a method chooses, around zero or not."""
        ranges = {name: histogram.range(method, symmetric) for name, histogram in found.histograms.items()}
        return cls(ranges, {name: found.channel_mean(name) for name in found.means})


def key_of(core: ModelProto, card: ModelCard) -> str:
    """What ranges belong to: the network, and how images are prepared for it."""
    return hashlib.sha256(core.SerializeToString() + card.to_json().encode()).hexdigest()


def kept_ranges(options: QuantizationOptions, key: str) -> Ranges | None:
    """The ranges of an earlier build, where the options name some. Raises MisuseError where they are not of `key`."""
    if options.quantized and options.ranges is not None and options.ranges.exists():
        return Ranges.load(options.ranges, key)
    return None


def collect_ranges(
    core: ModelProto, card: ModelCard, images: ImageStream, options: QuantizationOptions, key: str
) -> Ranges:
    """The activations' histograms over calibration images; written where the options name a file.

    Raises:
        DeployError: no image can be read, or tensors are not finite.
    """
    ranges = collect_histograms(
        activation_reader(core), images, key, lambda image: prepare(filled(image, card)[0], card)
    )
    if options.ranges is not None:
        ranges.save(options.ranges)
    return ranges


def activation_reader(core: ModelProto) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A function that runs a float32 core on an input, [1, C, H, W], and gives the tensors to be measured."""
    model = clone(core)
    names = [name for name in measured_tensors(core) if name != "image"]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    data = model.SerializeToString()
    run, begun = None, 0

    def tensors(x: np.ndarray) -> dict[str, np.ndarray]:
        nonlocal run, begun
        try:
            # The arena keeps pages from one image to the next, without which half of the time goes into faults. It
            # never gives back what became too small, so it starts anew before that can be as much again.
            if run is None or x.size > MOST_GROWTH * begun:
                run, begun = None, x.size
                run = session(data)
            found = {"image": x} | dict(zip(names, run.run(names, {"image": x}), strict=True))
            # Sums of shapes and of token sequences are no feature maps; they stay float.
            return {name: t for name, t in found.items() if t.ndim == 4 and t.dtype == np.float32}
        except Exception as error:
            raise DeployError(f"the network failed on a calibration image: {one_line(error)}") from error

    return tensors


def largest_magnitudes(core: ModelProto, card: ModelCard, images: ImageStream) -> dict[str, float]:
    """Tensor → its largest magnitude over the images. Raises DeployError: no image."""
    run = session(with_magnitudes(core).SerializeToString())
    names = [value.name for value in run.get_outputs() if value.name.startswith(MAGNITUDE_OF)]
    largest: dict[str, float] = {}
    seen = 0
    for _, image in images:
        seen += 1
        for name, value in zip(names, run.run(names, {"image": prepare(filled(image, card)[0], card)}), strict=True):
            name = name.removeprefix(MAGNITUDE_OF)
            # max() would drop a NaN.
            largest[name] = float(np.maximum(largest.get(name, 0.0), value))
    if not seen:
        raise DeployError("no calibration image could be read; FP16 is never judged on invented data")
    return largest

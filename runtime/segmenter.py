"""Segmenter: an engine opened, and labels, masks, probabilities or values for images of any size."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np

from .arrays import AnyArray, Floats, Image, ImageSource, Labels, Masks, size_of
from .engine_format.model_card import ModelCard
from .errors import MisuseError
from .network import Network
from .pixels.no_data import masked
from .planning.plan import Plan
from .stream import Stream


class Segmenter:
    """Labels images of any size with an engine (or an ONNX model as it is).

    Args:
        model: path of a `.engine`, or of an `.onnx` with float32 [N,C,H,W] in and logits [N,K,H,W] out.
        device: `auto`: what the engine is for; `cpu`; `cuda` or `cuda:1` for a GPU.
        threads: of one call on the CPU; None: one per physical core.
        memory: bytes that the calls at work may take together on the CPU; None: 80 % of what is free.
        refine: let borders of labels follow those of the image (`head/refine.py`). Probabilities and values stay what
            the network gives.
        input_range: (LO, HI), numbers of images that become the network's 0 and the largest of its dtype (1 of
            float32), or `percentile`, the 1st and 99th of each image: images may be of any type of numbers then. None:
            as the card's `range` says; where it says nothing, images are in the card's dtype, and their numbers are the
            network's.
        output: of an engine of several, the name of the one that results are of; None: the first.

    Attributes:
        network: what our own commands use. No part of the API: it may change with any release.

    Thread-safe: many threads may call one Segmenter. It pickles: what is unpickled, in a worker process say, opens the
    file again that lies at its path then, with the same arguments.

    Raises:
        MisuseError: an argument out of its range, or a network whose labels cannot be refined.
        DeployError: a file that is missing, damaged, of another version, or for another device.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        device: str = "auto",
        threads: int | None = None,
        memory: int | None = None,
        refine: bool = False,
        input_range: tuple[float, float] | str | None = None,
        output: str | None = None,
    ) -> None:
        self._device, self._threads = device, threads
        self.network = Network(model, device, threads, memory, refine, input_range, output)
        if (
            input_range is None
        ):  # arrays come as their users have them; what is read from files is brought there already
            self.network.input_range = self.network.card.range

    @property
    def card(self) -> ModelCard:
        """What the network expects of an image, and what its scores mean."""
        return self.network.card

    @property
    def outputs(self) -> dict[str, ModelCard]:
        """Name → card of each output, of an engine of several; of one output alone, which has no name, nothing."""
        heads = self.network.heads
        return {name: heads.card_of(name) for name in heads.names}

    @property
    def backend(self) -> str:
        """Name of the library that runs the network. Raises MisuseError once it is closed."""
        return self.network.backend.name

    @property
    def precision(self) -> str:
        """The lowest in the network: `float32`, `float16` or `int8`."""
        return self.network.precision

    @property
    def refine(self) -> bool:
        """Whether borders of labels follow those of the image."""
        return self.network.refine

    def plan(self, height: int, width: int, bands: bool = False, kinds: Sequence[str] = ("labels",)) -> Plan:
        """How an image of this size, in pixels, is run: whole, or in tiles.

        Args:
            height: of the image.
            width: of the image.
            bands: plan it as `bands` does, which takes little memory.
            kinds: of results that are wanted; others than labels count in the memory.

        Raises:
            OverBudgetError: memory is too small, or no profile of an engine for GPUs takes it.
        """
        return self.network.plan(height, width, bands, kinds)

    def __call__(self, image: Image, valid: Masks | None = None) -> Labels:
        """Labels of one image.

        Args:
            image: [H, W, 3] uint8 RGB, or the channels and dtype of the card; any H, W ≥ 1.
            valid: bool [H, W], False where a pixel is no image: the network is shown its mean there, and the label is
                `card.no_data`. So it is where the image is a numpy.ma.MaskedArray and one of a pixel's bands is masked,
                and where a float image is NaN or infinite.

        Returns:
            [H, W] uint8, or uint16 for more than 256 classes.

        Raises:
            MisuseError: an array that the card does not allow, a network of `masks` or `values`, or pixels without data
                where every label is a class.
            DeployError: the image exceeds the memory budget, or the network fails or gives scores that are not finite.
        """
        return self.network.result(masked(image, valid), "labels")

    def probabilities(self, image: Image, valid: Masks | None = None) -> Floats:
        """Of each class at each pixel: float32 [K, H, W]; [1, H, W] of a network of one score, that of class 1.

        The network's scores interpolated, and then the softmax or sigmoid of them: in the network's own order. NaN
        where there is no data.

        Raises:
            MisuseError: as a call, or a network of `values`.
            DeployError: as a call.
        """
        return self.network.result(masked(image, valid), "probabilities")

    def masks(self, image: Image, valid: Masks | None = None) -> Masks:
        """Where each class of a `multilabel` network is above its threshold: bool [K, H, W].

        False where there is no data.

        Raises:
            MisuseError: as a call, or a network of any other activation.
            DeployError: as a call.
        """
        return self.network.result(masked(image, valid), "masks")

    def values(self, image: Image, valid: Masks | None = None) -> Floats:
        """The network's own output at full size: float32 [K, H, W]. A regression map (activation `none`), or logits.

        Where the network ends in a Softmax or Sigmoid that does not change labels, an engine gives what goes into it.
        NaN where there is no data.

        Raises:
            MisuseError, DeployError: as for a call.
        """
        return self.network.result(masked(image, valid), "values")

    def results(self, image: Image, *kinds: str, valid: Masks | None = None) -> tuple[AnyArray, ...]:
        """Several results of one image, by one run of the network.

        Args:
            image: as for a call.
            kinds: `labels`, `probabilities`, `masks` or `values`; of other outputs than the one that was chosen, after
                their name: `depth/values`.
            valid: as for a call.

        Raises:
            MisuseError, DeployError: as for a call; no such output.
        """
        network = self.network
        kinds = network.heads.check_kinds(*kinds)
        checked = network.checked(masked(image, valid))
        return network.run(checked, network.plan(*size_of(checked), kinds=kinds, source=checked), kinds)

    def heatmap(self, image: Image, valid: Masks | None = None) -> Floats:
        """The coarse score map, cropped to the image: float32 [K, ⌈H/stride⌉, ⌈W/stride⌉].

        Raises:
            MisuseError: as a call, or an ONNX model, whose coarse scores are not marked; build-engine finds them.
            DeployError: as a call.
        """
        return self.network.heatmap(masked(image, valid))

    @overload
    def map(
        self,
        images: Iterable[Image],
        *,
        kind: Literal["labels"] = "labels",
        return_exceptions: Literal[False] = False,
        reuse: bool = False,
    ) -> Iterator[Labels]: ...

    @overload
    def map(
        self, images: Iterable[Image], *, kind: str, return_exceptions: Literal[False] = False, reuse: bool = False
    ) -> Iterator[AnyArray]: ...

    @overload
    def map(
        self, images: Iterable[Image], *, kind: str = "labels", return_exceptions: bool, reuse: bool = False
    ) -> Iterator[AnyArray | Exception]: ...

    def map(
        self, images: Iterable[Image], *, kind: str = "labels", return_exceptions: bool = False, reuse: bool = False
    ) -> Iterator[AnyArray | Exception] | Iterator[AnyArray]:
        """Labels of a stream of images of mixed sizes, in order; a few images are in work at once.

        Results are those of single calls, bit for bit. Small images of equal padded size are run in batches of 8 where
        the stream measures that to be faster on this machine, and only if the backend's scores are equal then.

        Args:
            images: as for a call; a MaskedArray for pixels without data. Read in the caller's thread, up to 32 images
                or 64 megapixels ahead (less where memory is short). For a live source whose labels are wanted at once,
                call the Segmenter instead.
            kind: `labels`, `probabilities`, `masks` or `values`; as for `results` of other outputs.
            return_exceptions: give the exception in place of an image's labels, and go on with the next.
            reuse: the images are frames of a fixed camera: what equals the frame before, within the halo, is not
                computed again. For labels of networks whose labels depend on a part of the image each, on the CPU.

        Raises:
            MisuseError: `reuse` of a network that it is not for, or of another kind.
            Exception: what a call raises, after the labels of the images before; and what `images` raises.
        """
        kinds = self.network.heads.check_kinds(kind)
        stream = Stream(self.network, kinds)
        if reuse and kinds != ("labels",):
            raise MisuseError(f"reuse is of labels, and the kind is {kind}; omit one of them")
        if reuse:
            return stream.reused(images, return_exceptions)
        return stream.outcomes(images, return_exceptions)

    def bands(self, image: ImageSource, start: int = 0, kind: str = "labels") -> Iterator[tuple[int, AnyArray]]:
        """Results of an image too large to be held, from top to bottom.

        Args:
            image: an array as for a call, or anything with its `shape`, `dtype`, `ndim` and `image[top:bottom,
                left:right]`, of which only the tile at hand is read: a numpy.memmap, a reader of files. Its parts may
                be MaskedArrays, for pixels without data. To refine labels, their pixels are read once more, in blocks
                of some hundred a side.
            start: the first row wanted, to go on where a run ended.
            kind: `labels`, `probabilities`, `masks` or `values`.

        Yields:
            (first row, labels [rows, W], or of another kind [K, rows, W]), each row once, exactly those of the call.

        Raises:
            MisuseError, DeployError: as for a call.
        """
        return map(_first, self.network.bands_of(image, start, kind))

    def warmup(self, sizes: Iterable[tuple[int, int]] | None = None) -> None:
        """Run at each (height, width), so that later calls of these sizes meet no first-time cost.

        None: at the OPT of each profile of a plan for GPUs, for which TensorRT for RTX compiles then, and keeps it.

        Once, or on a GPU six times: a CUDA graph is captured of a size that comes again, in each of two lanes.
        """
        gpu = None if self.network.manifest is None else self.network.manifest.gpu
        best = () if gpu is None else [profile.opt for profile in gpu.profiles]
        # The largest first: a GPU's graphs are made anew when its buffers grow.
        for height, width in sorted(best if sizes is None else sizes, key=math.prod, reverse=True):
            dtype = self.card.dtype if self.network.input_range is None else "float32"
            for _ in self.network.backend.warming():
                self.network.result(np.zeros((height, width, self.card.channels), dtype))

    def close(self) -> None:
        """Release the network. Calling the Segmenter afterwards raises MisuseError."""
        self.network.close()

    def __enter__(self) -> "Segmenter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["Segmenter"], tuple[Any, ...]]:
        """What opens it again. Raises MisuseError once it is closed."""
        network = self.network
        _ = network.backend
        return Segmenter, (
            network.path.absolute(),
            self._device,
            self._threads,
            network.memory,
            network.refine,
            network.input_range,
            network.heads.chosen or None,
        )


def _first(band: tuple[int, tuple[AnyArray, ...]]) -> tuple[int, AnyArray]:
    top, results = band
    return top, results[0]

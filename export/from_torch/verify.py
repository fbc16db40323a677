"""An exported graph beside its network: what PyTorch gives at many sizes, and how far ONNX Runtime is from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from fcn_deploy.export.analysis.accepted_sizes import AcceptedSizes, run_quietly
from fcn_deploy.export.analysis.model_end import ends_in_sigmoid
from fcn_deploy.export.analysis.near_ties import picks_places, rounded_otherwise
from fcn_deploy.export.dynamic_shapes.baked_node import describe_cause
from fcn_deploy.export.from_torch.network import traced_size
from fcn_deploy.export.tolerances import EXPORTED_MODEL, SIGMOID_ROUNDING
from fcn_deploy.fcn.architecture import upsample
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.errors import DeployError, one_line
from torch import nn

# Never traced: one pixel, primes, one side eight times the other, below and above the traced size, each side beyond
# 256, multiples of 32. Each is as small as what it shows allows, as running the network is what an export waits for;
# so the fifth and tenth, of which two images are run at once, are small ones.
VERIFIED_SIZES = (
    (1, 1), (2, 3), (7, 13), (31, 33), (37, 41), (11, 88), (61, 97), (13, 263), (257, 11), (88, 11),
    (97, 101), (96, 64), (101, 29), (288, 32),
)  # fmt: skip


@dataclass(frozen=True)
class SizeDifference:
    """How far ONNX and PyTorch are apart at one size.

    Attributes:
        size: (height, width) of the images.
        batch: how many there were.
        logits: the largest difference, as a share of the logits' range.
    """

    size: tuple[int, int]
    batch: int
    logits: float


class ExpectedScores:
    """What PyTorch gives at a traced size, and at others, which never are: (images, scores), in this order.

    Each is computed when it is first asked for: a graph that fails at a small size costs no more than that.

    Attributes:
        takes_two: whether the network takes two images at once.
    """

    def __init__(
        self,
        model: nn.Module,
        behaviour: AcceptedSizes,
        fit: str,
        channels: int,
        name: str,
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        self._run, self._channels, self._name = _any_size(model, behaviour, fit), channels, name
        self._sizes = (traced_size(behaviour), *sizes)
        self.takes_two = _takes_two(model, channels, self._sizes[0])
        self._random = np.random.default_rng(0)
        self._found: list[tuple[np.ndarray, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Raises DeployError where PyTorch fails."""
        for index in range(len(self._sizes)):
            if index == len(self._found):
                self._found.append(self._at(index))
            yield self._found[index]

    def _at(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        height, width = self._sizes[index]
        batch = 2 if self.takes_two and index % 5 == 0 and index else 1
        images = self._random.standard_normal((batch, self._channels, height, width), dtype=np.float32)
        return images, self.of(images)

    def of(self, images: np.ndarray) -> np.ndarray:
        """What PyTorch gives for images of any size. Raises DeployError where it fails."""
        with torch.inference_mode():
            try:
                return self._run(torch.from_numpy(images)).numpy()
            except Exception as error:
                height, width = images.shape[2:]
                raise DeployError(f"{self._name} fails in PyTorch at {height}×{width}: {one_line(error)}") from error


def expected_scores(
    model: nn.Module,
    behaviour: AcceptedSizes,
    fit: str,
    channels: int,
    name: str,
    sizes: Sequence[tuple[int, int]] = VERIFIED_SIZES,
) -> ExpectedScores:
    """What PyTorch gives at a traced size, and at `sizes`, for verify."""
    return ExpectedScores(model, behaviour, fit, channels, name, sizes)


def _takes_two(model: nn.Module, channels: int, size: tuple[int, int]) -> bool:
    """Whether a network takes two images at once; programs that were exported for one do not, nor `x.squeeze(0)`."""
    try:
        with torch.inference_mode():
            return len(model(torch.zeros(2, channels, *size))) == 2
    except Exception:  # of whatever it is made of
        return False


def _any_size(model: nn.Module, sizes: AcceptedSizes, fit: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """In PyTorch, what the graph does: pad or resize, run, upsample, crop."""
    multiple, smallest = sizes.multiple, sizes.smallest

    def padded(x: torch.Tensor) -> torch.Tensor:
        size = x.shape[2:]
        down, right = (-(-max(side, smallest) // multiple) * multiple - side for side in size)
        logits = model(F.pad(x, (0, right, 0, down)))
        return (upsample(logits, sizes.factor) if sizes.factor > 1 else logits)[:, :, : size[0], : size[1]]

    def resized(x: torch.Tensor) -> torch.Tensor:
        size = list(x.shape[2:])
        nearest = [max((side + multiple // 2) // multiple * multiple, multiple, smallest) for side in size]
        nearest = nearest if sizes.only is None else list(sizes.only)
        return F.interpolate(model(F.interpolate(x, nearest, mode="bilinear")), size, mode="bilinear")

    return resized if fit == "resize" else padded


def verify(
    expected: ExpectedScores, graph: onnx.ModelProto, name: str, written: onnx.ModelProto
) -> list[SizeDifference]:
    """Run ONNX Runtime beside what PyTorch gave, at all sizes but the first, which was traced.

    Where rounding decides between places of maxima, each score is compared with the nearest that PyTorch gives.

    Args:
        expected: of PyTorch.
        graph: that is run.
        name: of the model, for errors.
        written: the graph as the exporter left it, in which the cause of a difference is looked for.

    Raises:
        DeployError: they differ, or ONNX Runtime fails: names the node and the usual cause.
    """
    run = session(graph.SerializeToString())
    # The range of a single pixel's scores says little, so that of the traced size counts as well.
    pairs = iter(expected)
    usual = max(float(np.ptp(next(pairs)[1])), 1e-6)
    rounding, picks = SIGMOID_ROUNDING if ends_in_sigmoid(graph) else 0.0, picks_places(graph)
    differences = []
    for images, scores in pairs:
        batch, _, height, width = images.shape
        try:
            logits = run_quietly(run, images)[0]
        except Exception as error:
            raise DeployError(
                f"{name} has a size baked in: it fails at {height}×{width}. {describe_cause(written, one_line(error))}"
            ) from error
        if logits.shape != scores.shape:
            raise DeployError(
                f"{name} has a size baked in: at {height}×{width} it gives {list(logits.shape)} instead of "
                f"{list(scores.shape)}. {describe_cause(written, '')}"
            )
        apart, most = np.abs(logits - scores), max(float(np.ptp(scores)), usual)
        for others in rounded_otherwise(images) if picks else ():
            if apart.max() - rounding <= EXPORTED_MODEL * most:
                break
            apart = np.minimum(apart, np.abs(logits - expected.of(others)))
        difference = max(float(apart.max()) - rounding, 0.0) / most
        if not difference <= EXPORTED_MODEL:
            raise DeployError(
                f"{name} gives other scores in ONNX than in PyTorch: at {height}×{width} they differ by "
                f"{difference:.1e} of their range (limit {EXPORTED_MODEL:.0e}). {describe_cause(written, '')}"
            )
        differences.append(SizeDifference((height, width), batch, difference))
    return differences

"""What runs a core network, one library a file, behind one protocol.

Backend    runs a core: images in, scores or labels out.
    HostBackend        prepares and labels by NumPy around one session for each stage
    TensorRTBackend    does all of it on the GPU
Session    runs one network on arrays in host memory, for HostBackend.
    OnnxRuntimeSession, OpenVinoSession
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..arrays import AnyArray, Floats, Image, Labels

CPU_BACKENDS = ("onnxruntime", "openvino")  # what an engine for the CPU may name in its manifest

# What an engine may be built for beside the CPU, and the provider that runs it; the CPU takes what that cannot.
ORT_TARGETS = {
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-rtx": "NvTensorRTRTXExecutionProvider",
}
# Compute capabilities that TensorRT for RTX builds plans for, on any machine (its support matrix, and what its builder
# takes). sm121 is in machines with Arm processors alone, where plans for it are built.
RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
OLDEST_GPU = "sm75"  # that any library here has plans for
KERNELS_PTX = "kernels.ptx"  # members of an engine file


class Backend(Protocol):
    """A core network, opened; safe to use from many threads at once.

    Images are [H, W, C] as the card says, and checked; they are padded to what `padded_size` gives. Each verb raises
    DeployError where the network fails, OverBudgetError where its memory does not suffice, and MisuseError once it is
    closed.

    Attributes:
        name: of the library.
        batches: whether several images at once may be faster than one after the other.
        first_runs: how many `warming` has.
        streams: runs whose memory it keeps side by side, whichever of them comes next.
    """

    name: str
    batches: bool
    first_runs: int
    streams: int

    def scores(self, images: Sequence[Image]) -> Floats:
        """Uncropped scores of images of one padded size: float32 [N, K, h, w]."""

    def labels(self, images: Sequence[Image]) -> list[Labels]:
        """[H, W] uint8 or uint16 of each of some images of one padded size that are run whole, by the card's rule."""

    def run_stage(self, index: int, part: AnyArray) -> AnyArray:
        """One stage of a tile: a part of an image, or [1, C, h, w] of the stage before → [K, h', w']."""

    def warming(self) -> Iterator[None]:
        """Once for each run of a size after which nothing more is done for the first time: run it at each."""

    def release(self) -> None:
        """Give back the working memory that earlier calls took and that is kept for later ones."""

    def close(self) -> None:
        """Release the network, once the calls that run have ended."""


class Session(Protocol):
    """One network in one library, on arrays in host memory; safe to use from many threads at once."""

    name: str
    streams: int  # as of `Backend`

    def run(self, image: AnyArray) -> AnyArray:
        """[N, C, H, W] (or [N, H, W, C]) of the network's input type → [N, K, h, w]."""

    def release(self, image: AnyArray) -> AnyArray:
        """As `run`, of a small input; what earlier runs took is given back."""

    def close(self) -> None:
        """Release the network."""


@dataclass(frozen=True)
class Layer:
    """The time of one layer, as its library runs it.

    Attributes:
        name: of the node; fused ones carry the name the library gives them.
        operator: of the node: QLinearConv.
        milliseconds: median over some runs.
        kernel: what ran it, where the library says.
    """

    name: str
    operator: str
    milliseconds: float
    kernel: str = ""


def kernels_for(target: str) -> str:
    """The member that holds the kernels' machine code for a GPU such as `sm89`."""
    return f"kernels-{target}.cubin"

"""What runs a core network, one library a file."""

from dataclasses import dataclass

CPU_BACKENDS = ("onnxruntime", "openvino")  # what an engine for the CPU may name in its manifest

# What an engine may be built for beside the CPU, and the provider that runs it; the CPU takes what that cannot.
ORT_TARGETS = {
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-rtx": "NvTensorRTRTXExecutionProvider",
}
KERNELS_PTX = "kernels.ptx"  # members of an engine file


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

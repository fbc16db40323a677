"""What runs a core network, one library a file."""

# What an engine may be built for beside the CPU, and the provider that runs it; the CPU takes what that cannot.
ORT_TARGETS = {
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-rtx": "NvTensorRTRTXExecutionProvider",
}
KERNELS_PTX = "kernels.ptx"  # members of an engine file


def kernels_for(target: str) -> str:
    """The member that holds the kernels' machine code for a GPU such as `sm89`."""
    return f"kernels-{target}.cubin"

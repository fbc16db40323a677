"""What runs a core network, one library a file."""

KERNELS_PTX = "kernels.ptx"  # members of an engine file


def kernels_for(target: str) -> str:
    """The member that holds the kernels' machine code for a GPU such as `sm89`."""
    return f"kernels-{target}.cubin"

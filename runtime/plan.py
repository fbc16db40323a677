"""From an image's size to how it is run, under a memory budget."""

import os
from dataclasses import dataclass
from pathlib import Path

from runtime.engine_file import ModelCard
from runtime.errors import OverBudgetError
from runtime.prepare import padded_size


@dataclass(frozen=True)
class Plan:
    """One run of the core: the image, padded right and bottom.

    Attributes:
        size: of the image, (height, width) in pixels.
        padded: what the core sees.
        bytes: estimated working memory; 0 where it is not known (a plain ONNX).
        profile: index of the TensorRT profile that runs it, on a GPU.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    bytes: int
    profile: int | None = None


def plan_run(size: tuple[int, int], card: ModelCard, bytes_per_pixel: float, memory: int) -> Plan:
    """Plan one image of `size` (height, width). Raises OverBudgetError where it exceeds `memory` bytes."""
    padded = padded_size(*size, card.size_multiple)
    needed = int(padded[0] * padded[1] * bytes_per_pixel)
    if needed > memory:
        raise OverBudgetError(
            f"an image of {size[0]}×{size[1]} pixels needs about {needed / 1e9:.1f} GB, over the memory "
            f"budget of {memory / 1e9:.1f} GB; raise it with memory= (--memory), or label the image in parts"
        )
    return Plan(size, padded, needed)


def available_memory() -> int:
    """Bytes that can be allocated now without swapping, also inside a container whose limit is set by cgroup v2."""
    limits = [int(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            # What was read from files is counted as used, and given back when it is needed.
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            limits.append(int(limit) - used)
    except (OSError, ValueError):
        pass  # not Linux, or no cgroup: physical memory is the bound
    return max(0, min(limits))

"""What this process holds of the machine's memory, and what it may still take, as Linux tells."""

import ctypes
import logging
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What mallopt(3) sets: the free memory at the end of a heap, and the length of a block, from which on memory goes back
# to the system when it is freed; and how many heaps threads share.
TRIM, BLOCK, HEAPS = -1, -3, -8
KEEPING = {TRIM: 1 << 27, BLOCK: 1 << 25, HEAPS: 2}  # the longest block that glibc takes
# By itself glibc raises the length of a block to that of the longest that was freed. What OpenVINO frees from shape to
# shape of tiles is then left in pieces: 402 MB at its end for 246 in use.
BOUNDED = {BLOCK: 1 << 20, HEAPS: 1}


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


def resident() -> int | None:
    """Bytes of resident memory; None where that cannot be known."""
    return _status("VmRSS")


def highest(*seen: int | None) -> int | None:
    """The most resident memory since `forget_highest`, in bytes, and no less than what was `seen` before.

    The system counts pages per core and adds them up now and then, so that its own mark of the highest may lie below
    what it has said before.
    """
    return max((amount for amount in (_status("VmHWM"), *seen) if amount is not None), default=None)


def forget_highest() -> None:
    """Let `highest` begin anew."""
    try:
        CLEAR.write_text("5")
    except OSError:
        logging.getLogger(__name__).info("the peak of memory is that of the process since its start")


def keep_freed() -> None:
    """Let the allocator (glibc's) keep what the process frees for what it needs next, until `give_back_freed`.

    By itself it may return the arrays of each image to the system and ask for them again, page by page: 4 ms of the
    processor's time for 480×640 pixels (docs/results/serving.md). Who has set it up by the environment is left alone.
    """
    _keeps_freed.set()
    _set_up(KEEPING)


def bound_heap() -> None:
    """Let threads that come share one heap of the allocator (glibc's), from which long blocks go back when freed.

    By itself it gives each a heap of its own, and what one thread has freed is for no other: up to 64 MB at the end of
    each, which it does not even return when it is asked to. Who has set it up by the environment is left alone; after
    `keep_freed` blocks are kept.
    """
    _set_up({HEAPS: BOUNDED[HEAPS]} if _keeps_freed.is_set() else BOUNDED)


_keeps_freed = threading.Event()


def _set_up(parameters: Mapping[int, int]) -> None:
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        mallopt = _allocator().mallopt
        for parameter, value in parameters.items():
            mallopt(parameter, value)


def give_back_freed() -> None:
    """Return what the process has freed to the system, where its allocator (glibc's) keeps it for later."""
    with suppress(OSError, AttributeError):
        _allocator().malloc_trim(0)


@cache
def _allocator() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _status(field: str) -> int | None:
    """A figure of Linux's /proc/self/status, in bytes; None where there is none."""
    try:
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None

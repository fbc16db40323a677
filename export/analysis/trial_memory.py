"""The memory of runs at sizes that are only tried: what would take too much is not run, as it would end the process.

What attends from each pixel to each takes memory by the square of the pixels: 1 GB at 512×512 is 16 GB at 1024×1024.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from fcn_deploy.runtime.process_memory import available_memory, forget_highest, highest, resident

MEMORY_SHARE, MOST_MEMORY = 1 / 4, 2e9  # of what is free, and bytes, that a run at a size that is only tried may take
LEAST_TOLD = 128 * 128  # pixels, from which on a run tells how memory grows
APART = 1.5  # times the pixels: nearer sizes tell nothing of growth
COUNTS_FROM = 32e6  # bytes: less is not told from what the process does beside the run


class TrialMemory:
    """What runs have taken so far, and what one of more pixels would.

    Attributes:
        most: bytes that a run may take.
    """

    def __init__(self, most: float = MOST_MEMORY) -> None:
        self.most = min(available_memory() * MEMORY_SHARE, most)
        self._before = resident() or 0
        self._seen: list[tuple[int, float]] = []  # (pixels, bytes), of ever more pixels

    @contextmanager
    def run(self, pixels: int) -> Iterator[None]:
        """While it is open, a size of so many pixels is run; it may fail."""
        forget_highest()
        try:
            yield
        finally:
            taken = (highest(self._before) or self._before) - self._before
            if pixels >= LEAST_TOLD and (not self._seen or pixels > APART * self._seen[-1][0]):
                self._seen.append((pixels, float(taken)))

    def expected(self, pixels: int) -> float:
        """Bytes that a run of so many pixels would take, by the growth from one size to the next; 0: not known."""
        if not self._seen or self._seen[-1][1] < COUNTS_FROM:
            return 0.0
        area, taken = self._seen[-1]
        growth = 1.0
        if len(self._seen) > 1 and self._seen[-2][1] > 0:
            fewer, less = self._seen[-2]
            growth = min(max(math.log(taken / less) / math.log(area / fewer), 1.0), 2.0)
        return float(taken * (pixels / area) ** growth)

    def allows(self, pixels: int) -> bool:
        """Whether a run of so many pixels is expected to stay within the bound."""
        return self.expected(pixels) <= self.most

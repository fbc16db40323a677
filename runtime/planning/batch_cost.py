"""What images of one padded size were measured to take, one after the other and in batches."""

from dataclasses import dataclass, field

import numpy as np

ROUNDS = 3  # timed runs of each kind, before a size is run in batches or not


@dataclass
class BatchCost:
    """What runs of one padded size took, in seconds an image.

    Attributes:
        alone, together: one after the other, and in batches.
        equal: whether the scores of a batch are those of single runs, bit for bit; None: not compared yet.
        first: runs of each kind that do something for the first time, and do not count.
    """

    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    equal: bool | None = None
    first: int = 0

    @property
    def pays(self) -> bool | None:
        """Whether batches are the faster, by medians; None: not known yet."""
        if self.equal is False:
            return False
        if min(len(self.alone), len(self.together)) < self.first + ROUNDS:
            return None
        return bool(np.median(self.together[self.first :]) < np.median(self.alone[self.first :]))

"""The rows of an input that memory holds beside a tile of it."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class KeptRows:
    """What the rows of a stage's input take beside the tile at hand, or of an image what its reader does.

    Attributes:
        bytes: of each row that is kept; all of them are, at most.
        beside: rows that are kept beside those of a tile.
        least: bytes that are kept whatever the tile, unless all rows are fewer.
        ahead: bytes of a pixel of the next tile, which is made while one is in work.
    """

    bytes: float = 0.0
    beside: int = 0
    least: float = 0.0
    ahead: float = 0.0

    def taken(self, rows: Numbers, columns: Numbers, height: int) -> Numbers:
        """Bytes beside tiles of so many rows and columns, of an image of `height`."""
        return self.rows_taken(rows, height) + self.ahead * rows * columns

    def rows_taken(self, rows: Numbers, height: int) -> Numbers:
        """Of these the bytes of what is kept beside tiles of so many rows."""
        kept: Numbers = np.clip((rows + self.beside) * self.bytes, self.least, self.bytes * height)
        return kept

    @property
    def without_rows(self) -> "KeptRows":
        """What is made ahead alone."""
        return replace(self, bytes=0.0, least=0.0)


NOTHING_KEPT = KeptRows()

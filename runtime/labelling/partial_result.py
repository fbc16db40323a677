"""Results that grow from top to bottom in a file beside the one that they become, so that a run can be gone on with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..files import replacing
from ..head.upsampling import result_bytes
from ..images.georeference import Tag
from ..images.write import attribute_table, no_data_tag, palette, write_maps


@dataclass(frozen=True)
class PartialResult:
    """The rows of a result that are done, in a file of their own: [H, K, W].

    Attributes:
        kind: of result.
        out: what it becomes.
        dtype: of it.
        row: bytes of a row.
    """

    kind: str
    out: Path
    dtype: np.dtype[Any]
    row: int

    @classmethod
    def of(cls, kind: str, out: Path, card: ModelCard, width: int) -> "PartialResult":
        """None of its rows yet, of an image of `width`."""
        dtype = np.dtype({"labels": card.label_dtype, "masks": "bool"}.get(kind, "float32"))
        return cls(kind, out, dtype, width * result_bytes(kind, card))

    @property
    def path(self) -> Path:
        """Of the rows."""
        return self.out.parent / f".{self.out.name}.partial"

    def append(self, file: BinaryIO, top: int, result: NDArray[Any]) -> None:
        """Write a band of the result, [rows, W] or [K, rows, W], that begins with row `top`."""
        file.seek(top * self.row)
        rows = result if result.ndim == 2 else result.swapaxes(0, 1)
        file.write(np.ascontiguousarray(rows).data)
        file.flush()

    def maps(self, height: int, width: int) -> NDArray[Any]:
        """All of it, [K, H, W], read where it is asked for."""
        count = self.row // (width * self.dtype.itemsize)
        return np.memmap(self.path, self.dtype, "r", shape=(height, count, width)).swapaxes(0, 1)

    def write(self, height: int, width: int, card: ModelCard, tags: Sequence[Tag], cog: bool = False) -> None:
        """Write the result, with `tags`; as a Cloud-Optimized TIFF where `cog` says so."""
        options: dict[str, Any] = {}
        if self.kind == "labels" and self.dtype == np.uint8:
            options = {"photometric": "palette", "colormap": palette(card).astype(np.uint16).T * 257}
        no_data = {"labels": card.no_data, "masks": None}.get(self.kind, math.nan)
        if no_data is not None:
            tags = [*tags, no_data_tag(no_data)]
        names = ("labels",) if self.kind == "labels" else card.score_names
        if self.kind == "labels" and (names_of_classes := attribute_table(card)) is not None:
            with replacing(f"{self.out}.aux.xml") as temporary:
                temporary.write_text(names_of_classes, encoding="utf-8")
        resampling = ("MODE" if self.kind in ("labels", "masks") else "AVERAGE") if cog else None
        write_maps(self.out, self.maps(height, width), names, tiled=True, tags=tags, cog=resampling, **options)

"""The manifest of a run: a Parquet file with a row for each image, of what was made of it and by which engine."""

import hashlib
import io
import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine_format.model_card import ModelCard
from ..errors import DeployError, MisuseError
from ..extras import need
from ..files import check_writable
from ..images.header import read_header
from ..network import Network
from .jobs import Record
from .objects import parted, reaching

SUFFIX = ".parquet"
RESULTS = ("labels", "masks", "values")


def engine_digest(path: Path) -> str:
    """SHA-256 of an engine's file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def class_shares(path: Path, kind: str, card: ModelCard) -> dict[str, float] | None:
    """The share of each class that a result file shows, of its pixels that are data; None of values.

    Args:
        path: of labels or masks, as label-images writes them.
        kind: `labels`, `masks` or `values`.
        card: of the network.
    """
    if kind == "values" or path.suffix not in (".png", ".tif"):
        return None
    counts = np.zeros(1 << 16, np.int64)
    pixels = 0
    for place, part in _parts(path):
        if kind == "masks":
            counts[place] += int(np.count_nonzero(part))
            pixels += part.size if place == 0 else 0
        else:
            counts += np.bincount(part.reshape(-1), minlength=len(counts))
            pixels += part.size
    if kind == "labels" and card.no_data is not None:
        pixels -= int(counts[card.no_data])
    shares: dict[str, float] = {}
    for name, count in zip(card.classes, counts.tolist(), strict=False):
        if count:
            shares[name] = shares.get(name, 0.0) + count / pixels
    return shares


def _parts(path: Path) -> Generator[tuple[int, NDArray[Any]], None, None]:
    """(band, pixels) of a result file, in parts."""
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as picture:
            yield 0, np.asarray(picture).astype(np.uint16)
        return
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        bands, high, wide = page.shaped[0], *page.shaped[2:4]
        for segment, where, shape in page.segments():
            band, _, top, left = where[:4] if bands > 1 else (0, *where[1:4])
            if segment is not None:
                # A tile at the edge is longer than the image.
                yield band, segment.reshape(shape)[:, : high - top, : wide - left].astype(np.uint16)


class Rows:
    """Rows of a manifest, one for each file.

    Args:
        card: of the network.
        engine: digest of the engine.
    """

    def __init__(self, card: ModelCard, engine: str) -> None:
        self.card, self.engine = card, engine
        self.rows: dict[str, dict[str, Any]] = {}
        self.earlier: dict[str, dict[str, Any]] = {}

    def add(self, record: Record, result: Path | None) -> None:
        """Note a record; `result`: the file of labels or masks on this machine, where there is one."""
        file = record["file"]
        kind = next((kind for kind in RESULTS if kind in record), None)
        if record.get("skipped") and file in self.earlier:
            self.rows[file] = self.earlier[file]
            return
        size = record.get("size") or (read_header(result, sys.maxsize).size if result else (None, None))
        times = record.get("ms") or {}
        shares = class_shares(result, kind, self.card) if result and kind and "error" not in record else None
        self.rows[file] = {
            "file": file,
            "result": record.get(kind) if kind else None,
            "height": size[0],
            "width": size[1],
            "frames": record.get("frames"),
            "shares": None if shares is None else list(shares.items()),
            "error": record.get("error"),
            # Of what an earlier run wrote and did not note, the engine is not known.
            "engine": None if record.get("skipped") else self.engine,
            "label_ms": times.get("label"),
        }

    def write(self) -> None:
        """Put them where they belong; these stay with the caller."""


class Manifest(Rows):
    """The rows of a run, put as one Parquet file when it ends, however it ends.

    Args:
        address: of the file; of one shard it gets the shard's name.
        net: that labels.
        shard: (i, n).
        keep: rows of an earlier run stay where this one skips the file.

    Raises:
        MisuseError: a name that is none of a Parquet file's.
        DeployError: pyarrow is missing, or an earlier manifest cannot be read.
    """

    def __init__(self, address: str, net: Network, shard: tuple[int, int] | None, keep: bool) -> None:
        if not address.endswith(SUFFIX):
            raise MisuseError(f"--manifest {address}; name a file that ends in {SUFFIX}")
        need("pyarrow", "cloud")
        if shard is not None:
            address = f"{address.removesuffix(SUFFIX)}-{shard[0]:05d}-of-{shard[1]:05d}{SUFFIX}"
        self.address, (self.store, self.name) = address, parted(address)
        if self.store.local:  # not hours later, when it is written
            if Path(address).is_dir():
                raise MisuseError(f"--manifest {address} is a folder; name a file in it")
            check_writable(address)
        super().__init__(net.card, engine_digest(net.path))
        self.earlier = self._read() if keep else {}

    def write(self) -> None:
        """Put the file: whole, or not at all. Raises WriteError."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(list(self.rows.values()), schema=_schema(self.card, self.engine))
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self.store.put_bytes(buffer.getvalue(), self.name)

    def _read(self) -> dict[str, dict[str, Any]]:
        """Rows of an earlier run, by file."""
        import pyarrow.parquet as pq

        if self.name not in self.store.listed():
            return {}
        with reaching(self.address):
            content = self.store.fs.cat_file(self.store.join(self.name))
            rows: Sequence[Mapping[str, Any]] = pq.read_table(io.BytesIO(content)).to_pylist()
            return {row["file"]: dict(row) for row in rows}


def _schema(card: ModelCard, engine: str) -> Any:
    """Of the manifest (docs/reference/formats.md), with the card as metadata."""
    import pyarrow as pa

    fields = [
        ("file", pa.string()), ("result", pa.string()), ("height", pa.int64()), ("width", pa.int64()),
        ("frames", pa.int64()), ("shares", pa.map_(pa.string(), pa.float64())), ("error", pa.string()),
        ("engine", pa.string()), ("label_ms", pa.float64()),
    ]  # fmt: skip
    about = {"fcn_deploy.card": json.loads(card.to_json()), "engine_sha256": engine}
    return pa.schema(fields, metadata={key: json.dumps(value) for key, value in about.items()})


@contextmanager
def written(manifest: Rows | None) -> Iterator[None]:
    """The manifest is written when the block ends, however it does; what ended it is what is raised."""
    try:
        yield
    except BaseException:
        if manifest is not None:
            with suppress(DeployError):
                manifest.write()
        raise
    if manifest is not None:
        manifest.write()


def noted(records: Generator[Record, None, None], manifest: Rows | None) -> Generator[Record, None, None]:
    """The records of files of this machine, noted in the manifest as they come."""
    with closing(records), written(manifest):
        for record in records:
            if manifest is not None:
                kind = next((kind for kind in RESULTS if kind in record), None)
                manifest.add(record, Path(record[kind]) if kind else None)
            yield record

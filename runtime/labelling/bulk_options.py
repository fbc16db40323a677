"""Options of label-images for many files: addresses, shards, a manifest."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # loaded when used: --help is instant
    from ..network import Network
    from .bulk import Label
    from .jobs import Record
    from .manifest import Manifest


@dataclass(frozen=True)
class Bulk:
    """How many files are labelled.

    Attributes:
        shard: `i/n`: of so many parts of the files this one.
        manifest: where to write what was done, as Parquet.
    """

    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Label only the Ith of N parts of the files.")
    ] = None
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", metavar="FILE", help="Write a row for each file as Parquet: sizes, shares, errors."),
    ] = None

    def elsewhere(self, images: Sequence[str], out: str) -> bool:
        """Whether files are read from, or results written to, an address."""
        from .objects import is_address

        return is_address(out) or any(map(is_address, images))

    def there(
        self, net: "Network", images: Sequence[str], out: str, label: "Label", *, force: bool, resume: bool
    ) -> "tuple[int, Generator[Record, None, None]]":
        """How many files there are at addresses, and the records of labelling them."""
        from ..errors import MisuseError
        from .bulk import label_objects
        from .objects import Store, find_objects, share_of

        if force and resume:
            raise MisuseError("--force replaces what exists and --resume keeps it; choose one of them")
        found = find_objects(images)
        items = [found[place] for place in share_of([item.name for item in found], self._shard)]
        store, manifest = Store(out), self._manifest(net, resume)
        return len(items), label_objects(items, store, label, force=force, resume=resume, manifest=manifest)

    def of_shard(self, files: Sequence[Path]) -> list[Path]:
        """The files of this machine that are of the shard. Raises MisuseError where names do not tell them apart."""
        from ..errors import MisuseError
        from .objects import share_of

        places = share_of([file.name for file in files], self._shard)
        if self._shard is not None and len({file.stem for file in files}) < len(files):
            raise MisuseError(
                "--shard of files whose names differ in folder or suffix only; give each folder its own run"
            )
        return [files[place] for place in places]

    def here(
        self, net: "Network", files: Sequence[Path], out: str, label: "Label", *, resume: bool
    ) -> "Generator[Record, None, None]":
        """The records of labelling files of this machine, noted in the manifest; a shard may have none."""
        from .manifest import noted

        records = label(files, Path(out)) if files or self.shard is None else _nothing()
        return noted(records, self._manifest(net, resume))

    @property
    def _shard(self) -> tuple[int, int] | None:
        from .objects import parse_shard

        return None if self.shard is None else parse_shard(self.shard)

    def _manifest(self, net: "Network", resume: bool) -> "Manifest | None":
        from .manifest import Manifest

        return None if self.manifest is None else Manifest(self.manifest, net, self._shard, keep=resume)


def _nothing() -> "Generator[Record, None, None]":
    yield from ()

"""Options of label-images for many files: addresses, shards, a manifest, a cluster."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # loaded when used: --help is instant
    from ..images.addresses import Address
    from ..network import Network
    from .jobs import Record
    from .manifest import Manifest
    from .objects import Object


@dataclass(frozen=True)
class Bulk:
    """How many files are labelled.

    Attributes:
        shard: `i/n`: of so many parts of the files this one.
        manifest: where to write what was done, as Parquet.
        ray: address of a Ray cluster that labels them.
        actors: of it, that each hold a network.
    """

    shard: Annotated[
        str | None, typer.Option("--shard", metavar="I/N", help="Label only the Ith of N parts of the files.")
    ] = None
    manifest: Annotated[
        str | None,
        typer.Option("--manifest", metavar="FILE", help="Write a row for each file as Parquet: sizes, shares, errors."),
    ] = None
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Label on a Ray cluster (auto, ray://HOST:10001, local)."),
    ] = None
    actors: Annotated[
        int | None, typer.Option("--actors", min=1, help="Networks on the cluster [default: one on each node].")
    ] = None

    def sources(
        self, images: Sequence[str], out: str, find: "Callable[[], Sequence[Path | Address]]"
    ) -> "Sequence[Path | Address] | Sequence[Object]":
        """What is labelled: files of this machine, by `find`, or objects where an address is named or a cluster labels.

        Raises MisuseError, DeployError.
        """
        from ..errors import MisuseError
        from .objects import find_objects, is_address, parse_shard, share_of

        if self.actors is not None and self.ray is None:
            raise MisuseError("--actors is of a cluster; name it by --ray, or omit --actors")
        shard = None if self.shard is None else parse_shard(self.shard)
        if self.ray is not None or is_address(out) or any(map(is_address, images)):
            items = find_objects(images)
            return [items[place] for place in share_of([item.name for item in items], shard)]
        files = find()
        if shard is None:
            return files
        if len({Path(file.name).stem for file in files}) < len(files):
            raise MisuseError(
                "--shard of files whose names differ in folder or suffix only; give each folder its own run"
            )
        return [files[place] for place in share_of([file.name for file in files], shard)]

    def records(
        self,
        net: "Network",
        sources: "Sequence[Path | Address] | Sequence[Object]",
        out: str,
        label: "partial[Generator[Record, None, None]]",
        threads: int | None,
    ) -> "Generator[Record, None, None]":
        """Label what `sources` gave; a record of each.

        Args:
            net: that labels.
            sources: by the method of that name.
            out: folder or address of the results.
            label: label_files, with its options as keyword arguments.
            threads: of a network of the cluster.
        """
        from ..errors import MisuseError
        from .bulk import label_objects
        from .cluster import Cluster, label_on_cluster
        from .manifest import noted
        from .objects import Object, Store

        options = dict(label.keywords)
        force, resume = bool(options.pop("force", False)), bool(options.pop("resume", False))
        files = [source for source in sources if not isinstance(source, Object)]
        items = [source for source in sources if isinstance(source, Object)]
        manifest = self._manifest(net, resume)
        if files or not (items or self.shard):
            return noted(label(net, files, Path(out)), manifest)
        products = options.get("products")
        if products is not None and (products.polygons or products.stats):
            asked = "--polygons" if products.polygons else "--stats"
            raise MisuseError(
                f"{asked} is of images and results of this machine; take --manifest, which has shares too"
            )
        if options.get("all_pages"):
            raise MisuseError("--page all is of images and results of this machine; name a page")
        if force and resume:
            raise MisuseError("--force replaces what exists and --resume keeps it; choose one of them")
        store = Store(out)
        if self.ray is not None:
            cluster = Cluster(self.ray, self.actors, threads, net.memory, net.refine, options)
            return label_on_cluster(cluster, net, items, store, force=force, resume=resume, manifest=manifest)
        here = partial(label.func, net, **options)
        return label_objects(items, store, here, force=force, resume=resume, manifest=manifest)

    def _manifest(self, net: "Network", resume: bool) -> "Manifest | None":
        from .manifest import Manifest
        from .objects import parse_shard

        shard = None if self.shard is None else parse_shard(self.shard)
        return None if self.manifest is None else Manifest(self.manifest, net, shard, keep=resume)

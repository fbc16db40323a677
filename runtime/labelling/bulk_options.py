"""Options of label-images for many files: addresses, shards, a manifest, a cluster."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..options import option

if TYPE_CHECKING:  # loaded when used: --help is instant
    from ..images.addresses import Address
    from ..network import Network
    from .gathered import Gathered
    from .jobs import Record
    from .manifest import Manifest
    from .objects import Object, Store


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
        str | None, option("--shard", metavar="I/N", help="Label only the Ith of N parts of the files.")
    ] = None
    manifest: Annotated[
        str | None,
        option("--manifest", metavar="FILE", help="Write a row for each file as Parquet: sizes, shares, errors."),
    ] = None
    ray: Annotated[
        str | None,
        option("--ray", metavar="ADDRESS", help="Label on a Ray cluster (auto, ray://HOST:10001, local)."),
    ] = None
    actors: Annotated[
        int | None, option("--actors", min=1, help="Networks on the cluster [default: one on each node].")
    ] = None

    def sources(
        self, images: Sequence[str], out: str, find: "Callable[[], Mapping[Path | Address, Path]]"
    ) -> "Mapping[Path | Address, Path] | Sequence[Object]":
        """What is labelled: files of this machine, by `find`, with the folders of their results, or objects where an
        address is named or a cluster labels.

        Raises MisuseError, DeployError.
        """
        from ..errors import MisuseError

        if self.actors is not None and self.ray is None:
            raise MisuseError("--actors is of a cluster; name it by --ray, or omit --actors")
        if self.ray is None and self.shard is None and not any("://" in word for word in (out, *images)):
            return find()  # nothing of objects is loaded, which takes a hundredth of a short run
        from .objects import find_objects, is_address, parse_shard, share_of

        shard = None if self.shard is None else parse_shard(self.shard)
        if self.ray is not None or is_address(out) or any(map(is_address, images)):
            items = find_objects(images)
            return [items[place] for place in share_of([item.name for item in items], shard)]
        files = find()
        if shard is None:
            return files
        firsts: dict[Path, Path | Address] = {}
        for file, folder in files.items():
            if (first := firsts.setdefault(folder / Path(file.name).stem, file)) != file:
                raise MisuseError(
                    f"--shard: {first} and {file} differ in suffix only, or in a folder that their results do not "
                    "keep; give each its own run, or name the folder above as 'FOLDER/**'"
                )
        found = list(files.items())
        names = [str(folder / file.name) for file, folder in found]
        return dict(found[place] for place in share_of(names, shard))

    def records(
        self,
        net: "Network",
        sources: "Mapping[Path | Address, Path] | Sequence[Object]",
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
        from .jobs import names_of

        options = dict(label.keywords)
        force, resume = bool(options.pop("force", False)), bool(options.pop("resume", False))
        files = list(sources.items()) if isinstance(sources, Mapping) else []
        items = [] if isinstance(sources, Mapping) else list(sources)
        manifest = self._manifest(net, resume)
        if files or not (items or self.shard):
            found = label(net, names_of(files), Path(out))
            if manifest is None:
                return found
            from .manifest import noted

            return noted(found, manifest)
        from .bulk import label_objects
        from .objects import Store

        if options.get("all_pages"):
            raise MisuseError("--page all is of images and results of this machine; name a page")
        if force and resume:
            raise MisuseError("--force replaces what exists and --resume keeps it; choose one of them")
        store = Store(out)
        products = options.get("products")
        if self.ray is not None and products is not None and (products.polygons or products.stats):
            raise MisuseError(
                f"{'--polygons' if products.polygons else '--stats'} is made of all results together, which a cluster "
                "writes apart; run it with --resume and without --ray afterwards"
            )
        if self.ray is not None:
            from .cluster import Cluster, label_on_cluster

            cluster = Cluster(self.ray, self.actors, threads, net.memory, net.refine, options)
            return label_on_cluster(cluster, net, items, store, force=force, resume=resume, manifest=manifest)
        gather = self._gather(net, items, store, options, force, resume)
        here = partial(label.func, net, **options)
        return label_objects(items, store, here, force=force, resume=resume, manifest=manifest, gather=gather)

    def _gather(
        self,
        net: "Network",
        items: "Sequence[Object]",
        out: "Store",
        options: "dict[str, Any]",
        force: bool,
        resume: bool,
    ) -> "AbstractContextManager[Gathered] | None":
        """Files of all images that are wanted, taken out of `options`: what labels some of them must not make these.

        Raises MisuseError, DeployError.
        """
        from ..errors import MisuseError
        from ..images.addresses import VIDEO_SUFFIXES
        from .gathered import check_gathered, gathering

        products = options.get("products")
        if products is None or not (products.polygons or products.stats):
            return None
        asked = "--polygons" if products.polygons else "--stats"
        if video := next((item for item in items if item.suffix.lower() in VIDEO_SUFFIXES), None):
            raise MisuseError(f"{asked}: {video} is a video, of which labels alone are written; omit it")
        if resume and products.stats and products.instances:
            raise MisuseError(
                "--stats with --instances and --resume: objects of images that are skipped would not be counted; omit "
                "one of them"
            )
        taken = {str(item) for item in items} | {out.address(out.join(f"{item.name}.instances.csv")) for item in items}
        check_gathered(products, net.card, taken, force or resume)
        options["products"] = replace(products, polygons=None, stats=None)
        return gathering(products, net.card)

    def _manifest(self, net: "Network", resume: bool) -> "Manifest | None":
        if self.manifest is None:
            return None
        from .manifest import Manifest
        from .objects import parse_shard

        return Manifest(self.manifest, net, None if self.shard is None else parse_shard(self.shard), keep=resume)

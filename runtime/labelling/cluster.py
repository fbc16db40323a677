"""Many machines: a class for Ray Data's map_batches, and label-images on Ray's actors, each of which holds one network.

Nothing of a scheduler is here: Ray places the actors, starts those again that were lost, and repeats what they were at.
label-images does without Ray Data, whose modules are half of what the start of an actor takes.
"""

import io
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import DeployError, brief, one_line
from ..extras import need
from ..files import WriteError
from ..images.numbers import ReadOptions
from ..images.ranged import standing_for
from ..images.regions import REGION_PIXELS, Regions, open_regions
from ..network import Network
from ..stream import describe_plan
from .bulk import done_before, label_objects, large_tiff, ranges, skipped
from .files import label_files
from .jobs import Record, Source
from .manifest import Manifest, Rows, noted, written
from .objects import Object, Store
from .partial_result import PartialResult
from .products import Products

BATCH, LEAST = 64, 8  # files that an actor is handed at once, and those at the end, when others may have ended
AHEAD = 2  # batches that an actor has: one that it labels, and one that is fetched or ready meanwhile
TOGETHER = 16  # of them that it labels in one go, while it fetches the next
BAND_PIXELS = 64_000_000  # of a scene that one task labels
BAND_ROWS = 256  # a task's rows are a multiple of these


class Labeler:
    """A class for `Dataset.map_batches`: rows of encoded images in, rows of encoded labels out.

    Args:
        engine: path of the engine on the worker, or its content.
        threads, memory, refine: as of Segmenter.
        column: of the images: the content of files (bytes), or arrays [H, W, C].
        name: column of their names, whose suffixes tell formats that have no signature; may be absent.
        label: labels files of this machine; `label_files`, or a partial of it with options of its own.

    A row keeps its other columns, and gets `labels` (or `masks`, `values`: what the network gives) with the content of
    the file that label-images would write, `height`, `width`, and `error`: None, or what is wrong with the image, whose
    other new columns are None then. A broken image ends nothing.
    """

    def __init__(
        self,
        engine: str | os.PathLike[str] | bytes,
        *,
        threads: int | None = None,
        memory: int | None = None,
        refine: bool = False,
        column: str = "bytes",
        name: str = "path",
        label: Callable[..., Generator[Record, None, None]] = label_files,
    ) -> None:
        self._network = _opened(engine, threads, memory, refine)
        self._column, self._name, self._label = column, name, label

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        images, kind = batch[self._column], self._network.kind
        names = batch[self._name] if self._name in batch else [""] * len(images)
        found: dict[str, list[Any]] = {column: [None] * len(images) for column in (kind, "height", "width", "error")}
        with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder:
            places: dict[str, int] = {}
            for place, (image, name) in enumerate(zip(images, names, strict=True)):
                places[str(_staged(Path(folder, f"{place:06d}"), image, str(name)))] = place
            for record in self._label(self._network, [Path(path) for path in places], Path(folder, "out")):
                place = places[record["file"]]
                if "error" in record:
                    found["error"][place] = record["error"].replace(record["file"], str(names[place]) or "the image")
                    continue
                found[kind][place] = Path(record[kind]).read_bytes()
                found["height"][place], found["width"][place] = record["size"]
        return {key: values for key, values in batch.items() if key != self._column} | found


def _staged(path: Path, image: Any, name: str) -> Path:
    """An image as a file of this machine: content of a file, or an array."""
    if isinstance(image, bytes | bytearray | memoryview):
        path = path.with_suffix(PurePosixPath(name).suffix)
        path.write_bytes(image)
    else:
        path = path.with_suffix(".npy")
        np.save(path, np.asarray(image), allow_pickle=False)
    return path


def _opened(engine: str | os.PathLike[str] | bytes, threads: int | None, memory: int | None, refine: bool) -> Network:
    """A network, of an engine's file or its content."""
    if not isinstance(engine, bytes):
        return Network(engine, threads=threads, memory=memory, refine=refine)
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder:
        path = Path(folder, "model.engine" if engine[:2] == b"PK" else "model.onnx")
        path.write_bytes(engine)
        return Network(path, threads=threads, memory=memory, refine=refine)


@dataclass(frozen=True)
class Cluster:
    """How a cluster labels.

    Attributes:
        address: of Ray's: `auto`, `ray://HOST:10001`, or `local` for this machine alone.
        actors: that each hold a network; None: one on each node.
        threads, memory, refine: of each, as of Segmenter.
        options: keyword arguments of `label_files` (`overlay`, `probabilities`, `options`, …).
    """

    address: str
    actors: int | None = None
    threads: int | None = None
    memory: int | None = None
    refine: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class _Actor:
    """What holds a network on the cluster.

    It is opened for the first batch, which says where in the cluster's store the engine lies, in a list. Were it opened
    with the actor, Ray would write an error for each: the engine may be gone when that is started again. It is not: the
    run that hands it out keeps it.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.network: Network | None = None
        self.turn = threading.Lock()  # the network's memory is that of one batch

    def opened(self, engine: list[Any]) -> Network:
        if self.network is None:  # or a batch would wait here until the one before is labelled
            with self.turn:
                if self.network is None:
                    import ray

                    given = self.cluster
                    self.network = _opened(ray.get(engine[0]), given.threads, given.memory, given.refine)
        return self.network


class _ObjectLabeler(_Actor):
    """Labels objects and puts their results: addresses in, their records and rows of the manifest out."""

    batches = AHEAD  # at once: while one is labelled, the next is fetched and the one before put

    def __init__(self, cluster: Cluster, digest: str | None, out: str, force: bool) -> None:
        super().__init__(cluster)
        self.digest, self.out, self.force = digest, Store(out), force

    def label_batch(self, engine: list[Any], batch: Sequence[str]) -> list[tuple[Record, dict[str, Any]]]:
        network, items = self.opened(engine), [_object(json.loads(text)) for text in batch]
        rows = None if self.digest is None else Rows(network.card, self.digest)
        records = list(self._records(network, items, rows))
        # What an actor had put before it was lost is not done again, and is of this engine.
        own = {"engine": self.digest}
        return [
            (record, {} if rows is None else rows.rows[record["file"]] | (own if "skipped" in record else {}))
            for record in records
        ]

    def _records(
        self, network: Network, items: Sequence[Object], rows: Rows | None
    ) -> Generator[Record, None, None]:  # fmt: skip
        """Records of files; those of this machine go to their places at once."""

        def label(names: Mapping[Source, Path], out: Path, **keep: Any) -> Generator[Record, None, None]:
            with self.turn:
                yield from label_files(network, names, out, **self.cluster.options, **keep)

        if self.out.local and all(item.store.local for item in items):
            names: dict[Source, Path] = {Path(item.path): Path(item.name) for item in items}
            return noted(label(names, Path(self.out.root), force=self.force, resume=not self.force), rows)
        there = set() if self.force else self.out.present([item.name for item in items])
        return label_objects(
            items, self.out, label, resume=True, manifest=rows, there=there, together=TOGETHER
        )  # fmt: skip


class _BandLabeler(_Actor):
    """Labels rows of scenes: (scene, first row, end) in, the first row, its labels' bytes and an error out."""

    batches = 1  # at once

    def label_batch(self, engine: list[Any], batch: tuple[str, int, int]) -> tuple[int, bytes, str | None]:
        text, top, bottom = batch
        network, item, buffer = self.opened(engine), _object(json.loads(text)), io.BytesIO()
        read: ReadOptions = self.cluster.options.get("options") or ReadOptions()
        try:
            with opened_scene(item, network, read) as image:
                for first, (result, *_) in network.bands_of(image, top, network.kind):
                    rows = result if result.ndim == 2 else result.swapaxes(0, 1)  # [rows, (K,) W]
                    buffer.write(np.ascontiguousarray(rows[: bottom - first]).data)
                    if first + len(rows) >= bottom:
                        break
        except Exception as error:
            return top, b"", one_line(error, 250).replace(item.path, str(item))
        return top, buffer.getvalue(), None


@contextmanager
def opened_scene(item: Object, network: Network, options: ReadOptions) -> Iterator[Regions]:
    """A large image, read where it is asked for; by ranges where it lies elsewhere. Raises DeployError."""
    if item.store.local:
        with open_regions(item.path, network.card, options) as image:
            yield image
        return
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder, ranges(item) as file:
        path = Path(folder, PurePosixPath(item.path).name)
        path.touch()
        with standing_for(path, file), open_regions(path, network.card, options) as image:
            yield image


def _object(fields: Mapping[str, Any]) -> Object:
    return Object(_store(fields["store"]), fields["path"], fields["name"], fields["size"])


_store = lru_cache(8)(Store)  # an archive is read through when it is opened


def _text(item: Object) -> str:
    """An object as a row has it."""
    store = "." if item.store.local else item.store.address(item.store.root)
    return json.dumps({"store": store, "path": item.path, "name": item.name, "size": item.size})


def label_on_cluster(
    cluster: Cluster,
    network: Network,
    items: Sequence[Object],
    out: Store,
    *,
    force: bool = False,
    resume: bool = False,
    manifest: Manifest | None = None,
) -> Generator[Record, None, None]:
    """Label files that lie anywhere, by the actors of a Ray cluster, which must see the addresses as this machine does.

    Files are handed out in batches. A scene of many pixels is handed out in bands of rows, whose labels are those of
    the whole, and is put together on this machine.

    Args:
        cluster: where, and how.
        network: of this machine: the engine is taken from its file.
        items, out, force, resume, manifest: as of `label_objects`.

    Yields:
        Records as of `label_objects`, as they are done.

    Raises:
        MisuseError, DeployError: as of `label_objects`; Ray is missing, or its cluster cannot be reached.
    """
    done = done_before(items, out, out.names(), force=force, resume=resume)
    with written(manifest), _session(cluster) as ray:
        for item in items if resume else ():
            if item.name in done:
                yield skipped(item, out, done[item.name], manifest)
        left = [item for item in items if not (resume and item.name in done)]
        run = _ClusterRun(ray, cluster, network, out, manifest)
        scenes = [item for item in left if run.is_scene(item)]
        yield from run.files([item for item in left if item not in scenes], force)
        for item in scenes:
            yield run.scene(item)


def _batches(items: Sequence[Object], actors: int) -> list[list[str]]:
    """Files for so many actors; in smaller and smaller parts, so that all of these end together."""
    batches, left = [], [_text(item) for item in items]
    while left:
        size = max(LEAST, min(BATCH, -(-len(left) // (2 * AHEAD * actors))))
        batches.append(left[:size])
        del left[:size]
    return batches


@contextmanager
def _session(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected; left as it was."""
    ray = need("ray", "ray")
    if ray.is_initialized():
        yield ray
        return
    try:
        _knock(cluster.address)
        ray.init(
            address=cluster.address, logging_level="ERROR", log_to_driver=False, include_dashboard=False
            if cluster.address == "local" else None,
        )  # fmt: skip
    except Exception as error:
        said = one_line(error, 150)
        raise DeployError(f"--ray {cluster.address}: {said}; start a cluster, or take --ray local") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError where nothing listens: Ray itself would try for minutes, and then end the process."""
    found = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if found:
        socket.create_connection((found[1], int(found[2])), timeout=5).close()


class _ClusterRun:
    """One run: its actors, and what they are given."""

    def __init__(self, ray: Any, cluster: Cluster, network: Network, out: Store, manifest: Manifest | None) -> None:
        self.ray, self.network, self.out, self.manifest = ray, network, out, manifest
        nodes = [node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]]
        self.actors = cluster.actors or len(nodes)
        cpus = max(1, int(min(nodes)) // -(-self.actors // len(nodes)))
        self.cluster = replace(cluster, threads=cluster.threads or cpus)
        self.options: ReadOptions = cluster.options.get("options") or ReadOptions()
        self.products: Products = cluster.options.get("products") or Products()
        self.engine = [ray.put(network.path.read_bytes())]
        gpu = network.manifest is not None and network.manifest.gpu is not None
        self.placed = {"num_cpus": min(cpus, self.cluster.threads or cpus), "num_gpus": 1 if gpu else 0}

    def is_scene(self, item: Object) -> bool:
        """Whether a file is labelled in bands: where it is a large TIFF, and labels alone are wanted."""
        extra = any(self.cluster.options.get(name) for name in ("overlay", "probabilities")) or self.products.instances
        if extra or not large_tiff(item):
            return False
        try:
            with opened_scene(item, self.network, self.options) as image:
                return image.shape[0] * image.shape[1] > REGION_PIXELS
        except (DeployError, OSError):
            return False  # whoever labels it says what is wrong

    def files(self, items: Sequence[Object], force: bool) -> Iterator[Record]:
        """Records of files that are labelled whole, as they are done."""
        if not items:
            return
        digest = self.manifest.engine if self.manifest else None
        out = self.out.root if self.out.local else self.out.address(self.out.root)
        for done in self._made(_ObjectLabeler, (digest, out, force), _batches(items, self.actors)):
            for record, row in done:
                if self.manifest is not None:
                    self.manifest.rows[record["file"]] = row
                yield record

    def _made(self, kind: Any, given: tuple[Any, ...], batches: Sequence[Any]) -> Generator[Any, None, None]:
        """What actors of a class make of batches, as they are done; `given` to each beside the cluster.

        Raises what an actor raises, and DeployError where one cannot be started.
        """
        ray, left = self.ray, iter(batches)
        start = ray.remote(kind).options(
            max_restarts=-1, max_task_retries=-1, max_concurrency=kind.batches, **self.placed
        )  # fmt: skip
        actors = [start.remote(self.cluster, *given) for _ in range(min(self.actors, len(batches)))]
        # An actor for which the cluster has no room yet is given nothing.
        doing = {actor.__ray_ready__.remote(): (actor, False) for actor in actors}
        count = 0
        try:
            while count < len(batches):
                (done,), _ = ray.wait(list(doing))
                actor, worked = doing.pop(done)
                found = ray.get(done)
                for batch in islice(left, 1 if worked else AHEAD):  # the next is there when one is done
                    doing[actor.label_batch.remote(self.engine, batch)] = actor, True
                if worked:
                    count += 1
                    yield found
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            reason = str(error).strip().splitlines()[-1]  # after what Ray knows of the actor, and a traceback
            raise DeployError(f"an actor of the cluster ended: {brief(reason.strip(), 200)}") from error
        finally:
            for actor in actors:
                ray.kill(actor)

    def scene(self, item: Object) -> Record:
        """Label a scene by bands, put it together and put it; its record."""
        started = time.perf_counter()
        record: Record = {"record": "image", "file": str(item)}
        with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder:
            result: Path | None = Path(folder, "scene.tif")
            try:
                size = self._scene(item, Path(folder, "scene.tif"))
            except WriteError:
                raise
            except DeployError as error:
                record["error"], result = str(error), None
            else:
                name = f"{item.name}.tif"
                for file in sorted(Path(folder).glob("scene.tif*"), reverse=True):  # class names beside it first
                    self.out.put(file, item.name + file.name.removeprefix("scene"))
                plan = describe_plan(self.network.plan(*size, bands=True))
                record |= {"size": list(size), "plan": plan, "ms": {"label": _ms(started)}}
                record |= {self.network.kind: self.out.address(self.out.join(name)), "overlay": None}
            if self.manifest is not None:
                self.manifest.add(record, result)
        return record

    def _scene(self, item: Object, result: Path) -> tuple[int, int]:
        """Write the labels of a scene to a file of this machine; its size. Raises DeployError."""
        with opened_scene(item, self.network, self.options) as image:
            (height, width), tags = image.shape[:2], image.tags
        step = max(BAND_ROWS, BAND_PIXELS // width // BAND_ROWS * BAND_ROWS)
        bands = [(_text(item), top, min(height, top + step)) for top in range(0, height, step)]
        part = PartialResult.of(self.network.kind, result, self.network.card, width)
        with part.path.open("wb") as file, closing(self._made(_BandLabeler, (), bands)) as done:
            for top, rows, error in done:
                if error is not None:
                    raise DeployError(error)
                file.seek(top * part.row)
                file.write(rows)
        part.write(height, width, self.network.card, tags, self.products.cog)
        return height, width


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 2)

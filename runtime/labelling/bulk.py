"""Files that lie elsewhere, labelled: fetched ahead, labelled as files of this machine, and their results put whole.

What label_files does for a folder is done for some of them at a time, in a folder of this machine that does not stay.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DeployError, MisuseError
from ..extras import need
from ..files import WriteError
from ..images.addresses import VIDEO_SUFFIXES
from ..images.ranged import standing_for
from ..images.tiff import in_parts
from .gathered import Gathered
from .jobs import Record, Source
from .manifest import RESULTS, Rows, written
from .objects import BLOCK, RESULT_SUFFIXES, Object, Store, reaching

# Files and what their results are called, folder → records: label_files.
Label = Callable[[Mapping[Source, Path], Path], Generator[Record, None, None]]

FETCHERS = 8  # objects on their way at once
TOGETHER = 64  # objects labelled in one go
BYTES_TOGETHER = 512 << 20
RANGED_BYTES = 64 << 20  # TIFFs of more are read by ranges


@dataclass
class _Staged:
    """An object on this machine: its file, one that stands for it, or what went wrong.

    A file of this machine is read where it lies, with what lies beside it.
    """

    item: Object
    path: Path
    name: str  # of its results, until they are put
    error: DeployError | None = None
    ranged: bool = False  # the file is empty and stands for the object


def label_objects(
    items: Sequence[Object],
    out: Store,
    label: Label,
    *,
    force: bool = False,
    resume: bool = False,
    manifest: Rows | None = None,
    there: Container[str] | None = None,
    together: int = TOGETHER,
    gather: AbstractContextManager[Gathered] | None = None,
) -> Generator[Record, None, None]:
    """Label files that lie anywhere and put the results into a folder that lies anywhere.

    Args:
        items: what to label, by `find_objects`.
        out: where results go: under the name of each, NAME.png and so on.
        label: labels files of this machine into a folder of it.
        force: replace results that exist.
        resume: skip files whose labels (or masks, or values) are there: they are put after the rest.
        manifest: what was done, put when the run ends, however it ends.
        there: names of results that exist, where the caller knows them.
        together: files that are labelled in one go, while the next so many are fetched.
        gather: gives files to which each image is added.

    Yields:
        Records as of label_files, with the addresses of files and results.

    Raises:
        MisuseError: results that exist, and neither `force` nor `resume`.
        DeployError: an address that cannot be reached or written; what is there then is whole.
    """
    done = done_before(items, out, out.names() if there is None else there, force=force, resume=resume)
    with ExitStack() as stack:
        stack.enter_context(written(manifest))
        gathered = None if gather is None else stack.enter_context(gather)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fcn-deploy-"))
        run = _Run(Path(folder), out, manifest, together, gathered)
        for item in items if resume else ():
            if item.name in done:
                yield skipped(item, out, done[item.name], manifest, gathered)
        left = [item for item in items if not (resume and item.name in done)]
        with closing(run.records(left, label)) as records:
            yield from records


class _Run:
    """One run: its folder on this machine, and what is on its way."""

    def __init__(
        self, folder: Path, out: Store, manifest: Rows | None, together: int, gathered: Gathered | None
    ) -> None:
        self.folder, self.out, self.manifest, self.together = folder, out, manifest, together
        self.gathered = gathered
        self._putting: deque[tuple[int, Future[Record]]] = deque()  # by group: on their way while others are labelled

    def records(self, items: Sequence[Object], label: Label) -> Generator[Record, None, None]:
        pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fcn-deploy-fetch")
        try:
            fetched: list[Future[_Staged]] = []
            for number, several in enumerate([*_groups(items, self.together), []]):
                staged, place = [each.result() for each in fetched], self.folder / f"{number}"
                place.mkdir()
                fetched = [pool.submit(_fetch, item, place, f"{i:06d}") for i, item in enumerate(several)]
                with closing(self._label(number - 1, staged, label, pool)) as records:
                    yield from records
                # The results of the group before have had the time of this one to be put.
                while self._putting and self._putting[0][0] < number - 1:
                    yield self._putting.popleft()[1].result()
                shutil.rmtree(self.folder / f"{number - 2}", ignore_errors=True)
            while self._putting:
                yield self._putting.popleft()[1].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _label(
        self, group: int, staged: Sequence[_Staged], label: Label, pool: ThreadPoolExecutor
    ) -> Generator[Record, None, None]:
        """Label what has come; records in order, as far as their results are put."""
        left, putting = deque(staged), self._putting

        def fail(several: Iterable[_Staged]) -> None:
            putting.extend((group, pool.submit(self._fail, each)) for each in several)

        with ExitStack() as stack:
            good = [each for each in staged if each.error is None]
            for each in good:
                if each.ranged:
                    stack.enter_context(standing_for(each.path, stack.enter_context(ranges(each.item))))
            if good:
                results = self.folder / f"{group}" / "out"
                names: dict[Source, Path] = {each.path: Path(each.name) for each in good}
                for record in stack.enter_context(closing(label(names, results))):
                    fail(_until(left, record["file"]))
                    each = left.popleft()
                    putting.append((group, pool.submit(self._put, self._gather(record, each.item), each, results)))
                    while putting and (putting[0][1].done() or len(putting) > 2 * FETCHERS):
                        yield putting.popleft()[1].result()
            fail(left)
        for each in staged:
            if not each.item.store.local:
                each.path.unlink(missing_ok=True)

    def _gather(self, record: Record, item: Object) -> Record:
        """The record of a file that was labelled, once it is added to what is made of all images. Raises WriteError."""
        result = _result(record)
        return record if self.gathered is None or result is None else self.gathered.add_file(str(item), result, record)

    def _fail(self, staged: _Staged) -> Record:
        """The record of a file that did not come."""
        record = _record(staged.item) | {"error": str(staged.error)}
        if self.manifest is not None:
            self.manifest.add(record, None)
        return record

    def _put(self, record: Record, staged: _Staged, results: Path) -> Record:
        """Put the results of a file, what the network gives last; its record, with addresses. Raises WriteError."""
        item, first = staged.item, _result(record)
        files = sorted(results.glob(f"{staged.name}.*"), key=lambda path: path == first)
        names = {str(path): item.name + path.name.removeprefix(staged.name) for path in files}
        places = {path: self.out.address(self.out.join(name)) for path, name in names.items()}
        for path, name in names.items():
            self.out.put(Path(path), name)
        done: Record = {
            key: _said(places.get(str(value), value), record["file"], item) for key, value in record.items()
        }
        if self.manifest is not None:
            self.manifest.add(done, first)
        for file in files:
            file.unlink()
        return done


def done_before(
    items: Sequence[Object], out: Store, there: Container[str], *, force: bool, resume: bool
) -> dict[str, str]:
    """The results that are there: name of an item → name of its file.

    Raises MisuseError unless `force` or `resume`, and where a result would be put in the place of an input.
    """
    inputs, root = {_place(item.store, item.path) for item in items}, _place(out, out.root)
    for result in (f"{root}/{item.name}{suffix}" for item in items for suffix in RESULT_SUFFIXES):
        if result in inputs:
            raise MisuseError(f"{result} is an input and would be replaced by labels; choose another -o")
    done = {item.name: name for item in items for suffix in RESULT_SUFFIXES if (name := item.name + suffix) in there}
    if done and not (force or resume):
        raise MisuseError(
            f"{out.address(out.join(next(iter(done.values()))))} exists already; choose another -o, or pass --force to "
            "replace it, or --resume to go on with the others"
        )
    return done


def _place(store: Store, path: str) -> str:
    """Where a file or folder is, by one name."""
    return os.path.realpath(path) if store.local else store.address(path)


def skipped(
    item: Object, out: Store, name: str, manifest: Rows | None, gathered: Gathered | None = None
) -> Record:  # fmt: skip
    """The record of a file whose results are there; what an earlier run did not note is looked up in them."""
    kind = "labels" if manifest is None else manifest.card.kind
    record = _record(item) | {kind: out.address(out.join(name)), "skipped": True}
    if gathered is None and (manifest is None or str(item) in manifest.earlier):
        if manifest is not None:
            manifest.add(record, None)
        return record
    with tempfile.TemporaryDirectory(prefix="fcn-deploy-") as folder, reaching(record[kind]):
        result = Path(folder, "result").with_suffix(Path(name).suffix)
        out.fs.get_file(out.join(name), str(result))
        if manifest is not None:
            manifest.add(record, result)
        return record if gathered is None else gathered.add_file(str(item), result, record)


def _result(record: Record) -> Path | None:
    """What the network gave, of a record: the file of labels, masks or values."""
    return next((Path(record[kind]) for kind in RESULTS if kind in record), None)


def _until(left: deque[_Staged], file: str) -> Iterator[_Staged]:
    """Those before the file of that path, taken away."""
    while str(left[0].path) != file:
        yield left.popleft()


def _record(item: Object) -> Record:
    return {"record": "video" if item.suffix.lower() in VIDEO_SUFFIXES else "image", "file": str(item)}


def _said(value: object, staged: str, item: Object) -> object:
    """A value of a record, with the address of the file in place of what stood for it here."""
    return value.replace(staged, str(item)) if isinstance(value, str) else value


def _groups(items: Sequence[Object], together: int) -> Iterator[list[Object]]:
    """Objects in order, as many together as are labelled in one go."""
    group: list[Object] = []
    weight = 0
    for item in items:
        size = 0 if by_ranges(item) else item.size or 0
        if group and (len(group) == together or weight + size > BYTES_TOGETHER):
            yield group
            group, weight = [], 0
        group.append(item)
        weight += size
    if group:
        yield group


def large_tiff(item: Object) -> bool:
    """Whether a file may be one that is read in parts."""
    return item.suffix.lower() in (".tif", ".tiff") and (item.size or 0) > RANGED_BYTES


def by_ranges(item: Object) -> bool:
    return large_tiff(item) and not item.store.local and item.store.parallel


def ranges(item: Object) -> Any:
    """The object as a file that is read by ranges."""
    with reaching(str(item)):
        return item.store.fs.open(item.path, "rb", block_size=BLOCK, cache_type="blockcache")


def _fetch(item: Object, folder: Path, name: str) -> _Staged:
    """Bring an object to this machine, or leave an empty file where it is read by ranges."""
    if item.store.local:
        return _Staged(item, Path(item.path), name)
    path = folder / f"{name}{item.suffix}"
    try:
        if by_ranges(item) and _in_parts(item):
            path.touch()
            return _Staged(item, path, name, ranged=True)
        item.store.fetch(item, path)
    except WriteError:
        raise
    except DeployError as error:
        return _Staged(item, path, name, error)
    return _Staged(item, path, name)


def _in_parts(item: Object) -> bool:
    """Whether a TIFF can be read by ranges; what is wrong with it is said when it has come whole."""
    tifffile = need("tifffile", "cloud")
    try:
        with ranges(item) as file, tifffile.TiffFile(file) as found:
            return in_parts(found, Path(item.path))
    except Exception:
        return False

"""Images too large to be held: labelled from top to bottom and written likewise, to be gone on with."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeployError
from ..files import WriteError, replacing, write_error
from ..images.numbers import COMMON, ReadOptions
from ..images.overlay import picture_of
from ..images.regions import Regions, open_regions
from ..images.write import write_png
from ..network import Network
from ..planning.plan import Plan
from ..stream import Stream, describe_plan, said
from .jobs import Job, Record
from .partial_result import PartialResult
from .products import SCREEN

if TYPE_CHECKING:
    from PIL import Image as Pictures
    from rich.progress import TaskID

AGAIN = "the same command with --resume goes on from there"


def label_by_regions(stream: Stream, jobs: Iterable[Job], options: ReadOptions) -> Iterator[Record]:
    """Label files region by region, one at a time: each takes the memory there is. A record of each, and a bar.

    Raises:
        WriteError: a result cannot be written, as the next could not either.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} rows")
    # Bands come minutes apart: the time left is that of the whole run's pace, not of the last seconds'.
    clocks = TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn()
    for job in jobs:
        started = time.perf_counter()
        hidden = not console.is_terminal
        with Progress(*columns, *clocks, console=console, disable=hidden, speed_estimate_period=1e9) as bar:
            task = bar.add_task(job.source.name, total=None)

            def progress(done: int, rows: int, bar: Progress = bar, task: "TaskID" = task) -> None:
                if bar.tasks[task].total is None:  # what an earlier run did is not of this run's pace
                    bar.reset(task, total=rows, completed=done)
                bar.update(task, completed=done)

            try:
                plan = label_regions(
                    stream.network, job.source, job.targets[0], probabilities=job.results.get("probabilities"),
                    overlay=job.overlay, side=job.side, cog=job.cog, progress=progress,
                    options=replace(options, page=job.page),
                )  # fmt: skip
            except WriteError:
                raise  # the next would fail too
            except DeployError as error:
                yield job.record | {"error": said(error, job.source)}
                continue
        times = {"label": round((time.perf_counter() - started) * 1e3, 2)}
        yield job.record | {"size": list(plan.size), "plan": describe_plan(plan), "ms": times} | job.written


def label_regions(
    net: Network,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    probabilities: str | os.PathLike[str] | None = None,
    overlay: str | os.PathLike[str] | None = None,
    side: int = SCREEN,
    cog: bool = False,
    options: ReadOptions = COMMON,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Plan:
    """Label an image file that need not fit into memory; write a tiled TIFF, as BigTIFF where it is large.

    Rows that are done are kept beside `out` until all are: where a run was interrupted or the disk was full, the same
    call goes on from there, for the same engine and file.

    Args:
        net: an open one.
        path: a TIFF or .npy.
        out: the TIFF to write, replaced in one step: labels in the card's colours, or masks or values, a band each
            (see images/write.py); with the image's georeference. Class names go into OUT.aux.xml.
        probabilities: another, with a band for each class.
        overlay: PNG for a picture of the whole.
        side: of it, in pixels, at most.
        cog: write Cloud-Optimized GeoTIFFs.
        options: how it is read.
        progress: called with the rows that are done, and all.

    Returns:
        How it was run.

    Raises:
        DeployError: the image is damaged, or nothing can be written.
        MisuseError: channels or dtype that the card does not allow.
        KeyboardInterrupt: its text says how far the run came.
    """
    path, out = Path(path), Path(out)
    with open_regions(path, net.card, options) as image:
        height, width = image.shape[:2]
        plan = net.plan(height, width, bands=True, source=image)
        parts = [PartialResult.of(net.kind, out, net.card, width)]
        if probabilities is not None:
            parts.append(PartialResult.of("probabilities", Path(probabilities), net.card, width))
        state = out.parent / f".{out.name}.partial.json"
        identity = _identity(net, path) | {"kinds": ",".join(part.kind for part in parts), "read": options.identity()}
        done = _rows_done(state, parts, identity)
        progress(done, height)
        try:
            for rows in _rows_labelled(net, image, parts, done):
                done = rows
                with replacing(state) as temporary:
                    temporary.write_text(json.dumps(identity | {"rows": done}))
                progress(done, height)
            for part in parts:
                part.write(height, width, net.card, image.tags, cog)
            if overlay is not None:
                write_png(overlay, _picture(net, image, parts[0].maps(height, width), side))
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted at row {done} of {height} of {path}; {AGAIN}") from error
        except (OSError, WriteError) as error:
            reason = error if isinstance(error, WriteError) else write_error(out, error)
            raise WriteError(f"{reason}; {done} of {height} rows are kept, and {AGAIN}") from error
        except DeployError as error:
            if not isinstance(error.__cause__, OSError):  # which may pass, as of a network drive
                _forget(state, *(part.path for part in parts))  # the image's own fault: what is kept would not help
            raise
        _forget(state, *(part.path for part in parts))
        return plan


def _rows_labelled(net: Network, image: Regions, parts: Sequence[PartialResult], done: int) -> Iterator[int]:
    """Label what is behind the rows that are done, band by band; the rows that are done after each."""
    with ExitStack() as stack:
        files = [stack.enter_context(part.path.open("r+b" if done else "w+b")) for part in parts]
        if done == image.shape[0]:
            return
        for top, results in net.bands_of(image, done, *(part.kind for part in parts)):
            for file, part, result in zip(files, parts, results, strict=True):
                part.append(file, top, result)
            done = top + results[0].shape[-2]
            del results, result  # or they would be in memory beside the next ones
            yield done


def _picture(net: Network, image: Regions, maps: NDArray[Any], side: int) -> "Pictures.Image":
    """A picture of the result over the image, of so many pixels a side at most."""
    height, width = image.shape[:2]
    step = -(-max(height, width) // side)
    rows = [image[row : row + 1, 0:width][:, ::step] for row in range(0, height, step)]
    shown = np.array(maps[:, ::step, ::step])
    return picture_of(net.kind, np.concatenate(rows), shown[0] if net.kind == "labels" else shown, net.card)


def _forget(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def engine_identity(net: Network) -> dict[str, str]:
    """By what is done of a file was done."""
    members = json.dumps(dict(net.manifest.members), sort_keys=True) if net.manifest else str(net.path.stat())
    members += net.heads.chosen + net.card.to_json() + (" refined" if net.refine else "")  # thresholds and colours
    return {"engine": hashlib.sha256(members.encode()).hexdigest()}


def _identity(net: Network, path: Path) -> dict[str, str]:
    """What the rows that are done belong to."""
    stat = path.stat()
    return {"image": f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"} | engine_identity(net)


def _rows_done(state: Path, parts: Sequence[PartialResult], identity: dict[str, str]) -> int:
    """Rows of an earlier run of the same engine on the same file; 0 where there are none."""
    try:
        found = json.loads(state.read_text())
        rows = int(found.pop("rows"))
        there = min(part.path.stat().st_size // part.row for part in parts)
        return rows if found == identity and 0 < rows <= there else 0
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return 0

"""python -m runtime.infer: label image files of any size."""

import json
import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from .command import Debug, Force, Json, Threads, run
from .errors import DeployError, InterruptError, MisuseError
from .files import WriteError, check_writable
from .images import (
    DEFAULT_MAX_PIXELS,
    IMAGE_SUFFIXES,
    find_images,
    image_size,
    picture_of,
    read_image,
    write_labels,
    write_maps,
    write_png,
)
from .model_card import ModelCard
from .pipeline import CALLERS, Stream, describe_plan, overlapped, said
from .regions import by_regions, label_regions
from .segmenter import Segmenter
from .video import VIDEO_SUFFIXES, is_video, label_video


@dataclass(frozen=True)
class Job:
    """A file to label, and where its results and their picture go.

    Attributes:
        source: the file.
        results: kind → path: what the network gives, first; `probabilities` where they are wanted too.
        overlay: the picture.
        large: read and written region by region.
    """

    source: Path
    results: Mapping[str, Path]
    overlay: Path | None
    large: bool

    @property
    def targets(self) -> list[Path]:
        return [*self.results.values(), *([self.overlay] if self.overlay else [])]

    @property
    def said(self) -> dict[str, str | None]:
        """Where they go, for a record."""
        paths = {kind: str(path) for kind, path in self.results.items()}
        return paths | {"overlay": str(self.overlay) if self.overlay else None}

    @property
    def done(self) -> bool:
        """Whether an earlier run has written all of it: a file appears under its name when it is complete."""
        return all(path.exists() for path in self.targets)


def output_names(images: Sequence[Path]) -> list[str]:
    """A name for each image's labels, without suffix: its stem, or its whole name where stems repeat."""
    stems = Counter(image.stem for image in images)
    names = [image.stem if stems[image.stem] == 1 else image.name for image in images]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise MisuseError(
            f"{repeated[0]} is the name of several images, whose labels would overwrite each other; "
            "run one folder at a time, or give each its own -o"
        )
    return names


def label_files(
    net: Segmenter,
    images: Sequence[Path],
    out: Path,
    *,
    overlay: bool = False,
    probabilities: bool = False,
    force: bool = False,
    resume: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Iterator[dict]:
    """Label image and video files, in order; reading, labelling and writing overlap.

    A broken file is reported and does not stop the rest. What is written is whole: whenever the run ends, files under
    their own names are complete, and no others are left.

    Args:
        net: an open Segmenter.
        images: files to read.
        out: folder for NAME.png (labels) and NAME.overlay.png; NAME.tif for masks, for values, and for the labels of
            large and georeferenced TIFFs, which are read and written region by region; for videos NAME.mkv and
            NAME.overlay.mp4.
        overlay: write those pictures too.
        probabilities: write NAME.probabilities.tif too, float32, a page for each class.
        force: replace outputs that exist.
        resume: skip files whose outputs exist.
        max_pixels: refuse images with more.

    Yields:
        Per image {"image", "size": [H, W], "plan": {"padded": [H, W], "bytes", "profile", "stages", "overhead"},
        "ms": {"read", "label", "write"}, "labels" (or "masks" or "values"): path, "overlay": path or null}, or
        {"image", "error"}; "probabilities": path, where they are wanted. The times are of this image's own work, with
        others beside it. A video's have "frames" too, times are sums over them, and there is an "error" as well where
        some frames could not be read. With `resume`, the paths of what was there and "skipped": true.

    Raises:
        MisuseError: before any work, where an output exists already or would replace an input, or where there is no
            such output: videos of anything but labels, probabilities of a network of values.
        DeployError: where nothing can be written to `out`.
    """
    if not images:
        raise MisuseError("there are no images to label; name some")
    if force and resume:
        raise MisuseError("--force replaces what exists and --resume keeps it; choose one of them")
    kinds = (net.kind, "probabilities") if probabilities else (net.kind,)
    if kinds == ("values", "probabilities"):
        raise MisuseError(f"--probabilities: {net.path} gives values, which are written as they are; leave it away")
    if kinds != ("labels",) and (videos := [image for image in images if is_video(image)]):
        raise MisuseError(
            f"{videos[0]} is a video, of which labels are written and no {kinds[-1]}; extract its frames as images"
        )
    jobs = [_job(image, out / name, kinds, overlay) for image, name in zip(images, output_names(images), strict=True)]
    sources = {image.resolve() for image in images}
    targets = Counter(path for job in jobs for path in job.targets)
    for target, count in targets.items():
        if count > 1:
            raise MisuseError(f"{target} would be written for {count} of the images; give each its own -o")
        if target.resolve() in sources:
            raise MisuseError(f"{target} is an input and would be replaced by its labels; choose another -o")
        if target.exists() and not (force or resume):
            raise MisuseError(
                f"{target} exists already; choose another -o, or pass --force to replace it, or --resume to go on with "
                "the others"
            )
    check_writable(jobs[0].targets[0])
    stream = Stream(net, kinds)
    for kind, several in groupby(jobs, lambda job: _kind(job, resume)):
        yield from kind(stream, several, max_pixels)


def _job(source: Path, name: Path, kinds: Sequence[str], overlay: bool) -> Job:
    labels, picture = (".mkv", ".overlay.mp4") if is_video(source) else (".png", ".overlay.png")
    large = by_regions(source)
    if large or kinds[0] != "labels":
        labels = ".tif"
    results = {
        kind: Path(f"{name}{suffix}") for kind, suffix in zip(kinds, (labels, ".probabilities.tif"), strict=False)
    }
    return Job(source, results, Path(f"{name}{picture}") if overlay else None, large)


def _kind(job: Job, resume: bool) -> Callable[[Stream, Iterable[Job], int], Iterator[dict]]:
    """What labels a job, and those like it that follow: a record of each."""
    if resume and job.done:
        return _skip
    if is_video(job.source):
        return _label_videos
    return _label_large if job.large else _label_images


def _skip(stream: Stream, jobs: Iterable[Job], max_pixels: int) -> Iterator[dict]:
    for job in jobs:
        yield {"image": str(job.source)} | job.said | {"skipped": True}


def _label_videos(stream: Stream, jobs: Iterable[Job], max_pixels: int) -> Iterator[dict]:
    for job in jobs:
        yield label_video(stream, job.source, job.results["labels"], job.overlay, max_pixels)


def _label_large(stream: Stream, jobs: Iterable[Job], max_pixels: int) -> Iterator[dict]:
    """Files that are labelled region by region, one at a time: each takes the memory there is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} rows")
    # Bands come minutes apart: the time left is that of the whole run's pace, not of the last seconds'.
    clocks = TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn()
    for job in jobs:
        started = time.perf_counter()
        shown = {"console": console, "disable": not console.is_terminal}
        with Progress(*columns, *clocks, **shown, speed_estimate_period=1e9) as bar:
            task = bar.add_task(job.source.name, total=None)

            def progress(done: int, rows: int, bar=bar, task=task) -> None:
                if bar.tasks[task].total is None:  # what an earlier run did is not of this run's pace
                    bar.reset(task, total=rows, completed=done)
                bar.update(task, completed=done)

            try:
                plan = label_regions(
                    stream.net, job.source, job.targets[0], probabilities=job.results.get("probabilities"),
                    overlay=job.overlay, max_pixels=max_pixels, progress=progress,
                )  # fmt: skip
            except WriteError:
                raise  # the next would fail too
            except DeployError as error:
                yield {"image": str(job.source), "error": said(error, job.source)}
                continue
        yield {
            "image": str(job.source),
            "size": list(plan.size),
            "plan": describe_plan(plan),
            "ms": {"label": round((time.perf_counter() - started) * 1e3, 2)},
        } | job.said


def _label_images(stream: Stream, jobs: Iterable[Job], max_pixels: int) -> Iterator[dict]:
    def sized() -> Iterator[tuple[Job, tuple[int, int] | None]]:
        for job in jobs:
            try:
                yield job, image_size(job.source, max_pixels)
            except DeployError:
                yield job, None  # reading it says what is wrong

    records = overlapped(
        sized(),
        lambda group: _label_group(stream, [job for job, _ in group], max_pixels),
        workers=CALLERS + max(1, (os.cpu_count() or 1) // 2),
        pixels=lambda item: math.prod(item[1] or (0,)),
        most=stream.pixels,
        alike=lambda item: item[1] and stream.alike(item[1]),
    )
    with closing(records):
        yield from records


def _label_group(stream: Stream, jobs: Sequence[Job], max_pixels: int) -> list[dict]:
    """Read, label and write a few images; a record of each."""
    card = stream.net.card
    records: list[dict] = [{"image": str(job.source)} for job in jobs]
    images: dict[int, np.ndarray] = {}
    times: list[list[float]] = [[] for _ in jobs]  # read, label, write
    for index, job in enumerate(jobs):
        started = time.perf_counter()
        try:
            images[index] = read_image(job.source, card, max_pixels)
        except Exception as error:
            records[index]["error"] = said(error, job.source)
        times[index].append(time.perf_counter() - started)
    for (index, image), done in zip(images.items(), stream.label(list(images.values())), strict=True):
        job, record, results = jobs[index], records[index], done.outcome
        times[index].append(done.seconds)
        started = time.perf_counter()
        try:
            if isinstance(results, Exception):
                raise results
            picture = picture_of(stream.kinds[0], image, results[0], card) if job.overlay else None
        except Exception as error:
            record["error"] = said(error, job.source)
            continue
        # A disk that is full or a folder that cannot be written ends the run: the next image would fail too.
        for (kind, path), result in zip(job.results.items(), results, strict=True):
            if kind == "labels":
                write_labels(path, result, card)
            else:
                write_maps(path, result, card.score_names)
        if job.overlay:
            write_png(job.overlay, picture)
        times[index].append(time.perf_counter() - started)
        record |= {
            "size": list(done.plan.size),
            "plan": describe_plan(done.plan),
            "ms": {
                name: round(each * 1e3, 2) for name, each in zip(("read", "label", "write"), times[index], strict=True)
            },
        } | job.said
    return records


def infer(
    model: Annotated[Path, typer.Argument(help="A .engine (or a plain .onnx).")],
    images: Annotated[list[str], typer.Argument(help="Images, videos, folders or globs.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the labels, masks or values.")],
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Also write each class's probability, as float32 TIFFs.")
    ] = False,
    refine: Annotated[bool, typer.Option("--refine", help="Let borders of labels follow the image's own.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write pictures with a legend.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say how each image is run.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Skip files whose outputs exist already.")] = False,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
    memory: Annotated[float | None, typer.Option(min=0.001, max=1e6, help="GB one image may take.")] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse larger images.")] = DEFAULT_MAX_PIXELS,
    debug: Debug = False,
) -> int:
    """Write a label for every pixel of images of any size, as palette PNGs, and of videos; masks or values as TIFFs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    files = find_images(images, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    failed = labelled = skipped = 0
    started = time.perf_counter()
    with Segmenter(model, threads=threads, memory=None if memory is None else int(memory * 1e9), refine=refine) as net:
        how = {"overlay": overlay, "probabilities": probabilities, "max_pixels": max_pixels}
        records = label_files(net, files, out, force=force, resume=resume, **how)
        # Closed here, so that whatever ends the loop ends its threads before the network.
        with closing(_with_reasons(records)) as records:
            for record in records:
                failed += "error" in record
                skipped += "skipped" in record
                labelled += "size" in record
                if json_:
                    print(json.dumps(record), flush=True)
                    continue
                if "size" in record:
                    print(_line(record, net.card if explain else None), flush=True)
                if "error" in record:
                    print(f"error: {record['error']}", file=sys.stderr, flush=True)
    if not json_:
        already = f", {skipped} were there already" if skipped else ""
        print(f"{labelled} of {len(files)} images labelled{already} in {time.perf_counter() - started:.1f} s → {out}")
    elif failed:
        print(f"{failed} of {len(files)} images failed", file=sys.stderr)
    return 1 if failed else 0


def _with_reasons(records: Iterator[dict]) -> Iterator[dict]:
    """The records; where they are interrupted with something to say, Typer must not swallow it."""
    with closing(records):
        try:
            yield from records
        except KeyboardInterrupt as error:
            if error.args:
                raise InterruptError(str(error)) from error
            raise


def _first(record: dict) -> str:
    """Path of what the network gives."""
    return next(record[kind] for kind in ("labels", "masks", "values") if kind in record)


def _line(record: dict, card: ModelCard | None) -> str:
    height, width = record["size"]
    frames = f"{record['frames']} frames, " if "frames" in record else ""
    text = f"{record['image']}  {height}×{width}  {frames}{record['ms']['label']:.1f} ms  → {_first(record)}"
    if card is not None:
        padded = record["plan"]["padded"]
        memory, profile = record["plan"]["bytes"], record["plan"]["profile"]
        runs = f"{record['plan']['overhead']:.2f} times the work in tiles" if record["plan"]["stages"] else "one run"
        least = f", at least {card.smallest}" if card.smallest > 1 else ""
        text += f"\n  plan: padded to {padded[0]}×{padded[1]} (multiples of {card.size_multiple}{least}), {runs}"
        text += f", about {memory / 1e6:.0f} MB" if memory else ""
        text += "" if profile is None else f", profile {profile}"
        for index, stage in enumerate(record["plan"]["stages"]):
            tile, halo = "×".join(map(str, stage["tile"])), "×".join(map(str, stage["halo"]))
            text += f"\n  stage {index}: {stage['tiles']} tiles of {tile} with a halo of {halo}"
    return text


def main() -> None:
    run(infer, "python -m runtime.infer")


if __name__ == "__main__":
    main()

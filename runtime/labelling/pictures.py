"""Images that are held whole: several read, labelled and written at once, those of equal size in batches."""

import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

from numpy.typing import NDArray

from ..errors import DeployError
from ..images.header import Header, read_header
from ..images.numbers import ReadOptions
from ..images.overlay import picture_of
from ..images.read import decode
from ..images.write import no_data_tag, write_labels, write_maps, write_png
from ..stream import CALLERS, Stream, describe_plan, overlapped, said
from .jobs import Job, Record

Opened = tuple[Job, Header | DeployError]  # a job and what its file says of itself, or what is wrong with it


def label_pictures(stream: Stream, jobs: Iterable[Job], options: ReadOptions) -> Iterator[Record]:
    """Label images; a record of each, in order. Raises WriteError where a result cannot be written."""

    def opened() -> Iterator[Opened]:
        for job in jobs:
            try:
                yield job, read_header(job.source, options.max_pixels, job.page)
            except DeployError as error:
                yield job, error

    records = overlapped(
        opened(),
        lambda group: _label(stream, group, options),
        workers=CALLERS + max(1, (os.cpu_count() or 1) // 2),
        pixels=lambda item: item[1].pixels if isinstance(item[1], Header) else 0,
        most=stream.pixels,
        alike=lambda item: stream.alike(item[1].size) if isinstance(item[1], Header) else None,
    )
    with closing(records):
        yield from records


def _label(stream: Stream, group: Sequence[Opened], options: ReadOptions) -> list[Record]:
    """Read, label and write a few images; a record of each."""
    card = stream.network.card
    records = [job.record for job, _ in group]
    images: dict[int, NDArray[Any]] = {}
    times: list[list[float]] = [[] for _ in group]  # read, label, write
    for index, (job, header) in enumerate(group):
        started = time.perf_counter()
        try:
            if isinstance(header, DeployError):
                raise header
            images[index] = decode(header, card, options)
        except Exception as error:
            records[index]["error"] = said(error, job.source)
        times[index].append(time.perf_counter() - started)
    for (index, image), done in zip(images.items(), stream.label(list(images.values())), strict=True):
        (job, _), record, results = group[index], records[index], done.outcome
        times[index].append(done.seconds)
        started = time.perf_counter()
        try:
            if isinstance(results, Exception):
                raise results
            step = -(-max(image.shape[:2]) // job.side)
            shown = results[0][..., ::step, ::step]
            picture = picture_of(stream.kinds[0], image[::step, ::step], shown, card) if job.overlay else None
        except Exception as error:
            record["error"] = said(error, job.source)
            continue
        # A disk that is full or a folder that cannot be written ends the run: the next image would fail too.
        for (kind, path), result in zip(job.results.items(), results, strict=True):
            if kind == "labels":
                write_labels(path, result, card)
            else:
                write_maps(path, result, card.score_names, tags=[] if kind == "masks" else [no_data_tag(math.nan)])
        if job.overlay and picture:
            write_png(job.overlay, picture)
        times[index].append(time.perf_counter() - started)
        record |= {
            "size": [*image.shape[:2]],
            "plan": done.plan and describe_plan(done.plan),
            "ms": {
                name: round(each * 1e3, 2) for name, each in zip(("read", "label", "write"), times[index], strict=True)
            },
        } | job.written
    return records

"""Videos labelled frame by frame: a label video of each, and a video of overlays."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from ..images.numbers import ReadOptions
from ..images.overlay import overlay
from ..images.video import VideoError, VideoReader, VideoWriter, yuv_frame
from ..stream import CALLERS, Labelled, Stream, describe_plan, overlapped, said
from .jobs import Job, Record


def label_videos(stream: Stream, jobs: Iterable[Job], options: ReadOptions) -> Iterator[Record]:
    """Label each frame of videos, one after the other; frames that cannot be read are left out, and the rest keep
    their times.

    The labels are a Matroska file: FFV1, lossless, grey (`gray`, or `gray16le` beyond 256 classes), whose values are
    class indices. The overlay is an MP4, H.264 (MPEG-4 where PyAV lacks it), in which the last row and column are
    repeated where their number is odd. A rotation is applied, as players do; sound is not copied.

    Args:
        stream: of an open Network.
        jobs: videos.
        options: frames of more than their `max_pixels` are refused; the rest is of images.

    Yields:
        Records of `label_files`.

    Raises:
        DeployError: an output cannot be written.
    """
    for job in jobs:
        yield _label_video(stream, job, options.max_pixels)


def _label_video(stream: Stream, job: Job, max_pixels: int) -> Record:
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(VideoReader.open(job.source, stream.network.card, max_pixels))
            record = job.record | _label_frames(stream, reader, job, stack)
            faults = reader.faults()  # while it is open: it asks the file
    except VideoError as error:
        return job.record | {"error": said(error, job.source)}
    if faults:
        record["error"] = f"{job.source}: {faults}; the other {record['frames']} frames are labelled"
    return record


def _label_frames(stream: Stream, reader: VideoReader, job: Job, stack: ExitStack) -> Record:
    """Label the frames of an open video and write them; what its record says of it."""
    card = stream.network.card
    times = {"read": 0.0, "label": 0.0, "write": 0.0}

    def work(frames: list[Any]) -> list[tuple[int, Labelled, Any, float, float]]:
        (frame,) = frames
        started = time.perf_counter()
        image = reader.image(frame)
        read = time.perf_counter() - started
        (done,) = stream.label([image])
        started = time.perf_counter()
        picture = None
        if job.overlay and not isinstance(done.outcome, Exception):
            picture = yuv_frame(reader.av, overlay(image, done.outcome[0], card))
        return [(frame.pts, done, picture, read, time.perf_counter() - started)]

    results = overlapped(
        reader.frames(times), work, workers=CALLERS + 1, pixels=lambda frame: frame.width * frame.height,
        most=stream.pixels,
    )  # fmt: skip
    stack.enter_context(closing(results))
    writers: list[VideoWriter] = []
    plan, count = None, 0
    for pts, done, picture, read, drawn in results:
        if isinstance(done.outcome, Exception):
            raise VideoError(f"{reader.path}, frame {count}: {said(done.outcome, reader.path)}") from done.outcome
        started, (found,), plan = time.perf_counter(), done.outcome, done.plan
        if not count:
            writers.append(stack.enter_context(VideoWriter.open(job.results["labels"], reader, found.shape, card)))
            if job.overlay:
                writers.append(stack.enter_context(VideoWriter.open(job.overlay, reader, found.shape, None)))
        kind = "gray" if found.dtype == np.uint8 else "gray16le"
        shown = (reader.av.VideoFrame.from_ndarray(found, format=kind), picture)
        for writer, frame in zip(writers, shown, strict=False):
            writer.write(frame, pts)
        count += 1
        times["read"] += read
        times["label"] += done.seconds
        times["write"] += drawn + time.perf_counter() - started
    if plan is None:
        raise VideoError(f"{reader.path} has no frame that can be read ({reader.faults() or 'it is empty'})")
    for writer in writers:
        writer.finish()
    return {
        "size": list(plan.size),
        "frames": count,
        "plan": describe_plan(plan),
        "ms": {name: round(seconds * 1e3, 2) for name, seconds in times.items()},
    } | job.written

"""label_files: image and video files labelled in order, reading, labelling and writing overlapped."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path

from ..errors import MisuseError
from ..files import check_writable, no_empty_folders
from ..images.addresses import Address
from ..images.numbers import ReadOptions
from ..images.video import is_video
from ..images.write import attribute_table
from ..network import Network
from ..stream import Stream
from .jobs import Job, Record, Source, Wanted, jobs_for, names_of
from .pictures import label_pictures
from .products import Products


def label_files(
    net: Network,
    sources: Sequence[Source] | Mapping[Source, Path],
    out: Path,
    *,
    overlay: bool = False,
    probabilities: bool = False,
    products: Products | None = None,
    force: bool = False,
    resume: bool = False,
    reuse: bool = False,
    options: ReadOptions | None = None,
    all_pages: bool = False,
) -> Generator[Record, None, None]:
    """Label image and video files, in order; reading, labelling and writing overlap.

    A broken file is reported and does not stop the rest. Whenever the run ends, files under their own names are
    complete. Of a video or a large file that was interrupted, what is done is kept under hidden names: the same call
    goes on from there.

    Args:
        net: the network that labels them, opened.
        sources: images and videos to read, and addresses of videos; a mapping says what the results of each are called,
            below `out` and without suffix. While a live one is read in the main thread, SIGINT and SIGTERM end it, and
            its labels are written.
        out: folder for NAME.png (labels) and NAME.overlay.png; NAME.tif for masks, for values, and for the labels of
            large and georeferenced TIFFs, which are read and written region by region; for videos NAME.mkv and
            NAME.overlay.mp4.
        overlay: write those pictures too.
        probabilities: write NAME.probabilities.tif too, float32, a band for each class.
        products: what is made besides, and how: Cloud-Optimized GeoTIFFs, polygons, statistics, instances.
        force: replace outputs that exist.
        resume: skip files whose outputs exist. Live sources and standard input are refused.
        reuse: of videos, do not compute again what equals the frame before; labels are the same.
        options: how images are read; None: as they are.
        all_pages: label each image of files that hold several, as NAME.page0.png and so on.

    Yields:
        Per file {"record": "image" or "video", "file", "size": [H, W], "plan": {"padded": [H, W], "bytes", "profile",
        "stages", "overhead"}, "ms": {"read", "label", "write"}, "labels" (or "masks" or "values"): path, "overlay":
        path or null}, or {"record", "file", "error"}; "probabilities": path, where they are wanted. The times are of
        this file's own work, with others beside it. A video's have "frames" too, times are sums over them, and there
        is an "error" as well where some frames could not be read. With `resume`, the paths of what was there and
        "skipped": true.

    Raises:
        MisuseError: before any work, where an output exists already or would replace an input, or where there is no
            such output: videos of anything but labels, probabilities of a network of values.
        WriteError: where a result cannot be written.
        DeployError: where nothing can be written to `out`.
    """
    if not sources:
        raise MisuseError("there are no images to label; name some")
    if force and resume:
        raise MisuseError("--force replaces what exists and --resume keeps it; choose one of them")
    kinds = (net.kind, "probabilities") if probabilities else (net.kind,)
    if kinds == ("values", "probabilities"):
        raise MisuseError(f"--probabilities: {net.path} gives values, which are written as they are; omit it")
    if resume and (streams := [each for each in sources if isinstance(each, Address) and not each.repeats]):
        raise MisuseError(f"{streams[0]} cannot be read again from its start, as --resume would need; omit it")
    videos = [source for source in sources if isinstance(source, Address) or is_video(source)]
    if kinds != ("labels",) and videos:
        raise MisuseError(
            f"{videos[0]} is a video, of which labels are written and no {kinds[-1]}; extract its frames as images"
        )
    products, options = products or Products(), options or ReadOptions()
    if videos and (all_pages or options.page is not None):
        raise MisuseError(f"--page: {videos[0]} is a video, which has none; omit it")
    named = attribute_table(net.card) is not None
    wanted = Wanted(kinds, overlay, products, named, "all" if all_pages else options.page)
    named_as = sources if isinstance(sources, Mapping) else names_of([(source, Path()) for source in sources])
    jobs = jobs_for(named_as, out, wanted, keep=not (force or resume))
    if products.derived or products.cog:
        from . import derive

        derive.check_products(products, net.card, jobs, force or resume)
    with _folders_of(jobs):
        check_writable(jobs[0].targets[0])
        records = _records(Stream(net, kinds, reuse), jobs, resume, options)
        yield from derive.with_products(records, jobs, net.card, products) if products.derived else records


def _folders_of(jobs: Sequence[Job]) -> AbstractContextManager[None]:
    """Within it the folders of the results are made; what is left empty at its end is removed."""
    return no_empty_folders(target.parent for job in jobs for target in job.targets)


def _records(stream: Stream, jobs: Sequence[Job], resume: bool, options: ReadOptions) -> Generator[Record, None, None]:
    """Label the files; a record of each."""
    for label, several in groupby(jobs, lambda job: _labeller(job, resume)):
        yield from label(stream, several, options)


def _labeller(job: Job, resume: bool) -> Callable[[Stream, Iterable[Job], ReadOptions], Iterator[Record]]:
    """What labels a job, and those like it that follow: a record of each."""
    if resume and job.done:
        return _skip
    if job.is_video:
        from .videos import label_videos

        return label_videos
    if job.by_regions:
        from .regions import label_by_regions

        return label_by_regions
    return label_pictures


def _skip(stream: Stream, jobs: Iterable[Job], options: ReadOptions) -> Iterator[Record]:
    for job in jobs:
        yield job.record | job.written | {"skipped": True}

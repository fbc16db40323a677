"""label-images, which is also python -m runtime.infer: label image and video files of any size."""

import sys
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .command import (
    FAILURE,
    Force,
    InputRange,
    Json,
    Memory,
    NoData,
    Strict,
    Threads,
    log_to_stderr,
    print_record,
    run,
)  # fmt: skip
from .errors import InterruptError
from .images.header import DEFAULT_MAX_PIXELS
from .labelling.bulk_options import Bulk
from .labelling.planes import ALL, Planes
from .labelling.products import Products
from .options import argument, option

if TYPE_CHECKING:
    from .engine_format.model_card import ModelCard

NOTHING_MORE, FIRST = Products(), Planes()


def label_images(
    model: Annotated[Path, argument(help="An .engine (or a plain .onnx).", metavar="MODEL")],
    images: Annotated[
        list[str],
        argument(
            help="Images, videos, folders or globs ('FOLDER/**' descends), of this machine or at addresses (s3://, "
            "gs://, https://), videos that come as they are read (rtsp://, http://), cameras (/dev/video0), or - for "
            "one on standard input.",
            metavar="IMAGES",
        ),
    ],
    out: Annotated[
        str, option("-o", "--out", metavar="FOLDER", help="Folder or address that labels, masks or values go to.")
    ],
    probabilities: Annotated[
        bool, option("--probabilities", help="Write each class's probability too, as float32 TIFFs.")
    ] = False,
    output: Annotated[
        str | None,
        option(metavar="NAME", help="Of an engine of several outputs: which one is written [default: the first]."),
    ] = None,
    refine: Annotated[bool, option("--refine", help="Let borders of labels follow the borders in the image.")] = False,
    overlay: Annotated[
        bool, option("--overlay", help="Write pictures of the labels over the images too, with a legend.")
    ] = False,
    products: Products = NOTHING_MORE,
    planes: Planes = FIRST,
    explain: Annotated[bool, option("--explain", help="Say how each image is run: whole, or in tiles.")] = False,
    resume: Annotated[bool, option("--resume", help="Skip what an earlier run has finished.")] = False,
    live: Annotated[
        bool | None,
        option(
            "--live/--no-live",
            help="Drop the oldest frames of an address that come faster than they are labelled, or none [default: of "
            "cameras and streaming addresses].",
        ),
    ] = None,
    reconnect: Annotated[
        float,
        option(min=0, metavar="SECONDS", help="Open a lost connection again within this time; 0: do not."),
    ] = 60,
    bulk: Bulk = Bulk(),  # noqa: B008 (frozen)
    reuse: Annotated[
        bool,
        option("--reuse", help="Do not compute again what equals the frame before, as in videos of a fixed camera."),
    ] = False,
    input_range: InputRange = None,
    nodata: NoData = None,
    strict: Strict = False,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
    memory: Memory = None,
    max_pixels: Annotated[int, option(min=1, help="Refuse images of more pixels.")] = DEFAULT_MAX_PIXELS,
) -> int:
    """Write a label for every pixel of images of any size, as palette PNGs, and of videos; masks or values as TIFFs."""
    log_to_stderr()
    from .images.addresses import find_sources
    from .images.numbers import ReadOptions
    from .labelling.files import label_files
    from .network import Network

    options = ReadOptions(max_pixels, input_range, nodata, strict, planes.number, planes.channels)
    files = bulk.sources(images, out, lambda: find_sources(images, live, reconnect))
    label = partial(
        label_files, overlay=overlay, probabilities=probabilities, products=products, force=force, resume=resume,
        reuse=reuse, options=options, all_pages=planes.page == ALL,
    )  # fmt: skip
    started = time.perf_counter()
    with Network(model, threads=threads, memory=memory, refine=refine, output=output) as net:
        counts = _report(bulk.records(net, files, out, label, threads), json_, net.card if explain else None)
    _sum_up(counts, round(time.perf_counter() - started, 3), out, json_)
    return FAILURE if counts["failed"] else 0


def _report(
    records: Generator[dict[str, Any], None, None], json_: bool, explained: "ModelCard | None"
) -> dict[str, int]:
    """Print the records as they come; how many there are, were labelled, skipped and failed."""
    counts = dict.fromkeys(("files", "labelled", "skipped", "failed"), 0)
    # Closed here, so that whatever ends the loop ends its threads before the network.
    with closing(_with_reasons(records)) as records:
        for record in records:
            counts["files"] += 1
            counts["failed"] += "error" in record
            counts["skipped"] += "skipped" in record
            counts["labelled"] += "size" in record
            if json_:
                print_record(record["record"], record)
            else:
                _show(record, explained)
    return counts


def _sum_up(counts: dict[str, int], seconds: float, out: str, json_: bool) -> None:
    if json_:
        print_record("summary", {**counts, "seconds": seconds})
        return
    already = f", {counts['skipped']} were there already" if counts["skipped"] else ""
    print(f"{counts['labelled']} of {counts['files']} images labelled{already} in {seconds:.1f} s → {out}")


def _with_reasons(records: Generator[dict[str, Any], None, None]) -> Generator[dict[str, Any], None, None]:
    """The records; where they are interrupted with something to say, Typer must not swallow it."""
    with closing(records):
        try:
            yield from records
        except KeyboardInterrupt as error:
            if error.args:
                raise InterruptError(str(error)) from error
            raise


def _show(record: dict[str, Any], explained: "ModelCard | None") -> None:
    """A record as text, with how the image was run where a card is given; errors on standard error."""
    if "instance_counts" in record:
        counted = ", ".join(f"{count} {name}" for name, count in record["instance_counts"].items())
        print(f"{record['file']}  {counted}  → {record['instances']}")
    if "size" in record:
        height, width = record["size"]
        frames = f"{record['frames']} frames, {record['fps']} a second, " if "frames" in record else ""
        frames += f"{record['dropped']} dropped, " if "dropped" in record else ""
        frames += f"{record['reconnected']} times connected again, " if "reconnected" in record else ""
        first = next(record[kind] for kind in ("labels", "masks", "values") if kind in record)
        print(f"{record['file']}  {height}×{width}  {frames}{record['ms']['label']:.1f} ms  → {first}")
        if explained is not None:
            print(_plan(record["plan"], explained))
        sys.stdout.flush()
    if "error" in record:
        print(f"error: {record['error']}", file=sys.stderr, flush=True)


def _plan(plan: dict[str, Any], card: "ModelCard") -> str:
    runs = f"{plan['overhead']:.2f} times the work in tiles" if plan["stages"] else "one run"
    least = f", at least {card.smallest}" if card.smallest > 1 else ""
    text = f"  plan: padded to {_sides(plan['padded'])} (multiples of {card.size_multiple}{least}), {runs}"
    text += f", about {plan['bytes'] / 1e6:.0f} MB" if plan["bytes"] else ""
    text += "" if plan["profile"] is None else f", profile {plan['profile']}"
    if plan["passes"]:
        text += (
            f"\n  {plan['passes']} {'pass' if plan['passes'] == 1 else 'passes'} for what the network pools over the "
        )
        text += "whole image, then the scores: equal to the whole image's to float32's rounding, not bit for bit"
    for index, stage in enumerate(plan["stages"]):
        tile, halo = _sides(stage["tile"]), _sides(stage["halo"])
        text += f"\n  stage {index}: {stage['tiles']} tiles of {tile} with a halo of {halo}"
    return text


def _sides(size: list[int]) -> str:
    return "×".join(map(str, size))


def main() -> None:
    # In a clone the folder runtime/ itself answers to the second name.
    run(label_images, "label-images" if Path(sys.argv[0]).stem == "label-images" else "python -m runtime.infer")


if __name__ == "__main__":
    main()

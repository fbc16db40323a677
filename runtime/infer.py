"""python -m runtime.infer: label image files of any size."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from runtime.command import Debug, Force, Json, Threads, run
from runtime.engine_file import ModelCard
from runtime.errors import DeployError, MisuseError
from runtime.files import check_writable
from runtime.images import DEFAULT_MAX_PIXELS, find_images, overlay_sheet, read_image, write_labels, write_png
from runtime.segmenter import Segmenter


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
    force: bool = False,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Iterator[dict]:
    """Label image files one after the other; a broken one is reported and does not stop the rest.

    Args:
        net: an open Segmenter.
        images: files to read.
        out: folder for NAME.png (labels) and NAME.overlay.png.
        overlay: write those pictures too.
        force: replace outputs that exist.
        max_pixels: refuse images with more.

    Yields:
        Per image {"image", "size": [H, W], "plan": {"padded": [H, W], "bytes", "profile", "stages", "overhead"},
        "ms": {"read", "label", "write"}, "labels": path, "overlay": path or null}, or {"image", "error"}.

    Raises:
        MisuseError: before any work, where an output exists already or would replace an input.
        DeployError: where nothing can be written to `out`.
    """
    if not images:
        raise MisuseError("there are no images to label; name some")
    names = output_names(images)
    targets = [(out / f"{name}.png", out / f"{name}.overlay.png" if overlay else None) for name in names]
    sources = {image.resolve() for image in images}
    for target in (path for pair in targets for path in pair if path):
        if target.resolve() in sources:
            raise MisuseError(f"{target} is an input and would be replaced by its labels; choose another -o")
        if target.exists() and not force:
            raise MisuseError(f"{target} exists already; choose another -o, or pass --force to replace it")
    check_writable(targets[0][0])
    for image_path, (labels_path, overlay_path) in zip(images, targets, strict=True):
        started = time.perf_counter()
        try:
            image = read_image(image_path, net.card, max_pixels)
            read = time.perf_counter()
            plan = net.plan(*image.shape[:2])
            labels = net(image)
            labelled = time.perf_counter()
            picture = overlay_sheet(image, labels, net.card) if overlay_path else None
        except Exception as error:
            said = str(error) if isinstance(error, DeployError) else f"{image_path}: {type(error).__name__}: {error}"
            yield {"image": str(image_path), "error": " ".join(said.split())}
            continue
        # A disk that is full or a folder that cannot be written ends the run: the next image would fail too.
        write_labels(labels_path, labels, net.card)
        if overlay_path:
            write_png(overlay_path, picture)
        written = time.perf_counter()
        times = {"read": read - started, "label": labelled - read, "write": written - labelled}
        yield {
            "image": str(image_path),
            "size": list(plan.size),
            "plan": {
                "padded": list(plan.padded),
                "bytes": plan.bytes,
                "profile": plan.profile,
                "stages": [
                    {"tile": list(grid.tile), "halo": list(grid.halo), "tiles": grid.count} for grid in plan.grids
                ],
                "overhead": round(plan.overhead, 3),
            },
            "ms": {name: round(seconds * 1e3, 2) for name, seconds in times.items()},
            "labels": str(labels_path),
            "overlay": str(overlay_path) if overlay_path else None,
        }


def infer(
    model: Annotated[Path, typer.Argument(help="A .engine (or a plain .onnx).")],
    images: Annotated[list[str], typer.Argument(help="Images, folders or globs.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the label PNGs.")],
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write pictures with a legend.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say how each image is run.")] = False,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
    memory: Annotated[float | None, typer.Option(min=0.001, max=1e6, help="GB one image may take.")] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse larger images.")] = DEFAULT_MAX_PIXELS,
    debug: Debug = False,
) -> int:
    """Write a label for every pixel of images of any size, as palette PNGs."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    files = find_images(images)
    failed = 0
    started = time.perf_counter()
    with Segmenter(model, threads=threads, memory=None if memory is None else int(memory * 1e9)) as net:
        for record in label_files(net, files, out, overlay=overlay, force=force, max_pixels=max_pixels):
            failed += "error" in record
            if json_:
                print(json.dumps(record), flush=True)
            elif "error" in record:
                print(f"error: {record['error']}", file=sys.stderr, flush=True)
            else:
                print(_line(record, net.card if explain else None), flush=True)
    done = len(files) - failed
    if not json_:
        print(f"{done} of {len(files)} images labelled in {time.perf_counter() - started:.1f} s → {out}")
    elif failed:
        print(f"{failed} of {len(files)} images failed", file=sys.stderr)
    return 1 if failed else 0


def _line(record: dict, card: ModelCard | None) -> str:
    height, width = record["size"]
    text = f"{record['image']}  {height}×{width}  {record['ms']['label']:.1f} ms  → {record['labels']}"
    if card is not None:
        padded = record["plan"]["padded"]
        memory, profile = record["plan"]["bytes"], record["plan"]["profile"]
        runs = f"{record['plan']['overhead']:.2f} times the work in tiles" if record["plan"]["stages"] else "one run"
        text += f"\n  plan: padded to {padded[0]}×{padded[1]} (multiples of {card.size_multiple}), {runs}"
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

"""export-onnx and build-engine. Heavy modules load when they are used, so that --help is instant."""

import json
import logging
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from runtime.command import Debug, Force, Json, Threads, need, run
from runtime.errors import MisuseError
from runtime.files import check_writable, refuse_existing


class Exporter(StrEnum):
    auto = "auto"
    torchscript = "torchscript"
    dynamo = "dynamo"


class Target(StrEnum):
    cpu = "cpu"


def export(
    source: Annotated[str, typer.Argument(help="A checkpoint, or package.module:factory giving a torch.nn.Module.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="ONNX file to write.")],
    classes: Annotated[
        str | None, typer.Option(help="Names, comma-separated or one a line in a file; for a factory.")
    ] = None,
    mean: Annotated[str | None, typer.Option(help="Per channel, in the image's units: 123.7,116.3,103.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Per channel, in the image's units.")] = None,
    exporter: Annotated[Exporter, typer.Option(help="Of PyTorch; auto tries both.")] = Exporter.auto,
    opset: Annotated[int, typer.Option(min=18, max=23, help="ONNX operator set to write.")] = 18,
    json_: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Export a network to ONNX that takes every size, and verify it at sizes it was never traced at."""
    if out.suffix.lower() != ".onnx":
        raise MisuseError(f"{out} is not named .onnx; the runtime tells models by that suffix")
    refuse_existing(out, force)
    need("torch", "export")
    need("onnx", "export")
    need("onnxruntime", "cpu")
    check_writable(out)
    from export.to_onnx import export as run_export
    from export.to_onnx import load_source
    from runtime.segmenter import describe_assumption

    model, card = load_source(source)
    if card is not None and (classes or mean or std):
        raise MisuseError(f"{source} has a model card; --classes, --mean and --std are for modules without one")
    assumed = card is None and not (classes and mean and std)
    card, differences = run_export(
        model,
        card,
        out,
        exporter=exporter.value,
        opset_version=opset,
        name=source,
        describe=lambda card: _described(card, classes, mean, std),
    )
    if assumed:
        print(f"note: {describe_assumption(card, source)}", file=sys.stderr)
    worst = max(differences, key=lambda difference: difference.logits)
    if json_:
        record = {
            "model": str(out),
            "card": json.loads(card.to_json()),
            "differences": [{"size": list(d.size), "batch": d.batch, "logits": d.logits} for d in differences],
        }
        print(json.dumps(record))
        return
    print(f"{source} → {out} ({out.stat().st_size / 1e6:.1f} MB, opset {opset})")
    print(f"takes every H, W ≥ 1; {len(card.classes)} classes, stride {card.stride}, {card.channels} channels")
    print("largest difference from PyTorch, as a share of the logits' range, at sizes never traced:")
    for difference in differences:
        size = f"{difference.size[0]}×{difference.size[1]}" + (f" ×{difference.batch}" if difference.batch > 1 else "")
        print(f"  {size:>11}  {difference.logits:.1e}{'  worst' if difference is worst else ''}")


def _described(card, classes: str | None, mean: str | None, std: str | None):
    """An assumed card with what the user said of the model."""
    changes = {}
    if classes is not None:
        if "," in classes:
            text = classes.split(",")
        else:
            try:
                text = Path(classes).read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise MisuseError(f"--classes {classes}: {error}; give names with commas, or a file of them") from error
        names = tuple(name.strip() for name in text if name.strip())
        if len(names) != len(card.classes):
            raise MisuseError(f"--classes names {len(names)} classes, and the model has {len(card.classes)}")
        changes["classes"] = names
    for option, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                changes[option] = tuple(float(value) for value in text.split(","))
            except ValueError as error:
                raise MisuseError(f"--{option} {text!r}; write numbers with commas, one per channel") from error
    try:
        return replace(card, **changes)
    except ValueError as error:
        raise MisuseError(f"the model card would have {error}") from error


def build(
    model: Annotated[Path, typer.Argument(help="A segmentation ONNX, of export-onnx or elsewhere.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Engine to write (with --standalone: an ONNX).")],
    target: Annotated[Target, typer.Option(help="What the engine is for.")] = Target.cpu,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Write an ONNX for other runtimes: uint8 NHWC in, labels out.")
    ] = False,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Build an engine: cut off the head, optimise the core, compare with the model, measure."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    wanted = ".onnx" if standalone else ".engine"
    if out.suffix.lower() != wanted:
        raise MisuseError(f"{out} is not named {wanted}; the runtime tells files by their suffix")
    refuse_existing(out, force)
    if out.exists() and model.exists() and out.samefile(model):
        raise MisuseError(f"{out} is the model itself; choose another -o")
    need("onnx", "export")
    need("onnxruntime", "cpu")
    check_writable(out)
    from export.build import build_engine as run_build
    from export.build import build_standalone, read_source
    from runtime.verify import show_latency

    source = read_source(model)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    if standalone:
        build_standalone(source, out, threads)
        if json_:
            print(json.dumps({"standalone": str(out), "notes": source.notes}))
            return
        print(f"{model} → {out}: uint8 [N,H,W,{source.card.channels}] in, labels [N,H,W] out")
        return
    report = run_build(source, out, threads)
    if json_:
        print(json.dumps({"engine": str(out)} | report))
        return
    agreement = report["agreement"]
    print(f"{model} → {out} ({out.stat().st_size / 1e6:.1f} MB) for {report['target']}, {report['precision']}")
    head = "in the network" if report["head"] == "none" else "exact, outside the network"
    print(f"head: {head}; scores at stride {report['stride']}, sizes padded to multiples of {report['size_multiple']}")
    rest = "" if agreement["labels_equal"] == 1 else "; the others are within rounding of a tie"
    print(
        f"labels equal to the model's at {len(agreement['sizes'])} sizes: {agreement['labels_equal']:.4%} of "
        f"{agreement['pixels']:,} pixels{rest}"
    )
    print("latency on this machine (median):")
    print(show_latency(report["latency_ms"]))


def export_onnx() -> None:
    run(export, "export-onnx")


def build_engine() -> None:
    run(build, "build-engine")

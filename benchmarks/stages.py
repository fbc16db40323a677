"""What each stage of deployment costs in accuracy: PyTorch, ONNX, engines for CPUs, the graphs TensorRT is given.

    python -m benchmarks.stages cam.safetensors --data ../shared/camvid --calib ../shared/camvid/train \\
        --labels ../shared/camvid/trainannot [--scales 0.5,0.75,1.5,2,mixed] \\
        [--only FP8,BF16] [--sizes 480x640] [--work build/stages] [--json stages.json] [--plot stages.png]

Exports the checkpoint and builds its engines in WORK, in float32 and INT8 for this CPU, in FP16, BF16, INT8 and FP8 by
TensorRT for RTX for --target; what is there already is taken as it is. All are evaluated on the same images at the same
scales (see eval-fcn). Of TensorRT the graph itself runs, on the CPU: QDQ operators of INT8 and FP8 as they are written,
results in FP16 and BF16 rounded after each operator; so their rows have no times, and their sizes are those of the
plans' engines.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.calibration.report.results import MIXED, OWN, Evaluated, metrics_of
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.mixed_precision import mix_precision
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.fcn.evaluate import evaluate_in_detail, open_model, parse_scales

from benchmarks.common import graph_labels, pyplot

EMULATED = "TensorRT"
LOW = {"FP16": {"fp16": True}, "BF16": {"bf16": True}, "INT8": {"int8": True, "fp16": True},
       "FP8": {"fp8": True, "fp16": True}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--count", type=int, help="images to evaluate on; default: all")
    parser.add_argument("--calib", required=True, help="images to calibrate on")
    parser.add_argument("--labels", type=Path, help="their labels, for the accuracy gate")
    parser.add_argument("--max-drop", type=float, default=0.5, help="of the gate")
    parser.add_argument("--scales", default=OWN)
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--only", default=",".join(LOW), help="what is built by TensorRT; default: all of it")
    parser.add_argument("--sizes", help="that engines for CPUs are timed at, as of build-engine; default: its own")
    parser.add_argument("--work", type=Path, default=Path("build/stages"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="mIoU against scale")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    scales, packed, rows = parse_scales(options.scales), [], []
    for name, file, predict, card in stages(options):
        data = load_dataset(options.data, options.split, count=options.count, card=card)
        found = evaluate_in_detail(predict, data, len(card.classes), scales, packed, worst=0)
        rows.append(row(name, file.stat().st_size, found, card.classes))
        print(f"{name}: mIoU {found.metrics.mean_iou:.4f}", file=sys.stderr, flush=True)
    result = {"checkpoint": str(options.checkpoint), "data": options.data, "images": len(data), "rows": rows}
    for line in table(result):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        draw(result, options.plot)


def stages(options: argparse.Namespace):
    """(name, file, predict, card) of each stage, made when it is asked for."""
    name = options.work / options.checkpoint.stem
    model, *engines = (name.with_name(name.name + suffix) for suffix in (".onnx", ".engine", "-int8.engine"))
    low = ["--calib", options.calib, "--max-drop", options.max_drop]
    low += ["--labels", options.labels] if options.labels else []
    timed = ["--threads", options.threads, *(["--sizes", options.sizes] if options.sizes else [])]
    run("export_onnx", model, options.checkpoint)
    opened = open_model(options.checkpoint, options.threads)
    yield "PyTorch", options.checkpoint, opened.predict, opened.card
    opened = open_model(model, options.threads)
    yield "ONNX", model, opened.predict, opened.card
    for title, engine, how in zip(("float32", "INT8"), engines, ([], ["--int8", *low]), strict=True):
        run("build_engine", engine, model, *timed, *how)
        opened = open_model(engine, options.threads)
        yield f"CPU, {title}", engine, opened.predict, opened.card
    found = core_of(import_model(model))
    head, card, core = found.upsampling, found.card, optimise_offline(found.model)
    for title in options.only.split(","):
        flag = title.lower()
        plan = name.with_name(f"{name.name}-{flag}-{options.target}.engine")
        run("build_engine", plan, model, "--target", options.target, f"--{flag}", *low)
        how = QuantizationOptions(
            calib=options.calib, labels=options.labels, max_drop=options.max_drop, **LOW[title.upper()]
        )
        graph = mix_precision(core, head, card, "tensorrt", how).emulated
        yield f"{EMULATED}, {title}", plan, graph_labels(graph, head, card, optimise=False), card


def run(command: str, out: Path, source: Path, *words: object) -> None:
    """One of the commands, unless what it makes is there."""
    if out.exists():
        return
    words = [source, "-o", out, *words]
    print(f"$ {command.replace('_', '-')} {' '.join(map(str, words))}", file=sys.stderr, flush=True)
    program = [sys.executable, "-c", f"from fcn_deploy.export.cli.{command} import main; main()"]
    if code := subprocess.run([*program, *map(str, words)], stdout=sys.stderr).returncode:
        sys.exit(code)


def row(name: str, size: int, found: Evaluated, classes: tuple[str, ...]) -> dict:
    """What a stage was measured to be; IoU of absent classes is NaN, for Python's own JSON."""
    timed = not name.startswith(EMULATED)
    return {
        "name": name, "bytes": size, **asdict(found.metrics), "classes": classes, "labels_as_first": found.equal,
        "ms": found.milliseconds() if timed else None,
        "scales": {
            scale: {"miou": metrics_of(results).mean_iou, "ms": found.milliseconds(scale) if timed else None}
            for scale, results in found.results.items()
        },
    }  # fmt: skip


def table(result: dict) -> list[str]:
    """Markdown: metrics, size and time by stage; and mIoU by scale."""
    rows, lines = result["rows"], []
    first, scales = rows[0], list(rows[0]["scales"])
    lines.append("| stage | pixel acc. | mean acc. | mIoU | points | f.w. IoU | labels as PyTorch | MB | ms |")
    lines.append("|---|" + "---|" * 8)
    for each in rows:
        size, ms = f"{each['bytes'] / 1e6:.1f}", f"{each['ms']:.1f}" if each["ms"] else "–"
        same = f"{each['labels_as_first']:.3%}" if each["labels_as_first"] is not None else "–"
        points = round(100 * (each["mean_iou"] - first["mean_iou"]), 2) + 0.0  # no minus zero
        lines.append(
            f"| {each['name']} | {each['pixel_accuracy']:.4f} | {each['mean_accuracy']:.4f} | {each['mean_iou']:.4f} | "
            f"{points:+.2f} | {each['frequency_weighted_iou']:.4f} | {same} | "
            f"{size} | {ms} |"
        )
    lines += ["", f"| mIoU at | {' | '.join(each['name'] for each in rows)} |", "|---|" + "---|" * len(rows)]
    for scale in scales:
        values = [each["scales"][scale]["miou"] for each in rows]
        named = scale if scale == MIXED else f"{scale}×"
        lines.append(f"| {named} | {' | '.join(f'{value:.4f}' for value in values)} |")
    names = [name for name, value in zip(first["classes"], first["class_iou"], strict=True) if not np.isnan(value)]
    lines += ["", f"| IoU | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for each in rows:
        values = [value for value in each["class_iou"] if not np.isnan(value)]
        lines.append(f"| {each['name']} | {' | '.join(f'{value:.3f}' for value in values)} |")
    return lines


def draw(result: dict, out: Path) -> None:
    """mIoU of each stage against the scale of the images; `mixed` apart."""
    plt, rows = pyplot(), result["rows"]
    numbers = sorted((float(scale), scale) for scale in rows[0]["scales"] if scale != MIXED)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for style, each in zip(("-o", "--s", "-.^", "-D", ":v", ":^", "--x", "--+"), rows, strict=False):
        values = [each["scales"][scale]["miou"] for _, scale in numbers]
        axis.plot([number for number, _ in numbers], values, style, label=each["name"], alpha=0.8)
    axis.set_xscale("log", base=2)
    axis.set_xticks([number for number, _ in numbers], [f"{scale}×" for _, scale in numbers])
    axis.set_xlabel("scale of the images")
    axis.set_ylabel("mIoU")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()

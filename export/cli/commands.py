"""export-onnx, build-engine and inspect-model. Heavy modules load when they are used, so that --help is instant."""

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from fcn_deploy.runtime.backends import ORT_TARGETS
from fcn_deploy.runtime.command import Debug, Force, Json, Threads, need, run
from fcn_deploy.runtime.engine_file import EngineFile
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.files import check_writable, refuse_existing


class Exporter(StrEnum):
    auto = "auto"
    torchscript = "torchscript"
    dynamo = "dynamo"


class Backend(StrEnum):
    auto = "auto"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class Fit(StrEnum):
    pad = "pad"
    resize = "resize"


class Activation(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"
    probability = "probability"
    multilabel = "multilabel"
    none = "none"


# Of a model from elsewhere, which carries no card.
Classes = Annotated[str | None, typer.Option(help="Names, comma-separated or one a line in a file.")]
InputMean = Annotated[
    str | None,
    typer.Option(
        "--input-mean", "--mean", help="Of the image times --scale, per channel in the model's order, or one number."
    ),
]
InputStd = Annotated[
    str | None,
    typer.Option("--input-std", "--std", help="As --input-mean: the network sees (image · scale - mean) / std."),
]
Scale = Annotated[float | None, typer.Option(help="By which the image is multiplied first, such as 0.00392157.")]
Bgr = Annotated[bool, typer.Option("--bgr", help="The model was trained on BGR; the engine takes RGB all the same.")]
Output = Annotated[
    str | None,
    typer.Option(help="Of several outputs, the one with the scores: its name; of a module, a key, field or index."),
]
Meaning = Annotated[
    Activation | None,
    typer.Option(
        help="What scores are: softmax (labels by argmax), sigmoid (one logit), probability (one, its sigmoid taken), "
        "multilabel (a mask each), none (values: depth, a matte)."
    ),
]
Threshold = Annotated[
    str | None, typer.Option(help="Probability from which on a pixel is meant; masks: one per class.")
]
CardFile = Annotated[Path | None, typer.Option("--card", help="TOML file of the model card's fields: docs/formats.md.")]


class Method(StrEnum):
    minmax = "minmax"
    percentile = "percentile"
    entropy = "entropy"
    mse = "mse"


def export(
    source: Annotated[
        str,
        typer.Argument(help="A checkpoint, package.module:factory giving a torch.nn.Module, or an ONNX of fixed size."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="ONNX file to write.")],
    weights: Annotated[
        Path | None, typer.Option(help="State dict for a factory's module: .safetensors, or of torch.save.")
    ] = None,
    classes: Classes = None,
    input_mean: InputMean = None,
    input_std: InputStd = None,
    scale: Scale = None,
    bgr: Bgr = False,
    output: Output = None,
    activation: Meaning = None,
    threshold: Threshold = None,
    card: CardFile = None,
    exporter: Annotated[Exporter | None, typer.Option(help="Of PyTorch; auto tries both [default: auto].")] = None,
    opset: Annotated[int | None, typer.Option(min=11, max=23, help="ONNX operator set to write [default: 18].")] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(
            help="What takes multiples only: pad images, or resize them to the nearest [default: pad, but resize where "
            "the network looks at the whole image]."
        ),
    ] = None,
    json_: Json = False,
    force: Force = False,
    debug: Debug = False,
) -> None:
    """Export a network to ONNX that takes every size, and verify it at sizes it was never traced at."""
    if out.suffix.lower() != ".onnx":
        raise MisuseError(f"{out} is not named .onnx; the runtime tells models by that suffix")
    refuse_existing(out, force)
    about = {"mean": input_mean, "std": input_std, "scale": scale, "bgr": bgr, "classes": classes, "output": output}
    about |= {"activation": activation, "threshold": threshold, "card": card, "fit": fit}
    if source.lower().endswith(".onnx"):
        for_torch = {"--exporter": exporter, "--opset": opset, "--weights": weights}
        if wrong := [name for name, value in for_torch.items() if value is not None]:
            raise MisuseError(f"{wrong[0]} is for modules of PyTorch, and {source} is ONNX already; leave it away")
        _export_free(source, out, about, json_)
        return
    need("torch", "export")
    need("onnx", "export")
    need("onnxruntime", "cpu")
    check_writable(out)
    opset = opset or 18
    from fcn_deploy.export.from_torch import export as run_export
    from fcn_deploy.fcn.foreign import load_module

    said = _source_options(**about)
    notes: list[str] = []
    model, own = load_module(source, weights, notes.append)
    made, differences = run_export(
        model,
        own,
        out,
        exporter=(exporter or Exporter.auto).value,
        opset_version=opset,
        name=source,
        options=said,
        note=notes.append,
    )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    worst = max(differences, key=lambda difference: difference.logits)
    if json_:
        record = {
            "model": str(out),
            "card": json.loads(made.to_json()),
            "differences": [{"size": list(d.size), "batch": d.batch, "logits": d.logits} for d in differences],
            "notes": notes,
        }
        print(json.dumps(record))
        return
    print(f"{source} → {out} ({out.stat().st_size / 1e6:.1f} MB, opset {opset})")
    print(f"takes every H, W ≥ 1; {len(made.classes)} classes, stride {made.stride}, {made.channels} channels")
    print("largest difference from PyTorch, as a share of the logits' range, at sizes never traced:")
    for difference in differences:
        size = f"{difference.size[0]}×{difference.size[1]}" + (f" ×{difference.batch}" if difference.batch > 1 else "")
        print(f"  {size:>11}  {difference.logits:.1e}{'  worst' if difference is worst else ''}")


def _export_free(source: str, out: Path, about: dict, json_: bool) -> None:
    """export-onnx of a model that is ONNX already: its sizes are freed."""
    _all_different(model=Path(source), **{"-o": out})
    need("onnx", "export")
    need("onnxruntime", "cpu")
    check_writable(out)
    from fcn_deploy.export.dynamic_shapes.free import export_free

    card, notes = export_free(source, out, _source_options(**about))
    if json_:
        print(json.dumps({"model": str(out), "card": json.loads(card.to_json()), "notes": notes}))
        return
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{source} → {out} ({out.stat().st_size / 1e6:.1f} MB)")
    print(f"takes every H, W ≥ 1; {len(card.classes)} classes, {card.channels} channels")


def inspect(
    model: Annotated[Path, typer.Argument(help="A segmentation ONNX, or an engine.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="What an ONNX is tried for: cpu, or GPUs such as sm89 or sm86,sm120 "
            "[default: cpu, and TensorRT's parser where it is installed]."
        ),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="GB that the largest image may take [default: 1].")
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> int:
    """Tell what a model is, what of it runs where, and whether any size really works, by running it."""
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s", stream=sys.stderr)
    need("onnx", "export")
    need("onnxruntime", "cpu")
    from fcn_deploy.export.build.targets.tensorrt import parse_targets
    from fcn_deploy.export.inspect import inspect_model, show

    targets = ()
    if target is not None:
        targets = (target,) if target == "cpu" or target in ORT_TARGETS else (",".join(parse_targets(target)),)
    about = inspect_model(model, targets, None if memory is None else int(memory * 1e9))
    print(json.dumps(about) if json_ else show(about))
    return 0 if about["ok"] else 1


def _names(classes: str) -> tuple[str, ...]:
    """Names of classes, from the option or the file it names."""
    if "," in classes:
        text = classes.split(",")
    else:
        try:
            text = Path(classes).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MisuseError(f"--classes {classes}: {error}; give names with commas, or a file of them") from error
    return tuple(name.strip() for name in text if name.strip())


def _numbers(option: str, text: str, rule: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError as error:
        raise MisuseError(f"--{option} {text!r}; write numbers with commas, {rule}") from error


def _source_options(
    mean: str | None,
    std: str | None,
    scale: float | None,
    bgr: bool,
    classes: str | None,
    output: str | None,
    activation: Activation | None,
    threshold: str | None,
    card: Path | None,
    fit: Fit | None,
):
    """What the options say of a foreign ONNX."""
    from fcn_deploy.export.importer.card import SourceOptions, read_card_file

    limits = None if threshold is None else _numbers("threshold", threshold, "one, or one per class")
    return SourceOptions(
        mean=None if mean is None else _numbers("input-mean", mean, "one per channel"),
        std=None if std is None else _numbers("input-std", std, "one per channel"),
        scale=scale,
        bgr=bgr,
        classes=None if classes is None else _names(classes),
        output=output,
        activation=None if activation is None else activation.value,
        threshold=limits[0] if limits is not None and len(limits) == 1 else limits,
        card=None if card is None else read_card_file(card),
        fit=fit and fit.value,
    )


def build(
    model: Annotated[Path, typer.Argument(help="A segmentation ONNX, of export-onnx or elsewhere.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Engine to write (with --standalone: an ONNX).")],
    target: Annotated[
        str,
        typer.Option(
            help="`cpu`; GPUs such as sm89 or sm86,sm120; `cuda`: this machine's; "
            "`ort-cuda`, `ort-tensorrt` or `ort-rtx`: ONNX Runtime on a GPU, without a plan."
        ),
    ] = "cpu",
    sizes: Annotated[
        str | None, typer.Option(help="Of the images that will come: a folder, HxW,HxW or min:opt:max.")
    ] = None,
    profiles: Annotated[
        int | None, typer.Option(min=1, help="TensorRT profiles [default: few, as --sizes ask].")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images at once, for GPUs [default: 4].")] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="MiB that TensorRT may take for scratch and activations.")
    ] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="File of TensorRT's timings, reused and kept.")] = None,
    hardware_compatible: Annotated[
        str | None, typer.Option(help="TensorRT, `cuda`: run on other GPUs too: ampere+ or same-compute-capability.")
    ] = None,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="TensorRT, `cuda`: run in its later versions too.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(min=0.001, help="Seconds that TensorRT may build for.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="INT8, calibrated on --calib.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="FP16, for GPUs.")] = False,
    no_fp16: Annotated[
        bool, typer.Option("--no-fp16", help="With --int8 for GPUs: float32 elsewhere, instead of FP16.")
    ] = False,
    calib: Annotated[
        str | None, typer.Option(help="Images to calibrate on, at their own sizes: a folder, glob, list or data set.")
    ] = None,
    calib_count: Annotated[int | None, typer.Option(min=1, help="Calibrate on so many at most [default: 100].")] = None,
    calib_method: Annotated[Method | None, typer.Option(help="How ranges are chosen [default: mse].")] = None,
    ranges: Annotated[Path | None, typer.Option(help="ranges.json to reuse, or to write.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Folder of labels named as the images: the gate measures mIoU.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0, help="Points of mIoU (or agreement) that may be lost [default: 0.5].")
    ] = None,
    fastest: Annotated[
        bool, typer.Option("--fastest", help="For the CPU: try INT8 on --calib, and keep it only where it is faster.")
    ] = False,
    backend: Annotated[
        Backend | None, typer.Option(help="Of CPUs; auto keeps the one that is measured faster here [default: auto].")
    ] = None,
    classes: Classes = None,
    input_mean: InputMean = None,
    input_std: InputStd = None,
    scale: Scale = None,
    bgr: Bgr = False,
    output: Output = None,
    activation: Meaning = None,
    threshold: Threshold = None,
    card: CardFile = None,
    precision_report: Annotated[Path | None, typer.Option(help="CSV that ranks every layer.")] = None,
    report_page: Annotated[
        Path | None, typer.Option("--report", help="Page to write (.html): all that was measured, layers ranked.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample of images.")] = 0,
    fit: Annotated[
        Fit | None,
        typer.Option(
            help="What takes multiples only: pad images, or resize them to the nearest [default: pad, but resize where "
            "the network looks at the whole image]."
        ),
    ] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Write an ONNX for other runtimes: uint8 NHWC in, labels out.")
    ] = False,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Build an engine: cut off the head, optimise the core, compare with the model, measure."""
    from fcn_deploy.calibration.report import page
    from fcn_deploy.calibration.report.engine_report import read_report
    from fcn_deploy.calibration.report.results import Entry

    noted = page.NoteKeeper()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger().addHandler(noted)
    wanted = ".onnx" if standalone else ".engine"
    if out.suffix.lower() != wanted:
        raise MisuseError(f"{out} is not named {wanted}; the runtime tells files by their suffix")
    refuse_existing(out, force)
    if standalone and (int8 or fp16 or target != "cpu"):
        raise MisuseError("--standalone writes a float32 ONNX; leave --int8, --fp16 and --target away")
    if standalone and (fastest or backend is not None):
        raise MisuseError(f"--standalone chooses nothing; leave {'--fastest' if fastest else '--backend'} away")
    if standalone and report_page is not None:
        raise MisuseError("--standalone measures nothing; leave --report away")
    if (fastest or backend is not None) and target != "cpu":
        raise MisuseError(f"{'--fastest' if fastest else '--backend'} is for --target cpu; leave it away")
    if fastest and calib is None:
        raise MisuseError("--fastest tries INT8, which needs real images to calibrate on: pass --calib FOLDER")
    int8 = int8 or fastest
    if no_fp16 and not (int8 and target != "cpu"):
        raise MisuseError("--no-fp16 goes with --int8 for GPUs, where the other layers become FP16")
    if fp16 and no_fp16:
        raise MisuseError("--fp16 and --no-fp16 contradict each other; pass one of them")
    if not (int8 or fp16):
        given = {"--calib": calib, "--calib-count": calib_count, "--labels": labels, "--max-drop": max_drop}
        given |= {"--precision-report": precision_report}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise MisuseError(f"{wrong[0]} is for --int8 and --fp16; pass one of them")
    if not int8 and (ranges is not None or calib_method is not None):
        raise MisuseError(f"{'--ranges' if ranges is not None else '--calib-method'} is for --int8; pass it")
    on_gpu = target != "cpu"
    on_trt = on_gpu and target not in ORT_TARGETS
    for_trt = {"--profiles": profiles, "--batch": batch, "--workspace": workspace, "--timing-cache": timing_cache}
    for_trt |= {"--hardware-compatible": hardware_compatible, "--timeout": timeout}
    for_trt |= {"--version-compatible": version_compatible or None}
    if not on_trt and (wrong := [name for name, value in for_trt.items() if value is not None]):
        raise MisuseError(f"{wrong[0]} is for TensorRT; name GPUs with --target")
    if profiles is not None and sizes is None:
        raise MisuseError("--profiles divides the sizes of --sizes; pass them")
    if precision_report is not None:
        refuse_existing(precision_report, force)
    if labels is not None and not labels.is_dir():
        raise MisuseError(f"{labels} is not a folder; --labels names one with a label of each image's name")
    if report_page is not None:
        page.check_report(report_page, force, "export")
    named = {"-o": out, "--precision-report": precision_report, "--ranges": ranges, "--timing-cache": timing_cache}
    named["--report"] = report_page
    _all_different(model=model, **named)
    need("onnx", "export")
    need("onnxruntime", "cpu")
    for path in named.values():
        if path is not None:
            check_writable(path)
    from fcn_deploy.export.build.autotune import Tuning, backends_of
    from fcn_deploy.export.build.autotune import show as show_candidates
    from fcn_deploy.export.build.engine import ForGpu
    from fcn_deploy.export.build.engine import build_engine as run_build
    from fcn_deploy.export.build.profiles import show_rows
    from fcn_deploy.export.build.targets import tensorrt
    from fcn_deploy.export.importer.standard_form import read_source
    from fcn_deploy.export.quantization.mixed_precision import Options
    from fcn_deploy.runtime.sizes import parse_sizes
    from fcn_deploy.runtime.verify import show_latency

    options = Options(
        int8=int8,
        fp16=fp16 or (int8 and on_gpu and not no_fp16),
        calib=calib,
        labels=labels,
        ranges=ranges,
        seed=seed,
        **{
            name: value
            for name, value in (("count", calib_count), ("method", calib_method), ("max_drop", max_drop))
            if value is not None
        },
    )
    found = None if sizes is None else parse_sizes(sizes)
    gpu = None
    if on_trt:
        gpu = ForGpu(
            tensorrt.BuildOptions(
                tuple(tensorrt.parse_targets(target)),
                None if workspace is None else workspace << 20,
                timing_cache,
                hardware_compatible or "none",
                version_compatible,
                timeout=timeout,
            ),
            found,
            profiles,
            batch or tensorrt.BATCH,
        )
    timed = None if found is None else found.examples()
    name = (backend or Backend.auto).value
    tuning = None if on_gpu or standalone else Tuning(backends_of(name), fastest, threads=name == "auto")
    about = _source_options(input_mean, input_std, scale, bgr, classes, output, activation, threshold, card, fit)
    source = read_source(model, about)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    if standalone:
        from fcn_deploy.export.build.standalone import build_standalone

        build_standalone(source, out, threads)
        if json_:
            print(json.dumps({"standalone": str(out), "notes": source.notes}))
            return
        print(f"{model} → {out}: uint8 [N,H,W,{source.card.channels}] in, labels [N,H,W] out")
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("building") as status:

        def say(line: str) -> None:
            status.update(line)

        rank = report_page is not None
        report = run_build(source, out, threads, target, options, precision_report, say, gpu, timed, tuning, rank)
    if report_page is not None:
        with EngineFile(out) as file:
            manifest = file.manifest
        kind = f"engine for {manifest.target}, {manifest.precision}"
        entry = Entry(out.name, kind, out.stat().st_size, manifest.card, read_report(out))
        page.write(report_page, page.about("build-engine", f"{out.name}, {kind}", notes=noted.lines), [entry])
    if json_:
        print(json.dumps({"engine": str(out)} | report))
        return
    agreement = report["agreement"]
    print(f"{model} → {out} ({out.stat().st_size / 1e6:.1f} MB) for {report['target']}, {report['precision']}")
    head = "in the network" if report["head"] == "none" else "exact, outside the network"
    least = f", at least {report['smallest']}" if report["smallest"] > 1 else ""
    print(
        f"head: {head}; scores at stride {report['stride']}, sizes padded to multiples of {report['size_multiple']}"
        f"{least}"
    )
    print(_tiles(report["stages"]))
    print(_agreement(agreement, report["precision"]))
    if accuracy := report.get("accuracy"):
        print(_accuracy(accuracy, report))
    if builder := report.get("builder"):
        seconds, library = builder["seconds"], f"{builder['module']} {builder['version']}"
        print(f"plan for {', '.join(builder['targets'])} by {library} in {seconds:.1f} s; its profiles:")
        print(show_rows(builder["profiles"]))
        for note in builder["notes"]:
            print(f"note: {note}", file=sys.stderr)
    if report["latency_ms"] is None:
        print(f"latency: not measured ({report['latency_reason']})")
        return
    if "speedup" in report:
        print(_speed(report))
    print("latency on this machine (median):")
    print(show_latency(report["latency_ms"]))
    if len(report.get("candidates", ())) > 1:
        print(f"run by {report['backend']}; measured side by side (×: best time of a call over its best):")
        print(show_candidates(report["candidates"]))


def _agreement(agreement: dict, precision: str) -> str:
    """How far the float32 core's labels, masks or values are the model's own."""
    whose = agreement["kind"] if precision == "float32" else f"float32 {agreement['kind']}"
    where = f"the model's at {len(agreement['sizes'])} sizes"
    if "difference" in agreement:
        return f"{whose} differ from {where} by {agreement['difference']:.1e} of their range at most"
    rest = "" if agreement["labels_equal"] == 1 else "; the others are within rounding of a tie"
    return f"{whose} equal to {where}: {agreement['labels_equal']:.4%} of {agreement['pixels']:,} pixels{rest}"


def _tiles(stages: list[dict]) -> str:
    """How images beyond the memory budget are run."""
    if len(stages) == 1 and stages[0]["halo"] is None:
        return f"it cannot be run in tiles ({stages[0]['tiles'].removeprefix('none: ')})"
    halos = " and ".join(
        f"{max(stage['halo'])} pixels" if stage["halo"] is not None else f"whole ({stage['tiles'][6:]})"
        for stage in stages
    )
    count = f"{len(stages)} stages, halos" if len(stages) > 1 else "one stage, halo"
    return f"images beyond the memory budget are run in tiles, exactly: {count} {halos}"


def _all_different(**paths: Path | None) -> None:
    """Raise MisuseError where two of these options name the same file."""
    seen: dict[Path, str] = {}
    for name, path in paths.items():
        if path is None:
            continue
        if (other := seen.setdefault(path.resolve(), name)) != name:
            whose = "the model itself" if other == "model" else f"also {other}"
            raise MisuseError(f"{path} is {whose}; choose another {name}")


def _accuracy(accuracy: dict, report: dict) -> str:
    """What precision cost, in a few lines."""
    precision = "int8" if "int8" in accuracy else "float16"
    saw = "did not see" if accuracy["judged_unseen"] else "SAW TOO, as there were no others"
    before, after = report["core_bytes"]["float32"], report["core_bytes"][precision]
    lines = [
        f"{precision}: {accuracy['metric']} {accuracy[precision]:.4f} against {accuracy['float32']:.4f} of float32 on "
        f"{_count(accuracy['images_judged'], 'image')} calibration {saw} ({accuracy['drop_points']:.2f} points lost, "
        f"{accuracy['max_drop']} allowed)",
        f"calibrated on {_count(accuracy['calibration_images'], 'image')}; {before / 1e6:.1f} → {after / 1e6:.1f} MB; "
        f"{len(accuracy['kept'])} of {accuracy['layers']} layers kept higher",
    ]
    lines += [f"  kept: {name} ({reason})" for name, reason in accuracy["kept"].items()]
    if skipped := accuracy.get("skipped"):
        lines.append(f"{_count(len(skipped), 'image')} could not be read, skipped")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _speed(report: dict) -> str:
    speedup = report["speedup"]
    if speedup is None:
        return "speed against float32: not measured"
    if speedup < 1:
        kept = "float32 is kept" if report["precision"] == "float32" else "--fastest would keep float32"
        return f"int8 is SLOWER here: {1 / speedup:.2f} times the time of float32 (mean over the sizes); {kept}"
    return f"int8 is {speedup:.2f} times faster than float32 here (mean over the sizes)"


def export_onnx() -> None:
    run(export, "export-onnx")


def build_engine() -> None:
    run(build, "build-engine")


def inspect_model() -> None:
    run(inspect, "inspect-model")

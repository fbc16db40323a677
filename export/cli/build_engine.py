"""build-engine: from a segmentation ONNX to one fast file for one kind of target."""

import logging
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from fcn_deploy.export.cli.model_options import RENAMED, ModelOptions, check_files_differ, check_model
from fcn_deploy.fcn.cli.options import MaskColors, MaskValues
from fcn_deploy.runtime.command import (
    Force,
    Json,
    NoData,
    Strict,
    Threads,
    log_to_stderr,
    parse_memory,
    print_note,
    print_record,
    run,
)
from fcn_deploy.runtime.errors import MisuseError
from fcn_deploy.runtime.extras import need
from fcn_deploy.runtime.files import check_writable, refuse_existing

if TYPE_CHECKING:
    from fcn_deploy.calibration.report.engine_report import EngineReport
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.importer.import_model import ImportedModel
    from fcn_deploy.export.quantization.options import QuantizationOptions
    from fcn_deploy.runtime.sizes import Sizes

CPU = "cpu"


class Backend(StrEnum):
    auto = "auto"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class Method(StrEnum):
    minmax = "minmax"
    percentile = "percentile"
    entropy = "entropy"
    mse = "mse"


@dataclass(frozen=True)
class TargetOptions:
    """What the engine is for, and how TensorRT and the CPU's libraries are used."""

    target: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="`cpu`; GPUs such as rtx4090 or sm86,sm120; `cuda`: the GPU of this machine; "
            "`ort-cuda`, `ort-tensorrt` or `ort-rtx`: ONNX Runtime on a GPU, without a plan.",
        ),
    ] = CPU
    sizes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZES",
            help="Sizes of the images that will come: a folder, glob or list of images, HxW,HxW or min:opt:max.",
        ),
    ] = None
    profiles: Annotated[
        int | None, typer.Option(min=1, help="Number of TensorRT profiles [default: few, as --sizes ask].")
    ] = None
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Most images that TensorRT runs at once [default: 4; small images: 8].")
    ] = None
    workspace: Annotated[
        int | None,
        typer.Option(
            parser=parse_memory,
            metavar="GB",
            help="Memory that TensorRT may take for scratch and activations, such as 2GB or 600MB.",
        ),
    ] = None
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of TensorRT's timings, which is reused and kept.")
    ] = None
    hardware_compatible: Annotated[
        str | None,
        typer.Option(
            metavar="LEVEL",
            help="With TensorRT and --target cuda: run on other GPUs too: ampere+ or same-compute-capability.",
        ),
    ] = None
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="With TensorRT and --target cuda: run in later versions too.")
    ] = False
    platform: Annotated[
        str | None,
        typer.Option(
            metavar="SYSTEM",
            help="With TensorRT and --target cuda on Linux: `windows`, for a plan that runs there instead.",
        ),
    ] = None
    timeout: Annotated[
        float | None, typer.Option(min=0.001, metavar="SECONDS", help="Time that TensorRT may build for.")
    ] = None
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="Library that runs the engine on CPUs; auto keeps the one that is measured faster here "
            "[default: auto]."
        ),
    ] = None
    stages: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Parts that the network is cut into on CPUs, at most; ONNX Runtime runs images that memory does not "
            "hold in more [default: 2].",
        ),
    ] = None


@dataclass(frozen=True)
class PrecisionOptions:
    """INT8, FP8, FP16 and BF16, and what they may cost."""

    int8: Annotated[bool, typer.Option("--int8", help="Use INT8, calibrated on --calib.")] = False
    fp8: Annotated[
        bool,
        typer.Option("--fp8", help="Use FP8 (E4M3) for convolutions, on GPUs from sm89 on; calibrated on --calib."),
    ] = False
    fp16: Annotated[bool, typer.Option("--fp16", help="Use FP16, on GPUs.")] = False
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16",
            help="Use BF16: on GPUs from sm80 on, for networks that overflow in FP16; on CPUs that have it.",
        ),
    ] = False
    no_fp16: Annotated[
        bool,
        typer.Option("--no-fp16", help="With --int8 or --fp8 on GPUs: keep the other layers float32 instead of FP16."),
    ] = False
    fastest: Annotated[
        bool,
        typer.Option(
            "--fastest",
            help="On the CPU: try INT8 on --calib, and keep it only where it is faster. For GPUs: build FP16, INT8, "
            "FP8 and float32 plans, and keep the best that loses no more than is allowed.",
        ),
    ] = False
    calib: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Images to calibrate on, at their own sizes: a folder, glob, list or data set "
            "[default: with --fp16 or --bf16 the images of --sizes].",
        ),
    ] = None
    nodata: NoData = None
    strict: Strict = False
    calib_count: Annotated[
        int | None, typer.Option(min=1, help="Number of images to calibrate on, at most [default: 100].")
    ] = None
    calib_method: Annotated[
        Method | None, typer.Option(help="How the ranges of activations are chosen [default: mse].")
    ] = None
    ranges: Annotated[
        Path | None, typer.Option(metavar="FILE", help="ranges.json to reuse, or to write where there is none.")
    ] = None
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Labels named as the images of --calib, by which the gate measures mIoU."),
    ] = None
    mask_values: MaskValues = None
    mask_colors: MaskColors = None
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, metavar="POINTS", help="Points of mIoU (or agreement) that may be lost [default: 0.5]."),
    ] = None
    max_class_drop: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="POINTS",
            help="Points of IoU that each class may lose [default: 2, or --max-drop where that is more].",
        ),
    ] = None
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample of images that is calibrated on.")] = 0


@dataclass(frozen=True)
class ReportOptions:
    """What is written beside the engine."""

    precision_report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV to write that ranks every layer by its cost in accuracy.")
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Page to write (.html): all that was measured, and the layers ranked."),
    ] = None


def build_engine(
    model: Annotated[
        Path, typer.Argument(help="A segmentation ONNX, of export-onnx or from elsewhere.", metavar="MODEL")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="Engine to write (with --standalone: an ONNX).")
    ],
    target: TargetOptions,
    precision: PrecisionOptions,
    source: ModelOptions,
    reports: ReportOptions,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="Write an ONNX for other runtimes: uint8 NHWC in, labels out.")
    ] = False,
    json_: Json = False,
    force: Force = False,
    threads: Threads = None,
) -> None:
    """Build an engine: cut off the upsampling, optimise the core, compare it with the model, and measure."""
    from fcn_deploy.calibration.report.page import NoteKeeper

    noted = NoteKeeper()
    log_to_stderr()
    logging.getLogger().addHandler(noted)
    target = _spelled(target)
    wanted = ".onnx" if standalone else ".engine"
    if out.suffix.lower() != wanted:
        raise MisuseError(f"{out} is not named {wanted}; the runtime tells files by their suffix")
    check_model(model)
    refuse_existing(out, force)
    if standalone:
        _check_standalone(target, precision, reports)
    config = _config(target, precision, reports, threads, tuned=not standalone)
    _check_outputs(model, out, config, reports, force)
    need("onnx", "export")
    need("onnxruntime", "cpu")
    from fcn_deploy.export.importer.import_model import import_model

    said = source.said()
    if standalone and said.further:
        raise MisuseError("--standalone writes an ONNX of one output; name one with --output")
    imported = import_model(model, said)
    for note in imported.notes:
        print_note(note)
    if standalone:
        _write_standalone(imported, model, out, threads, json_)
        return
    report = _build(imported, out, config)
    if reports.report is not None:
        _write_page(reports.report, out, report, noted.lines)
    if json_:
        from fcn_deploy.export.cli.records import with_sizes

        print_record("build", {"file": str(out), **with_sizes(report.as_dict())})
    else:
        from fcn_deploy.export.cli.build_summary import show_build

        show_build(model, out, report)


def _spelled(options: TargetOptions) -> TargetOptions:
    """The options with a target that is no list of GPUs as it is written here: `CPU` is `cpu`."""
    from fcn_deploy.export.build.gpus import ALONE, capability

    named = capability(options.target)
    return replace(options, target=named) if named in ALONE else options


def _check_standalone(target: TargetOptions, precision: PrecisionOptions, reports: ReportOptions) -> None:
    """Refuse what --standalone does not do."""
    if precision.int8 or precision.fp8 or precision.fp16 or precision.bf16 or target.target != CPU:
        raise MisuseError("--standalone writes a float32 ONNX; omit --int8, --fp8, --fp16, --bf16 and --target")
    chosen = {"--fastest": precision.fastest, "--backend": target.backend, "--stages": target.stages}
    if given := [option for option, value in chosen.items() if value]:
        raise MisuseError(f"--standalone chooses nothing; omit {given[0]}")
    if reports.report is not None:
        raise MisuseError("--standalone measures nothing; omit --report")


def _config(
    target: TargetOptions, precision: PrecisionOptions, reports: ReportOptions, threads: int | None, tuned: bool
) -> "BuildConfig":
    """The options as the builder takes them; `tuned`: it may choose among the CPU's libraries.

    Raises MisuseError where they contradict each other.
    """
    from fcn_deploy.export.build.config import DEFAULT_STAGES, BuildConfig, TensorRTOptions, TuningOptions, backends_of
    from fcn_deploy.runtime.sizes import parse_sizes

    sizes = None if target.sizes is None else parse_sizes(target.sizes)
    tuning = None
    if (tuned and target.target == CPU) or target.backend is not None or target.stages is not None:
        name = (target.backend or Backend.auto).value
        tuning = TuningOptions(backends_of(name), name == "auto", stages=target.stages or DEFAULT_STAGES)
    return BuildConfig(
        target=target.target,
        quantization=_quantization(target, precision, sizes),
        sizes=sizes,
        tuning=tuning,
        tensorrt=TensorRTOptions(
            workspace=target.workspace,
            timing_cache=target.timing_cache,
            hardware=target.hardware_compatible or "none",
            version_compatible=target.version_compatible,
            platform=target.platform,
            timeout=target.timeout,
        ),
        profiles=target.profiles,
        batch=target.max_batch,
        threads=threads,
        precision_report=reports.precision_report,
        rank_layers=reports.report is not None,
    )


def _quantization(target: TargetOptions, precision: PrecisionOptions, sizes: "Sizes | None") -> "QuantizationOptions":
    """The precisions that are asked for, and what they may cost. Raises MisuseError where options contradict others."""
    from fcn_deploy.calibration.mask_options import MaskOptions
    from fcn_deploy.export.quantization.options import GOLDEN_ALONE, QuantizationOptions
    from fcn_deploy.runtime.images.numbers import ReadOptions

    on_cpu = target.target == CPU
    int8 = precision.int8 or precision.fastest
    quantized = int8 or precision.fp8
    if precision.fastest and not on_cpu:
        _check_fastest(precision)
    if precision.no_fp16 and not (quantized and not on_cpu):
        raise MisuseError("--no-fp16 goes with --int8 or --fp8 for GPUs, where the other layers become FP16")
    for option, passed in (("--nodata", precision.nodata is not None), ("--strict", precision.strict)):
        if passed and precision.calib is None:
            raise MisuseError(f"{option} is of the files of --calib; pass it")
    if precision.no_fp16 and (precision.fp16 or precision.bf16):
        other = "fp16" if precision.fp16 else "bf16"
        raise MisuseError(f"--{other} and --no-fp16 contradict each other; pass one of them")
    calib = precision.calib
    if (precision.fp16 or precision.bf16) and not quantized and calib is None and sizes is not None:
        calib = target.sizes if sizes.files else GOLDEN_ALONE  # its photographs, where it names some
    options: dict[str, Any] = {
        "count": precision.calib_count,
        "method": precision.calib_method,
        "max_drop": precision.max_drop,
        "max_class_drop": precision.max_class_drop,
    }
    return QuantizationOptions(
        int8=int8,
        fp8=precision.fp8,
        fp16=precision.fp16 or (quantized and not on_cpu and not precision.no_fp16 and not precision.bf16),
        bf16=precision.bf16,
        fastest=precision.fastest,
        calib=calib,
        reading=ReadOptions(no_data=precision.nodata, strict=precision.strict),
        labels=precision.labels,
        masks=MaskOptions(precision.mask_values, precision.mask_colors),
        ranges=precision.ranges,
        seed=precision.seed,
        **{name: value for name, value in options.items() if value is not None},
    )


def _check_fastest(precision: PrecisionOptions) -> None:
    """Refuse a precision beside --fastest, which tries all that a GPU has."""
    passed = [name for name in ("int8", "fp8", "fp16", "bf16", "no_fp16") if getattr(precision, name)]
    if passed:
        named = passed[0].replace("_", "-")
        raise MisuseError(f"--fastest tries every precision of the GPU; omit --{named}, or --fastest")


def _check_outputs(model: Path, out: Path, config: "BuildConfig", reports: ReportOptions, force: bool) -> None:
    """Refuse files that would be lost, before any work."""
    from fcn_deploy.calibration.report.page import check_report

    if reports.precision_report is not None:
        refuse_existing(reports.precision_report, force)
    if reports.report is not None:
        check_report(reports.report, force, "export")
    written: dict[str, Path | None] = {"-o": out, **config.files, "--report": reports.report}
    check_files_differ(model, written)
    for path in written.values():
        if path is not None:
            check_writable(path)


def _write_standalone(imported: "ImportedModel", model: Path, out: Path, threads: int | None, json_: bool) -> None:
    from fcn_deploy.export.build.standalone import build_standalone

    build_standalone(imported, out, threads)
    if json_:
        print_record("standalone", {"file": str(out), "notes": list(imported.notes)})
    else:
        print(f"{model} → {out}: uint8 [N,H,W,{imported.card.channels}] in, labels [N,H,W] out")


def _build(imported: "ImportedModel", out: Path, config: "BuildConfig") -> "EngineReport":
    """Build, with a line that says what is being done."""
    from fcn_deploy.export.build import engine
    from rich.console import Console

    with Console(stderr=True).status("building") as status:
        return engine.build_engine(imported, out, config, lambda line: status.update(line))


def _write_page(path: Path, out: Path, report: "EngineReport", notes: list[str]) -> None:
    from fcn_deploy.calibration.report import page
    from fcn_deploy.calibration.report.results import Entry
    from fcn_deploy.runtime.engine_format.engine_file import EngineFile

    with EngineFile(out) as file:
        manifest = file.manifest
    kind = f"engine for {manifest.target}, {manifest.precision}"
    entry = Entry(out.name, kind, out.stat().st_size, manifest.card, report)
    page.write(path, page.about("build-engine", f"{out.name}, {kind}", notes=notes), [entry])


def main() -> None:
    run(build_engine, "build-engine", RENAMED | {"--batch": "--max-batch"})

"""build-engine: from a segmentation ONNX to an engine file, measured on the machine that builds it."""

import io
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fcn_deploy.export.build.autotune import TILES, Candidate, Tuning, choose, fastest_tile, rows, tune
from fcn_deploy.export.build.parity import compare
from fcn_deploy.export.build.partition import Part, cut_core
from fcn_deploy.export.build.profiles import default_profiles, plan_profiles, table
from fcn_deploy.export.build.targets import cpu, tensorrt
from fcn_deploy.export.build.targets.kernels import compile_kernels
from fcn_deploy.export.graph.edit import check
from fcn_deploy.export.importer.standard_form import Source
from fcn_deploy.export.passes.bilinear_deconv import bilinear_deconv
from fcn_deploy.export.passes.fold_constants import fold_constants
from fcn_deploy.export.passes.fuse_padding import fuse_padding
from fcn_deploy.export.passes.raw_input import raw_input
from fcn_deploy.export.passes.split_head import WithoutUpsampling, split_head
from fcn_deploy.export.quantization.mixed_precision import BudgetError, Options, Result, lower, write_layers
from fcn_deploy.export.tolerances import GOLDEN_SAMPLE
from fcn_deploy.runtime.backends import ORT_TARGETS
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.engine_file import write_engine
from fcn_deploy.runtime.errors import DeployError, MisuseError
from fcn_deploy.runtime.manifest import GpuPlan, Manifest, Profile, Stage
from fcn_deploy.runtime.model_card import ModelCard
from fcn_deploy.runtime.prepare import Border, padded_size, prepare
from fcn_deploy.runtime.segmenter import Segmenter, adds_up_to_one
from fcn_deploy.runtime.sizes import Sizes
from fcn_deploy.runtime.verify import GOLDEN, TIMED_SIZES, golden_difference, latency, natural_noise, timed_sizes
from onnx import ModelProto

log = logging.getLogger(__name__)

REPORT = "report.json"
FIXED_SIZES = 3  # so many at most in --sizes are those of cameras, say, and come again and again
GOLDEN_SIZE = (61, 83)
STRIP_CELLS = 6  # at the coarsest stride: as many as make kernels of INT8 convolutions take their path for strips
TILED_SIZE = (1536, 1536)  # of the image that tiles are tried on


@dataclass(frozen=True)
class ForGpu:
    """How an engine for GPUs is built.

    Attributes:
        options: of TensorRT; its `workspace` also bounds the profiles' activation memory.
        sizes: of the images that will come; None: one profile for everything up to 2176×3840.
        profiles: how many at most; None: as many as are worth it.
        batch: most images at once.
    """

    options: tensorrt.BuildOptions
    sizes: Sizes | None = None
    profiles: int | None = None
    batch: int = tensorrt.BATCH


def build_engine(
    source: Source,
    out: str | os.PathLike,
    threads: int | None = None,
    target: str = "cpu",
    options: Options | None = None,
    layers_to: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
    gpu: ForGpu | None = None,
    timed: Sequence[tuple[int, int]] | None = None,
    tuning: Tuning | None = None,
    rank: bool = False,
) -> dict[str, Any]:
    """Build an engine and return its report, which is in the file too.

    Args:
        source: the model.
        out: the .engine file, replaced in one step.
        threads: of the measurements.
        target: `cpu`; GPUs as `sm86,sm89`; `cuda`, the GPU of this machine; or a provider of ONNX Runtime: a key of
            ORT_TARGETS.
        options: precision; None: float32.
        layers_to: CSV file for the precision report, which ranks every layer.
        say: called with a line when a phase begins.
        gpu: how, for GPUs; None: as its defaults say. Its options' targets are those of `target`.
        timed: (height, width) of the latencies in the report; None: see runtime.verify.timed_sizes.
        tuning: what to choose among for a CPU; None: ONNX Runtime, in the precision of `options`.
        rank: measure what each layer costs in low precision, for the report; with `layers_to` it is done anyway.

    Raises:
        MisuseError: options that contradict each other, or an unknown target.
        DeployError: the model cannot be run, the engine's labels are not the model's, the accuracy budget
            cannot be held, or TensorRT cannot build.
    """
    options, tuning = options or Options(), tuning or Tuning()
    on_ort = target in ORT_TARGETS
    targets = None if target == "cpu" or on_ort else tensorrt.parse_targets(target)
    if targets and gpu is None:
        gpu = ForGpu(tensorrt.BuildOptions(tuple(targets)))
    if options.fp16 and target == "cpu":
        raise MisuseError(
            "--fp16 is refused for the CPU: ONNX Runtime runs FP16 there in float32 with casts around it, slower and "
            "no smaller in memory; use --int8, or name a GPU with --target"
        )
    cut, card = core_of(source)
    core, head = cut.model, cut.upsampling
    if card.activation == "softmax" and not head.activated:
        head = replace(head, activated=_adds_up(core, card))
    plain = cpu.build(core)
    # GPUs have memory of their own, and a plan is one network.
    parts = cut_core(onnx.load_from_string(plain), card, cut=target == "cpu")
    card = replace(card, whole=next((part.stage.whole for part in parts if part.stage.halo is None), card.whole))
    manifest = Manifest(
        card=card,
        target="cpu",
        precision="float32",
        head=head,
        stages=tuple(part.stage for part in parts),
        created_by=f"fcn-deploy {version('fcn-deploy')}",
    )
    report: dict[str, Any] = {
        "target": target,
        "precision": options.precision,
        "head": head.mode,
        "stride": card.stride,
        "size_multiple": card.size_multiple,
        "smallest": card.smallest,
        "fit": source.fit or "none",
        "stages": _stages(manifest.stages),
        "miou": None,
        "miou_reason": "no labels were given",
        "threads": threads or "one per core",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "notes": list(source.notes),
    }
    say("comparing the float32 core with the model")
    # What is measured is a file, opened as a user opens it.
    members = _members(parts) | {GOLDEN: golden_sample([core], card, "float32")}
    with _draft(manifest, members, threads) as net:
        report["agreement"] = compare(source, net)
    drafts = {"float32": (manifest, members)}
    lowered, reference, result = onnx.load_from_string(plain), core, None
    if options.precision != "float32":
        options = replace(options, half_interface=targets is not None)
        kind, ranked = "cpu" if target == "cpu" else "tensorrt", layers_to is not None
        try:
            result = lower(lowered, head, card, kind, options, rank=ranked or rank, say=say)
        except BudgetError as error:
            if ranked:
                write_layers(layers_to, error.layers)
            if not tuning.fastest:
                raise DeployError(f"{error}; {layers_to} ranks the layers" if ranked else str(error)) from error
            report["notes"].append(f"float32 is kept: {error}")
            options = replace(options, int8=False)
    if result is not None:
        lowered, reference = result.core, result.reference
        report["accuracy"] = result.report
        if any(layer.sensitivity is not None for layer in result.layers):
            report["layers"] = [asdict(layer) for layer in result.layers]
        if result.report["metric"] == "mIoU":
            report["miou"], report["miou_reason"] = result.report[options.precision], None
    check(lowered, "the lowered network")
    manifest = replace(manifest, target=target, precision=options.precision)
    if targets:
        manifest, members, about = _plan(lowered, manifest, gpu, say)
        report |= about
    if target != "cpu":
        golden = golden_sample([reference], card, options.precision, manifest.gpu)
        members = ({"stage-0.onnx": lowered.SerializeToString()} if on_ort else members) | {GOLDEN: golden}
        report |= _measure_on_gpu(manifest, members, say, timed)
    else:
        if result is not None:
            parts = cut_core(lowered, card)
            if (changed := on_pixels(parts, onnx.load_from_string(plain), card, result.image_mean)) is not None:
                draft = replace(manifest, stages=tuple(part.stage for part in changed))
                with _draft(draft, _members(changed), threads) as net:
                    value = result.judge.measure_run(net.scores)
                if (drop := result.judge.drop(value)) <= options.max_drop:
                    parts = changed
                    result.report.update(int8=value, drop_points=round(drop, 4))
            manifest = replace(manifest, stages=tuple(part.stage for part in parts))
            golden = golden_sample([part.model for part in parts], card, "int8", border=parts[0].stage.border)
            drafts["int8"] = (manifest, _members(parts) | {GOLDEN: golden})
        manifest, members, about = _tuned(source, drafts, result, options.max_drop, tuning, threads, timed, say)
        report |= about | {"stages": _stages(manifest.stages)}
    lowest = members if result is None or target != "cpu" else drafts["int8"][1]
    core_bytes = sum(len(content) for name, content in lowest.items() if name.startswith("stage-"))
    report["core_bytes"] = {"float32": len(plain), options.precision: core_bytes}
    members[REPORT] = json.dumps(report, indent=1).encode()
    write_engine(out, manifest, members)
    if layers_to is not None and result is not None:
        write_layers(layers_to, result.layers)
    return report


def on_pixels(
    parts: Sequence[Part], core: ModelProto, card: ModelCard, mean: np.ndarray | None
) -> tuple[Part, ...] | None:
    """The parts of an INT8 core, the first of which takes the image as it is; None where that cannot be."""
    raw = raw_input(parts[0].model, core, card, mean)
    if raw.border is None:
        return None
    return (Part(replace(parts[0].stage, border=raw.border), raw.model), *parts[1:])


def _members(parts: Sequence[Part]) -> dict[str, bytes]:
    return {part.stage.file: part.model.SerializeToString() for part in parts}


def _stages(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What the report says of each stage."""
    return [
        {
            "halo": stage.halo,
            "tile": stage.tile,
            "tiles": "exact" if stage.halo is not None else f"none: {stage.whole}",
            "bytes_per_pixel": round(stage.bytes_per_pixel, 1),
            "output_bytes": round(stage.output_bytes, 2),
            "work": round(stage.cost / sum(other.cost for other in stages), 3),
        }
        for stage in stages
    ]


def _plan(
    core: ModelProto, manifest: Manifest, gpu: ForGpu, say: Callable[[str], None]
) -> tuple[Manifest, dict[str, bytes], dict[str, Any]]:
    """A TensorRT plan with our kernels: the manifest that names them, the members, and the report's part."""
    options, card = gpu.options, manifest.card
    if gpu.sizes is None:
        profiles = default_profiles(card, gpu.batch)
    else:
        cost = None
        if options.workspace is not None and not gpu.sizes.ranges:
            say("asking TensorRT for activation memory")
            cost = tensorrt.activation_cost(core, options, card, say)
        known = {} if cost is None else {"cost": cost, "budget": options.workspace}
        profiles = plan_profiles(gpu.sizes, card, gpu.profiles, batch=gpu.batch, **known)
    say(f"building for {', '.join(options.targets)} with TensorRT")
    built = tensorrt.build(core, options, profiles, say)
    say("compiling the kernels")
    kernels = compile_kernels(built.targets)
    plan = GpuPlan(
        built.module,
        built.version,
        built.targets,
        tuple(
            Profile(profile.min, profile.opt, profile.max, profile.batch, size)
            for profile, size in zip(profiles, built.activation_bytes, strict=True)
        ),
        portable=options.hardware != "none",
        version_compatible=options.version_compatible,
    )
    manifest = replace(manifest, stages=(replace(manifest.stages[0], file="stage-0.plan"),), gpu=plan)
    skipped = gpu.sizes.skipped if gpu.sizes else {}
    about = {
        "builder": {
            "module": built.module,
            "version": built.version,
            "targets": built.targets,
            "seconds": built.seconds,
            "profiles": table(profiles, built.activation_bytes),
            "notes": [*built.notes, *(f"skipped: {reason}" for reason in skipped.values())],
        },
    }
    return manifest, {"stage-0.plan": built.plan, **kernels}, about


@contextmanager
def _draft(manifest: Manifest, members: dict[str, bytes], threads: int | None = None) -> Iterator[Segmenter]:
    """An engine of these members, opened as a user opens it, and deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draft.engine"
        write_engine(path, manifest, members)
        with Segmenter(path, threads=threads) as net:
            yield net


def _measure_on_gpu(manifest: Manifest, members: dict[str, bytes], say, timed) -> dict[str, Any]:
    """Latency on this machine's GPU, or why there is none."""
    try:
        with _draft(manifest, members) as net:
            say(f"timing {manifest.precision}")
            return {"latency_ms": latency(net, timed or timed_sizes(manifest))}
    except DeployError as error:
        log.info("not measured: %s", error)
        return {"latency_ms": None, "latency_reason": "no GPU here runs it: run verify-engine on the GPU's machine"}


def _tuned(
    source: Source,
    drafts: dict[str, tuple[Manifest, dict[str, bytes]]],
    lowered: Result | None,
    max_drop: float,
    tuning: Tuning,
    threads: int | None,
    timed: Sequence[tuple[int, int]] | None,
    say,
) -> tuple[Manifest, dict[str, bytes], dict[str, Any]]:
    """The fastest way to run this network here whose labels hold: manifest, members, and the report's part.

    Args:
        drafts: precision → an engine of it, whose labels on ONNX Runtime have been judged already.
        lowered: of the INT8 draft.
        max_drop: points that INT8 may lose.
    """

    accuracy = {} if lowered is None else {"onnxruntime": lowered.report["int8"]}

    card, tiles = drafts["float32"][0].card, {}
    largest = max(timed or [TILED_SIZE], key=math.prod)
    if "onnxruntime" in tuning.backends and max(largest) > min(TILES):
        say("trying tiles that fit the caches")
        for precision, draft in drafts.items():
            with _draft(*draft, threads) as net:
                tiles[precision] = fastest_tile(net, natural_noise(*largest, card, 0), tuning.seconds / 2)

    def as_run_by(candidate: Candidate) -> Manifest:
        first, *others = drafts[candidate.precision][0].stages
        # OpenVINO prepares kernels anew for each shape, and tiles have several.
        tile = tiles.get(candidate.precision) if candidate.backend == "onnxruntime" else None
        stages = (replace(first, tile=tile), *others)
        return replace(drafts[candidate.precision][0], backend=candidate.backend, stages=stages)

    def open_(candidate: Candidate):
        return _draft(as_run_by(candidate), drafts[candidate.precision][1], candidate.threads)

    def check(candidate: Candidate, net: Segmenter) -> str:
        if candidate.backend == "onnxruntime":
            return ""
        say(f"checking the labels of {candidate.backend}, {candidate.precision}")
        if candidate.precision == "float32":
            compare(source, net)
            return ""
        # As served, by its own kernels: others round otherwise.
        judge = lowered.judge
        value = accuracy[candidate.backend] = judge.measure_run(net.scores)
        if not judge.drop(value) <= max_drop:
            return f"{judge.drop(value):.2f} points of {judge.metric} lost by its kernels, {max_drop} allowed"
        # Otherwise verify-engine would reject, on this very machine, what was built here.
        golden = golden_difference(net, drafts["int8"][1][GOLDEN])
        if not golden.passed:
            return f"its scores of the golden sample differ by {golden.difference:.1%} of their range"
        return _errs_on_strips(net, drafts["int8"][1])

    precisions = list(reversed(drafts))
    # float32 by the other libraries is compared with where it may be kept.
    candidates = [
        Candidate(backend, precision, threads)
        for precision in precisions
        for backend in (tuning.backends if precision == precisions[0] or tuning.fastest else tuning.backends[:1])
    ]
    images = {f"{height}x{width}": natural_noise(height, width, card, 0) for height, width in timed or TIMED_SIZES}
    # Few sizes that were named stay; others change from image to image.
    tuning = replace(tuning, step=0 if timed and len(timed) <= FIXED_SIZES else card.size_multiple)
    timings, chosen = tune(
        open_, check, candidates, images, tuning, lambda c: tuning.fastest or c.precision == precisions[0], say
    )
    manifest, members = as_run_by(chosen), drafts[chosen.precision][1]
    about: dict[str, Any] = {
        "precision": chosen.precision,
        "backend": chosen.backend,
        "candidates": rows(timings, chosen),
        "latency_ms": timings[chosen].milliseconds,
    }
    if lowered is not None:
        # Fewer threads are for information.
        held = {c.precision for c, timing in timings.items() if c.threads == threads and not timing.refused}
        best = {p: choose(timings, lambda c, p=p: c.precision == p and c.threads == threads) for p in held}
        about["accuracy"] = lowered.report | {"by_backend": accuracy}
        about["speedup"] = None
        if "float32" in best:
            about["float32_latency_ms"] = timings[best["float32"]].milliseconds
        if len(best) == 2:
            speedup = timings[best["float32"]].against / timings[best["int8"]].against
            about["speedup"] = round(speedup, 3) if speedup == speedup else None
        if "int8" in best:
            value = accuracy[best["int8"].backend]
            about["accuracy"] |= {"int8": value, "drop_points": round(lowered.judge.drop(value), 4)}
        if lowered.judge.metric == "mIoU":
            about["miou"] = about["accuracy"][chosen.precision]
    return manifest, members, about


def _errs_on_strips(net: Segmenter, members: dict[str, bytes]) -> str:
    """Why an INT8 engine's scores of strips, whose maps are one cell wide or high, may not be used; "" where they may.

    Kernels have paths of their own for such maps, and some are wrong: see `runtime.backends.openvino.NarrowMaps`.
    """
    networks = [onnx.load_from_string(members[stage.file]) for stage in net.manifest.stages]
    length = STRIP_CELLS * max(net.card.size_multiple, net.card.stride, 32)
    for size in ((length, 1), (1, length)):
        sample = golden_sample(networks, net.card, "int8", border=net.manifest.stages[0].border, size=size)
        strip = golden_difference(net, sample)
        if not strip.passed:
            return f"its scores of {size[0]}×{size[1]} pixels differ by {strip.difference:.1%} of their range"
    return ""


def core_of(source: Source) -> tuple[WithoutUpsampling, ModelCard]:
    """The core network with what was cut off it, and the card that fits it."""
    model, card = source.model, source.card
    if card.activation == "softmax" or (card.activation, card.threshold) == ("sigmoid", 0.5):
        model = bilinear_deconv(model).model
    core = split_head(fold_constants(model).model, labels=card.kind != "values")
    core = replace(core, model=fuse_padding(core.model).model)
    if core.sigmoid or core.upsampling.activated:
        if card.activation == "sigmoid":
            raise DeployError("the model ends in a Sigmoid, and its card says that it gives logits; mend the card")
        if card.activation == "probability" and core.sigmoid:
            card = replace(card, activation="sigmoid")
    # A model that takes the size it is given, or pads by itself, must not be padded by the runtime.
    card = replace(card, size_multiple=core.size_multiple, smallest=core.smallest)
    if core.upsampling.factor is not None:
        card = replace(card, stride=max(1, round(core.upsampling.factor[0])))
    elif core.upsampling.mode == "none":
        card = replace(card, stride=1)
    check(core.model, "the core network")
    return core, card


def _adds_up(core: ModelProto, card: ModelCard) -> bool:
    """Whether a network gives probabilities without a Softmax that is known: p and 1 - p, or a softmax in parts."""
    run = session(core.SerializeToString())
    image = prepare(natural_noise(*GOLDEN_SIZE, card, seed=0), card)
    scores = run.run(None, {run.get_inputs()[0].name: image})[0][0]
    return adds_up_to_one(scores)


def golden_sample(
    networks: Sequence[ModelProto],
    card: ModelCard,
    precision: str,
    gpu: GpuPlan | None = None,
    border: Border | None = None,
    size: tuple[int, int] = GOLDEN_SIZE,
) -> bytes:
    """A small image and its scores, float32, by the core run as written: what verify-engine compares with.

    Where no profile of `gpu` holds its size, it is of the smallest size that one does.

    Args:
        networks: the core, or its stages.
        card: of the model.
        precision: of the engine.
        gpu: its plan.
        border: of its first stage.
        size: height and width of the image.
    """
    if gpu is not None and not any(p.holds(padded_size(*size, card)) for p in gpu.profiles):
        least = min((profile.min for profile in gpu.profiles), key=lambda size: size[0] * size[1])
        size = tuple(side - min(3, card.size_multiple - 1) for side in least)  # so that something is padded
    image = natural_noise(*size, card, seed=0)
    scores = prepare(image, card, border=border)
    try:
        for network in networks:
            run = session(network.SerializeToString(), optimise=False)
            scores = run.run(None, {run.get_inputs()[0].name: scores})[0]
    except Exception as error:
        raise DeployError(f"the network does not run on an image of {size[0]}×{size[1]} pixels: {error}") from error
    buffer = io.BytesIO()
    np.savez(buffer, image=image, scores=scores[0].astype(np.float32), tolerance=GOLDEN_SAMPLE[precision])
    return buffer.getvalue()

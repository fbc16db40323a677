"""Engines for CPUs: stages, INT8 on pixels, and the library and tiles that are measured fastest here."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from fcn_deploy.calibration.report.engine_report import Accuracy, EngineReport
from fcn_deploy.export.build.autotune import TILES, Candidate, Timing, choose, fastest_tile, measure, tune
from fcn_deploy.export.build.config import DEFAULT_STAGES, TuningOptions
from fcn_deploy.export.build.cut_passes import NO_PASSES, cut_passes
from fcn_deploy.export.build.cut_stages import Part, cut_core, members_of
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.export.build.fine_stages import with_fine_stages
from fcn_deploy.export.build.golden import golden_sample
from fcn_deploy.export.build.measured_memory import with_measured_memory
from fcn_deploy.export.build.parity import compare_each
from fcn_deploy.export.build.report_parts import candidate_reports, stage_reports
from fcn_deploy.export.build.targets.job import BuildJob
from fcn_deploy.export.passes.raw_input import raw_input
from fcn_deploy.export.passes.space_to_depth import space_to_depth
from fcn_deploy.export.quantization.class_drops import Judgement
from fcn_deploy.export.quantization.mixed_precision import MixedPrecision
from fcn_deploy.export.tolerances import REORDERED_SUMS
from fcn_deploy.runtime.backends.openvino import has_bfloat16, installed
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.golden_sample import GOLDEN, golden_difference
from fcn_deploy.runtime.latency import TIMED_SIZES
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from onnx import ModelProto

log = logging.getLogger(__name__)

FIXED_SIZES = 3  # so many at most in --sizes are taken to be those of fixed cameras, which come again and again
STRIP_CELLS = 6  # at the coarsest stride: as many as make kernels of INT8 convolutions take their path for strips
TILED_SIZE = (1536, 1536)  # of the image that tiles are tried on


def build(job: BuildJob, report: EngineReport) -> Draft:
    """The fastest way to run this network here whose results hold. Raises DeployError where none does."""
    drafts, passes = {job.float_draft.manifest.precision: job.float_draft}, report.passes
    if job.mixed is not None:
        low = _bfloat16_draft if job.precision == "bf16" else _int8_draft
        drafts[job.precision] = low(job, job.mixed, report)
    report.core_bytes = {job.precision: drafts[job.precision].core_bytes}
    choice = _Choice(job, drafts)
    timings, chosen = choice.made()
    draft = choice.draft(chosen)
    if job.config.tuning is not None and job.config.tuning.fine:
        job.say("cutting it further, for tiles alone")
        draft = with_fine_stages(draft, *choice.core(chosen), chosen.threads)
        draft = draft if draft.manifest.fine else choice.cut_for_memory(chosen)
    job.say("measuring its working memory")
    draft = with_measured_memory(draft, chosen.threads)
    report.precision, report.backend = chosen.precision, chosen.backend
    if chosen.precision in drafts and drafts[chosen.precision] is job.float_draft:
        report.passes = passes
    report.candidates = candidate_reports(timings, chosen)
    report.latency_ms = timings[chosen].milliseconds
    report.stages, report.fine = stage_reports(draft.manifest.stages), stage_reports(draft.manifest.fine)
    if job.mixed is not None:
        _report_low_precision(report, job.mixed, choice, timings, chosen)
    return draft


def check_bfloat16() -> None:
    """Raise DeployError where this machine cannot judge, or time, a network in bfloat16."""
    if not installed():
        raise DeployError("--bf16 on the CPU is run by OpenVINO; run: pip install 'fcn-deploy[openvino]'")
    if not has_bfloat16():
        raise DeployError(
            "--bf16: this CPU has no bfloat16 (AVX-512 BF16 or AMX), so its labels and speed cannot be measured here; "
            "build on a CPU that has it, or use --int8"
        )


def _bfloat16_draft(job: BuildJob, mixed: MixedPrecision, report: EngineReport) -> Draft:
    """The float32 core, which OpenVINO runs in bfloat16: it rounds weights and features as it opens the engine."""
    before = job.float_draft
    golden = golden_sample([job.core.model], before.manifest.card, "bf16")
    return Draft(replace(before.manifest, precision="bf16", backend="openvino"), {**before.members, GOLDEN: golden})


def _int8_draft(job: BuildJob, mixed: MixedPrecision, report: EngineReport) -> Draft:
    """The quantized core in stages, the first of which reads pixels where that costs no more than is allowed."""
    card = job.float_draft.manifest.card
    parts = cut_core(mixed.core, card, job.config.stages)
    passes = cut_passes(mixed.core, replace(card, whole="")) if card.whole else NO_PASSES
    manifest = replace(job.float_draft.manifest, precision=job.precision, pooled=passes.pooled)
    report.passes = passes.reason or None
    if (changed := on_pixels(parts, job.float_core, card, mixed.image_mean)) is not None:
        stages = tuple(part.stage for part in changed)
        tried = Draft(replace(manifest, stages=stages, pooled=None), members_of(changed))
        with tried.opened(job.config.threads) as net:
            found = mixed.gate.measure_run(net.scores)
        if mixed.gate.holds(found):
            parts = changed
            mixed.accuracy = _judged(mixed, found)
            report.accuracy = mixed.accuracy
    golden = golden_sample([part.model for part in parts], card, "int8", border=parts[0].stage.border)
    stages = tuple(part.stage for part in parts)
    return Draft(replace(manifest, stages=stages), members_of(parts) | passes.members | {GOLDEN: golden})


def _judged(mixed: MixedPrecision, found: Judgement) -> Accuracy:
    """The accuracy of a core as it was judged last."""
    gate, drop = mixed.gate, round(mixed.gate.drop(found.value), 4)
    value: dict[str, Any] = {mixed.accuracy.precision: found.value}
    return replace(mixed.accuracy, drop_points=drop, class_drops=gate.class_drops(found), **value)


def on_pixels(
    parts: Sequence[Part], core: ModelProto, card: ModelCard, mean: np.ndarray | None
) -> tuple[Part, ...] | None:
    """The parts of an INT8 core, the first of which takes the image as it is; None where that cannot be."""
    raw = raw_input(parts[0].model, core, card, mean)
    if raw.border is None:
        return None
    return (Part(replace(parts[0].stage, border=raw.border), raw.model), *parts[1:])


def on_blocks(draft: Draft) -> Draft | None:
    """An INT8 engine whose first stage takes squares of pixels as channels; None where that cannot be."""
    first, *others = draft.manifest.stages
    if first.border is None:
        return None
    found = space_to_depth(onnx.load_from_string(draft.members[first.file]), first.border)
    if found.why_not:
        return None
    stages = (replace(first, border=found.border, block=found.block), *others)
    members = {**draft.members, first.file: found.model.SerializeToString()}
    return Draft(replace(draft.manifest, stages=stages), members)


def _on_blocks(parts: tuple[Part, ...]) -> tuple[Part, ...] | None:
    """Parts, the first of which takes pixels, as `on_blocks` has it take squares of them."""
    assert parts[0].stage.border is not None, "as it takes pixels"
    found = space_to_depth(parts[0].model, parts[0].stage.border)
    if found.why_not:
        return None
    stage = replace(parts[0].stage, border=found.border, block=found.block)
    return (Part(stage, found.model), *parts[1:])


class _Choice:
    """Candidates to run the network by, and which of them may be used.

    Attributes:
        accuracy: library → what INT8 costs by its own kernels.
        on_blocks: libraries that run INT8 faster where its first stage takes squares of pixels as channels.
        unpacked: precision → its draft for ONNX Runtime, cut where one map crosses alone: packing several takes a tenth
            of a whole image's time, and tiles that memory asks for are by stages of their own.
        uncut: precision → its draft for OpenVINO in one stage, where images are of a few sizes that memory holds: from
            one stage to the next it takes 3 to 28 % of the time, the more the smaller the image.
    """

    def __init__(self, job: BuildJob, drafts: dict[str, Draft]) -> None:
        self.job, self.drafts = job, drafts
        self.tuning = job.config.tuning or TuningOptions()
        self.card = job.float_draft.manifest.card
        mixed = job.mixed
        self.accuracy = {} if mixed is None or "bf16" in drafts else {"onnxruntime": mixed.accuracy}
        # Few sizes that were named stay; others change from image to image.
        fixed = job.config.latency_sizes and len(job.config.latency_sizes) <= FIXED_SIZES
        self.step = 0 if fixed else self.card.size_multiple
        self.sizes = job.config.latency_sizes or TIMED_SIZES
        self.unpacked = self._unpacked()
        self.uncut = self._uncut()
        low = self.tuning.backends if mixed is not None and "int8" in drafts else ()
        self.blocks = {backend: on_blocks(self._before(backend, "int8")) for backend in low}
        self.tiles: dict[str, int | None] = {}
        self.on_blocks = {backend for backend in self.tuning.backends if self._faster_on_blocks(backend)}
        self.tiles = self._tiles()

    @property
    def precisions(self) -> list[str]:
        """The lowest first."""
        return list(reversed(self.drafts))

    def made(self) -> tuple[dict[Candidate, Timing], Candidate]:
        """What was measured, and the candidate to keep."""
        config, asked_for = self.job.config, self.precisions[0]
        fastest = config.quantization.fastest
        # float32 by the other libraries is compared with where it may be kept.
        candidates = [
            Candidate(backend, precision, config.threads, precision == "int8" and backend in self.on_blocks)
            for precision in self.precisions
            for backend in self._backends(precision, precision == asked_for or fastest)
        ]
        images = {f"{height}x{width}": natural_noise(height, width, self.card, 0) for height, width in self.sizes}
        return tune(
            self.open,
            self.check,
            candidates,
            images,
            self.tuning,
            step=self.step,
            among=lambda candidate: fastest or candidate.precision == asked_for,
            say=self.job.say,
        )

    def _backends(self, precision: str, kept: bool) -> tuple[str, ...]:
        """Libraries to run a precision by: the preferred one, where it is only compared with what may be `kept`."""
        if precision == "bf16":
            return ("openvino",)
        return self.tuning.backends if kept or "bf16" in self.drafts else self.tuning.backends[:1]

    def _faster_on_blocks(self, backend: str) -> bool:
        """Whether a library runs the INT8 engine faster on squares of pixels.

        Sums are the same integers. Of a library that the gate has judged scores must be equal; of one that it has yet
        to judge they may round otherwise, as those of the golden sample do.
        """
        if (blocks := self.blocks.get(backend)) is None:
            return False
        self.job.say(f"trying squares of pixels as channels on {backend}")
        threads = self.job.config.threads
        pair = (Candidate(backend, "int8", threads), Candidate(backend, "int8", threads, on_blocks=True))
        height, width = sorted(self.sizes, key=math.prod)[len(self.sizes) // 2]
        image = natural_noise(height, width, self.card, 0)
        try:
            with self.open(pair[0]) as plain, self.open(pair[1]) as squares:
                if backend in self.accuracy:
                    same = np.array_equal(plain.scores(image), squares.scores(image))
                else:
                    same = golden_difference(squares, blocks.members[GOLDEN]).passed
                if not same:
                    log.warning("%s: squares of pixels as channels give other scores, and are not used", backend)
                    return False
                calls = {pair[0]: plain.result, pair[1]: squares.result}
                timings = measure(calls, {f"{height}x{width}": image}, self.tuning.seconds / 4, step=self.step)
        except DeployError:  # a size that memory does not hold, or a library that refuses it: others say so
            return False
        return choose(timings).on_blocks

    def _tiles(self) -> dict[str, int | None]:
        """Precision → side of the tiles that ONNX Runtime runs faster than a larger whole; None where none are."""
        largest = max(self.job.config.latency_sizes or [TILED_SIZE], key=math.prod)
        if "onnxruntime" not in self.tuning.backends or max(largest) <= min(TILES):
            return {}
        self.job.say("trying tiles that fit the caches")
        tiles: dict[str, int | None] = {}
        for precision in self.drafts:
            with self._before("onnxruntime", precision).opened(self.job.config.threads) as net:
                image = natural_noise(*largest, self.card, 0)
                tiles[precision] = fastest_tile(net, image, self.tuning.seconds / 2)
        return tiles

    def draft(self, candidate: Candidate) -> Draft:
        """The engine that says that a candidate runs it."""
        before = self._before(candidate.backend, candidate.precision)
        if candidate.on_blocks:
            before = self.blocks[candidate.backend] or before
        first, *others = before.manifest.stages
        # OpenVINO prepares kernels anew for each shape, and tiles have several.
        tile = self.tiles.get(candidate.precision) if candidate.backend == "onnxruntime" else None
        stages = (replace(first, tile=tile), *others)
        return Draft(replace(before.manifest, backend=candidate.backend, stages=stages), before.members)

    def core(self, candidate: Candidate) -> tuple[ModelProto, Callable[[tuple[Part, ...]], tuple[Part, ...] | None]]:
        """The core of a candidate, and what has parts of it take images as its first stage does."""
        return self._core(candidate.precision, self.draft(candidate).manifest.stages[0])

    def cut_for_memory(self, candidate: Candidate) -> Draft:
        """The engine of a candidate whose own stages are those that memory's tiles are run by."""
        if candidate.backend != "onnxruntime" or candidate.precision not in self.unpacked:
            return self.draft(candidate)
        before = self.drafts[candidate.precision]
        before = (on_blocks(before) if candidate.on_blocks else None) or before
        return Draft(replace(before.manifest, backend=candidate.backend), before.members)

    def _before(self, backend: str, precision: str) -> Draft:
        recut = self.unpacked if backend == "onnxruntime" else self.uncut
        return recut.get(precision, self.drafts[precision])

    def _unpacked(self) -> dict[str, Draft]:
        if not self.tuning.fine or "onnxruntime" not in self.tuning.backends:
            return {}
        return self._recut(lambda core: cut_core(core, self.card, self.job.config.stages, packed=False))

    def _uncut(self) -> dict[str, Draft]:
        largest = max(map(math.prod, self.sizes))
        asked = self.job.config.stages != DEFAULT_STAGES
        if asked or self.step or "openvino" not in self.tuning.backends or largest > math.prod(TILED_SIZE):
            return {}
        return self._recut(lambda core: cut_core(core, self.card, 1))

    def _recut(self, cut: Callable[[ModelProto], tuple[Part, ...]]) -> dict[str, Draft]:
        """Precision → its draft in stages that `cut` makes of its core, where they are others and give its scores."""
        found: dict[str, Draft] = {}
        if self.card.whole:
            return found
        image = natural_noise(*TIMED_SIZES[0], self.card, 0)
        for precision, draft in self.drafts.items():
            stages, threads = draft.manifest.stages, self.job.config.threads
            if len(stages) == 1 or precision == "bf16":
                continue
            core, on_image = self._core(precision, stages[0])
            parts = on_image(cut(core))
            if parts is None or tuple(part.stage for part in parts) == stages:
                continue
            others = {name: draft.members[name] for name in draft.members.keys() - {stage.file for stage in stages}}
            changed = replace(draft.manifest, stages=tuple(part.stage for part in parts))
            tried = Draft(changed, {**members_of(parts), **others})
            with draft.opened(threads) as net, tried.opened(threads) as other:
                scores = net.scores(image)
                allowed = 0.0 if precision == "int8" else REORDERED_SUMS * float(np.ptp(scores))
                if np.abs(other.scores(image) - scores).max() <= allowed:
                    found[precision] = tried
        return found

    def _core(
        self, precision: str, first: Stage
    ) -> tuple[ModelProto, Callable[[tuple[Part, ...]], tuple[Part, ...] | None]]:
        job = self.job
        if job.mixed is None or precision != "int8":
            return job.float_core, lambda parts: parts
        mixed = job.mixed

        def on_image(parts: tuple[Part, ...]) -> tuple[Part, ...] | None:
            if first.border is None:
                return parts
            changed = on_pixels(parts, job.float_core, self.card, mixed.image_mean)
            return changed if changed is None or first.block == 1 else _on_blocks(changed)

        return mixed.core, on_image

    def open(self, candidate: Candidate) -> AbstractContextManager[Network]:
        return self.draft(candidate).opened(candidate.threads)

    def check(self, candidate: Candidate, net: Network) -> str:
        """Why a candidate's results may not be used; "" where they may. Raises DeployError: neither."""
        mixed = self.job.mixed
        if candidate.backend == "onnxruntime":
            return ""
        self.job.say(f"checking the labels of {candidate.backend}, {candidate.precision}")
        if candidate.precision == "float32" or mixed is None:
            compare_each(self.job.model, net)
            return ""
        # As served, by its own kernels: others round otherwise.
        gate = mixed.gate
        found = gate.measure_run(net.scores)
        self.accuracy[candidate.backend] = _judged(mixed, found)
        if not gate.holds(found):
            return f"{candidate.precision} by its kernels: {gate.lost(found)}"
        # Otherwise verify-engine would reject, on this very machine, what was built here.
        draft = self.drafts[candidate.precision]
        golden = golden_difference(net, draft.members[GOLDEN])
        if not golden.passed:
            return f"its scores of the golden sample differ by {golden.difference:.1%} of their range"
        return _errs_on_strips(net, draft, golden.range)


def _errs_on_strips(net: Network, draft: Draft, usual_range: float) -> str:
    """Why an engine's low precision may not be used on strips, whose maps are one cell wide or high; "" where it may.

    Kernels have paths of their own for such maps, and some are wrong: see `runtime.backends.openvino.NarrowMaps`.
    Differences are told as shares of `usual_range`, the range of the golden sample's scores, where the strip's is less.
    """
    stages = draft.manifest.stages
    networks = [onnx.load_from_string(draft.members[stage.file]) for stage in stages]
    length = STRIP_CELLS * max(net.card.size_multiple, net.card.stride, 32)
    # Most of what a network sees of a strip may be padding, whose scores lie close together; kernels round as coarsely
    # as they were calibrated to.
    for size in ((length, 1), (1, length)):
        sample = golden_sample(networks, net.card, draft.manifest.precision, border=stages[0].border, size=size)
        strip = golden_difference(net, sample)
        difference = strip.difference * min(1.0, strip.range / usual_range)
        if not difference <= strip.tolerance:
            return f"its scores of {size[0]}×{size[1]} pixels differ by {difference:.1%} of the scores' usual range"
    return ""


def _report_low_precision(
    report: EngineReport,
    mixed: MixedPrecision,
    choice: _Choice,
    timings: dict[Candidate, Timing],
    chosen: Candidate,
) -> None:
    """What INT8 brings and costs by the library that runs it."""
    threads = choice.job.config.threads  # fewer are for information
    held = {c.precision for c, timing in timings.items() if c.threads == threads and not timing.refused}

    def best_of(precision: str) -> Candidate:
        return choose(timings, lambda c: c.precision == precision and c.threads == threads)

    best = {precision: best_of(precision) for precision in held}
    accuracy, low = mixed.accuracy, choice.precisions[0]
    if "float32" in best:
        report.float32_latency_ms = timings[best["float32"]].milliseconds
    if len(best) == 2:
        speedup = timings[best["float32"]].relative_time / timings[best[low]].relative_time
        report.speedup = round(speedup, 3) if speedup == speedup else None
    if low in best:
        accuracy = choice.accuracy[best[low].backend]
    accuracy = replace(accuracy, by_backend={name: each.value for name, each in choice.accuracy.items()})
    report.accuracy = accuracy
    if accuracy.metric == "mIoU":
        report.miou = accuracy.float32 if chosen.precision == "float32" else accuracy.value

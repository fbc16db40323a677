"""Which library, precision and number of threads run a network fastest here: measured, side by side."""

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fcn_deploy.export.build.config import TUNING_SECONDS, TuningOptions
from fcn_deploy.export.quantization.options import Say
from fcn_deploy.runtime.backends.onnxruntime import physical_cores
from fcn_deploy.runtime.errors import DeployError, OverBudgetError
from fcn_deploy.runtime.network import Network
from fcn_deploy.runtime.planning.plan import Plan, plan_run

log = logging.getLogger(__name__)

ROUNDS = 9  # at each size, at most
ALONE_ROUNDS = 5  # of a candidate that has no rival
LEAST_ROUNDS = 3
SIZE_STEPS = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2), (0, 3))  # steps, vertical and horizontal
SHORT_CALL = 0.02  # seconds
LEFT_BEHIND = 1.5  # times the fastest: after LEAST_ROUNDS, such a candidate is measured no further
TILES = (384, 512, 768, 1024)  # sides in pixels
MOST_OVERHEAD = 1.4  # of tiles that are tried
TILES_WORTH = 0.95  # tiles are kept where they take so much of the time at most
NOISE = 0.03  # a lead smaller than this is noise: the earlier candidate is kept


@dataclass(frozen=True)
class Candidate:
    """One way to run a network.

    Attributes:
        backend: of CPU_BACKENDS.
        precision: of the engine.
        threads: None: one per physical core.
        on_blocks: its first stage takes squares of pixels as channels (`passes.space_to_depth`).
    """

    backend: str
    precision: str
    threads: int | None = None
    on_blocks: bool = False


@dataclass
class Timing:
    """How long a candidate took.

    Attributes:
        milliseconds: "HxW" → median of one call; None where the memory is too small for it.
        relative_time: its best time over the first candidate's; geometric mean over the sizes.
        rounds: measured at each size.
        refused: why it may not be chosen; "" where it may.
    """

    milliseconds: dict[str, float | None] = field(default_factory=dict)
    relative_time: float = math.nan
    rounds: list[int] = field(default_factory=list)
    refused: str = ""


def fewer_threads(cores: int | None = None) -> list[int]:
    """Half of the physical cores, half of that, and so on down to 1; `cores` None: those of this machine."""
    cores, counts = cores or physical_cores(), []
    while cores > 1:
        cores //= 2
        counts.append(cores)
    return counts


def tune(
    open_: Callable[[Candidate], AbstractContextManager[Network]],
    check: Callable[[Candidate, Network], str],
    candidates: Sequence[Candidate],
    images: Mapping[str, np.ndarray],
    tuning: TuningOptions,
    *,
    step: int = 0,
    among: Callable[[Candidate], bool] = lambda _: True,
    say: Say = lambda line: None,
) -> tuple[dict[Candidate, Timing], Candidate]:
    """Open, check and measure candidates: their timings, and the one to keep.

    An engine runs with one thread per physical core unless its user says otherwise, as another machine has other
    cores. So that is what decides; fewer threads are then tried with the one that was kept, until they are slower,
    for the report.

    Args:
        open_: gives it opened. Where it raises DeployError the candidate is refused.
        check: the reason why a candidate's labels may not be used, or "".
        candidates: the preferred first.
        images: "HxW" → image.
        tuning: for how long, and whether fewer threads are tried.
        step: as for `measure`.
        among: which may be kept; the others are measured for comparison.
        say: called with a line when a phase begins.

    Raises:
        DeployError: no candidate that may be kept holds.
    """
    refused: dict[Candidate, Timing] = {}
    with ExitStack() as stack:
        calls = {}
        for candidate in candidates:
            try:
                net = stack.enter_context(open_(candidate))
                reason = check(candidate, net)
            except DeployError as error:
                reason = str(error)
            if reason:
                log.warning("%s, %s: not used: %s", candidate.backend, candidate.precision, reason)
                refused[candidate] = Timing(refused=reason)
            else:
                calls[candidate] = net.result
        if not any(map(among, calls)):
            told = "; ".join(f"{c.backend}, {c.precision}: {timing.refused}" for c, timing in refused.items())
            raise DeployError(f"no candidate may be used ({told}); name another --backend, or another precision")
        say(f"timing {len(calls)} candidates" if len(calls) > 1 else f"timing {next(iter(calls)).precision}")
        seconds = tuning.seconds * (0.75 if tuning.fewer_threads else 1)
        timings = measure(calls, images, seconds, step=step)
    chosen = choose(timings, among)
    if tuning.fewer_threads and chosen.threads is None:
        timings |= _with_fewer_threads(open_, chosen, timings[chosen], images, tuning.seconds / 4, step, say)
    return timings | refused, chosen


def _with_fewer_threads(
    open_: Callable[[Candidate], AbstractContextManager[Network]],
    chosen: Candidate,
    its_timing: Timing,
    images: Mapping[str, np.ndarray],
    seconds: float,
    step: int,
    say: Say,
) -> dict[Candidate, Timing]:
    """The chosen candidate with fewer and fewer threads, until that is slower."""
    timings: dict[Candidate, Timing] = {}
    counts = fewer_threads()
    for count in counts:
        fewer = replace(chosen, threads=count)
        say(f"timing {fewer.backend} with {count} threads")
        with open_(chosen) as all_cores, open_(fewer) as net:
            pair = {chosen: all_cores.result, fewer: net.result}
            timings[fewer] = timing = measure(pair, images, seconds / len(counts), step=step)[fewer]
        slower = not timing.relative_time < 1 + NOISE
        timing.relative_time *= its_timing.relative_time
        if slower:
            break
    return timings


def fastest_tile(
    net: Network, image: np.ndarray, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> int | None:
    """The side of tiles in which a network's first stage runs faster than whole, as tiles fit the processor's caches.

    Args:
        net: an engine for CPUs.
        image: what it is tried on.
        seconds: to measure for, at most; where a run takes too much of it nothing is tried.

    Returns:
        One of TILES; None where none of them is worth it, or smaller than the image.
    """
    first, *others = (replace(stage, tile=None) for stage in net.stages)
    size, order, budget = image.shape[:2], random.Random(0), net.memory_budget()
    try:
        whole = plan_run(size, net.card, (first, *others), budget)
        tiled: dict[int | None, Plan] = {
            side: plan_run(size, net.card, (replace(first, tile=side), *others), budget) for side in TILES
        }
    except OverBudgetError:
        return None
    tiled = {side: plan for side, plan in tiled.items() if plan.grids and plan.overhead < MOST_OVERHEAD}
    if not tiled or whole.grids:
        return None
    plans = {**tiled, None: whole}
    started = clock()
    net.scores_by(image, whole)
    if (clock() - started) * len(plans) * LEAST_ROUNDS > seconds:
        return None
    best: dict[int | None, float] = dict.fromkeys(plans, math.inf)
    for _ in range(LEAST_ROUNDS):
        for side in order.sample(list(plans), len(plans)):
            before = clock()
            net.scores_by(image, plans[side])
            best[side] = min(best[side], clock() - before)
    side = min(best, key=best.__getitem__)
    return side if best[side] < TILES_WORTH * best[None] else None


def measure(
    calls: Mapping[Candidate, Callable[[np.ndarray], Any]],
    images: Mapping[str, np.ndarray],
    seconds: float = TUNING_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
    step: int = 0,
) -> dict[Candidate, Timing]:
    """Time candidates against each other.

    At each size they run one after the other, in an order drawn anew each round, so that a machine that becomes busy
    or hot slows all alike. With `step` every round has a size of its own, a little smaller: libraries that prepare
    kernels for a shape pay for it as they do where sizes change from image to image. Otherwise the size stays, and
    what a change of size costs is paid in a first run, which is not counted. They are compared by their best rounds,
    since whatever disturbs a run only ever adds to it.

    Args:
        calls: candidate → function of an image. The first is what the others are compared with, and is measured to
            the end; others that are left behind are not.
        images: "HxW" → image.
        seconds: shared by the sizes; LEAST_ROUNDS are run even where it is too little, at sizes too slow for it fewer.
        clock: in seconds.
        step: pixels by which sizes differ from round to round (times are scaled to the named size); 0: they stay.
    """
    first = next(iter(calls))
    timings = {candidate: Timing() for candidate in calls}
    ratios: dict[Candidate, list[float]] = {candidate: [] for candidate in calls}
    order = random.Random(0)
    for place, (size, image) in enumerate(images.items()):
        start = clock()
        try:
            times = _measure_size(calls, image, seconds / (len(images) - place), clock, step, order)
        except OverBudgetError:
            for timing in timings.values():
                timing.milliseconds[size] = None
                timing.rounds.append(0)
            continue
        seconds -= clock() - start
        for candidate, taken in times.items():
            timings[candidate].milliseconds[size] = round(float(np.median(taken)) * 1e3, 3)
            timings[candidate].rounds.append(len(taken))
            ratios[candidate].append(math.log(min(taken) / min(times[first])))
    for candidate, values in ratios.items():
        if values:
            timings[candidate].relative_time = math.exp(float(np.mean(values)))
    return timings


def _measure_size(
    calls: Mapping[Candidate, Callable[[np.ndarray], Any]],
    image: np.ndarray,
    allowed: float,
    clock: Callable[[], float],
    step: int,
    order: random.Random,
) -> dict[Candidate, list[float]]:
    """Seconds of each candidate's rounds at one size, for about `allowed` seconds. Raises OverBudgetError."""
    first, start = next(iter(calls)), clock()
    for call in calls.values():
        call(image)  # what a new size costs
    started = clock()
    calls[first](image)
    # Short calls are timed warm, as they are where one engine runs alone.
    warm = not step and clock() - started < SHORT_CALL
    left = list(calls)
    times: dict[Candidate, list[float]] = {candidate: [] for candidate in calls}
    for done in range(1, (ROUNDS if len(calls) > 1 else ALONE_ROUNDS) + 1):
        given = _smaller(image, step, done)
        for candidate in order.sample(left, len(left)):
            if warm:
                calls[candidate](image)
            before = clock()
            calls[candidate](given)
            times[candidate].append((clock() - before) * image.size / given.size)
        if clock() - start > allowed * (3 if done < LEAST_ROUNDS else 1):
            break
        if done == LEAST_ROUNDS:
            best = min(float(np.median(taken)) for taken in times.values())
            left = [c for c in left if c == first or np.median(times[c]) <= LEFT_BEHIND * best]
    return times


def _smaller(image: np.ndarray, step: int, turn: int) -> np.ndarray:
    """The image without a few rows and columns, as many as no other of ROUNDS turns omits."""
    cut = SIZE_STEPS[(turn - 1) % len(SIZE_STEPS)]
    height, width = (
        max(side - step * times, min(side, step)) for side, times in zip(image.shape[:2], cut, strict=True)
    )
    return image[:height, :width] if step else image


def choose(timings: Mapping[Candidate, Timing], among: Callable[[Candidate], bool] = lambda _: True) -> Candidate:
    """The fastest candidate that is not refused; of those within NOISE of it, the first.

    Where no size could be measured it is the first as well.
    """
    allowed = [c for c, timing in timings.items() if not timing.refused and among(c)]
    best = min(
        (timings[c].relative_time for c in allowed if timings[c].relative_time == timings[c].relative_time),
        default=math.nan,
    )
    return next((c for c in allowed if timings[c].relative_time <= best * (1 + NOISE)), allowed[0])

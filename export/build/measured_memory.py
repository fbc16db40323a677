"""The memory that each stage of an engine works with, measured on real runs, and the law of pixels that they follow."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.runtime.backends import Backend
from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.pooled import Pooled
from fcn_deploy.runtime.engine_format.stage import Stage
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.pixels.prepare import padded_size
from fcn_deploy.runtime.process_memory import available_memory, forget_highest, give_back_freed, highest, resident
from fcn_deploy.runtime.tiling.pooled import PooledTiles

# Of the images that are run, in pixels. What an arena takes does not grow evenly: powers of two alone mislead. The
# largest, where they take little: what this process has freed and takes again would hide a run of some megabytes.
SIDES = (128, 256, 362, 512, 724, 1024, 1448, 2048, 2896, 4096)
COMMON_SIDE, LARGE_BYTES = 2048, 1e9  # beyond this side those alone that take less: late stages, whose tiles are large
SHARE = 1 / 4  # of the memory that is free, for one such run at most
MOST_BYTES = 3e9
MOST_SECONDS = 10.0  # of one stage's runs together; the next size takes about four times the last
UNSEEN = 1.1  # times: what shapes beside those that were run take more, and tiles of several shapes together
BY_SQUARE = 4.0  # times: so much better the law with the square of pixels is, where it is taken
UNEVEN = 0.25  # relative error that the arena's own unevenness may bring
COUNTS_FROM = 1e6  # bytes: less is not told from what the process does beside the run

Law = tuple[float, float, float]  # bytes: fixed, per pixel, per pixel squared


def with_measured_memory(draft: Draft, threads: int | None = None) -> Draft:
    """The engine, whose stages say what memory they were seen to take in the library that runs them.

    Each stage is run at sizes of up to a megapixel, or four where they take little, after its backend gave back what
    earlier runs took, as the runtime has it do. The law is that which fits them best, raised until all of them are well
    below it. Where memory cannot be looked at (no Linux), or a run fails, the estimate of the graph stays.
    """
    manifest, card = draft.manifest, draft.manifest.card
    pooled = manifest.pooled
    sizes = list(dict.fromkeys(padded_size(side, side, card) for side in SIDES))
    with draft.opened(threads) as net:
        stages = _measured(net.backend, manifest.stages, card, sizes)
        net.backend.release()
        fine = _measured(net.fine_backend, manifest.fine, card, sizes) if manifest.fine else ()
        if pooled is not None:
            seen = list(dict.fromkeys(padded_size(side, side, pooled.card(card)) for side in SIDES))
            pooled = _measured_passes(pooled, card, draft.members, seen, threads)
    return Draft(replace(manifest, stages=stages, fine=fine, pooled=pooled), draft.members)


def _measured(
    backend: Backend, given: Sequence[Stage], card: ModelCard, sizes: Sequence[tuple[int, int]]
) -> tuple[Stage, ...]:
    """Stages, with what they take in the backend that runs them."""
    stages = list(given)
    part = np.zeros((*padded_size(1, 1, card), card.channels), card.dtype)
    for index, stage in enumerate(stages):
        before = stages[index - 1] if index else None
        try:
            stages[index] = with_law_of(stage, _seen(backend, index, part, before, sizes, stage))
            part = backend.run_stage(index, part)[None]
        except DeployError:
            break
    return tuple(stages)


def with_law_of(stage: Stage, seen: Sequence[tuple[int, int]]) -> Stage:
    """The stage with the law of what was seen, (pixels, bytes); its own estimate stays where that tells nothing."""
    if (law := law_of(seen)) is None:
        return stage
    fixed, by_pixel, by_square = law
    return replace(
        stage,
        bytes_fixed=float(math.ceil(fixed)),
        bytes_per_pixel=round(by_pixel, 3),
        bytes_per_pixel_squared=float(f"{by_square:.4g}"),
    )


def _measured_passes(
    pooled: Pooled, card: ModelCard, members: Mapping[str, bytes], sizes: Sequence[tuple[int, int]], threads: int | None
) -> Pooled:
    """As with_measured_memory, of the stages of passes."""
    tiles = PooledTiles(pooled, card, members.__getitem__, threads)
    known: dict[Stage, Stage] = {}  # passes share their first stages

    def measured(chain: Sequence[Stage]) -> tuple[Stage, ...]:
        for before, stage in zip((None, *chain), chain, strict=False):
            if stage not in known:
                known[stage] = with_law_of(stage, _taken(partial(tiles.run_whole, stage, before), sizes, stage))
        return tuple(known[stage] for stage in chain)

    passes = tuple(replace(each, stages=measured(each.stages)) for each in pooled.passes)
    return replace(pooled, passes=passes, stages=measured(pooled.stages))


def _seen(
    backend: Backend,
    index: int,
    example: np.ndarray,
    before: Stage | None,
    sizes: Sequence[tuple[int, int]],
    stage: Stage,
) -> list[tuple[int, int]]:
    """(pixels of padded image, most bytes that a stage took) at each size that memory and time allow."""

    def run(size: tuple[int, int]) -> None:
        if before is None:
            backend.run_stage(0, np.zeros((*size, example.shape[2]), example.dtype))
        else:
            height, width = (max(1, round(side / before.stride[0])) for side in size)
            backend.run_stage(index, np.zeros((1, example.shape[1], height, width), example.dtype))

    return _taken(run, sizes, stage, backend.release)


def _taken(
    run: Callable[[tuple[int, int]], object],
    sizes: Sequence[tuple[int, int]],
    stage: Stage,
    release: Callable[[], object] = give_back_freed,
) -> list[tuple[int, int]]:
    """(pixels, most bytes that a run took) at each size that memory and time allow; none where that cannot be seen."""
    seen: list[tuple[int, int]] = []
    started = time.perf_counter()
    for size in sizes:
        pixels = math.prod(size)
        expected = max(stage.working_memory(pixels), *(taken * (pixels / area) ** 2 for area, taken in seen[-1:]), 0)
        most = min(MOST_BYTES if pixels <= COMMON_SIDE**2 else LARGE_BYTES, available_memory() * SHARE)
        if seen and expected > most:
            break
        if time.perf_counter() - started > MOST_SECONDS / 4:
            break
        release()
        before = resident()
        if before is None:
            return []
        forget_highest()
        run(size)
        seen.append((pixels, (highest(before) or before) - before))
    return seen


def law_of(seen: Sequence[tuple[int, int]]) -> Law | None:
    """The law that (pixels, bytes) follow: of the least relative error, and all of them well below it.

    None where they tell nothing: fewer than two sizes of which memory was seen.
    """
    seen = [(pixels, taken) for pixels, taken in seen if taken >= COUNTS_FROM]
    if len(seen) < 2:
        return None
    pixels, taken = np.array(seen, float).T
    terms = np.stack([np.ones_like(pixels), pixels, pixels**2], 1) / taken[:, None]

    def best_of(*choices: tuple[int, ...]) -> tuple[float, np.ndarray]:
        """The sum of squared relative errors, and the law; none of its numbers may be negative."""
        laws = []
        for chosen in choices:
            law = np.zeros(3)
            law[list(chosen)] = np.linalg.lstsq(terms[:, chosen], np.ones(len(seen)), rcond=None)[0]
            if law.min() >= 0:
                laws.append((float(np.sum((terms @ law - 1) ** 2)), law))
        return min(laws, key=lambda found: found[0])

    error, law = best_of((1,), (0, 1))
    if len(seen) > 2:
        squared_error, squared = best_of((2,), (0, 2), (1, 2), (0, 1, 2))
        if squared_error * BY_SQUARE < error and error > len(seen) * UNEVEN**2:
            law = squared
    law = law * float(np.max(1 / (terms @ law))) * UNSEEN
    return float(law[0]), float(law[1]), float(law[2])

"""The memory that each stage of an engine works with, measured on real runs, and the law of pixels that they follow."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from fcn_deploy.export.build.draft import Draft
from fcn_deploy.runtime.backends import Backend
from fcn_deploy.runtime.errors import DeployError
from fcn_deploy.runtime.manifest import Stage
from fcn_deploy.runtime.plan import available_memory
from fcn_deploy.runtime.prepare import padded_size
from fcn_deploy.runtime.process_memory import forget_highest, highest, resident

# Of the images that are run, in pixels. What an arena takes does not grow evenly: powers of two alone mislead.
SIDES = (128, 256, 362, 512, 724, 1024)
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

    Each stage is run at sizes of up to a megapixel, after its backend gave back what earlier runs took, as the runtime
    has it do. The law is that which fits them best, raised until all of them are well below it. Where memory cannot be
    looked at (no Linux), or a run fails, the estimate of the graph stays.
    """
    stages = list(draft.manifest.stages)
    card = draft.manifest.card
    with draft.opened(threads) as net:
        part = np.zeros((*padded_size(1, 1, card), card.channels), card.dtype)
        cell = 1.0  # pixels of the image, (vertical, horizontal), of a cell of the stage's input
        for index, stage in enumerate(stages):
            sizes = list(dict.fromkeys(padded_size(side, side, card) for side in SIDES))
            try:
                seen = _seen(net.backend, index, part, cell, sizes, stage)
                part = net.backend.run_stage(index, part)[None]
            except DeployError:
                break
            if (law := law_of(seen)) is not None:
                fixed, by_pixel, by_square = law
                stages[index] = replace(
                    stage,
                    bytes_fixed=float(math.ceil(fixed)),
                    bytes_per_pixel=round(by_pixel, 3),
                    bytes_per_pixel_squared=float(f"{by_square:.4g}"),
                )
            cell = float(stage.stride[0])
    return Draft(replace(draft.manifest, stages=tuple(stages)), draft.members)


def _seen(
    backend: Backend,
    index: int,
    example: np.ndarray,
    cell: float,
    sizes: Sequence[tuple[int, int]],
    stage: Stage,
) -> list[tuple[int, int]]:
    """(pixels of padded image, most bytes that a stage took) at each size that memory and time allow."""

    seen: list[tuple[int, int]] = []
    started = time.perf_counter()
    for size in sizes:
        pixels = math.prod(size)
        expected = max(stage.working_memory(pixels), *(taken * (pixels / area) ** 2 for area, taken in seen[-1:]), 0)
        if seen and expected > min(MOST_BYTES, available_memory() * SHARE):
            break
        if time.perf_counter() - started > MOST_SECONDS / 4:
            break
        backend.release()
        before = resident()
        if before is None:
            return []
        forget_highest()
        if index == 0:
            backend.run_stage(0, np.zeros((*size, example.shape[2]), example.dtype))
        else:
            height, width = (max(1, round(side / cell)) for side in size)
            backend.run_stage(index, np.zeros((1, example.shape[1], height, width), example.dtype))
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

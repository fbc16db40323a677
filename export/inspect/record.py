"""What the records of engines and of ONNX models have in common: the sizes that are tried, the card, the upsampling."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from fcn_deploy.runtime.engine_format.model_card import ModelCard
from fcn_deploy.runtime.engine_format.stage import Upsampling

# One pixel, one row, primes, a side eight times the other, sizes next to powers of two.
TRIED_SIZES = ((1, 1), (1, 37), (7, 13), (31, 33), (61, 127), (64, 509), (257, 251))
LARGE_SIZES = ((2160, 3840), (1080, 1920), (720, 1280), (480, 640))  # the first that memory allows is tried too
IMAGE_MEMORY = 1 << 30  # bytes that the largest image may take, unless the user says otherwise
SECONDS = 5.0  # that each long trial may take, by what the short ones took, unless the user wants thorough trials


def tried_sizes(
    memory: int, working_memory: Callable[[int], float], thorough: bool = False
) -> Iterator[tuple[int, int]]:
    """(height, width) of the images that a network is run with, the largest within `memory` bytes.

    Each is to be run before the next is asked for: how long the last of the small ones takes tells which large one
    takes SECONDS, if not `thorough`.
    """
    *small, last = TRIED_SIZES
    yield from small
    start = time.perf_counter()
    yield last
    rate = (time.perf_counter() - start) / (last[0] * last[1])  # seconds a pixel
    for height, width in LARGE_SIZES:
        pixels = height * width
        if working_memory(pixels) <= memory and (thorough or rate * pixels <= SECONDS):
            yield height, width
            return


def card_entries(card: ModelCard, upsampling: Upsampling, multiple: int, smallest: int, fit: str) -> dict[str, Any]:
    """The card, how scores become full-size, and the sizes that the network takes by itself.

    Args:
        card: of the model.
        upsampling: what the runtime does with the core's scores.
        multiple, smallest: as of AcceptedSizes.
        fit: how other sizes are made such: `pad` or `resize`.
    """
    return {
        "card": json.loads(card.to_json()),
        "head": {"mode": upsampling.mode, "coordinates": upsampling.coordinates, "factor": upsampling.factor},
        "sizes": {"multiple": multiple, "smallest": smallest, "fit": fit if (multiple, smallest) != (1, 1) else ""},
    }

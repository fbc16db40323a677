"""What the records of engines and of ONNX models have in common: the sizes that are tried, the card, the upsampling."""

import json
from collections.abc import Callable
from typing import Any

from fcn_deploy.runtime.manifest import Upsampling
from fcn_deploy.runtime.model_card import ModelCard

# One pixel, one row, primes, a side eight times the other, sizes next to powers of two.
TRIED_SIZES = ((1, 1), (1, 37), (7, 13), (31, 33), (61, 127), (64, 509), (257, 251))
LARGE_SIZES = ((2160, 3840), (1080, 1920), (720, 1280), (480, 640))  # the first that memory allows is tried too
IMAGE_MEMORY = 1 << 30  # bytes that the largest image may take, unless the user says otherwise


def tried_sizes(memory: int, working_memory: Callable[[int], float]) -> list[tuple[int, int]]:
    """(height, width) of the images that a network is run with, the largest within `memory` bytes."""
    large = next((size for size in LARGE_SIZES if working_memory(size[0] * size[1]) <= memory), None)
    return [*TRIED_SIZES, *([large] if large else [])]


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

"""What clients, and `map`, get done in one turn; clients do it in a process of their own."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
import numpy as np
from fcn_deploy.runtime.pixels.noise_image import natural_noise

from benchmarks.common import RGB
from benchmarks.serving.clients import KINDS, processor_seconds
from benchmarks.serving.limits import at_once
from fcn_deploy import Segmenter


@dataclass
class Turn:
    """What clients got in one turn.

    Attributes:
        pixels, images: labelled.
        lost: requests without an answer, or refused.
        wrong: answers whose labels are not those of a direct call.
        seconds: of the turn.
        client: processor seconds of the clients' process.
        server: of the server's processes.
    """

    pixels: int = 0
    images: int = 0
    lost: int = 0
    wrong: int = 0
    seconds: float = 0.0
    client: float = 0.0
    server: float = 0.0


def hammer(kind, address, model, sizes, labels: Path, seconds, clients) -> Turn:
    """In a process of its own: so many clients that ask for so long, each for one image after the other."""
    images = [natural_noise(*size, RGB, seed) for seed, size in enumerate(sizes)]
    requests = [KINDS[kind].request(image, model) for image in images]
    del images
    expected = [labels.joinpath(str(index)).read_bytes() for index in range(len(sizes))]
    counts = np.zeros((clients, 4), np.int64)
    asks = [KINDS[kind].client(address) for _ in range(clients)]
    started, processor = time.perf_counter(), processor_seconds()

    def work(client: int) -> None:
        random = np.random.default_rng(client)
        while time.perf_counter() - started < seconds:
            index = int(random.integers(len(requests)))
            try:
                found = asks[client](requests[index])
            except (OSError, grpc.RpcError):
                counts[client, 2] += 1
                asks[client] = KINDS[kind].client(address)
                continue
            counts[client] += (len(expected[index]), 1, 0, found != expected[index])

    at_once([partial(work, client) for client in range(clients)])
    ended = time.perf_counter() - started, processor_seconds() - processor
    return Turn(*counts.sum(0).tolist(), *ended)


def mapped(net: Segmenter, images: list[np.ndarray], seconds: float) -> Turn:
    """`map` on the images, drawn likewise."""
    random, turn, started, processor = np.random.default_rng(0), Turn(), time.perf_counter(), processor_seconds()

    def drawn():
        while time.perf_counter() - started < seconds:
            yield images[int(random.integers(len(images)))]

    for labels in net.map(drawn()):
        turn.pixels, turn.images = turn.pixels + labels.size, turn.images + 1
    turn.seconds, turn.server = time.perf_counter() - started, processor_seconds() - processor
    return turn

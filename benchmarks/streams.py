"""Segmenter.map against single calls, at fixed and mixed sizes; with batches, without, and with batches at every size.

    python -m benchmarks.streams demo/digits.engine [--data DIR] [--pairs 15]

Each row: images a second by single calls, and how many times that by `map`, pair by pair in random order; then the same
of the processor time an image takes, which other work on the machine disturbs less. `batches always` is what
`map` measures and leaves where it does not pay.
"""

import argparse
import os
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
from fcn_deploy.calibration.stream import open_stream
from fcn_deploy.runtime import stream
from fcn_deploy.runtime.pixels.prepare import padded_size
from fcn_deploy.runtime.planning.batch_cost import ROUNDS, BatchCost
from PIL import Image

from fcn_deploy import Segmenter

SIZES = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (360, 480), (512, 1024)]
PIXELS = 1 << 20  # of a row, about
LARGEST = 1 << 18  # padded pixels that are tried in batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--data", default="digits", help="photographs, a folder or `digits`; they are resized")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    random = np.random.default_rng(0)
    with Segmenter(options.engine, threads=options.threads) as net:
        photos = open_stream(options.data, net.card)
        print(
            f"{options.engine}, {options.threads} threads, {options.pairs} pairs; times the single calls: images/s, CPU"
        )
        print(f"{'size':>10} {'single':>8} {'map':>14} {'without batches':>16} {'batches always':>16}")
        mixed = [tuple(int(side) for side in random.integers(61, 900, 2)) for _ in range(16)]
        for name, sizes in [*((f"{h}×{w}", [(h, w)]) for h, w in SIZES), ("mixed", mixed)]:
            count = min(96, max(8, PIXELS // (sizes[0][0] * sizes[0][1])))
            images = [resized(photos.read(i % len(photos)), sizes[i % len(sizes)]) for i in range(count)]
            padded = {padded_size(*size, net.card) for size in sizes}
            once, twice = [1.0] * ROUNDS, [2.0] * ROUNDS
            calls = {"single": (lambda images=images: [net(image) for image in images], {})}
            calls["map"] = (lambda images=images: list(net.map(images)), {})
            calls["without"] = (calls["map"][0], {size: BatchCost(once, twice, True) for size in padded})
            if len(sizes) == 1 and sizes[0][0] * sizes[0][1] <= LARGEST:
                calls["always"] = (calls["map"][0], {size: BatchCost(twice, once, True) for size in padded})
            learned: dict = {}
            taken = {name: [] for name in calls}
            for pair in range(options.pairs + 2):
                for index in random.permutation(len(calls)):
                    kind = list(calls)[index]
                    run, costs = calls[kind]
                    net.network.batch_costs = learned if kind == "map" else dict(costs)
                    limit = LARGEST if kind == "always" else stream.BATCH_PIXELS
                    with patch.object(stream, "BATCH_PIXELS", limit):
                        start, cpu = time.perf_counter(), time.process_time()
                        run()
                        spent = time.perf_counter() - start, time.process_time() - cpu
                    if pair > 1:
                        taken[kind].append(spent)
            times = {kind: np.array(each) for kind, each in taken.items()}
            row = f"{name:>10} {count / np.median(times['single'][:, 0]):>6.1f}/s"
            for kind, width in (("map", 14), ("without", 16), ("always", 16)):
                ratio = np.median(times["single"] / times[kind], axis=0) if kind in times else None
                row += f" {'' if ratio is None else f'{ratio[0]:.2f}, {ratio[1]:.2f}':>{width}}"
            print(row, flush=True)


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))


if __name__ == "__main__":
    main()

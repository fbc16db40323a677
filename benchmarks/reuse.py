"""Streams of a fixed camera with and without reuse: what is saved where little changes, and lost where all does.

    python -m benchmarks.reuse demo/digits.engine [--data DIR] [--size 1080x1920] [--frames 12] [--rounds 5]

Each row is a stream: frames a second of `Segmenter.map`, how many times that with `reuse=True` (medians of rounds in
random order), the same of processor time, which other work on the machine disturbs less, and the share of pixels whose
labels change from frame to frame. `still`: equal frames. `5 % of blocks`:
so many of the 64×64 blocks become other parts of photographs in each frame, anywhere; `in one place`: those of one
rectangle. `noise`: each value of each pixel by one more or less, as a camera's. Labels of both are compared.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import fitted, photographs
from fcn_deploy import Segmenter

BLOCK, SHARE = 64, 0.05


def frames(kind: str, pictures: list[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Frames of a stream, [H, W, 3] uint8, the same for each call."""
    random = np.random.default_rng(0)
    frame = pictures[0]
    height, width = (side // BLOCK for side in frame.shape[:2])
    changed = max(1, round(SHARE * height * width))
    side = math.ceil(math.sqrt(changed))
    for index in range(count):
        if index and kind == "noise":
            frame = np.clip(pictures[0] + random.integers(-1, 2, frame.shape), 0, 255).astype(np.uint8)
        elif index and kind != "still":
            frame = frame.copy()
            blocks = random.permutation(height * width)[:changed]
            if kind == "in one place":
                top, left = (int(random.integers(max(1, most - side + 1))) for most in (height, width))
                blocks = [(top + i // side) % height * width + (left + i % side) % width for i in range(changed)]
            for block in blocks:
                y, x = block // width * BLOCK, block % width * BLOCK
                frame[y : y + BLOCK, x : x + BLOCK] = pictures[index % len(pictures)][y : y + BLOCK, x : x + BLOCK]
        yield frame


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--data", default="digits", help="photographs, a folder or `digits`; they are resized")
    parser.add_argument("--size", default="1080x1920", help="of the frames, HEIGHTxWIDTH")
    parser.add_argument("--frames", type=int, default=12, help="of a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    photos = photographs(options.data)
    pictures = [fitted(photos.read(index), height, width) for index in range(min(8, len(photos)))]
    random = np.random.default_rng(0)
    with Segmenter(options.engine, threads=options.threads) as net:
        print(f"{options.engine} ({net.precision}, {net.backend}), {height}×{width}, {options.threads} threads")
        halos = ", ".join("{}×{}".format(*stage.halo) for stage in net.network.stages if stage.halo)
        print(f"stages' halos: {halos}")
        print(f"{'stream':>14} {'map':>10} {'reuse':>8} {'CPU':>7} {'labels changed':>15}")
        for kind in ("still", "5 % of blocks", "in one place", "noise"):
            taken: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
            labels: dict[bool, list[np.ndarray]] = {}
            for _ in range(options.rounds + 1):  # the first warms up
                for reuse in random.permutation([False, True]).tolist():
                    started, cpu = time.perf_counter(), time.process_time()
                    labels[reuse] = list(net.map(frames(kind, pictures, options.frames), reuse=reuse))
                    taken[reuse].append((time.perf_counter() - started, time.process_time() - cpu))
            differing = sum(int((a != b).sum()) for a, b in zip(labels[False], labels[True], strict=True))
            plain, reused = (np.median(taken[reuse][1:], axis=0) for reuse in (False, True))
            faster, cheaper = plain / reused
            pairs = zip(labels[True], labels[True][1:], strict=False)
            moved = float(np.mean([(a != b).mean() for a, b in pairs]))
            print(
                f"{kind:>14} {options.frames / plain[0]:>8.2f}/s {faster:>7.2f}× {cheaper:>6.2f}× {moved:>14.1%}"
                + (f"  {differing} labels differ" if differing else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()

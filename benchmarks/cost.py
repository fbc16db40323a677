"""Cost against pixels, from 0.01 to 16 megapixels: a straight line?

    python -m benchmarks.cost cam.engine --data ../shared/camvid --plot cost.png [--json cost.json]

Sizes of several aspect ratios, among them odd and prime ones; in every round each runs once, in random order, so that
a change of the machine's speed hits all of them. Printed: median ms of each, a line fitted through them (least relative
squares), and the spread of the time per pixel, (largest − smallest) / median, above 0.25 megapixels.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np

from benchmarks.common import fitted, photographs, pyplot
from fcn_deploy import Segmenter

ASPECTS = {"1:1": 1.0, "3:4": 3 / 4, "9:16": 9 / 16, "3:1": 3.0}  # height to width
LEAST, MOST = 0.01, 16.0  # megapixels
JUDGED = 0.25  # megapixels: from here on the time per pixel should be one number


def sizes(steps: int, most: float) -> list[tuple[str, int, int]]:
    """(kind, height, width): per aspect ratio `steps` from LEAST to `most`; primes; odd sides one above a multiple."""
    found = []
    for pixels in np.geomspace(LEAST, most, steps) * 1e6:
        for name, aspect in ASPECTS.items():
            found.append((name, round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))))
        side = math.sqrt(pixels)
        found.append(("prime", next_prime(round(side * 0.9)), next_prime(round(side * 1.1))))
        # One pixel above what the network takes: the padding at its largest.
        found.append(("odd", round(side / 32) * 32 + 1, max(1, round(side / 32)) * 32 + 1))
    return [(kind, max(1, height), max(1, width)) for kind, height, width in found]


def next_prime(number: int) -> int:
    while number < 2 or any(number % divisor == 0 for divisor in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--data", default="digits", help="photographs: a folder, a data set or digits")
    parser.add_argument("--steps", type=int, default=9, help="sizes of each aspect ratio")
    parser.add_argument("--most", type=float, default=MOST, help="megapixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", type=float, help="GB one image may take, as of runtime.infer")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cases, random = sizes(options.steps, options.most), np.random.default_rng(0)
    stream, times = photographs(options.data), np.empty((options.rounds, len(cases)))
    memory = None if options.memory is None else int(options.memory * 1e9)
    with Segmenter(options.engine, threads=options.threads, memory=memory) as net:
        tiles = [sum(grid.count for grid in net.plan(*size).grids) for _, *size in cases]
        net.warmup([(512, 512)])
        for turn in range(options.rounds):
            for index in random.permutation(len(cases)):
                image = fitted(stream.read(int(index) % len(stream)), *cases[index][1:])
                started = time.perf_counter()
                net(image)
                times[turn, index] = (time.perf_counter() - started) * 1e3
    ms, pixels = np.median(times, axis=0), np.array([height * width / 1e6 for _, height, width in cases])
    result = {"engine": str(options.engine), "threads": options.threads, "rounds": options.rounds}
    result |= judged(pixels, ms)
    result["sizes"] = [
        {"kind": kind, "size": [height, width], "ms": round(float(t), 3), "tiles": count}
        for (kind, height, width), t, count in zip(cases, ms, tiles, strict=True)
    ]
    print(f"{'size':>11}  {'aspect':<6} {'ms':>9}  ms per megapixel")
    for index in np.argsort(pixels):
        kind, height, width = cases[index]
        how = f"  {tiles[index]} tiles" if tiles[index] else ""
        print(f"{height:>5}×{width:<5}  {kind:<6} {ms[index]:9.1f}  {ms[index] / pixels[index]:8.1f}{how}")
    print(f"line: {result['fixed_ms']:.2f} ms + {result['ms_per_megapixel']:.1f} ms per megapixel")
    print(f"largest distance from it, from {JUDGED} megapixels up: {result['largest_residual']:.1%}")
    print(f"spread of the time per pixel from {JUDGED} megapixels up: {result['spread']:.1%}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        draw(cases, pixels, ms, result, options.plot)


def judged(pixels: np.ndarray, ms: np.ndarray) -> dict[str, float]:
    """A line through (megapixels, ms) and how far the larger sizes are from one time per pixel."""
    # Divided by ms: a small image's percent counts as much as a large one's.
    slope, fixed = np.linalg.lstsq(np.stack([pixels / ms, 1 / ms], 1), np.ones(len(ms)), rcond=None)[0]
    large = pixels >= JUDGED
    each = ms[large] / pixels[large]
    residual = np.abs(ms[large] / (fixed + slope * pixels[large]) - 1)
    return {
        "fixed_ms": float(fixed),
        "ms_per_megapixel": float(slope),
        "spread": float((each.max() - each.min()) / np.median(each)),
        "largest_residual": float(residual.max()),
    }


def draw(cases, pixels: np.ndarray, ms: np.ndarray, result: dict, out: Path) -> None:
    """ms against megapixels with the line, and ms per megapixel."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    kinds = np.array([kind for kind, _, _ in cases])
    for kind in dict.fromkeys(kinds):
        chosen = kinds == kind
        left.plot(pixels[chosen], ms[chosen], "o", markersize=4, label=kind)
        right.plot(pixels[chosen], ms[chosen] / pixels[chosen], "o", markersize=4, label=kind)
    ends = np.geomspace(pixels.min(), pixels.max(), 100)
    line = result["fixed_ms"] + result["ms_per_megapixel"] * ends
    words = f"{result['fixed_ms']:.1f} ms + {result['ms_per_megapixel']:.0f} ms per megapixel"
    left.plot(ends, line, color="#444444", linewidth=1, label=words)
    right.plot(ends, line / ends, color="#444444", linewidth=1)
    right.axvline(JUDGED, color="#bbbbbb", linestyle="--", linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="megapixels", ylabel="ms", title="time of an image")
    spread = f"spread above {JUDGED} megapixels: {result['spread']:.0%}"
    right.set(xscale="log", xlabel="megapixels", ylabel="ms per megapixel", title=spread)
    right.set_ylim(0, 2.5 * result["ms_per_megapixel"])
    left.legend(fontsize=8)
    figure.suptitle(f"{Path(result['engine']).name}, {result['threads']} threads", fontsize=10)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

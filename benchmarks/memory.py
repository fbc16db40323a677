"""Memory over many calls of random sizes: does it grow?

    python -m benchmarks.memory cam.engine [--calls 10000] [--plot memory.png] [--json memory.json]

Sides are log-uniform from 1 to --side pixels, drawn anew for each call, the images noise. Printed: resident memory
(anonymous, and of mapped files) after so many calls, and the ratio of the last to that after the first 500.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np

from benchmarks.common import memory, pyplot
from fcn_deploy import Segmenter

SETTLED = 500  # calls after which memory should stay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=1000, help="pixels of an image's side, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    settled, step = min(SETTLED, max(1, options.calls // 2)), max(1, options.calls // 200)
    curve, started = [], time.perf_counter()
    with Segmenter(options.engine, threads=options.threads) as net:
        # One array, of which each image is a part: what is measured is the runtime's memory alone.
        shape = (options.side, options.side, net.card.channels)
        noise = random.integers(0, 256, shape).astype(net.card.dtype)
        for call in range(1, options.calls + 1):
            height, width = (max(1, round(math.exp(random.uniform(0, math.log(options.side))))) for _ in range(2))
            net(noise[:height, :width])
            if call % step == 0 or call in (1, settled, options.calls):
                curve.append({"call": call} | memory())
    seconds = time.perf_counter() - started
    before = next(row for row in curve if row["call"] == settled)
    resident = [row["anonymous"] + row["files"] for row in (before, curve[-1])]
    result = {
        "engine": str(options.engine),
        "calls": options.calls,
        "settled": settled,
        "seconds": round(seconds, 1),
        "ratio": resident[1] / resident[0],
        "curve": curve,
    }
    print(f"{'calls':>7} {'resident MB':>12} {'anonymous MB':>13} {'peak MB':>8}")
    for row in curve[:: max(1, len(curve) // 20)] + curve[-1:]:
        resident_now = (row["anonymous"] + row["files"]) / 1e6
        print(f"{row['call']:>7} {resident_now:12.0f} {row['anonymous'] / 1e6:13.0f} {row['peak'] / 1e6:8.0f}")
    print(f"resident after {options.calls} calls: {result['ratio']:.3f} of that after {settled}; {seconds:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    if options.plot:
        plt = pyplot()
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        calls = [row["call"] for row in curve]
        for name, values in (
            ("resident", [row["anonymous"] + row["files"] for row in curve]),
            ("anonymous", [row["anonymous"] for row in curve]),
        ):
            axes.plot(calls, np.array(values) / 1e6, label=name)
        axes.axvline(settled, color="#bbbbbb", linestyle="--", linewidth=1)
        axes.set(xlabel="calls", ylabel="MB", ylim=(0, None), title=f"{result['ratio']:.3f} of that after {settled}")
        axes.legend()
        figure.savefig(options.plot, dpi=120)
        plt.close(figure)


if __name__ == "__main__":
    main()

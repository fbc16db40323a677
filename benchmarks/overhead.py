"""What the runtime adds to the backend's own run of the same core network: input, upsampling, planning, Python.

    python -m benchmarks.overhead demo/digits.engine [IMAGE]

Runs the two in pairs of random order, so that a change of the machine's speed hits both, and prints medians
and their ratio.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.digits import canvas
from fcn_deploy.runtime.backends.host import HostBackend
from fcn_deploy.runtime.head.score_window import ScoreWindow
from fcn_deploy.runtime.head.upsampling import labels_from_scores
from PIL import Image

from fcn_deploy import Segmenter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("image", type=Path, nargs="?", help="resized to 512×1024; default: a digits canvas")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.image:
        picture = Image.open(options.image).convert("RGB").resize((1024, 512), Image.Resampling.BILINEAR)
        image = np.asarray(picture)
    else:
        image = canvas(512, 1024, 0, "val", 0)[0]
    with Segmenter(options.engine, threads=options.threads) as net:
        backend = net.network.backend
        assert isinstance(backend, HostBackend), "measured on CPUs"
        core = backend.core  # the same sessions: others would differ by where their memory lies
        with backend.prepared(image) as given:
            core_input = given.copy()

        def prepare() -> None:
            with backend.prepared(image):
                pass

        def timed(call) -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3

        calls = (lambda: core(core_input)), (lambda: net(image))
        random, pairs = np.random.default_rng(0), []
        for _ in range(options.pairs + 3):
            times = [0.0, 0.0]
            for index in random.permutation(2):
                times[index] = timed(calls[index])
            pairs.append(times)
        plan = net.plan(512, 1024)
        window = ScoreWindow.whole(core(core_input)[0], plan.padded, plan.size)
        parts = {
            "input (normalise, pad)": prepare,
            "exact upsampling": lambda: labels_from_scores(window, net.network.upsampling, net.card),
        }
        medians = {name: np.median([timed(call) for _ in range(options.pairs)]) for name, call in parts.items()}
    core, whole = np.array(pairs[3:]).T
    ratios = whole / core
    low, middle, high = np.percentile(ratios, (10, 50, 90))
    print(f"{options.engine}, 512×1024, {options.threads} threads, {options.pairs} pairs")
    print(f"core alone (backend)   {np.median(core):7.1f} ms")
    print(f"Segmenter(image)       {np.median(whole):7.1f} ms")
    for name, ms in medians.items():
        print(f"{name:<22} {ms:7.1f} ms")
    print(f"ratio, pair by pair    {middle:7.3f}  (10 %: {low:.3f}, 90 %: {high:.3f})")


if __name__ == "__main__":
    main()

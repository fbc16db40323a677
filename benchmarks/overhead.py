"""What the runtime adds to the backend's own run of the same core network: input, head, planning, Python.

    python -m benchmarks.overhead demo/digits.engine [IMAGE]

Runs the two in turn, so that a change of the machine's speed hits both, and prints medians and their ratio.
"""

import argparse
import os
import time
from pathlib import Path

import numpy as np
from PIL import Image

from calibration.digits import canvas
from runtime import Segmenter
from runtime.backends.onnxruntime import OnnxRuntimeBackend
from runtime.engine_file import EngineFile
from runtime.prepare import prepare


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
    with EngineFile(options.engine) as file:
        stage = file.manifest.stages[0]
        backend = OnnxRuntimeBackend(file.read(stage.file), stage.input, stage.output, options.threads)
    with Segmenter(options.engine, threads=options.threads) as net:
        core_input = prepare(image, net.card)

        def timed(call) -> float:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3

        pairs = []
        for _ in range(options.pairs + 3):
            pairs.append((timed(lambda: backend.run(core_input)), timed(lambda: net(image))))
    core, whole = np.array(pairs[3:]).T
    ratios = whole / core
    low, middle, high = np.percentile(ratios, (10, 50, 90))
    print(f"{options.engine}, 512×1024, {options.threads} threads, {options.pairs} pairs")
    print(f"core alone (backend)   {np.median(core):7.1f} ms")
    print(f"Segmenter(image)       {np.median(whole):7.1f} ms")
    print(f"ratio, pair by pair    {middle:7.3f}  (10 %: {low:.3f}, 90 %: {high:.3f})")


if __name__ == "__main__":
    main()

"""Memory and time of calibration against passes through the network, on images of mixed sizes.

    python -m benchmarks.calibration model.onnx [--images 10,60,500]

Each figure is of a process of its own: `plain` runs the core, `tapped` runs it with every measured tensor as an
output, `calibrate` does that and counts. The images are photographs where --data names some, else noise, of 200×200
to 720×960 pixels, the largest one last. Peak memory is held against one tapped pass on the largest image. Ratios are of
time, and in brackets of processor time, which other work on the machine changes less.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.ranges import collect_histograms
from fcn_deploy.export.build.core import core_of, optimise_offline
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.calibrate import activation_reader
from fcn_deploy.runtime.backends.onnxruntime import session
from fcn_deploy.runtime.images.find import find_images
from fcn_deploy.runtime.pixels.noise_image import natural_noise
from fcn_deploy.runtime.pixels.prepare import prepare
from PIL import Image

LARGEST = (720, 960)


def images(count: int, card, photos: str | None):
    """(name, image) of `count` images of random sizes, the same ones in every process."""
    random = np.random.default_rng(0)
    files = find_images([photos]) if photos else []
    for index in range(count):
        height, width = LARGEST if index == count - 1 else (int(n) for n in random.integers(200, 720, 2))
        if files:
            photo = Image.open(files[index % len(files)]).convert("RGB")
            yield str(index), np.asarray(photo.resize((width, height)))
        else:
            yield str(index), natural_noise(height, width, card, seed=index)


def measure(model: Path, mode: str, count: int, photos: str | None) -> None:
    """Print seconds of the passes, without making the images, those of processors, and peak memory in MB."""
    found = core_of(import_model(model))
    card, core = found.card, optimise_offline(found.model)
    spent, worked = 0.0, 0.0

    def timed(stream):
        nonlocal spent, worked
        for pair in stream:
            started, work = time.perf_counter(), time.process_time()
            yield pair
            spent += time.perf_counter() - started
            worked += time.process_time() - work

    stream = timed(images(count, card, photos))
    if mode == "calibrate":
        collect_histograms(activation_reader(core), stream, "", lambda image: prepare(image, card))
    else:
        run = activation_reader(core)
        if mode == "plain":
            plain = session(core.SerializeToString())
            run = lambda x: plain.run(None, {"image": x})  # noqa: E731
        for _, image in stream:
            run(prepare(image, card))
    print(spent, worked, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--images", default="10,60,500", help="numbers of images")
    parser.add_argument("--data", help="folder or glob of photographs")
    parser.add_argument("--mode", choices=["plain", "tapped", "calibrate"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        return measure(options.model, options.mode, int(options.images), options.data)

    def child(mode: str, count: int) -> tuple[float, float, float]:
        command = [sys.executable, "-m", "benchmarks.calibration", str(options.model), "--images", str(count)]
        extra = ["--data", options.data] if options.data else []
        done = subprocess.run([*command, "--mode", mode, *extra], check=True, capture_output=True, text=True)
        seconds, worked, memory = map(float, done.stdout.split()[-3:])
        return seconds, worked, memory

    *_, one = child("tapped", 1)
    print(f"one tapped pass on {LARGEST[0]}×{LARGEST[1]}: {one:.0f} MB at its peak")
    print(f"{'images':>6} {'peak MB':>8} {'of one pass':>11} {'plain s':>8} {'tapped':>15} {'calibrate':>15}")
    for count in (int(part) for part in options.images.split(",")):
        plain, plain_work, _ = child("plain", count)
        taps, taps_work, _ = child("tapped", count)
        seconds, work, memory = child("calibrate", count)
        tapped = f"{taps / plain:.2f}× ({taps_work / plain_work:.2f}×)"
        calibrated = f"{seconds / plain:.2f}× ({work / plain_work:.2f}×)"
        print(f"{count:6} {memory:8.0f} {memory / one:11.2f} {plain:8.2f} {tapped:>15} {calibrated:>15}", flush=True)


if __name__ == "__main__":
    main()

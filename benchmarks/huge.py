"""One huge TIFF through python -m runtime.infer: memory, and throughput against a 1000×1000 image's.

    python -m benchmarks.huge cam.engine --data ../shared/camvid [--size 20000] [--memory 1.0] [--json huge.json]

A mosaic of photographs is written tile by tile as an uncompressed, tiled BigTIFF. The command runs in a process of its
own, whose anonymous memory and mapped files are sampled 20 times a second. Its throughput is pixels by the seconds from
its start to its end; that of 1000×1000 pixels is of `Segmenter` alone on an array, before and after it.

Labels are compared in random regions with those of a crop that has --halo pixels more on every side, begins at
multiples of the halo's step and is labelled whole. Exit 1 where more than one pixel in 10,000 differs (float32 may
round a tie the other way).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from benchmarks.common import fitted, memory, photographs
from fcn_deploy import Segmenter

TILE = 512  # of the TIFF
CELL = (360, 480)  # of the mosaic
STEP = 32  # pixels: crops begin and end at its multiples, as tiles do
ROUNDING = 1e-4  # of the pixels


class Mosaic:
    """Photographs side by side, `size` × `size` pixels, any region of which is made when it is asked for."""

    def __init__(self, size: int, data: str) -> None:
        self.size, self.stream = size, photographs(data)
        self.columns = -(-size // CELL[1])
        self.cell = lru_cache(4 * self.columns)(self._cell)

    def _cell(self, row: int, column: int) -> np.ndarray:
        index = int(np.random.default_rng((row, column)).integers(len(self.stream)))
        return fitted(self.stream.read(index), *CELL)

    def region(self, top: int, left: int, bottom: int, right: int) -> np.ndarray:
        """[bottom - top, right - left, 3] uint8."""
        out = np.empty((bottom - top, right - left, 3), np.uint8)
        for row in range(top // CELL[0], -(-bottom // CELL[0])):
            for column in range(left // CELL[1], -(-right // CELL[1])):
                y, x = row * CELL[0], column * CELL[1]
                part = self.cell(row, column)[max(top - y, 0) : bottom - y, max(left - x, 0) : right - x]
                height, width = part.shape[:2]
                out[max(y - top, 0) :, max(x - left, 0) :][:height, :width] = part
        return out

    def write(self, path: Path) -> None:
        def tiles():
            for top in range(0, self.size, TILE):
                for left in range(0, self.size, TILE):
                    part = self.region(top, left, min(top + TILE, self.size), min(left + TILE, self.size))
                    yield np.pad(part, ((0, TILE - part.shape[0]), (0, TILE - part.shape[1]), (0, 0)))

        shape = (self.size, self.size, 3)
        with tifffile.TiffWriter(path, bigtiff=True) as file:
            file.write(tiles(), shape=shape, dtype="uint8", tile=(TILE, TILE), photometric="rgb")


def watched(words: list[str], every: float = 0.05) -> tuple[float, dict[str, int], list[dict]]:
    """Run a command: its seconds, its peak of anonymous memory and of mapped files in bytes, its JSON records."""
    peak = {"anonymous": 0, "files": 0}
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(every):
            try:
                now = memory(process.pid)
            except OSError:
                return
            for name in peak:
                peak[name] = max(peak[name], now[name])

    sampler = threading.Thread(target=sample)
    sampler.start()
    out, errors = process.communicate()
    seconds = time.perf_counter() - started
    ended.set()
    sampler.join()
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if process.returncode:
        said = [record["error"] for record in records if "error" in record] or [errors.strip()]
        sys.exit(f"python -m runtime.infer failed: {said[0]}")
    return seconds, peak, records


def read_labels(path: Path) -> np.ndarray:
    """All labels, [H, W]."""
    if path.suffix in (".tif", ".tiff"):
        return tifffile.imread(path)
    Image.MAX_IMAGE_PIXELS = None
    return np.asarray(Image.open(path))


def differing(net: Segmenter, mosaic: Mosaic, labels: np.ndarray, regions: int, halo: int) -> tuple[int, int]:
    """(pixels that differ, pixels compared), in random regions; the corners of the image are among them."""
    random, size = np.random.default_rng(0), mosaic.size
    side = min(256, size)
    corners = [(0, 0), (size - side, size - side)]
    inside = [tuple(int(v) for v in random.integers(0, size - side + 1, 2)) for _ in range(regions)]
    wrong = compared = 0
    for top, left in (corners + inside)[:regions]:
        box = []
        for start in (top, left):
            end = -(-(start + side + halo) // STEP) * STEP
            box.append((max(0, (start - halo) // STEP * STEP), min(size, end)))
        (y, bottom), (x, right) = box
        expected = net(mosaic.region(y, x, bottom, right))[top - y :, left - x :][:side, :side]
        wrong += int((labels[top : top + side, left : left + side] != expected).sum())
        compared += expected.size
    return wrong, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--data", default="digits", help="photographs: a folder, a data set or digits")
    parser.add_argument("--size", type=int, default=20_000, help="pixels of a side")
    parser.add_argument("--memory", type=float, default=1.0, help="GB, as of runtime.infer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--regions", type=int, default=20, help="in which labels are compared")
    parser.add_argument("--halo", type=int, default=512, help="pixels around a region, at least the network's halo")
    parser.add_argument(
        "--folder", type=Path, help="where the mosaic (3·size² bytes) and its labels are put for a while"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    small = min(1000, options.size)
    mosaic = Mosaic(options.size, options.data)
    picture = mosaic.region(0, 0, small, small)
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as temporary,
        Segmenter(options.engine, threads=options.threads) as net,
    ):
        path, out = Path(temporary) / "mosaic.tif", Path(temporary) / "labels"
        mosaic.write(path)

        def small_times(count: int = 11) -> list[float]:
            times = []
            for _ in range(count):
                started = time.perf_counter()
                net(picture)
                times.append(time.perf_counter() - started)
            return times[1:]

        before = small_times()
        words = ["-m", "runtime.infer", str(options.engine), str(path), "-o", str(out), "--json"]
        words += ["--memory", str(options.memory), "--threads", str(options.threads)]
        seconds, peak, records = watched([sys.executable, *words])
        after = small_times()
        record = next(record for record in records if "labels" in record)
        labels = read_labels(Path(record["labels"]))
        if labels.shape != (options.size, options.size):
            sys.exit(f"labels of {labels.shape} for an image of {options.size}×{options.size}")
        wrong, compared = differing(net, mosaic, labels, options.regions, options.halo)
    small_seconds = float(np.median(before + after))
    result = {
        "engine": str(options.engine),
        "size": options.size,
        "memory_gb": options.memory,
        "threads": options.threads,
        "seconds": round(seconds, 2),
        "peak_anonymous": peak["anonymous"],
        "peak_files": peak["files"],
        "megapixels_per_s": options.size**2 / seconds / 1e6,
        "small_megapixels_per_s": small**2 / small_seconds / 1e6,
        "pixels_compared": compared,
        "pixels_differing": wrong,
        "plan": record["plan"],
    }
    result["ratio"] = result["megapixels_per_s"] / result["small_megapixels_per_s"]
    print(f"{options.engine}, {options.size}×{options.size}, --memory {options.memory}, {options.threads} threads")
    print(f"plan: {json.dumps(record['plan'])}")
    print(f"peak: {peak['anonymous'] / 1e9:.2f} GB anonymous, {peak['files'] / 1e9:.2f} GB of mapped files")
    print(
        f"{seconds:.1f} s, {result['megapixels_per_s']:.2f} megapixels/s; {small}×{small}: "
        f"{result['small_megapixels_per_s']:.2f}; ratio {result['ratio']:.3f}"
    )
    print(f"labels: {wrong} of {compared:,} pixels differ, in {options.regions} regions")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))
    sys.exit(1 if wrong > ROUNDING * compared else 0)


if __name__ == "__main__":
    main()

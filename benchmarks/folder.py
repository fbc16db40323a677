"""A folder of JPEGs labelled by python -m runtime.infer, against bare inference on arrays that are decoded already.

    python -m benchmarks.folder float32.engine int8.engine --data ../shared/camvid [--images 500] [--json folder.json]

JPEGs of mixed sizes, 97×61 to 1500×1125, are made of photographs in a temporary folder. `infer`: the command from its
start to its end, less what the same command takes for one image of 32×32 pixels (start-up). `bare`: a process that has
decoded all of them, and calls Segmenter for one after the other with the same number of threads. The two alternate, in
random order; the ratio is of their throughputs, within a round.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from fcn_deploy.runtime.images.find import find_images
from fcn_deploy.runtime.images.read import read_image
from PIL import Image

from benchmarks.common import fitted, mixed_sizes, photographs, spread
from fcn_deploy import Segmenter

LEAST, MOST = (97, 61), (1500, 1125)
TINY = (32, 32)


def bare(engine: str, folder: str, threads: int) -> None:
    """Print seconds of labelling decoded images."""
    with Segmenter(engine, threads=threads) as net:
        images = [read_image(file, net.card) for file in find_images([folder])]
        net.warmup([TINY])
        started = time.perf_counter()
        for image in images:
            net(image)
        print(time.perf_counter() - started)


def infer(engine: str, folder: Path, out: Path, threads: int) -> float:
    """Seconds of the whole command; its labels are removed."""
    words = ["-m", "runtime.infer", engine, str(folder), "-o", str(out), "--threads", str(threads), "--json"]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"python -m runtime.infer failed: {done.stderr.strip()}")
    written = [out / f"{file.stem}.png" for file in folder.iterdir()]
    if missing := [file for file in written if not file.exists()]:
        sys.exit(f"python -m runtime.infer wrote no {missing[0]}")
    for file in written:
        file.unlink()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--data", default="digits", help="photographs: a folder, a data set or digits")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bare", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        return bare(options.engines[0], options.bare, options.threads)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, tiny, out = (Path(temporary) / name for name in ("images", "tiny", "labels"))
        sizes = mixed_sizes(options.images, LEAST, MOST)
        write_jpegs(folder, sizes, options.data)
        write_jpegs(tiny, [TINY], options.data)
        random = np.random.default_rng(0)
        pixels = sum(height * width for height, width in sizes)
        print(f"{len(sizes)} JPEGs, {pixels / 1e6:.0f} megapixels, {options.threads} threads, {options.rounds} rounds")
        print(f"{'engine':<24} {'bare s':>7} {'infer s':>8} {'start-up s':>10}  ratio; whole command")

        def run_bare(engine: str) -> float:
            words = ["-m", "benchmarks.folder", engine, "--bare", str(folder), "--threads", str(options.threads)]
            done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
            return float(done.stdout)

        for engine in options.engines:
            rows = []
            for _ in range(options.rounds):
                calls = {
                    "bare": lambda engine=engine: run_bare(engine),
                    "infer": lambda engine=engine: infer(engine, folder, out, options.threads),
                    "start": lambda engine=engine: infer(engine, tiny, out, options.threads),
                }
                order = [list(calls)[index] for index in random.permutation(len(calls))]
                taken = {name: calls[name]() for name in order}
                rows.append([taken[name] for name in calls])
            results.append({"engine": engine} | compared(*np.array(rows).T))
            print(line(results[-1]), flush=True)
    if options.json:
        about = {"images": len(sizes), "pixels": pixels, "threads": options.threads, "rounds": options.rounds}
        options.json.write_text(json.dumps(about | {"engines": results}, indent=1))


def compared(bare_s: np.ndarray, infer_s: np.ndarray, start_s: np.ndarray) -> dict:
    """Medians and ranges of seconds by round, [rounds] each, and of the ratios of throughputs within a round.

    "ratio" is None where start-up alone took as long as the whole command in some round: too few images to tell.
    """
    told = (infer_s > start_s).all()
    return {
        "bare_s": spread(bare_s),
        "infer_s": spread(infer_s),
        "start_s": spread(start_s),
        "ratio": spread(bare_s / (infer_s - start_s)) if told else None,
        "ratio_with_start": spread(bare_s / infer_s),
    }


def line(row: dict) -> str:
    """A row of the table."""
    bare_s, infer_s, start_s = (row[name][0] for name in ("bare_s", "infer_s", "start_s"))
    ratio = "start-up took as long as all; take more --images"
    if row["ratio"] is not None:
        middle, low, high = row["ratio"]
        ratio = f"{middle:.3f} ({low:.3f}–{high:.3f})"
    name = Path(row["engine"]).name
    return f"{name:<24} {bare_s:7.1f} {infer_s:8.1f} {start_s:10.2f}  {ratio}; {row['ratio_with_start'][0]:.3f}"


def write_jpegs(folder: Path, sizes: list[tuple[int, int]], data: str) -> None:
    folder.mkdir()
    stream = photographs(data)
    for index, size in enumerate(sizes):
        picture = Image.fromarray(fitted(stream.read(index % len(stream)), *size))
        picture.save(folder / f"{index:05}.jpg", quality=90)


if __name__ == "__main__":
    main()

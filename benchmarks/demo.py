"""make demo: the whole job on the CPU, from training to labels for images of many sizes.

Trains a small FCN-8s on `digits`, exports it, builds an engine and labels a folder of canvases that training
never saw, by the same four command lines a user would type. Prints one table and where the pictures are.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from fcn_deploy.calibration.digits import CLASSES, canvas
from fcn_deploy.calibration.metrics import Metrics, confusion_matrix
from PIL import Image

# (height, width) → canvases: small ones hold few digits, so there are more of them.
SIZES = {
    (28, 28): 4,
    (50, 75): 4,
    (96, 96): 40,
    (101, 211): 20,
    (160, 120): 24,
    (224, 224): 16,
    (241, 353): 10,
    (480, 640): 4,
    (720, 1280): 2,
    (1125, 1500): 1,
    (1500, 2000): 1,
}
MARKER = ".fcn-deploy-demo"  # only a folder with it is emptied
SMALLEST_JUDGED = 96  # pixels: a digit fits into 96×96 and not into less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    started = time.perf_counter()
    out = options.out
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            sys.exit(f"{out} exists and was not made by this demo; choose another --out")
        shutil.rmtree(out)
    images, references = out / "images", out / "references"
    images.mkdir(parents=True)
    (out / MARKER).touch()
    references.mkdir()
    names = write_canvases(images, references)
    checkpoint, model, engine = out / "digits.safetensors", out / "digits.onnx", out / "digits.engine"
    step("train-fcn", "--data", "digits", "--epochs", str(options.epochs), "--out", checkpoint)
    step("export-onnx", checkpoint, "-o", model)
    step("build-engine", model, "--target", "cpu", "-o", engine)
    records = label(engine, images, out / "labels")

    print(f"\n{'size':>11}  {'images':>6}  {'mIoU':>6}  {'ms/image':>8}   (labels against what was drawn)")
    total = np.zeros((len(CLASSES), len(CLASSES)), np.int64)
    worst = 1.0
    for (height, width), group in names.items():
        confusion = np.zeros_like(total)
        for name in group:
            reference, predicted = (
                np.asarray(Image.open(folder / f"{name}.png")) for folder in (references, out / "labels")
            )
            confusion += confusion_matrix(reference, predicted, len(CLASSES))
        total += confusion
        miou = Metrics.of(confusion).mean_iou
        if min(height, width) >= SMALLEST_JUDGED:
            worst = min(worst, miou)
        ms = np.median([records[name]["ms"]["label"] for name in group])
        print(f"{height:>5}×{width:<5}  {len(group):>6}  {miou:6.3f}  {ms:8.1f}")
    overall = Metrics.of(total).mean_iou
    print(f"{'all':>11}  {sum(map(len, names.values())):>6}  {overall:6.3f}")
    print(f"worst size from {SMALLEST_JUDGED}×{SMALLEST_JUDGED} up: {worst:.3f}; {time.perf_counter() - started:.0f} s")
    print(f"pictures: {out / 'labels'}/*.overlay.png")


def write_canvases(images: Path, references: Path) -> dict[tuple[int, int], list[str]]:
    """Draw the held-out canvases; their names by size."""
    names: dict[tuple[int, int], list[str]] = {}
    index = 10_000  # far from the canvases that training validates on
    for (height, width), count in SIZES.items():
        for place in range(count):
            image, labels = canvas(height, width, 0, "val", index)
            name = f"{height:04}x{width:04}-{place:02}"
            Image.fromarray(image).save(images / f"{name}.png", compress_level=1)
            Image.fromarray(labels).save(references / f"{name}.png")
            names.setdefault((height, width), []).append(name)
            index += 1
    return names


def step(command: str, *arguments: object) -> None:
    """Show and run one of the command lines."""
    words = [command, *map(str, arguments)]
    print(f"\n$ {' '.join(words)}", flush=True)
    program = Path(sys.executable).parent / command
    if subprocess.run([program, *words[1:]]).returncode:
        sys.exit(f"{command} failed; the demo stops here")


def label(engine: Path, images: Path, out: Path) -> dict[str, dict]:
    """Run python -m runtime.infer; its records by image name."""
    words = ["-m", "runtime.infer", str(engine), str(images), "-o", str(out), "--overlay", "--json"]
    print(f"\n$ python {' '.join(words)}", flush=True)
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("python -m runtime.infer failed; the demo stops here")
    records = map(json.loads, done.stdout.splitlines())
    return {Path(record["file"]).stem: record for record in records if record["record"] == "image"}


if __name__ == "__main__":
    main()

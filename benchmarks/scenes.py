"""Satellite scenes: labels with and without margins compared, and files of many layouts read region by region.

    python -m benchmarks.scenes [--pixels 12000000] [--engine four-bands.engine] [--rounds 5] [--json scenes.json]

A scene of 4 bands of uint16 is drawn from a seed; 40 % of it, a margin on the left and at the top, is no data.

`labels`: the engine labels it with the margin and, the same scene, without. Beyond what the network sees around a pixel
(the halos of its stages) the labels must be equal, bit for bit, and in the margin there must be no class.

`reading`: the same pixels as .npy and as GeoTIFFs of several layouts, labelled region by region by `label_regions`, in
random order; ratios are of throughputs within a round. "read" is reading alone, without the network, in the tiles that
the engine takes. JPEG has 8 bits: it is compared with .npy of the value divided by 16, which is widened.

Without --engine one is made: an EfficientNet-Lite0 FCN-8s with random weights.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from fcn_deploy.export.build.config import BuildConfig
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.from_torch import export_module
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.fcn.architecture import Architecture
from fcn_deploy.fcn.checkpoint import card_for
from fcn_deploy.fcn.model import build_network
from fcn_deploy.runtime.images.regions import open_regions
from fcn_deploy.runtime.labelling.regions import label_regions
from fcn_deploy.runtime.network import Network

from benchmarks.common import spread

NO_DATA = 0
SHARE = 0.4  # of the scene
BANDS = 4
GEOREFERENCE = [
    (33550, "d", 3, (10.0, 10.0, 0.0), True), (33922, "d", 6, (0, 0, 0, 5e5, 5e6, 0), True),
    (34735, "H", 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), True),
    (42113, "s", 0, str(NO_DATA), True),
]  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "tiles": {"tile": (256, 256)},
    "tiles, deflate": {"tile": (256, 256), "compression": "deflate", "predictor": True},
    "tiles of planes, deflate": {"tile": (256, 256), "compression": "deflate", "predictor": True, "planar": True},
    "strips": {"rowsperstrip": 8},
    "strips, deflate": {"rowsperstrip": 8, "compression": "deflate", "predictor": True},
    "tiles, LZW": {"tile": (256, 256), "compression": "lzw", "predictor": True},
    "tiles, ZSTD": {"tile": (512, 512), "compression": "zstd", "predictor": True},
    "tiles, JPEG": {"tile": (256, 256), "compression": "jpeg"},
    "tiles of planes, JPEG": {"tile": (256, 256), "compression": "jpeg", "planar": True},
}
REFERENCE = {False: "npy", True: "npy, 8 bits"}  # of JPEGs


def scene(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint16 [H, W, BANDS] of 1 to some thousands, bool [H, W] where a margin of SHARE is)."""
    height, width = round((pixels * 3 / 4) ** 0.5), round((pixels * 4 / 3) ** 0.5)
    random = np.random.default_rng(0)
    image = np.zeros((height, width, BANDS), np.float32)
    for cell in (256, 64, 16, 4, 1):
        coarse = random.normal(size=(-(-height // cell), -(-width // cell), BANDS)).astype(np.float32)
        image += np.repeat(np.repeat(coarse, cell, 0), cell, 1)[:height, :width] * 200
    margin = np.zeros((height, width), bool)
    margin[:, : width // 4] = margin[: height // 5] = True  # 1 - 3/4 · 4/5
    return np.clip(image + 1500, 1, 10000).astype(np.uint16), margin


def make_engine(folder: Path) -> Path:
    """An engine for such scenes, whose network has random weights."""
    torch.manual_seed(0)
    model = build_network(Architecture(6, channels=BANDS)).eval()
    for layer in model.score.values():
        torch.nn.init.normal_(layer.weight, std=0.3)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # statistics of the batch that follows, without which signals die out
    with torch.no_grad():
        model.train()(torch.randn(2, BANDS, 256, 256))
    card = card_for(model.architecture, tuple(f"class {index}" for index in range(6)))
    card = replace(card, dtype="uint16", mean=(1500.0,) * BANDS, std=(450.0,) * BANDS)
    export_module(model.eval(), card, folder / "m.onnx")
    build_engine(import_model(folder / "m.onnx"), folder / "m.engine", BuildConfig(latency_sizes=((512, 512),)))
    return folder / "m.engine"


def compare_labels(net: Network, image: np.ndarray, margin: np.ndarray) -> dict[str, Any]:
    """Labels of the scene with its margin against those without, beyond what the network sees around a pixel."""
    masked = np.ma.MaskedArray(image, np.repeat(margin[:, :, None], image.shape[2], 2))
    whole, cut = net.result(image), net.result(masked)
    # Scores see so far, and interpolation reads the neighbouring cell.
    reach = sum(max(stage.halo or (0, 0)) for stage in net.stages) + 2 * net.stages[-1].stride[0]
    down, right = (int(np.argmax(~margin.all(axis=axis))) for axis in (1, 0))
    inside = slice(min(down + reach, len(image)), None), slice(min(right + reach, image.shape[1]), None)
    return {
        "pixels": margin.size,
        "no_data": float(margin.mean()),
        "reach": reach,
        "compared": whole[inside].size,
        "different": int((whole[inside] != cut[inside]).sum()),
        "classes_compared": len(np.unique(whole[inside])),
        "classes_in_no_data": int((cut[margin] != net.card.no_data).sum()),
        "data_without_class": int((cut[~margin] == net.card.no_data).sum()),
    }


def write_files(folder: Path, image: np.ndarray) -> dict[str, Path]:
    """Layout → file of the same pixels."""
    bytes_ = (image >> 4).clip(0, 255).astype(np.uint8)
    files = {"npy": folder / "scene.npy", "npy, 8 bits": folder / "bytes.npy"}
    np.save(files["npy"], image)
    np.save(files["npy, 8 bits"], bytes_)
    for index, (name, options) in enumerate(LAYOUTS.items()):
        if options.get("compression") in ("lzw", "zstd", "jpeg") and find_spec("imagecodecs") is None:
            continue
        options = dict(options)
        planar = options.pop("planar", False)
        pixels = bytes_ if options.get("compression") == "jpeg" else image
        files[name] = folder / f"scene-{index}.tif"
        tifffile.imwrite(
            files[name], np.moveaxis(pixels, 2, 0) if planar else pixels, photometric="minisblack",
            planarconfig="separate" if planar else "contig", extratags=GEOREFERENCE, **options,
        )  # fmt: skip
    return files


def read_regions(path: Path, net: Network) -> float:
    """Seconds of reading a file in the parts that the first stage takes, without running it."""
    started = time.perf_counter()
    with open_regions(path, net.card) as image:
        plan = net.plan(*image.shape[:2], bands=True, source=image)
        if not plan.grids:
            image[:, :]
        else:
            grid = plan.grids[0]
            for rows in grid.spans(0):
                for columns in grid.spans(1):
                    image[rows.outer_start : rows.outer_stop, columns.outer_start : columns.outer_stop]
    return time.perf_counter() - started


def compare_reading(net: Network, files: dict[str, Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Layout → seconds of labelling and of reading alone, and the throughput over that of .npy."""
    random = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in files}
    bare: dict[str, list[float]] = {name: [] for name in files}
    label_regions(net, files["npy"], folder / "labels.tif")  # what the first run costs
    for _ in range(rounds):
        for name in random.permutation(list(files)).tolist():
            bare[name].append(read_regions(files[name], net))
            started = time.perf_counter()
            label_regions(net, files[name], folder / "labels.tif")
            seconds[name].append(time.perf_counter() - started)
    references = {name: np.array(seconds[REFERENCE["JPEG" in name or "8 bits" in name]]) for name in files}
    return {
        name: {
            "seconds": spread(taken), "bare_s": spread(bare[name]), "ratio": spread(references[name] / np.array(taken)),
        }
        for name, taken in seconds.items()
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help=f"for {BANDS} bands of uint16")
    parser.add_argument("--pixels", type=int, default=12_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        image, margin = scene(options.pixels)
        with Network(options.engine or make_engine(folder), threads=options.threads) as net:
            labels = compare_labels(net, image, margin)
            print(
                f"{labels['pixels'] / 1e6:.1f} megapixels, {labels['no_data']:.0%} without data: "
                f"{labels['different']} of {labels['compared']} labels differ beyond {labels['reach']} pixels from the "
                f"margin ({labels['classes_compared']} classes); {labels['classes_in_no_data']} pixels of the margin "
                f"have a class, and {labels['data_without_class']} of the rest none",
                flush=True,
            )
            image[margin] = NO_DATA
            files = write_files(folder, image)
            reading = compare_reading(net, files, folder, options.rounds)
    print(f"{'layout':<26} {'label s':>8} {'read s':>7}  throughput over .npy's")
    for name, row in reading.items():
        middle, low, high = row["ratio"]
        print(f"{name:<26} {row['seconds'][0]:8.2f} {row['bare_s'][0]:7.2f}  {middle:.3f} ({low:.3f}–{high:.3f})")
    if options.json:
        options.json.write_text(json.dumps({"labels": labels, "reading": reading}, indent=1))
    if labels["different"] or labels["classes_in_no_data"] or labels["data_without_class"]:
        raise SystemExit("labels are not those of the scene without margins")


if __name__ == "__main__":
    main()

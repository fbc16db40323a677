"""Networks of segmentation_models.pytorch, torchvision, transformers, MONAI, nnU-Net, pytorchcv, exported and built.

    python -m benchmarks.zoo_matrix [--only smp-unet,monai] [--env build/zoo] [--seconds 600] [--jobs 2] [--int8]

The libraries are put into an environment of their own, which sees this one's packages: torchvision of the release that
goes with this torch, without torch's dependencies, so that nothing brings CUDA. Weights are random (seeded). Each
network is exported and built in a process of its own, on one thread, in bounded memory and a bounded time of the
processor, so that a busy machine takes no row away. What is refused is tried again with the one option that OPTIONS has
for it. Labels are compared with PyTorch's at UNSEEN sizes wherever scores are clear; times are the engine's over those
of ONNX Runtime on the same ONNX. With --int8: INT8 for CPUs with no layer in float, calibrated and judged on noise as
photographs have, and how many of the classes lose more than 2 points of IoU against float32. What is found is kept in
--rows, and is not made again. Exits with 1 where a network is neither taken nor refused in one line.
"""

import argparse
import json
import os
import re
import resource
import site
import subprocess
import sys
import tempfile
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
LIBRARIES = (
    "segmentation_models_pytorch==0.6.0", "timm==1.0.31", "transformers==5.24.0", "monai==1.6.1", "pytorchcv==0.0.74",
    "einops", "huggingface_hub", "safetensors", "tokenizers", "tqdm", "pyyaml", "requests", "filelock", "regex",
    "packaging", "httpx2", "httpcore2", "truststore", "anyio", "sniffio", "h11", "idna", "certifi", "fsspec",
    "charset-normalizer", "urllib3", "click", "dynamic-network-architectures==0.4.4",
)  # fmt: skip
SIZES = ((224, 224), (97, 131), (320, 256))
UNSEEN = 30  # sizes at which labels are compared with PyTorch's
WAITED = 20  # times the processor's seconds that a row may wait for, on a machine that does other things
ROUNDS = 5
LONGEST = 300  # characters of a refusal
OPTIONS: dict[str, dict[str, Any]] = {  # network → the one option that it is taken with
    "hf-dpt": {"fit": "384x384"}, "monai-unetr": {"fit": "96x96"}, "cv-bisenet": {"fit": "640x480"},
}  # fmt: skip
CALIBRATED, JUDGED, NOISE = 12, 6, (192, 256)  # images of INT8, and their size
LOST = 2.0  # points of IoU that a class may lose unnamed


class Limits(NamedTuple):
    """What the process of a row may take: seconds of the processor, and gigabytes of memory of its own."""

    seconds: int
    memory: float

    def set(self) -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (self.seconds, self.seconds))
        resource.setrlimit(resource.RLIMIT_DATA, (int(1e9 * self.memory),) * 2)


def environment(folder: Path) -> Path:
    """The Python of an environment with the libraries, made where it is not there."""
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    if (folder / "ready").exists():
        return python
    venv.create(folder, clear=True)
    import torch

    minor = int(torch.__version__.split(".")[1])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", packages, f"torchvision==0.{minor + 15}.*", *LIBRARIES], check=True)
    # Packages of this environment, editable ones too, after its own.
    paths = [path for path in site.getsitepackages() if Path(path).is_dir()]
    (packages / "zz_outer.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in paths))
    (folder / "ready").touch()
    return python


def row(name: str, option: dict[str, Any], onnx: Path) -> dict[str, Any]:
    """What becomes of one network: exported to a file, built, run beside ONNX Runtime."""
    from fcn_deploy.export.analysis.near_ties import picks_places
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.from_torch import export_module
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.export.importer.options import ImportOptions
    from fcn_deploy.fcn.foreign import likely_sizes, scores_of
    from onnx import load

    from benchmarks.zoo_networks import network
    from fcn_deploy import Segmenter

    model, notes = network(name), []
    with tempfile.TemporaryDirectory() as scratch:
        engine, start = Path(scratch) / "m.engine", time.process_time()
        options = ImportOptions(**option)
        card, differences = export_module(model, None, onnx, name=name, options=options, note=notes.append)
        exported = time.process_time()
        fitted = next((note for note in notes if "padded to them" in note or "images are resized" in note), "")
        multiple = int(found[1]) if (found := re.search(r"multiples of (\d+)", fitted)) else 1
        smallest = int(found[1]) if (found := re.search(r"(?:from|sides below) (\d+)", fitted)) else card.smallest
        build_engine(import_model(onnx), engine, BuildConfig(latency_sizes=SIZES[:1], threads=1))
        built = time.process_time()
        with Segmenter(engine, threads=1) as net:
            manifest = net.network.manifest
            module = scores_of(model, name, sizes=likely_sizes(model))
            whole = next((stage.whole for stage in manifest.stages if stage.halo is None), "")
            picks = picks_places(load(onnx))
            wrong, compared = wrong_labels(net, module, multiple, smallest, options.fit_size, picks)
            ratio = time_ratio(net, onnx, card)
    by = next((note for note in notes if "is exported by" in note), "torchscript")
    return {
        "network": name,
        "option": " ".join(f"{key}={value}" for key, value in option.items()),
        "exporter": "dynamo" if "by dynamo;" in by or "program" in by else "torchscript",
        "multiple": multiple,
        "fit": "resize" if "resized" in fitted else "pad" if fitted else "",
        "stride": card.stride,
        "worst": max(difference.logits for difference in differences),
        "whole": whole,
        "passes": manifest.pooled is not None,
        "wrong_labels": wrong,
        "sizes_compared": compared,
        "export_seconds": exported - start,
        "build_seconds": built - exported,
        "time": ratio,
    }


def time_ratio(net: Any, onnx: Path, card: Any) -> float:
    """The engine's time over that of ONNX Runtime on the same ONNX, at the first of SIZES, best runs of one thread."""
    import numpy as np
    import onnxruntime
    from fcn_deploy.runtime.pixels.prepare import prepare

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    plain = onnxruntime.InferenceSession(onnx, options)
    image = np.random.default_rng(0).integers(0, 256, (*SIZES[0], card.channels), np.uint8)
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(ROUNDS):  # one after the other, so that what else the machine does counts for both
        begin = time.perf_counter()
        net(image)
        middle = time.perf_counter()
        plain.run(None, {"image": prepare(image, card)})[0].argmax(1)
        times["ours"].append(middle - begin)
        times["plain"].append(time.perf_counter() - middle)
    return min(times["ours"]) / min(times["plain"])


def int8_of(onnx: Path) -> dict[str, Any]:
    """What INT8 costs where no layer goes back to float: the labels that stay, and the classes that lose over LOST."""
    from fcn_deploy.export.build.core import core_of, optimise_offline
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.export.passes.fuse_padding import fuse_padding
    from fcn_deploy.export.passes.pooling_as_convolution import pooling_as_convolution
    from fcn_deploy.export.quantization.mixed_precision import mix_precision
    from fcn_deploy.export.quantization.options import QuantizationOptions
    from fcn_deploy.runtime.pixels.noise_image import natural_noise
    from PIL import Image

    core = core_of(import_model(onnx))
    lowered = fuse_padding(pooling_as_convolution(optimise_offline(core.model)).model).model
    with tempfile.TemporaryDirectory() as images:
        for index in range(CALIBRATED + JUDGED):
            Image.fromarray(natural_noise(*NOISE, core.card, seed=index)).save(Path(images) / f"{index}.png")
        options = QuantizationOptions(int8=True, calib=images, count=CALIBRATED, max_drop=100, max_class_drop=100)
        mixed = mix_precision(lowered, core.upsampling, core.card, "cpu", options)
    judged = mixed.gate.measure(mixed.emulated)
    return {
        "agreement": judged.value,
        "classes": len(judged.lost),
        "losing": {core.card.classes[index]: lost for index, lost in judged.lost.items() if lost > LOST},
    }


def wrong_labels(net: Any, module: Any, multiple: int, smallest: int, only: Any, picks: bool) -> tuple[int, int]:
    """(pixels with clear scores that have another label than the module's, at how many of UNSEEN sizes it was asked).

    Scores that are coarse are enlarged in PyTorch, bilinearly. What the export does with sizes that the module does not
    take by itself has no counterpart in PyTorch. `only`: the one size that it takes, where it takes one. `picks`: the
    places of maxima matter, so that the module's own label may be another where rounding is.
    """
    import numpy as np
    import torch
    from fcn_deploy.export.analysis.near_ties import rounded_otherwise
    from fcn_deploy.export.build.parity import decided
    from fcn_deploy.fcn.architecture import upsample
    from fcn_deploy.runtime.pixels.noise_image import natural_noise
    from fcn_deploy.runtime.pixels.prepare import prepare

    def scores_at(given: np.ndarray) -> np.ndarray:
        sides = given.shape[2:]
        with torch.inference_mode():
            scores = module(torch.from_numpy(np.ascontiguousarray(given)))
            if tuple(scores.shape[2:]) == tuple(-(-side // card.stride) for side in sides):
                scores = upsample(scores, card.stride)[:, :, : sides[0], : sides[1]]
        return scores[0].numpy()

    random, card, wrong, compared = np.random.default_rng(1), net.card, 0, 0
    for index in range(1 if only else UNSEEN):
        sides = only or [int(side) for side in random.integers(40, 200, 2)]
        height, width = (max(-(-side // multiple) * multiple, smallest) for side in sides)
        image = natural_noise(height, width, card, seed=index)
        given = prepare(image, card)
        try:
            scores = scores_at(given)
        except Exception:  # of whatever the module is
            continue
        if scores.shape[1:] != (height, width) or len(scores) < 2:
            continue
        compared += 1
        found = net(image)
        differs = (found != scores.argmax(0)) & decided(scores, card)
        for others in rounded_otherwise(given) if picks else ():
            if not differs.any():
                break
            differs &= found != scores_at(others).argmax(0)
        wrong += int(differs.sum())
    return wrong, compared


def tried(python: Path, name: str, rows: Path, limits: Limits) -> dict[str, Any]:
    """A row, made in a process of its own unless it is kept; where it is refused, with its one option."""
    found = attempt(python, name, rows, limits)
    if not found.get("refused") or name not in OPTIONS:
        return found
    return attempt(python, name, rows, limits, option=OPTIONS[name]) | {"without": found["error"]}


def attempt(python: Path, name: str, rows: Path, limits: Limits, **more: Any) -> dict[str, Any]:
    """What a process says of a network, within `limits`; kept beside its ONNX."""
    kept = rows / f"{name}{''.join(f'-{key}' for key in more)}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [
        str(python),
        "-m",
        "benchmarks.zoo_matrix",
        "--row",
        name,
        "--rows",
        str(rows),
        "--more",
        json.dumps(more),
    ]
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limits.set,
    )
    try:
        out, errors = process.communicate(timeout=WAITED * limits.seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
    lines = [line for line in out.splitlines() if line.startswith('{"network"')]
    if lines:
        found = json.loads(lines[-1])
    else:
        words = errors.strip().splitlines() or ["it ended without a word"]
        said = words[-1] if process.returncode >= 0 else f"unfinished after {limits.seconds} s of the processor"
        found = {"network": name, "error": said, "refused": False}
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


def as_text(found: dict[str, Any]) -> str:
    """A row of the table, in Markdown."""
    name = found["network"]
    if "error" in found:
        return f"| {name} | {'refused' if found['refused'] else 'FAILED'}: {found['error']} |"
    several = f"{found['fit']} {found['multiple']}" if found["multiple"] > 1 else "every size"
    sizes = "one" if "fit=" in found["option"] else several
    whole = found["whole"].split(" ")[0]
    tiles = "exact" if not whole else f"exact, by passes ({whole})" if found["passes"] else f"none: {whole}"
    labels = f"{found['wrong_labels']} at {found['sizes_compared']}"
    int8 = "" if "int8" not in found else found["int8"].get("error", "")
    if int8 == "" and "int8" in found:
        losing = f"{len(found['int8']['losing'])} of {found['int8']['classes']}" if found["int8"]["losing"] else "none"
        int8 = f"{100 * found['int8']['agreement']:.1f} %, {losing}"
    cells = (
        name, found["exporter"], sizes, found["option"] or "none", f"{found['worst']:.0e}", labels, tiles, int8,
        f"× {found['time']:.2f}", f"{found['export_seconds']:.0f} + {found['build_seconds']:.0f} s",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEADER = (
    "network", "exporter", "sizes", "option", "scores differ by", "wrong labels at unseen sizes", "tiles",
    "INT8 agrees; classes that lose", "time", "export + build",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    build = HERE.parent / "build"
    parser.add_argument("--only", default="", help="beginnings of names, with commas")
    parser.add_argument("--env", type=Path, default=build / "zoo", help="of the libraries; made where it is not there")
    parser.add_argument("--rows", type=Path, default=build / "zoo-rows", help="a folder, where what is found is kept")
    parser.add_argument("--seconds", type=int, default=600, help="of the processor that one network may take")
    parser.add_argument("--memory", type=float, default=6, help="in gigabytes, that one network may take")
    parser.add_argument("--jobs", type=int, default=1, help="networks at once")
    parser.add_argument("--int8", action="store_true", help="with INT8")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--more", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(one(given.row, given.rows / f"{given.row}.onnx", **given.more)))
        return 0
    from benchmarks.zoo_networks import NETWORKS

    python, rows = environment(given.env), []
    given.rows.mkdir(parents=True, exist_ok=True)
    limits = Limits(given.seconds, given.memory)
    names = [name for name in NETWORKS if name.startswith(tuple(given.only.split(",")))]

    def found_of(name: str) -> dict[str, Any]:
        found = tried(python, name, given.rows, limits)
        if given.int8 and "error" not in found:
            found["int8"] = attempt(python, name, given.rows, limits, int8=True)
        return found

    with ThreadPoolExecutor(given.jobs) as pool:
        for found in pool.map(found_of, names):
            rows.append(found)
            print(as_text(found), flush=True)
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", *map(as_text, rows), sep="\n")
    taken = [found for found in rows if "error" not in found]
    plain = sum(not found["option"] for found in taken)
    print(f"\n{plain} of {len(rows)} are taken with no option, {len(taken)} with one at most")
    return int(any("error" in found and not found["refused"] for found in rows))


def one(name: str, onnx: Path, option: dict[str, Any] | None = None, int8: bool = False) -> dict[str, Any]:
    """What is found of a network, or why it is refused."""
    from fcn_deploy import DeployError

    try:
        return {"network": name} | (int8_of(onnx) if int8 else row(name, option or {}, onnx))
    except DeployError as error:
        said = str(error)
        return {"network": name, "error": said, "refused": len(said) <= LONGEST}


if __name__ == "__main__":
    sys.exit(main())

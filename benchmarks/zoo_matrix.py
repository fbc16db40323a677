"""Networks of segmentation_models.pytorch, torchvision, transformers, MONAI and pytorchcv, exported and built: a table.

    python -m benchmarks.zoo_matrix [--only smp-unet,monai] [--env build/zoo] [--seconds 600] [--json FILE]

The libraries are put into an environment of their own, which sees this one's packages: torchvision of the release that
goes with this torch, without torch's dependencies, so that nothing brings CUDA. Weights are random (seeded). Each
network is exported and built in a process of its own, on one thread, in a bounded time of the processor, so that a busy
machine takes no row away. Its labels are compared with PyTorch's at UNSEEN sizes wherever scores are clear; the last
column is the engine's time over that of ONNX Runtime on the same ONNX. Exits with 1 where a network is neither taken
nor refused in one line.
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
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = (
    "segmentation_models_pytorch==0.6.0", "timm==1.0.31", "transformers==5.24.0", "monai==1.6.1", "pytorchcv==0.0.74",
    "einops", "huggingface_hub", "safetensors", "tokenizers", "tqdm", "pyyaml", "requests", "filelock", "regex",
    "packaging", "httpx2", "httpcore2", "truststore", "anyio", "sniffio", "h11", "idna", "certifi", "fsspec",
    "charset-normalizer", "urllib3", "click",
)  # fmt: skip
SIZES = ((224, 224), (97, 131), (320, 256))
UNSEEN = 30  # sizes at which labels are compared with PyTorch's
WAITED = 20  # times the processor's seconds that a row may wait for, on a machine that does other things
ROUNDS = 5


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


def row(name: str) -> dict[str, Any]:
    """What becomes of one network: exported, built, run beside ONNX Runtime."""
    import numpy as np
    import onnxruntime
    from fcn_deploy.export.build.config import BuildConfig
    from fcn_deploy.export.build.engine import build_engine
    from fcn_deploy.export.from_torch import export_module
    from fcn_deploy.export.importer.import_model import import_model
    from fcn_deploy.fcn.foreign import scores_of
    from fcn_deploy.runtime.prepare import prepare

    from benchmarks.zoo_networks import network
    from fcn_deploy import Segmenter

    model, notes = network(name), []
    with tempfile.TemporaryDirectory() as scratch:
        onnx, engine, start = Path(scratch) / "m.onnx", Path(scratch) / "m.engine", time.perf_counter()
        card, differences = export_module(model, None, onnx, name=name, note=notes.append)
        exported = time.perf_counter()
        build_engine(import_model(onnx), engine, BuildConfig(latency_sizes=SIZES[:1], threads=1))
        built = time.perf_counter()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        plain = onnxruntime.InferenceSession(onnx, options)
        times: dict[str, list[float]] = {"ours": [], "plain": []}
        with Segmenter(engine, threads=1) as net:
            whole = next((stage.whole for stage in net.network.manifest.stages if stage.halo is None), "")
            wrong, compared = wrong_labels(net, scores_of(model, name), card)
            for _ in range(ROUNDS):  # one after the other, so that what else the machine does counts for both
                for size in SIZES:
                    image = np.random.default_rng(0).integers(0, 256, (*size, card.channels), np.uint8)
                    begin = time.perf_counter()
                    net(image)
                    middle = time.perf_counter()
                    plain.run(None, {"image": prepare(image, card)})[0].argmax(1)
                    times["ours"].append(middle - begin)
                    times["plain"].append(time.perf_counter() - middle)
    by = next((note for note in notes if "is exported by" in note), "torchscript")
    fitted = next((note for note in notes if "padded to them" in note or "images are resized" in note), "")
    return {
        "network": name,
        "exporter": "dynamo" if "by dynamo;" in by or "program" in by else "torchscript",
        "multiple": int(found[1]) if (found := re.search(r"multiples of (\d+)", fitted)) else 1,
        "fit": "resize" if "resized" in fitted else "pad" if fitted else "",
        "stride": card.stride,
        "worst": max(difference.logits for difference in differences),
        "whole": whole,
        "wrong_labels": wrong,
        "sizes_compared": compared,
        "export_seconds": exported - start,
        "build_seconds": built - exported,
        "time": min(times["ours"][:: len(SIZES)]) / min(times["plain"][:: len(SIZES)]),
    }


def wrong_labels(net: Any, module: Any, card: Any) -> tuple[int, int]:
    """(pixels with clear scores that have another label than the module's, at how many of UNSEEN sizes it was asked).

    What the export does with sizes that the module does not take by itself has no counterpart in PyTorch.
    """
    import numpy as np
    import torch
    from fcn_deploy.export.build.parity import decided
    from fcn_deploy.runtime.noise_image import natural_noise
    from fcn_deploy.runtime.prepare import prepare

    random, multiple, wrong, compared = np.random.default_rng(1), card.size_multiple, 0, 0
    for index in range(UNSEEN):
        sides = (int(side) for side in random.integers(40, 200, 2))
        height, width = (max(-(-side // multiple) * multiple, card.smallest) for side in sides)
        image = natural_noise(height, width, card, seed=index)
        try:
            with torch.inference_mode():
                scores = module(torch.from_numpy(np.ascontiguousarray(prepare(image, card))))
        except Exception:  # of whatever the module is
            continue
        if scores.shape[2:] != (height, width) or scores.shape[1] < 2:
            continue
        compared += 1
        scores = scores[0].numpy()
        wrong += int((net(image) != scores.argmax(0))[decided(scores, card)].sum())
    return wrong, compared


def tried(python: Path, name: str, seconds: int) -> dict[str, Any]:
    """A row, made in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [str(python), "-m", "benchmarks.zoo_matrix", "--row", name]
    unfinished = {"network": name, "error": f"unfinished after {seconds} s of the processor", "refused": False}
    try:
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=WAITED * seconds,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds)),
        )
    except subprocess.TimeoutExpired:
        return unfinished
    if done.returncode < 0 and not done.stderr.strip():  # ended by the limit
        return unfinished
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"network"')]
    last = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
    return json.loads(lines[-1]) if lines else {"network": name, "error": last[0], "refused": False}


def as_text(found: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in found:
        return f"{found['network']:26} {'refused' if found['refused'] else 'FAILED'}: {found['error'][:200]}"
    fit = f"{found['fit']} {found['multiple']}" if found["fit"] else "every size"
    tiles = "tiles" if not found["whole"] else f"whole: {found['whole'].split()[0]}"
    wrong = f"{found['wrong_labels']} wrong labels at {found['sizes_compared']} sizes"
    return (
        f"{found['network']:26} {found['exporter']:12} {fit:12} stride {found['stride']:2}  {found['worst']:.0e}  "
        f"{wrong:26} {tiles:32} {found['export_seconds']:5.0f} s {found['build_seconds']:5.0f} s  × {found['time']:.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="beginnings of names, with commas")
    parser.add_argument("--env", type=Path, default=HERE.parent / "build" / "zoo")
    parser.add_argument("--seconds", type=int, default=600, help="of the processor that one network may take")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        from fcn_deploy import DeployError

        try:
            found = row(given.row)
        except DeployError as error:
            found = {"network": given.row, "error": str(error), "refused": True}
        print(json.dumps(found))
        return 0
    from benchmarks.zoo_networks import NETWORKS

    python, rows = environment(given.env), []
    for name in NETWORKS:
        if name.startswith(tuple(given.only.split(","))):
            rows.append(tried(python, name, given.seconds))
            print(as_text(rows[-1]), flush=True)
    taken = sum("error" not in found for found in rows)
    print(f"{taken} of {len(rows)} are taken with no option")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("error" in found and not found["refused"] for found in rows))


if __name__ == "__main__":
    sys.exit(main())

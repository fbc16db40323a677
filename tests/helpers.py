"""Functions the tests share."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import preloaded
import pytest
from fcn_deploy.fcn import backbones
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BIN = Path(sys.executable).parent
# Commands that load PyTorch or onnx, or measure.
FORKED = ("train-fcn", "eval-fcn", "export-onnx", "build-engine", "verify-engine")


# Every network of ours, as arguments of random_network.
FAMILY = [
    {"backbone": name, "stride": stride, "upsampling": upsampling}
    for name in backbones.NAMES
    for stride in ((32,) if name == "alexnet" else (32, 16, 8))
    for upsampling in ("fixed", "learned")
] + [{"arch": "dilated8", "backbone": "resnet50"}]
# One of each backbone, with strides and upsamplings in turn: where building all of them would take minutes.
_OF_EACH = [[family for family in FAMILY[:-1] if family["backbone"] == name] for name in backbones.NAMES]
FAMILY_IN_TURN = [choices[-place % len(choices)] for place, choices in enumerate(_OF_EACH)] + FAMILY[-1:]


def needs_shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is not at hand; put it beside the project")
    return path


# The extra that brings a part which tests can do without.
EXTRAS = {
    "tensorrt_rtx": "rtx",
    "openvino": "openvino",
    "av": "video",
    "radon": "dev",
    "rasterio": "gdal",
    "imagecodecs": "tiff",
    "pyogrio": "gdal",
    "rio_cogeo": "dev",
    "pyproj": "dev",
    "scipy": "instances",
    "starlette": "serve",
    "grpc": "serve",
    "tritonclient": "dev",
    "moto": "dev",
    "ray": "ray",
    "fsspec": "cloud",
    "gcsfs": "cloud",
    "s3fs": "cloud",
    "aiohttp": "cloud",
    "pyarrow": "cloud",
    "schemathesis": "dev",
    "pycocotools": "dev",
}


def needs(module: str):
    """An optional module; the test is skipped, and says what to install, where it is not at hand."""
    extra = EXTRAS[module.partition(".")[0]]
    return pytest.importorskip(module, reason=f"{module} is not installed; pip install 'fcn-deploy[{extra}]'")


def random_network(seed: int = 0, **architecture):
    """A narrow network with random weights, statistics that fit them, and labels of all classes."""
    import torch
    from fcn_deploy.fcn.architecture import Architecture
    from fcn_deploy.fcn.model import build_network

    torch.manual_seed(seed)
    model = build_network(Architecture(**({"classes": 5, "width": 0.25} | architecture)))
    layers = model.score.values() if hasattr(model, "score") else [*model.classifier.children()][-1:]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=0.5)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # a true mean over the batches that follow
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(2, model.architecture.channels, 96, 96))
    return model.eval()


def multiples_of(multiple: int):
    """A card of a network whose images are padded to multiples of this."""
    from fcn_deploy import ModelCard

    return ModelCard(("a", "b"), size_multiple=multiple)


def checkpoint_of(model, **card):
    from dataclasses import replace

    from fcn_deploy.fcn.checkpoint import Checkpoint, card_for

    names = tuple(f"class {index}" for index in range(model.architecture.classes))
    return Checkpoint(model, replace(card_for(model.architecture, names), **card))


def finished(program: Sequence[object], ok: int = 0, cwd: Path | None = None, env: dict | None = None):
    """Run a program to its end and check its exit code. Without a limit of time: a slow machine fails no test."""
    done = subprocess.run(
        [*map(str, program)], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}
    )
    return _checked(done, ok)


def _checked(done, ok: int):
    assert done.returncode == ok, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def command(*words: object, ok: int = 0, cwd: Path | None = None, env: dict | None = None, measured: bool = False):
    """Run one of the command lines (`infer` is python -m runtime.infer) and check its exit code.

    `measured`: build-engine and verify-engine measure for as long as they do for their users, in large images too.
    """
    name, *rest = words
    if name in FORKED and env is None:
        return _checked(preloaded.run([str(BIN / name), *map(str, rest)], cwd, measured), ok)
    program = [sys.executable, "-m", "runtime.infer"] if name == "infer" else [BIN / str(name)]
    return finished([*program, *rest], ok, cwd, env)


def benchmark(name: str, *words: object, ok: int = 0) -> str:
    """What one of the benchmarks prints."""
    return _checked(preloaded.run(["-m", f"benchmarks.{name}", *map(str, words)], ROOT), ok).stdout


def label_records(done) -> list[dict]:
    """What label-images --json said of each file; its last record, the summary, must agree with them."""
    *records, summary = map(json.loads, done.stdout.splitlines())
    assert summary["record"] == "summary" and {record["record"] for record in records} <= {"image", "video"}
    counts = {"labelled": "size", "skipped": "skipped", "failed": "error"}
    for count, field in counts.items():
        assert summary[count] == sum(field in record for record in records)
    assert summary["files"] == len(records) and summary["seconds"] > 0
    return records


def one_error(done) -> str:
    """The single line a command failed with."""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "error: " in lines[0], done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines[0]) <= 300, (len(lines[0]), lines[0])
    assert not re.search(r"\.(cc|cpp|h):\d+|site-packages/", lines[0]), lines[0]
    return lines[0]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image with detail at many scales, [H, W, 3] uint8."""
    from fcn_deploy.runtime.pixels.noise_image import natural_noise

    from fcn_deploy import ModelCard

    return natural_noise(height, width, ModelCard(("a", "b")), seed)


def window(scores, padded, size, rows=None, first=0, cells=None):
    """Scores as a ScoreWindow: of all rows unless `rows` says otherwise, from the score map's row `first` on."""
    from fcn_deploy.runtime.head.score_window import ScoreWindow

    return ScoreWindow(scores, padded, size, rows or (0, size[0]), first, cells or scores.shape[1])


def save_photos(folder: Path, sizes: Iterable[tuple[int, int]], name: str = "{}.png") -> None:
    """Write a photo of each size, numbered from 0; the folder is made where there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        Image.fromarray(photo(*size, index)).save(folder / name.format(index))


def check_threads(net, images) -> None:
    """Labels by a Segmenter that eight threads share are those that it gives alone."""
    alone = [net(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for labels, expected in zip(pool.map(net, images), alone, strict=True):
                np.testing.assert_array_equal(labels, expected)


def onnx_model(
    nodes,
    constants=None,
    *,
    takes=("N", 3, "H", "W"),
    gives=("N", "K", "h", "w"),
    names=("image", "scores"),
    types=(TensorProto.FLOAT, TensorProto.FLOAT),
    opset=18,
    domain="",
) -> onnx.ModelProto:
    """A model of one input and one output from its nodes and constants (name → values); not checked.

    Args:
        takes, gives: shapes of the input and the output; None is unknown.
        names, types: of the two.
        domain: another that its nodes come from.
    """
    (taken, given), (took, gave) = names, types
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(taken, took, takes)],
        [helper.make_tensor_value_info(given, gave, gives)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="test")


def run_onnx(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    """The first output of a model of one input, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: image})[0]


class ReadPage(HTMLParser):
    """The tags of a page, its tables as rows of text, and the attributes of its pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.inside = ""
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.rows, self.caption = [], ""
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("td", "th", "caption", "style", "title"):
            self.inside = tag

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self.caption.strip()] = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.inside == "caption":
            self.caption += data
        if self.inside != "style":
            self.words.append(data)

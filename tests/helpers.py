"""Functions the tests share."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.fcn import backbones

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
BIN = Path(sys.executable).parent


# Every network of ours, as arguments of random_network.
FAMILY = [
    {"backbone": name, "stride": stride, "upsampling": upsampling}
    for name in backbones.NAMES
    for stride in ((32,) if name == "alexnet" else (32, 16, 8))
    for upsampling in ("fixed", "learned")
] + [{"arch": "dilated8", "backbone": "resnet50"}]


def needs_shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"../shared/{name} is not at hand; put it beside the project")
    return path


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


def command(*words: object, ok: int = 0, cwd: Path | None = None, env: dict | None = None):
    """Run one of the command lines (`infer` is python -m runtime.infer) and check its exit code."""
    name, *rest = map(str, words)
    program = [sys.executable, "-m", "runtime.infer"] if name == "infer" else [BIN / name]
    done = subprocess.run(
        [*program, *rest], capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=600
    )
    assert done.returncode == ok, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


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
    return lines[0]


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An image with detail at many scales, [H, W, 3] uint8."""
    from fcn_deploy.runtime.verify import natural_noise

    from fcn_deploy import ModelCard

    return natural_noise(height, width, ModelCard(("a", "b")), seed)


def window(scores, padded, size, rows=None, first=0, cells=None):
    """Scores as a ScoreWindow: of all rows unless `rows` says otherwise, from the score map's row `first` on."""
    from fcn_deploy.runtime.upsampling import ScoreWindow

    return ScoreWindow(scores, padded, size, rows or (0, size[0]), first, cells or scores.shape[1])


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

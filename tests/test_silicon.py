"""make silicon, on the simulated GPU: all that is measured on a real one runs, and what is wrong is said."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from fcn_deploy.export.build import gpus
from gpu_engines import KERNELS
from gpu_sim import silicon as simulated
from helpers import ROOT, needs, one_error, photo

from benchmarks.silicon import __main__ as silicon
from benchmarks.silicon import build as silicon_build
from benchmarks.silicon import engine as silicon_engine
from benchmarks.silicon import kernels as silicon_kernels
from benchmarks.silicon import page as silicon_page
from benchmarks.silicon import pytorch as silicon_torch
from fcn_deploy import DeployError, MisuseError, ModelCard, Segmenter


@pytest.fixture
def stand_ins(gpu, tmp_path):
    needs("tensorrt_rtx")
    gpu.load_kernels(KERNELS)
    with simulated.stand_ins(tmp_path):
        yield simulated.SMALL


@pytest.mark.slow
def test_the_whole_command_runs_on_a_gpu_from_training_to_the_page(stand_ins, monkeypatch, capfd, tmp_path):
    for name, value in (stand_ins | {
        "PRECISIONS": {"int8": {"int8": True, "fp16": True}, "fp8": {"fp8": True}},  # gpu_sim.silicon has all
        "NEAREST": ("asymmetric floor", "half_pixel round_prefer_ceil"),
    }).items():  # fmt: skip
        monkeypatch.setattr(silicon_build, name, value)
    monkeypatch.setattr(silicon_build, "LEAST_GPU", {"fp8": "sm120"})  # a type that this GPU has not
    monkeypatch.setattr(gpus, "LEAST_GPU", {"fp8": "sm120"})
    out = tmp_path / "a.json"
    assert silicon.main(out, 0.5, 6, 60) == 0, capfd.readouterr().out
    record = json.loads(out.read_text())
    assert all(part["ok"] for part in record.values())
    assert record["machine"]["target"] == "sm89" and record["machine"]["driver"] == "CUDA 13.0"
    for library in simulated.LIBRARIES:
        name = f"int8 by {library}"
        labels, threads = record[f"labels, {name}"], record[f"8 threads, {name}"]
        assert labels["images"] == 6 and labels["share"] <= labels["allowed"] and len(labels["miou"]) == 2
        assert threads["calls"] > 0 and not threads["errors"] and record[f"golden sample, {name}"]["calls_equal"] == 1
        assert record[f"latency, {name}"]["rows"][0]["network_ms"] > 0
        assert f"fp8 is refused for {record['machine']['target']}" in record[f"build, fp8 by {library}"]["skipped"]
        assert "at least 100.00% of labels" in record[f"sanitizer, {name}"]["said"][0]
        ways = record[f"nearest neighbours, {library}"]["ways"]
        assert ways["asymmetric floor"] == "equal"
        assert "on this GPU its golden sample differs by" in ways["half_pixel round_prefer_ceil"]
    assert "finds no GPU; install one that is built for CUDA" in record["PyTorch"]["skipped"]
    kernels = record["kernels"]["rows"]
    # Four types of images by two of inputs, and two of scores by two of labels in five ways; some at the largest.
    assert len(kernels) == 8 * 2 + 2 + 2 * 2 * 5 * 2 + 2 and all(row["equal"] for row in kernels)
    assert [60, 60] in [row["size"] for row in kernels]
    page = out.with_suffix(".html").read_text()
    assert page.count("<section") == 6 and "Simulated GPU" in page and "WRONG" not in page
    assert "int8 by tensorrt: the bare network" in page and "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("code", "limit", "said"),
    [
        (
            "import os, sys; print('the library gave up', file=sys.stderr, flush=True); os.abort()",
            60,
            "signal 6.*gave up",
        ),
        ("import time; time.sleep(60)", 0.5, "its process was ended after 0.5 s"),
    ],
)
def test_an_engine_that_breaks_off_costs_its_own_parts_alone(monkeypatch, capsys, code, limit, said):
    monkeypatch.setattr(silicon_engine, "PYTHON", (sys.executable, "-c", code))
    monkeypatch.setattr(silicon_engine, "LIMIT", limit)
    record = silicon_engine.apart(silicon_engine.Job("fp8", "m.engine", "folder", seconds=0))
    assert len(record) == 4 and all(not part["ok"] and re.search(said, part["error"]) for part in record.values())
    page = silicon_page.page({"machine": {"ok": True}} | record)
    assert "<li>golden sample, fp8: error: its process" in page


def test_a_part_that_fails_in_any_way_is_told_and_the_others_run(capsys):
    def skipped():
        raise silicon_engine.SkippedError("not here")

    kept = []
    parts = {"a": lambda: [][1], "b": skipped, "c": lambda: {"ok": True}}
    record = silicon_engine.run_parts(parts, {}, lambda record: kept.append(dict(record)))
    assert [len(each) for each in kept] == [1, 2, 3] and [part["ok"] for part in record.values()] == [False, True, True]
    assert record["a"]["error"] == "IndexError: list index out of range" and "line" in record["a"]["traceback"]
    assert record["b"]["skipped"] == "not here" and "c: ok" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "ok", "said"),
    [
        (MisuseError("--int8 is refused for sm75"), True, "not built: --int8 is refused"),
        (DeployError("TensorRT cannot build the network"), False, "TensorRT cannot build"),
        (RuntimeError("of the library"), False, "RuntimeError: of the library"),
    ],
)
def test_an_engine_that_cannot_be_built_is_wrong_unless_the_gpu_has_no_such_type(
    monkeypatch, tmp_path, error, ok, said
):
    def refused(source, path, config):
        raise error

    monkeypatch.setattr(silicon_build, "build_engine", refused)
    found = silicon_build.Built(tmp_path / "cpu.engine", None, None)
    silicon_build._tried(found, "int8 by tensorrt_rtx", None, tmp_path / "m.engine", "sm75", "float32", None)
    (record,) = found.others.values()
    assert not found.engines and record["ok"] is ok and said in record.get("skipped", record.get("error"))


def test_a_kernel_that_is_wrong_is_said(gpu, monkeypatch, capsys, tmp_path):
    gpu.load_kernels(KERNELS)
    monkeypatch.setattr(silicon_kernels, "SIDES", (37,))
    monkeypatch.setattr(silicon_kernels, "labels_from_scores", lambda window, head, card: np.zeros((1, 1), np.uint8))
    record = silicon.run_parts({"machine": silicon.machine, "kernels": lambda: silicon.kernels(40)}, {})
    assert not record["kernels"]["ok"] and "kernels: WRONG" in capsys.readouterr().out
    equal = {row["kernel"].split()[0]: row["equal"] for row in record["kernels"]["rows"]}
    assert equal == {"prepare": True, "label": False}
    page = silicon_page.page(record)
    assert "DIFFERENT" in page and "<li>kernels: WRONG</li>" in page


def test_images_that_memory_does_not_hold_are_skipped_and_said(gpu):
    gpu.load_kernels(KERNELS)
    gpu.set_memory(1 << 20)
    with silicon_engine.gpu() as (cuda, _):
        row = silicon_kernels._case(
            cuda, "prepare", (600, 600), silicon_kernels._Prepared(None, ModelCard(("a", "b")), "float32")
        )
    assert row["equal"] is None and row["skipped"] == "0.0 GB are needed, 0.0 are free"


def test_bands_of_large_images_are_the_first_the_middle_and_the_last():
    assert silicon_kernels.bands(100) == [(0, 100)]
    assert silicon_kernels.bands(20000) == [(0, 32), (10000, 10032), (19968, 20000)]


def test_pytorch_is_timed_in_every_variant_and_what_fails_is_said(exports):
    from fcn_deploy.fcn.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(exports / "narrow.safetensors")
    names = ("eager", "channels-last", "half")
    labels = {}
    for name, run in silicon_torch.variants(checkpoint.model, checkpoint.card, "cpu", names):
        labels[name] = run(photo(60, 90))
    assert list(labels) == list(names) and (labels["eager"] == labels["channels-last"]).all()
    with Segmenter(exports / "narrow.engine") as net:
        assert (net(photo(60, 90)) != labels["eager"]).mean() < 1e-3

    def median(work):
        work()
        return 1.5

    broken = torch.nn.Module()  # has no forward
    (row,) = silicon_torch.rows(broken, checkpoint.card, [(40, 50)], median, "cpu", ("eager",))
    assert row["eager"] is None and "NotImplementedError" in row["errors"]["eager"]
    (row,) = silicon_torch.rows(checkpoint.model, checkpoint.card, [(40, 50)], median, "cpu", ("eager",))
    assert row == {"size": [40, 50], "errors": {}, "eager": 1.5}


def test_without_a_gpu_it_says_where_to_run_it():
    done = subprocess.run([sys.executable, "-m", "benchmarks.silicon"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "no GPU" in one_error(done) and "run this on a machine with an NVIDIA GPU" in one_error(done)


def test_the_command_fails_where_something_is_wrong(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(silicon_build, "build", lambda folder: None)
    out = tmp_path / "a.json"

    def measure(built, folder, record, *rest):
        record |= {"kernels": {"rows": [], "ok": False}, "build, int8": {"skipped": "not built: none", "ok": True}}
        silicon.written(record, rest[0])

    monkeypatch.setattr(silicon, "measure", measure)
    assert silicon.main(out, 1.0, 2, 30) == 1
    page = out.with_suffix(".html").read_text()
    assert "kernels: WRONG" in page and "skipped: not built: none" in page and "a.html" in capsys.readouterr().out

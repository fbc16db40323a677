"""make silicon, on the simulated GPU: all that is measured on a real one runs, and what is wrong is said."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, needs, one_error, photo

from benchmarks import silicon, silicon_kernels, silicon_page, silicon_torch
from fcn_deploy import ModelCard, Segmenter


@pytest.mark.slow
def test_every_part_runs_on_a_gpu(rtx_engine, exports, capsys, tmp_path):
    record = silicon.measure(
        {"float32": (rtx_engine, exports / "narrow.engine")}, seconds=0.3, sizes=6, largest=60, runs=2,
        model=(None, None, ()),
    )  # fmt: skip
    assert all(part["ok"] for part in record.values()), record
    assert record["machine"]["target"] == "sm89" and record["machine"]["driver"] == "CUDA 13.0"
    kernels = record["kernels"]["rows"]
    # Four types of images by two of inputs, and two of scores by two of labels in five ways; some at the largest.
    assert len(kernels) == 8 * 2 + 2 + 2 * 2 * 5 * 2 + 2 and all(row["equal"] for row in kernels)
    assert [60, 60] in [row["size"] for row in kernels]
    assert record["labels, float32"]["share"] <= record["labels, float32"]["allowed"] == 1e-3
    assert record["8 threads, float32"]["calls"] > 0 and record["labels, float32"]["images"] > 0
    assert record["latency, float32"]["rows"][0]["network_ms"] > 0
    sanitized = record["sanitizer, float32"]
    assert "compute-sanitizer is not installed" in sanitized.get("skipped", "") or "said" in sanitized
    assert "golden sample, float32: ok" in capsys.readouterr().out
    silicon.written(record, tmp_path / "silicon.json")
    assert json.loads((tmp_path / "silicon.json").read_text()) == json.loads(json.dumps(record))
    page = (tmp_path / "silicon.html").read_text()
    assert page.count("<section") == 5 and "Simulated GPU" in page and "WRONG" not in page
    assert "float32: the bare network" in page and "PyTorch" in page and "http" not in page.replace("http-equiv", "")


def test_a_kernel_that_is_wrong_is_said(gpu, monkeypatch, capsys, tmp_path):
    from gpu_engines import KERNELS

    gpu.load_kernels(KERNELS)
    monkeypatch.setattr(silicon_kernels, "SIDES", (37,))
    monkeypatch.setattr(silicon_kernels, "labels_from_scores", lambda window, head, card: np.zeros((1, 1), np.uint8))
    record = silicon.measure({}, largest=40)
    assert not record["kernels"]["ok"] and "kernels: WRONG" in capsys.readouterr().out
    equal = {row["kernel"].split()[0]: row["equal"] for row in record["kernels"]["rows"]}
    assert equal == {"prepare": True, "label": False}
    page = silicon_page.page(record)
    assert "DIFFERENT" in page and "<li>kernels: WRONG</li>" in page


def test_images_that_memory_does_not_hold_are_skipped_and_said(gpu):
    from gpu_engines import KERNELS

    gpu.load_kernels(KERNELS)
    gpu.set_memory(1 << 20)
    with silicon.gpu() as (cuda, _):
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


def test_the_command_writes_a_json_and_a_page_and_fails_where_something_is_wrong(gpu, monkeypatch, tmp_path, capsys):
    given = []
    monkeypatch.setattr(
        silicon, "build", lambda folder: ({"float32": ("a", "b")}, ("model", "card", ()), {"int8": "none"})
    )

    def measure(engines, seconds, sizes, largest, model):
        given.append((engines, seconds, sizes, largest, model))
        return {"machine": silicon.machine(), "kernels": {"rows": [], "ok": False}}

    monkeypatch.setattr(silicon, "measure", measure)
    out = tmp_path / "a.json"
    assert silicon.main(out, 1.0, 2, 30) == 1
    assert given == [({"float32": ("a", "b")}, 1.0, 2, 30, ("model", "card", ()))]
    assert out.exists() and "kernels: WRONG" in (tmp_path / "a.html").read_text()
    assert "skipped: not built: none" in (tmp_path / "a.html").read_text()
    assert "a.html" in capsys.readouterr().out


@pytest.mark.slow
def test_engines_are_built_in_every_precision_by_the_libraries_that_are_here(gpu, monkeypatch, tmp_path, capsys):
    from fcn_deploy.runtime.engine_format.engine_file import EngineFile

    from benchmarks import engine_matrix

    needs("tensorrt_rtx")
    real = engine_matrix.network
    monkeypatch.setattr(engine_matrix, "network", lambda seed, width, **rest: real(seed, 0.1, **rest))
    monkeypatch.setattr(engine_matrix, "PRECISIONS", {"float32": {}, "float16": {"fp16": True}, "none": {"int8": True}})
    monkeypatch.setattr(silicon, "find_spec", lambda name: name == "tensorrt_rtx")
    gpu.set_capability(7, 5)
    engines, (model, card, sizes), refused = silicon.build(tmp_path)
    assert list(engines) == ["float32 by tensorrt_rtx", "float16 by tensorrt_rtx"]
    assert [*refused] == ["none by tensorrt_rtx"] and "sm75" in refused["none by tensorrt_rtx"]  # which has no INT8
    for name, (engine, cpu) in engines.items():
        with EngineFile(engine) as file:
            assert file.manifest.target == "sm75" and file.manifest.precision == name.split()[0]
            assert [profile.opt for profile in file.manifest.gpu.profiles] == [(480, 640), (1088, 1920)]
        assert cpu.exists() and model is not None and card.channels == 3 and len(sizes) == 2

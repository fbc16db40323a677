"""make silicon, on the simulated GPU: all that is measured on a real one runs, and what is wrong is said."""

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, one_error

from benchmarks import silicon


@pytest.mark.slow
def test_every_part_runs_on_a_gpu(rtx_engine, exports, capsys):
    record = silicon.measure(
        {"float32": (rtx_engine, exports / "narrow.engine")}, seconds=0.3, sizes=6, largest=60, runs=2
    )
    assert all(part["ok"] for part in record.values()), record
    assert record["machine"]["target"] == "sm89" and record["machine"]["driver"] == "CUDA 13.0"
    assert len(record["kernels"]["rows"]) == 32
    assert record["8 threads, float32"]["calls"] > 0 and record["labels, float32"]["images"] > 0
    assert record["latency, float32"]["rows"][0]["network_ms"] > 0
    sanitized = record["sanitizer, float32"]
    assert "compute-sanitizer is not installed" in sanitized.get("skipped", "") or "said" in sanitized
    assert "golden sample, float32: ok" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_is_said(gpu, monkeypatch, capsys):
    from gpu_engines import KERNELS

    gpu.load_kernels(KERNELS)
    monkeypatch.setattr(silicon, "prepare", lambda image, card: np.ones((1, 3, 32, 32), np.float32))
    record = silicon.measure({}, largest=40)
    assert not record["kernels"]["ok"] and "kernels: WRONG" in capsys.readouterr().out


def test_without_a_gpu_it_says_where_to_run_it():
    done = subprocess.run([sys.executable, "-m", "benchmarks.silicon"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 0:
        pytest.skip("this machine has a GPU")
    assert "no GPU" in one_error(done) and "run this on a machine with an NVIDIA GPU" in one_error(done)

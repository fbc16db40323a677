"""Engines in bfloat16 for CPUs: judged by OpenVINO's kernels, and what they are where a CPU has none."""

import numpy as np
import pytest
from fcn_deploy.export.build.config import BuildConfig, TuningOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.build.targets import cpu
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.quantization.options import QuantizationOptions
from fcn_deploy.runtime.backends import openvino
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from fcn_deploy.runtime.golden_sample import GOLDEN, golden_difference
from fcn_deploy.runtime.network import Network
from helpers import photo
from PIL import Image

from fcn_deploy import DeployError, MisuseError

SIZES = [(1, 1), (50, 70), (131, 67)]


def config(photos, **more):
    options = QuantizationOptions(bf16=True, calib=str(photos / "images"), **({"max_drop": 30} | more))
    return BuildConfig(quantization=options, latency_sizes=[(64, 64)], tuning=TuningOptions(("openvino",), seconds=0.1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    for seed in range(4):
        Image.fromarray(photo(70 + seed, 90, seed)).save(folder / "images" / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def built(exports, photos, tmp_path_factory):
    if not openvino.has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    path = tmp_path_factory.mktemp("bfloat16") / "m.engine"
    return path, build_engine(import_model(exports / "narrow.onnx"), path, config(photos))


def test_the_engine_is_what_openvino_gives_in_bfloat16(built, exports):
    path, report = built
    assert (report.precision, report.backend) == ("bf16", "openvino")
    assert report.accuracy.precision == "bf16" and 0.7 < report.accuracy.value < 1 and report.speedup > 0
    assert report.accuracy.by_backend == {"openvino": report.accuracy.bf16}
    with Network(path) as net, Network(exports / "narrow.engine") as exact, EngineFile(path) as file:
        assert net.precision == "bf16"
        for size in SIZES:
            scores, expected = net.scores(photo(*size)), exact.scores(photo(*size))
            apart = np.abs(scores - expected).max() / max(np.ptp(expected), 1e-6)
            assert 1e-4 < apart < 0.1  # eight bits, and not more
        assert golden_difference(net, file.read(GOLDEN)).passed


def test_a_cpu_without_bfloat16_gives_float32s_labels_and_says_so(built, exports, monkeypatch, caplog):
    path, _ = built
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: False)
    with Network(path) as net, Network(exports / "narrow.engine") as exact, EngineFile(path) as file:
        assert f"{path} was built in bfloat16, which this CPU does not have: it is run in float32" in caplog.text
        for size in SIZES:
            expected = exact.scores(photo(*size))
            np.testing.assert_allclose(net.scores(photo(*size)), expected, atol=1e-4 * np.ptp(expected))
        assert golden_difference(net, file.read(GOLDEN)).passed
    caplog.clear()
    monkeypatch.setattr(openvino, "installed", lambda: False)
    with Network(path) as net:
        assert "OpenVINO, which is not installed" in caplog.text and "was built in" not in caplog.text
        np.testing.assert_allclose(net.scores(photo(50, 70)), exact_scores(exports, (50, 70)), atol=1e-5)


def exact_scores(exports, size):
    with Network(exports / "narrow.engine") as exact:
        return exact.scores(photo(*size))


def test_a_budget_that_bfloat16_does_not_hold_is_an_error(built, exports, photos, tmp_path):
    with pytest.raises(DeployError, match=r"bf16 by its kernels: .* points of agreement lost, 0 allowed"):
        build_engine(
            import_model(exports / "narrow.onnx"), tmp_path / "m.engine", config(photos, max_drop=0, max_class_drop=0)
        )
    assert not (tmp_path / "m.engine").exists()


def test_it_is_not_built_where_it_cannot_be_judged(exports, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: False)
    with pytest.raises(DeployError, match="this CPU has no bfloat16"):
        build_engine(import_model(exports / "narrow.onnx"), tmp_path / "m.engine", config(photos))
    monkeypatch.setattr(cpu, "installed", lambda: False)
    with pytest.raises(DeployError, match="pip install"):
        build_engine(import_model(exports / "narrow.onnx"), tmp_path / "m.engine", config(photos))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tuning": TuningOptions(("onnxruntime",))}, "run by OpenVINO"),
        ({"quantization": QuantizationOptions(bf16=True, int8=True, calib="x")}, "pass one of them"),
        ({"precision_report": "layers.csv"}, "ranks layers"),
    ],
)
def test_what_contradicts_it_is_refused(wrong, match):
    options = {"quantization": QuantizationOptions(bf16=True, calib="x")} | wrong
    with pytest.raises(MisuseError, match=match):
        BuildConfig(**options)

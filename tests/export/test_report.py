"""The page that build-engine writes."""

import json

import pytest
from fcn_deploy.calibration.report.engine_report import read_report
from helpers import ReadPage, command, one_error, save_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    save_photos(folder, [(40 + 8 * index, 64) for index in range(6)])
    return folder


@pytest.mark.slow
def test_the_page_tells_what_int8_cost_and_which_layers_it_hurt(exports, photos, tmp_path):
    engine, page = tmp_path / "n8.engine", tmp_path / "n8.html"
    words = ("--int8", "--calib", photos, "--max-drop", "100", "--sizes", "32x32,48x64", "--backend", "onnxruntime")
    done = command("build-engine", exports / "narrow.onnx", *words, "-o", engine, "--report", page, "--json")
    record, report = json.loads(done.stdout), read_report(engine)
    assert report.problems == () and record["accuracy"]["int8"] == report.accuracy.int8
    assert record["latency_ms"][1] == {"size": [48, 64], "ms": report.latency_ms["48x64"]}
    html = page.read_text()
    assert report.layers and all(layer.sensitivity is not None for layer in report.layers)
    tables = ReadPage(html).tables
    worst = sorted(report.layers, key=lambda layer: -layer.sensitivity)
    shown = tables["The layers that low precision hurts, the most sensitive first"][1:]
    assert [row[0] for row in shown] == [layer.name for layer in worst[: len(shown)]]
    assert shown[0][2] == f"{worst[0].sensitivity:.2e}"
    assert tables["What low precision cost"][2][:2] == ["int8", f"{report.accuracy.int8:.4f}"]
    assert float(tables["When built, on the machine that built it"][2][1]) == pytest.approx(
        report.latency_ms["48x64"], rel=0.1
    )
    assert "<polyline" in html
    said = one_error(
        command("build-engine", exports / "narrow.onnx", "-o", tmp_path / "m.engine", "--report", page, ok=2)
    )
    assert "exists already" in said and page.read_text() == html and not (tmp_path / "m.engine").exists()


def test_misuse_of_report_is_one_line(exports, tmp_path):
    model, out = exports / "narrow.onnx", tmp_path / "m.engine"
    for words, code, said in (
        (("-o", out, "--report", tmp_path / "m.htm"), 2, "not named .html"),
        (("-o", out, "--report", "/proc/nowhere/m.html"), 1, "cannot write"),
        (("-o", tmp_path / "m.onnx", "--standalone", "--report", tmp_path / "m.html"), 2, "omit --report"),
    ):
        assert said in one_error(command("build-engine", model, *words, ok=code))
    assert not list(tmp_path.iterdir())

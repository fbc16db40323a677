"""The last line of build-engine, where INT8 wins nothing: it says so, and what to do instead."""

from dataclasses import replace
from pathlib import Path

import pytest
from fcn_deploy.calibration.report.engine_report import Accuracy, EngineReport, StageReport
from fcn_deploy.export.cli.build_summary import low_precision_advice, show_build

ACCURACY = Accuracy("agreement", 1.0, 0.2, 0.5, 10, 2, True, layers=10, method="mse", int8=0.998)
MOST = replace(ACCURACY, kept={f"layer {index}": "lost too much" for index in range(7)})
SLOWER = "int8 is SLOWER than float32 here"


def report_of(tmp_path, **fields):
    """The report of an INT8 engine with other fields; the engine is beside it."""
    report = EngineReport(
        target="cpu", precision="int8", head="linear", stride=8, size_multiple=32, backend="onnxruntime",
        latency_ms={"64x64": 1.0}, core_bytes={"float32": 100, "int8": 30}, accuracy=ACCURACY, speedup=1.5,
    )  # fmt: skip
    (tmp_path / "m.engine").write_bytes(b"engine")
    return replace(report, **fields)


@pytest.mark.parametrize(
    ("fields", "last"),
    [
        ({"speedup": 0.8}, f"{SLOWER}; omit --int8, or take --fastest, which keeps the faster of the two"),
        (
            {"speedup": 0.99},
            "int8 is no faster than float32 here; omit --int8, or take --fastest, which keeps the faster of the two",
        ),
        (
            {"speedup": 0.8, "accuracy": MOST},
            f"{SLOWER} (7 of 10 layers stay float, as they would lose too much); omit --int8, or take --fastest, which "
            "keeps the faster of the two",
        ),
        ({"accuracy": MOST}, "7 of 10 layers stay float, as they would lose too much; for more,"),
        (
            {"accuracy": MOST, "speedup": 1.1},
            "7 of 10 layers stay float, as they would lose too much, so int8 wins little; calibrate on more images, "
            "allow more by --max-drop, or omit --int8",
        ),
        ({"accuracy": MOST, "speedup": None, "latency_ms": None, "target": "sm89"}, "7 of 10 layers stay float"),
        ({"precision": "float32", "speedup": 0.8}, "float32 is kept, as it is the faster of the two here"),
        (
            {"precision": "float32", "accuracy": None, "speedup": None, "notes": ("float32 is kept: no layer holds",)},
            "float32 is kept: no layer holds",
        ),
    ],
)
def test_the_last_line_says_that_int8_wins_nothing_and_what_to_do(tmp_path, capsys, fields, last):
    report = report_of(tmp_path, **fields)
    show_build(Path("m.onnx"), tmp_path / "m.engine", report)
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)
    assert len(low_precision_advice(report)) <= 300


def test_the_halos_of_all_stages_are_told_and_of_those_for_tiles_alone(tmp_path, capsys):
    stages = [StageReport((halo, halo), "exact", 1.0, 1.0, 0.5) for halo in (64, 416, 32, 48, 48, 96, 288)]
    show_build(Path("m.onnx"), tmp_path / "m.engine", report_of(tmp_path, stages=stages[:2], fine=stages[2:]))
    assert (
        "exactly: 2 stages, halos 64 pixels and 416 pixels; where that is less work by 5 stages, halos 32, 48, 48, 96, "
        "288 pixels\n" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"accuracy": replace(ACCURACY, kept={"first": "the user", "last": "the user"})},
        {"precision": "float32", "accuracy": None, "speedup": None},
        {"accuracy": None},  # quantised already
    ],
)
def test_int8_that_is_worth_it_gets_no_such_line(tmp_path, fields):
    assert low_precision_advice(report_of(tmp_path, **fields)) == ""

"""inspect-model: what it tells of models and engines, good, bad and broken."""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from fcn_deploy.export.build.config import BuildConfig, TensorRTOptions
from fcn_deploy.export.build.engine import build_engine
from fcn_deploy.export.importer.import_model import import_model
from fcn_deploy.export.inspect import inspect_file, record
from fcn_deploy.export.inspect import onnx_model as inspected
from fcn_deploy.export.inspect.record import TRIED_SIZES
from fcn_deploy.export.inspect.text import file_as_text, findings_as_text, record_as_text
from fcn_deploy.runtime.sizes import parse_sizes
from helpers import command, finished, needs, one_error, onnx_model
from onnx import TensorProto, helper

from fcn_deploy import DeployError, MisuseError

SMALL = 50_000_000  # bytes for the largest image, to be quick
WEIGHT = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)


def saved(path, nodes, constants=None, shape=("N", 3, "H", "W"), kind=TensorProto.FLOAT, opset=17):
    model = onnx_model(
        nodes, {"w": WEIGHT} | (constants or {}), takes=shape, gives=("N", 2, "h", "w"), names=("x", "y"),
        types=(kind, TensorProto.FLOAT), opset=opset,
    )  # fmt: skip
    onnx.save(model, path)
    return path


CONV = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)


def test_what_is_told_of_a_model_of_ours(exports):
    about = inspect_file(exports / "narrow.onnx", "cpu", thorough=True)
    assert about["ok"] and about["kind"] == "onnx" and about["opset"] == 18 and about["precision"] == "float32"
    assert about["card_is_its_own"] and len(about["card"]["classes"]) == 5
    assert about["head"] == {"mode": "linear", "coordinates": "half_pixel", "factor": (8.0, 8.0)}
    assert about["sizes"] == {"multiple": 1, "smallest": 1, "fit": ""}  # it pads by itself
    assert about["reach"]["halo"] == (480, 480) and about["reach"]["period"] == 32
    assert about["operators"]["Conv"] > 40 and about["parameters"] > 10_000
    assert [run["size"] for run in about["runs"]][: len(TRIED_SIZES)] == list(TRIED_SIZES)
    assert max(run["size"] for run in about["runs"]) >= (480, 640) and not any(run["problem"] for run in about["runs"])
    text = record_as_text(about)
    for words in ("5: class 0, class 1", "linear, half_pixel, ×8 by ×8", "with a halo of 480×480", "runs at"):
        assert words in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 120


def test_what_is_told_of_an_engine_of_ours(exports):
    about = inspect_file(exports / "narrow.engine", memory=SMALL)
    assert about["ok"] and about["kind"] == "engine" and about["target"] == "cpu"
    assert [stage["file"] for stage in about["stages"]] == ["stage-0.onnx", "stage-1.onnx"]
    assert about["stages"][0]["halo"] and about["agreement"]["wrong"] == 0
    assert about["sizes"] == {"multiple": 32, "smallest": 1, "fit": "pad"}
    assert about["members"]["golden.npz"] > 0 and about["operators"]["Conv"] > 40
    text = record_as_text(about)
    assert "engine for cpu" in text and "multiples of 32, others are padded with zeros" in text
    assert "stage-1.onnx" in text and "labels equal to the model's: 100" in text


def test_an_engine_is_inspected_without_the_onnx_package(exports):
    code = f"""
import sys
from pathlib import Path
sys.modules["onnx"] = None  # as where it is not installed
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "onnx" else find(name, *more)
from fcn_deploy.export.inspect import inspect_file
from fcn_deploy.export.inspect.text import record_as_text
record = inspect_file(Path({str(exports / "narrow.engine")!r}), memory={SMALL})
assert record["ok"] and record["precision"] == "float32" and "operators" not in record, record
assert "stage-1.onnx" in record_as_text(record)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_onnx_without_the_onnx_package_is_one_line(exports):
    code = "import sys; sys.modules['onnx'] = None; from fcn_deploy.export.cli.inspect_model import main; main()"
    done = finished([sys.executable, "-c", code, exports / "narrow.onnx"], ok=1)
    assert "onnx is not installed; run: pip install 'fcn-deploy[export]'" in one_error(done)


def test_a_foreign_model_has_what_is_assumed_of_it_said(tmp_path):
    about = inspect_file(saved(tmp_path / "m.onnx", [CONV]), "cpu", SMALL)
    assert about["ok"] and not about["card_is_its_own"] and about["producer"] == "test"
    assert about["inputs"] == [{"name": "x", "type": "float32", "shape": ["N", 3, "H", "W"]}]
    assert about["reach"]["field"] == [3, 3] and about["head"]["mode"] == "none"
    assert "assumed" in record_as_text(about) and "3×3 pixels around each score" in record_as_text(about)


def test_what_makes_a_network_global_and_how_it_fits_are_told(tmp_path):
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[3, 3]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"], name="pool"),
        helper.make_node("Sub", ["c", "g"], ["d"]),
        helper.make_node("Resize", ["d", "", "s"], ["e"], mode="linear"),
        helper.make_node("Slice", ["x", "zero", "two", "one"], ["f"]),
        helper.make_node("Add", ["e", "f"], ["y"]),
    ]
    constants = {"s": np.float32([1, 1, 3, 3]), "zero": np.int64([0]), "one": np.int64([1]), "two": np.int64([2])}
    about = inspect_file(saved(tmp_path / "m.onnx", nodes, constants), "cpu", SMALL)
    assert about["ok"] and about["reach"]["whole"] == "GlobalAveragePool pool"
    assert about["sizes"] == {"multiple": 3, "smallest": 1, "fit": "resize"}
    assert "multiples of 3, others are resized to the nearest" in record_as_text(about)
    assert "the whole image (GlobalAveragePool pool)" in record_as_text(about)


def test_a_baked_size_fails_and_what_it_does_is_shown(tmp_path):
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4, strides=[2, 2]),
             helper.make_node("Resize", ["c", "", "", "s"], ["r"], mode="linear"),
             helper.make_node("Add", ["r", "m"], ["y"])]  # fmt: skip
    mask = np.random.default_rng(1).normal(size=(1, 2, 200, 200)).astype(np.float32)
    path = saved(tmp_path / "m.onnx", nodes, {"s": np.int64([1, 2, 200, 200]), "m": mask})
    about = inspect_file(path, memory=SMALL)
    assert not about["ok"] and about["problem"] and about["as_given"][0]["shape"] == (1, 2, 200, 200)
    assert "REFUSED" in record_as_text(about) and "gives [1, 2, 200, 200]" in record_as_text(about)
    command("inspect-model", path, ok=1)


def test_a_size_that_fails_is_named(tmp_path, monkeypatch):
    try_size = inspected.try_size
    failing = inspected.try_size(lambda h, w: 1 / 0, 1, 1)
    monkeypatch.setattr(inspected, "try_size", lambda run, h, w: failing if (h, w) == (31, 33) else try_size(run, h, w))
    about = inspect_file(saved(tmp_path / "m.onnx", [CONV]), "cpu", SMALL)
    assert not about["ok"] and [run["size"] for run in about["runs"] if run["problem"]] == [(31, 33)]
    assert "FAILS at" in record_as_text(about) and "31×33: ZeroDivisionError" in record_as_text(about)


def test_what_tensorrt_refuses_is_told_by_node(tmp_path):
    needs("tensorrt_rtx")
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p", "i"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        helper.make_node("MaxUnpool", ["p", "i"], ["u"], kernel_shape=[2, 2], strides=[2, 2], name="unpool"),
        helper.make_node("Conv", ["u", "w"], ["y"], pads=[1] * 4),
    ]
    path = saved(tmp_path / "m.onnx", nodes)
    about = inspect_file(path, memory=SMALL)
    verdict = about["targets"]["tensorrt"]
    assert about["ok"] and verdict["problem"] and verdict["by"].startswith("tensorrt_rtx")
    assert any(each["node"] == "unpool" and each["operator"] == "MaxUnpool" for each in verdict["refused"])
    assert "unpool (MaxUnpool)" in record_as_text(about) and about["targets"]["cpu (onnxruntime)"]["problem"] == ""
    # Asked for by name, it must be buildable.
    assert not inspect_file(path, "sm89", SMALL)["ok"]
    assert inspect_file(saved(tmp_path / "good.onnx", [CONV]), "sm89", SMALL)["ok"]


def test_an_engine_for_gpus_tells_its_profiles_and_is_not_run_here(exports, tmp_path):
    needs("tensorrt_rtx")
    sizes = parse_sizes("64x64:96x96:160x128")
    config = BuildConfig(target="sm89", tensorrt=TensorRTOptions(workspace=SMALL), sizes=sizes)
    build_engine(import_model(exports / "narrow.onnx"), tmp_path / "m.engine", config)
    about = inspect_file(tmp_path / "m.engine")
    assert about["gpu"]["targets"] == ("sm89",)
    assert about["gpu"]["profiles"][0] == {"min": (64, 64), "opt": (96, 96), "max": (160, 128), "batch": 4}
    text = record_as_text(about)
    assert "for sm89" in text and "64x64:96x96:160x128" in text
    if not about["runs"]:
        assert about["ok"] and "not run" in text and about["not_run"]


@pytest.mark.parametrize("name", ["m.onnx", "m.engine"])
@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 and nothing else", b"\x08\x07\x12\xff" * 99])
def test_broken_files_give_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DeployError) as caught:
        inspect_file(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_an_edited_engine_is_refused(exports, tmp_path):
    data = bytearray((exports / "narrow.engine").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "m.engine").write_bytes(data)
    with pytest.raises(DeployError, match="is damaged"):
        inspect_file(tmp_path / "m.engine")


def test_models_that_are_no_segmentation_say_why(tmp_path):
    flat = [helper.make_node("GlobalAveragePool", ["x"], ["g"]), helper.make_node("Flatten", ["g"], ["y"])]
    about = inspect_file(saved(tmp_path / "m.onnx", flat), "cpu", SMALL)
    assert not about["ok"] and about["problem"] and about["operators"] == {"GlobalAveragePool": 1, "Flatten": 1}
    text = inspect_file(saved(tmp_path / "t.onnx", [CONV], kind=TensorProto.STRING), "cpu", SMALL)
    assert not text["ok"] and "string" in text["problem"]


@pytest.mark.slow
def test_the_command_line(exports, tmp_path):
    done = command("inspect-model", exports / "narrow.onnx", "--target", "cpu", "--memory", 0.05)
    assert done.stdout.startswith(str(exports / "narrow.onnx")) and "operators" in done.stdout and not done.stderr
    about = json.loads(command("inspect-model", exports / "narrow.engine", "--json", "--memory", 0.05).stdout)
    assert about["ok"] and about["runs"][0] == {"size": [1, 1], "problem": ""}
    assert "does not exist" in one_error(command("inspect-model", tmp_path / "none.onnx", ok=2))
    assert "sm1" in one_error(command("inspect-model", exports / "narrow.onnx", "--target", "sm1", ok=2))
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    assert "not a valid ONNX" in one_error(command("inspect-model", tmp_path / "junk.onnx", ok=1))
    with pytest.raises(MisuseError):
        inspect_file(tmp_path)


def test_what_the_file_tells_is_told_before_the_model_is_run(tmp_path, monkeypatch):
    path, told = saved(tmp_path / "m.onnx", [CONV]), []
    about = inspect_file(path, "cpu", SMALL, tell=told.append)
    assert len(told) == 1 and told[0].items() <= (about | {"problem": None}).items() and "card" not in told[0]
    assert record_as_text(about) == f"{file_as_text(told[0])}\n{findings_as_text(about)}"
    assert "operators" in file_as_text(told[0]) and "runs at" not in file_as_text(told[0])
    monkeypatch.setattr(inspected, "import_model", fails)
    with pytest.raises(ZeroDivisionError):
        inspect_file(path, "cpu", SMALL, tell=told.append)
    assert len(told) == 2


def fails(*given):
    raise ZeroDivisionError


def test_larger_images_are_compared_where_that_is_quick_or_the_user_wants_it(tmp_path, monkeypatch):
    path = saved(tmp_path / "m.onnx", [CONV], shape=[1, 3, 64, 96])

    def note(**options):
        return next(note for note in inspect_file(path, "cpu", SMALL, **options)["notes"] if "unseen sizes" in note)

    same = "within a larger image it gives the same"
    assert same in note()
    monkeypatch.setattr(inspected, "SECONDS", 0.0)
    assert "larger images are not compared with it" in note() and same in note(thorough=True)


def test_a_large_image_is_run_where_it_is_quick_or_the_user_wants_it(monkeypatch):
    def largest(**options):
        return max(record.tried_sizes(1 << 30, lambda pixels: 100.0 * pixels, **options))

    assert largest() == (2160, 3840)  # nothing takes no time here
    monkeypatch.setattr(record, "SECONDS", 0.0)
    assert largest() == max(record.TRIED_SIZES) and largest(thorough=True) == (2160, 3840)


def test_a_model_of_one_size_is_run_at_that_twice(tmp_path, monkeypatch):
    """Once as it is, and once freed: at a large size more would take long."""
    import onnxruntime

    sizes, run = [], onnxruntime.InferenceSession.run

    def counted(self, names, feeds, *more):
        sizes.append(next(iter(feeds.values())).shape)
        return run(self, names, feeds, *more)

    monkeypatch.setattr(record, "TRIED_SIZES", TRIED_SIZES[:2])
    monkeypatch.setattr(inspected, "SECONDS", 0.0)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", counted)
    about = inspect_file(saved(tmp_path / "m.onnx", [CONV], shape=(1, 3, 160, 224)), "cpu")
    assert about["ok"] and sizes.count((1, 3, 160, 224)) == 2
    assert any("equal to the model at its own size of 160×224, exactly" in note for note in about["notes"])

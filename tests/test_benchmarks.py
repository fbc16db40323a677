"""The benchmarks run, and write what docs/results.md is made of. Tiny settings: no time is judged here."""

import importlib.util
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, needs_shared, photo
from PIL import Image

from benchmarks import common, cost, huge, peers


def bench(name, *words, ok=0):
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == ok, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def is_picture(path):
    with Image.open(path) as picture:
        return picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A labelled data set of five classes: noise, each class a brightness."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    for split, count in (("train", 6), ("val", 3)):
        for name in (split, f"{split}annot"):
            (folder / name).mkdir()
        for index in range(count):
            image = photo(72, 104, seed=index + 10 * (split == "val"))
            Image.fromarray(image).save(folder / split / f"{index}.png")
            labels = np.minimum(image[:, :, 0] // 52, 4).astype(np.uint8)
            Image.fromarray(labels).save(folder / f"{split}annot" / f"{index}.png")
    return folder


def test_peers_gives_a_row_per_candidate_a_table_and_a_plot(exports, data, tmp_path):
    only = ["torch", "ort", "ort-argmax", "ours", "ours-int8", "ort-u8"]
    out, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    told = bench(
        "peers", exports / "narrow.safetensors", exports / "narrow.onnx", "--data", data, "--only", ",".join(only),
        "--rounds", 2, "--sizes", 1, "--calibration", 5, "--json", out, "--plot", plot,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert result["job"]["sizes"] == [[97, 61]] and is_picture(plot)
    rows = dict(zip(only, result["rows"], strict=True))
    for key, row in rows.items():
        assert row["error"] is None and row["name"] == peers.CANDIDATES[key].name
        assert f"| {row['name']} |" in told
        assert row["rounds"] == 2 and len(row["size_ms"]) == 1 and min(row["size_ms"]) > 0
        assert 0 < row["miou"] < 1 and row["peak_mb"] > 20
        for kind in ("mixed", "fixed"):
            middle, low, high = row[f"{kind}_ms"]
            assert 0 < low <= middle <= high
            assert row["ratios"]["ours"][kind][0] > 0
    # The same network: what float32 candidates label is the same, up to ties.
    for key in ("torch", "ort", "ort-argmax", "ours"):
        assert rows[key]["equal"] > 0.999 and rows[key]["miou"] == pytest.approx(rows["torch"]["miou"], abs=1e-3)
    assert rows["ours"]["ratios"]["ours"]["mixed"] == [1.0, 1.0, 1.0]
    for words in ("our float32 against the best PyTorch (PyTorch eager), mixed", "our INT8 against the best INT8 peer"):
        assert words in told


def test_openvino_and_nncf_are_peers_too(exports, data, tmp_path):
    for module in ("openvino", "nncf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; pip install 'fcn-deploy[bench]'")
    only, out = "torch,openvino,openvino-graph,nncf,nncf-graph", tmp_path / "peers.json"
    words = ("--rounds", 1, "--sizes", 1, "--calibration", 3, "--count", 2)
    bench(
        "peers", exports / "narrow.safetensors", exports / "narrow.onnx", "--data", data, "--only", only, *words,
        "--json", out,
    )  # fmt: skip
    _, plain, graph, *int8 = json.loads(out.read_text())["rows"]
    for row in (plain, graph):
        assert row["error"] is None and row["equal"] > 0.999
    for row in int8:
        assert row["error"] is None and 0.3 < row["equal"] < 1


def test_a_candidate_that_fails_is_said_and_the_others_are_measured(exports, data, tmp_path):
    (tmp_path / "float32.engine").write_bytes(b"no engine")
    words = ["peers", exports / "narrow.safetensors", exports / "narrow.onnx", "--only", "ort,ours", "--work", tmp_path]
    words += ["--rounds", 1, "--sizes", 1, "--count", 1, "--data"]
    told = bench(*words, data)
    assert re.search(r"\| ONNX Runtime float32 \| 0\.\d+", told)
    assert re.search(r"^fcn-deploy float32: not measured \(DeployError: .*float32.engine", told, re.MULTILINE)
    bench(*words, "digits", ok=2)  # what was prepared for other data is not taken


def test_cost_fits_a_line_through_sizes_of_several_aspects(exports, tmp_path):
    out, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    words = ("--steps", 2, "--most", 0.3, "--rounds", 1, "--json", out, "--plot", plot)
    told = bench("cost", exports / "narrow.engine", *words)
    result = json.loads(out.read_text())
    assert len(result["sizes"]) == 12 and is_picture(plot)
    assert {row["kind"] for row in result["sizes"]} == {"1:1", "3:4", "9:16", "3:1", "prime", "odd"}
    assert result["ms_per_megapixel"] > 0 and f"{result['spread']:.1%}" in told


def test_the_line_and_its_spread_are_those_of_the_times():
    pixels = np.geomspace(0.01, 16, 30)
    straight = cost.judged(pixels, 3 + 80 * pixels)
    assert straight["fixed_ms"] == pytest.approx(3) and straight["ms_per_megapixel"] == pytest.approx(80)
    assert straight["largest_residual"] < 1e-9
    bent = 80 * pixels
    bent[-1] *= 1.3
    assert cost.judged(pixels, bent)["spread"] == pytest.approx(0.3)
    assert all(math.isqrt(n) ** 2 != n for kind, *size in cost.sizes(9, 16) if kind == "prime" for n in size)


def test_memory_follows_the_calls(exports, tmp_path):
    out, plot = tmp_path / "memory.json", tmp_path / "memory.png"
    told = bench(
        "memory", exports / "narrow.engine", "--calls", 40, "--side", 200, "--json", out, "--plot", plot
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert (result["calls"], result["settled"]) == (40, 20) and is_picture(plot)
    at = {row["call"]: row["anonymous"] + row["files"] for row in result["curve"]}
    assert result["ratio"] == at[40] / at[20] and at[1] > 20e6
    assert f"{result['ratio']:.3f} of that after 20" in told


def test_folder_compares_the_command_with_bare_inference(exports, tmp_path):
    out = tmp_path / "folder.json"
    bench("folder", exports / "narrow.engine", "--images", 3, "--rounds", 1, "--json", out)
    result = json.loads(out.read_text())
    (row,) = result["engines"]
    assert result["images"] == 3
    assert row["ratio"][0] == pytest.approx(row["bare_s"][0] / (row["infer_s"][0] - row["start_s"][0]))
    assert row["ratio_with_start"][0] < row["ratio"][0]


def test_huge_compares_labels_memory_and_throughput(exports, tmp_path):
    out = tmp_path / "huge.json"
    # So little memory that the image is tiled.
    words = ("--size", 1500, "--memory", 0.13, "--regions", 3, "--json", out)
    told = bench("huge", exports / "narrow.engine", *words)
    result = json.loads(out.read_text())
    assert result["pixels_compared"] == 3 * 256**2 and result["pixels_differing"] <= 20
    assert 30e6 < result["peak_anonymous"] < 2e9
    assert result["ratio"] == result["megapixels_per_s"] / result["small_megapixels_per_s"]
    assert (
        any(stage["tiles"] > 1 for stage in result["plan"]["stages"])
        and "plan:" in told
        and f"ratio {result['ratio']:.3f}" in told
    )


def test_a_mosaic_read_in_parts_is_the_mosaic(tmp_path):
    mosaic = huge.Mosaic(1100, "digits")
    whole = mosaic.region(0, 0, 1100, 1100)
    mosaic.write(tmp_path / "m.tif")
    assert np.array_equal(huge.read_labels(tmp_path / "m.tif"), whole)
    assert np.array_equal(huge.Mosaic(1100, "digits").region(355, 470, 900, 999), whole[355:900, 470:999])


def test_huge_sees_labels_that_are_wrong(exports):
    from runtime import Segmenter

    mosaic = huge.Mosaic(700, "digits")
    with Segmenter(exports / "narrow.engine") as net:
        labels = net(mosaic.region(0, 0, 700, 700))
        assert huge.differing(net, mosaic, labels, 4, 512)[0] <= 20
        labels[:50, :50] = (labels[:50, :50] + 1) % 5
        assert huge.differing(net, mosaic, labels, 4, 512)[0] >= 2500


def test_sizes_are_the_same_every_time_and_span_the_range():
    sizes = common.mixed_sizes(24, peers.LEAST, peers.MOST)
    assert sizes == common.mixed_sizes(24, peers.LEAST, peers.MOST) != common.mixed_sizes(24, (1, 1), (9, 9))
    pixels = [height * width for height, width in sizes]
    assert (min(pixels), max(pixels)) == (97 * 61, 1500 * 1125) and len(set(sizes)) == 24
    for height, width in ((1, 1), (97, 61), (1500, 3), (512, 1024)):
        assert common.fitted(photo(70, 90), height, width).shape == (height, width, 3)


def test_photographs_of_a_data_set_are_those_of_its_train_split():
    folder = needs_shared("camvid")
    stream = common.photographs(str(folder))
    assert len(stream) == 367 and stream.read(0).shape == (360, 480, 3)

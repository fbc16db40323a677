"""The benchmarks run, and write what docs/results/ is made of. Tiny settings: no time is judged here."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.runtime.engine_format.engine_file import EngineFile
from helpers import benchmark, needs, needs_shared, photo
from PIL import Image

from benchmarks import candidates, common, cost, folder, heatmap, huge, patchwise, peers, refine, stages, strides
from benchmarks.earlier import Earlier


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


@pytest.mark.slow
def test_peers_gives_a_row_per_candidate_a_table_and_a_plot(exports, data, tmp_path):
    only = ["torch", "ort", "ort-argmax", "ours", "ours-int8", "ort-u8"]
    out, plot = tmp_path / "peers.json", tmp_path / "peers.png"
    shutil.copy(exports / "narrow.engine", tmp_path / "float32.engine")  # what is there is not made again
    told = benchmark(
        "peers", exports / "narrow.safetensors", exports / "narrow.onnx", "--data", data, "--only", ",".join(only),
        "--threads", 1, "--rounds", 2, "--sizes", 1, "--fixed", "64x128", "--calibration", 5, "--json", out,
        "--plot", plot, "--work", tmp_path,
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert (result["job"]["sizes"], result["job"]["fixed"]) == ([[97, 61]], [64, 128]) and is_picture(plot)
    rows = dict(zip(only, result["rows"], strict=True))
    for key, row in rows.items():
        assert row["error"] is None and row["name"] == candidates.CANDIDATES[key].name
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


@pytest.mark.slow
def test_openvino_and_nncf_are_peers_too(exports, data, tmp_path):
    for module in ("openvino", "nncf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed; pip install 'fcn-deploy[bench]'")
    only, out = "torch,openvino,openvino-graph,nncf,nncf-graph", tmp_path / "peers.json"
    words = ("--threads", 1, "--rounds", 1, "--sizes", 1, "--fixed", "64x128", "--calibration", 3, "--count", 2)
    benchmark(
        "peers", exports / "narrow.safetensors", exports / "narrow.onnx", "--data", data, "--only", only, *words,
        "--json", out,
    )  # fmt: skip
    _, plain, graph, *int8 = json.loads(out.read_text())["rows"]
    for row in (plain, graph):
        assert row["error"] is None and row["equal"] > 0.999
    for row in int8:
        assert row["error"] is None and 0.3 < row["equal"] < 1


@pytest.mark.slow
def test_a_candidate_that_fails_is_said_and_the_others_are_measured(exports, data, tmp_path):
    (tmp_path / "float32.engine").write_bytes(b"no engine")
    words = ["peers", exports / "narrow.safetensors", exports / "narrow.onnx", "--only", "ort,ours", "--work", tmp_path]
    words += ["--rounds", 1, "--sizes", 1, "--fixed", "64x128", "--count", 1, "--data"]
    told = benchmark(*words, data)
    assert re.search(r"\| ONNX Runtime float32 \| 0\.\d+", told)
    assert re.search(r"^fcn-deploy float32: not measured \(DeployError: .*float32.engine", told, re.MULTILINE)
    benchmark(*words, "digits", ok=2)  # what was prepared for other data is not taken


@pytest.mark.slow
def test_an_earlier_checkout_is_measured_by_its_own_code_beside_ours(exports, data, tmp_path):
    root, old, out = Path(peers.__file__).parents[1], tmp_path / "old", tmp_path / "peers.json"
    shutil.copytree(root / "benchmarks", old / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (old / "fcn_deploy").mkdir()
    shutil.copy(root / "fcn_deploy/__init__.py", old / "fcn_deploy")
    (old / "fcn_deploy/runtime").symlink_to(root / "runtime")
    (old / "benchmarks/candidates.py").open("a").write("accuracy = lambda *_: 0.125\n")  # as no other checkout has it
    python = old / ".venv/bin/python"
    with pytest.raises(ValueError, match=r"has no \.venv/bin/python"):
        Earlier.at(old)
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(ValueError, match="at no commit"):
        Earlier.at(old)
    by = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "benchmarks"), (*by, "commit", "-q", "-m", "old")):
        subprocess.run(["git", "-C", old, *words], check=True)
    commit = Earlier.at(old).commit
    for place in (tmp_path, tmp_path / commit):
        place.mkdir(exist_ok=True)
        shutil.copy(exports / "narrow.engine", place / "float32.engine")
    words = ["peers", exports / "narrow.safetensors", exports / "narrow.onnx", "--data", data, "--only", "ours"]
    words += ["--rounds", 1, "--sizes", 1, "--fixed", "64x128", "--count", 1, "--work", tmp_path, "--earlier", old]
    told = benchmark(*words, "--json", out)
    ours, earlier = json.loads(out.read_text())["rows"]
    assert (ours["name"], earlier["name"]) == ("fcn-deploy float32", f"fcn-deploy float32 of {commit}")
    assert earlier["miou"] == 0.125 != ours["miou"] and earlier["ratios"]["ours"]["mixed"][0] > 0
    assert f"our float32 against {earlier['name']}, mixed below 0.1 megapixels: " in told
    # One whose environment runs another checkout is not measured in its name.
    (old / "fcn_deploy/runtime").unlink()
    assert f"{earlier['name']}: not measured (ImportError: the environment" in benchmark(*words)


@pytest.mark.slow
def test_cost_fits_a_line_through_sizes_of_several_aspects(exports, tmp_path):
    out, plot = tmp_path / "cost.json", tmp_path / "cost.png"
    words = ("--steps", 2, "--most", 0.3, "--rounds", 1, "--json", out, "--plot", plot)
    told = benchmark("cost", exports / "narrow.engine", *words)
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
    told = benchmark(
        "memory", exports / "narrow.engine", "--calls", 40, "--side", 200, "--json", out, "--plot", plot
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert (result["calls"], result["settled"]) == (40, 20) and is_picture(plot)
    at = {row["call"]: row["anonymous"] + row["files"] for row in result["curve"]}
    assert result["ratio"] == at[40] / at[20] and at[1] > 20e6
    assert f"{result['ratio']:.3f} of that after 20" in told


def test_folder_compares_the_command_with_bare_inference(exports, tmp_path):
    out = tmp_path / "folder.json"
    benchmark("folder", exports / "narrow.engine", "--images", 3, "--rounds", 1, "--json", out)
    result = json.loads(out.read_text())
    (row,) = result["engines"]
    assert result["images"] == 3
    seconds = [np.array([row[name][0]]) for name in ("bare_s", "infer_s", "start_s")]
    again = folder.compared(*seconds)
    assert (row["ratio"] is None) == (seconds[1] <= seconds[2]).all()
    assert row["ratio"] is None or row["ratio"][0] == pytest.approx(again["ratio"][0])
    assert row["ratio_with_start"][0] == pytest.approx(again["ratio_with_start"][0])


def test_folder_takes_the_start_up_off_within_a_round():
    bare_s, infer_s, start_s = np.array([[8.0, 8.0, 9.0], [11.0, 10.5, 13.0], [1.0, 0.5, 1.0]])
    row = folder.compared(bare_s, infer_s, start_s)
    assert row["ratio"][0] == pytest.approx(0.8) and row["ratio_with_start"][0] == pytest.approx(8 / 11)
    assert row["bare_s"][0] == 8 and row["infer_s"][0] == 11 and row["start_s"][0] == 1
    told = folder.line(row | {"engine": "a/m.engine"})
    assert told.split() == ["m.engine", "8.0", "11.0", "1.00", "0.800", "(0.760–0.800);", "0.727"]
    few = folder.compared(np.array([0.1, 0.1]), np.array([0.6, 0.5]), np.array([0.4, 0.5]))
    assert few["ratio"] is None and "more --images" in folder.line(few | {"engine": "m.engine"})


@pytest.mark.slow
def test_huge_compares_labels_memory_and_throughput(exports, tmp_path):
    out = tmp_path / "huge.json"
    # So little memory that the image is tiled.
    words = ("--size", 1500, "--memory", 0.13, "--regions", 3, "--json", out)
    told = benchmark("huge", exports / "narrow.engine", *words)
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
    from fcn_deploy import Segmenter

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


@pytest.mark.slow
def test_strides_trains_what_is_not_there_and_compares(data, tmp_path):
    out, plot, work = tmp_path / "strides.json", tmp_path / "strides.png", tmp_path / "work"
    options = "--backbone mobilenet-v2 --width 0.125 --epochs 1 --crop 32x32 --batch 4 --count 4"
    words = ("--data", data, "--work", work, "--seeds", 1, "--threads", 1, "--options", options)
    told = benchmark("strides", *words, "--most", 1)
    assert "not trained yet: fcn16s-0.safetensors, fcn8s-0.safetensors" in told and "| FCN-32s |\n" in told
    # A run that was stopped is gone on with: here before its first epoch ended.
    (work / "fcn16s-0.log.jsonl").write_text("")
    again = benchmark("strides", *words, "--json", out, "--plot", plot)
    assert again.count("$ train-fcn") == 2 and "not trained" not in again and is_picture(plot)
    result = json.loads(out.read_text())
    assert [(run["stride"], run["seed"]) for run in result["runs"]] == [(32, 0), (16, 0), (8, 0)]
    assert f"| mIoU |  | {100 * result['runs'][0]['miou']:.1f} ± 0.0 |" in again and "| c | " in again
    benchmark("strides", *words, "--plot", tmp_path / "alone.png", "--predictions")
    with Image.open(plot) as whole, Image.open(tmp_path / "alone.png") as alone:
        assert is_picture(tmp_path / "alone.png") and alone.width < 0.7 * whole.width
    # Networks that were trained otherwise are no comparison.
    shutil.copy(work / "fcn8s-0.safetensors", work / "fcn16s-0.safetensors")
    benchmark("strides", *words, ok=1)


def test_strides_tell_the_spread_of_their_seeds():
    runs = [
        {"stride": stride, "seed": seed, "miou": miou, "class_iou": [miou, None]}
        for stride, *mious in ((32, 0.50, 0.52), (16, 0.57, 0.55), (8, 0.56, 0.60))
        for seed, miou in enumerate(mious)
    ]
    told = strides.table({"classes": ["a", "b"], "thickness": [4.2, None], "runs": runs})
    assert "| mIoU |  | 51.0 ± 1.0 | 56.0 ± 1.0 | 58.0 ± 2.0 | +5.0 | +2.0 |" in told
    assert "| a | 4 | 51.0 ± 1.0 | 56.0 ± 1.0 | 58.0 ± 2.0 | +5.0 | +2.0 |" in told
    assert "the worst 16s is 3.0 points above the best 32s (2 and 2 seeds)" in told
    assert "the worst 8s is 1.0 points below the best 16s (2 and 2 seeds)" in told
    assert told[-1] == "mIoU is over the 1 classes present; val has no b"


def test_thickness_is_that_of_bars():
    class Bars:
        classes = ("back", "thin", "thick")

        def __len__(self):
            return 1

        def __getitem__(self, index):
            labels = np.zeros((100, 400), np.uint8)
            labels[:, 100:104], labels[:, 200:240] = 1, 2
            return None, labels

    labels = Bars()[0][1]
    result = strides.compared(Bars(), {(8, 0): [labels]})
    assert result["thickness"][1:] == [4, 40] and result["runs"][0]["miou"] == 1


@pytest.mark.slow
def test_stages_shows_what_each_costs(exports, data, tmp_path):
    needs("tensorrt_rtx")
    out = tmp_path / "stages.json"
    (tmp_path / "work").mkdir()
    for name in ("narrow.onnx", "narrow.engine"):  # what is there is not made again
        shutil.copy(exports / name, tmp_path / "work")
    for flag in ("fp16", "bf16", "fp8"):  # of plans the benchmark tells the size alone; that of INT8 is built
        shutil.copy(exports / "narrow.engine", tmp_path / f"work/narrow-{flag}-sm89.engine")
    words = (exports / "narrow.safetensors", "--data", data, "--calib", data / "train", "--scales", "0.5,mixed")
    words = (*words, "--count", 2, "--max-drop", 100, "--work", tmp_path / "work", "--plot", tmp_path / "s.png")
    told = benchmark("stages", *words, "--sizes", "64x64", "--threads", 1, "--json", out)
    assert is_picture(tmp_path / "s.png")
    result = json.loads(out.read_text())
    names = ["PyTorch", "ONNX", "CPU, float32", "CPU, INT8"]
    names += [f"TensorRT, {name}" for name in ("FP16", "BF16", "INT8", "FP8")]
    assert [row["name"] for row in result["rows"]] == names and result["images"] == 2
    for row in result["rows"]:
        assert list(row["scales"]) == ["1", "0.5", "mixed"] and 0 < row["mean_iou"] < 1 and row["bytes"] > 10_000
        assert (row["ms"] is None) == row["name"].startswith(stages.EMULATED)
        assert f"| {row['name']} | {row['pixel_accuracy']:.4f} | " in told
    with EngineFile(tmp_path / "work/narrow-int8-sm89.engine") as file:
        assert (file.manifest.target, file.manifest.precision) == ("sm89", "int8")
    same = [row["labels_as_first"] for row in result["rows"]]
    assert same[0] is None and min(same[1:3]) > 0.999 and same[4] > max(same[3], *same[5:])


@pytest.mark.slow
def test_refine_gives_gains_and_costs(exports, data, tmp_path):
    out, plot = tmp_path / "refine.json", tmp_path / "refine.png"
    words = ("--data", data, "--count", 2, "--rounds", 1, "--json", out, "--plot", plot)
    told = benchmark("refine", exports / "narrow.engine", *words)
    assert is_picture(plot)
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == ["bilinear", *refine.CANDIDATES]
    for row in result["rows"]:
        assert f"| {row['name']} | {100 * row['miou']:.2f} | " in told
        assert 0 < row["miou"] < 1 and len(row["boundary_iou"]) == 2 and row["ms"] > 0
    benchmark("refine", exports / "narrow.engine", "--data", data, "--only", "magic", ok=2)


def test_boundary_iou_is_that_of_its_definition():
    mask = np.zeros((30, 30), bool)
    mask[5:25, 5:25] = True
    assert refine.inner_border(mask, 2).sum() == 20**2 - 16**2
    assert refine.inner_border(np.ones((9, 9), bool), 1).sum() == 81 - 49
    labels = mask.astype(np.uint8)
    moved = np.roll(labels, 1, axis=1)
    share = 2 / np.hypot(30, 30)
    counts = refine.border_counts(labels, moved, 2, share)
    ring, other = refine.inner_border(mask, 2), refine.inner_border(moved == 1, 2)
    assert counts[:, 1].tolist() == [(ring & other).sum(), (ring | other).sum()]
    assert refine.boundary_iou(refine.border_counts(labels, labels, 2, share), np.eye(2)) == 1
    # What is not counted belongs to no class.
    void = labels.copy()
    void[:15] = 255
    top = moved.copy()
    top[:14] = 1 - top[:14]
    assert (refine.border_counts(void, top, 2, share) == refine.border_counts(void, moved, 2, share)).all()


def test_refining_finds_the_border_in_the_photograph():
    # A circle that coarse scores know roughly, and the photograph well.
    y, x = np.mgrid[:121, :147]
    truth = (np.hypot(y - 60, x - 70) < 37).astype(np.uint8)
    image = np.where(truth[:, :, None] == 1, (200, 90, 40), (60, 120, 160)).astype(np.uint8)
    padded = np.pad(truth, ((0, 7), (0, 13)), mode="edge")
    share = padded.reshape(16, 8, 20, 8).mean((1, 3))
    rough = share + 0.35 * np.random.default_rng(0).normal(size=share.shape)
    scores = np.stack([1 - rough, rough]).astype(np.float32) * 6
    wrong = {name: (call(scores, image, 8) != truth).mean() for name, call in refine.CANDIDATES.items()}
    bilinear = (refine.enlarged(scores, 8).argmax(0)[:121, :147] != truth).mean()
    for name in ("slopes added", "fast guided filter, stride 8", "mean field, guided, stride 8", "joint bilateral"):
        assert wrong[name] < 0.8 * bilinear, name
    exact = refine.enlarged(scores, 8)
    import torch

    known = torch.nn.functional.interpolate(torch.from_numpy(scores)[None], scale_factor=8.0, mode="bilinear")[0]
    np.testing.assert_allclose(exact, known.numpy(), atol=1e-4)


@pytest.mark.slow
def test_patchwise_compares_one_pass_with_patches(tmp_path):
    out = tmp_path / "patchwise.json"
    words = ("--networks", "alexnet", "--runtimes", "onnxruntime", "--width", 0.05, "--rounds", 1, "--single", 2)
    words += ("--threads", 1)
    told = benchmark("patchwise", *words, "--json", out)
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["grid"], row["dense"]) == ([10, 10], [63, 63])
    # Where both see the same pixels they have the same scores.
    assert row["at_224"] < 1e-5 and row["at_field"] < 1e-5 and 0.5 < row["windows_correlation"] < 1
    assert row["memory"]["patches, all at once"] > row["memory"]["one pass"] > 0
    assert f"patches over one pass: {row['ratio'][0]:.1f} times the time" in told
    benchmark("patchwise", "--networks", "lenet", ok=2)


def test_patches_are_windows_of_the_image():
    image = np.random.default_rng(0).normal(size=(3, 100, 100)).astype(np.float32)
    patches = patchwise.windows(image, 64, 32, 3)
    assert patches.shape == (9, 3, 64, 64)
    np.testing.assert_array_equal(patches[4], image[:, 32:96, 32:96])
    assert (patches[8][:, 36:] == 0).all() and (patches[8][:, :36, :36] == image[:, 64:, 64:]).all()


@pytest.mark.slow
def test_the_heat_map_is_the_classifier_slid(tmp_path):
    import torch

    net, convolutional = heatmap.pair()
    image = photo(224, 320)
    found = heatmap.probabilities(convolutional, image)
    assert found.shape == (1000, 1, 4)
    with torch.inference_mode():
        own = net(heatmap.normalised(image[:, :224]))[0].softmax(0).numpy()
    np.testing.assert_allclose(heatmap.probabilities(convolutional, image[:, :224])[:, 0, 0], own, atol=1e-5)
    told = benchmark("heatmap", tmp_path / "heat.png", "--longer", 640)
    assert "most probable 985" in told and "427×640: 7×14 cells, class 985 at most" in told
    assert is_picture(tmp_path / "heat.png")
    benchmark("heatmap", tmp_path / "heat.png", "--label", 1000, ok=2)


@pytest.mark.slow
def test_scenes_compares_margins_and_reads_files_of_every_layout(tmp_path):
    out = tmp_path / "scenes.json"
    told = benchmark("scenes", "--pixels", 400_000, "--rounds", 1, "--json", out)
    result = json.loads(out.read_text())
    labels = result["labels"]
    assert labels["no_data"] == pytest.approx(0.4, abs=0.01) and labels["data_without_class"] == 0
    assert labels["different"] == 0 == labels["classes_in_no_data"] and "labels differ beyond" in told
    assert result["reading"]["npy"]["ratio"] == [1, 1, 1]
    assert {"tiles", "tiles, deflate", "tiles of planes, deflate", "strips"} <= result["reading"].keys()
    assert all(row["seconds"][0] > row["bare_s"][0] > 0 for row in result["reading"].values())


@pytest.mark.slow
def test_serving_is_measured_beside_a_bare_call(exports, tmp_path):
    needs("starlette"), needs("grpc")
    out = tmp_path / "serving.json"
    words = ("--seconds", 1, "--runs", 3, "--clients", 3, "--images", 3, "--large", "300x400", "--json", out)
    told = benchmark("serving", exports / "narrow.engine", *words)
    found = json.loads(out.read_text())
    assert set(found["latency"]) == {"bare", "REST", "gRPC"} and "of a bare call" in told
    for kind in ("REST", "gRPC"):
        rates = found["throughput"]["rates"][kind]
        assert (rates["lost"], rates["wrong"]) == (0, 0) and rates["images"] > 0
        assert 0 < rates["clients"] < 1 and rates["over_map"] < rates["over_map_beside"]
        assert rates["processor_over_map"] > 0.5 and found["latency"][kind]["processor_over_bare"] > 0.5
        assert re.search(rf"^{kind} over map +{rates['over_map']:.3f}  ≥ 0.92", told, re.MULTILINE)
    assert found["large"]["peak"] < 1e9
    assert found["refusals"]["labelled"] + found["refusals"]["refused"] == 30
    assert found["refusals"]["labelled"] >= 10 and found["refusals"]["run_of_20_dropped"] == 0


@pytest.mark.slow
def test_reuse_compares_the_labels_of_each_stream_and_gives_a_row(exports, data):
    told = benchmark(
        "reuse", exports / "narrow.engine", "--data", data, "--size", "128x192", "--frames", 3, "--rounds", 1
    )
    kinds = "still|5 % of blocks|in one place|noise"
    rows = re.findall(rf"^ *({kinds}) +[\d.]+/s +[\d.]+× +[\d.]+× +[\d.]+%$", told, re.MULTILINE)
    assert rows == kinds.split("|")
    told = benchmark("reuse_ceiling", exports / "narrow.onnx", "--data", data, "--size", "128x192")
    shares = np.array(re.findall(r"^ +\d+ +([\d.]+)% +([\d.]+)% +([\d.]+)%$", told, re.MULTILINE), float)
    # Of each of two streams: all of the work, and never less to be done again in coarser layers.
    assert len(shares) % 2 == 0
    for stream in np.split(shares, 2):
        assert stream[:, :2].sum(0) == pytest.approx(100, abs=0.5) and (np.diff(stream[:, 2]) >= 0).all()
    assert len(re.findall(r"^by work at most [\d.]+×, by time at most [\d.]+×$", told, re.MULTILINE)) == 2


@pytest.mark.slow
def test_validation_compares_whole_logits_with_stages(tmp_path):
    out = tmp_path / "validation.json"
    told = benchmark("validation", "--size", "300x333", "--rounds", 1, "--json", out)
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["whole", "stages", "onnxruntime", "openvino"] and "of whole" in told
    assert all(row["processor_s"][0] > 0 and row["equal"] > 0.999 for row in rows.values())
    assert rows["whole"]["counts_apart"] == 0


def test_overhead_is_that_of_the_runtime_over_its_core(exports):
    told = benchmark("overhead", exports / "narrow.engine", "--pairs", 3, "--threads", 1)
    assert "core alone (backend)" in told and "ratio, pair by pair" in told

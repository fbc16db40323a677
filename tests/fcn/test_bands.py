"""Training on images of any bands and types: from files with no-data margins to labels of an INT8 engine."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from fcn_deploy.calibration.datasets import load_dataset
from fcn_deploy.fcn import crops as crops_module
from fcn_deploy.fcn.augment import augment
from fcn_deploy.fcn.backbones import build_backbone
from fcn_deploy.fcn.checkpoint import load_checkpoint
from fcn_deploy.fcn.crops import Crops
from fcn_deploy.fcn.recipes import Recipe
from helpers import command, one_error
from PIL import Image

from fcn_deploy import DeployError, ModelCard, Segmenter

MEANS = np.array([[300, 500, 700, 2000], [900, 800, 1500, 1200], [2500, 2600, 2400, 2800]])  # by class
NAMES_FILE = "water 0 0 255\nfield 0 160 0\ncloud #ffffff\n"


def scene(seed, size=(160, 192), margin=48):
    """(uint16 [H, W, 4] with a margin of zeros, labels [H, W])."""
    random = np.random.default_rng(seed)
    labels = np.kron(random.integers(0, 3, (size[0] // 32, size[1] // 32)), np.ones((32, 32), int)).astype(np.uint8)
    image = np.clip(MEANS[labels] + random.normal(0, 60, (*size, 4)), 1, 10000).astype(np.uint16)
    image[:, :margin] = 0
    return image, labels


def save_tiff(path, array, nodata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = [(42113, "s", 0, nodata, True)] if nodata else []
    tifffile.imwrite(path, array, photometric="minisblack", planarconfig="contig", extratags=tags)


def save_scenes(folder, dtype=np.uint16, nodata="0"):
    for split, seeds in (("train", (1, 2, 3)), ("val", (4,))):
        for seed in seeds:
            image, labels = scene(seed)
            image = image.astype(dtype)
            if nodata == "nan":
                image[image == 0] = np.nan
            save_tiff(folder / split / f"{seed}.tif", image, None if nodata == "nan" else nodata)
            save_tiff(folder / f"{split}annot" / f"{seed}.tif", labels)
    (folder / "names.txt").write_text(NAMES_FILE)
    return folder


def trained(folder, out, *words, dtype="uint16", ok=0):
    return command(
        "train-fcn", "--data", folder, "--out", out, "--class-file", folder / "names.txt", "--channels", "4", "--dtype",
        dtype, "--epochs", "4", "--batch", "4", "--crop", "96x96", "--crops-per-megapixel", "150", *words, ok=ok,
    )  # fmt: skip


@pytest.mark.slow
def test_a_network_of_four_bands_from_training_to_int8_labels(tmp_path):
    """train-fcn, export-onnx, build-engine, label-images and eval-fcn, on scenes with margins."""
    data = save_scenes(tmp_path / "d")
    done = trained(data, tmp_path / "m.safetensors")
    assert "from ImageNet weights, the first layer brought to 4 bands" in done.stdout
    card = load_checkpoint(tmp_path / "m.safetensors").card
    assert (card.channels, card.dtype, card.classes) == (4, "uint16", ("water", "field", "cloud"))
    assert card.colors == ((0, 0, 255), (0, 160, 0), (255, 255, 255)) and card.range is None
    values = np.concatenate([scene(seed)[0][:, 48:].reshape(-1, 4) for seed in (1, 2, 3)]).astype(float)
    np.testing.assert_allclose(card.mean, values.mean(0), rtol=1e-4)
    np.testing.assert_allclose(card.std, values.std(0), rtol=1e-4)
    command("export-onnx", tmp_path / "m.safetensors", "-o", tmp_path / "m.onnx")
    build = ("build-engine", tmp_path / "m.onnx", "--backend", "onnxruntime", "--sizes", "160x192")
    command(*build, "-o", tmp_path / "m.engine")
    int8 = ("--int8", "--calib", data / "train", "--labels", data / "trainannot", "--max-drop", "20")
    command(*build, "-o", tmp_path / "m8.engine", *int8)
    image, labels = scene(4)
    models = [tmp_path / name for name in ("m.safetensors", "m.onnx", "m.engine", "m8.engine")]
    scores = [json.loads(line) for line in command("eval-fcn", *models, "--data", data, "--json").stdout.splitlines()]
    assert scores[0]["mean_iou"] > 0.6  # it has learned
    assert all(abs(each["mean_iou"] - scores[0]["mean_iou"]) < 1e-3 for each in scores[1:3])
    assert abs(scores[3]["mean_iou"] - scores[0]["mean_iou"]) < 0.2
    command("infer", tmp_path / "m.engine", data / "val", "-o", tmp_path / "o", "--strict")
    found = np.asarray(Image.open(tmp_path / "o" / "4.png"))
    assert (found[:, :48] == 255).all() and (found[:, 48:] < 3).all()
    valid = labels != 255
    valid[:, :48] = False
    intersections = [((found == k) & (labels == k) & valid).sum() for k in range(3)]
    unions = [(((found == k) | (labels == k)) & valid).sum() for k in range(3)]
    assert np.mean(np.array(intersections) / unions) == pytest.approx(scores[2]["mean_iou"], abs=1e-6)
    with Segmenter(tmp_path / "m.engine") as net:
        np.testing.assert_array_equal(net(image, image.any(axis=2)), found)


def test_ranges_and_types_of_numbers_go_into_the_card(tmp_path):
    for dtype, nodata in ((np.float32, "nan"), (np.int16, "0")):
        data = save_scenes(tmp_path / str(nodata), dtype, nodata)
        out = tmp_path / f"{nodata}.safetensors"
        name = np.dtype(dtype).name
        trained(data, out, "--epochs", "1", "--no-pretrained", "--width", "0.25", "--input-range", "0,4000", dtype=name)
        card = load_checkpoint(out).card
        assert (card.dtype, card.range) == (name, (0, 4000))
        least = 1 if dtype == np.float32 else 32767
        values = scene(1)[0][:, 48:].astype(float) / 4000 * least
        np.testing.assert_allclose(card.mean, values.mean((0, 1)), rtol=0.25)
    done = command("eval-fcn", out, "--data", data, "--input-range", "0,40000", ok=2)
    assert "input range 0,40000, and" in one_error(done)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--channels", "5"), "has 4 channels; this model takes 5; or say by --channels and --dtype what the network"),
        (
            ("--dtype", "int16"),
            "holds uint16 values; this model takes int16: convert it first, or say which values are",
        ),
        (("--input-range", "9,3"), "the first number must be below the second"),
        (("--nodata", "-1"), "no-data value -1, and"),
        (("--class-file", "none.txt"), "none.txt does not exist"),
        (("--data", "digits"), "digits are RGB of 8 bits"),
    ],
)
def test_bad_words_are_one_line_each_and_write_nothing(tmp_path, words, said):
    data = save_scenes(tmp_path / "d")
    done = trained(data, tmp_path / "m.safetensors", "--no-pretrained", "--width", "0.25", *words, ok=2)
    assert said in one_error(done) and not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("bands", [1, 2, 4, 7])
@pytest.mark.parametrize("name", ["efficientnet-lite0", "resnet50"])  # named here as published
def test_weights_for_rgb_start_a_backbone_of_other_bands(name, bands):
    """What the first convolution adds up of equal bands is what it adds up of a grey photograph."""
    published = build_backbone(name, 3, 0.25).eval()
    state = published.state_dict()
    backbone = build_backbone(name, bands, 0.25).eval()
    backbone.load_classification(state)
    grey = torch.randn(1, 1, 64, 64)
    with torch.inference_mode():
        expected = published(grey.expand(1, 3, 64, 64))
        found = backbone(grey.expand(1, bands, 64, 64))
    if bands == 1:
        for stride, features in expected.items():
            torch.testing.assert_close(found[stride], features, rtol=1e-3, atol=1e-4)
    first = next(weight for weight in backbone.state_dict().values() if weight.ndim == 4)
    theirs = next(weight for weight in state.values() if weight.ndim == 4)
    torch.testing.assert_close(first[:, 0], theirs.sum(1) if bands == 1 else theirs[:, 0] * 3 / bands)
    if bands > 3:
        torch.testing.assert_close(first[:, 3], theirs[:, 0] * 3 / bands)
    with pytest.raises(DeployError, match="of another network or width"):
        build_backbone(name, bands, 0.5).load_classification(state)


CARD = ModelCard(("a", "b"), channels=4, dtype="uint16", mean=(1000,) * 4, std=(500,) * 4)


def test_what_is_no_data_is_zero_in_a_crop_and_has_no_label():
    image, labels = scene(1, (96, 96), margin=0)
    hole = np.zeros((96, 96), bool)
    hole[20:60, 30:70] = True
    masked = np.ma.MaskedArray(image, np.repeat(hole[:, :, None], 4, 2))
    for seed in range(5):
        random = np.random.default_rng(seed)
        sample, target = augment(masked, labels, CARD, (96, 96), random, scale=(1, 1), flip=False, color=0.5)
        assert (sample[:, torch.from_numpy(hole)] == 0).all() and (target.numpy()[hole] == 255).all()
        np.testing.assert_array_equal(target.numpy()[~hole], labels[~hole])
        assert (sample[:, torch.from_numpy(~hole)] != 0).float().mean() > 0.99


def test_an_epoch_takes_crops_by_megapixels_and_reads_each_scene_once(tmp_path, monkeypatch):
    for index, size in enumerate([(500, 600), (40, 50), (640, 960)]):
        image, labels = scene(index, size=(size[0] // 32 * 32 or 32, size[1] // 32 * 32))
        save_tiff(tmp_path / "train" / f"{index}.tif", image)
        save_tiff(tmp_path / "trainannot" / f"{index}.tif", labels)
    data = replace(load_dataset(str(tmp_path), "train"), card=CARD)
    recipe = Recipe(batch=3, crop=(64, 64), crops_per_megapixel=10)
    crops = Crops(data, CARD, recipe)
    assert crops.counts == [3, 1, 6] and len(crops) == 10
    opened, source = [], type(data).source

    def noted(self, index):
        opened.append(index)
        return source(self, index)

    monkeypatch.setattr(type(data), "source", noted)
    for held in (1 << 30, 1):  # bytes
        monkeypatch.setattr(crops_module, "HELD_BYTES", held)
        opened.clear()
        order = crops.order(0)
        taken = [crop for batch in order for crop in batch]
        assert [len(batch) for batch in order] == [3, 3, 3, 3] and len(set(taken)) == 10 and taken[10:] == taken[:2]
        first = list(crops.batches(0))
        assert sorted(set(opened)) == [0, 1, 2] and len(opened) <= 5  # two crops fill the last batch
        again = list(crops.batches(0))
        assert all(torch.equal(a, b) for pair in zip(first, again, strict=True) for a, b in zip(*pair, strict=True))
        assert not torch.equal(first[0][0], next(iter(crops.batches(1)))[0])
    monkeypatch.setattr("fcn_deploy.calibration.datasets.REGION_PIXELS", 1000)  # read where they are cropped
    large = list(crops.batches(0))
    assert all(torch.equal(a, b) for pair in zip(first, large, strict=True) for a, b in zip(*pair, strict=True))


def test_strict_refuses_values_that_are_not_the_networks_before_any_work(tmp_path):
    """A 12-bit file among 8-bit ones: the last of the validation images, in training, evaluation and calibration."""
    random = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 2)):
        for folder in (split, f"{split}annot"):
            (tmp_path / "d" / folder).mkdir(parents=True)
        for index in range(count):
            image = random.integers(0, 256, (64, 64, 3), np.uint8)
            if (split, index) == ("val", 1):
                image = random.integers(0, 4000, (64, 64, 3), np.uint16)
            tifffile.imwrite(tmp_path / "d" / split / f"{index}.tif", image, photometric="rgb")
            Image.fromarray(random.integers(0, 2, (64, 64), np.uint8)).save(
                tmp_path / "d" / f"{split}annot/{index}.png"
            )
    out = tmp_path / "m.safetensors"
    train = ("train-fcn", "--data", tmp_path / "d", "-o", out, "--no-pretrained", "--width", "0.25", "--epochs", "1")
    said = one_error(command(*train, "--strict", ok=2)).removeprefix("train-fcn: ")
    assert "val/1.tif holds 16-bit values" in said and "(refused by --strict)" in said and not out.exists()
    done = command(*train)  # without it, it is said
    assert "val/1.tif holds 16-bit values" in done.stderr and out.exists()
    evaluated = one_error(command("eval-fcn", out, "--data", tmp_path / "d", "--strict", ok=2))
    assert evaluated == f"eval-fcn: {said}"
    command("export-onnx", out, "-o", tmp_path / "m.onnx")
    build = ("build-engine", tmp_path / "m.onnx", "-o", tmp_path / "m.engine", "--backend", "onnxruntime")
    calibrated = one_error(command(*build, "--int8", "--calib", tmp_path / "d/val", "--strict", ok=2))
    assert calibrated == f"build-engine: {said}" and not (tmp_path / "m.engine").exists()
    assert "--strict is of the files of --calib" in one_error(command(*build, "--strict", ok=2))
